"""Samples of 8 and of 16 bits, each as the other: 255 is 65,535."""

from __future__ import annotations

import numpy as np

from esrfs.formats.view import Pixels, Samples

_ROWS = 64
"""Converted at once, so that they stay in the processor's cache."""


def as_bytes(samples: Samples) -> Pixels:
    """8 bits, rounded."""
    if samples.dtype == np.uint8:
        return samples
    result = np.empty(samples.shape, np.uint8)
    for top in range(0, len(samples), _ROWS):
        result[top : top + _ROWS] = (samples[top : top + _ROWS].astype(np.uint32) * 255 + 32767) // 65535
    return result


def as_16_bits(samples: Samples) -> Samples:
    return samples.astype(np.uint16) * np.uint16(257) if samples.dtype == np.uint8 else samples
