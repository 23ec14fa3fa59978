"""One file into the destination: as a part file first, and under its name once it is durable and was read back equal.

Small files take these steps together with the rest of their batch (``write``, then ``durable``, then ``settle``); a
large one takes them alone (``whole``). Copies stay open until the batch is over: a mount swaps no file that is open, so
what was verified is what lies there while its source goes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable

from esrfs import faults
from esrfs.store.beneath import beneath
from esrfs_daemon import copying, durable, sources
from esrfs_daemon.batch import Route, Work
from esrfs_daemon.copying import Identity
from esrfs_daemon.journal import INTERRUPTED, Row
from esrfs_daemon.report import FULL, GONE, MEANWHILE, DestinationLost, NoRoom, in_words, raise_if_lost
from esrfs_daemon.throttle import Stopped

log = logging.getLogger("esrfs.daemon")

FAULT_POINTS = (*copying.FAULT_POINTS, "migrate.placed")

SMALL = 1 << 20
"""Bytes below which a file is written and read back in one call each."""


class Copies:
    """Of one migration. Its steps run on any thread, each call on a work of its own; but those of names of one file
    (``Work.is_alone``) one after the other."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._links: dict[tuple[int, int], Row] = {}
        """Rows of files with several names, by inode."""

    def forget_links(self) -> None:
        self._links.clear()

    def attempt(self, how: Callable[[Work], None], work: Work) -> None:
        """``how(work)``; what goes wrong becomes the work's state, and its part file goes."""
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
            work.state, work.reason = "later", MEANWHILE
        except OSError as error:
            work.state, work.reason = "failed", in_words(error)
            if error.errno in GONE:
                work.fatal = DestinationLost(f"{self._route.to.path}: the mount is gone ({error.strerror})")
            elif error.errno in FULL:
                work.fatal = NoRoom(f"{self._route.to.path}: {error.strerror}")
        if work.state != "written":
            work.discard()

    # ---- the steps

    def write(self, work: Work) -> None:
        """Content and metadata into the part file; not durable yet. Where the destination has this content already,
        the work is done."""
        if self._route.throttle.stop.is_set():
            raise Stopped
        found, row = work.found, work.row
        parent, _, name = found.path.rpartition("/")
        work.source = self._open_source(work, parent, name)
        st = os.fstat(work.source)
        if not _unchanged(work, st):
            raise copying.Changed
        if copying.is_being_written(work.source):
            work.state, work.reason = "later", "a program has it open for writing"
            return
        if st.st_nlink > 1 and self._link(work, st):
            return
        if not work.folder.made and self._take_existing(work, name, st):
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        if st.st_size < SMALL:
            # Past the kernel's pages of the mount's file, at writing and at reading back: they need not be dropped.
            flags |= os.O_DIRECT
        wanted = copying.snapshot(work.source)
        # Nobody may read it before who may read it afterwards.
        mode = wanted.mode & 0o777 if (wanted.uid, wanted.gid) == (os.geteuid(), os.getegid()) else 0o600
        work.has_part = True
        work.copy = os.open(work.part, flags, mode, dir_fd=work.folder.fd)
        if work.folder.gives is None:
            work.folder.gives = copying.has_attributes(work.copy)
        row.sha256 = copying.copy(work.source, work.copy, st, self._route.throttle)
        work.lacks = copying.give(work.copy, wanted, plain=not work.folder.gives) or ""
        work.state = "written"

    def sync(self, work: Work) -> None:
        """Make the part file durable, through the mount."""
        copying.make_durable(work.copy)

    def drop(self, work: Work) -> None:
        """The part file is durable: let its pages be forgotten, here and in the store's directory."""
        copying.drop_pages(work.copy)
        if work.below < 0:
            durable.find_below(work, self._route.to)
        if work.below >= 0:
            copying.drop_pages(work.below)

    def settle(self, work: Work) -> None:
        """The part file is durable, and its pages were dropped: read it back, and give it its name."""
        st = work.found.st
        is_copy = copying.is_copy(work.source, work.copy, st.st_size, work.row.sha256)
        if not _unchanged(work, os.fstat(work.source)):
            raise copying.Changed
        if not is_copy:
            raise copying.NotTheSame(
                "the copy was read back with other bytes than were written, and was removed; the source is "
                "untouched. The destination's disk or the machine's memory may be failing"
            )
        if not self._place(work, st):
            return
        work.state, work.row.verified_by = "copied", "read back"
        if st.st_nlink > 1:
            self._links[st.st_dev, st.st_ino] = work.row

    def whole(self, work: Work) -> None:
        self.write(work)
        if work.state == "written":
            self.sync(work)
            self.drop(work)
            self.settle(work)

    def symlink(self, work: Work) -> None:
        target = sources.read_link(self._route.source_fd, work.found.path)
        if not target:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), work.found.path)
        st = work.found.st
        folder = work.folder.fd
        work.row.sha256 = os.fsencode(target)
        for candidate in sources.names_beside(work.found.path.rpartition("/")[2], first=True):
            try:
                os.symlink(target, candidate, dir_fd=folder)
            except FileExistsError:
                try:
                    same = os.readlink(candidate, dir_fd=folder) == target
                except OSError:
                    same = False
                if not same:
                    continue
                work.state, work.row.made, work.row.verified_by = "existing", False, "was there"
            else:
                with contextlib.suppress(PermissionError):
                    os.chown(candidate, st.st_uid, st.st_gid, dir_fd=folder, follow_symlinks=False)
                times = (st.st_atime_ns, st.st_mtime_ns)
                os.utime(candidate, ns=times, dir_fd=folder, follow_symlinks=False)
                work.state, work.row.verified_by = "copied", "read back"
            work.named(candidate)
            return

    # ---- help

    def _open_source(self, work: Work, parent: str, name: str) -> int:
        if work.folder.source_fd >= 0:
            return copying.open_source(work.folder.source_fd, name)
        directory = beneath(self._route.source_fd, parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return copying.open_source(directory, name)
        finally:
            os.close(directory)

    def _place(self, work: Work, st: os.stat_result) -> bool:
        """Give the verified copy its name, or one beside it; False where the same content lies there by now."""
        name = work.row.dest.rpartition("/")[2]
        for candidate in sources.names_beside(name, first=True):
            try:
                sources.move(work.folder.fd, work.part, work.folder.fd, candidate)
            except FileExistsError:
                if self._take_existing(work, candidate, st, only=True):
                    return False
                continue
            work.has_part = False
            work.named(candidate)
            faults.reach("migrate.placed")
            return True
        raise OSError(errno.EEXIST, "no free name", name)

    def _take_existing(self, work: Work, name: str, st: os.stat_result, only: bool = False) -> bool:
        """Whether this content lies under the name, or one beside it, already; then the work is done.

        ``only``: look at just this name."""
        for candidate in (name,) if only else sources.names_beside(name, first=True):
            try:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open(candidate, flags, dir_fd=work.folder.fd)
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno in GONE:
                    raise
                continue  # a symlink, or something that can't be read: not this content
            proof = lacks = ""
            made = False
            try:
                there = os.fstat(fd)
                if stat.S_ISREG(there.st_mode) and there.st_size == st.st_size:
                    if not work.row.sha256:
                        work.row.sha256 = copying.digest_past_cache(work.source)
                        if not _unchanged(work, os.fstat(work.source)):
                            raise copying.Changed
                    found = prove(fd, work.row.sha256)
                    if found:
                        made, same = self._was_made(work, candidate, there, found)
                        lacks = copying.lacking(copying.snapshot(work.source), copying.snapshot(fd), made=same)
                    proof = found
            finally:
                if not proof:
                    os.close(fd)
            if proof:
                if work.copy >= 0:
                    os.close(work.copy)
                work.copy, work.state, work.reason, work.lacks = fd, "existing", "", lacks
                work.named(candidate)
                work.row.verified_by = "undo window" if proof == "undo window" else "was there"
                work.row.made = made
                if proof in ("compacted", "view"):
                    work.reason = (
                        f"the destination has it as {candidate}, compacted, and its original is not in the undo window "
                        "(any more): this is the exact one"
                    )
                return True
        return False

    def _was_made(self, work: Work, name: str, there: os.stat_result, proof: str) -> tuple[bool, bool]:
        """Whether what lies in the destination as ``name`` came by an earlier run of ours, in doubt not; and whether of
        the source as it is now, as far as its time tells."""
        before = self._route.journal.earlier(self._route.source, work.row.source, self._route.to.path, work.row.id)
        if before is None or before.store != self._route.to.store_id:
            return False, False
        if before.state != "undone":
            made = before.made and before.dest == work.destination(name) and before.sha256 == work.row.sha256
        else:
            made = before.note == INTERRUPTED and proof == "read back" and there.st_ctime >= before.at - 1
        return made, made and before.mtime_ns == work.found.st.st_mtime_ns

    def _link(self, work: Work, st: os.stat_result) -> bool:
        """Make the name a hard link to a copy of the same file under another name, if there is one."""
        to = self._route.to
        key = (st.st_dev, st.st_ino)
        rows = [self._links[key]] if key in self._links else []
        rows += [
            row
            for row in self._route.journal.of_inode(self._route.source, to.path, st.st_ino)
            if row.source != work.row.source and row.store == to.store_id
        ]
        name = work.row.dest.rpartition("/")[2]
        for row in rows:
            if (row.size, row.mtime_ns) != (st.st_size, st.st_mtime_ns):
                continue
            try:
                fd = beneath(to.fd, row.dest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError as error:
                raise_if_lost(error, to.path)
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
                lacks = copying.lacking(copying.snapshot(work.source), copying.snapshot(fd), made=row.made)
                above, _, other = row.dest.rpartition("/")
                directory = beneath(to.fd, above, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.link(other, name, src_dir_fd=directory, dst_dir_fd=work.folder.fd, follow_symlinks=False)
                except FileExistsError:
                    st_name = os.stat(name, dir_fd=work.folder.fd, follow_symlinks=False)
                    if not os.path.samestat(st_name, there):
                        continue  # other content, perhaps: the ordinary way finds out
                finally:
                    os.close(directory)
                if not _unchanged(work, os.fstat(work.source)):
                    raise copying.Changed
                linked = True
            except OSError as error:
                raise_if_lost(error, to.path)
                continue  # this filesystem makes no more links: then it is a copy
            finally:
                if not linked:
                    os.close(fd)
            work.copy, work.state, work.lacks = fd, "linked", lacks
            work.row.verified_by = proof
            return True
        return False


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
        if error.errno in GONE:
            raise
        return ""


def _unchanged(work: Work, st: os.stat_result) -> bool:
    expected, found = Identity.of(work.found.st), Identity.of(st)
    return found == expected or (st.st_nlink > 1 and found.is_same_content(expected))
