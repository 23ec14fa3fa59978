"""The pixels of a blob that is open: rebuilt when they are read, and a plain file at the first change.

All handles of the file turn together, under ``Handles.changing`` (the lock order is told in ``handles``).
"""

from __future__ import annotations

import errno
import os

from esrfs.engine.protocol import Lane
from esrfs.store import plain
from esrfs.vfs.handles import Handle
from esrfs.vfs.shared import Shared
from esrfs.vfs.view import Content, View


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
    with shared.handles.changing:
        if file.view is not view:  # another handle was first
            return

        def write_view(descriptor: int) -> None:
            if rebuilt is not None:
                _copy(rebuilt.descriptor.number, descriptor)

        shared.nameless.copy(handle.descriptor, view.recipe.reference)
        path = None if file.removed else file.path
        descriptor = plain.materialise(shared.store, path, handle.descriptor, write_view)
        try:
            st = os.fstat(descriptor)
            shared.handles.turn_plain(file, descriptor, (st.st_dev, st.st_ino))
        finally:
            os.close(descriptor)


def _copy(source: int, target: int) -> None:
    """The whole content of ``source`` to ``target``, from offset 0."""
    offset, size = 0, os.fstat(source).st_size
    while offset < size:
        count = os.sendfile(target, source, offset, size - offset)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        offset += count
