"""The two architectures of Real-ESRGAN, written out so that official state dicts load by name and shape; and the one
that makes pictures small.

Layouts follow xinntao/Real-ESRGAN and BasicSR (which no longer import on today's torch). Beside forward, each class has
``scale``; ``channels`` (of the input); ``multiple`` (height and width of the input must be multiples of it); ``margin``
(input pixels on each side that an output pixel visibly depends on; for all but RRDBNet all that it depends on); and
``packed`` (the output before its pixel shuffle, so that inference can round to bytes before it moves them: four times
less memory traffic).

Tensors are float, N×channels×H×W, RGB in 0 to 1 as sRGB is coded; the output has 3 channels and is not clipped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

_ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "prelu": nn.PReLU,
    "relu": lambda channels: nn.ReLU(inplace=True),
    "leakyrelu": lambda channels: nn.LeakyReLU(0.1, inplace=True),
}


class SRVGGNetCompact(nn.Module):
    """A plain stack of 3×3 convolutions at low resolution, a pixel shuffle at the end, and the input added to the
    result.

    Official weights: ``realesr-general-x4v3`` (64 channels × 32), ``realesr-animevideov3`` (64 × 16). Ours: ``lite``
    (32 × 4 at ×2).
    """

    def __init__(self, num_feat: int = 64, num_conv: int = 16, upscale: int = 4, act_type: str = "prelu") -> None:
        """``num_conv`` counts the inner convolutions: there is one more before and one after them."""
        super().__init__()
        self.scale = upscale
        self.channels = 3
        self.multiple = 1
        self.margin = num_conv + 2
        activation = _ACTIVATIONS[act_type]
        # A flat list, activations included: the official names are body.0, body.1, …
        layers: list[nn.Module] = [nn.Conv2d(3, num_feat, 3, 1, 1), activation(num_feat)]
        for _ in range(num_conv):
            layers += [nn.Conv2d(num_feat, num_feat, 3, 1, 1), activation(num_feat)]
        layers.append(nn.Conv2d(num_feat, 3 * upscale * upscale, 3, 1, 1))
        self.body = nn.ModuleList(layers)

    def packed(self, x: Tensor) -> Tensor:
        """N×3×H×W → N×(3·scale²)×H×W: :func:`torch.pixel_shuffle` of it is the result."""
        features = x
        for layer in self.body:
            features = layer(features)
        # Nearest-neighbour enlargement of the input, as it stands before the shuffle.
        return features + x.repeat_interleave(self.scale * self.scale, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.packed(x), self.scale)


class _ResidualDenseBlock(nn.Module):
    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_grow_ch, 3, 1, 1)
        self.conv2 = nn.Conv2d(num_feat + num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv3 = nn.Conv2d(num_feat + 2 * num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv4 = nn.Conv2d(num_feat + 3 * num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv5 = nn.Conv2d(num_feat + 4 * num_grow_ch, num_feat, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = _lrelu(self.conv1(x))
        x2 = _lrelu(self.conv2(torch.cat((x, x1), 1)))
        x3 = _lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = _lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        x5: Tensor = self.conv5(torch.cat((x, x1, x2, x3, x4), 1))
        return x5 * 0.2 + x


class _RRDB(nn.Module):
    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.rdb1 = _ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = _ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = _ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rdb3(self.rdb2(self.rdb1(x)))
        return out * 0.2 + x


def _lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2, inplace=True)


class RRDBNet(nn.Module):
    """ESRGAN's generator: residual-in-residual dense blocks, then nearest-neighbour enlargement with convolutions.

    Official weights: ``RealESRGAN_x4plus`` (23 blocks), ``RealESRGAN_x4plus_anime_6B``, ``RealESRGAN_x2plus``.
    Scales 2 and 1 work on an input unshuffled by 2 and 4, as the official ones do, and enlarge by 4 from there.
    Scale 3 (no official weights) enlarges once, by 3.
    """

    def __init__(self, num_feat: int = 64, num_block: int = 23, num_grow_ch: int = 32, scale: int = 4) -> None:
        super().__init__()
        self.scale = scale
        self.channels = 3
        self.multiple = {1: 4, 2: 2}.get(scale, 1)
        # The radius in unshuffled pixels is 15 for each block + 4, 349 for 23 blocks: more than a tile. Residual
        # scaling (0.2 of 0.2) makes what lies far away count for nothing that bytes show, so the margin stops at
        # 32.
        self.margin = self.multiple * min(15 * num_block + 4, 32)
        self.conv_first = nn.Conv2d(3 * self.multiple**2, num_feat, 3, 1, 1)
        self.body = nn.Sequential(*(_RRDB(num_feat, num_grow_ch) for _ in range(num_block)))
        self.conv_body = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_up1 = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        if scale != 3:
            self.conv_up2 = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_hr = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_last = nn.Conv2d(num_feat, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Height and width of ``x`` must be multiples of ``multiple``."""
        features = self.conv_first(F.pixel_unshuffle(x, self.multiple))
        features = features + self.conv_body(self.body(features))
        if self.scale == 3:
            features = _lrelu(self.conv_up1(F.interpolate(features, scale_factor=3, mode="nearest")))
        else:
            features = _lrelu(self.conv_up1(F.interpolate(features, scale_factor=2, mode="nearest")))
            features = _lrelu(self.conv_up2(F.interpolate(features, scale_factor=2, mode="nearest")))
        result: Tensor = self.conv_last(_lrelu(self.conv_hr(features)))
        return result

    def packed(self, x: Tensor) -> Tensor:
        """N×3×H×W → N×(3·scale²)×H×W: :func:`torch.pixel_shuffle` of it is the result."""
        return F.pixel_unshuffle(self(x), self.scale)


class Shrinker(nn.Module):
    """Changes a picture that was made small, so that a certain network makes more of it for its bytes: a one-pass
    stand-in for refinement (``compaction/refine.py``).

    For each pixel of the small picture it sees that pixel (3 channels), the ``reduction``² pixels of the large one for
    which it stands (3 · reduction², in the order of :func:`torch.pixel_unshuffle`), and the codec's level of quality
    (1 channel: level / 255). The result is the small picture, changed by a few shades.
    """

    def __init__(self, num_feat: int = 32, num_conv: int = 4, reduction: int = 2) -> None:
        super().__init__()
        self.scale = 1
        self.multiple = 1
        self.margin = num_conv + 2
        self.reduction = reduction
        self.channels = 3 * reduction**2 + 4
        self.head = nn.Conv2d(3 * reduction**2 + 1, num_feat, 3, 1, 1)
        self.body = nn.ModuleList(nn.Conv2d(num_feat, num_feat, 3, 1, 1) for _ in range(num_conv))
        self.act = nn.ModuleList(nn.PReLU(num_feat) for _ in range(num_conv + 1))
        self.tail = nn.Conv2d(num_feat, 3, 3, 1, 1)
        for parameter in self.tail.parameters():
            nn.init.zeros_(parameter)  # a new one changes nothing

    def packed(self, x: Tensor) -> Tensor:
        large, small, level = torch.split(x, [3 * self.reduction**2, 3, 1], 1)
        # What the small picture lacks, about as strong as the weights like it; and the level, about -1 to 1.
        detail = (large - small.repeat_interleave(self.reduction**2, 1)) * 4
        quality = (42 - level * 255) / 48
        features: Tensor = self.act[0](self.head(torch.cat((detail, quality), 1)))
        for convolution, activation in zip(self.body, list(self.act)[1:], strict=True):
            features = features + activation(convolution(features)) * 0.5
        result: Tensor = small + self.tail(features) * (4 / 255)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """N×channels×H×W → N×3×H×W."""
        return self.packed(x)


Model = SRVGGNetCompact | RRDBNet | Shrinker


def build(architecture: str, arguments: dict[str, int | str]) -> Model:
    """A network with random weights. Raises ValueError for an unknown architecture, or arguments it doesn't take."""
    constructors: dict[str, Callable[..., Model]] = {
        "SRVGGNetCompact": SRVGGNetCompact,
        "RRDBNet": RRDBNet,
        "Shrinker": Shrinker,
    }
    constructor = constructors.get(architecture)
    if constructor is None:
        raise ValueError(f"this esrfs knows no architecture {architecture!r}")
    try:
        return constructor(**arguments)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{architecture} can't be built with {arguments}: {error}") from error
