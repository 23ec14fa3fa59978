"""What a program sees of a file's attributes: everything from the store, but the size of a photograph from its blob.

A blob's size is 13 mod 64, so most files cost no look. A blob is opened once for each identity (device, inode, size,
mtime and ctime: ext4 hands out a freed inode number at once). Dictionary operations are atomic under the
interpreter's lock; a lost race costs one more look at a blob's last 64 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from esrfs.store.examine import examine, may_be_blob
from esrfs.store.identity import Identity
from esrfs.store.layout import Store

_MOST = 100_000


class Attributes:
    def __init__(self, store: Store, is_plain: Callable[[tuple[int, int]], bool]) -> None:
        """``is_plain``: whether (device, inode) is open as a plain file, which its last bytes can't change."""
        self._store = store
        self._is_plain = is_plain
        self._sizes: dict[Identity, int] = {}

    def size(self, directory: int, name: str, st: os.stat_result) -> int:
        """The size that the view shows, in bytes, for the entry ``name`` whose lstat is ``st``."""
        if not may_be_blob(st) or self._is_plain((st.st_dev, st.st_ino)):
            return st.st_size
        identity = Identity.from_stat(st)
        size = self._sizes.get(identity)
        if size is not None:
            return size
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            return st.st_size  # gone or replaced since, or not ours to read: the kernel asks again when it matters
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
