"""Names that move, and names that go: renaming, deleting, and files that are deleted while programs have them open.

A photograph whose last name goes leaves its blob for a while (``store/nameless.py``); its rebuilt view is forgotten at
once.
"""

from __future__ import annotations

import contextlib
import os
import stat

from esrfs.store import linux
from esrfs.store.examine import examine, may_be_blob, recipe_of
from esrfs.store.nameless import LastName
from esrfs.vfs.opening import another
from esrfs.vfs.removed import Hidden
from esrfs.vfs.shared import Shared, creatable, visible

_TO_LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


def rename(shared: Shared, old: str, new: str, flags: int) -> None:
    """renameat2 with its flags: none, RENAME_NOREPLACE or RENAME_EXCHANGE."""
    from_directory, from_name = shared.directories.parent(visible(old))
    to_directory, to_name = shared.directories.parent(creatable(new))
    moves = os.stat(from_name, dir_fd=from_directory.number, follow_symlinks=False)
    exchanged = bool(flags & linux.RENAME_EXCHANGE)
    is_directory = stat.S_ISDIR(moves.st_mode) or exchanged
    replaced = None
    if flags == 0:
        replaced = _last_name(shared, to_directory.number, to_name)
        with shared.nameless.replacing(to_directory.number, to_name, replaced):
            os.rename(from_name, to_name, src_dir_fd=from_directory.number, dst_dir_fd=to_directory.number)
    else:
        linux.renameat2(from_directory.number, from_name, to_directory.number, to_name, flags)
    if is_directory:
        shared.directories.forget(old)
        shared.directories.forget(new)
    shared.handles.renamed(old, new, exchanged=exchanged, directory=is_directory)
    if replaced is not None:
        _forget_view(shared, replaced.view_key)
    shared.on_change(new)
    if exchanged:
        shared.on_change(old)


def unlink(shared: Shared, path: str) -> None:
    directory, name = shared.directories.parent(visible(path))
    last = _last_name(shared, directory.number, name)
    if last is None or shared.handles.is_open((last.device, last.inode)):
        os.unlink(name, dir_fd=directory.number)
    else:
        shared.nameless.unlink(directory.number, name, last)
    shared.handles.removed(path)
    if last is not None:
        _forget_view(shared, last.view_key)


def hide(shared: Shared, path: str) -> Hidden:
    """Unlink a file that is open, or was until just now, and keep a handle of it (see ``removed``) as long as programs
    have some."""
    directory, name = shared.directories.parent(visible(path))
    st = os.stat(name, dir_fd=directory.number, follow_symlinks=False)
    last = _last_name(shared, directory.number, name)
    file = shared.handles.file((st.st_dev, st.st_ino))
    handle = None if file is None else another(shared, file, stands_in=True)
    number = 0 if handle is None else handle.number
    try:
        view = None if handle is None else handle.file.view
        if view is not None:  # by the view's own descriptor: the handle ends with the last program's
            shared.nameless.copy(view.blob.number, view.recipe.reference)
        hidden = shared.removed.take(path, directory.number, name, number, st.st_nlink)
    except BaseException:
        release_hidden(shared, number)
        raise
    shared.handles.removed(path)
    if last is not None:
        _forget_view(shared, last.view_key)
    return hidden


def release_hidden(shared: Shared, number: int) -> None:
    with contextlib.suppress(KeyError):  # it has ended with the programs' handles
        shared.handles.remove(number)


def give_name_back(shared: Shared, hidden: Hidden) -> None:
    """The rename that was to replace the file failed."""
    directory, name = shared.directories.parent(hidden.path)
    shared.removed.give_back(hidden, directory.number, name)
    if hidden.handle in shared.handles:
        file = shared.handles.get(hidden.handle).file
        file.path, file.removed = hidden.path, False


def _last_name(shared: Shared, directory: int, name: str) -> LastName | None:
    """Of the blob whose last name this is; None for anything else."""
    try:
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if st.st_nlink > 1 or not may_be_blob(st):
            return None
        descriptor = os.open(name, _TO_LOOK, dir_fd=directory)
    except OSError:
        return None
    try:
        st = os.fstat(descriptor)
        blob = examine(shared.store, descriptor, st)
        recipe = None if blob is None else recipe_of(descriptor, st, blob)
        if recipe is None:
            return None
        return LastName(recipe.reference, recipe.sha256_view.hex(), st.st_dev, st.st_ino, st.st_size)
    except (OSError, ValueError):
        return None  # a damaged blob is deleted all the same
    finally:
        os.close(descriptor)


def _forget_view(shared: Shared, key: str) -> None:
    shared.recent.drop(key)
    shared.cache.drop(key)
