"""Mountpoints that nobody writes into while nothing is mounted there.

After a crash of the mount, a mountpoint that is an ordinary empty directory invites a mirror job to delete its copy
of everything, and a camera import to fill the wrong disk. So the directory has mode 0555 and, where this process may
(root), the immutable flag. Both lie on the directory below the mount and don't show while something is mounted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from esrfs.store import linux

UNWRITABLE = 0o555


@dataclass(frozen=True)
class Protection:
    """How a directory was before."""

    mode: int
    immutable: bool


def open_mountpoint(path: str) -> int:
    """A descriptor of the directory itself: taken before mounting, it reaches the directory below the mount. Raises
    OSError."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def protect_mountpoint(directory: int | str) -> Protection:
    """Make a directory unwritable, as far as this process may; returns how it was.

    A descriptor reaches the directory below a mount, a path what is mounted there. Raises OSError for a path that
    can't be opened, for nothing else.
    """
    with _opened(directory) as fd:
        return _protect(fd)


def protection_of(directory: int) -> Protection:
    """How an open directory is."""
    return Protection(stat.S_IMODE(os.fstat(directory).st_mode), linux.is_immutable(directory))


def _protect(directory: int) -> Protection:
    before = protection_of(directory)
    if not before.immutable:
        _attempt_mode(directory, UNWRITABLE)
        _attempt_immutable(directory, True)
    return before


def unprotect_mountpoint(directory: int | str, before: Protection | None = None) -> None:
    """Make a directory writable again, as it was ``before`` (else mode 0755). Raises OSError as above.

    Needed around mounting by an ordinary user, since fusermount3 refuses mountpoints that the user can't write to.
    """
    before = Protection(0o755, False) if before is None else before
    with _opened(directory) as fd:
        if not before.immutable:
            _attempt_immutable(fd, False)
        _attempt_mode(fd, before.mode)


@contextmanager
def _opened(directory: int | str) -> Iterator[int]:
    if isinstance(directory, int):
        yield directory
        return
    fd = open_mountpoint(directory)
    try:
        yield fd
    finally:
        os.close(fd)


def is_protected(directory: int) -> bool:
    """Whether even its owner (but root) can't write into it."""
    return linux.is_immutable(directory) or not os.fstat(directory).st_mode & 0o222


def _attempt_mode(directory: int, mode: int) -> None:
    try:
        os.fchmod(directory, mode)
    except OSError:
        return  # not ours, or a read-only filesystem: then we could not write there either


def _attempt_immutable(directory: int, on: bool) -> None:
    try:
        linux.set_immutable(directory, on)
    except OSError:
        return  # only root may, and only where the filesystem has such flags
