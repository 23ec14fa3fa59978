"""One migration from beginning to end: behind ``esrfs migrate``, and each turn of the daemon's ``--once``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import msgspec

from esrfs_daemon import walk
from esrfs_daemon.asking import opened_folder, real_path
from esrfs_daemon.config import Then
from esrfs_daemon.destination import Destination, opened
from esrfs_daemon.journal import Journal, JournalError
from esrfs_daemon.migration import Migration
from esrfs_daemon.report import Progress, Report
from esrfs_daemon.settle import Settling
from esrfs_daemon.suitable import refuse_unsuitable
from esrfs_daemon.throttle import Stopped, Throttle
from esrfs_daemon.undo import Undo, UndoReport
from esrfs_daemon.walk import Filters, Found, Unmovable

_LONGEST_NAP = 0.5


class Plan(msgspec.Struct, kw_only=True):
    """What a migration would do; the keys of ``esrfs migrate --dry-run --json``."""

    files: int = 0
    bytes: int = 0
    symlinks: int = 0
    folders: int = 0
    unchanged: int = 0
    """Migrated already."""
    taken_names: int = 0
    """Files whose name exists in the destination: with the same content they are done, else they go beside it."""
    mirrored: int = 0
    """Files that would only be copied, since another program mirrors their folder."""
    failed: list[tuple[str, str]] = []
    """``(path, reason)`` of what can't be migrated."""


class Once:
    """Source and destination of one migration, open and checked; :func:`prepared` makes one."""

    def __init__(
        self,
        source: str,
        source_fd: int,
        destination: Destination,
        *,
        journal: Journal,
        throttle: Throttle,
        filters: Filters,
    ) -> None:
        self.source = source
        self.destination = destination
        self.journal = journal
        self._source_fd = source_fd
        self._throttle = throttle
        self._filters = filters

    def plan(self, then: Then) -> Plan:
        """Look, and change nothing. Raises OSError."""
        plan = Plan()
        migration = self._migration(then)

        def unmovable(one: Unmovable) -> None:
            plan.failed.append((one.path, one.reason))

        for found in self._walk(migration, unmovable):
            if not found.path or (found.kind == "directory" and not self._filters.takes_all):
                continue
            if found.kind == "directory":
                plan.folders += not self._exists(found.path)
            elif not migration.needs(found):
                plan.unchanged += 1
            else:
                plan.symlinks += found.kind == "symlink"
                plan.files += found.kind == "file"
                plan.bytes += found.st.st_size if found.kind == "file" else 0
                plan.taken_names += self._exists(found.path)
                plan.mirrored += bool(found.mirrored)
                if found.kind == "file" and not os.access(os.path.join(self.source, found.path), os.R_OK):
                    unmovable(Unmovable(found.path, "it can't be read (Permission denied)"))
        return plan

    def total(self, stop: Callable[[], bool]) -> tuple[int, int]:
        """``(files and symlinks, bytes)`` to migrate, for a progress bar."""
        files = size = 0
        migration = self._migration("keep")
        for found in self._walk(migration, lambda one: None):
            if stop():
                break
            if found.kind != "directory" and migration.needs(found):
                files += 1
                size += found.st.st_size if found.kind == "file" else 0
        return files, size

    def migrate(
        self,
        then: Then,
        *,
        even_if_mirrored: bool = False,
        quiet: float = 2.0,
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> Report:
        """All of it, once. Files that changed in the last ``quiet`` seconds are waited for, at the end.

        Raises Stopped, NoRoom, DestinationLost, JournalError with ``report`` as an attribute of this; OSError.
        """
        migration = self._migration(then, even_if_mirrored, tell)
        self.report = migration.report
        settling = Settling(quiet)
        finished = False
        try:
            migration.recover()
            migration.run(self._at_rest(migration, settling))
            while (wait := settling.next_due()) is not None:
                if self._throttle.stop.wait(min(wait + 0.01, _LONGEST_NAP)):
                    raise Stopped
                migration.run(list(settling.take(self._source_fd, migration.nested)))
            finished = True
        finally:
            if finished:
                migration.close()
            else:
                with contextlib.suppress(OSError, JournalError):
                    migration.close()  # what went wrong first is what people should hear
        return migration.report

    def undo(self, tell: Callable[[Progress], None] = lambda progress: None) -> UndoReport:
        """Put everything back that was migrated from here to there. Raises Stopped, JournalError with ``undo_report``
        as an attribute of this; OSError."""
        migration = self._migration("keep")
        undo = Undo(
            self.source,
            self._source_fd,
            self.destination,
            self.journal,
            self._throttle,
            unfinished=migration.unfinished,
            tell=tell,
        )
        self.undo_report = undo.report
        migration.recover()
        migration.close()
        undo.run()
        return undo.report

    def _migration(
        self, then: Then, even_if_mirrored: bool = False, tell: Callable[[Progress], None] = lambda progress: None
    ) -> Migration:
        return Migration(
            self.source,
            self._source_fd,
            self.destination,
            self.journal,
            self._throttle,
            then=then,
            even_if_mirrored=even_if_mirrored,
            retry_left=True,
            tell=tell,
        )

    def _walk(self, migration: Migration, unmovable: Callable[[Unmovable], None]) -> Iterator[Found]:
        above = walk.markers_above(self.source)
        return walk.walk(self._source_fd, self.source, self._filters, unmovable, migration.nested, mirrored=above)

    def _at_rest(self, migration: Migration, settling: Settling) -> Iterator[Found]:
        for found in self._walk(migration, migration.note):
            if found.kind == "directory" and not self._filters.takes_all:
                continue
            # The clock only decides who is looked at twice; whether a program writes is asked of each.
            age = time.time() - found.st.st_ctime
            if found.kind == "file" and -3600 < age < settling.quiet and migration.needs(found):
                settling.see(found)
            else:
                yield found

    def _exists(self, path: str) -> bool:
        return os.path.lexists(os.path.join(self.destination.path, path))


@contextlib.contextmanager
def prepared(
    source: str, destination: str, journal: Journal, throttle: Throttle, filters: Filters, *, create: bool = True
) -> Iterator[Once]:
    """Open both, check that they suit each other, and hold the source against other migrations.

    ``create``: make the destination's folder. Raises Refused, NotMounted, Busy, OSError.
    """
    real = real_path(source)
    with opened_folder(real) as source_fd, opened(destination, create=create) as to:
        refuse_unsuitable(real, source_fd, to)
        with journal.holding(real):
            yield Once(real, source_fd, to, journal=journal, throttle=throttle, filters=filters)
