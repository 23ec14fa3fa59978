"""The cache of rebuilt views: an LRU on disk (diskcache), raw files only.

A view is kept under the sha256 that its recipe pins. A hit is a file descriptor, so a view that is open survives its
eviction. The cache may fail in any way (full disk, damaged database, no permission) and the mount goes on without it:
:meth:`ViewCache.put` then hands out an unnamed file in memory, and says so in the log once.

Two segments keep a scan (backup, indexer) from flushing what people look at: a view enters ``new`` (a quarter of the
limit) and moves to ``kept`` when it is asked for again later. A scan reads each file once, so it only cycles ``new``.
Where space on the disk is low, ``new`` is given up first, then the oldest of ``kept``, if that is enough.

Threads: diskcache opens an SQLite connection for each thread, and a mount has hundreds, so one thread of our own
talks to it. No lock is held while waiting for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import diskcache

from esrfs import faults
from esrfs.engine import filevalue
from esrfs.engine.filevalue import FileValue

log = logging.getLogger("esrfs.cache")

DEFAULT_SIZE_LIMIT = 10 * 2**30
DEFAULT_FREE_FLOOR = 2 * 2**30
_POLICY = "least-recently-used"
NEW_SHARE = 0.25
"""Of the size limit, for views that were asked for once."""
PROMOTE_AFTER_SECONDS = 30.0
"""A second request within this time is the same program still at work, no sign that the view is wanted again."""
_MOST_VERIFIED = 100_000
"""Then all are checked once more: a mount lives for months, and what was evicted is still remembered as checked."""

_ABANDONED_AFTER_SECONDS = 3600.0
"""A file that no row names is what a killed mount was writing; a younger one may be what another mount writes now."""

_TROUBLE_WITH_THE_DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
)
"""The database may be quite well: it is not to be emptied."""
_FAILURES = (OSError, sqlite3.Error, diskcache.Timeout, ValueError)

T = TypeVar("T")


class Hit(NamedTuple):
    """A view that the caller owns and closes."""

    descriptor: int
    sha256: str
    """Hex, of these very bytes; differs from the key when a reconstruction could not be repeated exactly."""
    in_memory: bool = False
    """Not in the cache, but in memory."""


class _RawDisk(diskcache.Disk):  # type: ignore[misc]
    """Values are raw files, keys are text. A pickle, which runs code when it is read, is neither written nor read."""

    last_name: str | None = None
    """Of the file that was begun last."""

    def filename(self, key: Any = diskcache.UNKNOWN, value: Any = diskcache.UNKNOWN) -> tuple[str, str]:
        name, path = super().filename(key, value)
        self.last_name = name
        return name, path

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> Any:
        if not read:
            raise ValueError("the view cache stores files only")
        return super().store(value, read, key=key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode == diskcache.core.MODE_PICKLE or filename is None:
            raise ValueError("the view cache holds something that is not a raw file")
        return super().fetch(mode, filename, value, read)

    def put(self, key: Any) -> Any:
        if not isinstance(key, str):
            raise ValueError("keys of the view cache are hex strings")
        return super().put(key)


class ViewCache:
    """Views by the sha256 that their recipe pins (hex). Safe to use from any thread."""

    def __init__(
        self, directory: Path, size_limit: int = DEFAULT_SIZE_LIMIT, free_floor: int = DEFAULT_FREE_FLOOR
    ) -> None:
        """``size_limit`` and ``free_floor`` (least free space on the cache's filesystem) in bytes; never raises."""
        self._directory = directory
        self._size_limit = size_limit
        self._free_floor = free_floor
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="esrfs-cache")
        self._new: Any = None
        self._kept: Any = None
        self._warned = False
        self._verified: set[str] = set()
        self._stored_at: dict[str, float] = {}
        self.hits = 0
        self.misses = 0
        self._attempt("open", self._open, None)
        with contextlib.suppress(RuntimeError):  # no thread could be started just now
            self._thread.submit(self._remove_abandoned)  # who wants something waits for it, the mount doesn't

    # Everything that touches diskcache runs in the cache's own thread.

    def _attempt(self, what: str, work: Callable[[], T], otherwise: T) -> T:
        """Run ``work`` in the cache's thread; on failure warn once and give ``otherwise``."""
        try:
            return self._thread.submit(work).result()
        except _FAILURES as error:
            self._warn(what, error)
        except RuntimeError:  # the executor is shut down: the mount is ending
            pass
        return otherwise

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "view cache in %s: %s failed (%s); reads go on, but views may be rebuilt each time",
                self._directory,
                what,
                error,
            )

    def _open(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        new_limit = int(self._size_limit * NEW_SHARE)
        self._new = self._open_segment("new", new_limit)
        self._kept = self._open_segment("kept", self._size_limit - new_limit)

    def _open_segment(self, name: str, limit: int) -> Any:
        directory = self._directory / name
        settings = {
            "disk": _RawDisk,
            "disk_min_file_size": 0,
            "size_limit": limit,
            "eviction_policy": _POLICY,
            "cull_limit": 0,  # we cull ourselves before writing, so that the limit is never passed
        }
        try:
            return diskcache.Cache(str(directory), **settings)
        except (sqlite3.DatabaseError, ValueError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _TROUBLE_WITH_THE_DISK:
                raise
            log.warning("view cache %s is damaged (%s); it is emptied and started anew", directory, error)
            for entry in sorted(directory.rglob("*"), reverse=True):
                if entry.is_dir():
                    entry.rmdir()
                else:
                    entry.unlink()
            return diskcache.Cache(str(directory), **settings)

    def _remove_abandoned(self) -> None:
        """Remove files that no row names: they count for no limit, and nothing else would ever remove them."""
        try:
            for segment in (self._kept, self._new):
                if segment is None:
                    return
                directory = Path(segment.directory)
                before = time.time() - _ABANDONED_AFTER_SECONDS
                # The files first: one that gets its row after this look is young.
                old = {path for path in directory.rglob("*.val") if path.stat().st_mtime < before}
                if not old:
                    continue
                with contextlib.closing(sqlite3.connect(directory / "cache.db")) as database:
                    named = {directory / row[0] for row in database.execute("SELECT filename FROM Cache") if row[0]}
                for path in old - named:
                    path.unlink(missing_ok=True)
                    log.info("view cache: removed %s, which was never finished", path)
        except _FAILURES as error:  # of files that another mount removes, too: there is a next start
            log.debug("view cache: abandoned files could not be removed (%s)", error)

    def _find(self, key: str) -> Hit | None:
        """The cached view, after its content was checked once in this process's life."""
        if self._kept is None:
            return None
        for segment in (self._kept, self._new):
            reader, digest = self._look(segment, key)
            if reader is None:
                continue
            with reader:
                if key not in self._verified:
                    damage = _damage_of(reader, digest)
                    if damage:
                        log.warning("view cache: the copy of %s %s; it is dropped, and will be rebuilt", key, damage)
                        segment.delete(key)
                        continue
                    self._note_verified(key)
                descriptor = os.dup(reader.fileno())
            if segment is self._new and self._is_wanted_again(key):
                try:
                    self._promote(key, descriptor, digest)
                except _FAILURES as error:  # it stays where it is, and is served from there
                    self._note_stored(key)  # not tried at each open: a try copies what there is room for
                    self._warn("moving a view to those that are kept longer", error)
            return Hit(descriptor, digest)
        return None

    def _look(self, segment: Any, key: str) -> Any:
        """Its file and its sha256, or None twice."""
        try:
            return segment.get(key, read=True, tag=True)
        except (sqlite3.OperationalError, diskcache.Timeout):
            # It also notes the time of use, which a full disk may not take: no reason to rebuild what is there.
            segment.eviction_policy = "none"
            try:
                return segment.get(key, read=True, tag=True)
            finally:
                segment.eviction_policy = _POLICY

    def _note_verified(self, key: str) -> None:
        if len(self._verified) >= _MOST_VERIFIED:
            self._verified.clear()
        self._verified.add(key)

    def _note_stored(self, key: str) -> None:
        now = time.monotonic()
        self._stored_at.pop(key, None)  # the order is that of time
        while self._stored_at and now - next(iter(self._stored_at.values())) > PROMOTE_AFTER_SECONDS:
            del self._stored_at[next(iter(self._stored_at))]
        self._stored_at[key] = now

    def _is_wanted_again(self, key: str) -> bool:
        """A view stored long ago, or before this process started, has no entry, so its next use promotes it."""
        return time.monotonic() - self._stored_at.get(key, float("-inf")) > PROMOTE_AFTER_SECONDS

    def _promote(self, key: str, descriptor: int, digest: str) -> None:
        size = os.fstat(descriptor).st_size
        if not self._make_room(self._kept, size):
            return
        with io.FileIO(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)) as source:
            self._write(self._kept, key, source, digest)
        self._new.delete(key)

    def _write(self, segment: Any, key: str, source: Any, digest: str) -> None:
        """Add a view to a segment, or leave nothing: diskcache leaves its file when a write fails."""
        segment.disk.last_name = None
        try:
            segment.set(key, source, read=True, tag=digest)
        except BaseException:
            if segment.disk.last_name is not None:
                segment.disk.remove(segment.disk.last_name)
            raise

    def _make_room(self, segment: Any, size: int) -> bool:
        """Evict least recently used views until ``size`` more bytes fit the limit and leave the floor free."""
        if size > segment.size_limit:
            return False
        _shrink(segment, segment.size_limit - size)
        missing = self._missing(size)
        if missing > 0 and segment is self._new:
            _shrink(segment, segment.volume() - missing)
            missing = self._missing(size)
        # What is kept longer goes where that is enough: if others fill the disk, it is of more use than one view more.
        if 0 < missing <= self._kept.reset("size"):
            _shrink(self._kept, self._kept.volume() - missing)
            missing = self._missing(size)
        return missing <= 0

    def _missing(self, size: int) -> int:
        """Bytes that must become free before ``size`` more leave the floor free."""
        space = os.statvfs(self._directory)
        return self._free_floor + size - space.f_bavail * space.f_frsize

    def _store(self, key: str, view: BinaryIO, size: int, digest: str) -> Hit | None:
        if self._new is None or not self._make_room(self._new, size):
            return None
        faults.reach("cache.put")
        self._write(self._new, key, view, digest)
        self._note_stored(key)
        self._note_verified(key)
        reader, _ = self._look(self._new, key)
        if reader is None:  # another mount that shares the cache made room just now
            return None
        with reader:
            return Hit(os.dup(reader.fileno()), digest)

    # What the vfs calls.

    def get(self, key: str, *, by_the_way: bool = False) -> Hit | None:
        """The cached view; None when it is not there, which is no miss when it is asked for ``by_the_way``: by a
        program that opens the file and may never read its pixels."""
        hit = self._attempt("a look-up", lambda: self._find(key), None)
        if hit is not None:
            self.hits += 1
        elif not by_the_way:
            self.misses += 1
        return hit

    def put(self, key: str, view: bytes | FileValue) -> Hit:
        """Keep ``view`` and give it back as a descriptor; of an unnamed file in memory when the cache can't take it."""
        value = filevalue.of_bytes(view) if isinstance(view, bytes) else view
        with open(f"/proc/self/fd/{value.descriptor}", "rb", buffering=0) as file:  # has a position of its own
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            hit = self._attempt("writing", lambda: self._store(key, file, len(value), digest), None)
        if hit is not None:
            return hit
        return Hit(os.dup(value.descriptor), digest, in_memory=True)

    def drop(self, key: str) -> None:
        """Forget one view: its photograph was deleted, or the disk gives its bytes no more."""

        def work() -> None:
            self._verified.discard(key)
            self._stored_at.pop(key, None)
            if self._kept is not None:
                self._kept.delete(key)
                self._new.delete(key)

        self._attempt("dropping a view", work, None)

    def clear(self) -> int:
        """Empty the cache; the number of views that were in it."""

        def work() -> int:
            if self._kept is None:
                return 0
            self._verified.clear()
            self._stored_at.clear()
            return int(self._kept.clear()) + int(self._new.clear())

        return self._attempt("clearing", work, 0)

    def measure(self) -> dict[str, int]:
        """``views``, ``bytes`` on disk (database included) and ``limit``."""

        def work() -> dict[str, int]:
            if self._kept is None:
                return {"views": 0, "bytes": 0, "limit": self._size_limit}
            return {
                "views": len(self._kept) + len(self._new),
                "bytes": int(self._kept.volume() + self._new.volume()),
                "limit": self._size_limit,
            }

        return self._attempt("measuring", work, {"views": 0, "bytes": 0, "limit": self._size_limit})

    def close(self) -> None:
        def work() -> None:
            for segment in (self._kept, self._new):
                if segment is not None:
                    segment.close()

        self._attempt("closing", work, None)
        self._thread.shutdown()


def _shrink(segment: Any, target: int) -> None:
    """Evict least recently used views until no more than ``target`` bytes are left, or no view."""
    if target < 0:
        segment.clear()
    elif segment.volume() > target:
        limit = segment.size_limit
        segment.reset("size_limit", target)
        try:
            segment.cull()
        finally:
            segment.reset("size_limit", limit)


def _damage_of(copy: io.BufferedReader, digest: str) -> str:
    """What is wrong with a file that should have this sha256; empty if nothing is."""
    try:
        # A power cut can leave a short or empty file behind a committed row.
        return "" if hashlib.file_digest(copy, "sha256").hexdigest() == digest else "was damaged"
    except OSError as error:
        return f"can't be read ({error})"
