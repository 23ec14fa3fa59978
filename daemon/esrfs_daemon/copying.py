"""One file into the mount: content, metadata, fsync, and reading it back past the page cache.

The copy's descriptor stays open until its caller has done with the source: a mount never swaps a file that is open, so
what was verified is what lies there until then.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from esrfs import faults
from esrfs.store import linux, metadata
from esrfs.store.metadata import Metadata
from esrfs_daemon.throttle import Throttle

FAULT_POINTS = ("migrate.copying", "migrate.copied", "migrate.synced", "migrate.read_back")

_CHUNK = 1 << 20
_COMPARED = 64 << 20
"""Larger sources may have left the page cache by the time their copy is on disk; reading them twice could take long."""
_FOREIGN = (
    "security.selinux", "security.ima", "security.evm", "security.SMACK64", "trusted.", "system.nfs4_acl",
    "system.dos_attrib", "system.ntfs_", "system.cifs_", "user.esrfs.",
)  # fmt: skip
"""Attributes that belong to the filesystem or the machine a file lies on, by prefix; they are not carried."""


class Changed(Exception):  # noqa: N818 (a state, not an error)
    """The source changed while it was copied; it is worth another try later."""


class NotTheSame(Exception):  # noqa: N818
    """What was read back is not what was written: a disk or memory that fails. For people."""


@dataclass(frozen=True)
class Identity:
    """A source file as it was copied. Equal identities: nothing changed, as far as the kernel tells."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int

    @classmethod
    def of(cls, st: os.stat_result) -> Identity:
        return cls(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_mode)

    def is_same_content(self, other: Identity) -> bool:
        """Whatever the change time: it moves when another name of the file comes or goes."""
        return (self.dev, self.ino, self.size, self.mtime_ns) == (other.dev, other.ino, other.size, other.mtime_ns)


def open_source(directory: int, name: str) -> int:
    """A descriptor for reading that leaves the access time alone where that is allowed. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=directory)
    except PermissionError:
        return os.open(name, flags, dir_fd=directory)


def is_being_written(fd: int) -> bool:
    """Whether some program has this file (open O_RDONLY here) open for writing; False where nothing can tell."""
    try:
        with linux.read_lease(fd):
            return False
    except BlockingIOError:
        return True
    except linux.LeasesUnavailable:
        return False


def snapshot(fd: int) -> Metadata:
    """The metadata that a copy should have. Raises OSError."""
    found = metadata.snapshot(fd)
    carried = {name: value for name, value in found.xattrs.items() if not name.startswith(_FOREIGN)}
    return Metadata(found.mode, found.uid, found.gid, found.atime_ns, found.mtime_ns, carried)


def copy(source: int, target: int, st: os.stat_result, throttle: Throttle) -> bytes:
    """The content of ``source`` into the empty file ``target``; the sha256 of what was read.

    Raises Changed, Stopped, OSError. Nothing is durable yet.
    """
    faults.reach("migrate.copying")
    state = hashlib.sha256()
    position = 0
    buffer = memoryview(bytearray(min(_CHUNK, max(st.st_size, 1))))
    for begin, end in _data(source, st):
        _hash_hole(state, source, position, begin, buffer)
        position = begin
        if begin:
            os.lseek(target, begin, os.SEEK_SET)
        while position < end:
            count = os.preadv(source, [buffer[: end - position]], position)
            if not count:
                raise Changed
            throttle.take(count)
            state.update(buffer[:count])
            _write_all(target, buffer[:count])
            position += count
    _hash_hole(state, source, position, st.st_size, buffer)
    if position < st.st_size:
        os.ftruncate(target, st.st_size)
    faults.reach("migrate.copied")
    return state.digest()


def has_attributes(fd: int) -> bool:
    """Whether a new file has extended attributes already: what its folder gives it, an ACL for one. Raises OSError."""
    return bool(snapshot(fd).xattrs)


def read_ahead(fd: int) -> None:
    """Have the kernel begin to read a small file, so that the disk reads many at a time."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)


def give(target: int, wanted: Metadata, *, plain: bool = False) -> str | None:
    """Set the copy's metadata, and look: what of it the copy lacks, for people; None when nothing does. Raises OSError.

    ``plain``: the copy has no extended attributes. Each call goes through the mount, so the frequent case takes but
    one, whose answer tells the rest.
    """
    if plain and not wanted.xattrs:
        os.utime(target, ns=(wanted.atime_ns, wanted.mtime_ns))
        st = os.fstat(target)
        have = Metadata(stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_atime_ns, st.st_mtime_ns, {})
        if metadata.difference(wanted, have) is None:
            return None
    metadata.apply(target, wanted)
    return metadata.difference(wanted, snapshot(target))


def lacking(wanted: Metadata, have: Metadata, *, made: bool) -> str:
    """What of the source's metadata (``wanted``) a file in the destination lacks, for people; empty when nothing does.

    What the file has beyond that is no lack. ``made``: it was made of this very source, and so had all that it could
    take. Else somebody put it there with times and permissions of its own, which then hold; but no owner, attribute or
    ACL may be lost with the source.
    """
    xattrs = {name: value for name, value in have.xattrs.items() if name in wanted.xattrs}
    if made:
        return metadata.difference(wanted, replace(have, xattrs=xattrs)) or ""
    alike = replace(have, xattrs=xattrs, mode=wanted.mode, gid=wanted.gid, mtime_ns=wanted.mtime_ns)
    return metadata.difference(wanted, alike) or ""


def make_durable(fd: int) -> None:
    """Raises OSError, when the copy must not be believed."""
    os.fsync(fd)
    faults.reach("migrate.synced")


def digest_past_cache(fd: int, drop_below: Callable[[], None] = lambda: None) -> bytes:
    """The sha256 of a durable file as the disk has it: its pages are dropped first, those of the store's file too
    (``drop_below``). Raises OSError."""
    drop_pages(fd)
    drop_below()
    return digest(fd)


def digest(fd: int) -> bytes:
    """The sha256 of a file. Raises OSError."""
    faults.reach("migrate.read_back")
    with open(fd, "rb", buffering=0, closefd=False) as file:
        os.lseek(fd, 0, os.SEEK_SET)
        return hashlib.file_digest(file, "sha256").digest()


def is_copy(source: int, target: int, size: int, sha256: bytes) -> bool:
    """Whether ``target`` holds what ``copy`` read from ``source``: ``size`` bytes with this sha256. Raises OSError.

    Up to ``_COMPARED`` bytes the source is read once more, and byte is compared with byte. It says more than a sum (a
    source that reads differently the second time is found, too), and takes a tenth of the time as long as the kernel
    still has the source's pages.
    """
    if size > _COMPARED:
        return digest(target) == sha256
    faults.reach("migrate.read_back")
    chunk = min(_CHUNK, size + 1)
    position = 0
    while True:
        found = os.pread(target, chunk, position)
        if found != os.pread(source, chunk, position):
            return False
        position += len(found)
        if not found or (position == size and len(found) < chunk):  # one byte more was asked for, and there is none
            return position == size


def drop_pages(fd: int) -> None:
    """Let the kernel forget the clean pages of a file, so that the next read comes from below."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _data(fd: int, st: os.stat_result) -> Iterator[tuple[int, int]]:
    """Where the file has data; a file without holes is one piece."""
    if st.st_blocks * 512 >= st.st_size:
        yield 0, st.st_size
        return
    position = 0
    while position < st.st_size:
        try:
            begin = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # a hole up to the end
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                yield position, st.st_size
                return
            raise
        end = min(os.lseek(fd, begin, os.SEEK_HOLE), st.st_size)
        yield begin, end
        position = end


def _hash_hole(state: hashlib._Hash, source: int, begin: int, end: int, buffer: memoryview) -> None:
    """What is read where the filesystem says that nothing is. It should be zeros; a filesystem that is wrong about it
    is found out when the copy is read back. Raises Changed, OSError."""
    while begin < end:
        count = os.preadv(source, [buffer[: end - begin]], begin)
        if not count:
            raise Changed
        state.update(buffer[:count])
        begin += count


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def is_regular(st: os.stat_result) -> bool:
    return stat.S_ISREG(st.st_mode)
