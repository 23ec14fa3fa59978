"""Opening a file, as what it is or as the photograph that it stands for, and closing it.

Using a file follows one order, so that compaction never swaps it under a program (see ``upkeep/claims.py``): open it,
enter the handle in the table, enter the claim; after waiting for a swap, start over by name.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import NamedTuple

from esrfs.store.examine import examine, is_damaged, may_be_blob, recipe_of
from esrfs.store.identity import Identity
from esrfs.store.layout import RESERVED
from esrfs.vfs import changing
from esrfs.vfs.creating import Caller, give, permissions
from esrfs.vfs.descriptor import Descriptor
from esrfs.vfs.directories import Directory
from esrfs.vfs.handles import Handle, OpenFile
from esrfs.vfs.removed import Hidden
from esrfs.vfs.shared import Shared, creatable, is_writable, visible
from esrfs.vfs.view import View
from esrfs.vfs.wrap import wrap_if_needed

log = logging.getLogger("esrfs.vfs")

_PASSED_TO_STORE = os.O_ACCMODE | os.O_DSYNC | os.O_SYNC
"""O_DIRECT would demand aligned buffers, O_NOATIME the owner's rights; both are between program and mount. O_APPEND is
said with each write: the kernel writes dirty pages of a mapping through whichever handle it finds."""
_ALWAYS = os.O_NOFOLLOW | os.O_CLOEXEC
_TO_READ = os.O_RDONLY | _ALWAYS
_MORE_THAN_READING = os.O_ACCMODE | os.O_TRUNC | os.O_DSYNC | os.O_SYNC
_TRIES = 16


class Opened(NamedTuple):
    """A handle, and how the kernel may cache its reads."""

    number: int
    keep_cache: bool = False
    direct_io: bool = False
    flushes: bool = True
    """Whether ``Filesystem.flush`` has anything to do for this handle."""


def create(shared: Shared, path: str, flags: int, mode: int, caller: Caller) -> Opened:
    directory, name = shared.directories.parent(creatable(path))
    create_flags = (flags & _PASSED_TO_STORE) | os.O_CREAT | os.O_EXCL | _ALWAYS
    try:
        descriptor = os.open(name, create_flags, permissions(directory, mode, caller), dir_fd=directory.number)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        return open_file(shared, path, flags)
    try:
        give(shared, directory.number, name, mode, caller)
        st = os.fstat(descriptor)
        handle = shared.handles.add_created((st.st_dev, st.st_ino), path, descriptor, is_writable(flags))
    except BaseException:
        os.close(descriptor)
        raise
    shared.capabilities.note_absent(path)
    return Opened(handle.number, flushes=shared.errors_at_close)


def open_file(shared: Shared, path: str, flags: int) -> Opened:
    if not flags & _MORE_THAN_READING:
        opened = _open_to_read(shared, path, flags)
        if opened is not None:
            return opened
    visible(path)
    flags = _for_truncation(flags)
    in_use = shared.handles.in_use(path)
    if in_use is not None and not is_writable(flags):
        opened = _open_what_is_in_use(shared, path, in_use)
        if opened is not None:
            return opened
    for _ in range(_TRIES):
        opened = _open_once(shared, path, flags)
        if opened is not None:
            return opened
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _open_to_read(shared: Shared, path: str, flags: int) -> Opened | None:
    """:func:`open_file` for what most opens are: for reading, of a file that nobody has replaced behind the mount. It
    is written for speed, in one piece; None, and nothing done, for all else."""
    if path.startswith(RESERVED):
        return None
    handles = shared.handles
    directory, name = shared.directories.parent(path)
    descriptor = os.open(name, _TO_READ, dir_fd=directory.number)
    try:
        st = os.fstat(descriptor)
        key = (st.st_dev, st.st_ino)
        blob = may_be_blob(st)
        if blob:
            in_use = handles.in_use(path)
            number, keep = 0, False
        else:
            identity = (*key, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
            number, keep = handles.add_to_read(key, path, descriptor, identity)
    except BaseException:
        os.close(descriptor)
        raise
    if blob and (in_use is None or in_use.key == key):
        return _opened(shared, path, flags, descriptor, st, place=(directory, name))
    if not number:
        os.close(descriptor)
        return None
    if shared.claims.enter(key):
        try:
            still = _is_still(directory.number, name, st)
        except BaseException:
            handles.remove(number)
            raise
        if not still:
            handles.remove(number)
            return None
    return Opened(number, keep, False, False)


def _open_what_is_in_use(shared: Shared, path: str, file: OpenFile) -> Opened | None:
    """Behind the mount the name was given to another file, while programs still read the first one here. For the
    kernel both are one file, with one set of pages: so who opens it now reads the first one too, as long as that is
    open. None in the usual case, and where the new file has another size: the kernel knows but one."""
    directory, name = shared.directories.parent(path)
    st = os.stat(name, dir_fd=directory.number, follow_symlinks=False)
    if (st.st_dev, st.st_ino) == file.key or file.removed:
        return None
    shown = shared.attributes.size(directory.number, name, st)
    handle = another(shared, file)
    if handle is None:
        return None
    try:
        st, size = shown_by(handle)
        if size == shown:
            return _admit(shared, handle, path, st)
    except BaseException:
        shared.handles.remove(handle.number)
        raise
    shared.handles.remove(handle.number)
    return None


def _open_once(shared: Shared, path: str, flags: int) -> Opened | None:
    """None when the name came to mean another file meanwhile, so that it has to be tried again."""
    directory, name = shared.directories.parent(path)
    descriptor = os.open(name, (flags & _PASSED_TO_STORE) | _ALWAYS, dir_fd=directory.number)
    try:
        st = os.fstat(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return _opened(shared, path, flags, descriptor, st, place=(directory, name))


def _opened(
    shared: Shared, path: str, flags: int, descriptor: int, st: os.stat_result, *, place: tuple[Directory, str]
) -> Opened | None:
    """The rest of :func:`_open_once`, which owns ``descriptor`` from here on."""
    directory, name = place
    view = None
    try:
        if may_be_blob(st):
            descriptor, view = _as_view(shared, descriptor, st, flags, path)
    except BaseException:
        os.close(descriptor)
        raise
    handle = shared.handles.add((st.st_dev, st.st_ino), path, descriptor, is_writable(flags), view)
    try:
        claimed = shared.claims.enter(handle.file.key)
        turned_plain = view is not None and handle.file.view is None
        in_doubt = claimed or view is not None or handle.writable
        if turned_plain or (in_doubt and not _is_still(directory.number, name, st)):
            shared.handles.remove(handle.number)
            return None
        if handle.writable:
            _prepare_for_writing(shared, handle, flags)
            st = os.fstat(handle.descriptor)
        return _admit(shared, handle, path, st)
    except BaseException:
        shared.handles.remove(handle.number)
        raise


def _is_still(directory: int, name: str, st: os.stat_result) -> bool:
    try:
        return os.path.samestat(st, os.stat(name, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _as_view(shared: Shared, descriptor: int, st: os.stat_result, flags: int, path: str) -> tuple[int, View | None]:
    """(descriptor, view) for what is open as ``descriptor``, if it is a blob: then opened for reading only, however the
    program asked, as a blob itself is never written to. Else ``descriptor`` as it is, and None."""
    if shared.handles.is_plain((st.st_dev, st.st_ino)):
        return descriptor, None  # it is being written: no blob, whatever its last bytes look like just now
    reader = descriptor
    if is_writable(flags):
        try:
            reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            return descriptor, None
    view = None
    try:
        view = _view_of(shared, reader, st, path)
    finally:
        if reader != descriptor:
            os.close(reader if view is None else descriptor)
    return (descriptor, None) if view is None else (reader, view)


def _view_of(shared: Shared, descriptor: int, st: os.stat_result, path: str) -> View | None:
    identity = _identity(st)
    recent = shared.recent.get(identity)
    if recent is not None:
        if recent.content is not None:
            shared.cache.hits += 1
        return recent
    blob = examine(shared.store, descriptor, st)
    try:
        if blob is None:
            if is_damaged(shared.store, descriptor, st):
                raise ValueError("its footer's checksum differs")
            return None
        recipe = recipe_of(descriptor, st, blob)
    except ValueError as error:
        log.error("%s: its blob is damaged (%s); reading it fails with EIO. Try `esrfs restore`.", path, error)
        raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
    if recipe is None:
        return None
    shared.attributes.remember(Identity.from_stat(st), recipe.original_size)
    view = View(Descriptor(os.dup(descriptor)), recipe, shared.engine, shared.cache, shared.waits)
    shared.recent.add(identity, view)
    return view


def _prepare_for_writing(shared: Shared, handle: Handle, flags: int) -> None:
    """So that errors come from open: O_TRUNC makes a plain file at once, else the view is rebuilt now."""
    if flags & os.O_TRUNC:
        changing.begin_change(shared, handle, keep_content=False)
        os.ftruncate(handle.descriptor, 0)
    elif handle.file.view is not None:
        changing.content(handle, handle.file.view)


def _admit(shared: Shared, handle: Handle, path: str, st: os.stat_result) -> Opened:
    view = handle.file.view
    identity: object = _identity(st)
    if view is not None:
        content = view.look_in_cache(by_the_way=True)
        if content is None:
            # Until it is rebuilt: the kernel's read-ahead must not ask for pixels that the program never reads.
            shared.handles.admit(handle, path, None)
            return Opened(handle.number, direct_io=True)
        identity = (identity, content.sha256)
    keep, direct = shared.handles.admit(handle, path, identity)
    return Opened(handle.number, keep, direct, flushes=handle.writable and shared.errors_at_close)


# A further handle of what is open already, and what it shows.


def shown_by(handle: Handle) -> tuple[os.stat_result, int]:
    """fstat, and the size that the view shows, which are of one file also while it turns plain. Raises OSError."""
    view = handle.file.view
    st = os.fstat(handle.descriptor)
    if view is None:
        return st, st.st_size
    if handle.file.view is not None:
        return st, view.size
    st = os.fstat(handle.descriptor)
    return st, st.st_size


def another(shared: Shared, file: OpenFile, flags: int = os.O_RDONLY, *, stands_in: bool = False) -> Handle | None:
    """A further handle of an open file, whatever its name is; None if it is not open any more. Raises OSError."""
    handles = shared.handles
    with handles.changing, handles.nothing_closed():  # what a blob's descriptors mean does not change meanwhile
        handle = next(iter(list(file.handles)), None)
        if handle is None:
            return None
        if file.view is not None:
            descriptor = os.dup(handle.descriptor)
        else:
            descriptor = os.open(f"/proc/self/fd/{handle.descriptor}", (flags & _PASSED_TO_STORE) | os.O_CLOEXEC)
        try:
            further = handles.join(file, descriptor, is_writable(flags), stands_in=stands_in)
        except BaseException:
            os.close(descriptor)
            raise
        if further is None:
            os.close(descriptor)
        return further


def open_hidden(shared: Shared, hidden: Hidden, flags: int) -> Opened:
    """Open, through /proc, a file that has no name any more."""
    flags = _for_truncation(flags)
    handle = another(shared, shared.handles.get(hidden.handle).file, flags)
    if handle is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    try:
        if handle.writable:
            _prepare_for_writing(shared, handle, flags)
        view = handle.file.view
        # The other handles' pages are this very file's.
        return Opened(handle.number, keep_cache=True, direct_io=view is not None and view.content is None)
    except BaseException:
        shared.handles.remove(handle.number)
        raise


# The end of a handle.


def release(shared: Shared, number: int) -> None:
    handle = shared.handles.get(number)
    file = handle.file
    if not file.changed:
        shared.handles.remove(number)
        if file.view is not None and not file.handles and file.view.ends_with_its_handles:
            shared.recent.drop(file.view.key)
        return
    guard = _guard_of(shared, handle)
    shared.handles.remove(number)
    if guard is not None:
        wrap_if_needed(shared.store, file, guard.descriptor)
        shared.handles.remove(guard.number)
    if not file.handles and not file.removed:
        shared.on_change(file.path)


def _guard_of(shared: Shared, handle: Handle) -> Handle | None:
    """A handle that keeps the file shown as plain while it is wrapped; None if it can't be taken for a blob."""
    file = handle.file
    if file.view is not None or file.removed or len(file.handles) > 1:
        return None
    try:
        if not may_be_blob(os.fstat(handle.descriptor)):
            return None
        descriptor = os.open(f"/proc/self/fd/{handle.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    return shared.handles.add(file.key, file.path, descriptor, False, None)


def _identity(st: os.stat_result) -> tuple[int, ...]:
    """As ``store.identity.Identity``, in the form that is cheapest to make: this runs at every open."""
    return (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def _for_truncation(flags: int) -> int:
    """Linux truncates also what is opened for reading only; the kernel has asked for the right to write then."""
    if flags & os.O_TRUNC and not is_writable(flags):
        return flags & ~os.O_ACCMODE | os.O_RDWR
    return flags
