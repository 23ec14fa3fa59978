"""``esrfs train``, as a process of its own (it needs torch, which the command line never imports).

Stop it at any time, with Ctrl-C or SIGTERM; the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
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

from esrfs.exit_codes import ExitCode
from esrfs.networks import loading, registry
from esrfs.networks.registry import WeightsError
from esrfs.train import curves, features, log, loop, photographs, settings
from esrfs.train.settings import StoreDegradation, Training, TrainingError


def main(  # noqa: PLR0917 (typer calls it by name)
    what: Annotated[str, typer.Argument(metavar="SETTINGS")],
    data: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    cache: Annotated[Path | None, typer.Option()] = None,
    device: str = "auto",
    threads: int = 2,
    workers: int = 1,
    until: int | None = None,
    minutes: float | None = None,
    vgg19: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """The options are explained in esrfs/cli/training.py."""
    torch.set_num_threads(threads)
    stopping = _stop_between_steps()
    begun = time.monotonic()
    path = Path(what)
    if not path.suffix:
        path = registry.shipped_directory() / "training" / f"{what}.toml"
    training = settings.read(path)
    chosen = _device(device)
    total = sum(stage.steps for stage in training.stages)
    finished = 0
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
            nonlocal finished
            finished = step
            for name, loss in losses.items():
                recent[name] = 0.99 * recent.get(name, loss) + 0.01 * loss
            note = " ".join(f"{name} {recent[name]:.4f}" for name in losses)
            bars.update(task, completed=step, note=note)

        def validated(step: int, figures: dict[str, float]) -> None:
            note = " ".join(f"{name} {recent[name]:.5f}" for name in recent)
            bars.console.print(f"step {step}: {note}; set aside: {log.in_words(figures)}")

        loop.train(
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
    typer.echo(f"{drawn} shows its course" if drawn else "no curves: they need matplotlib (pip install 'esrfs[train]')")
    if finished < total:
        typer.echo(f"stopped at step {finished} of {total}; the same command goes on from here")


def _inputs(
    training: Training, data: Path, cache: Path, vgg19: Path | None, bars: Progress, *, device: torch.device
) -> loop.Inputs:
    aside, learn = photographs.set_aside(photographs.find(data), training.validation)
    task = bars.add_task("reading photographs", total=len(aside) + len(learn), note="")
    shrinker, start = None, None
    if isinstance(training.degradation, StoreDegradation) and training.degradation.shrinker:
        shrinker = loading.load(_weights(training.degradation.shrinker))
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
    perceptual = features.build(vgg19) if any(stage.features for stage in training.stages) else None
    return loop.Inputs(
        learn=loaded[0],
        aside=loaded[1],
        start=start,
        perceptual=perceptual,
        enlarger=enlarger,
        enlarger_sha256=enlarger_sha256,
    )


def _weights(name: str) -> bytes:
    path = Path(name)
    return (path if path.suffix else registry.find(name)).read_bytes()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise TrainingError("there is no GPU that torch can use; give --device cpu")
        torch.backends.cudnn.benchmark = True
    return torch.device(name)


def _stop_between_steps() -> list[int]:
    """Filled by a signal: the step that runs is finished and kept. A second Ctrl-C ends at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return received


if __name__ == "__main__":
    try:
        typer.run(main)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except (TrainingError, ValueError, OSError, WeightsError) as error:
        sys.stderr.write(f"esrfs train: {error}\n")
        sys.exit(ExitCode.FAILED)
