"""The measures that pictures are compared by.

SSIM and MS-SSIM are taken on luma, as in their papers (Wang, Bovik, Sheikh, Simoncelli 2004; Wang, Simoncelli, Bovik
2003), with 11×11 Gaussian windows that lie inside the picture. PSNR is over all RGB samples. SSIMULACRA2 is what the
gate uses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytorch_msssim
import torch
from PIL import Image
from torch import Tensor

from esrfs.evaluate.niqe import niqe
from esrfs.metrics.fidelity import psnr
from esrfs.metrics.ssimulacra2 import Reference

Pixels = npt.NDArray[np.uint8]

_SMALLEST_FOR_MS_SSIM = 161
"""Pixels: the fifth resolution must hold a window."""
_SMALLEST_FOR_SSIM = 11


@dataclass(frozen=True)
class Measure:
    name: str
    label: str
    unit: str
    reference: bool
    """Compares with the original, and grows with likeness; else it looks at the picture alone, and less is better."""
    digits: int


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("ssimulacra2", "SSIMULACRA2", "", reference=True, digits=1),
        Measure("psnr", "PSNR", "dB", reference=True, digits=2),
        Measure("ssim", "SSIM", "", reference=True, digits=4),
        Measure("ms_ssim", "MS-SSIM", "", reference=True, digits=4),
        Measure("niqe", "NIQE", "", reference=False, digits=2),
    )
}


class Original:
    """A picture that versions of it are measured against; H×W×3 RGB."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self._reference: Reference | None = None
        self._luma: Tensor | None = None

    def measure(self, version: Pixels, names: Collection[str]) -> dict[str, float | None]:
        """The measures called ``names`` of an H×W×3 RGB picture of the same size; None where the picture is too small
        for one. Rounded, so that they don't depend on the order in which some library adds."""
        return {name: _rounded(self._value(version, name), MEASURES[name].digits + 2) for name in names}

    def _value(self, version: Pixels, name: str) -> float | None:
        match name:
            case "psnr":
                return psnr(self.pixels, version)
            case "ssimulacra2":
                self._reference = self._reference or Reference(self.pixels)
                return self._reference.compare(version).score
            case "ssim":
                return self._structure(version, pytorch_msssim.ssim, _SMALLEST_FOR_SSIM)
            case "ms_ssim":
                return self._structure(version, pytorch_msssim.ms_ssim, _SMALLEST_FOR_MS_SSIM)
            case "niqe":
                return niqe(version)
        raise ValueError(f"there is no measure {name!r}; there are {', '.join(MEASURES)}")

    def _structure(self, version: Pixels, function: object, smallest: int) -> float | None:
        if min(version.shape[:2]) < smallest:
            return None
        if self._luma is None:
            self._luma = _luma(self.pixels)
        assert callable(function)
        with torch.inference_mode():
            return float(function(_luma(version), self._luma, data_range=255))


def _luma(pixels: Pixels) -> Tensor:
    """1×1×H×W."""
    return torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"), dtype=np.float32))[None, None]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
