"""What a shrinker learns from: patches with the codec's noise, and what the result is worth.

The loss is refinement's (``compaction/refine.py``, DESIGN 10) over patches of many photographs instead of one: the
score of what the network makes of the small picture with noise, against the bits that the picture takes. The noise is
Gaussian and as strong as the codec's was at that place of that photograph, so that nothing is hidden where the codec
would remove it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.compaction import refine, shrinking
from esrfs.formats import samples
from esrfs.metrics.differentiable import ssimulacra2
from esrfs.train.photographs import Batch, Photograph, draw_patch
from esrfs.train.settings import Stage, Training

_AROUND = 8
"""Pixels in each direction over which the codec's noise is averaged."""
_FAINTEST = 0.25
"""Shades: rounding alone."""
_BLOCK = 8
"""Pixels: patches begin where the codec's blocks begin."""
_FEWEST_BITS = 0.05
"""For each coefficient: black patches take none at all, and would outweigh all others."""


class Noise(msgspec.Struct, frozen=True):
    """The codec's error, root mean square, in 0 to 1."""

    local: Tensor
    """N×1×h×w."""
    whole: Tensor
    """N: of the whole photographs."""


def draw_batch(photographs: Sequence[Photograph], training: Training, stage: Stage, rng: np.random.Generator) -> Batch:
    """Random patches, flipped and turned: ``small`` is what a shrinker takes, ``error`` the codec's in the same
    place."""
    smalls, fulls, errors, sigmas = [], [], [], []
    for _ in range(stage.batch):
        drawn = draw_patch(photographs, training, stage, rng, first=1, grid=_BLOCK)
        photograph, coded = drawn.photograph, drawn.version - 1
        full = drawn.of(photograph.full, training.scale)
        small = samples.as_bytes(drawn.of(photograph.small[0]))
        smalls.append(shrinking.pack(full, small, training.scale, photograph.levels[coded]))
        fulls.append(full)
        coded_small = samples.as_16_bits(drawn.of(photograph.small[drawn.version]))
        errors.append(coded_small.astype(np.float32) / np.float32(257) - small)
        sigmas.append(max(photograph.noise[coded], _FAINTEST))
    return Batch(np.stack(smalls), np.stack(fulls), np.stack(errors), np.array(sigmas, np.float32))


def noise(batch: Batch, device: torch.device) -> Noise:
    assert batch.error is not None and batch.sigma is not None
    squares = torch.from_numpy(batch.error).to(device).square().mean(3)[:, None]
    around = F.pad(squares, (_AROUND,) * 4, mode="reflect")
    local = F.avg_pool2d(around, 2 * _AROUND + 1, 1).sqrt() / 255
    return Noise(local, torch.from_numpy(batch.sigma).to(device) / 255)


def losses(
    model: nn.Module,
    enlarge: Callable[[Tensor], Tensor],
    packed: Tensor,
    full: Tensor,
    *,
    noise: Noise,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """``rate``: bits against those of the picture as it was reduced (1: as many); ``ssimulacra2``: the natural
    logarithm of (100 - score) / 100, since a point is dearer the nearer to 100 it is: from AVIF's curves, a per cent of
    bytes buys about .3 points at a score of 45, and .14 at 75."""
    before = packed[:, -4:-1]
    small: Tensor = model(packed)
    random = torch.randn(before.shape, generator=generator).to(before.device)
    view = enlarge((small + noise.local * random).clamp(0, 1))
    rate = refine.rates(small, noise.whole) / refine.rates(before, noise.whole).clamp(min=_FEWEST_BITS)
    return {"rate": rate.mean(), "ssimulacra2": _missing(ssimulacra2(full, view)).log().mean()}


def _missing(scores: Tensor) -> Tensor:
    return (100 - scores).clamp(min=1) / 100
