"""The pixels of a blob that is open: rebuilt when they are read, and a plain file at the first change.

All handles of the file turn together, under ``Handles.changing`` (the lock order is told in ``handles``).
"""

from __future__ import annotations

import contextlib
import errno
import os

from esrfs.engine.protocol import Lane
from esrfs.store import plain
from esrfs.vfs.handles import Handle
from esrfs.vfs.shared import Shared
from esrfs.vfs.view import Content, View

_CHUNK = 1 << 20


def content(handle: Handle, view: View, lane: Lane = Lane.INTERACTIVE) -> Content:
    """The rebuilt view; waits for it. Raises OSError: EIO, or EINTR when who asks was killed."""
    there = view.content or view.look_in_cache()
    if there is not None:
        return there
    return view.rebuild(lane, handle.number, handle.file.path)


def begin_change(shared: Shared, handle: Handle, keep_content: bool = True) -> None:
    """Make sure that the handle's file is a plain file, and that its coming to rest is noticed."""
    file = handle.file
    handle.written = file.changed = True
    view = file.view
    if view is None:
        return
    rebuilt = content(handle, view) if keep_content else None
    try:
        _turn_plain(shared, handle, view, rebuilt)
    except OSError:
        if rebuilt is None or rebuilt.in_memory or _is_whole(rebuilt, view.size):
            raise
        view.give_up(rebuilt, file.path)
        _turn_plain(shared, handle, view, content(handle, view))


def _turn_plain(shared: Shared, handle: Handle, view: View, rebuilt: Content | None) -> None:
    file = handle.file
    with shared.handles.changing:
        if file.view is not view:  # another handle was first
            return

        def write_view(descriptor: int) -> None:
            if rebuilt is not None:
                _copy(rebuilt.descriptor.number, descriptor, view.size)

        shared.nameless.copy(handle.descriptor, view.recipe.reference)
        path = None if file.removed else file.path
        descriptor = plain.materialise(shared.store, path, handle.descriptor, write_view)
        try:
            st = os.fstat(descriptor)
            shared.handles.turn_plain(file, descriptor, (st.st_dev, st.st_ino))
        finally:
            os.close(descriptor)


def _is_whole(there: Content, size: int) -> bool:
    """Whether the disk gives all of the content, of ``size`` bytes."""
    offset = 0
    with contextlib.suppress(OSError):
        while part := os.pread(there.descriptor.number, _CHUNK, offset):
            offset += len(part)
    return offset == size


def _copy(source: int, target: int, size: int) -> None:
    """The whole content of ``source``, of ``size`` bytes, to ``target``, from offset 0."""
    offset = 0
    while offset < size:
        count = os.sendfile(target, source, offset, size - offset)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        offset += count
