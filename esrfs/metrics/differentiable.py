"""SSIMULACRA2 as a function that gradients flow through: for training, and for refining small pictures.

The same features and weights as :mod:`esrfs.metrics.ssimulacra2` (which is the one that decides, and is made for speed
and large pictures), on float tensors, a whole batch at once. They agree within .01. What differs: a patch with fewer
than six resolutions of 8×8 pixels keeps the weights of those that it has, instead of being given others' weights as in
the reference; for patches of 128 pixels only the smallest resolution is missing, which weighs next to nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.metrics import ssimulacra2 as metric

_BLOCK = 64
"""Pixels that one product of matrices blurs at once, in each direction."""


class _Plane(NamedTuple):
    """The original's side of one channel at one resolution."""

    padded: Tensor
    """N×(H+10)×(W+10)."""
    mean: Tensor
    """N×H×W, blurred."""
    spread: Tensor
    """N×H×W, local variance + C2."""
    edges: Tensor
    """N×H×W: 1 + what differs from the mean."""


class Original:
    """Originals that many views are compared with: their half of the work is done once."""

    def __init__(self, original: Tensor) -> None:
        """N×3×H×W, RGB in 0 to 1. Raises ValueError for another shape, and pictures smaller than 8×8."""
        if original.ndim != 4 or original.shape[1] != 3:
            raise ValueError(f"{tuple(original.shape)} is not the shape of RGB pictures")
        if min(original.shape[2:]) < metric._SMALLEST:
            raise ValueError(f"pictures of {tuple(original.shape[2:])} are too small for SSIMULACRA2")
        self.shape = original.shape
        self._planes: list[dict[int, _Plane]] = []
        for planes, channels in _resolutions(original):
            self._planes.append({channel: _prepared(planes[channel], metric._OUTSIDE[channel]) for channel in channels})

    def scores(self, view: Tensor) -> Tensor:
        """Of N pictures of the originals' shape → N."""
        if view.shape != self.shape:
            raise ValueError(f"pictures of {tuple(self.shape)} and {tuple(view.shape)} can't be compared")
        total = torch.zeros(view.shape[0], device=view.device)
        for known, (planes, channels) in zip(self._planes, _resolutions(view), strict=True):
            for channel, features in channels.items():
                maps = _maps(known[channel], planes[channel], metric._OUTSIDE[channel])
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


def ssimulacra2(original: Tensor, view: Tensor) -> Tensor:
    """Scores of N pictures: two N×3×H×W, RGB in 0 to 1 as sRGB is coded (values beyond are cut off) → N.

    Gradients flow to ``view`` and, if asked for, to ``original``. Raises ValueError for other shapes, and pictures
    smaller than 8×8.
    """
    return Original(original).scores(view)


_Channels = dict[int, list[metric._Feature]]


def _resolutions(picture: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], _Channels]]:
    """X, Y and B of a picture at each resolution that counts, with the channels and features that do."""
    linear = _linear(picture)
    for level, channels in enumerate(metric._plan(metric._SCALES)):
        if level:
            linear = _halve(linear)
        if min(linear.shape[2:]) < metric._SMALLEST:
            return
        if channels:
            yield _planes(linear), channels


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


def _prepared(plane: Tensor, outside: float) -> _Plane:
    padded = _pad(plane, outside)
    mean, square = _blurred(torch.stack((padded, padded.square()))).unbind(0)
    return _Plane(padded, mean, square - mean.square() + metric._C2, 1 + (plane - mean).abs())


def _maps(original: _Plane, view: Tensor, outside: float) -> tuple[Tensor, Tensor, Tensor]:
    """ssim, ringing and lost, N×H×W each."""
    padded = _pad(view, outside)
    mean, square, product = _blurred(torch.stack((padded, padded.square(), padded * original.padded))).unbind(0)
    similar = 2 * (product - original.mean * mean) + metric._C2
    spread = square - mean.square() + original.spread
    ssim = (1 - (1 - (original.mean - mean).square()) * similar / spread).clamp(min=0)
    edges = (1 + (view - mean).abs()) / original.edges - 1
    return ssim, edges.clamp(min=0), (-edges).clamp(min=0)


def _pad(plane: Tensor, outside: float) -> Tensor:
    """By the blur's radius: a mirror image above and below, ``outside`` left and right, as in the reference."""
    radius = metric._RADIUS
    rows = torch.cat((plane[:, :radius].flip(1), plane, plane[:, -radius:].flip(1)), 1)
    return F.pad(rows, (radius, radius), value=outside)


class _Blur(torch.autograd.Function):
    """The blur is linear and its kernel symmetric, so its gradient is a blur too: half the time of what autograd makes
    of the windows below."""

    @staticmethod
    def forward(context: FunctionCtx, padded: Tensor) -> Tensor:
        return _blur(padded)

    @staticmethod
    @once_differentiable
    def backward(context: FunctionCtx, gradient: Tensor) -> Tensor:
        return _blur(F.pad(gradient, [2 * metric._RADIUS] * 4))


def _blurred(padded: Tensor) -> Tensor:
    """…×(H+10)×(W+10) → …×H×W."""
    result: Tensor = _Blur.apply(padded)  # type: ignore[no-untyped-call]  # torch's stubs lack its types
    return result


def _blur(padded: Tensor) -> Tensor:
    """…×(H+10)×(W+10) → …×H×W, by products of matrices that lie in memory as they are: several times as fast as
    convolutions of one channel, or as one product of all windows, which are copied first."""
    *many, height, width = (*padded.shape[:-2], padded.shape[-2] - 2 * metric._RADIUS, padded.shape[-1])
    planes = padded.reshape(-1, *padded.shape[-2:])
    count = planes.shape[0]
    down = planes.new_empty(count, height, width)
    for top, bottom in _blocks(height):
        band = _band(bottom - top, padded.device).T.expand(count, -1, -1)
        down[:, top:bottom] = torch.bmm(band, planes[:, top : bottom + 2 * metric._RADIUS])
    rows = down.view(-1, width)
    across = rows.new_empty(rows.shape[0], width - 2 * metric._RADIUS)
    for left, right in _blocks(across.shape[1]):
        band = _band(right - left, padded.device)
        torch.mm(rows[:, left : right + 2 * metric._RADIUS], band, out=across[:, left:right])
    return across.view(*many, height, -1)


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + _BLOCK, size)) for begin in range(0, size, _BLOCK)]


@functools.cache
def _band(size: int, device: torch.device) -> Tensor:
    """(size + 10) × size: columns are the blur's kernel, one step further each."""
    return metric._band_matrix(size).T.contiguous().to(device)
