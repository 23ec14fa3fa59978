"""System calls that Python's ``os`` offers only through a copy or a float: I/O at an address, raw timespecs."""

from __future__ import annotations

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)

_libc.pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong)
_libc.pread.restype = ctypes.c_ssize_t
_libc.pwrite.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong)
_libc.pwrite.restype = ctypes.c_ssize_t
_libc.utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_libc.futimens.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)

_AT_SYMLINK_NOFOLLOW = 0x100
_RWF_APPEND = 0x10
_unsupported = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class _Buffer(ctypes.Structure):
    """``struct iovec``"""

    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


_libc.pwritev2.argtypes = (ctypes.c_int, ctypes.POINTER(_Buffer), ctypes.c_int, ctypes.c_longlong, ctypes.c_int)
_libc.pwritev2.restype = ctypes.c_ssize_t


def _raise() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def pread_into(descriptor: int, address: int, size: int, offset: int) -> int:
    """Read up to ``size`` bytes at ``offset`` to memory at ``address``; the number read, 0 at the end."""
    count: int = _libc.pread(descriptor, address, size, offset)
    if count < 0:
        _raise()
    return count


def pwrite_from(descriptor: int, address: int, size: int, offset: int) -> int:
    """Write ``size`` bytes from memory at ``address``; the number written. Raises OSError."""
    count: int = _libc.pwrite(descriptor, address, size, offset)
    if count < 0:
        _raise()
    return count


def append_from(descriptor: int, address: int, size: int, offset: int) -> int:
    """Write ``size`` bytes from memory at ``address`` to the end of the file, wherever that is by now; at ``offset``
    where the store's filesystem can't say so. The number written. Raises OSError."""
    count: int = _libc.pwritev2(descriptor, ctypes.byref(_Buffer(address, size)), 1, offset, _RWF_APPEND)
    if count >= 0:
        return count
    if ctypes.get_errno() not in _unsupported:
        _raise()
    return pwrite_from(descriptor, address, size, offset)


def utimens_at(directory: int, name: str, timespecs: int | None) -> None:
    """utimensat(2) without following a symlink; ``timespecs`` is the address of two ``struct timespec`` as the caller
    gave them (UTIME_NOW and UTIME_OMIT included), or None for now. Raises OSError."""
    if _libc.utimensat(directory, os.fsencode(name), timespecs, _AT_SYMLINK_NOFOLLOW) != 0:
        _raise()


def futimens(descriptor: int, timespecs: int | None) -> None:
    """futimens(2); see :func:`utimens_at`. Raises OSError."""
    if _libc.futimens(descriptor, timespecs) != 0:
        _raise()


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its mode flags, which ``os.posix_fallocate`` lacks. Raises OSError."""
    if _libc.fallocate(descriptor, mode, offset, length) != 0:
        _raise()
