"""The store over time, and its undo window: days are counted, and originals whose window is over leave it. Only the
compactor does this."""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Callable

from esrfs.store import ledger, nameless, originals
from esrfs.store.layout import Store
from esrfs.upkeep import check

log = logging.getLogger("esrfs.upkeep")

_EVERY_SECONDS = 3600.0
_SAMPLE = 50
"""Blobs that are read and checked when a mount starts."""
_ROOM_BYTES = 2 * 2**30
"""What is freed at least when space is low, so that the next file does not ask again."""


def count_day(store: Store) -> None:
    """Tell the ledger that the store lives through this day. Raises OSError."""
    ledger.mark_day(
        store.ledger_fd,
        date=datetime.date.today().isoformat(),
        boot=store.boot,
        uptime=time.clock_gettime(time.CLOCK_BOOTTIME),
    )


def purge(store: Store, need_bytes: int = 0) -> None:
    """Let go what is due; with ``need_bytes`` also younger originals, oldest first, down to the floor. Never raises."""
    try:
        gone = originals.purge(store, need_bytes=need_bytes)
    except OSError as error:
        log.error("%s: the undo window could not be looked after (%s); nothing was lost", store.path, error)
        return
    if gone.names:
        log.info("%s: %d originals left the undo window, %d bytes freed", store.path, len(gone.names), gone.freed_bytes)
    for name in gone.changed:
        log.warning(
            "%s: the original %s was changed by a program after it was compacted; it is kept. `esrfs check` tells more",
            store.path,
            name,
        )


def make_room(store: Store) -> None:
    """The store's disk is nearly full: let go of blobs without a name, then shorten the undo window."""
    freed = let_go_of_nameless(store, all_of_them=True)
    purge(store, max(0, _ROOM_BYTES - freed))


def let_go_of_nameless(store: Store, *, all_of_them: bool = False) -> int:
    """Blobs whose last name went are kept no longer than that; the bytes freed. Never raises."""
    try:
        return nameless.purge(store, all_of_them=all_of_them)
    except OSError as error:
        log.error("%s: blobs without a name could not be looked after (%s); nothing was lost", store.path, error)
        return 0


def look_at_some_blobs(store: Store) -> None:
    """A sample of the blobs, once for each mount: damage is told before somebody needs the photograph. Never raises."""
    try:
        findings = check.sample(store, _SAMPLE)
    except OSError as error:
        log.error("%s: its blobs could not be looked at (%s)", store.path, error)
        return
    for finding in findings:
        log.error("%s: %s", finding.path, finding.message)


class Retention(threading.Thread):
    """Looks at a sample of the blobs, and after the undo window every hour while this process is the compactor."""

    def __init__(self, store: Store, lease_held: Callable[[], bool]) -> None:
        super().__init__(name="esrfs-retention", daemon=True)
        self._store = store
        self._lease_held = lease_held
        self._ending = threading.Event()

    def run(self) -> None:
        look_at_some_blobs(self._store)
        while not self._ending.is_set():
            if self._lease_held():
                try:
                    count_day(self._store)
                except OSError as error:
                    log.error("%s: the ledger could not count the day (%s)", self._store.path, error)
                else:
                    purge(self._store)
                    let_go_of_nameless(self._store)
            self._ending.wait(_EVERY_SECONDS)

    def stop(self) -> None:
        self._ending.set()
        self.join()
