"""How good a network is during its training, on photographs that it doesn't learn from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from esrfs.compaction import planner, shrinking
from esrfs.formats.samples import as_bytes
from esrfs.formats.view import Pixels, Samples
from esrfs.metrics.fidelity import y_psnr
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks.loading import Network
from esrfs.train import export, real_esrgan, store_degradation
from esrfs.train.photographs import Photograph
from esrfs.train.settings import RealEsrganDegradation, Training

_EDGE = 384
"""Pixels of a photograph's middle that are looked at, in each direction."""


def measure(
    training: Training,
    model: nn.Module,
    photographs: Sequence[Photograph],
    device: torch.device,
    enlarger: Network | None = None,
) -> dict[str, float]:
    """Means over photographs and their versions: ``psnr`` of luma, ``gain`` over bicubic, both dB; ``ssimulacra2``.

    Of a shrinker, over the coded versions: ``bytes`` (percent more than without it) and ``points`` (of SSIMULACRA2
    more), at the same levels; and ``equal``, about how many percent more bytes at equal score, with the planner's
    guesses of what a level is worth.
    """
    network = Network(export.describe(training, 0, 0), copy.deepcopy(model), device)  # type: ignore[arg-type]
    if enlarger is not None:
        return _named(("bytes", "points", "equal"), [
            figures for photograph in photographs for figures in _saved(training, network, enlarger, photograph)
        ])  # fmt: skip
    scores = []
    for photograph in photographs:
        full, versions = _middle(training, photograph)
        reference = Reference(full)
        for small in versions:
            view = network(small[None])[0]
            bicubic = np.asarray(Image.fromarray(as_bytes(small)).resize(full.shape[1::-1], Image.Resampling.BICUBIC))
            psnr = y_psnr(full, view)
            scores.append((psnr, psnr - y_psnr(full, bicubic), reference.compare(view).score))
    return _named(("psnr", "gain", "ssimulacra2"), scores)


def _named(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, float]:
    return dict(zip(names, (round(float(mean), 4) for mean in np.mean(rows, axis=0)), strict=True))


def _saved(
    training: Training, network: Network, enlarger: Network, photograph: Photograph
) -> Iterator[tuple[float, float, float]]:
    full, (clean, *_) = _middle(training, photograph)
    reference = Reference(full)
    for level in photograph.levels:
        packed = shrinking.pack(full, as_bytes(clean), training.scale, level)
        avifs = [store_degradation.code(small, level) for small in (as_bytes(clean), network(packed[None])[0])]
        before, after = (reference.compare(enlarger(store_degradation.decode(avif)[None])[0]).score for avif in avifs)
        size = len(avifs[1]) / len(avifs[0])
        equal = size * planner.GROWTH ** ((before - after) / planner.POINTS_PER_LEVEL)
        yield 100 * (size - 1), after - before, 100 * (equal - 1)


def _middle(training: Training, photograph: Photograph) -> tuple[Pixels, list[Samples]]:
    scale = training.scale
    height, width = (size // scale for size in photograph.full.shape[:2])
    rows, columns = min(height, _EDGE // scale), min(width, _EDGE // scale)
    top, left = (height - rows) // 2, (width - columns) // 2
    cut = photograph.full[top * scale : (top + rows) * scale, left * scale : (left + columns) * scale]
    full = np.ascontiguousarray(cut)
    if isinstance(training.degradation, RealEsrganDegradation):
        rng = np.random.default_rng([training.seed, 2, *photograph.content[:8]])  # the same damage each time
        return full, [real_esrgan.degrade(full, scale, training.degradation.second_order, rng)]
    return full, [np.ascontiguousarray(small[top : top + rows, left : left + columns]) for small in photograph.small]
