"""Moving what a walk found into a mount, in batches: copy, verify, record, and only then touch the source.

A batch goes through these steps, and a crash after any of them loses nothing:

1. ``begun`` rows in the journal, durable;
2. each file is copied into its folder as ``.esrfs-TOKEN.part`` with all metadata;
3. the copies are made durable (``durable``: small ones together), read back past the page cache and compared by sha256;
   the source must not have changed meanwhile. Then each gets its name, and never overwrites;
4. the folders are fsynced; ``verified`` rows, durable;
5. the source is kept, trashed, deleted or replaced by a link, if it still is the very file that was copied;
6. ``done`` rows.

While a batch is at 3 to 6, the next one is at 2: nothing of one depends on the other. A run that finds a file in the
destination already compares contents, so a migration that is begun anew after a crash copies nothing twice.
:meth:`Migration.recover` puts back what a crash left in step 5.

Threads: step 2 runs in a pool, and for large files step 3, too, each call on a ``Work`` of its own; all else, the
journal too, is the caller's thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from esrfs import faults
from esrfs_daemon import copies, copying, durable, recovery, sources
from esrfs_daemon.batch import Batch, Route, Work
from esrfs_daemon.config import Then
from esrfs_daemon.copies import SMALL, Copies
from esrfs_daemon.destination import Destination, filesystem_type
from esrfs_daemon.folders import Folders
from esrfs_daemon.journal import INTERRUPTED, Journal, Row
from esrfs_daemon.nested import Nested, NotMoved
from esrfs_daemon.report import (
    MEANWHILE,
    NO_FOLDER,
    DestinationLost,
    NoRoom,
    Note,
    Progress,
    Report,
    in_words,
    raise_if_lost,
)
from esrfs_daemon.throttle import Stopped, Throttle
from esrfs_daemon.touching import touch
from esrfs_daemon.walk import Found, Unmovable

log = logging.getLogger("esrfs.daemon")

FAULT_POINTS = (
    "migrate.begun", *copies.FAULT_POINTS, "migrate.written", "migrate.recorded", *sources.FAULT_POINTS, "migrate.end",
)  # fmt: skip

WORKERS = 4
_BATCH_FILES = 64
_BATCH_BYTES = 256 << 20
_FLEETING_INODES = ("vfat", "msdos", "exfat", "ntfs", "fuse", "cifs", "smb", "9p")
"""Filesystems (beginnings of their names) that number files anew when they are mounted."""


class Migration:
    """Between one source and one destination. The caller holds ``Journal.holding(source)`` as long as this lives."""

    def __init__(
        self,
        source: str,
        source_fd: int,
        destination: Destination,
        journal: Journal,
        throttle: Throttle,
        *,
        then: Then,
        even_if_mirrored: bool = False,
        retry_left: bool = False,
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """``source``: its real path. ``retry_left``: try again what earlier runs could copy but not touch."""
        self.report = Report()
        self.nested = Nested(source, source_fd)
        self._route = Route(source, source_fd, destination, journal, throttle, self.nested)
        self._source = source
        self._lasting = not filesystem_type(source_fd).startswith(_FLEETING_INODES)
        """Whether an inode's number and change time say that it is the same file as last time."""
        self._to = destination
        self._journal = journal
        self._throttle = throttle
        self._then = then
        self._even_if_mirrored = even_if_mirrored
        self._retry_left = retry_left
        self._tell = tell
        self._folders = Folders(self._route, self.report)
        self._copies = Copies(self._route)
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="migrate")
        self._syncs_together = durable.syncs_together(destination)
        self.unfinished: dict[int, Note] = {}
        """Rows that could not be recovered, by id, and why."""
        self._unwritten: list[Row] = []
        """Rows that are done; they are written with the next batch."""
        self._mirrors: set[str] = set()
        self._refused: set[str] = set()
        """Stores and views in the source that files lay in."""

    def close(self) -> None:
        """Finish folders and the journal. Raises OSError, DestinationLost, JournalError."""
        self._pool.shutdown()
        self.finish()

    # ---- what to do

    def recover(self) -> None:
        """Put back, or finish, what a crash left in the middle; to be called first. What can't be now stays as it is in
        the journal, for the next time, and holds nothing else up. Raises DestinationLost, JournalError."""
        changed = []
        for row in self._journal.unfinished(self._source):
            if row.kind == "directory":
                self._folders.recover(row)
                continue
            if row.state == "begun" and (row.dest_root, row.store) != (self._to.path, self._to.store_id):
                continue  # its part file lies in another destination
            try:
                if not recovery.recover_file(row, self._route):
                    continue
            except OSError as error:
                if row.state == "begun":
                    raise_if_lost(error, self._to.path)
                reason = recovery.why_not(row, error)
                self.unfinished[row.id] = Note(path=row.source, reason=reason)
                if error.errno in NO_FOLDER and row.note == reason:
                    continue  # somebody has been told, and it may well stay so
                row.note = reason
                self.report.fail(row.source, reason)
            changed.append(row)
        self._journal.write(changed)

    def run(self, items: Iterable[Found]) -> None:
        """Migrate what needs it. Raises Stopped, NoRoom, DestinationLost: after the batch, with nothing half done.
        JournalError: what is not recorded by then is given up, and its sources are untouched."""
        begun: list[Batch] = []
        try:
            for found in self._batches(items):
                if begun and self._throttle.blocked():
                    self._finish(begun.pop(0))  # the pause may be a long one
                begun.append(self._begin(found))
                if len(begun) > 1:
                    self._finish(begun.pop(0))
            if begun:
                self._finish(begun.pop(0))
        except (Stopped, NoRoom, DestinationLost):
            while begun:
                with contextlib.suppress(NoRoom, DestinationLost):
                    self._finish(begun.pop(0))
            raise
        finally:
            for batch in begun:
                batch.close()
        if self._throttle.stop.is_set():
            raise Stopped

    def _batches(self, items: Iterable[Found]) -> Iterator[list[Found]]:
        """What needs to be done, in portions; ends early when all shall stop."""
        batch: list[Found] = []
        weight = 0
        for found in items:
            if self._throttle.stop.is_set():
                return
            if not self.needs(found):
                self.report.unchanged += found.kind != "directory"
                continue
            batch.append(found)
            weight += found.st.st_size if found.kind == "file" else 0
            if len(batch) >= _BATCH_FILES or weight >= _BATCH_BYTES:
                yield batch
                batch, weight = [], 0
        if batch and not self._throttle.stop.is_set():
            yield batch

    def finish(self) -> None:
        """Give folders their times and modes, now that their content is there; write the journal. Raises
        DestinationLost, JournalError."""
        self._unwritten += self._folders.finish()
        self._copies.forget_links()
        self._journal.write(self._unwritten)
        self._unwritten.clear()

    def note(self, unmovable: Unmovable) -> None:
        """For the walk: what can't be moved goes into the report."""
        if unmovable.passing:
            self.report.later.append(Note(path=unmovable.path, reason=unmovable.reason))
        else:
            self.report.fail(unmovable.path, unmovable.reason)

    def needs(self, found: Found) -> bool:
        """Whether there is something to do: not for what an earlier run has done and nobody changed since."""
        if not found.path:
            return False
        if found.kind == "directory":
            return not self._folders.is_known(found.path)
        if found.kind == "symlink":
            target = sources.read_link(self._route.source_fd, found.path)
            if target == self._to.path or target.startswith(f"{self._to.path}/"):
                return False  # ours, in the place of a file
        row = self._journal.latest(self._source, found.path, self._to.path)
        if row is None or row.store != self._to.store_id or row.kind != found.kind:
            return True
        st = found.st
        if (row.size, row.mtime_ns) != (st.st_size, st.st_mtime_ns) or (self._lasting and row.ino != st.st_ino):
            return True
        if self._lasting and row.ctime_ns != st.st_ctime_ns and st.st_nlink == 1:
            return True
        wanted = self._wanted(found)
        if row.state == "left":
            return row.note.startswith(INTERRUPTED) or row.wanted != wanted or self._retry_left
        return row.state != "done" or wanted not in (row.wanted, "keep")

    def _wanted(self, found: Found) -> Then:
        if found.mirrored and not self._even_if_mirrored and self._then != "keep":
            return "keep"
        return "keep" if found.kind == "symlink" and self._then == "symlink" else self._then

    # ---- a batch

    def _begin(self, found: Sequence[Found]) -> Batch:
        """Rows for all, durable; then they are being copied. Raises Stopped, NoRoom, DestinationLost, JournalError,
        OSError."""
        self._throttle.wait_until_allowed()
        self._check_room(sum(each.st.st_size for each in found if each.kind == "file"))
        batch = Batch(durable.open_barrier(self._to) if self._syncs_together else -1)
        try:
            for each in found:
                try:
                    work = self._prepare(each, batch)
                except NotMoved as refusal:
                    inside = refusal.inside
                    if inside.path not in self._refused:
                        self._refused.add(inside.path)
                        self.report.fail(inside.path, inside.reason)
                    continue
                except FileNotFoundError:
                    self.report.later.append(Note(path=each.path, reason=MEANWHILE))
                    continue
                except OSError as error:
                    raise_if_lost(error, self._to.path)
                    self.report.fail(each.path, in_words(error))
                    continue
                if work is not None:
                    batch.works.append(work)
            self._journal.write(
                [*self._unwritten, *self._folders.take_unwritten(), *(work.row for work in batch.works)]
            )
            self._unwritten.clear()
            faults.reach("migrate.begun")
            together = [work for work in batch.works if not work.is_alone]
            small = [work for work in together if work.found.st.st_size < SMALL]
            if small:
                batch.copying.append(self._pool.submit(self._write_each, batch, small))
            for work in together:
                if work.found.st.st_size >= SMALL:
                    batch.copying.append(self._pool.submit(self._copies.attempt, self._copies.whole, work))
        except BaseException:
            batch.close()
            raise
        return batch

    def _prepare(self, found: Found, batch: Batch) -> Work | None:
        """A row and an open folder for the file; None for what is done here and now (folders)."""
        if found.kind == "directory":
            self._folders.open(found.path, batch)
            return None
        folder = self._folders.open(found.path.rpartition("/")[0], batch)
        st = found.st
        wanted = self._wanted(found)
        if wanted != self._then and found.mirrored and found.mirrored not in self._mirrors:
            self._mirrors.add(found.mirrored)
            log.info("%s Its files are copied and stay.", found.mirrored)
        row = Row(
            source_root=self._source,
            dest_root=self._to.path,
            store=self._to.store_id,
            source=found.path,
            dest=found.path,
            kind="symlink" if found.kind == "symlink" else "file",
            state="begun",
            wanted=wanted,
            token=secrets.token_hex(8),
            ino=st.st_ino,
            size=st.st_size,
            mtime_ns=st.st_mtime_ns,
            ctime_ns=st.st_ctime_ns,
        )
        return Work(found, row, folder)

    def _write_each(self, batch: Batch, works: Sequence[Work]) -> None:
        """Small files one after the other: more threads would only wait for each other, here and in the mount."""
        for work in works:
            if batch.given_up:
                return
            self._copies.attempt(self._copies.write, work)

    def _finish(self, batch: Batch) -> None:
        """All that comes after the copying. Raises NoRoom, DestinationLost, JournalError, OSError."""
        try:
            for future in batch.copying:
                future.result()
            self._verify([work for work in batch.works if work.state == "written"], batch.barrier)
            for work in batch.works:
                if work.is_alone:
                    how = self._copies.symlink if work.found.kind == "symlink" else self._copies.whole
                    self._copies.attempt(how, work)
            self._record(batch)
            for work in batch.works:
                if work.is_done:
                    touch(work, self._route, self.report)
            self._unwritten += [work.row for work in batch.works if work.is_done and work.row.wanted != "keep"]
            faults.reach("migrate.end")
        finally:
            batch.close()
        for work in batch.works:
            if work.fatal is not None:
                raise work.fatal

    def _verify(self, works: Sequence[Work], barrier: int) -> None:
        """Those that were written together: make them durable, read each back, give it its name."""
        if not works:
            return
        for work in works:
            durable.find_below(work, self._to)
        faults.reach("migrate.written")
        left = durable.make_durable(barrier, works)
        for future in [self._pool.submit(self._copies.attempt, self._copies.sync, work) for work in left]:
            future.result()
        durables = [work for work in works if work.state == "written"]
        for work in durables:
            self._copies.drop(work)
            if work.below >= 0:
                copying.read_ahead(work.below)
        for work in durables:
            self._copies.attempt(self._copies.settle, work)

    def _record(self, batch: Batch) -> None:
        """Make names durable, then say so in the journal; a work that came to nothing leaves no row."""
        done = [work for work in batch.works if work.is_done]
        try:
            for fd in {work.folder.fd for work in done}:
                os.fsync(fd)
        except OSError as error:
            raise_if_lost(error, self._to.path)
            raise
        for work in done:
            work.row.state = "done" if work.row.wanted == "keep" else "verified"
        # What could not be removed, its ``begun`` row still knows.
        nothing = [work.row for work in batch.works if not work.is_done and not work.has_part]
        self._journal.write([work.row for work in done], forget=nothing)
        faults.reach("migrate.recorded")
        for work in batch.works:
            path, size = work.found.path, work.found.st.st_size
            if not work.is_done:
                if work.state == "later":
                    self.report.later.append(Note(path=path, reason=work.reason))
                elif work.state == "failed" and not isinstance(work.fatal, DestinationLost):
                    self.report.fail(path, work.reason)
                continue
            if work.state == "existing":
                self.report.existing += 1
            elif work.state == "linked":
                self.report.links += 1
            elif work.found.kind == "symlink":
                self.report.symlinks += 1
            else:
                self.report.copied += 1
                self.report.copied_bytes += size
            if work.row.dest != path:
                self.report.beside.append(Note(path=path, reason=work.row.dest))
            self._tell(Progress(path, 1, size if work.found.kind == "file" else 0))

    def _check_room(self, size: int) -> None:
        space = os.statvfs(self._to.fd)
        free = space.f_bavail * space.f_frsize
        if free - size < self._throttle.min_free:
            raise NoRoom(
                f"{self._to.path}: {free / 1e9:.1f} GB are free, and {self._throttle.min_free / 1e9:.1f} GB have to "
                "stay free (min_free)"
            )
