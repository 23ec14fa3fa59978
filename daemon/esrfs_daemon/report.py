"""What a migration tells: its report, its progress, and why it ended before its end."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import msgspec

GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.ESHUTDOWN)
"""What a mount that has ended answers."""
NO_FOLDER = (errno.ENOTDIR, errno.ELOOP)
"""What a path answers that leads over something else than a folder by now."""
FULL = (errno.ENOSPC, errno.EDQUOT)
MEANWHILE = "it is gone: moved or deleted meanwhile"


class NoRoom(Exception):  # noqa: N818 (a state, not an error)
    """The destination would have less free space than it has to keep; for people. What was begun is finished."""


class DestinationLost(Exception):  # noqa: N818
    """The mount ended in the middle; for people. The sources of what was not verified are untouched."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """One file, and a reason."""

    path: str
    """Relative to the source."""
    reason: str


class Report(msgspec.Struct, kw_only=True):
    """What came of a migration; the keys of ``esrfs migrate --json``."""

    copied: int = 0
    """Files that were copied and verified."""
    copied_bytes: int = 0
    existing: int = 0
    """Files that lay in the destination already, with the same content (verified)."""
    links: int = 0
    """Further names of files with several; hard links in the destination, too."""
    symlinks: int = 0
    folders: int = 0
    """Folders that were made."""
    unchanged: int = 0
    """What an earlier run has done, and has not changed since."""
    touched: int = 0
    """Source files that were put into the trash, deleted or replaced by a symlink."""
    beside: list[Note] = []
    """Files whose name was taken by other content; ``reason`` is the name that they got."""
    left: list[Note] = []
    """Copied and verified, but the source could not be touched as asked."""
    later: list[Note] = []
    """Not taken since they are being written, or changed meanwhile: run again."""
    incomplete: list[Note] = []
    """Copied, or there before, but for some metadata of the source; such a source is never touched."""
    failed: list[Note] = []
    """Not migrated."""

    def fail(self, path: str, reason: str) -> None:
        self.failed.append(Note(path=path, reason=reason))


@dataclass(frozen=True)
class Progress:
    """One file is done with (``path``), or some bytes of one are (``path`` empty)."""

    path: str
    files: int
    bytes: int


def in_words(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a symlink is in the way"
    if error.errno == errno.ENOTDIR:
        return "a file is in the place of a folder"
    return error.strerror or str(error)


def raise_if_lost(error: OSError, destination: str) -> None:
    """Raises DestinationLost where the error says that the mount has ended."""
    if error.errno in GONE:
        raise DestinationLost(f"{destination}: the mount is gone ({error.strerror})") from error
