"""The way back from a blob: a plain file takes its place, with what its view shows (:func:`materialise`), or with the
original from the undo window (:func:`restore`).

It keeps what ``swap.py`` keeps: under the name there is, at every moment, the blob or its complete, fsynced successor.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from esrfs import faults
from esrfs.blob.recipe import Recipe
from esrfs.store import exchange, ledger, linux, metadata, originals, staging, unfinished
from esrfs.store.beneath import beneath, open_parent
from esrfs.store.errors import Problem, StoreError
from esrfs.store.examine import examine, recipe_of
from esrfs.store.exchange import TakenBack
from esrfs.store.layout import Store
from esrfs.store.ledger import Done, ToPlain, Undone
from esrfs.store.metadata import Metadata

_log = logging.getLogger(__name__)

FAULT_POINTS = (
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
"""In the order in which they are reached; ``plain.exchanged`` and ``plain.in_place`` exclude each other."""

_CHUNK = 1 << 20
_ATTEMPTS = 4


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
        store.ledger.append_end(Undone(job=intent.job, why=str(error)))
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        if error.errno in exchange.IMPOSSIBLE:
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
    try:
        # Not guarded: the caller's own descriptor of the blob may be open for writing.
        staging.discard(store, staged, intent.blob, guarded=False)
    except OSError as error:
        # No failure of the caller's: the plain file has the name for good. The step stays pending.
        _log.error("%s: its former blob could not be removed from staging (%s); the next mount does", path, error)
        return True
    work.pending = False
    faults.reach("plain.discarded")
    store.ledger.append_end(Done(job=intent.job))
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
    store.ledger.append_end(Undone(job=intent.job, why="somebody else had the name, or a step failed"))


def _overwrite(work: _PlainWork, path: str | None) -> int:
    """Write the plain file's bytes into the blob's own inode, which has names that we don't know."""
    store = work.store
    # Through /proc: opens the very inode, whatever became of its name.
    fd = os.open(f"/proc/self/fd/{work.blob_fd}", os.O_RDWR | os.O_CLOEXEC)
    with _closing_on_error(fd):
        if _was_withdrawn(store, os.fstat(fd)):
            raise OSError(
                errno.EIO, "an earlier attempt failed half-way, and the file is another now; open it again", path
            )
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
            store.ledger.append_end(Undone(job=intent.job, why=str(error) or type(error).__name__))
            raise
        faults.reach("plain.looked")
    try:
        staging.remove(store, work.staged)
    except OSError as error:
        # The step has ended all the same: pending, it would later take what the program writes for a half-done copy.
        _log.error("a copy of %s could not be removed from staging (%s); the next mount does", path, error)
    work.pending = False
    faults.reach("plain.discarded")
    store.ledger.append_end(Done(job=intent.job))
    faults.reach("plain.done")
    return fd


def _was_withdrawn(store: Store, blob: os.stat_result) -> bool:
    """Whether the blob's one name is that in staging under which an exchange left it: what is written there is lost."""
    if blob.st_nlink != 1:
        return False
    for entry in staging.entries(store):
        if entry.kind == "plain":
            st = staging.look(store.staging_fd, entry.name)
            if st is not None and os.path.samestat(st, blob):
                return True
    return False


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

    The file keeps its present mtime, mode, owner and xattrs. The undo window keeps its copy for its time. An original
    that another machine's interrupted step holds is read from there, and stays there. Raises StoreError when this is no
    blob, or its original is not to be had any more (or not what it was); OSError.
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
    useless = ""
    for one in unfinished.holding_original(store, sha256):
        try:
            fd = unfinished.open_held(store, one)
            with _closing_on_error(fd):
                if originals.sha256_of(fd) == sha256:
                    return fd
            os.close(fd)
            useless = f"{one.held}, and is not what it was"
        except FileNotFoundError:
            continue  # its own machine has just ended it
        except OSError as error:
            useless = f"{one.held}, and can't be read ({error.strerror})"
    if useless:
        raise StoreError(
            f"{path}: a step that was interrupted holds its original. It lies in {useless}. Nothing was changed.",
            Problem.NOT_FOUND,
        )
    return None
