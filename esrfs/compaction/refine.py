"""A small picture that suits the network: changed so that what the network makes of it, after the codec, scores better
for its bytes. Gradient descent for each photograph, as DESIGN 10 describes; for a GPU, or for idle time.

The codec itself is not in the loop (its gradient is 0 nearly everywhere, and passing the gradient straight through it
does harm): fresh Gaussian noise of the codec's measured strength stands for it, so that nothing is hidden in what the
codec would remove; and a rate term keeps the picture from growing, the mean over an 8×8 DCT's coefficients c of
log2(1 + |c| / 2.5σ), about the bits that they will cost. Each noise serves for two steps, in the second turned round:
much of what chance does to the gradient cancels out, and half as many steps give more.

How much a bit is worth is told by the codec: ``_POINTS_PER_SHARE`` score points buy as much as all the bytes, at the
point where a level more costs 4 % and gains 1.2 points.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.compaction.shrinking import continued
from esrfs.formats.view import Pixels, Samples
from esrfs.metrics.differentiable import Original
from esrfs.networks.spread import Spread, in_turn

Enlarge = Callable[[Tensor], Tensor]
"""A network as a function of tensors: N×3×h×w, RGB in 0 to 1 → N×3×(h·scale)×(w·scale); gradients flow through it."""

STEPS = 15
TILE = 192
"""Pixels of the small picture that are refined at once, in each direction."""
_MOMENTA = (0.8, 0.95)
"""Adam's, for few steps."""
_RATE = 0.25
"""The first step's size, in units of the codec's noise: where the codec changes little (smooth pictures), little may
be changed, or the steps themselves are noise."""
_POINTS_PER_SHARE = 30.0
_SMALLEST = 16
"""Pixels: narrower pictures aren't refined (SSIMULACRA2 needs some resolutions)."""


@dataclass(frozen=True)
class Refined:
    small: Pixels
    """h×w×3."""
    share: float
    """Of the picture that was refined before the time was over: 0 to 1."""


def refine(
    original: Pixels,
    small: Pixels,
    enlarge: Enlarge,
    *,
    scale: int,
    margin: int,
    noise: float,
    seconds: float = math.inf,
    steps: int = STEPS,
    device: str | torch.device = "cpu",
    spread: Spread = in_turn,
    checkpoint: Callable[[], None] = lambda: None,
) -> Refined:
    """Refine ``small`` (h×w×3, RGB), which stands for ``original`` (H×W×3; at its lower and right edge up to scale - 1
    pixels smaller than h·scale, w·scale).

    ``noise`` is the codec's root mean square error at the level that is meant, in shades (see :func:`codec_noise`);
    ``margin`` the network's. Work goes by tiles, the busiest first, and ends after ``seconds``: a tile that is not
    done by then stays as it was. The same values give the same picture, unless the time ends it, whatever ``spread``
    does. ``checkpoint`` is called at each step of each tile, and may raise to end it all. Raises ValueError when the
    shapes don't fit.
    """
    height, width = small.shape[:2]
    padded = continued(original, scale)
    if padded.shape != (height * scale, width * scale, 3):
        raise ValueError(f"a picture of {original.shape} can't stand for {height * scale} × {width * scale} pixels")
    result = small.copy()
    if min(height, width) < _SMALLEST:
        return Refined(result, 0.0)
    end = time.monotonic() + seconds
    done: list[int] = []

    def run(rows: tuple[int, int], columns: tuple[int, int]) -> None:
        (top, bottom), (left, right) = rows, columns
        if time.monotonic() >= end:
            return
        # With what the network sees around it, which stays as it is.
        above, before = max(0, top - margin), max(0, left - margin)
        below, after = min(height, bottom + margin), min(width, right + margin)
        tile = _Tile(
            small=_tensor(small[above:below, before:after], device),
            target=_tensor(padded[top * scale : bottom * scale, left * scale : right * scale], device),
            inside=(slice(top - above, bottom - above), slice(left - before, right - before)),
            scale=scale,
        )
        refined = tile.refined(enlarge, noise / 255, steps, end, checkpoint)
        if refined is not None:
            result[top:bottom, left:right] = refined
            done.append((bottom - top) * (right - left))

    places = [(rows, columns) for rows in _spans(height) for columns in _spans(width)]
    places.sort(key=lambda place: -_business(small, *place))
    spread([functools.partial(run, *place) for place in places])
    return Refined(result, sum(done) / (height * width))


def _business(small: Pixels, rows: tuple[int, int], columns: tuple[int, int]) -> float:
    """How much there is to code in a tile: where most bytes go, most is to be gained."""
    luma = small[slice(*rows), slice(*columns), 1].astype(np.int16)
    return float(np.abs(np.diff(luma, axis=0)).sum() + np.abs(np.diff(luma, axis=1)).sum())


def codec_noise(small: Pixels, decoded: Samples) -> float:
    """Root mean square of what the codec changed, in shades of 255."""
    difference = small.astype(np.float32) - decoded.astype(np.float32) * np.float32(255 / np.iinfo(decoded.dtype).max)
    return float(np.sqrt(np.mean(difference * difference)))


@dataclass(frozen=True)
class _Tile:
    small: Tensor
    """1×3×h×w, with surroundings."""
    target: Tensor
    """1×3×H×W, without."""
    inside: tuple[slice, slice]
    """Where the target is in ``small``."""
    scale: int

    def refined(
        self, enlarge: Enlarge, sigma: float, steps: int, end: float, checkpoint: Callable[[], None]
    ) -> Pixels | None:
        """None if the time was over before."""
        rows, columns = self.inside
        core = self.small[:, :, rows, columns].clone().requires_grad_()
        sigma = max(sigma, 0.25 / 255)  # rounding alone
        generator = torch.Generator().manual_seed(1)
        weight = _POINTS_PER_SHARE / max(rate(core.detach(), sigma).item(), 1e-3)
        original = Original(self.target)
        optimizer = torch.optim.Adam([core], lr=_RATE * sigma, betas=_MOMENTA)
        noise = torch.zeros_like(self.small)
        for step in range(steps):
            checkpoint()
            if time.monotonic() >= end:
                return None
            for group in optimizer.param_groups:
                group["lr"] = _RATE * sigma * 0.5 * (1 + math.cos(math.pi * step / steps))
            surrounded = self.small.clone()
            surrounded[:, :, rows, columns] = core
            noise = -noise if step % 2 else torch.randn(noise.shape, generator=generator).to(noise.device)
            enlarged = enlarge((surrounded + sigma * noise).clamp(0, 1))
            view = enlarged[
                :, :, rows.start * self.scale : rows.stop * self.scale,
                columns.start * self.scale : columns.stop * self.scale,
            ]  # fmt: skip
            loss = weight * rate(core, sigma) - original.scores(view).sum()
            (core.grad,) = torch.autograd.grad(loss, core)
            optimizer.step()
        pixels = (core.detach()[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        return np.ascontiguousarray(pixels)


def rate(picture: Tensor, sigma: float) -> Tensor:
    """As :func:`rates`, of one picture (1×3×h×w): a scalar."""
    return rates(picture, torch.tensor([sigma], device=picture.device))[0]


def rates(pictures: Tensor, sigma: Tensor) -> Tensor:
    """About the bits of each coefficient of pictures (N×3×h×w, RGB in 0 to 1) that are coded with errors of root mean
    square ``sigma`` (N, in 0 to 1): N."""
    matrix, transform = _ycbcr(pictures.device), _dct(pictures.device)
    height, width = pictures.shape[2:]
    pictures = F.pad(pictures, (0, -width % 8, 0, -height % 8), mode="replicate")
    planes = torch.einsum("ij,njhw->nihw", matrix, pictures)
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)
    coefficients = transform @ blocks @ transform.T
    return torch.log2(1 + coefficients.abs() / (2.5 * sigma.view(-1, 1, 1, 1, 1, 1))).mean((1, 2, 3, 4, 5))


@functools.cache
def _ycbcr(device: torch.device) -> Tensor:
    red, green, blue = 0.299, 0.587, 0.114
    rows = [
        [red, green, blue],
        [-0.5 * red / (1 - blue), -0.5 * green / (1 - blue), 0.5],
        [0.5, -0.5 * green / (1 - red), -0.5 * blue / (1 - red)],
    ]
    return torch.tensor(rows, device=device)


@functools.cache
def _dct(device: torch.device) -> Tensor:
    """8×8, orthonormal: rows are frequencies."""
    k, n = np.mgrid[0:8, 0:8]
    matrix = np.sqrt((1 + (k > 0)) / 8) * np.cos(np.pi * (2 * n + 1) * k / 16)
    return torch.from_numpy(matrix.astype(np.float32)).to(device)


def _tensor(pixels: Pixels, device: str | torch.device) -> Tensor:
    return (
        torch.from_numpy(np.require(pixels, requirements=("C", "W")))
        .to(device)
        .permute(2, 0, 1)[None]
        .float()
        .div_(255)
    )


def _spans(size: int) -> list[tuple[int, int]]:
    """Tiles' begins and ends, all about equal, at most TILE."""
    count = -(-size // TILE)
    edges = [round(size * number / count) for number in range(count + 1)]
    return list(itertools.pairwise(edges))
