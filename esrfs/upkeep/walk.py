"""Every file of a store, by descriptors: nothing here can follow a link out, or come back through the mount.

One descriptor is open at a time, and nothing recurses, so that no tree is too deep. ``os.fwalk`` would end at the first
folder that the disk does not list, and leave out without a word what it can't tell to be a folder.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from esrfs.store.beneath import beneath
from esrfs.store.layout import RESERVED, Store

log = logging.getLogger("esrfs.upkeep")

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What a folder that was read a moment ago says of a name that is gone, or stands for something else by now."""


@dataclass(frozen=True)
class Found:
    path: str
    """Relative to the store's root."""
    directory: int
    """Descriptor of its folder; only as long as the walk has not moved on."""
    name: str
    st: os.stat_result
    """lstat of it; a regular file."""


@dataclass(frozen=True)
class LeftOut:
    """What a walk could not look at: a folder, or entries of one."""

    path: str
    """Relative to the store's root; of the folder, if several of its entries are meant."""
    entries: int
    """How many; 1 also for a folder that can't be opened or listed."""
    error: OSError

    @property
    def said(self) -> str:
        """For people, to follow the path."""
        what = (
            "it is left out, it" if self.entries == 1 else f"{self.entries} entries of this folder are left out, they"
        )
        return f"{what} can't be looked at: {self.error.strerror}"


Tell = Callable[[LeftOut], None]


def files(store: Store, below: Sequence[str] = ("",), tell: Tell | None = None) -> Iterator[Found]:
    """The regular files at and below the given paths, each name once for each path that leads to it, in sorted order.

    Raises OSError for a given path that does not exist, can't be listed or leads out of the store. What vanishes during
    the walk is skipped; so is what can't be looked at, which ``tell`` is told, or else the log.
    """

    def log_it(left_out: LeftOut) -> None:
        log.warning("%s: %s", os.path.join(store.path, left_out.path), left_out.said)

    for path in below:
        if path == RESERVED or path.startswith(RESERVED + "/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        descriptor = beneath(store.root_fd, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            st = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if stat.S_ISDIR(st.st_mode):
            yield from _below(store, path, tell or log_it)
        elif stat.S_ISREG(st.st_mode):
            above, _, name = path.rpartition("/")
            directory = beneath(store.root_fd, above, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield Found(path, directory, name, st)
            finally:
                os.close(directory)


def _below(store: Store, top: str, tell: Tell) -> Iterator[Found]:
    waiting = [top]
    while waiting:
        path = waiting.pop()
        directory = -1
        try:
            directory = beneath(store.root_fd, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            names = sorted(os.listdir(directory))
        except OSError as error:
            if directory >= 0:
                os.close(directory)
            if path == top:
                raise
            if error.errno not in _GONE:
                tell(LeftOut(path, 1, error))
            continue
        folders: list[str] = []
        try:
            yield from _files_in(path, directory, names, folders, tell)
        finally:
            os.close(directory)
        waiting += reversed(folders)


def _files_in(path: str, directory: int, names: list[str], folders: list[str], tell: Tell) -> Iterator[Found]:
    """The files of one folder; its folders are added to ``folders``."""
    failed: list[tuple[str, OSError]] = []
    for name in names:
        inner = os.path.join(path, name)
        if inner == RESERVED:
            continue
        try:
            st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _GONE:
                failed.append((inner, error))
            continue
        if stat.S_ISDIR(st.st_mode):
            folders.append(inner)
        elif stat.S_ISREG(st.st_mode):
            yield Found(inner, directory, name, st)
    if failed:
        tell(LeftOut(failed[0][0] if len(failed) == 1 else path, len(failed), failed[0][1]))
