r"""The ledger: the append-only record of every step that can't be taken back.

This module is the reference for its format. A ledger is a text file of lines ``CRC JSON\n``: eight hexadecimal digits
of the CRC-32 of the JSON text, a space, and one JSON object whose ``kind`` names a record below. A line that does not
fit its CRC is damage; it costs that line only, since the next newline starts afresh. A last line without newline is a
torn tail: a crash during an append, and no error. Paths are percent-encoded bytes, so that any name survives.

Each process that changes a store writes a ledger of its own, ``ledger/HOST-BOOT-SESSION``, and holds a flock on it as
long as it lives. So "is the process that wrote this dead?" has one answer: whether the lock can be had. A ledger in
which nothing is pending moves to ``ledger/settled/`` when its process ends or recovery is through with it, and is
history then.

``ledger/days`` is the store's calendar (:func:`mark_day`); it alone is shared, and appended to under a flock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import threading
import urllib.parse
import zlib
from dataclasses import dataclass

import msgspec

from esrfs import faults
from esrfs.store import linux

_log = logging.getLogger(__name__)

SETTLED = "settled"
DAYS = "days"
RESERVED_BYTES = 1 << 16
"""Room that a ledger holds beyond its end, for some hundreds of records on a disk without any."""
LEAST_UPTIME_PER_DAY = 20 * 3600.0
"""Seconds: within one boot, days are not counted faster than this, whatever the clock says."""


class FileMark(msgspec.Struct, frozen=True, kw_only=True):
    """A file as recovery must know it again after a reboot (device numbers change; inode numbers are reused)."""

    ino: int
    handle: str
    """:func:`esrfs.store.linux.file_handle`; empty where the filesystem gives none."""
    size: int
    mtime_ns: int
    metadata: str
    """Digest of mode, owner and xattrs (:func:`esrfs.store.metadata.digest`)."""


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="opened"):
    """First record of a ledger."""

    format: int = 1
    host: str
    boot: str
    session: str
    pid: int


class Intent(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="intent"):
    """A blob, complete and durable in staging, is about to take an original's place."""

    job: str
    """16 hex digits, drawn at random: names this step in all later records."""
    path: str
    """Percent-encoded (:func:`quote`)."""
    parent_ino: int
    staging: str
    kept: str
    """The name that the original gets in ``originals/``."""
    linked: bool
    """True: the original is linked into ``originals/``, then the blob renamed over it; False: they are exchanged."""
    original: FileMark
    blob: FileMark
    sha256_original: str
    sha256_blob: str


class ToPlain(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="to_plain"):
    """A plain file, complete and durable in staging, is about to take a blob's place."""

    job: str
    path: str
    """Empty when the blob's name was not known (then ``in_place``)."""
    parent_ino: int
    staging: str
    in_place: bool
    """True: the blob's own inode is overwritten (it has several names); else the names are exchanged."""
    purpose: str
    """``write`` or ``restore``."""
    blob: FileMark
    plain: FileMark
    sha256_plain: str


class Done(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="done"):
    job: str


class Undone(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="undone"):
    job: str
    why: str


class Purged(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="purged"):
    """An original is about to leave the undo window for good."""

    name: str
    """Its name in ``originals/``."""
    why: str


class Found(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="found"):
    """Something that esrfs could not account for was moved from staging to ``originals/`` under ``name``."""

    name: str
    why: str


class Day(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="day"):
    """A day began, as far as this store can tell. See :func:`mark_day`."""

    number: int
    date: str
    """ISO, of the local clock, which may be wrong."""
    boot: str
    uptime: float
    """Seconds since boot, suspend included."""


Record = Opened | Intent | ToPlain | Done | Undone | Purged | Found | Day

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def quote(path: str) -> str:
    return urllib.parse.quote_from_bytes(os.fsencode(path), safe="/ ")


def unquote(path: str) -> str:
    return os.fsdecode(urllib.parse.unquote_to_bytes(path))


def encode(record: Record) -> bytes:
    text = _encoder.encode(record)
    return b"%08x %s\n" % (zlib.crc32(text), text)


@dataclass(frozen=True)
class Reading:
    records: list[Record]
    damaged: int
    """Complete lines that don't fit their CRC or are of no known kind."""
    torn: bool
    """The last line has no newline."""


def decode(data: bytes) -> Reading:
    """Every record that can be read, in order; never raises for bad content."""
    *lines, tail = data.split(b"\n")
    records: list[Record] = []
    damaged = 0
    for line in lines:
        record = _decode_line(line)
        if record is not None:
            records.append(record)
        elif line:
            damaged += 1
    return Reading(records, damaged, torn=bool(tail))


def _decode_line(line: bytes) -> Record | None:
    crc, _, text = line.partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        record: Record = _decoder.decode(text)
    except msgspec.DecodeError:
        return None
    return record


def read_fd(fd: int) -> Reading:
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return decode(file.read())


def pending(records: list[Record]) -> list[Intent | ToPlain]:
    """Steps that were begun, and neither done nor undone; in order."""
    over = {record.job for record in records if isinstance(record, Done | Undone)}
    return [record for record in records if isinstance(record, Intent | ToPlain) and record.job not in over]


def new_job() -> str:
    return secrets.token_hex(8)


def append_to(fd: int, record: Record, *, fsync: bool) -> None:
    """Append one record to an open ledger, after ending a torn line if there is one.

    The caller holds the flock. Raises OSError; then the file ends where it ended before, as far as that can be had.
    """
    faults.reach("ledger.append")
    end = os.lseek(fd, 0, os.SEEK_END)
    line = encode(record)
    if end and os.pread(fd, 1, end - 1) != b"\n":
        line = b"\n" + line
    try:
        written = os.pwrite(fd, line, end)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, end)
        raise
    if fsync:
        faults.reach("ledger.fsync")
        os.fsync(fd)


class Ledger:
    """This process's own ledger. Thread-safe: one lock around each append."""

    def __init__(self, directory: int, host: str, boot: str, session: str) -> None:
        """``directory``: descriptor of ``ledger/``, kept by the caller. Raises OSError."""
        self.name = f"{host}-{boot}-{session}"
        self._directory = directory
        self._lock = threading.Lock()  # protects the end of the file, _pending and _failure
        self._pending: set[str] = set()
        self._failure: OSError | None = None
        self._fd = os.open(self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            lock(self._fd)
            self.append(Opened(host=host, boot=boot, session=session, pid=os.getpid()))
            os.fsync(directory)
            # On a full disk the undo window is to be shortened, and that has to be recorded first.
            with contextlib.suppress(OSError):
                linux.reserve(self._fd, RESERVED_BYTES)
        except BaseException:
            os.close(self._fd)
            with contextlib.suppress(OSError):
                os.unlink(self.name, dir_fd=directory)
            raise

    def append(self, record: Record, *, fsync: bool = True) -> None:
        """Write ``record``; durable on return with ``fsync``.

        Raises OSError. After an fsync that failed every further append raises the same: the kernel may have dropped
        what it could not write, so nothing that follows could be trusted (a failed fsync is not to be retried).
        """
        with self._lock:
            if self._failure is not None:
                raise OSError(self._failure.errno, f"the ledger failed before: {self._failure.strerror}")
            try:
                append_to(self._fd, record, fsync=fsync)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    self._failure = error
                raise
            if isinstance(record, Intent | ToPlain):
                self._pending.add(record.job)
            elif isinstance(record, Done | Undone):
                self._pending.discard(record.job)

    def append_end(self, record: Done | Undone) -> None:
        """Write ``record`` if that can be had. If not the step stays pending, and recovery sees from the files that it
        had ended."""
        try:
            self.append(record)
        except OSError as error:
            _log.warning("the ledger %s takes no record: %s", self.name, error)

    @property
    def failure(self) -> OSError | None:
        """The error that closed this ledger to further records, if any."""
        return self._failure

    def close(self) -> None:
        """End the session; with nothing pending the ledger becomes history."""
        with self._lock:
            if self._fd < 0:
                return
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, os.fstat(self._fd).st_size)  # lets go of what was reserved
            if not self._pending and self._failure is None:
                with contextlib.suppress(OSError):
                    settle(self._directory, self.name)
            os.close(self._fd)
            self._fd = -1


def lock(fd: int) -> bool:
    """Take the flock that says "the writer of this lives". False where the filesystem has no flock.

    Raises BlockingIOError when another process holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
    return True


def settle(directory: int, name: str) -> None:
    """Move a ledger in which nothing is pending to ``ledger/settled/``."""
    linux.renameat2(directory, name, directory, f"{SETTLED}/{name}", 0)


def days(directory: int) -> list[Day]:
    """The store's calendar, oldest first; empty before the first mark."""
    try:
        fd = os.open(DAYS, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return []
    try:
        return [record for record in read_fd(fd).records if isinstance(record, Day)]
    finally:
        os.close(fd)


def days_seen(directory: int) -> int:
    """The number of the present day: how many days the ledger has seen. Ages are differences of such numbers."""
    return max((day.number for day in days(directory)), default=0)


def mark_day(directory: int, *, date: str, boot: str, uptime: float) -> int:
    """Count a new day if one has begun, and return the number of the present one. To be called every hour or so.

    A wrong clock must not make originals old. So a day counts only if its date was never counted before, and if in this
    boot the last one began at least 20 hours of uptime ago. A clock that jumps by years thus adds one day; one that
    stands still adds none.

    ``date``: ISO, local. ``boot``: the kernel's boot id. ``uptime``: seconds since boot. Raises OSError.
    """
    fd = os.open(DAYS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)  # two appenders of one host; across hosts only the compactor comes here
        seen = [record for record in read_fd(fd).records if isinstance(record, Day)]
        number = max((day.number for day in seen), default=0)
        if any(day.date == date for day in seen):
            return number
        if any(day.boot == boot and uptime < day.uptime + LEAST_UPTIME_PER_DAY for day in seen):
            return number
        append_to(fd, Day(number=number + 1, date=date, boot=boot, uptime=uptime), fsync=True)
        return number + 1
    finally:
        os.close(fd)
