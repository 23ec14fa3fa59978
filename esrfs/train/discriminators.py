"""What tells rebuilt pictures from photographs: the other player of the adversarial stage.

Pictures are N×3×H×W, RGB in 0 to 1. The answers are logits; larger means "a photograph".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)
from torch.nn.utils.parametrizations import spectral_norm


class UNetDiscriminator(nn.Module):
    """A logit for each pixel: N×3×H×W → N×1×H×W, H and W multiples of 8 (Real-ESRGAN, arXiv 2107.10833).

    Spectral normalisation keeps its slope bounded, which is what lets it judge each pixel without running away from the
    generator.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width

        def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
            layer = nn.Conv2d(inputs, outputs, kernel, stride, 1, bias=False)
            normalised: nn.Module = spectral_norm(layer)
            return normalised

        self.first = nn.Conv2d(3, w, 3, 1, 1)
        self.down = nn.ModuleList([convolution(w << i, w << (i + 1), 4, 2) for i in range(3)])
        self.up = nn.ModuleList([convolution(w << (i + 1), w << i) for i in reversed(range(3))])
        self.after = nn.ModuleList([convolution(w, w), convolution(w, w)])
        self.last = nn.Conv2d(w, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [_lrelu(self.first(x))]
        for down in self.down:
            features.append(_lrelu(down(features[-1])))
        y = features.pop()
        for up in self.up:
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
            y = _lrelu(up(y)) + features.pop()
        for after in self.after:
            y = _lrelu(after(y))
        result: Tensor = self.last(y)
        return result


class VGGDiscriminator(nn.Module):
    """One logit for a patch of 128 pixels: N×3×128×128 → N×1 (the original ESRGAN, arXiv 1809.00219)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [width, width * 2, width * 4, width * 8, width * 8]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.LeakyReLU(0.2, inplace=True)]
        before = width
        for index, after in enumerate(widths):
            if index:
                layers += _normalised(before, after, 3, 1)
            layers += _normalised(after, after, 4, 2)
            before = after
        self.features = nn.Sequential(*layers)
        self.judge = nn.Sequential(
            nn.Flatten(), nn.Linear(before * 16, 100), nn.LeakyReLU(0.2, inplace=True), nn.Linear(100, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.judge(self.features(x))
        return result


def _normalised(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.2, inplace=True),
    ]


def _lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def build(kind: str, width: int) -> nn.Module:
    """``unet`` or ``vgg``."""
    return {"unet": UNetDiscriminator, "vgg": VGGDiscriminator}[kind](width)


def relativistic(photographs: Tensor, rebuilt: Tensor) -> Tensor:
    """How far the first are from being judged "more like photographs than the second on average", and the second less
    so: the discriminator's loss in a relativistic average GAN (arXiv 1807.00734). With the two exchanged it is the
    generator's. Both are logits of one shape; the result is a scalar."""
    first = F.binary_cross_entropy_with_logits(photographs - rebuilt.mean(), torch.ones_like(photographs))
    second = F.binary_cross_entropy_with_logits(rebuilt - photographs.mean(), torch.zeros_like(rebuilt))
    return (first + second) / 2
