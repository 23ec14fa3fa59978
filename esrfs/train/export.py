"""From trained weights to files that esrfs uses: safetensors with the network's description, and a card for people."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from esrfs import whole
from esrfs.networks import architectures, loading
from esrfs.networks.spec import NetworkSpec
from esrfs.train import log
from esrfs.train.settings import RealEsrganDegradation, Stage, Training


def describe(training: Training, stage: int, steps: int) -> NetworkSpec:
    """After ``steps`` steps of a stage."""
    with torch.device("meta"):
        model = architectures.build(training.architecture, training.arguments)
    settings = training.stages[stage]
    return NetworkSpec(
        name=settings.name,
        architecture=training.architecture,
        arguments=training.arguments,
        scale=model.scale,
        margin=model.margin,
        multiple=model.multiple,
        licence=training.licence,
        degradation=degradation_in_words(training),
        texture=1.0 if settings.adversarial else 0.0,
        training={
            "steps": sum(before.steps for before in training.stages[:stage]) + steps,
            "seed": training.seed,
            "start": training.start,
            "batch": settings.batch,
            "patch": settings.patch,
            "learning_rate": settings.learning_rate,
            "loss": loss_in_words(settings),
        },
    )


def degradation_in_words(training: Training) -> str:
    degradation, scale = training.degradation, training.scale
    if isinstance(degradation, RealEsrganDegradation):
        times = "twice" if degradation.second_order else "once"
        return f"blur, resizing, noise and JPEG {times}, then a sinc filter (Real-ESRGAN), ÷{scale}"
    shrunk = f"Pillow bicubic ÷{scale}" if scale > 1 else "full size"
    if not degradation.versions:
        return f"{shrunk}, clean"
    low, high = degradation.levels
    if training.enlarger:
        return f"{shrunk} for {training.enlarger}, with the noise of AVIF 4:4:4 at levels {low} to {high}"
    if degradation.shrinker:
        shrunk += f" (what is coded then through {degradation.shrinker})"
    return (
        f"{shrunk}, {degradation.versions} of {degradation.versions + 1} then through AVIF 4:4:4 as in compaction, at "
        f"levels {low} to {high}"
    )


def loss_in_words(stage: Stage) -> str:
    if stage.rate:
        return f"{stage.ssimulacra2:g} ln(100 - SSIMULACRA2) + {stage.rate:g} bits / bits before"
    gray = ", gray" if stage.discriminator_sees == "gray" else ""
    weights = {
        "L1": stage.l1,
        "(100 - SSIMULACRA2) / 100": stage.ssimulacra2,
        "colour error (CIE94)": stage.colour,
        "features": stage.features,
        f"relativistic average GAN ({stage.discriminator}{gray})": stage.adversarial,
    }
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items() if weight)


def write(
    training: Training,
    model: nn.Module,
    folder: Path,
    *,
    stage: int,
    steps: int,
    features: str = "",
    entries: Sequence[log.Entry] = (),
) -> Path:
    """``NAME.safetensors`` and ``NAME.md`` in ``folder``, each replaced as a whole. Returns the first's path."""
    description = describe(training, stage, steps)
    kind = torch.float16 if training.stored == "fp16" else torch.float32
    tensors: dict[str, Tensor] = {name: value.to(kind) for name, value in model.state_dict().items()}
    data = loading.save(description, tensors)
    path = folder / f"{description.name}.safetensors"
    told = card(training, description, data, stage=stage, features=features, entries=entries)
    whole.write(path, data)
    whole.write(path.with_suffix(".md"), told.encode())
    return path


def card(
    training: Training,
    description: NetworkSpec,
    data: bytes,
    *,
    stage: int,
    features: str = "",
    entries: Sequence[log.Entry] = (),
) -> str:
    """A model card in Markdown."""
    with torch.device("meta"):
        model = architectures.build(training.architecture, training.arguments)
    weights = sum(parameter.numel() for parameter in model.parameters())
    arguments = ", ".join(f"{name} {value}" for name, value in training.arguments.items())
    lines = [
        f"# {description.name}",
        "",
        "| | |",
        "|---|---|",
        f"| file | `{description.name}.safetensors`, {len(data):,} bytes, {training.stored} |",
        f"| sha256 | `{hashlib.sha256(data).hexdigest()}` |",
        f"| licence | {description.licence} |",
        f"| architecture | {description.architecture}: {arguments}; {weights:,} parameters |",
        f"| margin | {description.margin} input pixels |",
        f"| made for | {description.degradation} |",
        "",
        "## Training",
        f"Data: {training.data or 'not said'}.",
        f"Begins with: {training.start or 'random weights'}. Seed {training.seed}.",
        "",
    ]
    for number, settings in enumerate(training.stages[: stage + 1]):
        before = sum(each.steps for each in training.stages[:number])
        done = min(settings.steps, int(description.training["steps"]) - before)
        lines.append(
            f"{number + 1}. {done:,} of {settings.steps:,} steps of {settings.batch} patches of "
            f"{settings.patch * training.scale} pixels; loss: {loss_in_words(settings)}; Adam, learning rate "
            f"{settings.learning_rate:g} falling along half a cosine; moving average of weights {settings.average:g}"
            + (f"; features: {features}" if settings.features else "")
        )
    measured = [entry for entry in entries if entry.validation]
    if measured:
        figures = measured[-1].validation
        lines += [
            "",
            f"On the middle of {training.validation} photographs that were set aside, all versions, after "
            f"{measured[-1].step:,} steps: {log.in_words(figures)}.",
        ]
    return "\n".join(lines) + "\n"
