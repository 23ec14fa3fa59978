"""Putting a migration back: each source file as it was, verified; then its copy leaves the destination.

Where the copy was compacted meanwhile, what it shows is not the original any more: the original comes back from the
store's undo window (the mount is asked, as by ``esrfs restore``). What the window has no more can't be put back: it
is named, and its copy stays. A copy that somebody edited in the destination, or a source name that other content
has taken, is left as it is, and named.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Mapping

import msgspec

from esrfs import control
from esrfs.store import metadata
from esrfs.store.beneath import beneath
from esrfs.store.metadata import Metadata
from esrfs_daemon import copying, sources
from esrfs_daemon.copies import prove
from esrfs_daemon.copying import Identity
from esrfs_daemon.destination import Destination, make_folders
from esrfs_daemon.journal import Journal, Row
from esrfs_daemon.report import NO_FOLDER, Note, Progress, in_words
from esrfs_daemon.throttle import Stopped, Throttle


class UndoReport(msgspec.Struct, kw_only=True):
    """The keys of ``esrfs migrate --undo --json``."""

    restored: int = 0
    """Files and symlinks that are in the source again."""
    there: int = 0
    """Files that were in the source anyway, unchanged (verified)."""
    removed: int = 0
    """Copies that left the destination."""
    folders: int = 0
    """Folders that left the destination."""
    kept: list[Note] = []
    """Copies that stay in the destination, and why; their sources are in order."""
    failed: list[Note] = []
    """What could not be put back, and what is the case now."""


class _Impossible(Exception):  # noqa: N818
    """This file can't be put back; for people."""


class _Kept(Exception):  # noqa: N818
    """The copy stays; for people."""


class Undo:
    """Between one source and one destination; the caller holds ``Journal.holding(source)``."""

    def __init__(
        self,
        source: str,
        source_fd: int,
        destination: Destination,
        journal: Journal,
        throttle: Throttle,
        *,
        unfinished: Mapping[int, Note],
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """``unfinished``: rows that a crash has left in the middle, by id, and why they have to stay so."""
        self.report = UndoReport()
        self._unfinished = unfinished
        self._source = source
        self._source_fd = source_fd
        self._to = destination
        self._journal = journal
        self._throttle = throttle
        self._tell = tell
        self._names: dict[tuple[int, bytes], str] = {}
        """Inode that a source had, and its content → its path, now that it is back: its other names become links."""

    def run(self) -> None:
        """Put everything back. Raises Stopped between two files, JournalError after one (it is in the source again,
        verified, and the next ``--undo`` finds it there), OSError."""
        self.report.failed += self._unfinished.values()
        rows = [row for row in self._journal.to_undo(self._source, self._to.path) if row.id not in self._unfinished]
        if rows:
            self._journal.make_room()
        folders = [row for row in rows if row.kind == "directory"]
        for row in rows:
            if row.kind == "directory":
                continue
            if self._throttle.stop.is_set():
                raise Stopped
            try:
                if row.kind == "symlink":
                    self._undo_symlink(row)
                else:
                    self._undo_file(row)
            except _Kept as kept:
                self.report.kept.append(Note(path=row.source, reason=str(kept)))
            except _Impossible as failure:
                self.report.failed.append(Note(path=row.source, reason=str(failure)))
                continue
            except sources.ChangedSince:
                reason = f"its copy is being changed in the destination; it stays as {self._copy_path(row)}"
                self.report.kept.append(Note(path=row.source, reason=reason))
                continue  # another --undo looks at it anew
            except (sources.Left, copying.Changed, copying.NotTheSame, OSError) as error:
                reason = in_words(error) if isinstance(error, OSError) else str(error)
                self.report.failed.append(Note(path=row.source, reason=reason or "it changed meanwhile; try again"))
                continue
            row.state, row.note = "undone", ""
            self._journal.write([row])
            self._tell(Progress(row.source, 1, row.size))
        for row in sorted(folders, key=lambda row: row.source.count("/"), reverse=True):
            self._undo_folder(row)

    # ---- files

    def _undo_file(self, row: Row) -> None:
        directory, name = self._source_folder(row.source)
        try:
            self._put_taken_back(directory, name, row)
            if self._has_content(directory, name, row):
                os.fsync(directory)  # the name may have come by a run that was cut short
                self.report.there += 1
            elif row.state == "undoing" and not self._has_copy(row):
                return  # it had been put back, and people did something else with it since
            else:
                self._free_name(directory, name, row)
                self._restore(directory, name, row)
                self.report.restored += 1
            self._names[row.ino, row.sha256] = row.source
        finally:
            os.close(directory)
        self._remove_copy(row)

    def _has_content(self, directory: int, name: str, row: Row) -> bool:
        """Whether the source has the file as it was migrated, durably."""
        try:
            fd = copying.open_source(directory, name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return False
            raise
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode) or st.st_size != row.size:
                return False
            os.fsync(fd)
            return copying.digest_past_cache(fd) == row.sha256
        finally:
            os.close(fd)

    def _has_copy(self, row: Row) -> bool:
        try:
            os.close(self._open_there(row))
        except OSError as error:
            if error.errno in (errno.ENOENT, *NO_FOLDER):
                return False
            raise
        return True

    def _free_name(self, directory: int, name: str, row: Row) -> None:
        """The name must be free, or our symlink. Raises _Kept, _Impossible."""
        try:
            st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISLNK(st.st_mode) and os.readlink(name, dir_fd=directory) == self._copy_path(row):
            return
        if row.wanted == "keep" or row.state in ("left", "undoing"):
            raise _Kept(f"the source was changed after it was copied; the older one stays as {self._copy_path(row)}")
        raise _Impossible(f"something else has the name by now; the copy stays as {self._copy_path(row)}")

    def _restore(self, directory: int, name: str, row: Row) -> None:
        other = self._names.get((row.ino, row.sha256))
        if other is not None and self._link(directory, name, other, row):
            return
        if row.wanted == "trash" and self._from_trash(directory, name, row):
            return
        fd = self._open_copy(row)
        part = f".esrfs-{row.token}.part"
        try:
            st = os.fstat(fd)
            wanted = copying.snapshot(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part, dir_fd=directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(part, flags, 0o600, dir_fd=directory)
            try:
                copied = copying.copy(fd, target, st, self._throttle)
                copying.give(target, wanted)
                copying.make_durable(target)
                if copied != row.sha256 or copying.digest_past_cache(target) != row.sha256:
                    raise _Impossible(
                        f"what was read back is not what was written; the copy stays as {self._copy_path(row)}"
                    )
                self._give_name(directory, part, name, row)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part, dir_fd=directory)
                raise
            finally:
                os.close(target)
        finally:
            os.close(fd)
        os.fsync(directory)

    def _give_name(self, directory: int, part: str, name: str, row: Row) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                st = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if stat.S_ISLNK(st.st_mode) and os.readlink(name, dir_fd=directory) == self._copy_path(row):
                    sources.delete(directory, name, Identity.of(st), row.token, None)
            sources.move(directory, part, directory, name)
        except (sources.ChangedSince, FileExistsError):
            raise _Impossible(f"something else took the name; the copy stays as {self._copy_path(row)}") from None

    def _link(self, directory: int, name: str, other: str, row: Row) -> bool:
        above, _, base = other.rpartition("/")
        try:
            there = beneath(self._source_fd, above, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return False
        part = f".esrfs-{row.token}.part"
        try:
            os.link(base, part, src_dir_fd=there, dst_dir_fd=directory, follow_symlinks=False)
            self._give_name(directory, part, name, row)
        except (OSError, _Impossible):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part, dir_fd=directory)
            return False
        finally:
            os.close(there)
        os.fsync(directory)
        return True

    def _from_trash(self, directory: int, name: str, row: Row) -> bool:
        for path, info in sources.in_trash(os.path.join(self._source, row.source), directory):
            above, base = os.path.split(path)
            try:
                folder = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                if self._has_content(folder, base, row):
                    sources.move(folder, base, directory, name)
                    os.unlink(info)
                    os.fsync(directory)
                    return True
            except OSError:
                continue  # another way is left: the copy in the destination
            finally:
                os.close(folder)
        return False

    def _open_copy(self, row: Row) -> int:
        """The copy, open, holding the original's bytes; they are brought back where it was compacted."""
        for attempt in (1, 2):
            try:
                fd = self._open_there(row)
            except OSError as error:
                if error.errno not in (errno.ENOENT, *NO_FOLDER):
                    raise
                raise _Impossible(
                    f"its copy {self._copy_path(row)} is gone, too: it was moved or deleted there"
                ) from None
            proof = prove(fd, row.sha256)
            if proof == "read back":
                return fd
            os.close(fd)
            if proof == "undo window" and attempt == 1:
                self._bring_back(row)
            elif proof:
                raise _Impossible(
                    f"it was compacted, and its original is not in the store's undo window any more; the rebuilt "
                    f"picture stays as {self._copy_path(row)}"
                )
            else:
                break
        raise _Impossible(f"its copy was changed in the destination; it stays as {self._copy_path(row)}")

    def _bring_back(self, row: Row) -> None:
        socket = self._to.control_socket()
        if socket is None:
            raise _Impossible(
                "it was compacted, and the mount does not answer this user; its owner can bring it back: "
                f"esrfs restore {self._copy_path(row)}"
            )
        path = f"{self._to.relative}/{row.dest}" if self._to.relative else row.dest
        try:
            result = control.call(socket, "restore", paths=[path])["files"]
        except control.ControlError as error:
            raise _Impossible(f"it was compacted, and its original can't be brought back: {error}") from error
        for one in result:
            if one["state"] == "failed":
                raise _Impossible(f"it was compacted, and its original can't be brought back: {one['message']}")

    def _remove_copy(self, row: Row) -> None:
        """Only what this migration put there, and only if it still is that. Raises _Kept."""
        if not row.made:
            return
        try:
            fd = self._open_there(row)
        except OSError as error:
            if error.errno in (errno.ENOENT, *NO_FOLDER):
                return
            raise
        try:
            st = os.fstat(fd)  # before its content is looked at: what comes later is to be noticed
            if not prove(fd, row.sha256):
                raise _Kept(f"its copy was changed in the destination; it stays as {self._copy_path(row)}")
            expected, now = Identity.of(st), Identity.of(os.fstat(fd))
            if st.st_nlink > 1 and now.is_same_content(expected):
                expected = now  # its other names are being removed, too, which the mount may tell a moment late
            self._unlink_copy(row, expected, fd)
        finally:
            os.close(fd)

    # ---- symlinks and folders

    def _undo_symlink(self, row: Row) -> None:
        target = os.fsdecode(row.sha256)
        directory, name = self._source_folder(row.source)
        try:
            self._put_taken_back(directory, name, row)
            try:
                there = os.readlink(name, dir_fd=directory)
            except FileNotFoundError:
                os.symlink(target, name, dir_fd=directory)
                self._like_copy(directory, name, row)
                os.fsync(directory)
                self.report.restored += 1
            except OSError as error:
                raise _Impossible("something else has the name by now; the copy of the symlink stays") from error
            else:
                if there != target:
                    raise _Kept("the symlink was changed in the source; the older one stays in the destination")
                os.fsync(directory)
                self.report.there += 1
        finally:
            os.close(directory)
        if row.made:
            above, _, base = row.dest.rpartition("/")
            with contextlib.suppress(OSError):
                folder = beneath(self._to.fd, above, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    expected = Identity.of(os.stat(base, dir_fd=folder, follow_symlinks=False))
                    same = os.readlink(base, dir_fd=folder) == target
                finally:
                    os.close(folder)
                if same:
                    self._unlink_copy(row, expected, None)

    def _like_copy(self, directory: int, name: str, row: Row) -> None:
        above, _, base = row.dest.rpartition("/")
        with contextlib.suppress(OSError):
            folder = beneath(self._to.fd, above, os.O_RDONLY | os.O_DIRECTORY)
            try:
                st = os.stat(base, dir_fd=folder, follow_symlinks=False)
            finally:
                os.close(folder)
            os.utime(name, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=directory, follow_symlinks=False)
            os.chown(name, st.st_uid, st.st_gid, dir_fd=directory, follow_symlinks=False)

    def _undo_folder(self, row: Row) -> None:
        wanted = msgspec.json.decode(row.metadata, type=Metadata)
        try:
            source = beneath(self._source_fd, row.source, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            source = make_folders(self._source_fd, row.source)
        except OSError as error:
            self.report.failed.append(Note(path=row.source, reason=in_words(error)))
            return
        try:
            metadata.apply(source, wanted)
        except OSError as error:
            self.report.failed.append(Note(path=row.source, reason=in_words(error)))
        finally:
            os.close(source)
        above, _, base = row.dest.rpartition("/")
        try:
            folder = beneath(self._to.fd, above, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.rmdir(base, dir_fd=folder)
                self.report.folders += 1
            finally:
                os.close(folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return  # something else lies there, or what is named above; a later --undo may finish it
            self.report.kept.append(Note(path=row.source, reason=in_words(error)))
        row.state, row.note = "undone", ""
        self._journal.write([row])

    # ---- help

    def _source_folder(self, path: str) -> tuple[int, str]:
        above, _, name = path.rpartition("/")
        try:
            directory = make_folders(self._source_fd, above) if above else os.dup(self._source_fd)
        except OSError as error:
            if error.errno not in NO_FOLDER:
                raise
            raise _Impossible(
                f"{os.path.join(self._source, above)} is no folder any more ({in_words(error)}). Put the folder back, "
                "and give the command again"
            ) from error
        return directory, name

    def _open_there(self, row: Row) -> int:
        return beneath(self._to.fd, row.dest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)

    def _unlink_copy(self, row: Row, expected: Identity, fd: int | None) -> None:
        """If it still is the very file ``expected``; ``fd``: it, open, None for a symlink. Raises ChangedSince.

        The journal hears of it before: after a crash in between a migration would think that the copy is there.
        """
        above, _, base = row.dest.rpartition("/")
        folder = beneath(self._to.fd, above, os.O_RDONLY | os.O_DIRECTORY)
        before = row.state
        try:
            row.state = "undoing"
            self._journal.write([row])
            sources.delete(folder, base, expected, row.token, fd)
            self.report.removed += 1
        except sources.Left:
            row.state = before
            self._journal.write([row])
            raise
        finally:
            os.close(folder)

    def _put_taken_back(self, directory: int, name: str, row: Row) -> None:
        """What an interrupted ``--undo`` had just taken aside, in the source (``directory``) or in the destination, is
        looked at anew: it may be what somebody saved in that moment."""
        taken = sources.taken_name(row.token)
        with contextlib.suppress(FileNotFoundError):
            sources.put_back(directory, taken, directory, name)
        above, _, base = row.dest.rpartition("/")
        try:
            folder = beneath(self._to.fd, above, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno not in (errno.ENOENT, *NO_FOLDER):
                raise
            return  # the folder was moved away, with all that was in it
        try:
            with contextlib.suppress(FileNotFoundError):
                sources.put_back(folder, taken, folder, base)
        finally:
            os.close(folder)

    def _copy_path(self, row: Row) -> str:
        return os.path.join(self._to.path, row.dest)
