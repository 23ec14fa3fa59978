"""Every file of a store, by descriptors: nothing here can follow a link out, or come back through the mount."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from esrfs.store.beneath import beneath
from esrfs.store.layout import RESERVED, Store

log = logging.getLogger("esrfs.upkeep")


@dataclass(frozen=True)
class Found:
    path: str
    """Relative to the store's root."""
    directory: int
    """Descriptor of its folder; only as long as the walk has not moved on."""
    name: str
    st: os.stat_result
    """lstat of it; a regular file."""


def files(store: Store, below: Sequence[str] = ("",)) -> Iterator[Found]:
    """The regular files at and below the given paths, each name once for each path that leads to it, in sorted order.

    Raises OSError for a given path that does not exist or leads out of the store. What vanishes during the walk is
    skipped; a folder that can't be read is logged and skipped.
    """
    for path in below:
        if path == RESERVED or path.startswith(RESERVED + "/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        descriptor = beneath(store.root_fd, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            st = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if stat.S_ISDIR(st.st_mode):
            yield from _below(store, path)
        elif stat.S_ISREG(st.st_mode):
            above, _, name = path.rpartition("/")
            directory = beneath(store.root_fd, above, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield Found(path, directory, name, st)
            finally:
                os.close(directory)


def _below(store: Store, path: str) -> Iterator[Found]:
    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            log.warning("a folder of the store is left out, it can't be read: %s", error)

    root = beneath(store.root_fd, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for above, folders, names, directory in os.fwalk(".", dir_fd=root, onerror=unreadable):
            inner = os.path.normpath(os.path.join(path, above))
            if inner == ".":
                inner = ""
                folders[:] = [name for name in folders if name != RESERVED]
            folders.sort()
            for name in sorted(names):
                try:
                    st = os.stat(name, dir_fd=directory, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(st.st_mode):
                    yield Found(os.path.join(inner, name), directory, name, st)
    finally:
        os.close(root)
