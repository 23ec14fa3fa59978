"""How good a network is during its training, on photographs that it doesn't learn from."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from esrfs.metrics.fidelity import y_psnr
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks.loading import Network
from esrfs.train import export, real_esrgan
from esrfs.train.photographs import Photograph, Pixels
from esrfs.train.settings import RealEsrganDegradation, Training

_EDGE = 384
"""Pixels of a photograph's middle that are looked at, in each direction."""


def measure(
    training: Training, model: nn.Module, photographs: Sequence[Photograph], device: torch.device
) -> dict[str, float]:
    """Means over photographs and their versions: ``psnr`` of luma, ``gain`` over bicubic, both dB; ``ssimulacra2``."""
    network = Network(export.describe(training, 0, 0), copy.deepcopy(model), device)  # type: ignore[arg-type]
    scores = []
    for photograph in photographs:
        full, versions = _middle(training, photograph)
        reference = Reference(full)
        for small in versions:
            view = network(small[None])[0]
            bicubic = np.asarray(Image.fromarray(small).resize(full.shape[1::-1], Image.Resampling.BICUBIC))
            psnr = y_psnr(full, view)
            scores.append((psnr, psnr - y_psnr(full, bicubic), reference.compare(view).score))
    means = np.mean(scores, axis=0)
    return dict(zip(("psnr", "gain", "ssimulacra2"), (round(float(mean), 4) for mean in means), strict=True))


def _middle(training: Training, photograph: Photograph) -> tuple[Pixels, list[Pixels]]:
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
