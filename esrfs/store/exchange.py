"""Exchanging two names atomically, and taking an exchange back without ever writing over somebody's newer file."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from esrfs.store import linux
from esrfs.store.staging import look

IMPOSSIBLE = (errno.EACCES, errno.EPERM, errno.EXDEV, errno.EINVAL)
"""What an exchange answers where it can't be done: a protected directory, an immutable file, another filesystem."""

_ROUNDS = 32


def exchange(from_dir: int, from_name: str, to_dir: int, to_name: str) -> None:
    """Swap what two names stand for, in one step. Raises OSError; FileNotFoundError when either name is gone."""
    linux.renameat2(from_dir, from_name, to_dir, to_name, linux.RENAME_EXCHANGE)


@contextmanager
def keeping_mtime(directory: int) -> Iterator[None]:
    """For one change of a name: to who looks at the directory nothing has changed, so its mtime (not its ctime) stays.

    Else rsync would find every folder changed that compaction worked in. Who adds a name in the microseconds of the
    change may not see it in the mtime; nothing but compaction's own steps belongs in here. Not our directory: no error.
    """
    before = os.fstat(directory)
    yield
    with contextlib.suppress(OSError):
        after = os.fstat(directory)
        if after.st_mtime_ns != before.st_mtime_ns:
            os.utime(directory, ns=(after.st_atime_ns, before.st_mtime_ns))


class TakenBack(enum.Enum):
    RESTORED = enum.auto()
    """Under the name is what was there, or something newer; our own file is in the holding place again."""
    REPLACED = enum.auto()
    """The name has got a newer file; in the holding place is what that one replaced."""
    GONE = enum.auto()
    """Somebody deleted the name; in the holding place is what the exchange had brought out."""


def take_back(holding: int, held_name: str, directory: int, name: str, placed: os.stat_result) -> TakenBack:
    """After an exchange: put what is in the holding place back under ``name``; ``placed`` is what lies there now, we
    think.

    Others may rename over the name at any moment, so each exchange is followed by a look at what came out. If it isn't
    what we had put there, it is newer than what we just put back, and goes back in turn. Raises OSError.
    """
    ours = _inode(placed)
    first = ours
    for _ in range(_ROUNDS):
        held = look(holding, held_name)
        if held is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), held_name)
        try:
            with keeping_mtime(directory):
                exchange(holding, held_name, directory, name)
        except FileNotFoundError:
            return TakenBack.GONE
        came_out = look(holding, held_name)
        if came_out is not None and _inode(came_out) == ours:
            return TakenBack.RESTORED if ours == first else TakenBack.REPLACED
        ours = _inode(held)
    raise OSError(errno.EBUSY, "the name is being replaced again and again", name)


def _inode(st: os.stat_result) -> tuple[int, int]:
    return st.st_dev, st.st_ino
