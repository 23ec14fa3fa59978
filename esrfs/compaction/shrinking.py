"""Making a picture small: by bicubic reduction, and then, where a shrinker was made for the network that will enlarge
it, changed in one pass so that this network makes more of it for its bytes.

What a shrinker looks at is packed as bytes (:func:`pack`), so that it runs tile by tile like any network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from esrfs.formats.pixels import as_array, as_image

Pixels = npt.NDArray[np.uint8]

_LEVELS_ALIKE = 4
"""Neighbouring levels get the same small picture: trials of one picture then mostly share it."""
_BAND_BYTES = 1 << 26
"""What is packed at once, about."""


@dataclass(frozen=True)
class ShrinkerRef:
    sha256: bytes
    """Of its file."""
    margin: int
    """Small pixels around a band that its result depends on."""
    scale: int
    """By which it makes pictures smaller."""


def reduced(pixels: Pixels, scale: int) -> Pixels:
    """H×W×C → ceil(H / scale) × ceil(W / scale) × C by Pillow's bicubic. A side that ``scale`` doesn't divide is
    continued by its last pixels, so that each small pixel stands for ``scale`` × ``scale`` large ones at its place."""
    whole = continued(pixels, scale)
    height, width, colours = whole.shape
    image = as_image(whole, width, height, "L" if colours == 1 else "RGB")
    return as_array(image.resize((width // scale, height // scale), Image.Resampling.BICUBIC))


def continued(pixels: Pixels, scale: int) -> Pixels:
    """With its last row and column again and again, so that ``scale`` divides both sides."""
    below, right = -pixels.shape[0] % scale, -pixels.shape[1] % scale
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge") if below or right else pixels


def alike(level: int) -> int:
    """The level for which the small picture of ``level`` is made."""
    return round(level / _LEVELS_ALIKE) * _LEVELS_ALIKE


def suited(
    pixels: Pixels, small: Pixels, level: int, shrinker: ShrinkerRef, infer: Callable[[bytes, Pixels], Pixels]
) -> Pixels:
    """``small`` (h×w×C), which is ``pixels`` reduced, as the shrinker changes it for AVIF at ``level``: h×w×C."""
    height, width, colours = small.shape
    scale = shrinker.scale
    result = np.empty_like(small)
    rows = max(_BAND_BYTES // (width * (3 * scale * scale + 4)), 8 * shrinker.margin)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        above, below = max(0, top - shrinker.margin), min(height, bottom + shrinker.margin)
        packed = pack(pixels[above * scale : below * scale], small[above:below], scale, level)
        changed = infer(shrinker.sha256, packed)[top - above : bottom - above]
        result[top:bottom] = changed if colours == 3 else changed.mean(2, keepdims=True).round()
    return result


def pack(pixels: Pixels, small: Pixels, scale: int, level: int) -> Pixels:
    """What ``networks.architectures.Shrinker`` takes: h×w×(3·scale² + 4) bytes. ``pixels`` and ``small`` may be
    gray."""
    height, width = small.shape[:2]
    blocks = continued(pixels, scale).reshape(height, scale, width, scale, pixels.shape[2])
    packed = np.empty((height, width, 3 * scale * scale + 4), np.uint8)
    unshuffled = packed[:, :, : 3 * scale * scale].reshape(height, width, 3, scale, scale)
    unshuffled[:] = blocks.transpose(0, 2, 4, 1, 3)
    packed[:, :, 3 * scale * scale : -1] = small
    packed[:, :, -1] = level
    return packed
