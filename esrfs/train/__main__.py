"""``esrfs train``, as a process of its own (it needs torch, which the command line never imports).

Stop it at any time, with Ctrl-C or SIGTERM; the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import platformdirs
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from esrfs.cli import show
from esrfs.engine.client import Device
from esrfs.exit_codes import ExitCode
from esrfs.networks import loading, registry
from esrfs.networks.registry import WeightsError
from esrfs.train import curves, features, log, loop, photographs, settings, store_degradation
from esrfs.train.settings import StoreDegradation, Training, TrainingError


def main(  # noqa: PLR0917 (typer calls it by name)
    what: Annotated[str, typer.Argument(metavar="SETTINGS")],
    data: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    cache: Annotated[Path | None, typer.Option()] = None,
    device: Device = "auto",
    threads: int = 2,
    workers: int = 1,
    until: int | None = None,
    minutes: float | None = None,
    vgg19: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """The options are explained in esrfs/cli/training.py."""
    torch.set_num_threads(threads)
    begun = time.monotonic()
    training = settings.read(settings.file_or_name(what))
    chosen = _device(device)
    total = sum(stage.steps for stage in training.stages)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bars:
        inputs = _inputs(
            training, data, cache or platformdirs.user_cache_path("esrfs") / "training", vgg19, bars, device=chosen
        )
        if inputs.perceptual is not None:
            bars.console.print(f"perceptual loss: {inputs.perceptual.description}")
        task = bars.add_task(f"training {training.stages[-1].name}", total=total, note="")
        recent: dict[str, float] = {}

        def progress(step: int, losses: dict[str, float]) -> None:
            for name, loss in losses.items():
                recent[name] = 0.99 * recent.get(name, loss) + 0.01 * loss
            note = " ".join(f"{name} {recent[name]:.4f}" for name in losses)
            bars.update(task, completed=step, note=note)

        def validated(step: int, figures: dict[str, float]) -> None:
            note = " ".join(f"{name} {recent[name]:.5f}" for name in recent)
            bars.console.print(f"step {step}: {note}; set aside: {log.in_words(figures)}")

        stopping = _stop_between_steps()
        finished = loop.train(
            training,
            inputs,
            out,
            device=chosen,
            workers=workers,
            until=until,
            stop=lambda: bool(stopping) or (minutes is not None and time.monotonic() - begun > 60 * minutes),
            progress=progress,
            validated=validated,
        )
    drawn = curves.draw(out)
    for file in sorted({f"{stage.name}.safetensors" for stage in training.stages}):
        if (out / file).exists():
            typer.echo(f"{out / file} is written")
    if drawn:
        typer.echo(f"{drawn} shows its course")
    elif importlib.util.find_spec("matplotlib") is None:
        typer.echo("no curves: they need matplotlib (pip install 'esrfs[train]')")
    if finished < total:
        typer.echo(f"stopped at step {finished} of {total}; the same command goes on from here")


def _inputs(
    training: Training, data: Path, cache: Path, vgg19: Path | None, bars: Progress, *, device: torch.device
) -> loop.Inputs:
    aside, learn = photographs.set_aside(photographs.find(data), training.validation)
    photographs.check(learn, aside, training)
    bars.console.print(f"{len(learn)} photographs to learn from, {len(aside)} set aside to measure with")
    task = bars.add_task("reading photographs", total=len(aside) + len(learn), note="")
    shrinker, shrinker_sha256, encoder, start = None, "", "", None
    if isinstance(training.degradation, StoreDegradation) and training.degradation.versions:
        encoder = store_degradation.encoder()
    if isinstance(training.degradation, StoreDegradation) and training.degradation.shrinker:
        content = _weights(training.degradation.shrinker)
        shrinker, shrinker_sha256 = loading.load(content), hashlib.sha256(content).hexdigest()
        if shrinker.channels != 3 * training.scale**2 + 4:
            raise TrainingError(
                f"{training.degradation.shrinker} does not make pictures {training.scale} times smaller"
            )
    loaded = [photographs.load(each, training, cache, lambda: bars.advance(task), shrinker) for each in (learn, aside)]
    if training.start:
        data_of_start = _weights(training.start)
        start = loading.read(data_of_start)[1]
        bars.console.print(f"begins with {training.start}, sha256 {hashlib.sha256(data_of_start).hexdigest()[:16]}…")
    enlarger, enlarger_sha256 = None, ""
    if training.enlarger:
        content = _weights(training.enlarger)
        enlarger, enlarger_sha256 = loading.load(content, device=device), hashlib.sha256(content).hexdigest()
        if enlarger.scale != training.scale or enlarger.spec.architecture == "Shrinker":
            raise TrainingError(f"{training.enlarger} does not enlarge by {training.scale}")
        bars.console.print(f"made for {training.enlarger}, sha256 {enlarger_sha256[:16]}…")
    wants_features = any(stage.features for stage in training.stages)
    if vgg19 is not None and not wants_features:
        raise TrainingError("--vgg19 is for stages with `features`, and these settings have none; leave it out")
    perceptual = features.build(vgg19) if wants_features else None
    return loop.Inputs(
        learn=loaded[0],
        aside=loaded[1],
        start=start,
        perceptual=perceptual,
        enlarger=enlarger,
        enlarger_sha256=enlarger_sha256,
        shrinker_sha256=shrinker_sha256,
        encoder=encoder,
    )


def _weights(name: str) -> bytes:
    return registry.file_or_name(name).read_bytes()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("there is no GPU that torch can use; give --device cpu")
        torch.backends.cudnn.benchmark = True
    return torch.device(name)


def _stop_between_steps() -> list[int]:
    """Filled by a signal: the step that runs is finished and kept. A second Ctrl-C ends at once. (Before there are
    steps the first does: photographs that are coded are kept.)"""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return received


if __name__ == "__main__":
    show.names_as_they_are()
    try:
        typer.run(main)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except WeightsError as error:
        show.note(str(error))
        sys.exit(ExitCode.NETWORK)
    except loop.BusyError as error:
        show.note(str(error))
        sys.exit(ExitCode.BUSY)
    except OSError as error:
        show.note(show.failure(error))
        sys.exit(ExitCode.PERMISSION if isinstance(error, PermissionError) else ExitCode.FAILED)
    except ValueError as error:
        show.note(str(error))
        sys.exit(ExitCode.FAILED)
    except Exception as error:
        sys.exit(show.bug(error))
