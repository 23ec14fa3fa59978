"""From the bytes of a weights file to a network that turns bytes into more bytes.

The engine gets values, never paths, so everything here works on ``bytes``. Two kinds of file are read: esrfs's own
safetensors (see ``spec``), and official Real-ESRGAN ``.pth`` files, whose architecture is told from the names and
shapes of their tensors. A ``.pth`` is a pickle: it is read with ``weights_only=True``, which makes tensors and
nothing else.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.networks import architectures, spec
from esrfs.networks.spec import NetworkSpec

Pixels = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.unsignedinteger]


class Network:
    """A network on one device, in fp32: the same bytes for the same input, whatever the batch and number of threads."""

    def __init__(self, description: NetworkSpec, model: architectures.Model, device: torch.device) -> None:
        self.spec = description
        self.scale = description.scale
        self.channels = model.channels
        self.margin = description.margin
        self.multiple = description.multiple
        self.device = device
        self._model = model.to(device).eval().requires_grad_(False)
        channels_last(self._model)

    def __call__(self, tiles: Samples) -> Pixels:
        """N×H×W×channels uint8 or uint16 (RGB, for all but shrinkers) → N×(H·scale)×(W·scale)×3 uint8, contiguous.

        No tiling here: memory is about 300 bytes for each input pixel with 32 channels, 600 with 64.
        """
        count, height, width, channels = tiles.shape
        if channels != self.channels or tiles.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"this network takes N×H×W×{self.channels} samples, not {tiles.shape} of {tiles.dtype}")
        s = self.scale
        with torch.inference_mode():
            # NHWC seen as NCHW is torch's channels_last: nothing moves.
            x = torch.from_numpy(np.require(tiles, requirements=("C", "W"))).to(self.device)
            x = x.permute(0, 3, 1, 2).float().div_(np.iinfo(tiles.dtype).max)
            below, right = -height % self.multiple, -width % self.multiple
            if below or right:
                x = F.pad(x, (0, right, 0, below), mode="replicate")
            # Rounded to bytes before the pixel shuffle moves them. NaN (a GPU's overflow) becomes black, which the
            # engine's comparison with the blob notices.
            packed = self._model.packed(x).mul_(255).round_().clamp_(0, 255).nan_to_num_(0).to(torch.uint8)
            rows, columns = packed.shape[2:]
            shuffled = packed.permute(0, 2, 3, 1).reshape(count, rows, columns, 3, s, s).permute(0, 1, 4, 2, 5, 3)
            whole = shuffled.reshape(count, rows * s, columns * s, 3)[:, : height * s, : width * s]
            result: Pixels = whole.contiguous().cpu().numpy()
            return result

    def differentiable(self, x: Tensor) -> Tensor:
        """N×3×H×W RGB in 0 to 1, on the network's device → N×3×(H·scale)×(W·scale), not rounded; gradients flow to
        ``x``. H and W may be anything. For refinement; to rebuild pictures, call the network."""
        height, width = x.shape[2:]
        below, right = -height % self.multiple, -width % self.multiple
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        enlarged: Tensor = self._model(x.contiguous(memory_format=torch.channels_last))
        return enlarged[:, :, : height * self.scale, : width * self.scale]


def channels_last(model: nn.Module) -> None:
    """Lay the weights out for NHWC input, which convolutions on a CPU like best."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this argument


def load(data: bytes, *, device: str | torch.device = "cpu", name: str = "") -> Network:
    """Read a weights file. ``name`` is for files that carry none (official ``.pth``).

    Raises ValueError, saying what is wrong, when ``data`` is no weights file or of an architecture that is not known.
    """
    description, tensors = read(data, name=name)
    model = architectures.build(description.architecture, description.arguments)
    if (model.scale, model.multiple) != (description.scale, description.multiple):
        raise ValueError(
            f"the network's description contradicts itself: scale {description.scale}, {description.arguments}"
        )
    try:
        model.load_state_dict({key: value.float() for key, value in tensors.items()})
    except RuntimeError as error:
        raise ValueError(
            f"the weights don't fit {description.architecture} {description.arguments}: {error}"
        ) from error
    return Network(description, model, torch.device(device))


def read(data: bytes, *, name: str = "") -> tuple[NetworkSpec, dict[str, Tensor]]:
    """The description and the tensors of a weights file, safetensors or ``.pth``. Raises ValueError."""
    # torch.save writes a zip, or a pickle before torch 1.6. The length of a safetensors header can begin with the same
    # bytes, but then its JSON follows.
    if data[8:9] != b"{" and (data[:2] == b"PK" or data[:1] == b"\x80"):
        return _read_official(data, name)
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"neither safetensors nor a .pth of weights: {error}") from error
    metadata = spec.read_metadata(data)
    return (infer_spec(tensors, name) if metadata is None else spec.decode(metadata)), tensors


def save(description: NetworkSpec, tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a safetensors file; the same for the same weights and description."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    data: bytes = safetensors.torch.save(plain, {spec.METADATA_KEY: spec.encode(description)})
    return data


def unpickled(data: bytes) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, text, and lists and dicts of such. Raises ValueError."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        # Not in torch's words, which advise to read it without care.
        raise ValueError("is damaged, or holds more than tensors, numbers and text") from error


def _read_official(data: bytes, name: str) -> tuple[NetworkSpec, dict[str, Tensor]]:
    try:
        content = unpickled(data)
    except ValueError as error:
        raise ValueError(f"the .pth file can't be read as weights: it {error}") from error
    if isinstance(content, dict):
        content = content.get("params_ema", content.get("params", content))
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("the .pth file holds no state dict of a network")
    return infer_spec(content, name), content


def infer_spec(tensors: dict[str, Tensor], name: str) -> NetworkSpec:
    """Tell architecture, width, depth and scale from names and shapes. Raises ValueError when they fit neither."""
    architecture: spec.Architecture
    arguments: dict[str, int | str]
    try:
        if "body.0.weight" in tensors:
            architecture = "SRVGGNetCompact"
            last = max(int(key.split(".")[1]) for key in tensors)
            upscale = round((tensors[f"body.{last}.weight"].shape[0] / 3) ** 0.5)
            # Without parameters, ReLU and leaky ReLU look the same: official files have PReLU.
            act_type = "prelu" if "body.1.weight" in tensors else "relu"
            width = tensors["body.0.weight"].shape[0]
            arguments = {"num_feat": width, "num_conv": last // 2 - 1, "upscale": upscale, "act_type": act_type}
        elif "body.0.rdb1.conv1.weight" in tensors:
            architecture = "RRDBNet"
            blocks = 1 + max(int(match[1]) for key in tensors if (match := re.match(r"body\.(\d+)\.", key)))
            width, inputs = tensors["conv_first.weight"].shape[:2]
            scale = {3: 4, 12: 2, 48: 1}[inputs] if "conv_up2.weight" in tensors else 3
            growth = tensors["body.0.rdb1.conv1.weight"].shape[0]
            arguments = {"num_feat": width, "num_block": blocks, "num_grow_ch": growth, "scale": scale}
        else:
            raise ValueError("its tensors are those of neither SRVGGNetCompact nor RRDBNet")
        with torch.device("meta"):
            model = architectures.build(architecture, arguments)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"esrfs doesn't know this network: {error}") from error
    return NetworkSpec(
        name=name,
        architecture=architecture,
        arguments=arguments,
        scale=model.scale,
        margin=model.margin,
        multiple=model.multiple,
    )
