"""Begin a larger network with what a smaller one has learnt.

Net2Net (Chen, Goodfellow and Shlens, arXiv 1511.05641) by other means: instead of copying channels, the new ones keep
their random weights and nothing listens to them yet; new layers hand the old channels through. So the larger network
gives the very pictures of the smaller one at first, and training decides what the new channels are good for. One that
enlarges more begins with the pixels of the other, each repeated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from esrfs.train.settings import TrainingError

Weights = dict[str, Tensor]
_KINDS = ("weight", "bias")


def grown(start: Weights, model: nn.Module) -> Weights:
    """``model``'s own weights (random ones), with those of a smaller SRVGGNetCompact put among them.

    ``start`` has at most as many channels and layers, enlarges at most as much, and has PReLU, as ``model`` has. Raises
    TrainingError for everything else.
    """
    target = {name: value.detach().clone() for name, value in model.state_dict().items()}
    old, new = _layers(start), _layers(target)
    last = {f"{old[-1]}.{kind}": _repeated(start[f"{old[-1]}.{kind}"], target[f"{new[-1]}.{kind}"]) for kind in _KINDS}
    start = {**start, **last}
    if len(old) > len(new):
        raise TrainingError("the weights to start with are of a deeper network")
    added = list(range(len(old) - 1, len(new) - 1))  # between the last activation and the last convolution
    for place in range(len(new)):
        if place in added:
            _hand_through(target, new[place], channels=len(start[f"{old[-2]}.weight"]))
        else:
            _put(start, old[-1] if place == len(new) - 1 else old[place], target, new[place])
    return target


def _layers(weights: Weights) -> list[str]:
    """Of the names ``body.0.weight``, ``body.0.bias``, ``body.1.weight``, …: body.0, body.1, … in order."""
    names = {name.rpartition(".")[0] for name in weights}
    if not all(name.startswith("body.") and name[5:].isdigit() for name in names):
        raise TrainingError("only a network of the kind SRVGGNetCompact can grow from weights of another shape")
    if len(names) < 3 or names != {f"body.{place}" for place in range(len(names))}:
        raise TrainingError("only networks whose activations have weights (prelu) can grow")
    return [f"body.{place}" for place in range(len(names))]


def _put(start: Weights, old: str, target: Weights, new: str) -> None:
    for kind in _KINDS:
        if f"{old}.{kind}" not in start:  # a PReLU has no bias
            continue
        source, values = start[f"{old}.{kind}"], target[f"{new}.{kind}"]
        if any(a > b for a, b in zip(source.shape, values.shape, strict=True)):
            raise TrainingError("the weights to start with are of a wider network, or of one that enlarges more")
        if source.dim() == 4:
            values[: source.shape[0]] = 0.0  # old channels don't listen to new ones yet
            values[: source.shape[0], : source.shape[1]] = source.to(values.dtype)
        else:
            values[: source.shape[0]] = source.to(values.dtype)


def _hand_through(target: Weights, layer: str, *, channels: int) -> None:
    weight = target[f"{layer}.weight"]
    if weight.dim() == 1:  # of a PReLU
        weight[:channels] = 1.0
        return
    weight[:channels] = 0.0
    weight[torch.arange(channels), torch.arange(channels), 1, 1] = 1.0
    target[f"{layer}.bias"][:channels] = 0.0


def _repeated(values: Tensor, like: Tensor) -> Tensor:
    """Of the last convolution, whose channels are colour, row and column of a pixel shuffle: those of more rows and
    columns, each as the nearest of the old ones."""
    few, many = (math.isqrt(len(each) // 3) for each in (values, like))
    if few >= many:
        return values
    nearest = ((torch.arange(many) + 0.5) * few / many).long()
    places = values.reshape(3, few, few, *values.shape[1:])
    return places[:, nearest][:, :, nearest].flatten(0, 2)
