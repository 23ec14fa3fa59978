"""Keeps the directory below a mount unwritable while the mount serves, and so also after a crash of it or of the
machine.

How the directory was before lies in the state directory until the mount has ended cleanly, so that a crash does not
turn our protection into the owner's wish. So that note comes first, and where there is no room for it the directory
is left as it is: the mount is worth more.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from esrfs import whole
from esrfs.store.mountpoint import (
    Protection,
    open_mountpoint,
    protect_mountpoint,
    protection_of,
    unprotect_mountpoint,
)

log = logging.getLogger("esrfs.mount")


class Guard:
    """The directory below one mount. Its methods don't raise: what fails is in the log."""

    def __init__(self, mountpoint: str, directory: int, note: Path) -> None:
        self._mountpoint = mountpoint
        self._directory = directory
        self._note = note
        self._before: Protection | None = None
        """How it was; None while we change nothing about it."""
        self._unreadable: OSError | None = None
        try:
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
                self._before = msgspec.json.decode(note.read_bytes(), type=Protection)
        except OSError as error:
            self._unreadable = error

    def before_mount(self) -> None:
        """Root protects at once; fusermount3 refuses an ordinary user a directory that he can't write to."""
        if self._before is None:
            self._take_note()
        if os.geteuid() == 0:
            self.protect()
        elif self._before is not None:
            writable = Protection(self._before.mode | stat.S_IRWXU, self._before.immutable)
            unprotect_mountpoint(self._directory, writable)

    def _take_note(self) -> None:
        found = protection_of(self._directory)
        if found.immutable:
            return  # of a store in place, or its owner's wish: there is nothing to add, and nothing to take away
        try:
            if self._unreadable is not None:
                raise self._unreadable
            whole.write(self._note, msgspec.json.encode(found), 0o600)
            _sync(self._note.parent)
        except OSError as error:
            if os.geteuid() != 0 and not found.mode & stat.S_IWUSR:
                self._before = found  # it has to be writable for a moment, and is then as it was before
                return
            log.warning(
                "the directory below %s stays as it is, with nothing to keep programs from writing to it should this "
                "mount crash: how it was could not be noted (%s)",
                self._mountpoint,
                error,
            )
        else:
            self._before = found

    def protect(self) -> None:
        if self._before is not None:
            protect_mountpoint(self._directory)

    def end(self) -> None:
        """The mount ended cleanly: the directory is as it was before."""
        if self._before is None:
            return
        unprotect_mountpoint(self._directory, self._before)
        try:
            self._note.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be removed (%s); the next mount goes by it", self._note, error)


@contextlib.contextmanager
def guarded(mountpoint: str, state_directory: Path) -> Iterator[Guard]:
    """To be entered before the mount: the descriptor leads to the directory below it. Raises OSError."""
    name = hashlib.blake2s(os.fsencode(os.path.realpath(mountpoint)), digest_size=8).hexdigest()
    directory = open_mountpoint(mountpoint)
    try:
        yield Guard(mountpoint, directory, state_directory / f"mountpoint-{name}.json")
    finally:
        os.close(directory)


def _sync(directory: Path) -> None:
    """The flag on the mountpoint may lie on another disk: the note has to be there first also after a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
