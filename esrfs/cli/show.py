"""What commands print: results for people or as JSON, progress on a terminal, and errors that help."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from esrfs.exit_codes import ExitCode

Advance = Callable[[int, int, str], None]
"""Called with (done, total, what is being worked on)."""


class CommandError(Exception):
    """Ends a command: a message for people (what happened, with which file, what to do) and the exit code."""

    def __init__(self, message: str, exit_code: int = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def names_as_they_are() -> None:
    """File names are bytes: print those that are not UTF-8 as they are."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")


def line(text: str = "") -> None:
    """A line of the result."""
    print(text)


def note(text: str) -> None:
    """A line beside the result: progress in words, warnings, errors."""
    print(f"esrfs: {text}", file=sys.stderr)


def as_json(value: Any) -> None:
    """The result for programs. File names that are not UTF-8 hold lone surrogates (Python's surrogateescape)."""
    print(json.dumps(value, indent=2))


def size(count: int | float) -> str:
    """Bytes for people: ``3.42 MB``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} TB"


def failure(error: OSError) -> str:
    """What happened, and to which file where that is known."""
    reason = error.strerror or str(error)
    # A descriptor's number may stand there, too, and tells people nothing.
    return reason if error.filename is None or isinstance(error.filename, int) else f"{error.filename}: {reason}"


def bug(error: Exception) -> ExitCode:
    """Of what should not have happened: all there is to know, and the exit code."""
    traceback.print_exc()
    note(f"this is a bug in esrfs ({error!r}); please report it with the lines above")
    return ExitCode.INTERNAL


def number_of(count: int, thing: str) -> str:
    """``1 view``, ``2 views``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} : 1"


def fields(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, aligned; rows without a value are left out."""
    width = max((len(name) for name, value in rows if value), default=0)
    for name, value in rows:
        if value:
            line(f"{name:<{width}}  {value}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table; columns whose numbers are in ``right`` are aligned to the right."""
    # rich takes a tenth of a second to import: only commands that use it wait for it (the mount does not).
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(header):
        drawn.add_column(title, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=200)
    console.print(drawn)


@contextlib.contextmanager
def progress(description: str, in_bytes: bool = False) -> Iterator[Advance]:
    """A progress bar on standard error while the block runs (a moving one until a total is known); nothing where that
    is no terminal. ``in_bytes``: what is counted are bytes, not files."""
    if not sys.stderr.isatty():
        yield lambda _done, _total, _what: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None, what="")

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, what=escape(what))

        yield advance
