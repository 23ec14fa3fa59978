"""What a store does to a picture before the network sees it: its own reduction, and AVIF with its own settings.

AVIF costs more than a small network, so each photograph gets a few coded versions before training begins, instead of a
new one for each patch. They are kept as files, so that the next training (another network, or this one resumed) begins
at once; in a folder for each version of the encoder, whose name tells it.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, features

from esrfs import whole
from esrfs.compaction import planner, shrinking
from esrfs.compaction.encoder import encode_avif
from esrfs.formats import cells, libavif
from esrfs.formats.view import Samples
from esrfs.networks import loading
from esrfs.train.settings import StoreDegradation

Pixels = npt.NDArray[np.uint8]

_PROBES = (24, 44, 60)
"""Levels at which ``encoder`` looks at what it makes."""


def code(small: Pixels, level: int) -> bytes:
    """The AVIF that compaction would put into a blob, at one of the planner's levels (0 to 63)."""
    return encode_avif(Image.fromarray(small), planner.quality(level))


def decode(avif: bytes) -> Samples:
    """As the store's networks see it: of 16 bits, if it has more than 8."""
    with Image.open(io.BytesIO(avif)) as picture:
        width, height = picture.size
    samples = cells.decode(avif, width, height, deep=True)
    return np.repeat(samples, 3, 2) if samples.shape[2] == 1 else samples


@functools.cache
def encoder() -> str:
    """What codes them: the versions of its parts, and a digest of what it makes of a small picture, which also depends
    on how compaction sets it."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    digest = hashlib.sha256(b"".join(code(noise, level) for level in _PROBES))
    return f"pillow-{PIL.__version__}-libavif-{libavif.version() or features.version('avif')}-{digest.hexdigest()[:12]}"


def draw_levels(content: bytes, scale: int, degradation: StoreDegradation, *, seed: int) -> tuple[int, ...]:
    """Random levels for a picture that ``content`` identifies; the same for the same values."""
    rng = np.random.default_rng([seed, scale, *content[:8]])
    low, high = degradation.levels
    return tuple(int(level) for level in rng.integers(low, high + 1, degradation.versions))


def versions(
    full: Pixels, scale: int, levels: Sequence[int], cache: Path, shrinker: loading.Network | None = None
) -> tuple[Samples, ...]:
    """The picture made small: clean, then through AVIF at each level, changed by the shrinker before."""
    clean = shrinking.reduced(full, scale) if scale > 1 else full

    def coded(level: int) -> Samples:
        if shrinker is None:
            return decode(_coded(clean, level, cache))
        packed = shrinking.pack(full, clean, scale, shrinking.alike(level))
        return decode(_coded(shrinker(packed[None])[0], level, cache))

    return (clean, *map(coded, levels))


def _coded(small: Pixels, level: int, cache: Path) -> bytes:
    path = cache / encoder() / f"{hashlib.sha256(small.tobytes()).hexdigest()[:32]}-{level}.avif"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        avif = code(small, level)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write(path, avif)
        return avif
