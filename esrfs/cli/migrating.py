"""``migrate``: move a folder into a mount, verified, and back. The work is ``esrfs_daemon``'s."""

from __future__ import annotations

import contextlib
import enum
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated

import msgspec
import typer
from esrfs_daemon import config, once, throttle
from esrfs_daemon.destination import Destination, NotMounted
from esrfs_daemon.journal import Busy, Journal, JournalError
from esrfs_daemon.report import DestinationLost, NoRoom, Note, Progress, Report
from esrfs_daemon.suitable import Refused
from esrfs_daemon.throttle import Stopped, Throttle
from esrfs_daemon.undo import UndoReport
from esrfs_daemon.walk import Filters

from esrfs import control
from esrfs.cli import show
from esrfs.cli.show import CommandError
from esrfs.exit_codes import ExitCode

_SHOWN = 50
"""Names of a kind that are shown one by one; ``--json`` has them all."""
_SAVED_SECONDS = 20.0


class Then(enum.StrEnum):
    KEEP = "keep"
    TRASH = "trash"
    DELETE = "delete"
    SYMLINK = "symlink"


def add_to(app: typer.Typer) -> None:
    app.command()(migrate)


def migrate(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="A folder in a mounted esrfs; made if missing.")],
    *,
    then: Annotated[
        Then,
        typer.Option(help="What becomes of each source file once its copy is verified."),
    ] = Then.KEEP,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; tell what would be done.")] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Put back everything that was migrated from SRC to DEST.")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only files whose name (or path in SRC, with a /) is like this; repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not what is like this; repeatable.")] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also files whose names say that a program has not finished them.")
    ] = False,
    even_if_mirrored: Annotated[
        bool,
        typer.Option(
            "--even-if-mirrored",
            help="Also empty or link folders that Syncthing, Nextcloud, Dropbox … mirror: their other devices follow.",
        ),
    ] = False,
    rate: Annotated[str, typer.Option(help="Most bytes per second, such as 20M; 0 for no limit.")] = "0",
    min_free: Annotated[str, typer.Option(help="Free space that the destination keeps.")] = "2G",
    idle: Annotated[bool, typer.Option("--idle", help="Read SRC in the idle I/O class.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Copy a folder into a mount, verify each file by reading it back, and only then keep or remove the source.

    Nothing is ever overwritten; what can't be moved is named, with the reason. May be ended with Ctrl-C, or by force,
    at any time: the next run goes on from there. Folders of SRC stay, empty ones too.
    """
    stop = threading.Event()
    try:
        limits = config.Throttle(
            bytes_per_second=config.size(rate, "--rate"),
            min_free=config.size(min_free, "--min-free"),
            on_battery=True,
        )
        filters = Filters(include or (), exclude or (), takes_unfinished=unfinished)
    except ValueError as error:
        raise CommandError(str(error), ExitCode.USAGE) from error
    if idle:
        throttle.use_idle_io()
    with _errors(source), _ctrl_c(stop), contextlib.closing(Journal()) as journal:
        gentle = Throttle(limits, stop)
        with once.prepared(source, destination, journal, gentle, filters, create=not dry_run) as work:
            if dry_run:
                _show_plan(work.plan(then.value), then, as_json)
            elif undo:
                _undo(work, as_json, stop)
            else:
                _migrate(work, then, even_if_mirrored, as_json, stop)


@contextlib.contextmanager
def _errors(source: str) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise CommandError(str(error), ExitCode.REFUSED) from error
    except Busy as error:
        raise CommandError(str(error), ExitCode.BUSY) from error
    except (NotMounted, DestinationLost) as error:
        raise CommandError(str(error), ExitCode.NOT_MOUNTED) from error
    except NoRoom as error:
        raise CommandError(str(error), ExitCode.FAILED) from error
    except JournalError as error:
        raise CommandError(f"{error}; give the command again", ExitCode.FAILED) from error
    except NotADirectoryError as error:
        raise CommandError(f"{error.filename or source}: is not a folder; nothing was done", ExitCode.FAILED) from error


@contextlib.contextmanager
def _ctrl_c(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C ends the work after the files that are being copied; the second at once (which is safe, too)."""

    def end(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        show.note("ending; Ctrl-C again ends at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _migrate(work: once.Once, then: Then, even_if_mirrored: bool, as_json: bool, stop: threading.Event) -> None:
    began = time.monotonic()
    with _bar("Migrating", work, stop) as tell:
        try:
            report = work.migrate(then.value, even_if_mirrored=even_if_mirrored, tell=tell)
        except (Stopped, NoRoom, DestinationLost, JournalError) as end:
            _show_report(work.report, then, time.monotonic() - began, as_json, ended=True)
            if isinstance(end, Stopped):
                show.note("ended before all was done; give the command again to go on")
                raise typer.Exit(ExitCode.INTERRUPTED) from end
            raise
    _show_report(report, then, time.monotonic() - began, as_json)
    if report.failed or report.left or report.later:
        raise typer.Exit(ExitCode.FAILED)


def _undo(work: once.Once, as_json: bool, stop: threading.Event) -> None:
    with _bar("Putting back", None, stop) as tell:
        try:
            report = work.undo(tell)
        except Stopped as end:
            _show_undo(work.undo_report, as_json)
            show.note("ended before all was put back; give the command again to go on")
            raise typer.Exit(ExitCode.INTERRUPTED) from end
        except JournalError:
            _show_undo(work.undo_report, as_json)
            raise
    _show_undo(report, as_json)
    if report.failed:
        raise typer.Exit(ExitCode.FAILED)


# ---- results


def _show_plan(plan: once.Plan, then: Then, as_json: bool) -> None:
    if as_json:
        show.as_json(msgspec.to_builtins(plan))
        return
    show.fields(
        [
            ("would migrate", f"{show.number_of(plan.files, 'file')}, {show.size(plan.bytes)}"),
            ("symlinks", str(plan.symlinks or "")),
            ("would make", show.number_of(plan.folders, "folder") if plan.folders else ""),
            ("migrated already", show.number_of(plan.unchanged, "file") if plan.unchanged else ""),
            ("names taken", _taken(plan.taken_names)),
            ("sources then", "stay" if then is Then.KEEP else f"{then.value} (mirrored folders: {plan.mirrored} stay)"),
        ]
    )
    _names("can't be migrated", [Note(path=path, reason=reason) for path, reason in plan.failed])
    show.line("Nothing was changed.")


def _taken(count: int) -> str:
    return f"{show.number_of(count, 'file')}; those with other content would be kept beside" if count else ""


def _show_report(report: Report, then: Then, seconds: float, as_json: bool, ended: bool = False) -> None:
    rate = report.copied_bytes / seconds if seconds else 0.0
    if as_json:
        show.as_json({**msgspec.to_builtins(report), "seconds": round(seconds, 3), "complete": not ended})
        return
    more = [
        (report.links, "further name", "of files with several"),
        (report.symlinks, "symlink", ""),
        (report.folders, "folder", ""),
    ]
    touched = {Then.TRASH: "put into the trash", Then.DELETE: "deleted", Then.SYMLINK: "replaced by a symlink"}
    show.fields(
        [
            (
                "migrated",
                f"{show.number_of(report.copied, 'file')}, {show.size(report.copied_bytes)} ({show.size(rate)}/s), "
                "each read back and compared",
            ),
            ("there before", f"{show.number_of(report.existing, 'file')}, compared" if report.existing else ""),
            ("also", ", ".join(" ".join(filter(None, (show.number_of(n, w), t))) for n, w, t in more if n)),
            ("done before", show.number_of(report.unchanged, "file") if report.unchanged else ""),
            ("sources", f"{report.touched} {touched[then]}" if then in touched else "stay"),
        ]
    )
    _names("kept beside other content of that name", report.beside)
    _names("copied without all of its metadata", report.incomplete)
    _names("migrated, but the source stays", report.left)
    _names("not migrated yet", report.later)
    _names("not migrated", report.failed)


def _show_undo(report: UndoReport, as_json: bool) -> None:
    if as_json:
        show.as_json(msgspec.to_builtins(report))
        return
    show.fields(
        [
            ("put back", f"{show.number_of(report.restored, 'file')}, each read back and compared"),
            ("was there", show.number_of(report.there, "file") if report.there else ""),
            (
                "removed from the mount",
                f"{show.number_of(report.removed, 'file')}, {show.number_of(report.folders, 'folder')}",
            ),
        ]
    )
    _names("copies that stay", report.kept)
    _names("not put back", report.failed)


def _names(title: str, notes: list[Note]) -> None:
    """On standard error, since these lines are what somebody should look at."""
    for note in notes[:_SHOWN]:
        show.note(f"{title}: {_printable(note.path)}: {note.reason}")
    if len(notes) > _SHOWN:
        show.note(f"{title}: {len(notes) - _SHOWN} more (--json names all)")


def _printable(path: str) -> str:
    """One line, whatever the name is made of."""
    return path if path.isprintable() else ascii(path)


# ---- progress


@contextlib.contextmanager
def _bar(title: str, work: once.Once | None, stop: threading.Event) -> Iterator[Callable[[Progress], None]]:
    """Files, bytes, rate, time left, and what the store saves by now; on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _progress: None
        return
    # A tenth of a second, which other commands don't wait for.
    from rich import progress as shown  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = (
        shown.TextColumn("{task.description}"),
        shown.BarColumn(),
        shown.TextColumn("{task.fields[files]}"),
        shown.DownloadColumn(),
        shown.TransferSpeedColumn(),
        shown.TimeRemainingColumn(),
        shown.TextColumn("{task.fields[saved]}"),
    )
    with shown.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Counting", total=None, files="", saved="")
        files, size = work.total(stop.is_set) if work is not None else (0, 0)
        bar.reset(task, description=title, total=size or None, files="")
        done = 0
        ended = threading.Event()

        def tell(progress: Progress) -> None:
            nonlocal done
            done += progress.files
            text = f"{done} of {files} files" if files else f"{done} files"
            bar.update(task, advance=progress.bytes, files=text)

        def watch_saving(destination: Destination) -> None:
            before = None
            pause = 0.0
            while not ended.wait(pause):
                asked = time.monotonic()
                saved = _saving(destination)
                if saved is None:
                    return
                before = saved if before is None else before
                bar.update(task, saved=f"saved {show.size(saved - before)}")
                # Asking makes the mount walk its store: never more than a twentieth of its time.
                pause = max(_SAVED_SECONDS, 20 * (time.monotonic() - asked))

        if work is not None:
            threading.Thread(target=watch_saving, args=(work.destination,), daemon=True).start()
        try:
            yield tell
        finally:
            ended.set()


def _saving(destination: Destination) -> int | None:
    """Bytes that the store saves at present, once its undo window is over; None if the mount does not say."""
    socket = destination.control_socket()
    if socket is None:
        return None
    try:
        return int(control.call(socket, "status", timeout=60.0)["freed_later_bytes"])
    except (control.ControlError, KeyError, OSError):
        return None
