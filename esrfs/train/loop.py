"""Train a network: stages of losses, seeded and resumable.

Step n depends on the settings, n and what was learnt before, nothing else: each step's patches come from a random
generator of its own, seeded by (seed, n), so there is no other random state to keep. Every ``save_every`` steps a
checkpoint (weights, their moving average, discriminator, optimizers, step) replaces ``checkpoint.pt`` in the
training's folder, and the average is exported beside it, so that there is a usable network long before the end.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs import whole
from esrfs.metrics.differentiable import ssimulacra2
from esrfs.networks import architectures, loading
from esrfs.train import colour, discriminators, export, features, growth, log, shrinking, validation
from esrfs.train.features import PerceptualLoss
from esrfs.train.photographs import Batch, Photograph, draw_batch
from esrfs.train.settings import Stage, Training, TrainingError

CHECKPOINT = "checkpoint.pt"


class BusyError(TrainingError):
    """For people: another training writes to this folder."""


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What a training works with, beside its settings."""

    learn: Sequence[Photograph]
    aside: Sequence[Photograph]
    """To measure with."""
    start: dict[str, Tensor] | None = None
    """Weights to begin with; None: random ones."""
    perceptual: PerceptualLoss | None = None
    """Needed where a stage asks for features."""
    enlarger: loading.Network | None = None
    """What a shrinker is made for."""
    enlarger_sha256: str = ""
    shrinker_sha256: str = ""
    """Of the degradation's."""
    encoder: str = ""
    """What coded the photographs, as ``store_degradation.encoder``; empty: nothing did."""

    def fingerprint(self) -> dict[str, str]:
        """What else decides how a training turns out: words for people where it is another one, and what tells that."""
        contents = b"".join(photograph.content for photograph in (*self.learn, *self.aside))
        start = hashlib.sha256()
        for name, value in sorted((self.start or {}).items()):
            start.update(name.encode() + value.float().contiguous().numpy().tobytes())
        return {
            "other photographs": hashlib.sha256(contents).hexdigest(),
            "other starting weights": start.hexdigest() if self.start else "",
            "another perceptual loss": features.fingerprint(self.perceptual),
            "another enlarger": self.enlarger_sha256,
            "another shrinker": self.shrinker_sha256,
            "another AVIF encoder": self.encoder,
        }


class _State:
    """What a checkpoint holds: where the training is, and all that it has learnt."""

    def __init__(self, training: Training, inputs: Inputs, device: torch.device) -> None:
        self._training = training
        self._device = device
        torch.manual_seed(training.seed)
        self.model: nn.Module = architectures.build(training.architecture, training.arguments)
        if inputs.start is not None:
            start = {name: value.float() for name, value in inputs.start.items()}
            try:
                if _shapes(start) != _shapes(self.model.state_dict()) and training.architecture == "SRVGGNetCompact":
                    start = growth.grown(start, self.model)
                self.model.load_state_dict(start)
            except RuntimeError as error:
                raise TrainingError(f"the weights to start with don't fit the network: {error}") from error
        self.model.to(device)
        loading.channels_last(self.model)
        self.seconds = 0.0
        self._begin(0)

    def _begin(self, stage: int) -> None:
        self.stage = stage
        self.step = 0
        """Of this stage."""
        settings = self._training.stages[stage]
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = _adam(self.model)
        self.critic: nn.Module | None = None
        self.critic_optimizer: torch.optim.Optimizer | None = None
        if settings.adversarial:
            torch.manual_seed(self._training.seed + 1 + stage)
            self.critic = discriminators.build(settings.discriminator, settings.discriminator_width).to(self._device)
            loading.channels_last(self.critic)
            self.critic_optimizer = _adam(self.critic)

    def next_stage(self) -> None:
        """The next stage begins with the averaged weights, and with nothing else of this one."""
        self.model.load_state_dict(self.average.state_dict())
        self._begin(self.stage + 1)

    @property
    def settings(self) -> Stage:
        return self._training.stages[self.stage]

    @property
    def total(self) -> int:
        """Steps done, over all stages."""
        return sum(stage.steps for stage in self._training.stages[: self.stage]) + self.step

    def save(self, path: Path, fingerprint: dict[str, str]) -> None:
        state: dict[str, Any] = {
            "training": msgspec.json.encode(self._training, order="sorted").decode(),
            "inputs": fingerprint,
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.critic is not None and self.critic_optimizer is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
        data = io.BytesIO()
        torch.save(state, data)  # (to a file that can't grow it raises no OSError)
        whole.write(path, data.getvalue())

    def load(self, path: Path, fingerprint: dict[str, str]) -> None:
        try:
            state: dict[str, Any] = loading.unpickled(path.read_bytes())
            made_by, made_from = msgspec.json.decode(state["training"], type=Training), dict(state["inputs"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path} can't be read ({error}), or is of another version of esrfs; give another folder, or remove it "
                "to begin anew"
            ) from error
        if other := _unlike(msgspec.to_builtins(made_by), msgspec.to_builtins(self._training)):
            raise TrainingError(
                f"{path} belongs to a training with other settings ({', '.join(other)}); "
                "give the same settings to go on with it, or another folder to begin anew"
            )
        if other := _unlike(made_from, fingerprint):
            raise TrainingError(
                f"{path} was made with {', '.join(other)}; give the same to go on with it, or another folder to begin "
                "anew"
            )
        self._begin(state["stage"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


def _unlike(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys of either whose values differ."""
    return [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.99))  # the rate is set at each step


def learning_rate(stage: Stage, step: int) -> float:
    if step < stage.warm_up:
        return stage.learning_rate * (step + 1) / stage.warm_up
    progress = (step - stage.warm_up) / max(1, stage.steps - stage.warm_up)
    return float(stage.learning_rate * 0.5 * (1 + np.cos(np.pi * progress)))


def train(
    training: Training,
    inputs: Inputs,
    folder: Path,
    *,
    device: torch.device | None = None,
    workers: int = 1,
    until: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    validated: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> int:
    """Train to the end of the last stage (or to step ``until``, or to where ``stop`` says True, to be resumed), going
    on from the checkpoint in ``folder`` if there is one.

    ``progress`` is called after each step with the number of steps done and its losses, ``validated`` after each look
    at the photographs set aside. ``workers`` threads draw patches ahead. Returns how many steps are done, over all
    runs. On a CPU, the same settings, inputs and number of torch threads give the same losses and weights, resumed or
    not. Raises TrainingError when the checkpoint belongs to another training, BusyError, OSError.
    """
    device = device or torch.device("cpu")
    with _alone(folder):
        checkpoint, journal = folder / CHECKPOINT, folder / log.FILE
        fingerprint = inputs.fingerprint()
        state = _State(training, inputs, device)
        if checkpoint.exists():
            state.load(checkpoint, fingerprint)
        log.cut(journal, state.total)
        end = sum(stage.steps for stage in training.stages)
        end = end if until is None else min(until, end)
        unlogged: list[dict[str, float]] = []
        perceptual = None if inputs.perceptual is None else inputs.perceptual.to(device)
        before = time.monotonic()
        with _batches(training, inputs.learn, state.total, end, workers) as batches:
            while state.total < end:
                if state.step == state.settings.steps:
                    state.next_stage()
                unlogged.append(_step(training, state, next(batches), perceptual, inputs.enlarger))
                done = state.total
                progress(done, unlogged[-1])
                now = time.monotonic()
                state.seconds += now - before
                before = now
                entries = []
                over = state.step == state.settings.steps
                last = done == end or stop()
                if done % training.log_every == 0 or over or last:
                    rate = learning_rate(state.settings, state.step - 1)
                    entries.append(_entry(state, losses=_means(unlogged), rate=rate))
                    unlogged = []
                if inputs.aside and (done % training.validate_every == 0 or over):
                    figures = validation.measure(training, state.average, inputs.aside, device, inputs.enlarger)
                    entries.append(_entry(state, validation=figures))
                    validated(done, figures)
                log.append(journal, entries)
                if done % training.save_every == 0 or over or last:
                    export.write(
                        training,
                        state.average,
                        folder,
                        stage=state.stage,
                        steps=state.step,
                        features=inputs.perceptual.description if inputs.perceptual is not None else "",
                        entries=log.read(journal),
                    )
                    # Last: what a checkpoint says was done is never done again.
                    state.save(checkpoint, fingerprint)
                if last:
                    break
        return state.total


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The only training that writes to ``folder``, which is made. Raises BusyError."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"another training writes to {folder}; wait for it, or name another folder") from error
        yield
    finally:
        os.close(descriptor)


def _entry(state: _State, **fields: Any) -> log.Entry:
    return log.Entry(step=state.total, stage=state.stage, seconds=round(state.seconds, 1), **fields)


def _means(losses: list[dict[str, float]]) -> dict[str, float]:
    """Of steps of one stage."""
    return {name: float(np.mean([each[name] for each in losses])) for name in losses[-1]}


@contextlib.contextmanager
def _batches(
    training: Training, photographs: Sequence[Photograph], begin: int, end: int, workers: int
) -> Iterator[Iterator[Batch]]:
    """Patches for steps ``begin`` to ``end``, drawn by threads while the steps before them run."""
    stages = [stage for stage in training.stages for _ in range(stage.steps)]

    def draw(step: int) -> Batch:
        drawing = shrinking.draw_batch if training.architecture == "Shrinker" else draw_batch
        return drawing(photographs, training, stages[step], np.random.default_rng([training.seed, 1, step]))

    def each() -> Iterator[Batch]:
        ahead: deque[Future[Batch]] = deque()
        for step in range(begin, end):
            ahead.append(pool.submit(draw, step))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    pool = ThreadPoolExecutor(workers)
    try:
        yield each()
    finally:
        pool.shutdown(cancel_futures=True)


def _tensor(pixels: np.ndarray, device: torch.device) -> Tensor:
    x = torch.from_numpy(pixels).to(device, non_blocking=True)
    return x.permute(0, 3, 1, 2).float().div_(np.iinfo(pixels.dtype).max)  # NHWC permuted is channels_last already


def _step(
    training: Training,
    state: _State,
    batch: Batch,
    perceptual: PerceptualLoss | None,
    enlarger: loading.Network | None,
) -> dict[str, float]:
    stage = state.settings
    device = next(state.model.parameters()).device
    small, full = _tensor(batch.small, device), _tensor(batch.full, device)
    rate = learning_rate(stage, state.step)
    for optimizer in filter(None, (state.optimizer, state.critic_optimizer)):
        for group in optimizer.param_groups:
            group["lr"] = rate
    if state.critic is not None:
        state.critic.requires_grad_(False)
    rebuilt: Tensor | None = None
    terms: dict[str, Tensor] = {}
    """By the names of their weights in the stage."""
    if enlarger is not None:
        generator = torch.Generator().manual_seed(training.seed * 1_000_003 + state.total)
        noise = shrinking.noise(batch, device)
        terms = shrinking.losses(state.model, enlarger.differentiable, small, full, noise=noise, generator=generator)
    else:
        with _precision(training, device):
            rebuilt = state.model(small)
        rebuilt = rebuilt.float()
        if stage.l1:
            terms["l1"] = F.l1_loss(rebuilt, full)
        if stage.ssimulacra2:
            terms["ssimulacra2"] = (100 - ssimulacra2(full, rebuilt)).mean() / 100
        if stage.colour:
            terms["colour"] = colour.error(full, rebuilt)
        if stage.features:
            assert perceptual is not None
            with _precision(training, device):
                terms["features"] = perceptual(rebuilt, full).float()
        if state.critic is not None:
            with _precision(training, device):
                real, fake = state.critic(_seen(stage, full)), state.critic(_seen(stage, rebuilt))
            terms["adversarial"] = discriminators.relativistic(fake.float(), real.float())
    total = torch.stack([getattr(stage, name) * term for name, term in terms.items()]).sum()
    state.optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    if rebuilt is not None and state.critic is not None and state.critic_optimizer is not None:
        state.critic.requires_grad_(True)
        with _precision(training, device):
            real, fake = state.critic(_seen(stage, full)), state.critic(_seen(stage, rebuilt.detach()))
        terms["critic"] = discriminators.relativistic(real.float(), fake.float())
        state.critic_optimizer.zero_grad(set_to_none=True)
        terms["critic"].backward()  # type: ignore[no-untyped-call]
        state.critic_optimizer.step()
    decay = min(stage.average, (state.step + 1) / (state.step + 10))
    with torch.no_grad():
        averaged: list[Tensor] = list(state.average.parameters())
        values: list[Tensor] = list(state.model.parameters())
        torch._foreach_lerp_(averaged, values, 1 - decay)
    state.step += 1
    found = torch.stack([term.detach() for term in terms.values()]).tolist()  # one wait for the device, not several
    losses = dict(zip(terms, found, strict=True))
    if not all(np.isfinite(value) for value in losses.values()):
        raise TrainingError(
            f"the losses at step {state.total} aren't numbers any more ({losses}); begin anew in another folder with a "
            f"lower learning rate (`start` may name what was exported here before)"
        )
    return losses


def _seen(stage: Stage, pictures: Tensor) -> Tensor:
    """What the discriminator is shown. The plain mean: luma's weights would put texture into green first."""
    return pictures if stage.discriminator_sees == "colour" else pictures.mean(1, keepdim=True).expand_as(pictures)


def _precision(training: Training, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cuda" and training.precision == "mixed" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()
