"""The files that are migrated together, and the folders and descriptors that they need as long as they are on their
way."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from esrfs_daemon.destination import Destination
from esrfs_daemon.journal import Journal, Row
from esrfs_daemon.nested import Nested
from esrfs_daemon.throttle import Throttle
from esrfs_daemon.walk import Found


@dataclass(frozen=True)
class Route:
    """From where, to where."""

    source: str
    """Its real path."""
    source_fd: int
    to: Destination
    journal: Journal
    throttle: Throttle
    nested: Nested
    """Of the source."""


@dataclass(eq=False)
class Folder:
    """One of the destination and the same of the source, open."""

    fd: int
    """In the destination."""
    source_fd: int
    """-1 where it could not be opened; whoever tries again hears why."""
    made: bool
    """In this run, and so empty: nobody has to look whether a file is there already."""
    gives: bool | None = None
    """Whether new files in it begin with extended attributes (a default ACL gives some); None: nobody has looked."""

    def close(self) -> None:
        os.close(self.fd)
        if self.source_fd >= 0:
            os.close(self.source_fd)


@dataclass(eq=False)
class Work:
    """One file on its way."""

    found: Found
    row: Row
    folder: Folder
    state: Literal["begun", "written", "copied", "existing", "linked", "later", "failed", "stopped"] = "begun"
    """``written``: as a part file, not durable, not verified."""
    reason: str = ""
    lacks: str = ""
    """What of the source's metadata its copy lacks, for people; then the source stays."""
    source: int = -1
    copy: int = -1
    """Descriptors of the file and of its copy."""
    below: int = -1
    """The copy's file in the store's directory, if this user can open it; nothing is read or written through it."""
    has_part: bool = False
    """The part file may exist."""
    fatal: Exception | None = None

    @property
    def part(self) -> str:
        return part_name(self.row.token)

    @property
    def is_done(self) -> bool:
        return self.state in ("copied", "existing", "linked")

    @property
    def is_alone(self) -> bool:
        """Names of one file come one after the other, so that the later ones can be links."""
        return self.found.kind == "symlink" or self.found.st.st_nlink > 1

    def named(self, name: str) -> None:
        self.row.dest = self.destination(name)

    def destination(self, name: str) -> str:
        """The path of ``name`` in the destination's folder."""
        above = self.row.dest.rpartition("/")[0]
        return f"{above}/{name}" if above else name

    def discard(self) -> None:
        """Remove the part file. What can't be removed stays known: ``has_part``, and its row in the journal."""
        if not self.has_part:
            return
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.part, dir_fd=self.folder.fd)
            self.has_part = False

    def close(self) -> None:
        for fd in (self.source, self.copy, self.below):
            if fd >= 0:
                os.close(fd)
        self.source = self.copy = self.below = -1


@dataclass(eq=False)
class Batch:
    barrier: int
    """See ``durable``; -1 where there is none."""
    works: list[Work] = field(default_factory=list)
    folders: dict[str, Folder] = field(default_factory=dict)
    copying: list[Future[None]] = field(default_factory=list)
    given_up: bool = False
    """What is not copied yet need not be."""

    def close(self) -> None:
        """Raises OSError never: it ends also what went wrong."""
        self.given_up = True
        for future in self.copying:
            future.exception()
        for work in self.works:
            work.discard()
            work.close()
        for folder in self.folders.values():
            folder.close()
        self.folders.clear()
        if self.barrier >= 0:
            os.close(self.barrier)
            self.barrier = -1


def part_name(token: str) -> str:
    """What a copy is called until it is verified."""
    return f".esrfs-{token}.part"
