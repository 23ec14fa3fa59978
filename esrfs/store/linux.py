"""System calls that Python's ``os`` has no name for: openat2, renameat2, name_to_handle_at, syncfs, leases,
inode flags.

Each function raises OSError as ``os`` would; ENOSYS where libc or the kernel lacks the call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

_SYS_OPENAT2 = 437  # the same number on every architecture
_AT_EMPTY_PATH = 0x1000
_HANDLE_BYTES = 128  # MAX_HANDLE_SZ
_F_SETOWN_EX = 15
_F_OWNER_TID = 0
_PASSING = (errno.ENOMEM, errno.EIO, errno.EINTR)
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IMMUTABLE = 0x10
_FS_APPEND = 0x20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _HANDLE_BYTES),
    )


def _fail(name: str | bytes = "") -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), os.fsdecode(name)) if name else OSError(number, os.strerror(number))


def openat2(dir_fd: int, path: bytes, flags: int, mode: int, resolve: int) -> int:
    """Open ``path`` relative to ``dir_fd`` (close-on-exec); ``resolve`` is a sum of RESOLVE_* values."""
    how = _OpenHow((flags | os.O_CLOEXEC) & 0xFFFFFFFF, mode & 0o7777, resolve)
    fd: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(dir_fd),
        ctypes.c_char_p(path),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        raise _fail(path)
    return fd


def renameat2(from_dir: int, from_name: str, to_dir: int, to_name: str, flags: int) -> None:
    """renameat2(2). Raises OSError: EINVAL where the filesystem knows no such flag."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(from_dir, os.fsencode(from_name), to_dir, os.fsencode(to_name), ctypes.c_uint(flags)) != 0:
        raise _fail(from_name)


def file_handle(fd: int) -> str:
    """The kernel's lasting name for the inode behind ``fd`` (hex), which a reused inode number doesn't repeat.

    Empty where the filesystem gives none. Raises OSError where it can't be had just now.
    """
    call = getattr(_libc, "name_to_handle_at", None)
    if call is None:
        return ""
    handle = _FileHandle(_HANDLE_BYTES, 0)
    mount_id = ctypes.c_int()
    if call(fd, b"", ctypes.byref(handle), ctypes.byref(mount_id), _AT_EMPTY_PATH) != 0:
        if ctypes.get_errno() in _PASSING:
            raise _fail()
        return ""
    return f"{handle.handle_type & 0xFFFFFFFF:x}:{bytes(handle.f_handle[: handle.handle_bytes]).hex()}"


def set_immutable(fd: int, on: bool) -> None:
    """Set or clear the immutable flag (``chattr +i``) of an open file or directory. Needs CAP_LINUX_IMMUTABLE."""
    before = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, struct.pack("i", 0)))[0]
    after = before | _FS_IMMUTABLE if on else before & ~_FS_IMMUTABLE
    if after != before:
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", after))


def is_immutable(fd: int) -> bool:
    """Whether the immutable flag is set; False where the filesystem has no such flags."""
    return bool(_flags(fd) & _FS_IMMUTABLE)


def keeps_its_name(fd: int) -> bool:
    """Whether it is immutable or append-only: nobody can rename it, or put another file in its place."""
    return bool(_flags(fd) & (_FS_IMMUTABLE | _FS_APPEND))


def _flags(fd: int) -> int:
    try:
        flags: int = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, struct.pack("i", 0)))[0]
    except OSError:
        return 0
    return flags


def mount_id(fd: int) -> int:
    """Of the mount through which it was opened: no rename leads from one to another, be it of the same filesystem.
    Raises OSError."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), -1)


def reserve(fd: int, length: int) -> None:
    """Allocate room for ``length`` bytes from the start without changing the file's size (FALLOC_FL_KEEP_SIZE).

    Does nothing where the filesystem can't. Raises OSError: ENOSPC, EDQUOT.
    """
    if _libc.fallocate(fd, 1, ctypes.c_int64(0), ctypes.c_int64(length)) != 0 and ctypes.get_errno() in (
        errno.ENOSPC,
        errno.EDQUOT,
    ):
        raise _fail()


def syncfs(fd: int) -> None:
    """Have everything that was written to the filesystem of ``fd`` on disk. Raises OSError for what could not be
    written since ``fd`` was opened or last synced so, of whatever file."""
    if _libc.syncfs(fd) != 0:
        raise _fail()


class LeasesUnavailable(OSError):  # noqa: N818
    """The filesystem grants no leases, or not to this user."""


def ignore_lease_signals() -> None:
    """Make SIGIO harmless for the whole process; to be called from the main thread of an entry point.

    The kernel announces a broken lease by SIGIO, which by default kills. :func:`read_lease` already sends it to a
    thread that blocks it; this is the second fence.
    """
    signal.signal(signal.SIGIO, signal.SIG_IGN)


@contextmanager
def read_lease(fd: int) -> Iterator[Callable[[], bool]]:
    """Hold a read lease on ``fd``, which must have been opened O_RDONLY; the value is called to ask "is it broken?".

    While it is held, nobody has the file open for writing, and who wants to waits in open(2) or truncate(2) (for at
    most ``/proc/sys/fs/lease-break-time`` seconds) until the block ends.

    Raises BlockingIOError when somebody has the file open for writing, LeasesUnavailable where leases don't work.
    """
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
    try:
        # The announcement goes to this thread, where it is blocked: nothing else in the process can be killed by it.
        # Set before the lease, since F_SETLEASE names the process as owner only if there is none yet.
        try:
            fcntl.fcntl(fd, _F_SETOWN_EX, struct.pack("ii", _F_OWNER_TID, threading.get_native_id()))
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            raise
        except OSError as error:
            raise LeasesUnavailable(error.errno, f"no lease: {error.strerror}") from error

        def broken() -> bool:
            # While a break is pending, F_GETLEASE tells the type it is to become.
            return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK

        try:
            yield broken
        finally:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        while signal.SIGIO not in previous_mask and signal.sigtimedwait({signal.SIGIO}, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
