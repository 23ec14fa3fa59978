"""SSIMULACRA2 as a function that gradients flow through: for training, and for refining small pictures.

The same features and weights as :mod:`esrfs.metrics.ssimulacra2` (which is the one that decides, and is made for speed
and large pictures), on float tensors, a whole batch at once. They agree within .01. What differs: a patch with fewer
than six resolutions of 8×8 pixels keeps the weights of those that it has, instead of being given others' weights as in
the reference; for patches of 128 pixels only the smallest resolution is missing, which weighs next to nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.metrics import ssimulacra2 as metric

_BLOCK = 64
"""Pixels that one product of matrices blurs at once, in each direction."""


def ssimulacra2(original: Tensor, view: Tensor) -> Tensor:
    """Scores of N pictures: two N×3×H×W, RGB in 0 to 1 as sRGB is coded (values beyond are cut off) → N.

    Gradients flow to ``view`` and, if asked for, to ``original``. Raises ValueError for other shapes, and pictures
    smaller than 8×8.
    """
    if original.shape != view.shape or original.ndim != 4 or original.shape[1] != 3:
        raise ValueError(f"pictures of {tuple(original.shape)} and {tuple(view.shape)} can't be compared")
    if min(view.shape[2:]) < metric._SMALLEST:
        raise ValueError(f"pictures of {tuple(view.shape[2:])} are too small for SSIMULACRA2")
    linear = [_linear(original), _linear(view)]
    total = torch.zeros(view.shape[0], device=view.device)
    for level, channels in enumerate(metric._plan(metric._SCALES)):
        if level:
            linear = [_halve(picture) for picture in linear]
        if min(linear[0].shape[2:]) < metric._SMALLEST:
            break
        if not channels:
            continue
        planes = [_planes(picture) for picture in linear]
        for channel, features in channels.items():
            maps = _maps(planes[0][channel], planes[1][channel], metric._OUTSIDE[channel])
            for feature in features:
                values = maps[feature.map]
                if feature.power == 1:
                    pooled = values.mean((1, 2))
                else:
                    pooled = values.square().square().mean((1, 2)).clamp(min=1e-28).sqrt().sqrt()
                total = total + feature.weight * pooled
    total = total * 0.9562382616834844
    bent = 2.326765642916932 * total - 0.020884521182843837 * total**2 + 6.248496625763138e-05 * total**3
    scores: Tensor = 100 - 10 * bent.clamp(min=1e-9) ** 0.6276336467831387
    return scores


def _linear(coded: Tensor) -> Tensor:
    coded = coded.float().clamp(0, 1)
    # The power's slope at 0 is infinite, and where() would make NaN of it.
    bright = ((coded.clamp(min=0.04) + 0.055) / 1.055) ** 2.4
    return torch.where(coded <= 0.04045, coded / 12.92, bright)


def _halve(linear: Tensor) -> Tensor:
    """Means of 2×2 pixels; at an odd edge, of what there is."""
    down, right = linear.shape[2] % 2, linear.shape[3] % 2
    if down or right:
        linear = F.pad(linear, (0, right, 0, down), mode="replicate")
    return F.avg_pool2d(linear, 2)


def _planes(linear: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X, Y, B: N×H×W each."""
    opsin = metric._OPSIN.to(linear.device)
    response = torch.einsum("ij,njhw->inhw", opsin, linear) + metric._BIAS
    response = response.clamp(min=1e-6) ** (1 / 3) - metric._BIAS ** (1 / 3)
    luminance = (response[0] + response[1]) * 0.5
    return (response[0] - response[1]) * 7, luminance - (0.45 - 0.01), response[2] - luminance


def _maps(original: Tensor, view: Tensor, outside: float) -> tuple[Tensor, Tensor, Tensor]:
    """ssim, ringing and lost, N×H×W each."""
    padded = [_pad(plane, outside) for plane in (original, view)]
    stacked = torch.stack((padded[0], padded[1], padded[0].square(), padded[1].square(), padded[0] * padded[1]))
    mean1, mean2, square1, square2, product = _blur(stacked).unbind(0)
    similar = 2 * (product - mean1 * mean2) + metric._C2
    spread = (square1 - mean1.square()) + (square2 - mean2.square()) + metric._C2
    ssim = (1 - (1 - (mean1 - mean2).square()) * similar / spread).clamp(min=0)
    edges = (1 + (view - mean2).abs()) / (1 + (original - mean1).abs()) - 1
    return ssim, edges.clamp(min=0), (-edges).clamp(min=0)


def _pad(plane: Tensor, outside: float) -> Tensor:
    """By the blur's radius: a mirror image above and below, ``outside`` left and right, as in the reference."""
    radius = metric._RADIUS
    rows = torch.cat((plane[:, :radius].flip(1), plane, plane[:, -radius:].flip(1)), 1)
    return F.pad(rows, (radius, radius), value=outside)


def _blur(padded: Tensor) -> Tensor:
    """…×(H+10)×(W+10) → …×H×W, by matrix products: several times as fast as convolutions of one channel."""
    return _blur_rows(_blur_rows(padded).transpose(-1, -2)).transpose(-1, -2)


def _blur_rows(padded: Tensor) -> Tensor:
    """…×(W+10) → …×W."""
    width = padded.shape[-1] - 2 * metric._RADIUS
    block = min(_BLOCK, width)
    padded = F.pad(padded, (0, -width % block))
    windows = padded.unfold(-1, block + 2 * metric._RADIUS, block)
    matrix = _band(block, padded.device)
    return (windows @ matrix).flatten(-2)[..., :width]


@functools.cache
def _band(size: int, device: torch.device) -> Tensor:
    """(size + 10) × size: columns are the blur's kernel, one step further each."""
    return metric._band_matrix(size).T.contiguous().to(device)
