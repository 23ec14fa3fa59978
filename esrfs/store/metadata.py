"""Everything about a file but its content and its names: mode, owner, times, extended attributes (ACLs are some)."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from esrfs.store import linux
from esrfs.store.ledger import FileMark

CONTENT_BOUND = ("security.ima", "security.evm")
"""Signatures over the content: they can't be carried to a file with other bytes, which the kernel might then refuse."""

_NO_XATTRS = (errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Metadata:
    mode: int
    """Permission bits, set-id and sticky bits: 0 to 0o7777."""
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: dict[str, bytes]
    """Of all namespaces that this process may see."""


def snapshot(fd: int) -> Metadata:
    """Read from an open file. Raises OSError."""
    st = os.fstat(fd)
    xattrs: dict[str, bytes] = {}
    try:
        for name in os.listxattr(fd):
            xattrs[name] = os.getxattr(fd, name)
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise
    return Metadata(stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_atime_ns, st.st_mtime_ns, xattrs)


def apply(fd: int, wanted: Metadata) -> None:
    """Give an open file ``wanted``, as far as the kernel lets; compare afterwards to know how far.

    The order matters: chown clears set-id bits, chmod rewrites the ACL's mask, and everything but utimens sets ctime
    only. Nothing is set that is so already, hence an unprivileged owner needs no privilege. Raises OSError for trouble
    other than "not permitted" or "not supported", notably ENOSPC (xattrs need room).
    """
    have = snapshot(fd)
    tolerated = (errno.EPERM, errno.EACCES, *_NO_XATTRS)
    if (have.uid, have.gid) != (wanted.uid, wanted.gid):
        with _tolerated((*tolerated, errno.EINVAL)):  # EINVAL: an id outside this user namespace
            os.fchown(fd, wanted.uid, wanted.gid)
    os.fchmod(fd, wanted.mode)
    for name in have.xattrs.keys() - wanted.xattrs.keys():
        with _tolerated(tolerated):
            os.removexattr(fd, name)
    for name, value in wanted.xattrs.items():
        if have.xattrs.get(name) != value:
            with _tolerated(tolerated):
                os.setxattr(fd, name, value)
    os.utime(fd, ns=(wanted.atime_ns, wanted.mtime_ns))


@contextmanager
def _tolerated(errnos: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in errnos:
            raise


def difference(wanted: Metadata, have: Metadata) -> str | None:
    """What of ``wanted`` a file lacks, for people; None when nothing does. Access times don't count."""
    parts = []
    if (wanted.uid, wanted.gid) != (have.uid, have.gid):
        parts.append(f"owner {have.uid}:{have.gid} instead of {wanted.uid}:{wanted.gid}")
    if wanted.mode != have.mode:
        parts.append(f"mode {have.mode:04o} instead of {wanted.mode:04o}")
    if wanted.mtime_ns != have.mtime_ns:
        parts.append(f"mtime {have.mtime_ns} instead of {wanted.mtime_ns} ns")
    names = sorted(
        name for name in wanted.xattrs.keys() | have.xattrs.keys() if wanted.xattrs.get(name) != have.xattrs.get(name)
    )
    if names:
        parts.append("other extended attributes: " + ", ".join(names))
    return "; ".join(parts) or None


def not_carriable(wanted: Metadata) -> str | None:
    """Why a blob could not bear this metadata, for people; None when it can."""
    bound = [name for name in CONTENT_BOUND if name in wanted.xattrs]
    return f"{', '.join(bound)} signs the file's content" if bound else None


def mark(fd: int) -> FileMark:
    """The file as the ledger records it."""
    st = os.fstat(fd)
    return FileMark(
        ino=st.st_ino,
        handle=linux.file_handle(fd),
        size=st.st_size,
        mtime_ns=st.st_mtime_ns,
        metadata=digest(snapshot(fd)),
    )


def digest(metadata: Metadata) -> str:
    """Of mode, owner and xattrs: equal for equal metadata, whatever the times."""
    state = hashlib.blake2s(f"{metadata.mode} {metadata.uid} {metadata.gid}".encode(), digest_size=16)
    for name, value in sorted(metadata.xattrs.items()):
        state.update(os.fsencode(name) + b"\0" + len(value).to_bytes(4, "big") + value)
    return state.hexdigest()


def same_inode(fd: int, known: FileMark) -> bool:
    """Whether ``fd`` is the inode that was marked, and not one that got its number since."""
    return os.fstat(fd).st_ino == known.ino and linux.file_handle(fd) == known.handle


def same_content(fd: int, known: FileMark) -> bool:
    """As far as size and mtime tell."""
    st = os.fstat(fd)
    return (st.st_size, st.st_mtime_ns) == (known.size, known.mtime_ns)
