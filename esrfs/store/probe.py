"""What can this filesystem do? Found out by doing it, on files in a directory of the store's own."""

from __future__ import annotations

import contextlib
import os
import secrets

from esrfs.store import exchange, ledger, linux
from esrfs.store.layout import Probe


def probe(directory: int) -> Probe:
    """Try everything that the store relies on in ``directory`` (a descriptor; writable), and leave nothing behind.

    Raises OSError if files can't even be created there.
    """
    stem = f"probe-{secrets.token_hex(4)}"
    names = (f"{stem}-a", f"{stem}-b", f"{stem}-c")
    try:
        for name in names[:2]:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
            os.write(fd, name.encode())
            os.close(fd)
        fd = os.open(names[0], os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            return Probe(
                leases=_leases(fd),
                xattrs=_xattrs(fd),
                locks=_locks(directory, names[0], fd),
                fsync=_fsync(fd, directory),
                exchange=_exchange(directory, *names[:2]),
                links=_links(directory, *names[1:]),
            )
        finally:
            os.close(fd)
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)


def _leases(fd: int) -> bool:
    try:
        with linux.read_lease(fd) as broken:
            return not broken()
    except OSError:
        return False


def _xattrs(fd: int) -> bool:
    try:
        os.setxattr(fd, "user.esrfs.probe", b"1")
        return os.getxattr(fd, "user.esrfs.probe") == b"1"
    except OSError:
        return False


def _locks(directory: int, name: str, fd: int) -> bool:
    """Whether a flock keeps out another open of the same file."""
    other = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not ledger.lock(fd):
            return False
        try:
            return not ledger.lock(other)
        except BlockingIOError:
            return True
    except OSError:
        return False
    finally:
        os.close(other)


def _fsync(fd: int, directory: int) -> bool:
    try:
        os.fsync(fd)
        os.fsync(directory)
    except OSError:
        return False
    return True


def _exchange(directory: int, first: str, second: str) -> bool:
    def inodes() -> tuple[int, int]:
        return (
            os.stat(first, dir_fd=directory, follow_symlinks=False).st_ino,
            os.stat(second, dir_fd=directory, follow_symlinks=False).st_ino,
        )

    before = inodes()
    try:
        exchange.exchange(directory, first, directory, second)
    except OSError:
        return False
    # Looked at, not believed: a FUSE filesystem was seen to drop the flag, answer 0 and destroy the target.
    try:
        return inodes() == before[::-1]
    except FileNotFoundError:
        return False


def _links(directory: int, name: str, second: str) -> bool:
    try:
        os.link(name, second, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        return False
    return True
