"""Which source may be migrated into which destination."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from esrfs.store import layout
from esrfs_daemon.destination import Destination, lies_in_view


class Refused(Exception):  # noqa: N818 (a state, not an error)
    """This source and this destination must not be migrated; for people. Nothing was done."""


def refuse_unsuitable(source: str, source_fd: int, destination: Destination) -> None:
    """Raises Refused where one holds the other, or the source is a store or the view of one."""
    view = lies_in_view(source_fd)
    if view is not None:
        raise Refused(
            f"{source} lies in {view}, a mounted esrfs: its files may be rebuilt pictures. Bring originals back first "
            "(esrfs restore), or copy what you see with cp -a"
        )
    here = os.fstat(source_fd)
    for below, what in ((destination.path, "the destination"), (destination.store, "the destination's store")):
        for above in _and_above(os.path.realpath(below)):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(above), here):
                    raise Refused(f"{what} {below} lies in {source}; choose a source beside it. Nothing was done")
    for above in _and_above(os.path.realpath(source)):
        if layout.is_store(above):
            raise Refused(f"{source} lies in {above}, a store of esrfs; mount that one. Nothing was done")


def _and_above(path: str) -> Iterator[str]:
    while True:
        yield path
        above = os.path.dirname(path)
        if above == path:
            return
        path = above
