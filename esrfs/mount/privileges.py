"""What the mount's process may do, and what it tells the service manager.

A mount run by root keeps the capabilities that a file system needs and gives the others up, for itself and for the
engine, before it looks at anybody's file.
"""

from __future__ import annotations

import ctypes
import os
import socket

_libc = ctypes.CDLL(None, use_errno=True)

_KEPT = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "DAC_READ_SEARCH": 2,
    "FOWNER": 3,
    "FSETID": 4,
    "KILL": 5,  # of its own engine, which may have other ids in a user namespace
    "LINUX_IMMUTABLE": 9,  # the mountpoint
    "SYS_ADMIN": 21,  # mount, umount, trusted.* attributes
    "SYS_NICE": 23,  # the engine's compaction threads go back to normal when a reader waits
    "MKNOD": 27,
    "LEASE": 28,
    "SETFCAP": 31,
}
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = "/proc/sys/kernel/cap_last_cap"


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def drop_capabilities() -> None:
    """Keep only what a file system needs. To be called before other threads exist; nothing happens unless root calls.

    Raises OSError.
    """
    if os.geteuid() != 0:
        return
    with open(_LAST_CAPABILITY, encoding="ascii") as file:
        last = int(file.read())
    for number in set(range(last + 1)) - set(_KEPT.values()):
        _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # fails where it is not there: as good as dropped
    header = _Header(_CAPABILITY_VERSION_3, 0)
    data = (_Data * 2)()
    if _libc.capget(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "the process's capabilities can't be read")
    for word in range(2):
        mask = sum(1 << (number - 32 * word) for number in _KEPT.values() if number // 32 == word)
        data[word].permitted &= mask
        data[word].effective &= mask
        data[word].inheritable = 0
    if _libc.capset(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capabilities can't be given up")


def notify_service_manager(message: str) -> None:
    """sd_notify(3): ``READY=1``, ``STOPPING=1``, ``STATUS=…``; nothing happens outside systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.connect("\0" + address[1:] if address.startswith("@") else address)
            connection.send(message.encode())
        except OSError:
            return  # the manager went away: nobody to tell
