"""Recovery: end what processes of this host that died had begun. Safe to repeat, and to be cut short at any point.

For each ledger whose writer is dead (its flock can be had) the pending steps are looked at one by one. What happened
is read from the files, by inode, kernel handle and content, never guessed from the order of events; then the step is
finished or undone, and that is recorded in the same ledger. What lies in staging and was made by esrfs goes; what
nothing explains is put aside in ``originals/found-…`` and reported, never deleted.

The principles: under the name stays the newest truth; a name that is gone stays gone; where the crash came between an
exchange and the look at what came out, the look is taken now.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from esrfs import faults
from esrfs.blob import container
from esrfs.store import exchange, ledger, metadata, originals, staging
from esrfs.store.beneath import beneath, open_parent
from esrfs.store.examine import examine
from esrfs.store.exchange import TakenBack
from esrfs.store.layout import RESERVED, Store
from esrfs.store.ledger import Done, FileMark, Found, Intent, ToPlain, Undone
from esrfs.store.plain import copy_over

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

FAULT_POINTS = ("recovery.begin", "recovery.step", "recovery.step_ended", "recovery.cleaned", "recovery.settled")


@dataclass
class Report:
    """What recovery did."""

    finished: list[str] = field(default_factory=list)
    """Paths of steps that had in effect happened."""
    undone: list[str] = field(default_factory=list)
    """Paths of steps that were taken back, or had not happened."""
    discarded: int = 0
    """Unfinished files of esrfs's own that were removed from staging."""
    found: list[str] = field(default_factory=list)
    """Names in ``originals/`` of things that nothing explained."""
    left: list[str] = field(default_factory=list)
    """Names in staging of such things that could not be put aside, since the ledger can't tell them."""
    damaged_records: int = 0
    living: int = 0
    """Ledgers of processes of this host that are alive; left to them."""
    problems: list[str] = field(default_factory=list)
    """For people: what could not be ended; the next recovery tries again."""


def recover(store: Store) -> Report:
    """End what dead processes of this host left behind. Several processes may do so at once.

    Only problems with the store's own directories raise (OSError); a step that can't be ended is reported instead.
    """
    report = Report()
    if store.readonly:
        return report
    faults.reach("recovery.begin")
    living = {store.session}
    for name in sorted(os.listdir(store.ledger_fd)):
        host, _, rest = name.partition("-")
        boot, _, session = rest.partition("-")
        if host != store.host or not session or session == store.session:
            continue
        try:
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=store.ledger_fd)
        except FileNotFoundError:
            continue  # its process ended, or another recovery settled it, a moment ago
        try:
            if _is_alive(fd, boot == store.boot):
                living.add(session)
                report.living += 1
            else:
                _recover_session(store, name, session, fd, report)
        finally:
            os.close(fd)
    _put_strangers_aside(store, living, report)
    faults.reach("recovery.settled")
    return report


def _is_alive(fd: int, same_boot: bool) -> bool:
    try:
        locked = ledger.lock(fd)
    except BlockingIOError:
        return True
    # Without flock nobody can tell; but a process of an earlier boot is surely gone.
    return not locked and same_boot


def _recover_session(store: Store, name: str, session: str, fd: int, report: Report) -> None:
    """``fd``: the dead process's ledger, locked."""
    reading = ledger.read_fd(fd)
    report.damaged_records += reading.damaged
    ended = True
    for step in ledger.pending(reading.records):
        faults.reach("recovery.step")
        path = ledger.unquote(step.path)
        try:
            why = _end_swap(store, step, report) if isinstance(step, Intent) else _end_plain(store, step, report)
            ledger.append_to(fd, Undone(job=step.job, why=why) if why else Done(job=step.job), fsync=True)
            (report.undone if why else report.finished).append(path)
        except OSError as error:
            ended = False
            report.problems.append(
                f"{path}: an unfinished step could not be ended ({error}). Nothing is lost: what is missing under its "
                f"name lies in {RESERVED}/staging. The next mount tries again."
            )
        faults.reach("recovery.step_ended")
    pending = {step.staging for step in ledger.pending(ledger.read_fd(fd).records)}
    for staged in staging.entries(store):
        if staged.session == session and staged.name not in pending:
            _clean(store, staged, fd, reading.damaged, report)
    faults.reach("recovery.cleaned")
    if ended:
        with suppress(FileNotFoundError):  # its process settled it itself, and ended, between our look and our lock
            ledger.settle(store.ledger_fd, name)


def _clean(store: Store, staged: staging.Staged, ledger_fd: int, damaged: int, report: Report) -> None:
    """A staging file that no step speaks of: its process died before the step began. Looked at once more, even so."""
    why = "the ledger that spoke of it is damaged" if damaged else _why_not_ours(store, staged)
    if why:
        aside = staging.put_aside(store, staged.name, why)
        ledger.append_to(ledger_fd, Found(name=aside, why=why), fsync=True)
        report.found.append(aside)
    else:
        staging.remove(store, staged.name)
        report.discarded += 1


def _why_not_ours(store: Store, staged: staging.Staged) -> str | None:
    """None if the file looks like what esrfs makes in staging and can make again; else why it is kept, for people."""
    st = os.stat(staged.name, dir_fd=store.staging_fd, follow_symlinks=False)
    if not stat.S_ISREG(st.st_mode) or st.st_nlink != 1:
        return "it is not a file that esrfs makes"
    if st.st_size == 0:
        return None
    if staged.kind == "removed":
        return "it was deleted or replaced in the second before the crash, while a program had it open"
    fd = os.open(staged.name, _READ, dir_fd=store.staging_fd)
    try:
        # An AVIF picture begins with a box of type "ftyp": so does every blob, and no original that esrfs compacts.
        avif = os.pread(fd, 4, 4) == b"ftyp"
        whole_blob = container.read_footer(fd, st.st_size, store.config.id_bytes, store.config.key_bytes) is not None
    finally:
        os.close(fd)
    if staged.kind == "blob" and not avif:
        return "it may be an original"
    if staged.kind == "plain" and whole_blob:
        return "it is a blob that nothing else may stand for"
    return None


def _put_strangers_aside(store: Store, living: set[str], report: Report) -> None:
    """What no process of esrfs would have put there, or whose ledger is gone."""
    # In this order: a session's ledger is there before its first staging file, and after its last.
    lying = staging.entries(store)
    known = living | {name.rpartition("-")[2] for name in os.listdir(store.ledger_fd)}
    for staged in lying:
        if staged.session not in known:
            if not staged.can_be_put_aside:
                report.left.append(staged.name)
                continue
            try:
                aside = staging.put_aside(store, staged.name, "nothing explains it")
            except FileNotFoundError:
                continue  # its process has just ended, and had removed it before
            report.found.append(aside)


# ---- one step: None when it had in effect happened, else why it counts as undone


def _end_swap(store: Store, step: Intent, report: Report) -> str | None:
    with ExitStack() as stack:
        held = stack.enter_context(_open(store.staging_fd, step.staging))
        directory, name = stack.enter_context(_place(store, step, search=held.exists and not held.is_inode(step.blob)))
        named = stack.enter_context(_open(directory, name))
        kept = stack.enter_context(_open(store.originals_fd, step.kept))
        if kept.is_inode(step.blob):
            # The crash came while the step was taken back from the window: the original has its name again.
            os.rename(step.kept, step.staging, src_dir_fd=store.originals_fd, dst_dir_fd=store.staging_fd)
            return _discard(store, step.staging, step.blob, report, "it was being taken back")
        if kept.is_same(named):
            # An exclusive store: linked into the window, not yet replaced.
            os.unlink(step.kept, dir_fd=store.originals_fd)
            os.fsync(store.originals_fd)
            return _discard(store, step.staging, step.blob, report, "the blob did not have the name yet")
        if held.is_inode(step.blob) or not (held.exists or kept.exists):
            return _discard(store, step.staging, step.blob, report, "the blob did not have the name yet, or no more")
        if not held.exists:
            _sync(store, directory)
            return None
        intact = held.as_marked(step.original) and held.sha256() == step.sha256_original
        if not named.is_inode(step.blob):
            # The blob was deleted, replaced or renamed since: that is the newer truth. The original goes where it was
            # going; something newer that the exchange had brought out is put aside.
            return _end_without_name(store, step, intact, report)
        if intact and _is_good(named, step):
            _keep(store, step)
            _sync(store, directory)
            return None
        if held.is_inode(step.original) and not named.as_marked(step.blob):
            # Both were changed. What is under the name is what people see and go on with.
            report.found.append(staging.put_aside(store, step.staging, "it was changed while it was being replaced"))
            return None
        return _back(store, step, named, (directory, name), report)


def _end_without_name(store: Store, step: Intent, intact: bool, report: Report) -> str | None:
    if intact:
        _keep(store, step)
        return None
    report.found.append(staging.put_aside(store, step.staging, "the name it had was deleted or replaced"))
    return "its name was deleted or replaced"


def _back(store: Store, step: Intent | ToPlain, named: _Seen, place: tuple[int, str], report: Report) -> str:
    """Exchange back what came out of an exchange that nobody could look at any more."""
    assert named.st is not None
    taken = exchange.take_back(store.staging_fd, step.staging, *place, named.st)
    _sync(store, place[0])
    if taken is TakenBack.RESTORED:
        placed = step.blob if isinstance(step, Intent) else step.plain
        return _discard(store, step.staging, placed, report, "what came out was not what had been recorded")
    report.found.append(staging.put_aside(store, step.staging, "the name it had was deleted or replaced"))
    return "its name was deleted or replaced"


def _is_good(named: _Seen, step: Intent) -> bool:
    """Is the blob under the name either what was verified, or changed by somebody since (and then theirs)?"""
    return not named.as_marked(step.blob) or named.sha256() == step.sha256_blob


def _keep(store: Store, step: Intent) -> None:
    os.rename(step.staging, step.kept, src_dir_fd=store.staging_fd, dst_dir_fd=store.originals_fd)
    os.fsync(store.originals_fd)
    os.fsync(store.staging_fd)


def _end_plain(store: Store, step: ToPlain, report: Report) -> str | None:
    if step.in_place:
        return _end_in_place(store, step, report)
    with ExitStack() as stack:
        held = stack.enter_context(_open(store.staging_fd, step.staging))
        directory, name = stack.enter_context(_place(store, step, search=held.exists and not held.is_inode(step.plain)))
        named = stack.enter_context(_open(directory, name))
        if held.is_inode(step.plain):
            return _discard(store, step.staging, step.plain, report, "the plain file did not have the name yet")
        if not held.exists:
            return None
        if not named.is_inode(step.plain):
            report.found.append(staging.put_aside(store, step.staging, "the name it had was deleted or replaced"))
            return None
        if not held.is_inode(step.blob):
            return _back(store, step, named, (directory, name), report)
        if named.as_marked(step.plain):
            metadata.apply(named.fd, metadata.snapshot(held.fd))  # should a chmod have come at the last moment
        _sync(store, directory)
        _discard(store, step.staging, step.blob, report, "")
        return None


def _end_in_place(store: Store, step: ToPlain, report: Report) -> str | None:
    """The blob's own inode was being overwritten from a complete copy, which is in staging still unless it was done."""
    with ExitStack() as stack:
        held = stack.enter_context(_open(store.staging_fd, step.staging))
        if not held.exists:
            return None
        target = stack.enter_context(_inode(store, step.path, step.blob))
        if target is None:
            report.found.append(
                staging.put_aside(store, step.staging, "the file that it belongs to is not to be found")
            )
            return "the file was not found"
        if held.sha256() != step.sha256_plain:
            report.found.append(staging.put_aside(store, step.staging, "it is not what it was when it was recorded"))
            return "the copy is not what it was"
        # What is looked at is what the disk has: pages may hold more than a failed fsync ever wrote.
        os.fsync(target)
        os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)
        if originals.sha256_of(target).hex() != step.sha256_plain:
            st = os.fstat(target)
            mtimes = (step.blob.mtime_ns, step.plain.mtime_ns)  # a recovery before this one may have got so far
            if st.st_size == step.blob.size and st.st_mtime_ns in mtimes and _is_sound(store, target, st):
                os.utime(target, ns=(st.st_atime_ns, step.plain.mtime_ns))  # which reserving room had changed
                return _discard(store, step.staging, step.plain, report, "the process died before it wrote a byte")
            report.found.append(_copy_aside(store, target))
            copy_over(held.fd, target)
        os.utime(target, ns=(os.fstat(target).st_atime_ns, step.plain.mtime_ns))
        os.fsync(target)
        staging.remove(store, step.staging)
        return None


def _is_sound(store: Store, fd: int, st: os.stat_result) -> bool:
    """Whether this is a whole blob, by its checksums. Its size and mtime don't tell: a power cut during an fsync leaves
    them as they were over blocks that were overwritten already, since the inode is written last."""
    info = examine(store, fd, st)
    if info is None:
        return False
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        try:
            return container.unpack(file.read()).recipe.original_size == info.view_size
        except ValueError:
            return False


def _copy_aside(store: Store, target: int) -> str:
    """A half overwritten file is about to be completed; should it be something else after all, this is what it was."""
    fd, name = staging.create(store, "plain")
    try:
        copy_over(target, fd)
        os.fsync(fd)
    except BaseException:
        staging.remove(store, name)
        raise
    finally:
        os.close(fd)
    return staging.put_aside(store, name, "half overwritten; it was then completed from the copy in staging")


def _discard(store: Store, name: str, known: FileMark, report: Report, why: str) -> str:
    """Remove a file of our own from staging, if it is there still, and unchanged."""
    existed = staging.look(store.staging_fd, name) is not None
    aside = staging.discard(store, name, known)
    if aside:
        report.found.append(aside)
    elif existed:
        report.discarded += 1
    return why


# ---- looking


@dataclass
class _Seen:
    """What a name stands for now. ``fd`` is -1 for what is no file, or can't be opened."""

    st: os.stat_result | None
    fd: int

    @property
    def exists(self) -> bool:
        return self.st is not None

    def is_same(self, other: _Seen) -> bool:
        return (
            self.st is not None
            and other.st is not None
            and (self.st.st_dev, self.st.st_ino) == (other.st.st_dev, other.st.st_ino)
        )

    def is_inode(self, known: FileMark) -> bool:
        return self.fd >= 0 and metadata.same_inode(self.fd, known)

    def as_marked(self, known: FileMark) -> bool:
        """The same inode, unchanged as far as stat and xattrs tell."""
        return self.is_inode(known) and metadata.same_content(self.fd, known) and self.metadata() == known.metadata

    def metadata(self) -> str:
        return metadata.digest(metadata.snapshot(self.fd))

    def sha256(self) -> str:
        return originals.sha256_of(self.fd).hex()


@contextmanager
def _open(directory: int, name: str) -> Iterator[_Seen]:
    st = staging.look(directory, name) if directory >= 0 else None
    fd = -1
    if staging.is_file(st):
        with _unless_in_passing():
            fd = os.open(name, _READ, dir_fd=directory)
    try:
        yield _Seen(st, fd)
    finally:
        if fd >= 0:
            os.close(fd)


@contextmanager
def _place(store: Store, step: Intent | ToPlain, search: bool) -> Iterator[tuple[int, str]]:
    """The directory of the step's name (a descriptor; -1 when it is gone) and the name in it.

    ``search``: look for the directory all over the store if it has been renamed.
    """
    path = ledger.unquote(step.path)
    name = path.rpartition("/")[2]
    with ExitStack() as stack:
        directory = -1
        with _unless_in_passing():
            directory = stack.enter_context(open_parent(store.root_fd, path))[0]
        if directory < 0 or os.fstat(directory).st_ino != step.parent_ino:
            directory = -1
            moved = next((path for path, st in _directories(store) if st.st_ino == step.parent_ino), None)
            if search and moved is not None:
                directory = stack.enter_context(open_parent(store.root_fd, f"{moved}/x" if moved else "x"))[0]
        yield directory, name


def _directories(store: Store) -> Iterator[tuple[str, os.stat_result]]:
    for top, _, fd in _walk(store):
        yield top[2:], os.fstat(fd)


def _walk(store: Store) -> Iterator[tuple[str, list[str], int]]:
    """``(folder, names of files in it, its descriptor)`` all over the store. Raises OSError."""

    def pass_over(error: OSError) -> None:
        with _unless_in_passing():
            raise error

    for top, names, files, fd in os.fwalk(".", onerror=pass_over, dir_fd=store.root_fd, follow_symlinks=False):
        if top == ".":
            names[:] = [name for name in names if name != RESERVED]
        yield top, files, fd


@contextmanager
def _unless_in_passing() -> Iterator[None]:
    """What can't be opened for its own sake is not what is looked for; else the step waits for the next recovery."""
    try:
        yield
    except OSError as error:
        if not staging.tells_of_file(error):
            raise


@contextmanager
def _inode(store: Store, path: str, known: FileMark) -> Iterator[int | None]:
    """A descriptor (O_RDWR) of the very inode that was marked, wherever it is in the store now; None if it is gone."""
    fd = _find_inode(store, path, known)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _find_inode(store: Store, path: str, known: FileMark) -> int | None:
    if path:
        with _unless_in_passing():
            fd = _if_same(beneath(store.root_fd, ledger.unquote(path), os.O_RDWR | os.O_NONBLOCK), known)
            if fd is not None:
                return fd
    if not known.handle:
        return None  # elsewhere, the number alone could be another file's
    for _, files, directory in _walk(store):
        for name in files:
            st = staging.look(directory, name)
            if st is not None and stat.S_ISREG(st.st_mode) and st.st_ino == known.ino:
                with _unless_in_passing():
                    fd = _if_same(os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), known)
                    if fd is not None:
                        return fd
    return None


def _if_same(fd: int, known: FileMark) -> int | None:
    """``fd``, if it is the inode that was marked; else None, and it is closed. Raises OSError."""
    try:
        if metadata.same_inode(fd, known):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _sync(store: Store, directory: int) -> None:
    if directory >= 0:
        os.fsync(directory)
    os.fsync(store.staging_fd)
