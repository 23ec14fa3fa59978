"""Whose is what a program creates, and with which permissions."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from esrfs.vfs.directories import Directory
from esrfs.vfs.shared import Shared


class Caller(NamedTuple):
    """Who asks, for what is created."""

    uid: int
    gid: int
    umask: int


def permissions(directory: Directory, mode: int, caller: Caller) -> int:
    """``mode`` less the umask, which does not count where the parent has a default ACL (the store applies that)."""
    return mode if directory.has_default_acl() else mode & ~caller.umask


def give(shared: Shared, directory: int, name: str, mode: int, caller: Caller) -> None:
    """A mount run by root creates in the caller's name; the group stays where the parent's set-group-id bit gave it."""
    if not shared.gives_away or (caller.uid == 0 and caller.gid == 0):
        return
    inherits = os.fstat(directory).st_mode & stat.S_ISGID
    set_ids = mode & (stat.S_ISUID | stat.S_ISGID)  # chown clears them
    created = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode if set_ids else 0
    os.chown(name, caller.uid, -1 if inherits else caller.gid, dir_fd=directory, follow_symlinks=False)
    if set_ids:
        chmod(directory, name, stat.S_IMODE(created))


def chmod(directory: int, name: str, mode: int) -> None:
    """chmod(2) that follows no symlink, should one have come by this name: fchmodat can't promise that."""
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.chmod(f"/proc/self/fd/{descriptor}", mode)
    finally:
        os.close(descriptor)
