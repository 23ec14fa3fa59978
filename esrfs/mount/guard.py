"""Keeps the directory below a mount unwritable while the mount serves, and so also after a crash of it or of the
machine.

How the directory was before lies in the state directory until the mount has ended cleanly, so that a crash does not
turn our protection into the owner's wish.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from esrfs.store.mountpoint import Protection, open_mountpoint, protect_mountpoint, unprotect_mountpoint


class Guard:
    """The directory below one mount."""

    def __init__(self, directory: int, note: Path) -> None:
        self._directory = directory
        self._note = note
        self._before: Protection | None = None
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            self._before = msgspec.json.decode(note.read_bytes(), type=Protection)

    def before_mount(self) -> None:
        """Root protects at once; fusermount3 refuses an ordinary user a directory that he can't write to."""
        if os.geteuid() == 0:
            self.protect()
        elif self._before is not None:
            unprotect_mountpoint(self._directory, self._before)

    def protect(self) -> None:
        found = protect_mountpoint(self._directory)
        if self._before is None:
            self._before = found
            self._note.write_bytes(msgspec.json.encode(found))

    def end(self) -> None:
        """The mount ended cleanly: the directory is as it was before."""
        if self._before is not None:
            unprotect_mountpoint(self._directory, self._before)
            self._note.unlink(missing_ok=True)


@contextlib.contextmanager
def guarded(mountpoint: str, state_directory: Path) -> Iterator[Guard]:
    """To be entered before the mount: the descriptor leads to the directory below it. Raises OSError."""
    name = hashlib.blake2s(os.fsencode(os.path.realpath(mountpoint)), digest_size=8).hexdigest()
    directory = open_mountpoint(mountpoint)
    try:
        yield Guard(directory, state_directory / f"mountpoint-{name}.json")
    finally:
        os.close(directory)
