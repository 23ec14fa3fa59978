"""Descriptors of parent directories, so that every operation is one ``*at()`` call and no symlink leads out of the
store.

A parent is opened once with openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS) and kept for a second, as long as the kernel
keeps a directory entry of the mount; a rename or removal of a directory through this mount forgets at once.

Lock: ``_lock`` protects changes of ``_entries``; no system call that can wait on a disk is made under it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict

from esrfs.store.beneath import beneath
from esrfs.vfs.descriptor import Descriptor

_LIFE_SECONDS = 1.0
_MOST = 256
DEFAULT_ACL = "system.posix_acl_default"


class Directory(Descriptor):
    """An open directory, and what was found out about it in the second that it is kept."""

    __slots__ = ("_acl", "_acl_until")

    def __init__(self, number: int, owned: bool = True) -> None:
        super().__init__(number, owned)
        self._acl = False
        self._acl_until = 0.0

    def has_default_acl(self) -> bool:
        """Whether what is created here gets its permissions from a default ACL instead of the umask."""
        now = time.monotonic()
        if now >= self._acl_until:
            try:
                os.getxattr(f"/proc/self/fd/{self.number}", DEFAULT_ACL)
                self._acl = True
            except OSError:
                self._acl = False
            self._acl_until = now + _LIFE_SECONDS
        return self._acl

    def forget_acl(self) -> None:
        self._acl_until = 0.0


class Directories:
    def __init__(self, root: int) -> None:
        self._root = Directory(root, owned=False)
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[Directory, float]] = OrderedDict()

    def parent(self, path: str) -> tuple[Directory, str]:
        """The directory that holds ``path`` (relative to the root) and the last component; ``.`` for the root itself.

        Keep the returned object alive as long as its descriptor is in use. Raises OSError.
        """
        head, slash, name = path.rpartition("/")
        if not slash:
            return self._root, name or "."
        now = time.monotonic()
        entry = self._entries.get(head)  # without the lock, for speed: one step for the interpreter
        if entry is not None and now < entry[1]:
            return entry[0], name
        directory = Directory(beneath(self._root.number, head, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        with self._lock:
            self._entries[head] = (directory, now + _LIFE_SECONDS)
            self._entries.move_to_end(head)
            if len(self._entries) > _MOST:
                self._entries.popitem(last=False)
        return directory, name

    def forget(self, path: str) -> None:
        """``path`` was renamed or removed, or its ACL changed: forget it and everything below it."""
        if not path:
            self._root.forget_acl()
        prefix = path + "/"
        with self._lock:
            for key in [key for key in self._entries if key == path or key.startswith(prefix)]:
                del self._entries[key]
