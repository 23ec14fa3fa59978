"""``python -m esrfs.train``: train a compact network for a store, from a folder of photographs.

Stop it at any time; the same command goes on where the last checkpoint was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from esrfs.train.degradation import Degradation, find_photographs, make_pairs
from esrfs.train.fidelity import Plan, train


def main(  # noqa: PLR0917 (typer calls it by name)
    data: Annotated[Path, typer.Option(help="Folder of photographs, searched with its subfolders.")],
    out: Annotated[Path, typer.Option(help="The network, as safetensors; OUT.checkpoint beside it is for resuming.")],
    name: Annotated[str, typer.Option(help="The network's name; OUT's without its suffix if not given.")] = "",
    scale: Annotated[int, typer.Option(min=1, max=4)] = 2,
    channels: int = 32,
    convolutions: Annotated[int, typer.Option(help="Inner 3×3 convolutions; there are two more.")] = 4,
    activation: Annotated[str, typer.Option(help="prelu, relu or leakyrelu.")] = "prelu",
    steps: int = 10_000,
    seed: int = 0,
    batch: int = 16,
    patch: Annotated[int, typer.Option(help="Edge of a downscaled patch, pixels.")] = 48,
    learning_rate: float = 1e-3,
    coded: Annotated[int, typer.Option(help="AVIF versions of each photograph, beside the clean one.")] = 3,
    quality: Annotated[tuple[int, int], typer.Option(help="Range of their AVIF quality.")] = (50, 90),
    save_every: int = 500,
    threads: Annotated[int, typer.Option(help="CPU threads; part of what makes a run repeatable.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    degradation = Degradation(scale, coded, *quality)
    plan = Plan(
        name=name or out.stem,
        architecture="SRVGGNetCompact",
        arguments={"num_feat": channels, "num_conv": convolutions, "upscale": scale, "act_type": activation},
        degradation=degradation,
        steps=steps,
        seed=seed,
        batch=batch,
        patch=patch,
        learning_rate=learning_rate,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bars:
        photographs = find_photographs(data)
        preparing = bars.add_task("shrinking photographs", total=len(photographs), note="")
        pairs = make_pairs(photographs, degradation, seed, lambda: bars.advance(preparing))
        training = bars.add_task("training", total=steps, note="")
        recent = 0.0

        def progress(step: int, loss: float) -> None:
            nonlocal recent
            recent = loss if not recent else 0.99 * recent + 0.01 * loss
            bars.update(training, completed=step, note=f"L1 {recent:.5f}")
            if step % save_every == 0:
                bars.console.print(f"step {step}: L1 {recent:.5f}")

        train(plan, pairs, out, save_every=save_every, progress=progress)
    typer.echo(f"{out} is written")


if __name__ == "__main__":
    typer.run(main)
