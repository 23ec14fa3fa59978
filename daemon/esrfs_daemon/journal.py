"""What was migrated, from where, to where, and how it was verified: the one record that a crash must not lose.

SQLite in WAL mode, synchronous=FULL: a commit that returned survives a power failure. One row for each migration of one
name; a name that is migrated again gets a new row. Paths are BLOBs: file names are bytes.

``state`` of a row, in order:

``begun``     a copy is being made in the destination's folder as ``.esrfs-TOKEN.part``; the source is untouched
``verified``  the copy lies at ``dest``, durable, and was read back equal to ``sha256``; the source may be in the middle
              of being touched: then it lies beside its name as ``.esrfs-TOKEN.taken``
``done``      nothing is left to do for this row
``left``      as ``done``, but the source could not be touched as asked; ``note`` says why
``undoing``   the source is as it was, durably; its copy is leaving the destination, or has left it. It counts as never
              migrated from here on
``undone``    ``--undo`` has put it back; nothing is left to do

``made`` is 1 where this migration made ``dest`` (0: it was there with the same content). ``verified_by``: ``read back``
(the copy's bytes, past the page cache, were equal), ``was there`` (the same, of a file that lay there), ``undo
window`` (it lay there, compacted; the store has its original, by sha256). A ``directory`` row keeps what the folder's
metadata was in ``metadata`` (JSON), to be applied when its content has come (then ``done``).

A journal that is damaged is put aside and a new one begun: nothing is lost by that but ``--undo`` of what it knew, as
files that lie in the destination already are recognised by their content.

What can't be written (a full disk, say) is a JournalError, and leaves no half transaction: the connection is given up,
and the next use opens another. Whoever writes a row before a destructive step needs only not to catch it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from esrfs_daemon.report import FULL

log = logging.getLogger("esrfs.daemon")

VERSION = 1
INTERRUPTED = "interrupted"
"""Begins a note: worth another try, whenever the file is seen."""
State = Literal["begun", "verified", "done", "left", "undoing", "undone"]
_TAKEN_BACK = ("undoing", "undone")
Kind = Literal["file", "symlink", "directory"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS migrations (
    id INTEGER PRIMARY KEY,
    source_root BLOB NOT NULL, dest_root BLOB NOT NULL, store TEXT NOT NULL,
    source BLOB NOT NULL, dest BLOB NOT NULL,
    kind TEXT NOT NULL, state TEXT NOT NULL, wanted TEXT NOT NULL, token TEXT NOT NULL, made INTEGER NOT NULL,
    ino INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    sha256 BLOB NOT NULL, verified_by TEXT NOT NULL, note TEXT NOT NULL, metadata BLOB NOT NULL, at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_source ON migrations (source_root, source);
CREATE INDEX IF NOT EXISTS by_inode ON migrations (source_root, ino) WHERE kind = 'file';
CREATE INDEX IF NOT EXISTS unfinished ON migrations (source_root, state) WHERE state IN ('begun', 'verified');
"""


_ROOM = 1 << 20
"""Bytes; some thousand rows."""


class JournalError(Exception):
    """For people: what is wrong with the journal, and what to do. What it does not know was not done."""


class Busy(Exception):  # noqa: N818 (a state, not an error)
    """Another process migrates this source."""


class Row(msgspec.Struct, kw_only=True):
    """One row; paths are text (surrogateescape), relative to the roots."""

    id: int = 0
    """0 until it is written."""
    source_root: str
    dest_root: str
    store: str
    """Id of the destination's store; empty where it can't be known."""
    source: str
    dest: str
    kind: Kind
    state: State
    wanted: str
    """What was to become of the source (``config.Then``)."""
    token: str = ""
    made: bool = True
    ino: int = 0
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    sha256: bytes = b""
    """Of the content; of a symlink's target."""
    verified_by: str = ""
    note: str = ""
    metadata: bytes = b""
    at: float = 0.0


_COLUMNS = [field for field in Row.__struct_fields__ if field != "id"]
_PATHS = {"source_root", "dest_root", "source", "dest"}
_INSERT = f"INSERT INTO migrations ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' for _ in _COLUMNS)})"
_THIS = "WHERE id = ? AND source_root = ? AND source = ? AND dest_root = ? AND token = ?"
"""An id alone may be another row's by now: of a new journal, after this one was damaged and put aside."""
_UPDATE = f"UPDATE migrations SET {', '.join(f'{name} = ?' for name in _COLUMNS)} {_THIS}"
_SELECT = f"SELECT id, {', '.join(_COLUMNS)} FROM migrations"


def default_path() -> Path:
    """``$XDG_STATE_HOME/esrfs/migration.db``."""
    return platformdirs.user_state_path("esrfs") / "migration.db"


class Journal:
    """Open journal; ``_lock`` lets several threads use the one connection. Close it. Whatever uses it may raise
    JournalError."""

    def __init__(self, path: Path | None = None, *, at_once: bool = True) -> None:
        """``at_once``: raise JournalError now for a journal of a newer version, or one that can't be opened; else its
        first use does."""
        self.path = default_path() if path is None else path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        if at_once:
            with self._using():
                pass

    @contextlib.contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._opened()
                yield self._connection
            except (OSError, sqlite3.Error) as error:
                self._drop()
                raise self._failure(error) from error

    def _opened(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self._put_aside(error)
            return self._open()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _failure(self, error: OSError | sqlite3.Error) -> JournalError:
        if self._is_full(error):
            why, advice = "its disk is full", "Make room there"
        elif type(error) is sqlite3.DatabaseError:
            why, advice = f"it is damaged: {error}", "The next try puts it aside and begins a new one"
        else:
            why, advice = str(error), "See that it can be written: its permissions, its disk, your quota"
        return JournalError(
            f"{self.path}: the journal of migrated files can't be used ({why}). Nothing is done without it, and no "
            f"file is lost. {advice}"
        )

    def _is_full(self, error: OSError | sqlite3.Error) -> bool:
        """SQLite says so only of its own files' pages; where it is a lock's or an index' turn, it is an I/O error."""
        if isinstance(error, OSError):
            return error.errno in FULL
        if not isinstance(error, sqlite3.OperationalError):
            return False
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            return True
        try:
            space = os.statvfs(self.path.parent)
        except OSError:
            return False
        return space.f_bavail * space.f_frsize < 1 << 16

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60.0, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise JournalError(
                    f"{self.path}: of a newer version of esrfs ({version}); nothing was done. Install and start that"
                )
            if (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
            if version < VERSION:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
            os.chmod(self.path, 0o600)
        except BaseException:
            connection.close()
            raise
        return connection

    def _put_aside(self, error: sqlite3.Error) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        os.rename(self.path, aside)
        log.warning(
            "%s is damaged (%s). It was put aside as %s and a new journal begun: files are safe, what was copied is "
            "recognised by its content, but what the old journal knew can't be undone by --undo.",
            self.path,
            error,
            aside.name,
        )

    def close(self) -> None:
        with self._lock:
            self._drop()

    def make_room(self) -> None:
        """Where work would be done in vain without it: have room for some thousand rows, which is the journal's then.
        Raises JournalError.

        A row alone might still be written where the ones after it can't."""
        with self._using() as connection:
            connection.execute(f"CREATE TABLE IF NOT EXISTS room AS SELECT zeroblob({_ROOM}) AS bytes")
            connection.execute("DROP TABLE room")

    def write(self, rows: Sequence[Row], forget: Sequence[Row] = ()) -> None:
        """Insert rows without an id (they get one), update the others, drop those to ``forget``; one transaction,
        durable on return. Raises JournalError: then nothing of it was written."""
        if not rows and not forget:
            return
        before = [row.id for row in rows]
        try:
            with self._transaction() as connection:
                for row in rows:
                    row.at = row.at or time.time()
                    if row.id and connection.execute(_UPDATE, (*_values(row), *_this(row))).rowcount:
                        continue
                    row.id = connection.execute(_INSERT, _values(row)).lastrowid or 0
                connection.executemany(f"DELETE FROM migrations {_THIS}", [_this(row) for row in forget])
        except BaseException:
            for row, number in zip(rows, before, strict=True):
                row.id = number  # the next row that is written gets the new one's
            raise

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._using() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # after some errors SQLite has ended it already
                    connection.execute("ROLLBACK")
                raise

    def latest(self, source_root: str, source: str, dest_root: str) -> Row | None:
        """The newest row of this name and destination, unless it was, or is being, undone."""
        found = self._select(
            "WHERE source_root = ? AND source = ? AND dest_root = ? ORDER BY id DESC LIMIT 1",
            (source_root, source, dest_root),
        )
        return found[0] if found and found[0].state not in _TAKEN_BACK else None

    def earlier(self, source_root: str, source: str, dest_root: str, before: int) -> Row | None:
        """The newest row of this name older than row ``before``, whatever its state."""
        found = self._select(
            "WHERE source_root = ? AND source = ? AND dest_root = ? AND id < ? ORDER BY id DESC LIMIT 1",
            (source_root, source, dest_root, before),
        )
        return found[0] if found else None

    def of_inode(self, source_root: str, dest_root: str, ino: int) -> list[Row]:
        """Rows of other names of the same file, perhaps; newest first. Compare before you believe it."""
        return self._select(
            "WHERE source_root = ? AND ino = ? AND dest_root = ? AND kind = 'file' "
            "AND state IN ('verified', 'done', 'left') ORDER BY id DESC LIMIT 4",
            (source_root, ino, dest_root),
        )

    def unfinished(self, source_root: str) -> list[Row]:
        """Rows that a crash has left ``begun`` or ``verified``, in their order, for every destination."""
        return self._select("WHERE source_root = ? AND state IN ('begun', 'verified') ORDER BY id", (source_root,))

    def to_undo(self, source_root: str, dest_root: str) -> list[Row]:
        """Everything that a migration did and that was not undone, or not to the end; the newest first."""
        return self._select(
            "WHERE source_root = ? AND dest_root = ? AND state IN ('verified', 'done', 'left', 'undoing') "
            "ORDER BY id DESC",
            (source_root, dest_root),
        )

    def _select(self, where: str, arguments: Sequence[str | int]) -> list[Row]:
        encoded = [os.fsencode(value) if isinstance(value, str) else value for value in arguments]
        with self._using() as connection:
            found = connection.execute(f"{_SELECT} {where}", encoded).fetchall()
        rows = []
        for number, *values in found:
            named = dict(zip(_COLUMNS, values, strict=True))
            named.update({name: os.fsdecode(named[name]) for name in _PATHS})
            rows.append(Row(id=number, **{**named, "made": bool(named["made"])}))
        return rows

    @contextlib.contextmanager
    def holding(self, source_root: str) -> Iterator[None]:
        """Be the only process that migrates this source, as long as the block runs. Raises Busy, JournalError."""
        name = hashlib.blake2s(os.fsencode(source_root), digest_size=12).hexdigest()
        directory = self.path.parent / f"{self.path.name}.locks"
        try:
            with self._lock:
                if not self.path.exists():
                    self._drop()  # deleted meanwhile: what is written into it would be gone with its last reader
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failure(error) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"{source_root} is being migrated by another process; nothing was done") from None
            yield
        finally:
            os.close(fd)


def _values(row: Row) -> list[str | int | float | bytes]:
    return [os.fsencode(getattr(row, name)) if name in _PATHS else getattr(row, name) for name in _COLUMNS]


def _this(row: Row) -> tuple[int | str | bytes, ...]:
    return row.id, os.fsencode(row.source_root), os.fsencode(row.source), os.fsencode(row.dest_root), row.token
