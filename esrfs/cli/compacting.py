"""``compact``, ``pause``, ``resume``: when files are stored small."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Annotated, Any

import typer

from esrfs import control
from esrfs.cli import mounted, show, stores
from esrfs.cli.show import CommandError
from esrfs.exit_codes import ExitCode
from esrfs.store import linux, recovery
from esrfs.store.layout import open_store
from esrfs.store.lease import RENEW_SECONDS, CompactorLease
from esrfs.store.rules import Rules
from esrfs.upkeep import retention, scheduler
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import CompactionUnavailable, Done, Workshop

Path = Annotated[str, typer.Argument(metavar="PATH", help="A store, a mountpoint, or a path in one.")]

_WORDS = {
    "compacted": "compacted",
    "refused": "refused by the gate",
    "passed_through": "passed through",
    "blob": "stored small before",
    "left": "left for later (in use, changing, or kept by its folder: see esrfs explain)",
    "failed": "failed",
    "queued": "waiting for their turn",
}


def add_to(app: typer.Typer) -> None:
    app.command()(compact)
    app.command()(pause)
    app.command()(resume)


def compact(
    given: Annotated[list[str], typer.Argument(metavar="PATH…", help="Files or folders in a store or its mount.")],
    now: Annotated[bool, typer.Option("--now", help="Don't wait until files were unchanged for a while.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Come back when it is done.")] = False,
) -> None:
    """Store files small, without waiting for the mount to come to them.

    The running mount does it, for it knows what is in use. A store that is not mounted is compacted by this command
    itself, with --now.
    """
    totals: Counter[str] = Counter()
    for place, relative in stores.by_store(given).values():
        with stores.at(place.store) as (store, _):
            Rules(store).decide("")  # raises StoreError: nothing is compacted while they can't be understood
            socket = mounted.find(place, store.config.id)
        if socket is None and place.mountpoint is not None:
            mounted.require(place, store.config.id)  # says what is wrong with the mount
        result: Mapping[str, Any]
        with show.progress("Compacting") as advance:
            if socket is not None:
                result = mounted.call_with_progress(socket, "compact", advance, paths=relative, now=now, wait=wait)
            elif now:
                result = _compact_unmounted(place.store, relative, advance)
            else:
                raise CommandError(
                    f"{place.store} is not mounted, so nothing watches whether its files are still being written; "
                    "if they are not, use --now",
                    ExitCode.NOT_MOUNTED,
                )
        totals.update({state: count for state, count in result.items() if state in _WORDS})
    show.line(
        ", ".join(f"{totals[state]} {words}" for state, words in _WORDS.items() if totals[state]) or "nothing to do"
    )
    if totals["failed"]:
        raise typer.Exit(ExitCode.FAILED)


def _compact_unmounted(path: str, relative: Sequence[str], advance: show.Advance) -> Mapping[str, Any]:
    """Compact in this process, as the compactor of the store."""
    linux.ignore_lease_signals()
    with open_store(path) as store, stores.catalog_of(store) as catalog, stores.engine_for(store) as engine:
        lease = CompactorLease(store)
        renewed = time.monotonic()

        def tell(done: Done, number: int, total: int) -> bool:
            nonlocal renewed
            advance(number, total, done.path)
            if time.monotonic() - renewed > RENEW_SECONDS:
                renewed = time.monotonic()
                return lease.renew()
            return True

        try:
            if not lease.acquire():
                raise CommandError(f"another mount of {path} compacts it; ask that one", ExitCode.BUSY)
            retention.count_day(store)
            for problem in recovery.recover(store).problems:
                show.note(problem)
            workshop = Workshop(store, engine, catalog, Claims(), lambda: lease.held)
            worker = scheduler.Scheduler(workshop, 0.0, lambda: retention.make_room(store))
            return worker.compact_now(relative, emit=tell)
        except CompactionUnavailable as error:
            raise CommandError(str(error), ExitCode.REFUSED) from error
        finally:
            lease.close()


def pause(path: Path) -> None:
    """Stop all compaction of a store at once, on every machine that mounts it, until `esrfs resume`."""
    with stores.at(path, readonly=False) as (store, place):
        socket = mounted.find(place, store.config.id)
        if socket is not None:
            control.call(socket, "pause")  # also drops what it works on
        else:
            scheduler.pause(store)
        show.line(f"compaction of {place.store} is paused; esrfs resume {quote(path)}")


def resume(path: Path) -> None:
    """Let compaction go on, after `esrfs pause` or after it stopped by itself."""
    with stores.at(path, readonly=False) as (store, place):
        socket = mounted.ask(place, store.config.id)
        if socket is not None:
            control.call(socket, "resume")
        else:
            scheduler.resume(store)
        show.line(f"compaction of {place.store} goes on")
