"""Which originals did their owner ask back? They stay originals until the owner names them to be compacted.

The store's ledgers tell, since they are where the file is: a catalog is one user's on one machine, and forgets a file
with its next ``chmod``. A file is known here by its content, which copies and moves keep. A content is asked back as
long as one restored file with it was not compacted again; which file a record speaks of shows in its inode, so that it
does not matter in which order the records of several machines are read. When in doubt a file stays an original.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import BinaryIO

from esrfs.store import ledger
from esrfs.store.beneath import beneath
from esrfs.store.layout import Store
from esrfs.store.ledger import Done, FileMark, Intent, ToPlain, Undone

_KIND = 9
"""Where, in a line that ``ledger.encode`` wrote, the record begins. A large store's ledgers have millions of lines, of
which few matter; only those are decoded, which also checks them."""
_TO_PLAIN = b'{"kind":"to_plain"'
_RESTORE = b'"purpose":"restore"'
_INTENT = b'{"kind":"intent"'
_DIGEST = re.compile(rb'"sha256_original":"([0-9a-f]{64})"')

_Inode = tuple[int, str]


class AskedBack:
    """Reads the ledgers of a store, when it is asked what they say; then only what came since. Not thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, int] = {}  # how far each ledger was read
        self._history: set[str] = set()  # those that were read when nothing was to come any more
        self._begun: dict[str, Intent | ToPlain] = {}
        self._back: defaultdict[str, set[frozenset[_Inode]]] = defaultdict(set)
        self._again: defaultdict[str, set[_Inode]] = defaultdict(set)

    def holds(self, sha256: bytes) -> bool:
        """Whether a file with this content is to be left alone. Raises OSError."""
        self._catch_up()
        digest = sha256.hex()
        return any(not inodes & self._again[digest] for inodes in self._back.get(digest, ()))

    def _catch_up(self) -> None:
        """First the restorings, then what was compacted again: the ledger of who did that may be read before the
        ledger of who had restored it."""
        ends = {}
        written, settled = self._names()
        for name in sorted(written | settled):
            with self._lines(name) as lines:
                end = self._read.get(name, 0)
                for line in lines:
                    end += len(line)
                    if line.startswith(_TO_PLAIN, _KIND) and _RESTORE in line:
                        self._begin(line)
            if end > self._read.get(name, 0):
                ends[name] = end
        if self._begun or self._back:
            for name, end in ends.items():
                with self._lines(name, end) as lines:
                    for line in lines:
                        self._look_at(line)
        self._read.update(ends)
        self._history |= settled

    def _look_at(self, line: bytes) -> None:
        if line.startswith(_INTENT, _KIND):
            digest = _DIGEST.search(line)
            if digest is not None and self._matters(digest[1].decode()):
                self._begin(line)
        elif self._begun and not line.startswith(_TO_PLAIN, _KIND):
            for record in ledger.decode(line).records:
                if isinstance(record, Done | Undone):
                    step = self._begun.pop(record.job, None)
                    if step is not None and isinstance(record, Done):
                        self._carried_through(step)

    def _matters(self, digest: str) -> bool:
        return digest in self._back or any(
            step.sha256_plain == digest for step in self._begun.values() if isinstance(step, ToPlain)
        )

    def _begin(self, line: bytes) -> None:
        for record in ledger.decode(line).records:
            if isinstance(record, Intent | ToPlain):
                self._begun[record.job] = record

    def _carried_through(self, step: Intent | ToPlain) -> None:
        if isinstance(step, Intent):
            self._again[step.sha256_original].add(_inode(step.original))
        else:
            file = {_inode(step.plain), _inode(step.blob)} if step.in_place else {_inode(step.plain)}
            self._back[step.sha256_plain].add(frozenset(file))

    def _names(self) -> tuple[set[str], set[str]]:
        """Ledgers that may say something new: those that are written, and those that have become history since."""
        with self._folder("") as written, self._folder(ledger.SETTLED) as settled:
            names = set(os.listdir(written)) - {ledger.SETTLED, ledger.DAYS}
            return names, set(os.listdir(settled)) - self._history

    @contextlib.contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        descriptor = beneath(self._store.ledger_fd, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _lines(self, name: str, end: int | None = None) -> Iterator[Iterator[bytes]]:
        """The whole lines of a ledger (up to ``end``) that were not read yet."""
        for path in (name, f"{ledger.SETTLED}/{name}"):  # it may move, when its process ends
            with contextlib.suppress(FileNotFoundError):
                descriptor = beneath(self._store.ledger_fd, path, os.O_RDONLY | os.O_NOFOLLOW)
                break
        else:
            yield iter(())
            return
        with os.fdopen(descriptor, "rb") as file:
            start = self._read.get(name, 0)
            file.seek(start)
            yield _whole_lines(file, start, end)


def _whole_lines(file: BinaryIO, at: int, end: int | None) -> Iterator[bytes]:
    for line in file:
        if not line.endswith(b"\n") or (end is not None and at >= end):
            return
        at += len(line)
        yield line


def _inode(mark: FileMark) -> _Inode:
    return mark.ino, mark.handle
