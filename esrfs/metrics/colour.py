"""Colour error: CIEDE2000 between two pictures, place by place.

SSIMULACRA2 weighs structure; a large area that is a little too green costs it little. People see just that. So means
over blocks are compared: noise and texture cancel out in them, a shift of hue doesn't.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]

BLOCK = 16
"""Pixels along a block's side."""
_BAND_ROWS = 16 * BLOCK
"""Rows at once: a whole picture in Pillow's hands would take 4 bytes a pixel more."""
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
"""Linear sRGB to CIE XYZ, D65 (IEC 61966-2-1)."""
_WHITE = TO_XYZ.sum(axis=1)


class ColourError(NamedTuple):
    """CIEDE2000; about 1 is just noticeable side by side, 2 to 3 at a glance."""

    mean: float
    """Over all blocks."""
    worst: float
    """Exceeded by one block in a thousand."""


def compare(original: Pixels, view: Pixels) -> ColourError:
    """Two pictures of one shape, H×W×3 sRGB (of gray ones, H×W×1, the error is 0). Raises ValueError."""
    if original.shape != view.shape:
        raise ValueError(f"pictures of {original.shape} and {view.shape} can't be compared")
    if original.shape[2] == 1:
        return ColourError(0.0, 0.0)
    errors = ciede2000(lab(_blocks(original)), lab(_blocks(view)))
    return ColourError(float(errors.mean()), float(np.quantile(errors, 0.999)))


def _blocks(pixels: Pixels) -> Pixels:
    bands = (np.ascontiguousarray(pixels[top : top + _BAND_ROWS]) for top in range(0, len(pixels), _BAND_ROWS))
    return np.concatenate([np.asarray(Image.fromarray(band).reduce(BLOCK)) for band in bands])


def lab(rgb: Pixels) -> Values:
    """… × 3 sRGB bytes → … × 3 CIE L*a*b*, D65."""
    part = rgb / 255.0
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    ratio = linear @ TO_XYZ.T / _WHITE
    bent = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    x, y, z = np.moveaxis(bent, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(first: Values, second: Values) -> Values:
    """… × 3 L*a*b* of both → … differences (CIE 142-2001; written after Sharma, Wu and Dalal, 2005, whose test data it
    meets)."""
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(first, -1, 0), np.moveaxis(second, -1, 0)
    chroma = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(chroma / (chroma + 25.0**7))
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    apart = (h2 - h1 + 180) % 360 - 180
    gray = c1 * c2 == 0
    apart = np.where(gray, 0, apart)
    hue = np.radians(np.where(gray, h1 + h2, h1 + apart / 2) % 360)
    lightness, mean_chroma = (l1 + l2) / 2, (c1 + c2) / 2
    turn = (
        1
        - 0.17 * np.cos(hue - np.radians(30))
        + 0.24 * np.cos(2 * hue)
        + 0.32 * np.cos(3 * hue + np.radians(6))
        - 0.20 * np.cos(4 * hue - np.radians(63))
    )
    off = (lightness - 50) ** 2
    by_lightness = (l2 - l1) / (1 + 0.015 * off / np.sqrt(20 + off))
    by_chroma = (c2 - c1) / (1 + 0.045 * mean_chroma)
    by_hue = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(apart) / 2) / (1 + 0.015 * mean_chroma * turn)
    seventh = mean_chroma**7
    blue = 60 * np.exp(-(((np.degrees(hue) - 275) / 25) ** 2))
    rotation = -2 * np.sqrt(seventh / (seventh + 25.0**7)) * np.sin(np.radians(blue))
    squares = by_lightness**2 + by_chroma**2 + by_hue**2 + rotation * by_chroma * by_hue
    result: Values = np.sqrt(np.maximum(squares, 0))
    return result
