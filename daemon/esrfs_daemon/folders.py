"""The destination's folders: made where they are missing, given their times and modes once their content is there."""

from __future__ import annotations

import os

import msgspec

from esrfs.store import metadata
from esrfs.store.beneath import beneath
from esrfs.store.metadata import Metadata
from esrfs_daemon import copying
from esrfs_daemon.batch import Batch, Folder, Route
from esrfs_daemon.destination import lies_in_view, make_folders
from esrfs_daemon.journal import Row
from esrfs_daemon.nested import VIEW, Inside, NotMoved
from esrfs_daemon.report import Report, in_words, raise_if_lost


class Folders:
    """Of one migration. Used by its caller's thread only."""

    def __init__(self, route: Route, report: Report) -> None:
        self._route = route
        self._report = report
        self._unfinished: dict[str, tuple[Metadata, Row]] = {}
        """Those that get their metadata when their content is there."""
        self._unwritten: list[Row] = []
        self._known: set[str] = set()
        self._made: set[str] = set()

    def is_known(self, path: str) -> bool:
        return path in self._known

    def open(self, path: str, batch: Batch) -> Folder:
        """The folder ``path``, as long as the batch takes; made with all above it where it is missing. Raises
        NotMoved, OSError; FileNotFoundError, with nothing made, if the source has it no more.

        Rows of those that were made have to be written (``take_unwritten``) before anything comes into them.
        """
        if path in batch.folders:
            return batch.folders[path]

        def made(each: str) -> None:
            self._unwritten.append(self._begin(each))
            self._made.add(each)
            self._report.folders += 1

        to = self._route.to
        source_fd = self._open_source(path)
        try:
            fd = make_folders(to.fd, path, made) if path else os.dup(to.fd)
        except BaseException:
            if source_fd >= 0:
                os.close(source_fd)
            raise
        folder = batch.folders[path] = Folder(fd, source_fd, path in self._made)
        if path and path not in self._known and path not in self._unfinished:
            known = self._route.journal.latest(self._route.source, path, to.path)
            if known is not None and known.made and known.kind == "directory":
                self._begin(path, known)  # something new comes into it, so it gets its times again
        self._known.add(path)
        return folder

    def _open_source(self, path: str) -> int:
        if (inside := self._route.nested.around(path)) is not None:
            raise NotMoved(inside)
        try:
            fd = beneath(self._route.source_fd, path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise
        except OSError:
            return -1
        try:
            if os.fstat(fd).st_dev != os.fstat(self._route.source_fd).st_dev and lies_in_view(fd) is not None:
                raise NotMoved(Inside(path, VIEW))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def take_unwritten(self) -> list[Row]:
        """Rows of folders that were made since, for the journal."""
        rows, self._unwritten = self._unwritten, []
        return rows

    def _begin(self, path: str, row: Row | None = None) -> Row:
        fd = beneath(self._route.source_fd, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            wanted = copying.snapshot(fd)
            st = os.fstat(fd)
        finally:
            os.close(fd)
        row = row or Row(
            source_root=self._route.source,
            dest_root=self._route.to.path,
            store=self._route.to.store_id,
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
        self._unfinished[path] = (wanted, row)
        return row

    def recover(self, row: Row) -> None:
        """A folder that was made, and did not get its metadata."""
        if row.dest_root == self._route.to.path and row.store == self._route.to.store_id:
            self._unfinished[row.dest] = (msgspec.json.decode(row.metadata, type=Metadata), row)

    def finish(self) -> list[Row]:
        """Give them their metadata, the deepest first; rows to be written. Raises DestinationLost."""
        done = []
        for path in sorted(self._unfinished, key=lambda path: path.count("/"), reverse=True):
            wanted, row = self._unfinished[path]
            try:
                fd = beneath(self._route.to.fd, path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise_if_lost(error, self._route.to.path)
                self._report.fail(path, f"the folder's metadata can't be set ({in_words(error)})")
                continue
            try:
                metadata.apply(fd, wanted)
            except OSError as error:
                self._report.fail(path, f"the folder's metadata can't be set ({in_words(error)})")
            finally:
                os.close(fd)
            row.state = "done"
            done.append(row)
        self._unfinished.clear()
        self._unwritten.clear()
        self._known.clear()
        self._made.clear()
        return done
