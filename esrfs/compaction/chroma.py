"""Colours as AVIF's encoder must be given them so that they come back as they were, where there are 8 bits only.

When libavif turns red, green and blue into luma and chroma, as Pillow has it do, it cuts chroma's fractions off instead
of rounding. So every picture comes back with half a shade less of both chromas: some 0.5 less red, 0.5 more green and
0.6 less blue, at any quality. That is more than half of what a photograph's colours are off by on average at scores of
70 and more, and at ``faithful`` enough for the gate to refuse some. Here what is lost is added before.

A network that enlarges was trained on what comes back, and makes up for it itself.
"""

from __future__ import annotations

import functools
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

_LIFT = 0.42
"""Shades; less than a half, since the colours that are given are rounded, too."""
_ROWS = 16
"""Lifted at once, so that they stay in the processor's cache."""
# From red, green and blue (rows) to luma and chroma (columns), as JPEG and AVIF have it.
_CODED = np.array([[0.299, -0.168736, 0.5], [0.587, -0.331264, -0.418688], [0.114, 0.5, -0.081312]], np.float32)
_DECODED = np.linalg.inv(_CODED)


def lifted(image: Image.Image) -> Image.Image:
    """``image`` (RGB; gray is returned as it is) with more of both chromas, by what the encoder will take."""
    if image.mode != "RGB" or not _encoder_cuts():
        return image
    pixels = np.asarray(image)
    result = np.empty_like(pixels)
    for top in range(0, image.height, _ROWS):
        result[top : top + _ROWS] = _lifted(pixels[top : top + _ROWS])
    return Image.fromarray(result)


def _lifted(pixels: Pixels) -> Pixels:
    # Luma and chroma are rounded first, as they should be in the file. (Pillow's own conversion cuts, too.)
    coded = np.rint(pixels @ _CODED)
    coded[:, :, 1:] += _LIFT
    given: Pixels = np.rint(coded @ _DECODED).clip(0, 255).astype(np.uint8)
    return given


@functools.cache
def _encoder_cuts() -> bool:
    """Whether this libavif does: others may round."""
    colours = np.random.default_rng(1).integers(64, 192, (64, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours).save(out, "AVIF", quality=100, speed=10, subsampling="4:4:4", codec="aom", max_threads=1)
    with Image.open(io.BytesIO(out.getvalue())) as coded:
        change = np.asarray(coded.convert("RGB")).astype(float) - colours
    red, green, blue = change.mean((0, 1))
    return bool(red < -_LIFT / 2 and green > _LIFT / 2 and blue < -_LIFT / 2)
