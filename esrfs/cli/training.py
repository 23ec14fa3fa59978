"""``train``: makes networks. The work is done by ``python -m esrfs.train``, which takes this process's place: it needs
torch, which the command line never imports."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from esrfs.engine.client import Device


def add_to(app: typer.Typer) -> None:
    app.command()(train)


def train(  # noqa: PLR0917 (typer calls it by name)
    settings: Annotated[
        str,
        typer.Argument(metavar="SETTINGS", help="A TOML file, or the name of a shipped network, to make it again."),
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Photographs, also in subfolders.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Networks, log, curves and the checkpoint.")],
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where coded photographs are kept between trainings. [default: XDG cache]"),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the network runs.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the network: part of what repeats a run.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Threads that prepare patches; more for a GPU.")] = 1,
    until: Annotated[
        int | None, typer.Option(min=1, metavar="STEP", help="Stop there; the same command goes on.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.")] = None,
    vgg19: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of torchvision's VGG19, for the perceptual loss; else a built-in."),
    ] = None,
) -> None:
    """Train a network (see docs/training.md). Stop it at any time: the same command goes on from there."""
    given = [
        ("--data", data),
        ("--out", out),
        ("--cache", cache),
        ("--device", device),
        ("--threads", threads),
        ("--workers", workers),
        ("--until", until),
        ("--minutes", minutes),
        ("--vgg19", vgg19),
    ]
    options = [str(part) for name, value in given if value is not None for part in (name, value)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "esrfs.train", *options, "--", settings])
