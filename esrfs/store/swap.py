"""The compare-and-swaps: blob for original (:func:`swap_in`), plain file for blob (:func:`materialise`,
:func:`restore`).

What all of them keep: at every moment, and after a crash at any moment, there is under the name either what was there
or its complete, fsynced successor; a name that vanished stays gone; a name that somebody gave to another file keeps
that file; and what came out of an exchange is looked at before anything is concluded. Nothing is removed but files
that were made here, and those only unchanged (``staging.discard``). ``recovery.py`` ends what a crash cut short, by
the ledger.

Order of locks: the caller's ``barrier`` before the lease, never the reverse: a thread that holds the barrier and opens
the file for writing would wait for the lease, and we for the thread.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

from esrfs import faults
from esrfs.blob.recipe import Recipe
from esrfs.store import exchange, ledger, linux, metadata, originals, staging
from esrfs.store.beneath import beneath, open_parent
from esrfs.store.errors import Problem, StoreError
from esrfs.store.examine import examine, recipe_of
from esrfs.store.exchange import TakenBack
from esrfs.store.identity import Identity
from esrfs.store.layout import Store, StoreConfig
from esrfs.store.ledger import Done, Intent, ToPlain, Undone
from esrfs.store.metadata import Metadata

_log = logging.getLogger(__name__)

FAULT_POINTS = (
    "swap.begin",
    "swap.written",
    "swap.synced",
    "swap.verified",
    "swap.intended",
    "swap.leased",
    "swap.checked",
    "swap.exchanged",
    "swap.looked",
    "swap.directories_synced",
    "swap.kept",
    "swap.kept_synced",
    "swap.done",
)
"""Of :func:`swap_in`, in the order in which they are reached."""

PLAIN_FAULT_POINTS = (
    "plain.begin",
    "plain.written",
    "plain.synced",
    "plain.intended",
    "plain.exchanged",
    "plain.in_place",
    "plain.looked",
    "plain.discarded",
    "plain.done",
)
"""Of :func:`materialise` and :func:`restore`; ``plain.exchanged`` and ``plain.in_place`` exclude each other."""

_CHUNK = 1 << 20
_ATTEMPTS = 4
_FIXED = (errno.EACCES, errno.EPERM, errno.EXDEV, errno.EINVAL)
"""What an exchange answers where it can't be done: a protected directory, an immutable file, another filesystem."""


class SwapStatus(enum.StrEnum):
    DONE = "done"
    CHANGED = "changed"
    """The name no longer stands for the content that was compacted: the newer truth wins."""
    BUSY = "busy"
    """Somebody has the file open for writing, or the mount asked to leave it alone: try again later."""
    HARD_LINKS = "hard_links"
    METADATA = "metadata"
    """Owner, mode, ACL, xattrs or times can't be carried over: a verdict."""
    UNAVAILABLE = "unavailable"
    """This filesystem, or this user on it, can't do the compare-and-swap for this file."""
    LEASE_LOST = "lease_lost"
    """Another machine compacts now."""


@dataclass(frozen=True)
class SwapResult:
    status: SwapStatus
    message: str = ""
    """For people; empty for DONE."""
    blob: Identity | None = None
    """DONE: what is under the name now."""
    kept: str = ""
    """DONE: the original's name in ``originals/``."""


class SwapMode(enum.Enum):
    EXCHANGE = enum.auto()
    LINK = enum.auto()


_LINK = SwapMode.LINK


def swap_mode(config: StoreConfig) -> SwapMode | None:
    """How originals are replaced in this store; None: compaction is off until the owner says ``--exclusive``."""
    probe = config.probe
    if probe.exchange and (probe.leases or config.exclusive):
        return SwapMode.EXCHANGE
    if config.exclusive and probe.links:
        return SwapMode.LINK
    return None


class _GiveUp(Exception):  # noqa: N818
    """The swap is not to be done; everything is to be as it was."""

    def __init__(self, status: SwapStatus, message: str) -> None:
        super().__init__(message)
        self.result = SwapResult(status, message)


def swap_in(  # noqa: PLR0917
    store: Store,
    path: str,
    source_fd: int,
    expected: Identity,
    blob: bytes,
    sha256_original: bytes,
    *,
    lease_ok: Callable[[], bool],
    interrupted: Callable[[], bool],
    barrier: AbstractContextManager[object] | None = None,
) -> SwapResult:
    """Replace the original at ``path`` by ``blob``, if it is still the very file that was compacted.

    ``source_fd``: the original, opened O_RDONLY (a lease is taken on it). ``expected``: its identity when its bytes
    were read for compaction; ``sha256_original``: of those bytes, 32 bytes. ``lease_ok``: does this process still hold
    the compactor's lease? ``interrupted``: has the mount opened the file, or does it want compaction to stop? Asked
    several times, the last inside ``barrier``, a lock of the caller's that is held from the last check until after the
    exchange was looked at (milliseconds): while it is held, the mount should open no handle for this file.

    Returns what became of it; only DONE changed anything. Raises OSError (ENOSPC, EIO …) with everything as it was,
    or, when taking back failed too, with a step pending in the ledger that the next recovery ends; StoreError in a
    read-only store.
    """
    how = swap_mode(store.config)
    if how is None:
        return SwapResult(
            SwapStatus.UNAVAILABLE,
            "compaction is off: this filesystem lacks atomic exchange or leases. If only esrfs writes there, set "
            "exclusive = true in the store's store.toml.",
        )
    faults.reach("swap.begin")
    with ExitStack() as stack:
        try:
            directory, name = stack.enter_context(open_parent(store.root_fd, path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return SwapResult(SwapStatus.CHANGED, "its directory is gone or was renamed")
            raise
        request = _Request(
            store=store,
            path=path,
            directory=directory,
            name=name,
            source_fd=source_fd,
            expected=expected,
            lease_ok=lease_ok,
            interrupted=interrupted,
        )
        try:
            _check(request)
            return _swap(request, how, blob, sha256_original, nullcontext() if barrier is None else barrier)
        except _GiveUp as end:
            return end.result


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What :func:`swap_in` was asked, with the name's directory open."""

    store: Store
    path: str
    directory: int
    name: str
    source_fd: int
    expected: Identity
    lease_ok: Callable[[], bool]
    interrupted: Callable[[], bool]


def _check(request: _Request) -> None:
    """Is the file still what was compacted, under its name, and may we go on?"""
    st = os.fstat(request.source_fd)
    named = staging.look(request.directory, request.name)
    same_name = named is not None and (named.st_dev, named.st_ino) == (st.st_dev, st.st_ino)
    if not same_name:
        raise _GiveUp(SwapStatus.CHANGED, "it was replaced, renamed or deleted while it was being compacted")
    if st.st_nlink != 1:
        raise _GiveUp(SwapStatus.HARD_LINKS, "it has several names (hard links)")
    if Identity.from_stat(st) != request.expected:
        raise _GiveUp(SwapStatus.CHANGED, "it was changed while it was being compacted")
    if request.interrupted():
        raise _GiveUp(SwapStatus.BUSY, "it was opened while it was being compacted")
    if not request.lease_ok():
        raise _GiveUp(SwapStatus.LEASE_LOST, "another machine is the compactor now")


def _swap(
    request: _Request, how: SwapMode, blob: bytes, sha256_original: bytes, barrier: AbstractContextManager[object]
) -> SwapResult:
    store, source_fd = request.store, request.source_fd
    wanted = metadata.snapshot(source_fd)
    obstacle = metadata.not_carriable(wanted)
    if obstacle:
        raise _GiveUp(SwapStatus.METADATA, f"its metadata can't be carried over: {obstacle}")
    staged, blob_fd = _stage_blob(store, blob, wanted)
    try:
        # The original must be as durable as the blob: from now on it is what "undo" means.
        os.fsync(source_fd)
        intent = _intent(request, staged, blob_fd, hashlib.sha256(blob).digest(), sha256_original, linked=how is _LINK)
        store.ledger.append(intent)
    except BaseException:
        os.close(blob_fd)
        staging.remove(store, staged)
        raise
    work = _Work(request, intent, blob_fd)
    try:
        with work.abandoned_on_error(), ExitStack() as holding:
            faults.reach("swap.intended")
            _same_content(store, source_fd, sha256_original)
            holding.enter_context(barrier)
            with _lease(store, source_fd) as broken, work.abandoned_on_error():
                faults.reach("swap.leased")
                _check(request)
                faults.reach("swap.checked")
                if how is _LINK:
                    _link_and_rename(work, holding)
                else:
                    _exchange_and_look(work, wanted, broken, holding)
                work.ended = True
        _best_effort(store, Done(job=intent.job))
        faults.reach("swap.done")
    finally:
        identity = Identity.from_stat(os.fstat(blob_fd))
        os.close(blob_fd)
    return SwapResult(SwapStatus.DONE, "", identity, intent.kept)


def _stage_blob(store: Store, blob: bytes, wanted: Metadata) -> tuple[str, int]:
    """Write the blob to staging, durably, with the original's metadata, and read both back: ``(name, fd O_RDONLY)``."""
    fd, staged = staging.create(store, "blob")
    try:
        try:
            _write(fd, blob)
            faults.reach("swap.written")
            metadata.apply(fd, wanted)
            os.fsync(fd)
        finally:
            os.close(fd)
        faults.reach("swap.synced")
        # Opened anew, O_RDONLY: our own write access would forbid any lease.
        fd = os.open(staged, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=store.staging_fd)
        try:
            lacking = metadata.difference(wanted, metadata.snapshot(fd))
            if lacking:
                raise _GiveUp(SwapStatus.METADATA, f"its metadata can't be carried over: {lacking}")
            # What is read now should come from the disk, as far as the kernel lets go of its pages.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if originals.sha256_of(fd) != hashlib.sha256(blob).digest():
                raise OSError(errno.EIO, "the blob reads back differently than it was written", staged)
            os.fsync(store.staging_fd)
            faults.reach("swap.verified")
        except BaseException:
            os.close(fd)
            raise
    except BaseException:
        staging.remove(store, staged)
        raise
    return staged, fd


def _intent(
    request: _Request, staged: str, blob_fd: int, sha256_blob: bytes, sha256_original: bytes, *, linked: bool
) -> Intent:
    job = ledger.new_job()
    original = metadata.mark(request.source_fd)
    today = ledger.days_seen(request.store.ledger_fd)
    return Intent(
        job=job,
        path=ledger.quote(request.path),
        parent_ino=os.fstat(request.directory).st_ino,
        staging=staged,
        kept=originals.name_for(sha256_original, job, original.size, original.mtime_ns, today),
        linked=linked,
        original=original,
        blob=metadata.mark(blob_fd),
        sha256_original=sha256_original.hex(),
        sha256_blob=sha256_blob.hex(),
    )


@contextmanager
def _lease(store: Store, fd: int) -> Iterator[Callable[[], bool]]:
    """A read lease; in an exclusive store whose filesystem has none, nothing. Gives up when it is not to be had."""
    with ExitStack() as stack:
        try:
            broken = stack.enter_context(linux.read_lease(fd))
        except BlockingIOError:
            raise _GiveUp(SwapStatus.BUSY, "a program has it open for writing") from None
        except linux.LeasesUnavailable as error:
            if not store.config.exclusive:
                raise _GiveUp(SwapStatus.UNAVAILABLE, f"this file can't be guarded against writers: {error}") from error
            broken = _never
        yield broken


def _never() -> bool:
    return False


def _same_content(store: Store, source_fd: int, sha256_original: bytes) -> None:
    """Read the original once more, while nobody can write to it: stat can't see what came through a writable mapping
    whose pages were touched before. After this, who writes has to open the file, and touching pages changes its mtime.
    """
    with _lease(store, source_fd) as broken:
        if originals.sha256_of(source_fd) != sha256_original:
            raise _GiveUp(SwapStatus.CHANGED, "its content is not what was compacted")
        if broken():
            raise _GiveUp(SwapStatus.BUSY, "a program wants to write to it")


@dataclass
class _Work:
    """A swap after its intent was recorded: what has to be known to take it back from wherever it has got to."""

    request: _Request
    intent: Intent
    blob_fd: int
    exchanged: bool = False
    """The blob has the name, and the original is in staging …"""
    kept: bool = False
    """… or, then, in the window."""
    linked: bool = False
    """(Exclusive stores.) The original has a second name in the window."""
    ended: bool = False
    """Done, or taken back."""

    @contextmanager
    def abandoned_on_error(self) -> Iterator[None]:
        """Inside the lease, so that a writer who waits for it finds the original under its name again."""
        try:
            yield
        except BaseException as error:
            if not self.ended:
                self.ended = True
                self._abandon(str(error) or type(error).__name__)
            raise

    def _abandon(self, why: str) -> None:
        """Take everything back; a newer truth under the name stays. Never raises: what fails is left to recovery."""
        store, intent = self.request.store, self.intent
        try:
            if self.exchanged:
                holding, held = (store.originals_fd, intent.kept) if self.kept else (store.staging_fd, intent.staging)
                self._take_back(holding, held)
            elif self.linked:
                os.unlink(intent.kept, dir_fd=store.originals_fd)
            staging.discard(store, intent.staging, intent.blob)
            _best_effort(store, Undone(job=intent.job, why=why))
        except OSError as error:
            _log.warning("%s: can't be taken back yet (%s); the next mount does it", self.request.path, error)

    def _take_back(self, holding: int, held: str) -> None:
        """The original gets its name again, unless somebody took or deleted that."""
        request, store, intent = self.request, self.request.store, self.intent
        meanwhile = metadata.snapshot(self.blob_fd)
        taken = exchange.take_back(holding, held, request.directory, request.name, os.fstat(self.blob_fd))
        os.fsync(request.directory)
        if taken is TakenBack.RESTORED:
            if metadata.digest(meanwhile) != intent.blob.metadata:
                # A chmod that reached the blob while it bore the name was meant for the file.
                now = metadata.snapshot(request.source_fd)
                metadata.apply(request.source_fd, replace(meanwhile, atime_ns=now.atime_ns, mtime_ns=now.mtime_ns))
            if self.kept:
                os.rename(held, intent.staging, src_dir_fd=holding, dst_dir_fd=store.staging_fd)
            return
        if self.kept:
            return  # the original stays in the window, like that of any file that was deleted or replaced later
        st = os.stat(held, dir_fd=holding, follow_symlinks=False)
        if (st.st_dev, st.st_ino) == (request.expected.dev, request.expected.ino):
            os.rename(held, intent.kept, src_dir_fd=holding, dst_dir_fd=store.originals_fd)
        else:
            staging.put_aside(store, held, f"the name it had was {taken.name.lower()} while esrfs held it")


def _exchange_and_look(work: _Work, wanted: Metadata, broken: Callable[[], bool], holding: ExitStack) -> None:
    request, store, intent = work.request, work.request.store, work.intent
    with _giving_up_for_the_name(), exchange.keeping_mtime(request.directory):
        exchange.exchange(store.staging_fd, intent.staging, request.directory, request.name)
    work.exchanged = True
    faults.reach("swap.exchanged")
    out = os.stat(intent.staging, dir_fd=store.staging_fd, follow_symlinks=False)
    # The exchange itself has set ctime, which was compared just before, under the lease; all else must be as it was.
    if not _is_expected(out, request.expected, links=1) or metadata.difference(
        wanted, metadata.snapshot(request.source_fd)
    ):
        raise _GiveUp(SwapStatus.CHANGED, "it was replaced or changed at the last moment")
    _writer_waits(broken)
    if request.interrupted():
        raise _GiveUp(SwapStatus.BUSY, "it was opened while it was being compacted")
    faults.reach("swap.looked")
    holding.close()
    os.fsync(request.directory)
    os.fsync(store.staging_fd)
    faults.reach("swap.directories_synced")
    # An open(2) that found the original just before the exchange reaches the lease about now: ask again, and once more.
    _writer_waits(broken)
    os.rename(intent.staging, intent.kept, src_dir_fd=store.staging_fd, dst_dir_fd=store.originals_fd)
    work.kept = True
    faults.reach("swap.kept")
    os.fsync(store.originals_fd)
    os.fsync(store.staging_fd)
    faults.reach("swap.kept_synced")
    _writer_waits(broken)


def _link_and_rename(work: _Work, holding: ExitStack) -> None:
    """For filesystems without exchange, in stores where only esrfs writes: then nothing can come between."""
    request, store, intent = work.request, work.request.store, work.intent
    with _giving_up_for_the_name():
        os.link(
            request.name,
            intent.kept,
            src_dir_fd=request.directory,
            dst_dir_fd=store.originals_fd,
            follow_symlinks=False,
        )
    work.linked = True
    os.fsync(store.originals_fd)
    faults.reach("swap.exchanged")
    linked = os.stat(intent.kept, dir_fd=store.originals_fd, follow_symlinks=False)
    named = staging.look(request.directory, request.name)
    if (
        named is None
        or not _is_expected(linked, request.expected, links=2)
        or not _is_expected(named, request.expected, links=2)
        or metadata.digest(metadata.snapshot(request.source_fd)) != intent.original.metadata
    ):
        raise _GiveUp(SwapStatus.CHANGED, "it was replaced or changed at the last moment")
    if request.interrupted():
        raise _GiveUp(SwapStatus.BUSY, "it was opened while it was being compacted")
    faults.reach("swap.looked")
    with exchange.keeping_mtime(request.directory):
        os.rename(intent.staging, request.name, src_dir_fd=store.staging_fd, dst_dir_fd=request.directory)
    work.ended = True
    holding.close()
    faults.reach("swap.directories_synced")
    os.fsync(request.directory)
    faults.reach("swap.kept")
    os.fsync(store.staging_fd)
    faults.reach("swap.kept_synced")


def _is_expected(st: os.stat_result, expected: Identity, links: int) -> bool:
    found = (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_nlink)
    return found == (expected.dev, expected.ino, expected.size, expected.mtime_ns, links)


@contextmanager
def _giving_up_for_the_name() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise _GiveUp(SwapStatus.CHANGED, "it was renamed or deleted while it was being compacted") from None
        if error.errno in _FIXED:
            raise _GiveUp(
                SwapStatus.UNAVAILABLE, f"this name can't be exchanged: {os.strerror(error.errno)}"
            ) from error
        raise


def _writer_waits(broken: Callable[[], bool]) -> None:
    if broken():
        raise _GiveUp(SwapStatus.BUSY, "a program wants to write to it")


def _best_effort(store: Store, record: ledger.Record) -> None:
    """Record an end. If that fails the step stays pending, and recovery sees from the files that it had ended."""
    try:
        store.ledger.append(record)
    except OSError as error:
        _log.warning("%s: the ledger takes no record: %s", store.path, error)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[:_CHUNK]) :]


# ---- plain file for blob


def materialise(
    store: Store, path: str | None, blob_fd: int, write_view: Callable[[int], None], *, purpose: str = "write"
) -> int:
    """Make a blob a plain file with the view's bytes, and return a descriptor (O_RDWR) of that file, the caller's.

    ``path``: its name as far as known, or None. ``blob_fd``: the blob, open for reading at least. ``write_view(fd)``
    writes the whole view to an empty file. Owner, mode, xattrs and times are those of the blob now.

    If ``path`` is the blob's only name, the names are exchanged: a new inode. If it has other names, its name is not
    known, or its directory is write-protected, its own inode is overwritten from a durable copy. If it has no name
    any more, the new file has none either. Raises OSError (also what ``write_view`` raises), with the blob untouched;
    EBUSY if others keep replacing the name.
    """
    faults.reach("plain.begin")
    if os.fstat(blob_fd).st_nlink == 0:
        fd = staging.create_unnamed(store)
        with _closing_on_error(fd):
            write_view(fd)
            metadata.apply(fd, metadata.snapshot(blob_fd))
        return fd
    fd, staged = staging.create(store, "plain")
    work = _PlainWork(store, staged, fd, blob_fd, purpose)
    with _closing_on_error(fd):
        try:
            write_view(fd)
            faults.reach("plain.written")
            for _ in range(_ATTEMPTS):
                result = _make_plain(work, path)
                if result is not None:
                    if result != fd:
                        os.close(fd)
                    return result
            raise OSError(errno.EBUSY, "others keep replacing the file", path)
        except BaseException:
            if not work.pending:
                staging.remove(store, staged)
            raise


@contextmanager
def _closing_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


@dataclass
class _PlainWork:
    store: Store
    staged: str
    fd: int
    """The plain file, complete; O_RDWR."""
    blob_fd: int
    purpose: str
    pending: bool = False
    """An intent is in the ledger, and what lies in staging may be more than our own file."""
    names_fixed: bool = False
    """The directory's names can't be changed by this process (it may be write-protected); the file's content can."""


def _make_plain(work: _PlainWork, path: str | None) -> int | None:
    """One attempt: a descriptor of the plain file, or None when the blob's name changed at the last moment."""
    store, fd = work.store, work.fd
    before = metadata.snapshot(work.blob_fd)
    metadata.apply(fd, before)
    os.fsync(fd)
    os.fsync(store.staging_fd)
    faults.reach("plain.synced")
    st = os.fstat(work.blob_fd)
    if st.st_nlink == 0:
        staging.remove(store, work.staged)
        return fd
    if path is not None and st.st_nlink == 1 and store.config.probe.exchange and not work.names_fixed:
        with ExitStack() as stack:
            directory = None
            with contextlib.suppress(OSError):
                directory, name = stack.enter_context(open_parent(store.root_fd, path))
            if directory is not None:
                named = staging.look(directory, name)
                if named is not None and (named.st_dev, named.st_ino) == (st.st_dev, st.st_ino):
                    return fd if _exchange_for_plain(work, path, directory, name, before) else None
    return _overwrite(work, path)


def _intend_plain(work: _PlainWork, path: str | None, parent_ino: int, *, in_place: bool) -> ToPlain:
    intent = ToPlain(
        job=ledger.new_job(),
        path="" if path is None else ledger.quote(path),
        parent_ino=parent_ino,
        staging=work.staged,
        in_place=in_place,
        purpose=work.purpose,
        blob=metadata.mark(work.blob_fd),
        plain=metadata.mark(work.fd),
        sha256_plain=originals.sha256_of(work.fd).hex(),
    )
    work.store.ledger.append(intent)
    return intent


def _exchange_for_plain(work: _PlainWork, path: str, directory: int, name: str, before: Metadata) -> bool:
    """True: the plain file has the name, and the blob is gone. False: somebody else had the name by then."""
    store, staged = work.store, work.staged
    intent = _intend_plain(work, path, os.fstat(directory).st_ino, in_place=False)
    faults.reach("plain.intended")
    try:
        with exchange.keeping_mtime(directory):
            exchange.exchange(store.staging_fd, staged, directory, name)
    except OSError as error:
        # A name that is gone stays gone; the next attempt finds out what the blob is called now, if anything.
        _best_effort(store, Undone(job=intent.job, why=str(error)))
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        if error.errno in _FIXED:
            work.names_fixed = True
            return False
        raise
    work.pending = True
    try:
        faults.reach("plain.exchanged")
        out = os.stat(staged, dir_fd=store.staging_fd, follow_symlinks=False)
        ours = (out.st_dev, out.st_ino) == (os.fstat(work.blob_fd).st_dev, intent.blob.ino)
        if ours:
            now = metadata.snapshot(work.blob_fd)
            if metadata.difference(before, now):
                metadata.apply(work.fd, now)  # a chmod, at the last moment
            faults.reach("plain.looked")
            os.fsync(directory)
            os.fsync(store.staging_fd)
    except BaseException:
        # The caller will be told that nothing happened, so the name is to be the blob's again; else recovery goes on.
        with contextlib.suppress(OSError):
            _give_name_back(work, intent, directory, name)
        raise
    if not ours:
        _give_name_back(work, intent, directory, name)
        return False
    # Not guarded: the caller's own descriptor of the blob may be open for writing.
    staging.discard(store, staged, intent.blob, guarded=False)
    work.pending = False
    faults.reach("plain.discarded")
    _best_effort(store, Done(job=intent.job))
    faults.reach("plain.done")
    return True


def _give_name_back(work: _PlainWork, intent: ToPlain, directory: int, name: str) -> None:
    store, staged = work.store, work.staged
    taken = exchange.take_back(store.staging_fd, staged, directory, name, os.fstat(work.fd))
    os.fsync(directory)
    if taken is not TakenBack.RESTORED:
        st = os.stat(staged, dir_fd=store.staging_fd, follow_symlinks=False)
        if st.st_ino == intent.blob.ino:
            staging.discard(store, staged, intent.blob, guarded=False)  # somebody deleted or replaced what it was
        else:
            staging.put_aside(store, staged, f"the name it had was {taken.name.lower()} while esrfs held it")
    work.pending = False
    _best_effort(store, Undone(job=intent.job, why="somebody else had the name, or a step failed"))


def _overwrite(work: _PlainWork, path: str | None) -> int:
    """Write the plain file's bytes into the blob's own inode, which has names that we don't know."""
    store = work.store
    # Through /proc: opens the very inode, whatever became of its name.
    fd = os.open(f"/proc/self/fd/{work.blob_fd}", os.O_RDWR | os.O_CLOEXEC)
    with _closing_on_error(fd):
        blob = _read_all(fd)
        st = os.fstat(fd)
        try:
            linux.reserve(fd, os.fstat(work.fd).st_size)
            intent = _intend_plain(work, path, 0, in_place=True)
        except BaseException:
            _rewrite(fd, blob, st)  # lets go of what was reserved
            raise
        work.pending = True
        try:
            faults.reach("plain.intended")
            copy_over(work.fd, fd)
            faults.reach("plain.in_place")
            os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
            os.fsync(fd)
        except BaseException as error:
            try:
                _rewrite(fd, blob, st)
            except OSError as again:
                # The complete copy stays in staging, and the step pending: the next mount ends it.
                _log.error("a blob is half overwritten (%s, then %s); the next mount completes it", error, again)
                raise
            work.pending = False
            _best_effort(store, Undone(job=intent.job, why=str(error) or type(error).__name__))
            raise
        faults.reach("plain.looked")
    staging.remove(store, work.staged)
    work.pending = False
    faults.reach("plain.discarded")
    _best_effort(store, Done(job=intent.job))
    faults.reach("plain.done")
    return fd


def copy_over(from_fd: int, to_fd: int) -> None:
    """Make the content of ``to_fd`` that of ``from_fd``, from the start; both positions are left alone. Raises
    OSError.
    """
    offset = 0
    while chunk := os.pread(from_fd, _CHUNK, offset):
        _pwrite(to_fd, chunk, offset)
        offset += len(chunk)
        faults.reach("plain.in_place.chunk")
    os.ftruncate(to_fd, offset)


def _rewrite(fd: int, content: bytes, before: os.stat_result) -> None:
    _pwrite(fd, content, 0)
    os.ftruncate(fd, len(content))
    os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.fsync(fd)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _read_all(fd: int) -> bytes:
    parts = []
    offset = 0
    while chunk := os.pread(fd, _CHUNK, offset):
        parts.append(chunk)
        offset += len(chunk)
    return b"".join(parts)


def restore(store: Store, path: str, choose: Callable[[Recipe], bytes] = lambda recipe: recipe.sha256_original) -> int:
    """Bring the original of the blob at ``path`` back, bit for bit; returns a descriptor (O_RDWR) of it, the caller's.
    ``choose``: the sha256 of the one that is meant; of the file that the blob was made of, if nothing is said.

    The file keeps its present mtime, mode, owner and xattrs. The undo window keeps its copy for its time. Raises
    StoreError when this is no blob, or its original is not in the window any more (or not what it was); OSError.
    """
    try:
        blob_fd = beneath(store.root_fd, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise StoreError(f"{path}: there is no such file in the store.", Problem.NOT_FOUND) from error
        raise
    try:
        st = os.fstat(blob_fd)
        info = examine(store, blob_fd, st) if stat.S_ISREG(st.st_mode) else None
        if info is None:
            raise StoreError(
                f"{path} is not compacted: it is what was written, so nothing was changed.", Problem.NOT_FOUND
            )
        try:
            recipe = recipe_of(blob_fd, st, info)
        except ValueError as error:
            raise StoreError(f"{path}: the blob is damaged ({error}); nothing was changed.", Problem.DAMAGED) from error
        original_fd = None if recipe is None else _original(store, path, choose(recipe))
        if original_fd is None:
            raise StoreError(
                f"{path}: its original has left the undo window, so it can't be brought back. Nothing was changed.",
                Problem.NOT_FOUND,
            )
        try:
            return materialise(store, path, blob_fd, lambda fd: copy_over(original_fd, fd), purpose="restore")
        finally:
            os.close(original_fd)
    finally:
        os.close(blob_fd)


def _original(store: Store, path: str, sha256: bytes) -> int | None:
    for kept in originals.find(store, sha256):
        try:
            return originals.open_verified(store, kept)
        except (OSError, ValueError) as error:
            _log.warning("%s: original %s: %s", path, kept.name, error)
    return None
