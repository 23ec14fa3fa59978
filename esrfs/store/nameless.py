"""Blobs whose last name went: ``blobs/REFERENCE-RANDOM.DAY``, kept for a while.

A program that edits a photograph's captions writes a new file and deletes the old one, or replaces it. The new file
has the same pixels, and the old blob is what they are stored as without a second loss; so the blob outlives its name
(DESIGN 3.6). REFERENCE is its recipe's (64 hexadecimal digits, ``blob/reference.py``), DAY when it lost its name, as in
``originals.py``.

Nobody relies on what lies here: nothing of it is in the ledger, and what can't be kept is deleted as the program
wished. It is bounded: by the days of the undo window, by bytes, and by the space that is free; the oldest goes first.
A blob enters

* by a rename, in place of being unlinked;
* by a link, just before a rename replaces it. A crash in between leaves it with two names; the next ``purge`` takes
  this one away;
* as a copy, when it is open: who has it open may yet write to it.

Lock: ``Nameless._lock`` protects its list; nobody waits for a disk under it but to list the directory once.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from esrfs import faults
from esrfs.blob.reference import REFERENCE_BYTES
from esrfs.store import ledger
from esrfs.store.layout import Store

MOST_BYTES = 1 << 30
"""Of all together (st_size): some thousand photographs."""
_SHARE_OF_FREE = 0.1
"""They take no more than this share of the space that is free without them: who deletes wants room."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NAME = re.compile(r"([0-9a-f]{64})-[0-9a-f]{16}\.([0-9a-f]+)")
_CHUNK = 1 << 20
_DAY_SECONDS = 3600.0
"""How often the ledger is asked which day it is."""

FAULT_POINTS = ("nameless.taken", "nameless.linked", "nameless.copied")


@dataclass(frozen=True, slots=True)
class LastName:
    """The one name of a blob, which is about to go."""

    reference: bytes
    view_key: str
    """sha256 (hex) of its view."""
    device: int
    inode: int
    size: int


def find(store: Store, reference: bytes) -> Iterator[int]:
    """Descriptors (O_RDONLY, the caller's) of the files kept for this reference, in no order. They are what they were
    only if the caller finds them to be."""
    if store.blobs_fd < 0 or len(reference) != REFERENCE_BYTES:
        return
    for name in os.listdir(store.blobs_fd):
        if name.startswith(reference.hex()):
            with contextlib.suppress(OSError):
                yield os.open(name, _READ, dir_fd=store.blobs_fd)


def purge(store: Store, *, all_of_them: bool = False) -> int:
    """Let go what is due, what is too much, and what a crash left; ``all_of_them`` when space is low. The bytes freed
    (st_size). Raises OSError."""
    if store.blobs_fd < 0:
        return 0
    today = ledger.days_seen(store.ledger_fd)
    freed = 0
    kept = _listed(store)
    total = sum(size for _, size in kept)
    for name, size in kept:
        match = _NAME.fullmatch(name)
        over = match is None or today - int(match[2], 16) >= store.config.undo_days
        if over or all_of_them or total > MOST_BYTES or _links(store, name) > 1:
            _unlink(store, name)
            total -= size
            freed += size
    return freed


def _listed(store: Store) -> list[tuple[str, int]]:
    """(name, st_size) of all, the oldest first."""
    found = []
    with os.scandir(store.blobs_fd) as listing:
        for entry in listing:
            with contextlib.suppress(FileNotFoundError):
                st = entry.stat(follow_symlinks=False)
                found.append((st.st_ctime_ns, entry.name, st.st_size))
    return [(name, size) for _, name, size in sorted(found)]


def _links(store: Store, name: str) -> int:
    try:
        return os.stat(name, dir_fd=store.blobs_fd, follow_symlinks=False).st_nlink
    except FileNotFoundError:
        return 0


def _unlink(store: Store, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=store.blobs_fd)


class Nameless:
    """How a mount lets blobs go. Nothing here fails because a blob can't be kept."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: deque[tuple[str, int]] | None = None  # (name, bytes), the oldest first; None: not listed yet
        self._bytes = 0
        self._day = 0
        self._day_until = 0.0  # on the monotonic clock

    def unlink(self, directory: int, name: str, last: LastName) -> None:
        """Take the blob's name away: what ``os.unlink`` does, but that the blob is kept. Raises OSError."""
        kept = self._name_for(last)
        if kept is not None:
            try:
                os.rename(name, kept, src_dir_fd=directory, dst_dir_fd=self._store.blobs_fd)
            except OSError:
                kept = None  # another filesystem below the store, a quota …
        if kept is None:
            os.unlink(name, dir_fd=directory)
            return
        faults.reach("nameless.taken")
        try:
            st = os.stat(kept, dir_fd=self._store.blobs_fd, follow_symlinks=False)
        except FileNotFoundError:
            return  # another thread has made room with it
        if _is(st, last):
            self._add(kept, last.size)
            return
        # Somebody had given the name to something else a moment before.
        if stat.S_ISDIR(st.st_mode):
            os.rename(kept, name, src_dir_fd=self._store.blobs_fd, dst_dir_fd=directory)
            raise IsADirectoryError(name)
        _unlink(self._store, kept)

    @contextlib.contextmanager
    def replacing(self, directory: int, name: str, last: LastName | None) -> Iterator[None]:
        """Around a rename that is to give the blob's name to another file; ``last`` is None if it is no blob's."""
        kept = None if last is None else self._name_for(last)
        if kept is None or last is None:
            yield
            return
        try:
            os.link(name, kept, src_dir_fd=directory, dst_dir_fd=self._store.blobs_fd, follow_symlinks=False)
        except OSError:
            yield
            return
        faults.reach("nameless.linked")
        replaced = False
        try:
            yield
            with contextlib.suppress(FileNotFoundError):  # another thread has made room with it
                replaced = _is(os.stat(kept, dir_fd=self._store.blobs_fd, follow_symlinks=False), last)
        finally:
            if replaced:
                self._add(kept, last.size)
            else:
                _unlink(self._store, kept)

    def copy(self, descriptor: int, reference: bytes) -> None:
        """Keep a copy of a blob that is open as ``descriptor`` and is about to be changed or deleted."""
        st = os.fstat(descriptor)
        kept = self._name_for(LastName(reference, "", st.st_dev, st.st_ino, st.st_size))
        if kept is None:
            return
        partial = f".{secrets.token_hex(8)}"
        try:
            copy = os.open(
                partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._store.blobs_fd
            )
            try:
                _copy(descriptor, copy)
            finally:
                os.close(copy)
            faults.reach("nameless.copied")
            os.rename(partial, kept, src_dir_fd=self._store.blobs_fd, dst_dir_fd=self._store.blobs_fd)
        except OSError:
            with contextlib.suppress(OSError):
                _unlink(self._store, partial)
            return
        self._add(kept, st.st_size)

    def _name_for(self, last: LastName) -> str | None:
        """The name under which the blob is kept; None if it is not to be."""
        store = self._store
        if len(last.reference) != REFERENCE_BYTES or not store.config.undo_days or store.blobs_fd < 0 or store.readonly:
            return None
        try:
            if last.size > self._most():
                return None
            with self._lock:
                if self._kept is None:
                    self._kept = deque(_listed(store))
                    self._bytes = sum(size for _, size in self._kept)
                if self._day_until <= time.monotonic():
                    self._day = ledger.days_seen(store.ledger_fd)
                    self._day_until = time.monotonic() + _DAY_SECONDS
        except OSError:
            return None
        return f"{last.reference.hex()}-{secrets.token_hex(8)}.{self._day:x}"

    def _most(self) -> int:
        space = os.fstatvfs(self._store.blobs_fd)
        return min(MOST_BYTES, int((space.f_bavail * space.f_frsize + self._bytes) * _SHARE_OF_FREE))

    def _add(self, name: str, size: int) -> None:
        surplus = []
        with contextlib.suppress(OSError):
            most = self._most()
            with self._lock:
                assert self._kept is not None
                self._kept.append((name, size))
                self._bytes += size
                while self._bytes > most and len(self._kept) > 1:
                    surplus.append(self._kept.popleft())
                    self._bytes -= surplus[-1][1]
            for oldest, _ in surplus:
                _unlink(self._store, oldest)


def _is(st: os.stat_result, last: LastName) -> bool:
    return (st.st_dev, st.st_ino, st.st_nlink) == (last.device, last.inode, 1)


def _copy(source: int, target: int) -> None:
    offset = 0
    while chunk := os.pread(source, _CHUNK, offset):
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
        offset += len(chunk)
