"""The compare-and-swap of compaction: a blob takes its original's place (:func:`swap_in`). The way back is
``plain.py``.

What both keep: at every moment, and after a crash at any moment, there is under the name either what was there
or its complete, fsynced successor; a name that vanished stays gone; a name that somebody gave to another file keeps
that file; and what came out of an exchange is looked at before anything is concluded. Nothing is removed but files
that were made here, and those only unchanged (``staging.discard``). ``recovery.py`` ends what a crash cut short, by
the ledger.

Order of locks: the caller's ``barrier`` before the lease, never the reverse: a thread that holds the barrier and opens
the file for writing would wait for the lease, and we for the thread.
"""

from __future__ import annotations

import enum
import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

from esrfs import faults
from esrfs.store import exchange, ledger, linux, metadata, originals, staging
from esrfs.store.beneath import open_parent
from esrfs.store.exchange import TakenBack
from esrfs.store.identity import Identity
from esrfs.store.layout import RESERVED, Store, StoreConfig
from esrfs.store.ledger import Done, Intent, Undone
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

_CHUNK = 1 << 20


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


def folder_obstacle(store: Store, directory: int) -> str:
    """Why no blob can take a name in this folder (a descriptor), for people; empty if nothing speaks against it.

    This is known without trying, so that the engine need not work for nothing. The swap finds out the rest. Raises
    OSError.
    """
    inside = os.fstat(directory).st_dev, linux.mount_id(directory)
    if inside != (os.fstat(store.staging_fd).st_dev, linux.mount_id(store.staging_fd)):
        return f"its folder belongs to another filesystem, mount or subvolume than {RESERVED} of the store"
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=directory, effective_ids=True):
        return "its folder is write-protected, so no blob can take its name"
    return ""


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
        store.ledger.append_end(Done(job=intent.job))
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
            store.ledger.append_end(Undone(job=intent.job, why=why))
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
        if error.errno in exchange.IMPOSSIBLE:
            raise _GiveUp(
                SwapStatus.UNAVAILABLE, f"this name can't be exchanged: {os.strerror(error.errno)}"
            ) from error
        raise


def _writer_waits(broken: Callable[[], bool]) -> None:
    if broken():
        raise _GiveUp(SwapStatus.BUSY, "a program wants to write to it")


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[:_CHUNK]) :]
