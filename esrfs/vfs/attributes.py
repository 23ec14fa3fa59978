"""What a program sees of a file's attributes: everything from the store, but the size of a photograph from its blob.

A blob's size is 13 mod 64, so most files cost no look. A blob is opened once for each identity (device, inode, size,
mtime and ctime: ext4 hands out a freed inode number at once) in the life of a mount; the next one begins anew.
Dictionary operations are atomic under the interpreter's lock; a lost race costs one more look at a blob's last 64
bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from esrfs.store.examine import examine, may_be_blob
from esrfs.store.identity import Identity
from esrfs.store.layout import Store

_MOST = 100_000
_TO_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_SHOWN_AS_IT_IS = frozenset((errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ENODEV))
"""Why a file can't be opened whose size is none of a photograph: not ours to read, or no regular file any more. All
other errors are the program's: it would take a blob's size for the photograph's, and copy a part of it."""


class Attributes:
    def __init__(self, store: Store, is_plain: Callable[[tuple[int, int]], bool]) -> None:
        """``is_plain``: whether (device, inode) is open as a plain file, which its last bytes can't change."""
        self._store = store
        self._is_plain = is_plain
        self._sizes: dict[Identity, int] = {}

    def size(self, directory: int, name: str, st: os.stat_result) -> int:
        """The size that the view shows, in bytes, for the entry ``name`` whose lstat is ``st``. Raises OSError when a
        blob can't be told from another file."""
        if not may_be_blob(st) or self._is_plain((st.st_dev, st.st_ino)):
            return st.st_size
        identity = Identity.from_stat(st)
        size = self._sizes.get(identity)
        if size is not None:
            return size
        try:
            try:
                descriptor = os.open(name, _TO_LOOK | os.O_NONBLOCK, dir_fd=directory)
            except BlockingIOError:  # another machine's server or program has a write lease, and was told to let go
                descriptor = os.open(name, _TO_LOOK, dir_fd=directory)
        except OSError as error:
            if error.errno in _SHOWN_AS_IT_IS:
                return st.st_size
            raise
        try:
            now = os.fstat(descriptor)
            blob = examine(self._store, descriptor, now)
        finally:
            os.close(descriptor)
        size = st.st_size if blob is None else blob.view_size
        self.remember(Identity.from_stat(now), size)
        return size

    def remember(self, identity: Identity, size: int) -> None:
        if len(self._sizes) >= _MOST:
            self._sizes.clear()
        self._sizes[identity] = size
