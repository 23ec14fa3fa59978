"""Train a network for fidelity (L1), seeded and resumable.

Step n depends on the seed, n and what was learnt before, nothing else. Every ``save_every`` steps a checkpoint
(weights, their moving average, optimizer, step) replaces ``OUT.checkpoint``, and the average is exported to OUT, so
that there is a usable network long before the end.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.networks import architectures, loading
from esrfs.networks.spec import Architecture, NetworkSpec
from esrfs.train.degradation import Degradation, Pair, draw_batch


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides what comes out of a training (with the photographs and the number of threads)."""

    name: str
    architecture: Architecture
    arguments: dict[str, int | str]
    degradation: Degradation
    licence: str = "Apache-2.0"
    steps: int
    seed: int = 0
    batch: int = 16
    patch: int = 48
    """Edge of a patch of the downscaled picture, pixels."""
    learning_rate: float = 1e-3
    """Peak: reached after ``warm_up`` steps, then falling to 0 along half a cosine."""
    warm_up: int = 100
    average: float = 0.999
    """Decay of the moving average of weights; it starts lower, so that early exports aren't the first weights."""


class _State:
    """What a checkpoint holds."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.step = 0
        self.model = architectures.build(plan.architecture, plan.arguments)
        loading.channels_last(self.model)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99))

    def save(self, path: Path, plan: Plan) -> None:
        state = {
            "plan": msgspec.json.encode(plan, order="sorted").decode(),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path, plan: Plan) -> None:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if msgspec.json.decode(state["plan"], type=Plan) != plan:
            raise ValueError(
                f"{path} belongs to a training with other settings ({state['plan']}); "
                "give the same settings to go on with it, or remove it to begin anew"
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def learning_rate(plan: Plan, step: int) -> float:
    if step < plan.warm_up:
        return plan.learning_rate * (step + 1) / plan.warm_up
    progress = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
    return float(plan.learning_rate * 0.5 * (1 + np.cos(np.pi * progress)))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)  # NHWC permuted is channels_last already


def _step(plan: Plan, state: _State, pairs: Sequence[Pair]) -> float:
    rng = np.random.default_rng([plan.seed, 1, state.step])
    small, full = draw_batch(pairs, plan.batch, plan.patch, plan.degradation.scale, rng)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(plan, state.step)
    loss = F.l1_loss(state.model(_tensor(small)), _tensor(full))
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    decay = min(plan.average, (state.step + 1) / (state.step + 10))
    with torch.no_grad():
        for averaged, value in zip(state.average.parameters(), state.model.parameters(), strict=True):
            averaged.lerp_(value, 1 - decay)
    state.step += 1
    return loss.item()


def describe(plan: Plan, steps: int) -> NetworkSpec:
    model = architectures.build(plan.architecture, plan.arguments)
    degradation = plan.degradation
    coded = (
        f", {degradation.coded_versions} of {degradation.coded_versions + 1} then through AVIF 4:4:4 at quality "
        f"{degradation.quality_low} to {degradation.quality_high}"
        if degradation.coded_versions
        else ""
    )
    return NetworkSpec(
        name=plan.name,
        architecture=plan.architecture,
        arguments=plan.arguments,
        scale=model.scale,
        margin=model.margin,
        multiple=model.multiple,
        licence=plan.licence,
        degradation=f"Pillow bicubic ÷{degradation.scale}{coded}",
        training={
            "steps": steps,
            "seed": plan.seed,
            "batch": plan.batch,
            "patch": plan.patch,
            "learning_rate": plan.learning_rate,
            "loss": "L1",
        },
    )


def train(
    plan: Plan,
    pairs: Sequence[Pair],
    out: Path,
    *,
    save_every: int = 500,
    until: int | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train up to ``plan.steps`` (or stop at ``until``, to be resumed), going on from ``OUT.checkpoint`` if it exists.

    ``progress`` is called after each step with the number of steps done and the loss. Returns the losses of these
    steps. The same plan, photographs and number of torch threads give the same losses and weights, resumed or not.
    Raises ValueError when the checkpoint belongs to another plan.
    """
    if architectures.build(plan.architecture, plan.arguments).scale != plan.degradation.scale:
        raise ValueError("the network's scale and the degradation's differ")
    checkpoint = out.with_name(out.name + ".checkpoint")
    state = _State(plan)
    if checkpoint.exists():
        state.load(checkpoint, plan)
    losses: list[float] = []
    end = plan.steps if until is None else min(until, plan.steps)
    while state.step < end:
        losses.append(_step(plan, state, pairs))
        progress(state.step, losses[-1])
        if state.step % save_every == 0 or state.step == end:
            state.save(checkpoint, plan)
            data = loading.save(describe(plan, state.step), state.average.state_dict())
            partial = out.with_name(out.name + ".partial")
            partial.write_bytes(data)
            os.replace(partial, out)
    return losses
