"""The peer: a tuned pass-through on mfusepy that does nothing but hand every call to a directory.

It has the corrections of DESIGN 10 that cost or gain speed (thread states are kept, reads and writes go straight into
libfuse's buffer, the same limits and timeouts; extended attributes, as the kernel asks for one at every write), and
none of what esrfs adds: no views, no handles that turn, no claims, no protection against symlinks. Started as
``python -m benchmarks.passthrough DIRECTORY MOUNTPOINT``.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from types import SimpleNamespace
from typing import Any

from esrfs.mount import adapter
from esrfs.mount.binding import mfusepy
from esrfs.vfs import native


class Passthrough(mfusepy.FUSE):  # type: ignore[misc]
    def __init__(self, root: str, mountpoint: str) -> None:
        self._root = os.fsencode(root)
        names = "getattr mkdir unlink rmdir rename open read write "
        names += "release opendir readdir releasedir init create utimens getxattr"
        super().__init__(
            SimpleNamespace(use_ns=True, **dict.fromkeys(names.split(), True)),
            mountpoint,
            foreground=True,
            fsname="passthrough",
            default_permissions=True,
            allow_other=os.geteuid() == 0,
            max_threads="64",
            max_idle_threads="64",
        )

    _wrapper = adapter.Adapter._wrapper

    def init_fuse_3(self, connection: Any, config: Any) -> None:
        connection.contents.max_background = adapter.MAX_BACKGROUND
        config.contents.nullpath_ok = 1
        config.contents.hard_remove = 1
        config.contents.use_ino = 1
        config.contents.attr_timeout = config.contents.entry_timeout = adapter.ATTRIBUTE_SECONDS

    def getattr_fuse_3(self, path: bytes | None, target: Any, info: Any) -> None:
        st = os.fstat(info.contents.fh) if path is None else os.lstat(self._root + path)
        adapter._fill(target.contents, st, st.st_size)

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(self._root + path, mode)

    def unlink(self, path: bytes) -> None:
        os.unlink(self._root + path)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self._root + path)

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> None:
        os.rename(self._root + old, self._root + new)

    def utimens_fuse_3(self, path: bytes | None, times: Any, info: Any) -> None:
        os.utime(info.contents.fh if path is None else self._root + path)

    def getxattr(self, path: bytes, name: bytes, buffer: Any, size: int) -> int:
        return adapter.Adapter._answer(os.getxattr(self._root + path, name, follow_symlinks=False), buffer, size)

    def open(self, path: bytes, info: Any) -> None:
        info.contents.fh = os.open(self._root + path, info.contents.flags & os.O_ACCMODE)

    def create(self, path: bytes, mode: int, info: Any) -> None:
        flags = info.contents.flags & os.O_ACCMODE | os.O_CREAT
        info.contents.fh = os.open(self._root + path, flags, stat.S_IMODE(mode))

    def read(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        return native.pread_into(info.contents.fh, ctypes.addressof(buffer.contents), size, offset)

    def write(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        return native.pwrite_from(info.contents.fh, ctypes.addressof(buffer.contents), size, offset)

    def release(self, path: bytes | None, info: Any) -> None:
        os.close(info.contents.fh)

    def opendir(self, path: bytes, info: Any) -> None:
        info.contents.fh = os.open(self._root + path, os.O_RDONLY | os.O_DIRECTORY)

    def releasedir(self, path: bytes | None, info: Any) -> None:
        os.close(info.contents.fh)

    def readdir_fuse_3(self, path: bytes | None, buffer: Any, filler: Any, *rest: Any) -> None:
        st = mfusepy.c_stat()
        for name in (b".", b".."):
            filler(buffer, name, None, 0, 0)
        with os.scandir(rest[1].contents.fh) as entries:
            for entry in entries:
                adapter._fill(st, entry.stat(follow_symlinks=False), 0)
                filler(buffer, os.fsencode(entry.name), ctypes.byref(st), 0, 0)


if __name__ == "__main__":
    os.umask(0)
    Passthrough(sys.argv[1], sys.argv[2])
    os._exit(0)
