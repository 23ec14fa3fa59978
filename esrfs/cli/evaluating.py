"""``evaluate``: what codecs, kernels and networks give for their bytes. ``report``: what a store saves."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from esrfs import whole
from esrfs.cli import inspecting, show, stores
from esrfs.cli.show import CommandError
from esrfs.exit_codes import ExitCode
from esrfs.networks.registry import WeightsError
from esrfs.upkeep import history

_SHOWN = 50
"""Files that are left out, and shown one by one."""


def add_to(app: typer.Typer) -> None:
    app.command()(evaluate)
    app.command()(report)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in _names(text)))
    except ValueError as error:
        raise CommandError(f"{option} takes numbers, separated by commas; not {text!r}", ExitCode.USAGE) from error


def evaluate(  # noqa: PLR0917 (typer calls it by name)
    pictures: Annotated[list[Path], typer.Argument(metavar="FOLDER…", help="Folders of pictures, or pictures.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for the report; results in it are used again.")
    ] = Path("evaluation"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A coarse grid: half the qualities, one way to shrink.")
    ] = False,
    codecs: Annotated[str, typer.Option(help="Of jpeg, webp, avif, jxl, esrfs.")] = "",
    qualities: Annotated[str, typer.Option(help="1 to 100, for all codecs; each codec's own if left out.")] = "",
    scales: Annotated[str, typer.Option(help="Of 1, 2, 3, 4; 1: not shrunk.")] = "1,2,3,4",
    shrinks: Annotated[str, typer.Option(help="Of bicubic, bilinear, area.")] = "bicubic,bilinear,area",
    grows: Annotated[str, typer.Option(help="Of bicubic, lanczos.")] = "bicubic,lanczos",
    networks: Annotated[
        str,
        typer.Option(
            help="See `esrfs weights list`; none; or all, which leaves out those for texture (adversarial partners)."
        ),
    ] = "all",
    presets: Annotated[str, typer.Option(help="Of esrfs: faithful, high, balanced, small; all if left out.")] = "",
    metrics: Annotated[str, typer.Option(help="Of ssimulacra2, psnr, ssim, ms_ssim, niqe.")] = "",
    anchor: Annotated[
        str, typer.Option(help="The codec that others are compared with; avif if left out, or what there is.")
    ] = "",
    crops: Annotated[int, typer.Option(min=0, help="Pictures to show crops of.")] = 3,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one for each core.")] = 0,
) -> None:
    """Compare codecs, ways to shrink and grow, and networks on pictures: an HTML report, CSV and JSON.

    Takes as long as the grid is large: begin with --quick. Stop it at any time; the same command goes on from there.
    """
    _check_requirements()
    from esrfs.evaluate import command, grid, results, run  # noqa: PLC0415

    files = _find(pictures)
    default = grid.Choice()
    choice = grid.Choice(
        codecs=_names(codecs) or default.codecs,
        qualities=_numbers("--qualities", qualities),
        scales=_numbers("--scales", scales),
        shrinks=_names(shrinks),
        grows=_names(grows),
        networks=None if networks == "all" else () if networks == "none" else _names(networks),
        presets=_names(presets) or default.presets,
        measures=_names(metrics) or default.measures,
        anchor=anchor,
        quick=quick,
        may_lack=default.may_lack - set(_names(codecs)),
    )
    try:
        with show.progress("Looking at pictures") as looking, show.progress("Evaluating") as evaluating:
            made = command.evaluate(
                files,
                choice,
                out,
                jobs=jobs or run.cores(),
                crop_rows=crops,
                command_line=shlex.join(["esrfs", *sys.argv[1:]]),
                looking=looking,
                progress=evaluating,
            )
    except grid.ChoiceError as error:
        raise CommandError(str(error), ExitCode.USAGE) from error
    except WeightsError as error:
        raise CommandError(str(error), ExitCode.NETWORK) from error
    except results.BusyError as error:
        raise CommandError(str(error), ExitCode.BUSY) from error
    except run.WorkerLostError as error:
        raise CommandError(
            "a worker process was killed, most likely for want of memory; what was measured is kept. "
            "Give the same command again with --jobs 1",
            ExitCode.FAILED,
        ) from error
    except command.NothingToDoError as error:
        raise CommandError(str(error), ExitCode.FAILED) from error
    for name, why in list(made.refused.items())[:_SHOWN]:
        show.note(f"{name} is left out: {why}")
    if len(made.refused) > _SHOWN:
        show.note(f"{len(made.refused) - _SHOWN} more files are left out")
    for why in made.left_out:
        show.note(why)
    for path in made.files:
        show.line(str(path))


def report(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A store, a mountpoint, or a path in one.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for report.html and report.json.")] = Path("report"),
) -> None:
    """What a store saves and how it is read, as a page: savings over time, verdicts, quality, waiting, cache."""
    _check_requirements()
    from esrfs.evaluate import page, store_page  # noqa: PLC0415

    with stores.at(path) as (store, place):
        out.mkdir(parents=True, exist_ok=True)
        status = inspecting.status_of(store, place)
        with stores.catalog_of(store) as catalog, show.progress("Looking at the store"):
            told = history.of(store, catalog)
    values = {"status": status, **msgspec.to_builtins(told)}
    files = {
        "report.html": page.as_html(store_page.make(told, status)),
        "report.json": (json.dumps(values, indent=1) + "\n").encode(),
    }
    for name, data in files.items():
        whole.write(out / name, data)
        show.line(str(out / name))


def _check_requirements() -> None:
    """Raises CommandError. What follows may import numpy, torch and optional packages: commands do so only here."""
    from esrfs.evaluate import requirements  # noqa: PLC0415

    try:
        requirements.check()
    except requirements.MissingError as error:
        raise CommandError(str(error), ExitCode.FAILED) from error


def _find(given: list[Path]) -> list[tuple[Path, str]]:
    """(file, its name in the report) of every file at and below the given paths, sorted. Hidden ones are left out."""
    found: dict[Path, tuple[Path, str]] = {}  # by what the file really is
    taken: set[str] = set()
    for path in given:
        if not path.is_dir() and not path.is_file():
            raise CommandError(f"{path}: no such file or folder", ExitCode.FAILED)
        for file, below in sorted(_inside(path)) if path.is_dir() else [(path, path.name)]:
            if (real := file.resolve()) not in found:
                name = _as_text(str(file) if _as_text(below) in taken else below)
                found[real] = (file, name)
                taken.add(name)
    return list(found.values())


def _as_text(name: str) -> str:
    """For pages, CSV and JSON: bytes that are no UTF-8 are told by number."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _inside(folder: Path) -> Iterator[tuple[Path, str]]:
    """What :func:`_find` finds in a folder. A folder in it that can't be read is told."""

    def tell(error: OSError) -> None:
        show.note(f"{error.filename} is left out: {error.strerror}")

    for above, folders, files in os.walk(folder, onerror=tell):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            path = Path(above, name)
            if name[0] != "." and path.is_file():
                yield path, str(path.relative_to(folder))
