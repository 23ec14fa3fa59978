"""The perceptual loss: distance between features of two pictures, taken before the activation (ESRGAN).

After an activation most features of a deep layer are 0 and teach little; before it, all of them count, and brightness
stays truer. Two sources of features:

- VGG19 as trained on ImageNet, where the user has its weights: a state dict named as torchvision's
  (``features.0.weight`` …). esrfs ships none, and downloads none: they are half a gigabyte, and made for other ends.
- Otherwise a fixed network that needs no weights: at four resolutions, random 3×3 filters and their responses'
  products, drawn once from a fixed seed. It is no VGG: it knows edges, corners and texture energy, not objects. But it
  sees local statistics as a wide random layer does, which is enough to tell blur from texture.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.networks import loading
from esrfs.train.settings import TrainingError

_VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)
"""Channels of VGG19's convolutions; 0 is a pooling."""
_VGG_LAYERS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}
"""conv1_2, 2_2, 3_4, 4_4, 5_4 with Real-ESRGAN's weights, by their number in torchvision's ``features``."""


class VGGFeatures(nn.Module):
    """L1 distance of VGG19's features before activation. Pictures N×3×H×W, RGB in 0 to 1, 32 pixels or more."""

    description = "VGG19 (ImageNet), before activation"
    sha256 = ""
    """Of the file of weights."""
    mean: Tensor
    deviation: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        """Raises TrainingError when ``state`` isn't VGG19's."""
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channels in _VGG19:
            if channels:
                layers += [nn.Conv2d(inputs, channels, 3, 1, 1), nn.ReLU()]
                inputs = channels
            else:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.ModuleList(layers)
        plain = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        try:
            self.layers.load_state_dict({key: plain[key] for key in self.layers.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise TrainingError(f"these aren't the weights of torchvision's VGG19: {error}") from error
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def _features(self, x: Tensor) -> dict[int, Tensor]:
        x = (x - self.mean) / self.deviation
        found = {}
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in _VGG_LAYERS:
                found[number] = x
            if number == max(_VGG_LAYERS):
                break
        return found

    def forward(self, view: Tensor, original: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._features(original)
        found = self._features(view)
        return torch.stack([w * F.l1_loss(found[n], wanted[n]) for n, w in _VGG_LAYERS.items()]).sum()


class BuiltInFeatures(nn.Module):
    """L1 distance of the fixed network's features. Pictures N×3×H×W, RGB in 0 to 1, 32 pixels or more."""

    description = "built-in (random filters at four resolutions; no VGG19 weights were given)"
    first: Tensor
    second: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(20210722)
        first = torch.randn(width, 3, 3, 3, generator=generator)
        first -= first.mean((2, 3), keepdim=True)  # a flat area has no features, whatever its colour
        second = torch.randn(width, width, 3, 3, generator=generator)
        self.register_buffer("first", first / first.flatten(1).norm(dim=1).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("second", second / second.flatten(1).norm(dim=1).view(-1, 1, 1, 1), persistent=False)

    def _features(self, x: Tensor) -> list[Tensor]:
        found = []
        for _ in range(4):
            edges = F.conv2d(x, self.first, padding=1)
            # The energy of edges, spread: equal for texture of equal strength, wherever its grains lie.
            texture = F.conv2d(F.avg_pool2d(edges.abs(), 2), self.second, padding=1)
            found += [edges, texture]
            x = F.avg_pool2d(x, 2)
        return found

    def forward(self, view: Tensor, original: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._features(original)
        pairs = zip(self._features(view), wanted, strict=True)
        return torch.stack([F.l1_loss(found, expected) for found, expected in pairs]).mean()


PerceptualLoss = VGGFeatures | BuiltInFeatures


def fingerprint(loss: PerceptualLoss | None) -> str:
    """Tells one from another."""
    if loss is None:
        return ""
    return f"{loss.description} {loss.sha256}" if isinstance(loss, VGGFeatures) else loss.description


def build(vgg19: Path | None) -> PerceptualLoss:
    """From the user's weights of VGG19, or the built-in one. Raises TrainingError when the file isn't that, OSError."""
    if vgg19 is None:
        return BuiltInFeatures()
    data = vgg19.read_bytes()
    try:
        state = loading.unpickled(data)
    except ValueError as error:
        raise TrainingError(f"{vgg19} can't be read as weights: it {error}") from error
    if not isinstance(state, dict):
        raise TrainingError(f"{vgg19} holds no state dict")
    loss = VGGFeatures(state)
    loss.sha256 = hashlib.sha256(data).hexdigest()
    return loss
