"""Files on their way to a name: ``staging/HOST/SESSION.KIND.RANDOM``, mode 0600 until they get their owner's metadata.

The session in a name tells whose it is: a live process's files are nobody else's business. What lies in staging is one
of

* a file that its own process made and that never had a name in the view: removed by :func:`discard`, or by recovery;
* for a second, what a program deleted or replaced while it was open (see ``vfs/removed.py``);
* after an exchange, what the exchange brought out. That may be the only copy of somebody's data: it leaves staging by a
  rename only (into ``originals/``, or back to its name).

So removal is always conditional: only the very inode that was made here, unchanged, and open for writing nowhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from dataclasses import dataclass
from typing import Literal

from esrfs.store import linux, metadata
from esrfs.store.layout import Store
from esrfs.store.ledger import FileMark, Found

Kind = Literal["blob", "plain", "removed"]
KINDS: tuple[Kind, ...] = ("blob", "plain", "removed")
FOUND_PREFIX = "found-"
_LONGEST_NAME = 255
_OF_THE_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EXDEV, errno.ENXIO, errno.ENODEV,
    errno.EACCES, errno.EPERM,
)  # fmt: skip
_RDWR = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def create(store: Store, kind: Kind) -> tuple[int, str]:
    """A new empty file: ``(descriptor O_RDWR, name in store.staging_fd)``. Raises OSError, StoreError (read-only)."""
    name = _new_name(store, kind)
    return os.open(name, _RDWR, 0o600, dir_fd=store.staging_fd), name


def _new_name(store: Store, kind: Kind) -> str:
    session = store.session if store.ledger is not None else ""  # the ledger must exist first: it says whose this is
    return f"{session}.{kind}.{secrets.token_hex(8)}"


def take_in(store: Store, directory: int, name: str) -> str:
    """Take a file's name away: it lies in staging then, by the name that is returned. Raises OSError, StoreError."""
    staged = _new_name(store, "removed")
    os.rename(name, staged, src_dir_fd=directory, dst_dir_fd=store.staging_fd)
    return staged


def create_unnamed(store: Store) -> int:
    """A new empty file without a name, O_RDWR: it is gone with its last descriptor. Raises OSError."""
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=store.staging_fd)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, name = create(store, "plain")
    os.unlink(name, dir_fd=store.staging_fd)
    return fd


@dataclass(frozen=True)
class Staged:
    name: str
    session: str
    kind: str
    """One of KINDS, or empty for a name that esrfs would not give."""

    @property
    def can_be_put_aside(self) -> bool:
        """Whether the ledger, which is JSON, can tell the name, and ``originals/`` has room for the longer one."""
        try:
            return len(_name_aside(self.name).encode()) <= _LONGEST_NAME
        except UnicodeEncodeError:
            return False


def entries(store: Store) -> list[Staged]:
    """What lies in this host's staging directory, of all sessions."""
    found = []
    for name in sorted(os.listdir(store.staging_fd)):
        session, kind, random = (*name.split("."), "", "")[:3]
        ours = name.isascii() and name.count(".") == 2 and kind in KINDS and len(session) == 8 and len(random) == 16
        found.append(Staged(name, session, kind) if ours else Staged(name, "", ""))
    return found


def remove(store: Store, name: str) -> None:
    """Unlink a staging file that was never exchanged; no error when it is gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=store.staging_fd)


def discard(store: Store, name: str, known: FileMark, *, guarded: bool = True) -> str | None:
    """Remove a file that esrfs made and that had a name in the view for a moment, if nobody changed it meanwhile.

    ``guarded``: also not while a program has it open for writing; False where that program is this one.
    Returns None when it is gone; else the name in ``originals/`` under which it was put aside. Raises OSError; also
    where it can't be told just now whether it is that file: then it stays, to be asked again later.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=store.staging_fd)
    except FileNotFoundError:
        return None
    except PermissionError:
        st = os.stat(name, dir_fd=store.staging_fd, follow_symlinks=False)  # a mode that forbids its owner to read
        if (st.st_ino, st.st_size, st.st_mtime_ns) != (known.ino, known.size, known.mtime_ns):
            return put_aside(store, name, "it was changed while it was being withdrawn")
        remove(store, name)
        return None
    except OSError as error:
        if not tells_of_file(error):
            raise
        return put_aside(store, name, "it is not the file that esrfs put there")
    try:
        if not (metadata.same_inode(fd, known) and metadata.same_content(fd, known)):
            return put_aside(store, name, "it was changed while it was being withdrawn")
        if not guarded:
            os.unlink(name, dir_fd=store.staging_fd)
            return None
        try:
            with linux.read_lease(fd):
                os.unlink(name, dir_fd=store.staging_fd)
        except BlockingIOError:
            return put_aside(store, name, "a program has it open for writing")
        except linux.LeasesUnavailable:
            os.unlink(name, dir_fd=store.staging_fd)
    finally:
        os.close(fd)
    return None


def put_aside(store: Store, name: str, why: str) -> str:
    """Move something that must not be lost from staging to ``originals/found-…``, where it is never purged.

    Returns its new name; the ledger and recovery's report tell of it. Raises OSError.
    """
    aside = _name_aside(name)
    os.rename(name, aside, src_dir_fd=store.staging_fd, dst_dir_fd=store.originals_fd)
    os.fsync(store.originals_fd)
    os.fsync(store.staging_fd)
    with contextlib.suppress(OSError):
        store.ledger.append(Found(name=aside, why=why))
    return aside


def _name_aside(name: str) -> str:
    return f"{FOUND_PREFIX}{secrets.token_hex(4)}-{name}"


def tells_of_file(error: OSError) -> bool:
    """Whether an open that failed says something of what has the name: gone, no file, not for this user. Else it says
    only how things stand at the moment (no descriptor or memory left, a disk or a server that fails), and nothing may
    be concluded from it."""
    return error.errno in _OF_THE_FILE


def look(directory: int, name: str) -> os.stat_result | None:
    """lstat, or None when there is no such name."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_file(st: os.stat_result | None) -> bool:
    return st is not None and stat.S_ISREG(st.st_mode)
