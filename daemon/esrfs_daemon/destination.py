"""Reaching a folder in a mount of esrfs, and being sure that it is one.

An unmounted mountpoint is an ordinary folder: whoever fills it fills the wrong disk and finds the files hidden by the
next mount. So everything is done relative to one descriptor, which the kernel's mount table says lies in an
esrfs. If the mount ends meanwhile, the descriptor fails; it never leads to what lies below.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from esrfs import control
from esrfs.store import layout
from esrfs.store.beneath import beneath
from esrfs.store.errors import StoreError
from esrfs_daemon.asking import NoAnswer, open_folder, within_time

_KIND = "fuse.esrfs"


class NotMounted(Exception):  # noqa: N818 (a state, not an error)
    """The destination is no mount that answers; for people."""


@dataclass(frozen=True)
class Destination:
    """A folder in a mount, open. :func:`opened` makes one."""

    path: str
    """Absolute, symlinks resolved."""
    fd: int
    """O_RDONLY, of the folder. (Of what exists above it, if it was to be looked for only and is missing.)"""
    mountpoint: str
    store: str
    """Path of the store's directory, as the mount table names it."""
    relative: str
    """Of the folder, in the store and its view; empty for the root."""
    store_id: str
    """Empty where this user can't read the store."""
    backing_fd: int
    """Of the same folder in the store's directory, or -1: to drop pages of what was written from the cache there, too.
    Nothing is ever read or written through it."""

    def control_socket(self) -> Path | None:
        """Of the mount; None where it doesn't answer this user."""
        if not self.store_id:
            return None
        return control.find(self.store_id, self.mountpoint) or control.find(self.store_id)


@contextlib.contextmanager
def opened(path: str, *, create: bool = True) -> Iterator[Destination]:
    """The folder at ``path``, made if it is missing (inside the mount only). Raises NotMounted, OSError.

    Without ``create`` nothing is made: for a look at what a migration would do.
    """
    path = os.path.abspath(path)
    try:
        fd, above = within_time(path, lambda: _open_existing(path), lambda found: os.close(found[0]))
    except NoAnswer as error:
        raise NotMounted(str(error)) from None
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            raise NotMounted(f"{path}: the mount there does not answer ({error.strerror}); mount it anew") from error
        raise
    backing = -1
    try:
        mount = _mount_of(fd)
        if mount is None:
            raise NotMounted(
                f"{path} is not in a mounted esrfs, so nothing is written there. Mount the store first: "
                "esrfs mount STORE DIRECTORY"
            )
        root, source, mountpoint = mount
        missing = os.path.relpath(path, above) if path != above else ""
        if missing and create:
            deeper = make_folders(fd, missing, mode=0o777)
            os.close(fd)
            fd = deeper
        path = os.path.realpath(path)
        within = os.path.relpath(path, mountpoint)
        relative = os.path.normpath(os.path.join(root.strip("/"), within)).strip("/")
        relative = "" if relative == "." else relative
        backing = _backing(source, relative)
        yield Destination(path, fd, mountpoint, source, relative, _store_id(source), backing)
    finally:
        os.close(fd)
        if backing >= 0:
            os.close(backing)


def make_folders(
    root_fd: int, relative: str, made: Callable[[str], None] = lambda path: None, *, mode: int = 0o700
) -> int:
    """A descriptor (O_RDONLY) of the folder ``relative`` beneath ``root_fd``, made with ``mode`` where it is missing.

    ``made`` is told each folder that had to be made (before anything is in it). Raises OSError: ENOTDIR or ELOOP where
    something else has the name.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY
    with contextlib.suppress(FileNotFoundError):
        return beneath(root_fd, relative, flags)
    at = os.dup(root_fd)
    path = ""
    try:
        for name in relative.split("/"):
            path = f"{path}/{name}" if path else name
            try:
                deeper = beneath(at, name, flags)
            except FileNotFoundError:
                try:
                    os.mkdir(name, mode, dir_fd=at)
                except FileExistsError:
                    pass  # somebody was faster
                else:
                    made(path)
                deeper = beneath(at, name, flags)
            os.close(at)
            at = deeper
    except BaseException:
        os.close(at)
        raise
    return at


def lies_in_view(fd: int) -> str | None:
    """The mountpoint of the esrfs that an open file or folder lies in; None if it is in none."""
    mount = _mount_of(fd)
    return None if mount is None else mount[2]


def views_below(folder: str) -> set[str]:
    """Mountpoints of esrfs at and below ``folder`` (its real path), relative to it. The mount table tells: no mount is
    asked, so one that hangs is named like any other. Raises OSError."""
    prefix = folder.rstrip("/") + "/"
    return {
        mountpoint[len(prefix) :]
        for _number, _root, mountpoint, kind, _source in _mount_table()
        if kind == _KIND and f"{mountpoint}/".startswith(prefix)
    }


def filesystem_type(fd: int) -> str:
    """As the mount table names it: ``ext4``, ``nfs4`` …; empty if it does not."""
    for number, _root, _mountpoint, kind, _source in _mount_table():
        if number == _mount_id(fd):
            return kind
    return ""


def _open_existing(path: str) -> tuple[int, str]:
    """A descriptor of the deepest folder that exists at or above ``path``, and which that is."""
    at = path
    while True:
        try:
            return open_folder(at), at
        except FileNotFoundError:
            at = os.path.dirname(at)


def _mount_of(fd: int) -> tuple[str, str, str] | None:
    """``(root, source, mountpoint)`` of the esrfs that ``fd`` lies in."""
    wanted = _mount_id(fd)
    for number, root, mountpoint, kind, source in _mount_table():
        if number == wanted and kind == _KIND:
            return root, source, mountpoint
    return None


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def _mount_table() -> Iterator[tuple[int, str, str, str, str]]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.rstrip("\n").partition(" - ")
            number, _parent, _device, root, mountpoint = before.split(" ")[:5]
            kind, source = after.split(" ")[:2]
            yield int(number), _unescape(root), _unescape(mountpoint), kind, _unescape(source)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _store_id(store: str) -> str:
    try:
        return layout.read_config(store).id
    except (OSError, StoreError):
        return ""


def _backing(store: str, relative: str) -> int:
    try:
        root = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        return beneath(root, relative, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return -1
    finally:
        os.close(root)
