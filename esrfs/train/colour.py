"""Colour error as a loss: what ``metrics/colour.py`` measures and the gate bounds, in a form that has slopes.

SSIMULACRA2 weighs structure: a network that learns by it alone, or nearly so, lets the colours of areas drift by a few
shades. Means over blocks are compared, as the gate does it, by CIE94 (CIE 116-1995, graphic arts) in place of
CIEDE2000: much the same where colours lie near each other, and without angles, whose slopes jump.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.metrics.colour import BLOCK, TO_XYZ

_EPSILON = 1e-4
"""Below the square root, which would have no slope at 0: errors of a hundredth."""


def error(full: Tensor, rebuilt: Tensor) -> Tensor:
    """N×3×H×W, sRGB in 0 to 1 (values outside are cut), H and W 16 or more → the mean CIE94 of their blocks."""
    one, other = (_lab(F.avg_pool2d(picture.clamp(0, 1), BLOCK)) for picture in (full, rebuilt))
    lightness, a, b = (other - one).unbind(1)
    chroma, chroma_other = (torch.sqrt(lab[:, 1] ** 2 + lab[:, 2] ** 2 + _EPSILON) for lab in (one, other))
    by_chroma = chroma_other - chroma
    by_hue = (a**2 + b**2 - by_chroma**2).clamp(min=0)
    squares = lightness**2 + (by_chroma / (1 + 0.045 * chroma)) ** 2 + by_hue / (1 + 0.015 * chroma) ** 2
    return torch.sqrt(squares + _EPSILON).mean()


def _lab(rgb: Tensor) -> Tensor:
    """N×3×H×W, sRGB in 0 to 1 → CIE L*a*b*, D65."""
    to_xyz = torch.as_tensor(TO_XYZ, dtype=rgb.dtype, device=rgb.device)
    ratio_of = to_xyz / to_xyz.sum(1, keepdim=True)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    ratio = torch.einsum("ij,njhw->nihw", ratio_of, linear)
    dark = 216 / 24389
    bent = torch.where(ratio > dark, ratio.clamp(min=dark) ** (1 / 3), (24389 / 27 * ratio + 16) / 116)
    x, y, z = bent.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
