"""The catalog: what was found out about files, so that nobody has to find it out again. Losing it loses nothing.

An entry belongs to one content of one inode: it is asked for by :class:`Identity` and holds only while device, inode,
size, mtime and ctime all agree. Each inode has at most one entry, so a reused inode number replaces the old one. Paths
are hints for people and lists; they go stale when files are renamed behind the mount, and nothing relies on them.

Beside that it counts how often a process ended with a file in its hands, so that the next one does not take it up for
ever.

SQLite in WAL mode, outside the store and never below the mount. A database that is broken is thrown away and begun
anew; for one that can't be opened or made (a full disk) one in memory stands in. Callers never see an sqlite3 error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from esrfs.store.identity import Identity

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

SCHEMA_VERSION = 3
_SCHEMA = (
    """
CREATE TABLE entries (
    dev INTEGER NOT NULL, ino INTEGER NOT NULL,       -- as signed 64 bit
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL,
    kind TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
    view_size INTEGER NOT NULL, stored_bytes INTEGER NOT NULL, sha256_view BLOB NOT NULL,
    score REAL, scale INTEGER NOT NULL, quality INTEGER NOT NULL,
    path BLOB NOT NULL,                               -- bytes; empty: not known
    choice TEXT NOT NULL,                             -- what a verdict was made under; empty: holds under any
    reference BLOB NOT NULL,                          -- of a blob's pixels (blob/reference.py); empty: not known
    PRIMARY KEY (dev, ino)
) WITHOUT ROWID""",
    "CREATE INDEX entries_by_reference ON entries (reference) WHERE reference != x''",
)
_ENDS = """
CREATE TABLE IF NOT EXISTS ends (                     -- few: a file that nothing ended with has no row
    dev INTEGER NOT NULL, ino INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL, times INTEGER NOT NULL,
    PRIMARY KEY (dev, ino)
) WITHOUT ROWID"""
_FIELDS = (
    "state, reason, message, kind, width, height, view_size, stored_bytes, sha256_view, score, scale, quality, path, "
    "choice, reference"
)


BLOCKED = "blocked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known about a file's present content."""

    state: str
    """``original`` (looked at, not tried), ``blob``, ``refused``, ``passed_through``, ``blocked`` (no verdict: as
    things are no blob can take its name); the caller's words."""
    reason: str = ""
    message: str = ""
    kind: str = ""
    width: int = 0
    height: int = 0
    view_size: int = 0
    """Bytes that the view has; for what is no blob the file's own size."""
    stored_bytes: int = 0
    """Bytes that the store uses (st_blocks × 512)."""
    sha256_view: bytes = b""
    score: float | None = None
    scale: int = 0
    quality: int = 0
    path: str = ""
    choice: str = ""
    """The preset (``lossless``, ``never``) that a refusal was made under, or the version of esrfs where that is what
    matters; empty where it would be the same under any."""
    reference: bytes = b""
    """Of a blob: ``blob/reference.py``."""


class Catalog:
    """Thread-safe; one lock around one connection, which serves short statements only."""

    def __init__(self, path: str) -> None:
        """``path`` of the database file; its directory exists (``esrfs.config.state_directory``)."""
        self._path = path
        self._lock = threading.Lock()  # protects _connection
        self._connection = self._open()

    def get(self, identity: Identity) -> Entry | None:
        def ask(connection: sqlite3.Connection) -> Entry | None:
            row = connection.execute(
                f"SELECT {_FIELDS} FROM entries WHERE dev=? AND ino=? AND size=? AND mtime_ns=? AND ctime_ns=?",
                _key(identity),
            ).fetchone()
            return None if row is None else _entry(row)

        return self._run(ask, None)

    def put(self, identity: Identity, entry: Entry) -> None:
        """Remember ``entry``, in place of whatever was known about this inode."""
        values = (
            *_key(identity),
            *(entry.state, entry.reason, entry.message, entry.kind, entry.width, entry.height),
            *(entry.view_size, entry.stored_bytes, entry.sha256_view, entry.score, entry.scale, entry.quality),
            os.fsencode(entry.path),
            entry.choice,
            entry.reference,
        )
        marks = ",".join("?" * len(values))
        self._run(lambda c: c.execute(f"INSERT OR REPLACE INTO entries VALUES ({marks})", values), None)

    def set_path(self, identity: Identity, path: str) -> None:
        """The inode was found by another name."""
        dev, ino, *_ = _key(identity)
        self._run(
            lambda c: c.execute("UPDATE entries SET path=? WHERE dev=? AND ino=?", (os.fsencode(path), dev, ino)), None
        )

    def forget(self, identity: Identity) -> None:
        """Drop what is known about this inode."""
        dev, ino, *_ = _key(identity)
        self._run(lambda c: c.execute("DELETE FROM entries WHERE dev=? AND ino=?", (dev, ino)), None)

    def entries(self, state: str | None = None) -> Iterator[tuple[Identity, Entry]]:
        """All entries, or those of one state, in no order; read in one go."""
        statement = f"SELECT dev, ino, size, mtime_ns, ctime_ns, {_FIELDS} FROM entries"
        rows: list[Any]
        if state is None:
            rows = self._run(lambda c: c.execute(statement).fetchall(), [])
        else:
            rows = self._run(lambda c: c.execute(f"{statement} WHERE state=?", (state,)).fetchall(), [])
        for row in rows:
            yield Identity(_unsigned(row[0]), _unsigned(row[1]), *row[2:5]), _entry(row[5:])

    def blobs_of(self, reference: bytes) -> list[tuple[Identity, str]]:
        """Identity and last known path of the blobs with these pixels."""
        statement = "SELECT dev, ino, size, mtime_ns, ctime_ns, path FROM entries WHERE reference=? AND reference!=x''"
        rows: list[Any] = self._run(lambda c: c.execute(statement, (reference,)).fetchall(), [])
        return [(Identity(_unsigned(row[0]), _unsigned(row[1]), *row[2:5]), os.fsdecode(row[5])) for row in rows]

    def ends(self, identity: Identity) -> int:
        """How often a process ended while it worked on the file with this content."""
        statement = "SELECT times FROM ends WHERE dev=? AND ino=? AND size=? AND mtime_ns=? AND ctime_ns=?"
        row = self._run(lambda c: c.execute(statement, _key(identity)).fetchone(), None)
        return 0 if row is None else int(row[0])

    def set_ends(self, identity: Identity, times: int) -> None:
        key = _key(identity)
        if times:
            self._run(lambda c: c.execute("INSERT OR REPLACE INTO ends VALUES (?,?,?,?,?,?)", (*key, times)), None)
        else:
            self._run(lambda c: c.execute("DELETE FROM ends WHERE dev=? AND ino=?", key[:2]), None)

    def close(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _run(self, action: Callable[[sqlite3.Connection], _T], otherwise: _T) -> _T:
        with self._lock:
            try:
                with self._connection:
                    return action(self._connection)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.ProgrammingError):
                    return otherwise  # closed: the mount is going down
                _log.warning("catalog %s: %s; it is being rebuilt", self._path, error)
                if not isinstance(error, sqlite3.OperationalError):  # that is: locked or full, not broken
                    with contextlib.suppress(sqlite3.Error):
                        self._connection.close()
                    self._discard()
                    self._connection = self._open()
                return otherwise

    def _open(self) -> sqlite3.Connection:
        for attempt in (1, 2):
            try:
                return _connect(self._path)
            except sqlite3.Error as error:
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                    _log.warning("catalog %s: %s; until the next start it is in memory", self._path, error)
                    break  # the disk is full, or another process is at it: the database is not broken
                _log.warning("catalog %s: %s; beginning a new one", self._path, error)
                if attempt == 1:
                    self._discard()
        return _connect(":memory:")

    def _discard(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(self._path + suffix)


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, timeout=5.0)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # with WAL: a crash may lose the newest entries, nothing else
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("DROP TABLE IF EXISTS entries")
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute(_ENDS)
        connection.execute("SELECT count(*) FROM (SELECT 1 FROM entries LIMIT 1)").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _key(identity: Identity) -> tuple[int, int, int, int, int]:
    return (_signed(identity.dev), _signed(identity.ino), identity.size, identity.mtime_ns, identity.ctime_ns)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _unsigned(value: int) -> int:
    return value + (1 << 64) if value < 0 else value


def _entry(
    row: tuple[str, str, str, str, int, int, int, int, bytes, float | None, int, int, bytes, str, bytes],
) -> Entry:
    state, reason, message, kind, width, height, view_size, stored, sha256, score, scale, quality = row[:12]
    path, choice, reference = row[12:]
    return Entry(
        state=state,
        reason=reason,
        message=message,
        kind=kind,
        width=width,
        height=height,
        view_size=view_size,
        stored_bytes=stored,
        sha256_view=sha256,
        score=score,
        scale=scale,
        quality=quality,
        path=os.fsdecode(path),
        choice=choice,
        reference=reference,
    )
