"""Moving what a walk found into a mount, in batches: copy, verify, record, and only then touch the source.

A batch goes through these steps, and a crash after any of them loses nothing:

1. ``begun`` rows in the journal, durable;
2. each file is copied into its folder as ``.esrfs-TOKEN.part`` with all metadata, fsynced, read back past the page
   cache and compared by sha256; the source must not have changed meanwhile. Then it gets its name, and never
   overwrites;
3. the folders are fsynced; ``verified`` rows, durable;
4. the source is kept, trashed, deleted or replaced by a link, if it still is the very file that was copied;
5. ``done`` rows.

The copies stay open until step 4 is over: a mount swaps no file that is open, so what was verified is what lies there
while the source goes. A run that finds a file in the destination already compares contents, so a migration that is
begun anew after a crash copies nothing twice. :meth:`Migration.recover` puts back what a crash left in step 4.

Threads: ``_copy`` runs in a pool, each call on a :class:`_Work` of its own; all else, the journal too, is the caller's
thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from esrfs import faults
from esrfs.store import layout, linux, metadata
from esrfs.store.beneath import beneath
from esrfs.store.metadata import Metadata
from esrfs_daemon import copying, sources
from esrfs_daemon.config import Then
from esrfs_daemon.copying import Identity
from esrfs_daemon.destination import Destination, filesystem_type, lies_in_view, make_folders
from esrfs_daemon.journal import Journal, Row
from esrfs_daemon.throttle import Stopped, Throttle
from esrfs_daemon.walk import Found, Unmovable

log = logging.getLogger("esrfs.daemon")

FAULT_POINTS = (
    "migrate.begun", *copying.FAULT_POINTS, "migrate.placed", "migrate.recorded", *sources.FAULT_POINTS, "migrate.end",
)  # fmt: skip

WORKERS = 4
_BATCH_FILES = 64
_BATCH_BYTES = 256 << 20
_INTERRUPTED = "interrupted"
"""A note in the journal: worth another try, whenever the file is seen."""
_FLEETING_INODES = ("vfat", "msdos", "exfat", "ntfs", "fuse", "cifs", "smb", "9p")
"""Filesystems (beginnings of their names) that number files anew when they are mounted."""
_GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.ESHUTDOWN)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Refused(Exception):  # noqa: N818 (a state, not an error)
    """This source and this destination must not be migrated; for people. Nothing was done."""


class NoRoom(Exception):  # noqa: N818
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
    """Copied, but for some metadata that the destination does not take; such a source is never touched."""
    failed: list[Note] = []
    """Not migrated."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """One file is done with (``path``), or some bytes of one are (``path`` empty)."""

    path: str
    files: int
    bytes: int


@dataclasses.dataclass
class _Work:
    """One file of a batch, on its way."""

    found: Found
    row: Row
    folder: int
    """Descriptor of the destination's folder, the batch's."""
    state: Literal["copied", "existing", "linked", "later", "failed", "stopped"] = "failed"
    reason: str = ""
    source: int = -1
    copy: int = -1
    """Descriptors of the file and of its copy."""
    fatal: Exception | None = None

    def close(self) -> None:
        for fd in (self.source, self.copy):
            if fd >= 0:
                os.close(fd)
        self.source = self.copy = -1


@contextlib.contextmanager
def open_source_root(path: str) -> Iterator[int]:
    """A descriptor of the source's folder. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def refuse_unsuitable(source: str, source_fd: int, destination: Destination) -> None:
    """Raises Refused where one holds the other, or the source is a store or the view of one."""
    view = lies_in_view(source_fd)
    if view is not None:
        raise Refused(
            f"{source} lies in {view}, a mounted esrfs: its files may be rebuilt pictures. Bring originals back first "
            "(esrfs restore), or copy what you see with cp -a"
        )
    here = os.fstat(source_fd)
    for below, what in ((destination.path, "the destination"), (destination.store, "the destination's store")):
        for above in _and_above(os.path.realpath(below)):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(above), here):
                    raise Refused(f"{what} {below} lies in {source}; choose a source beside it. Nothing was done")
    for above in _and_above(os.path.realpath(source)):
        if layout.is_store(above):
            raise Refused(f"{source} lies in {above}, a store of esrfs; mount that one. Nothing was done")


def _and_above(path: str) -> Iterator[str]:
    while True:
        yield path
        above = os.path.dirname(path)
        if above == path:
            return
        path = above


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
        self._source = source
        self._source_fd = source_fd
        self._lasting = not filesystem_type(source_fd).startswith(_FLEETING_INODES)
        """Whether an inode's number and change time say that it is the same file as last time."""
        self._to = destination
        self._journal = journal
        self._throttle = throttle
        self._then = then
        self._even_if_mirrored = even_if_mirrored
        self._retry_left = retry_left
        self._tell = tell
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="migrate")
        self._unwritten: list[Row] = []
        """Rows that are done; they are written with the next batch."""
        self._folders: dict[str, tuple[Metadata, Row]] = {}
        """Folders in the destination that get their metadata when their content is there."""
        self._known_folders: set[str] = set()
        self._new_folders: set[str] = set()
        """Made in this run, and so empty: nobody has to look whether a file is there already."""
        self._links: dict[tuple[int, int], Row] = {}
        self._mirrors: set[str] = set()

    def close(self) -> None:
        """Finish folders and the journal. Raises OSError."""
        self._pool.shutdown()
        self.finish()

    # ---- what to do

    def recover(self) -> None:
        """Put back, or finish, what a crash left in the middle; to be called first. Raises OSError."""
        rows = self._journal.unfinished(self._source)
        for row in rows:
            if row.kind == "directory":
                self._recover_folder(row)
                continue
            if row.dest_root == self._to.path:
                self._remove_part(row)
            self._put_taken_back(row)
            if row.state == "begun":
                row.state, row.note = "undone", _INTERRUPTED
            elif row.wanted == "keep" or not self._is_there(row.source):
                row.state = "done"
            else:
                row.state, row.note = "left", _INTERRUPTED
        self._journal.write(rows)

    def run(self, items: Iterable[Found]) -> None:
        """Migrate what needs it. Raises Stopped, NoRoom, DestinationLost: after the batch, with nothing half done."""
        batch: list[Found] = []
        weight = 0
        for found in items:
            if self._throttle.stop.is_set():
                break
            if not self.needs(found):
                self.report.unchanged += found.kind != "directory"
                continue
            batch.append(found)
            weight += found.st.st_size if found.kind == "file" else 0
            if len(batch) >= _BATCH_FILES or weight >= _BATCH_BYTES:
                self._batch(batch)
                batch, weight = [], 0
        if batch and not self._throttle.stop.is_set():
            self._batch(batch)
        if self._throttle.stop.is_set():
            raise Stopped

    def finish(self) -> None:
        """Give folders their times and modes, now that their content is there; write the journal. Raises OSError."""
        for path in sorted(self._folders, key=lambda path: path.count("/"), reverse=True):
            wanted, row = self._folders[path]
            try:
                fd = beneath(self._to.fd, path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._raise_if_lost(error)
                self._fail(path, f"the folder's metadata can't be set ({error.strerror})")
                continue
            try:
                metadata.apply(fd, wanted)
            except OSError as error:
                self._fail(path, f"the folder's metadata can't be set ({error.strerror})")
            finally:
                os.close(fd)
            row.state = "done"
            self._unwritten.append(row)
        self._folders.clear()
        self._known_folders.clear()
        self._new_folders.clear()
        self._links.clear()
        self._journal.write(self._unwritten)
        self._unwritten.clear()

    def note(self, unmovable: Unmovable) -> None:
        """For the walk: what can't be moved goes into the report."""
        if unmovable.passing:
            self.report.later.append(Note(path=unmovable.path, reason=unmovable.reason))
        else:
            self._fail(unmovable.path, unmovable.reason)

    def needs(self, found: Found) -> bool:
        """Whether there is something to do: not for what an earlier run has done and nobody changed since."""
        if not found.path:
            return False
        if found.kind == "directory":
            return found.path not in self._known_folders
        if found.kind == "symlink":
            target = self._read_link(found.path)
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
            return row.note.startswith(_INTERRUPTED) or row.wanted != wanted or self._retry_left
        return row.state != "done" or wanted not in (row.wanted, "keep")

    def _wanted(self, found: Found) -> Then:
        if found.mirrored and not self._even_if_mirrored and self._then != "keep":
            return "keep"
        return "keep" if found.kind == "symlink" and self._then == "symlink" else self._then

    # ---- a batch

    def _batch(self, batch: Sequence[Found]) -> None:
        self._throttle.wait_until_allowed()
        self._check_room(sum(found.st.st_size for found in batch if found.kind == "file"))
        folders: dict[str, int] = {}
        works: list[_Work] = []
        try:
            for found in batch:
                try:
                    work = self._prepare(found, folders)
                except OSError as error:
                    self._raise_if_lost(error)
                    self._fail(found.path, _in_words(error))
                    continue
                if work is not None:
                    works.append(work)
            self._journal.write([*self._unwritten, *(work.row for work in works)])
            self._unwritten.clear()
            faults.reach("migrate.begun")
            self._copy_all(works)
            self._record(works, folders)
            for work in works:
                if work.state in ("copied", "existing", "linked"):
                    self._touch(work)
            self._unwritten += [work.row for work in works if work.state in ("copied", "existing", "linked")]
            faults.reach("migrate.end")
        finally:
            for work in works:
                work.close()
            for fd in folders.values():
                os.close(fd)
        for work in works:
            if work.fatal is not None:
                raise work.fatal

    def _prepare(self, found: Found, folders: dict[str, int]) -> _Work | None:
        """A row and an open folder for the file; None for what is done here and now (folders)."""
        parent, _, name = found.path.rpartition("/")
        if found.kind == "directory":
            folders[found.path] = self._folder(found.path, folders)
            return None
        folder = self._folder(parent, folders)
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
            dest=f"{parent}/{name}" if parent else name,
            kind="symlink" if found.kind == "symlink" else "file",
            state="begun",
            wanted=wanted,
            token=secrets.token_hex(8),
            ino=st.st_ino,
            size=st.st_size,
            mtime_ns=st.st_mtime_ns,
            ctime_ns=st.st_ctime_ns,
        )
        return _Work(found, row, folder)

    def _folder(self, path: str, folders: dict[str, int]) -> int:
        """The destination's folder, open; made with all above it where it is missing. Raises OSError."""
        if path in folders:
            return folders[path]
        rows: list[Row] = []

        def made(each: str) -> None:
            rows.append(self._folder_row(each))
            self._new_folders.add(each)
            self.report.folders += 1

        fd = make_folders(self._to.fd, path, made) if path else os.dup(self._to.fd)
        folders[path] = fd
        if rows:
            self._journal.write(rows)
        elif path and path not in self._known_folders and path not in self._folders:
            known = self._journal.latest(self._source, path, self._to.path)
            if known is not None and known.made and known.kind == "directory":
                self._folder_row(path, known)  # something new comes into it, so it gets its times again
        self._known_folders.add(path)
        return fd

    def _folder_row(self, path: str, row: Row | None = None) -> Row:
        fd = beneath(self._source_fd, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            wanted = copying.snapshot(fd)
            st = os.fstat(fd)
        finally:
            os.close(fd)
        row = row or Row(
            source_root=self._source,
            dest_root=self._to.path,
            store=self._to.store_id,
            source=path,
            dest=path,
            kind="directory",
            state="begun",
            wanted="keep",
            ino=st.st_ino,
            mtime_ns=st.st_mtime_ns,
            ctime_ns=st.st_ctime_ns,
            metadata=msgspec.json.encode(wanted),
        )
        self._folders[path] = (wanted, row)
        return row

    def _copy_all(self, works: Sequence[_Work]) -> None:
        """In parallel; but names of one file one after the other, so that the later ones can be links."""
        alone = [work for work in works if work.found.kind == "symlink" or work.found.st.st_nlink > 1]
        together = [work for work in works if not (work.found.kind == "symlink" or work.found.st.st_nlink > 1)]
        for future in [self._pool.submit(self._attempt, self._copy, work) for work in together]:
            future.result()
        for work in alone:
            self._attempt(self._copy_symlink if work.found.kind == "symlink" else self._copy, work)

    def _attempt(self, how: Callable[[_Work], None], work: _Work) -> None:
        try:
            how(work)
        except Stopped:
            work.state = "stopped"
        except copying.Changed:
            work.state, work.reason = "later", "it changed while it was copied"
        except copying.NotTheSame as error:
            work.state, work.reason = "failed", str(error)
            log.error("%s: %s", work.found.path, error)
        except FileNotFoundError:
            work.state, work.reason = "later", "it is gone: moved or deleted meanwhile"
        except OSError as error:
            work.state, work.reason = "failed", _in_words(error)
            if error.errno in _GONE:
                work.fatal = DestinationLost(f"{self._to.path}: the mount is gone ({error.strerror})")
            elif error.errno in _FULL:
                work.fatal = NoRoom(f"{self._to.path}: {error.strerror}")

    # ---- one file

    def _copy(self, work: _Work) -> None:
        """Into the destination, verified, under its name. Runs in the pool."""
        found, row = work.found, work.row
        parent, _, name = found.path.rpartition("/")
        expected = Identity.of(found.st)
        directory = beneath(self._source_fd, parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            work.source = copying.open_source(directory, name)
        finally:
            os.close(directory)
        st = os.fstat(work.source)
        if not _unchanged(expected, st):
            raise copying.Changed
        if copying.is_being_written(work.source):
            work.state, work.reason = "later", "a program has it open for writing"
            return
        if st.st_nlink > 1 and self._link(work, st):
            return
        if found.path.rpartition("/")[0] not in self._new_folders and self._take_existing(work, name, st):
            return
        part = _part_name(row.token)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        wanted = copying.snapshot(work.source)
        # Nobody may read it before who may read it afterwards.
        mode = wanted.mode & 0o777 if (wanted.uid, wanted.gid) == (os.geteuid(), os.getegid()) else 0o600
        work.copy = os.open(part, flags, mode, dir_fd=work.folder)
        placed = False
        try:
            row.sha256 = copying.copy(work.source, work.copy, st, wanted, self._throttle)
            copying.make_durable(work.copy)
            if copying.digest_past_cache(work.copy, lambda: self._drop_below(row, part)) != row.sha256:
                raise copying.NotTheSame(
                    "the copy was read back with other bytes than were written, and was removed; the source is "
                    "untouched. The destination's disk or the machine's memory may be failing"
                )
            lacks = copying.difference(wanted, work.copy)
            if not _unchanged(expected, os.fstat(work.source)):
                raise copying.Changed
            placed = self._place(work, part, name, st)
        finally:
            if not placed:
                with contextlib.suppress(OSError):
                    os.unlink(part, dir_fd=work.folder)
        if work.state == "existing":
            return
        work.state, work.reason = "copied", f"its copy lacks {lacks}" if lacks else ""
        row.verified_by = "read back"
        if st.st_nlink > 1:
            self._links[st.st_dev, st.st_ino] = row

    def _place(self, work: _Work, part: str, name: str, st: os.stat_result) -> bool:
        """Give the verified copy its name, or one beside it; False where the same content lies there by now."""
        for candidate in sources.names_beside(name, first=True):
            try:
                sources.move(work.folder, part, work.folder, candidate)
            except FileExistsError:
                if self._take_existing(work, candidate, st, only=True):
                    return False
                continue
            self._named(work, candidate)
            faults.reach("migrate.placed")
            return True
        raise OSError(errno.EEXIST, "no free name", name)

    def _take_existing(self, work: _Work, name: str, st: os.stat_result, only: bool = False) -> bool:
        """Whether this content lies under the name, or one beside it, already; then the work is done.

        ``only``: look at just this name."""
        for candidate in (name,) if only else sources.names_beside(name, first=True):
            try:
                fd = os.open(candidate, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=work.folder)
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno in _GONE:
                    raise
                continue  # a symlink, or something that can't be read: not this content
            proof = ""
            try:
                there = os.fstat(fd)
                if stat.S_ISREG(there.st_mode) and there.st_size == st.st_size:
                    if not work.row.sha256:
                        work.row.sha256 = copying.digest_past_cache(work.source)
                        if not _unchanged(Identity.of(work.found.st), os.fstat(work.source)):
                            raise copying.Changed
                    proof = prove(fd, work.row.sha256)
            finally:
                if not proof:
                    os.close(fd)
            if proof:
                if work.copy >= 0:
                    os.close(work.copy)
                work.copy, work.state = fd, "existing"
                self._named(work, candidate)
                work.row.verified_by = "undo window" if proof == "undo window" else "was there"
                work.row.made = self._was_made(work, there, proof)
                if proof in ("compacted", "view"):
                    work.reason = (
                        f"the destination has it as {candidate}, compacted, and its original is not in the undo window "
                        "(any more): this is the exact one"
                    )
                return True
        return False

    def _link(self, work: _Work, st: os.stat_result) -> bool:
        """Make the name a hard link to a copy of the same file under another name, if there is one."""
        key = (st.st_dev, st.st_ino)
        rows = [self._links[key]] if key in self._links else []
        rows += [
            row
            for row in self._journal.of_inode(self._source, self._to.path, st.st_ino)
            if row.source != work.row.source and row.store == self._to.store_id
        ]
        name = work.row.dest.rpartition("/")[2]
        for row in rows:
            if (row.size, row.mtime_ns) != (st.st_size, st.st_mtime_ns):
                continue
            try:
                fd = beneath(self._to.fd, row.dest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError as error:
                self._raise_if_lost(error)
                continue
            linked = False
            try:
                work.row.sha256 = work.row.sha256 or copying.digest_past_cache(work.source)
                there = os.fstat(fd)
                if row.sha256 != work.row.sha256 or there.st_size != st.st_size:
                    continue
                proof = prove(fd, row.sha256)
                if proof not in ("read back", "undo window"):
                    continue
                above, _, other = row.dest.rpartition("/")
                directory = beneath(self._to.fd, above, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.link(other, name, src_dir_fd=directory, dst_dir_fd=work.folder, follow_symlinks=False)
                except FileExistsError:
                    st_name = os.stat(name, dir_fd=work.folder, follow_symlinks=False)
                    if not os.path.samestat(st_name, there):
                        continue  # other content, perhaps: the ordinary way finds out
                finally:
                    os.close(directory)
                if not _unchanged(Identity.of(work.found.st), os.fstat(work.source)):
                    raise copying.Changed
                linked = True
            except OSError as error:
                self._raise_if_lost(error)
                continue  # this filesystem makes no more links: then it is a copy
            finally:
                if not linked:
                    os.close(fd)
            work.copy, work.state = fd, "linked"
            work.row.verified_by = proof
            return True
        return False

    def _copy_symlink(self, work: _Work) -> None:
        target = self._read_link(work.found.path)
        if not target:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), work.found.path)
        st = work.found.st
        work.row.sha256 = os.fsencode(target)
        for candidate in sources.names_beside(work.found.path.rpartition("/")[2], first=True):
            try:
                os.symlink(target, candidate, dir_fd=work.folder)
            except FileExistsError:
                try:
                    same = os.readlink(candidate, dir_fd=work.folder) == target
                except OSError:
                    same = False
                if not same:
                    continue
                work.state, work.row.made, work.row.verified_by = "existing", False, "was there"
            else:
                with contextlib.suppress(PermissionError):
                    os.chown(candidate, st.st_uid, st.st_gid, dir_fd=work.folder, follow_symlinks=False)
                times = (st.st_atime_ns, st.st_mtime_ns)
                os.utime(candidate, ns=times, dir_fd=work.folder, follow_symlinks=False)
                work.state, work.row.verified_by = "copied", "read back"
            self._named(work, candidate)
            return

    def _named(self, work: _Work, name: str) -> None:
        above = work.row.dest.rpartition("/")[0]
        work.row.dest = f"{above}/{name}" if above else name

    def _was_made(self, work: _Work, there: os.stat_result, proof: str) -> bool:
        """Whether what lies in the destination came by an earlier, interrupted run of ours. In doubt it did not."""
        before = self._journal.earlier(self._source, work.row.source, self._to.path, work.row.id)
        if before is None or before.store != self._to.store_id:
            return False
        if before.state != "undone":
            return before.made and before.dest == work.row.dest and before.sha256 == work.row.sha256
        return before.note == _INTERRUPTED and proof == "read back" and there.st_ctime >= before.at - 1

    # ---- after the copies

    def _record(self, works: Sequence[_Work], folders: dict[str, int]) -> None:
        """Make names durable, then say so in the journal; a work that came to nothing leaves no row."""
        done = [work for work in works if work.state in ("copied", "existing", "linked")]
        try:
            for fd in {work.folder for work in done}:
                os.fsync(fd)
        except OSError as error:
            self._raise_if_lost(error)
            raise
        # What a mount that is gone could not remove, its ``begun`` row still knows.
        works = [work for work in works if not isinstance(work.fatal, DestinationLost)]
        nothing: list[Row] = []
        for work in works:
            row = work.row
            row.state = "verified"
            path, size = work.found.path, work.found.st.st_size
            if work.state == "copied" and work.found.kind == "symlink":
                self.report.symlinks += 1
            elif work.state == "copied":
                self.report.copied += 1
                self.report.copied_bytes += size
            elif work.state == "existing":
                self.report.existing += 1
            elif work.state == "linked":
                self.report.links += 1
            else:
                nothing.append(row)
                if work.state == "later":
                    self.report.later.append(Note(path=path, reason=work.reason))
                elif work.state == "failed":
                    self._fail(path, work.reason)
                continue
            if row.dest != row.source:
                self.report.beside.append(Note(path=path, reason=row.dest))
            self._tell(Progress(path, 1, size if work.found.kind == "file" else 0))
        self._journal.write([work.row for work in done], forget=nothing)
        faults.reach("migrate.recorded")

    def _touch(self, work: _Work) -> None:
        """What was asked for is done to the source, or the reason noted why not."""
        found, row = work.found, work.row
        if work.state == "copied" and work.reason:
            self.report.incomplete.append(Note(path=found.path, reason=work.reason))
        if row.wanted == "keep":
            row.state = "done"
            return
        parent, _, name = found.path.rpartition("/")
        try:
            if work.reason:
                raise sources.Left(work.reason)
            self._still_there(work)
            directory = beneath(self._source_fd, parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                expected = self._expected_now(work)
                fd = work.source if work.source >= 0 else None
                if row.wanted == "delete":
                    sources.delete(directory, name, expected, row.token, fd)
                elif row.wanted == "trash":
                    sources.trash(directory, name, expected, os.path.join(self._source, found.path), fd)
                elif fd is not None:
                    target = os.path.join(self._to.path, row.dest)
                    sources.replace_by_symlink(directory, name, expected, row.token, fd=fd, target=target)
            finally:
                os.close(directory)
        except sources.ChangedSince as error:
            row.state, row.note = "left", f"{_INTERRUPTED}: {error}"
            self.report.later.append(Note(path=found.path, reason=str(error)))
        except (sources.Left, OSError) as error:
            reason = _in_words(error) if isinstance(error, OSError) else str(error)
            row.state, row.note = "left", reason
            self.report.left.append(Note(path=found.path, reason=reason))
        else:
            row.state = "done"
            self.report.touched += 1

    def _expected_now(self, work: _Work) -> Identity:
        """The identity that the source must have. The change time of a file with several names moves when we touch
        another of them; all else must be as it was."""
        expected = Identity.of(work.found.st)
        if work.source < 0 or work.found.st.st_nlink == 1:
            return expected
        now = Identity.of(os.fstat(work.source))
        if not now.is_same_content(expected):
            raise sources.ChangedSince("it changed after it was copied")
        return now

    def _still_there(self, work: _Work) -> None:
        """The copy must still lie under its name: somebody may have removed it in the mount meanwhile."""
        name = work.row.dest.rpartition("/")[2]
        try:
            st = os.stat(name, dir_fd=work.folder, follow_symlinks=False)
        except FileNotFoundError:
            raise sources.Left("its copy was removed from the destination meanwhile") from None
        if work.copy >= 0:
            if not os.path.samestat(st, os.fstat(work.copy)):
                raise sources.Left("its copy was replaced in the destination meanwhile")
        elif os.readlink(name, dir_fd=work.folder) != os.fsdecode(work.row.sha256):
            raise sources.Left("its copy was replaced in the destination meanwhile")

    # ---- help

    def _check_room(self, size: int) -> None:
        space = os.statvfs(self._to.fd)
        free = space.f_bavail * space.f_frsize
        if free - size < self._throttle.min_free:
            raise NoRoom(
                f"{self._to.path}: {free / 1e9:.1f} GB are free, and {self._throttle.min_free / 1e9:.1f} GB have to "
                "stay free (min_free)"
            )

    def _drop_below(self, row: Row, part: str) -> None:
        if self._to.backing_fd < 0:
            return
        above = row.dest.rpartition("/")[0]
        with contextlib.suppress(OSError):
            fd = beneath(self._to.backing_fd, f"{above}/{part}" if above else part, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                copying.drop_pages(fd)
            finally:
                os.close(fd)

    def _read_link(self, path: str) -> str:
        above, _, name = path.rpartition("/")
        try:
            directory = beneath(self._source_fd, above, os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return ""
        try:
            return os.readlink(name, dir_fd=directory)
        except OSError:
            return ""
        finally:
            os.close(directory)

    def _is_there(self, path: str) -> bool:
        above, _, name = path.rpartition("/")
        try:
            directory = beneath(self._source_fd, above, os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return False
        try:
            os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        finally:
            os.close(directory)
        return True

    def _fail(self, path: str, reason: str) -> None:
        self.report.failed.append(Note(path=path, reason=reason))

    def _raise_if_lost(self, error: OSError) -> None:
        if error.errno in _GONE:
            raise DestinationLost(f"{self._to.path}: the mount is gone ({error.strerror})") from error

    # ---- recovery

    def _remove_part(self, row: Row) -> None:
        above = row.dest.rpartition("/")[0]
        with contextlib.suppress(FileNotFoundError):
            directory = beneath(self._to.fd, above, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.unlink(_part_name(row.token), dir_fd=directory)
            finally:
                os.close(directory)

    def _put_taken_back(self, row: Row) -> None:
        above, _, name = row.source.rpartition("/")
        taken = sources.taken_name(row.token)
        try:
            directory = beneath(self._source_fd, above, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        try:
            try:
                st = os.stat(taken, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                return
            if row.wanted == "symlink":
                ours = os.path.join(row.dest_root, row.dest)
                if stat.S_ISREG(st.st_mode) and self._read_link(row.source) == ours:
                    linux.renameat2(directory, taken, directory, name, linux.RENAME_EXCHANGE)
                    st = os.stat(taken, dir_fd=directory, follow_symlinks=False)
                if stat.S_ISLNK(st.st_mode) and os.readlink(taken, dir_fd=directory) == ours:
                    os.unlink(taken, dir_fd=directory)
                    return
            back = sources.put_back(directory, taken, directory, name)
            if back != name:
                log.warning("%s: put back as %s, since its name has been taken meanwhile", row.source, back)
        finally:
            os.close(directory)

    def _recover_folder(self, row: Row) -> None:
        """A folder that was made, and did not get its metadata."""
        if row.dest_root == self._to.path and row.store == self._to.store_id:
            self._folders[row.dest] = (msgspec.json.decode(row.metadata, type=Metadata), row)


def prove(fd: int, sha256: bytes) -> str:
    """What shows that these bytes are safe in the file of a mount that is open for reading, durably:

    ``read back``: it holds them, on disk; ``undo window``: it is compacted, and the store has the original;
    ``compacted``: it was made of them, but the original is gone; ``view``: only its rebuilt picture is the same; empty:
    nothing. Raises OSError.
    """
    original = _attribute(fd, "sha256_original")
    if original:
        if original == sha256.hex():
            return "undo window" if _attribute(fd, "undo_until") else "compacted"
        return "view" if _attribute(fd, "sha256_view") == sha256.hex() else ""
    os.fsync(fd)
    return "read back" if copying.digest_past_cache(fd) == sha256 else ""


def _attribute(fd: int, name: str) -> str:
    try:
        return os.getxattr(fd, f"user.esrfs.{name}").decode("ascii", "replace")
    except OSError as error:
        if error.errno in _GONE:
            raise
        return ""


def _unchanged(expected: Identity, st: os.stat_result) -> bool:
    found = Identity.of(st)
    return found == expected or (st.st_nlink > 1 and found.is_same_content(expected))


def _part_name(token: str) -> str:
    return f".esrfs-{token}.part"


def _in_words(error: OSError) -> str:
    return error.strerror or str(error)
