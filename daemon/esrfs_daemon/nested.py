"""Stores of esrfs that lie in a source, and mounted views of stores: nothing in them is moved.

In a view a photograph may be a rebuilt one, and in a store a blob: taken for originals and moved, the true ones would
be lost. They come and go while a source is walked and watched (``init --in-place``, a mount), so every way into a
migration asks here: the walk, events, files that have settled, and for all of them the migration as it opens a folder.

What was found holds for ``_FRESH_SECONDS``. A view that is mounted in that moment is found out by the descriptor of the
folder that files are copied from (``lies_in_view``); and what a store has just become the home of is still as it was.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass

from esrfs.store import layout
from esrfs.store.beneath import beneath
from esrfs_daemon.destination import views_below

_FRESH_SECONDS = 1.0

VIEW = "a mounted esrfs: its files may be rebuilt pictures, not originals"
STORE = "a store of esrfs: mount it instead of moving its inside"


@dataclass(frozen=True, slots=True)
class Inside:
    """A folder that nothing is moved from."""

    path: str
    """Relative to the source."""
    reason: str
    """What it is, for people."""


class NotMoved(Exception):  # noqa: N818 (a state, not an error)
    """The folder lies in a store or a view."""

    def __init__(self, inside: Inside) -> None:
        super().__init__(f"{inside.path}: {inside.reason}")
        self.inside = inside


class Nested:
    """Of one source. Used by its caller's thread only."""

    def __init__(self, source: str, source_fd: int) -> None:
        """``source``: its real path."""
        self._source = source
        self._source_fd = source_fd
        self._views: set[str] = set()
        self._known: dict[str, Inside | None] = {}
        self._since = float("-inf")

    def views(self) -> set[str]:
        """Mountpoints of views in the source, relative to it; none of them is asked. Raises OSError."""
        self._refresh()
        return self._views

    def around(self, folder: str) -> Inside | None:
        """The outermost store or view that the folder lies in, or is; None if there is none. Raises OSError."""
        self._refresh()
        return self._around(folder)

    def _around(self, folder: str) -> Inside | None:
        if folder in self._known:
            return self._known[folder]
        found = self._around(folder.rpartition("/")[0]) if folder else None
        if found is None:
            found = Inside(folder, VIEW) if folder in self._views else self._store_at(folder)
        self._known[folder] = found
        return found

    def _store_at(self, folder: str) -> Inside | None:
        try:
            fd = beneath(self._source_fd, folder, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None  # gone, or no folder any more: nobody gets into it
            return Inside(folder, f"it can't be looked at ({error.strerror})")
        try:
            return Inside(folder, STORE) if layout.is_store(".", fd) else None
        finally:
            os.close(fd)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._since >= _FRESH_SECONDS:
            self._views = views_below(self._source)
            self._known = {}
            self._since = now
