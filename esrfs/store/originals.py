"""The undo window: ``originals/SHA256-JOB.SIZE.MTIME.DAY``, the originals of compacted files, as they were.

A name tells all there is to know: what the content was, which step of the ledger brought it here, its size and mtime
then (so that a change is noticed) and the day on which it came (numbers in hexadecimal; days as the ledger counts
them, see ``ledger.mark_day``). So the window needs no index that could be lost, and a wrong clock ages nothing.

``found-…`` beside them is what recovery could not account for; it is never purged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from esrfs import faults
from esrfs.store import ledger, linux
from esrfs.store.layout import Store
from esrfs.store.ledger import Purged
from esrfs.store.staging import FOUND_PREFIX

FLOOR_DAYS = 2
"""Low space shortens the window down to this many days, no further."""

_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{16})\.([0-9a-f]+)\.(-?[0-9a-f]+)\.([0-9a-f]+)")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Kept:
    """An original in the window."""

    name: str
    sha256: bytes
    job: str
    size: int
    mtime_ns: int
    day: int


def name_for(sha256: bytes, job: str, size: int, mtime_ns: int, day: int) -> str:
    return f"{sha256.hex()}-{job}.{size:x}.{mtime_ns:x}.{day:x}"


def parse(name: str) -> Kept | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    sha256, job, size, mtime, day = match.groups()
    return Kept(name, bytes.fromhex(sha256), job, int(size, 16), int(mtime, 16), int(day, 16))


def entries(store: Store) -> Iterator[Kept]:
    """All originals in the window, in no order."""
    for name in os.listdir(store.originals_fd):
        kept = parse(name)
        if kept is not None:
            yield kept


def found(store: Store) -> list[str]:
    """Names of what recovery put aside."""
    return sorted(name for name in os.listdir(store.originals_fd) if name.startswith(FOUND_PREFIX))


def find(store: Store, sha256: bytes) -> list[Kept]:
    """Originals with this content, newest first."""
    return sorted((kept for kept in entries(store) if kept.sha256 == sha256), key=lambda kept: -kept.day)


def is_changed(store: Store, kept: Kept) -> bool:
    """Whether a program wrote to it after it came here (it may have had it open)."""
    st = os.stat(kept.name, dir_fd=store.originals_fd, follow_symlinks=False)
    return (st.st_size, st.st_mtime_ns) != (kept.size, kept.mtime_ns)


def open_verified(store: Store, kept: Kept) -> int:
    """A descriptor (O_RDONLY) of an original whose content is still what its name says. Raises OSError, ValueError."""
    fd = os.open(kept.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=store.originals_fd)
    try:
        if sha256_of(fd) != kept.sha256:
            raise ValueError(f"{kept.name} is not what it was")
    except BaseException:
        os.close(fd)
        raise
    return fd


def sha256_of(fd: int) -> bytes:
    """Of the whole file, wherever the descriptor's position is. Raises OSError."""
    state = hashlib.sha256()
    offset = 0
    while chunk := os.pread(fd, _CHUNK, offset):
        state.update(chunk)
        offset += len(chunk)
    return state.digest()


def age(store: Store, kept: Kept, today: int | None = None) -> int:
    """Days that the ledger has seen begin since ``kept`` came into the window."""
    return max(0, (ledger.days_seen(store.ledger_fd) if today is None else today) - kept.day)


def days_left(store: Store, kept: Kept, today: int | None = None) -> int:
    """Days until ``kept`` may be purged (then 0), if space allows to keep it so long."""
    return max(0, store.config.undo_days - age(store, kept, today))


@dataclass(frozen=True)
class Purge:
    names: list[str]
    """What left the window."""
    freed_bytes: int
    changed: list[str]
    """Due, but kept for ever since a program wrote to them after they came here: somebody should look."""


def purge(store: Store, *, need_bytes: int = 0) -> Purge:
    """Let originals go whose window is over; then, while ``need_bytes`` are not freed, the oldest, down to the floor.

    Only the compactor does this. Each purge is in the ledger, durably, before it happens. An original that changed, or
    that a program has open for writing, stays. Raises OSError.
    """
    today = ledger.days_seen(store.ledger_fd)
    names: list[str] = []
    changed: list[str] = []
    freed = 0
    for kept in sorted(entries(store), key=lambda kept: (kept.day, kept.name)):
        days = age(store, kept, today)
        over = days >= store.config.undo_days
        if not over and (freed >= need_bytes or days < FLOOR_DAYS):
            continue
        gone = _purge_one(store, kept, "its time is over" if over else "space is low")
        if gone is None:
            changed.append(kept.name)
        elif gone >= 0:
            names.append(kept.name)
            freed += gone
    if names:
        os.fsync(store.originals_fd)
    return Purge(names, freed, changed)


def _purge_one(store: Store, kept: Kept, why: str) -> int | None:
    """Bytes freed; -1 for "not now"; None for a file that changed."""
    try:
        fd = os.open(kept.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=store.originals_fd)
    except OSError:
        return (
            -1
        )  # gone, not ours, or the disk doesn't give it, which `esrfs check` tells; others are to go all the same
    try:
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode) or is_changed(store, kept):
                return None
        except OSError:
            return -1
        if st.st_nlink != 1:
            return -1  # an unfinished step of an exclusive store: it is still the file in the view
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(linux.read_lease(fd))
            except BlockingIOError:
                return -1
            except linux.LeasesUnavailable:
                pass
            if is_changed(store, kept):
                return None
            store.ledger.append(Purged(name=kept.name, why=why))
            faults.reach("purge.recorded")
            os.unlink(kept.name, dir_fd=store.originals_fd)
        return st.st_blocks * 512
    finally:
        os.close(fd)
