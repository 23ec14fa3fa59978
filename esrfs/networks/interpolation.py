"""Network interpolation (ESRGAN, arXiv 1809.00219): between a network trained for fidelity and its adversarial partner
lie networks that look sharper the nearer they are to the partner, and follow the photograph the less."""

from __future__ import annotations

import torch
from torch import Tensor

from esrfs.networks import loading
from esrfs.networks.spec import NetworkSpec


def interpolate(fidelity: bytes, adversarial: bytes, texture: float, name: str) -> bytes:
    """A weights file between two: its weights are (1 - texture) · those of the first + texture · those of the second.

    At 0 they are the first's, at 1 the second's, bit for bit. The result is fp32 safetensors that is called ``name``.
    Raises ValueError when ``texture`` isn't in 0 to 1, a file is no network, or the two differ in more than weights.
    """
    if not 0 <= texture <= 1:
        raise ValueError(f"texture goes from 0 (fidelity) to 1 (adversarial), not {texture}")
    (first, ours), (second, theirs) = loading.read(fidelity), loading.read(adversarial)
    if (first.architecture, first.arguments) != (second.architecture, second.arguments):
        raise ValueError(
            f"only networks of one architecture can be mixed: {first.name or 'the first'} is {first.architecture} "
            f"{first.arguments}, {second.name or 'the second'} is {second.architecture} {second.arguments}"
        )
    weights = {key: _between(value.float(), theirs[key].float(), texture) for key, value in ours.items()}
    description = NetworkSpec(
        name=name,
        architecture=first.architecture,
        arguments=first.arguments,
        scale=first.scale,
        margin=max(first.margin, second.margin),
        multiple=first.multiple,
        licence=first.licence if first.licence == second.licence else "",
        degradation=first.degradation,
        texture=first.texture + (second.texture - first.texture) * texture,
        training={"texture": texture, "fidelity": first.name, "adversarial": second.name},
    )
    return loading.save(description, weights)


def _between(first: Tensor, second: Tensor, texture: float) -> Tensor:
    if texture in {0, 1}:
        return second if texture else first  # a sum would turn -0.0 into 0.0
    return torch.lerp(first.double(), second.double(), texture).float()
