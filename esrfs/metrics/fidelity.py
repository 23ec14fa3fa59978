"""PSNR: the plain distance between two pictures, shown beside the gate's metric, and the measure of a network's
fidelity."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

IDENTICAL = 99.0
"""dB, in place of infinity."""

_BAND_ROWS = 256


def psnr(a: Pixels, b: Pixels) -> float:
    """dB over all samples of two pictures of one shape, at most 99 (identical). Raises ValueError for other shapes."""
    _check(a, b)
    total = 0
    for top in range(0, a.shape[0], _BAND_ROWS):
        band = slice(top, top + _BAND_ROWS)
        difference = (a[band].astype(np.int16) - b[band]).astype(np.int32).ravel()
        # A band of 256 rows stays below 2^63 whatever its width; int32 alone would not.
        total += int(np.einsum("i,i->", difference, difference, dtype=np.int64))
    return _decibels(total / a.size)


def y_psnr(a: Pixels, b: Pixels) -> float:
    """dB over luma (BT.601, 16 to 235, not rounded: the super-resolution papers' Y) of two H×W×3 RGB pictures."""
    _check(a, b)
    weights = np.array([65.481, 128.553, 24.966]) / 255
    total = 0.0
    for top in range(0, a.shape[0], _BAND_ROWS):
        band = slice(top, top + _BAND_ROWS)
        difference = (a[band].astype(np.int16) - b[band]) @ weights
        total += float(np.vdot(difference, difference))
    return _decibels(total / (a.shape[0] * a.shape[1]))


def _check(a: Pixels, b: Pixels) -> None:
    if a.shape != b.shape or not a.size:
        raise ValueError(f"pictures of {a.shape} and {b.shape} can't be compared")


def _decibels(mean_square: float) -> float:
    return IDENTICAL if mean_square == 0 else min(IDENTICAL, 10 * float(np.log10(255**2 / mean_square)))
