"""FUSE callbacks to vfs operations, and the corrections that mfusepy needs on libfuse3 (DESIGN 10).

mfusepy's own methods drop rename flags and the handle of truncate, chmod, chown and utimens, fold UTIME_NOW and
UTIME_OMIT into numbers, and copy all data twice. So each method is replaced by one that takes what libfuse gave.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from esrfs.mount import binding
from esrfs.mount.binding import mfusepy
from esrfs.mount.threads import keep_state
from esrfs.vfs import xattrs
from esrfs.vfs.creating import Caller
from esrfs.vfs.filesystem import Filesystem
from esrfs.vfs.opening import Opened
from esrfs.vfs.removed import Hidden

log = logging.getLogger("esrfs.mount")

MAX_BACKGROUND = 1024
ATTRIBUTE_SECONDS = 1.0

_CALLBACKS = (
    "getattr",
    "readlink",
    "mknod",
    "mkdir",
    "unlink",
    "rmdir",
    "symlink",
    "rename",
    "link",
    "chmod",
    "chown",
    "truncate",
    "open",
    "read",
    "write",
    "statfs",
    "flush",
    "release",
    "fsync",
    "setxattr",
    "getxattr",
    "listxattr",
    "removexattr",
    "opendir",
    "readdir",
    "releasedir",
    "fsyncdir",
    "init",
    "create",
    "utimens",
    "fallocate",
    "lseek",
)

_FUSE_CAP_DONT_MASK = 1 << 6
_FUSE_CAP_SPLICE_WRITE = 1 << 7
_FUSE_CAP_SPLICE_MOVE = 1 << 8
_FUSE_CAP_SPLICE_READ = 1 << 9
_FUSE_CAP_READDIRPLUS = 1 << 13
_FUSE_CAP_READDIRPLUS_AUTO = 1 << 14
_FUSE_CAP_POSIX_ACL = 1 << 19
_FUSE_CAP_DIRECT_IO_ALLOW_MMAP = 1 << 28
"""Known to libfuse 3.17 and newer."""
_HIDDEN = re.compile(rb"(.*)/\.fuse_hidden[0-9a-f]{16}", re.DOTALL)
_LOOKED_FOR_HIDDEN = 1 << 30
"""A mark in the umask of libfuse's context, which is made anew for each request; no umask has this bit."""
_FORGOTTEN_SECONDS = 10.0
"""So long at most does libfuse take from the release of a file to the unlink of its hidden name."""
_CAPABILITY = xattrs.CAPABILITY.encode()
_READDIR_PLUS = 1
_FILL_DIR_PLUS = 2

_threads = threading.local()
_PENDING = re.compile(r"^SigPnd:\s*([0-9a-f]+)$", re.MULTILINE)
_SIGKILL_BIT = 1 << (signal.SIGKILL - 1)
"""Set in every thread of a process that a signal, of whatever kind, is about to end."""


def _name(path: bytes) -> str:
    """A path as FUSE gives it (``/a/b``) as the vfs takes it (``a/b``)."""
    return os.fsdecode(path[1:])


def _caller() -> Caller:
    context = binding.context().contents
    return Caller(context.uid, context.gid, context.umask)


def _caller_was_killed() -> bool:
    """Whether the program whose request this thread works on is gone, or only waits for the answer to be gone.

    The kernel lets nobody who was killed go before his read is answered, and of readers through the page cache it does
    not even say that they were.
    """
    context = binding.context()
    pid = context.contents.pid if context else 0  # 0: no callback, or a caller whom this PID namespace can't see
    if pid <= 0:
        return False
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        try:
            os.kill(pid, 0)  # /proc may hide what belongs to others
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False
    pending = _PENDING.search(status)
    return pending is not None and bool(int(pending[1], 16) & _SIGKILL_BIT)


def _timespecs(times: Any) -> int | None:
    return ctypes.addressof(times.contents) if times else None


def _fill(target: Any, st: os.stat_result, size: int) -> None:
    target.st_dev = st.st_dev
    target.st_ino = st.st_ino
    target.st_nlink = st.st_nlink
    target.st_mode = st.st_mode
    target.st_uid = st.st_uid
    target.st_gid = st.st_gid
    target.st_rdev = st.st_rdev
    target.st_size = size
    target.st_blksize = st.st_blksize
    # A view tells what the store uses, but never 0: `tar -S` would take it for one hole.
    target.st_blocks = st.st_blocks if size == st.st_size else max(1, st.st_blocks)
    target.st_atimespec.tv_sec, target.st_atimespec.tv_nsec = divmod(st.st_atime_ns, 1_000_000_000)
    target.st_mtimespec.tv_sec, target.st_mtimespec.tv_nsec = divmod(st.st_mtime_ns, 1_000_000_000)
    target.st_ctimespec.tv_sec, target.st_ctimespec.tv_nsec = divmod(st.st_ctime_ns, 1_000_000_000)


class Adapter(mfusepy.FUSE):  # type: ignore[misc]
    """Serves ``filesystem`` until the mount ends: the constructor returns then, as mfusepy's does.

    Raises RuntimeError, with libfuse's status, where nothing could be mounted.
    """

    def __init__(
        self, filesystem: Filesystem, mountpoint: str, options: dict[str, str | bool], on_init: Callable[[], None]
    ) -> None:
        self._fs = filesystem
        self._on_init = on_init
        self._began = False
        self._hidden: dict[bytes, Hidden] = {}
        filesystem.waits.caller_was_killed = _caller_was_killed
        try:
            super().__init__(
                SimpleNamespace(use_ns=True, **dict.fromkeys(_CALLBACKS, True)), mountpoint, foreground=True, **options
            )
        except RuntimeError as status:
            # A mount that ends with its last open file: where a thread is just then taking the release of that file,
            # the kernel answers ECONNABORTED instead of ENODEV, and libfuse takes it for an error.
            if not self._began:
                raise
            log.info("%s: libfuse ended with status %s", mountpoint, status)

    def _wrapper(self, method: Callable[..., int | None], *arguments: Any) -> int:
        try:
            keep_state()
            return method(*arguments) or 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        except KeyError:
            return -errno.EBADF
        except Exception:
            log.exception("%s failed in a way that esrfs did not expect; the program gets EIO", method.__name__)
            return -errno.EIO

    def init_fuse_3(self, connection: Any, config: Any) -> None:
        wanted = connection.contents
        wanted.max_background = MAX_BACKGROUND
        wanted.congestion_threshold = MAX_BACKGROUND * 3 // 4
        wanted.want &= ~(_FUSE_CAP_SPLICE_READ | _FUSE_CAP_SPLICE_WRITE | _FUSE_CAP_SPLICE_MOVE)
        # With POSIX_ACL the kernel enforces ACLs, and leaves the umask to the file system (a default ACL replaces it).
        for capability in (
            _FUSE_CAP_DONT_MASK,
            _FUSE_CAP_POSIX_ACL,
            _FUSE_CAP_READDIRPLUS,
            _FUSE_CAP_READDIRPLUS_AUTO,
            _FUSE_CAP_DIRECT_IO_ALLOW_MMAP,
        ):
            if wanted.capable & capability:
                wanted.want |= capability
        settings = config.contents
        settings.nullpath_ok = 1
        settings.hard_remove = 0  # else what has no name has no fstat either; see _hide
        settings.use_ino = 1
        settings.attr_timeout = ATTRIBUTE_SECONDS
        settings.entry_timeout = ATTRIBUTE_SECONDS
        settings.negative_timeout = 0.0
        self._began = True
        self._on_init()

    # What was deleted while it was open. libfuse calls it .fuse_hidden… then, in its own mind and in what it asks for.
    # A program may rename a file of its own to such a name, too. The difference: libfuse looks within the same request
    # whether the name is free.

    def _note_look(self, path: bytes) -> None:
        if _HIDDEN.fullmatch(path):
            _threads.looked_for = path
            binding.context().contents.umask |= _LOOKED_FOR_HIDDEN

    @staticmethod
    def _looked_in_this_request() -> bool:
        return bool(binding.context().contents.umask & _LOOKED_FOR_HIDDEN)

    def _hide(self, old: bytes, new: bytes, flags: int) -> bool:
        """Whether this rename is libfuse's way to delete a file that is open."""
        match = _HIDDEN.fullmatch(new)
        if (
            match is None
            or flags
            or old.rpartition(b"/")[0] != match[1]
            or getattr(_threads, "looked_for", None) != new
            or not self._looked_in_this_request()
        ):
            return False
        _threads.looked_for = None
        hidden = self._fs.hide(_name(old))
        expired = time.monotonic() - _FORGOTTEN_SECONDS
        for name, each in list(self._hidden.items()):
            if each.handle not in self._fs.handles and each.since < expired:
                self._hidden.pop(name, None)  # libfuse forgets those that were closed just when they were hidden
        self._hidden[new[new.rfind(b"/") + 1 :]] = _threads.hidden = hidden
        return True

    def _hidden_at(self, path: bytes | None) -> Hidden | None:
        return self._hidden.get(path[path.rfind(b"/") + 1 :]) if self._hidden and path is not None else None

    def _path_or_handle(self, path: bytes) -> str | int:
        hidden = self._hidden_at(path)
        return _name(path) if hidden is None else hidden.handle

    # Names and attributes.

    def getattr_fuse_3(self, path: bytes | None, target: Any, info: Any) -> None:
        hidden = self._hidden_at(path) if self._hidden else None
        if path is not None and hidden is None:
            if b"/.fuse_hidden" in path:
                self._note_look(path)
            _fill(target.contents, *self._fs.stat(_name(path)))
            return
        if hidden is not None and hidden.handle not in self._fs.handles:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        _fill(target.contents, *self._fs.stat_handle(info.contents.fh if hidden is None else hidden.handle))
        if hidden is not None and hidden.staged is None:
            target.contents.st_nlink += 1  # libfuse takes one off, for the name that it thinks there is

    def readlink(self, path: bytes, buffer: Any, size: int) -> None:
        target = os.fsencode(self._fs.readlink(_name(path)))[: size - 1] + b"\0"
        ctypes.memmove(buffer, target, len(target))

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        self._fs.mknod(_name(path), mode, device, _caller())

    def mkdir(self, path: bytes, mode: int) -> None:
        self._fs.mkdir(_name(path), mode, _caller())

    def unlink(self, path: bytes) -> None:
        hidden = self._hidden_at(path)
        if hidden is None:
            self._fs.unlink(_name(path))
        else:  # the last program closed it
            self._hidden.pop(path[path.rfind(b"/") + 1 :], None)
            self._fs.release_hidden(hidden.handle)

    def rmdir(self, path: bytes) -> None:
        self._fs.rmdir(_name(path))

    def symlink(self, target: bytes, path: bytes) -> None:
        self._fs.symlink(os.fsdecode(target), _name(path), _caller())

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> None:
        if self._hide(old, new, flags):
            return
        replaced: Hidden | None = getattr(_threads, "hidden", None)
        try:
            self._fs.rename(_name(old), _name(new), flags)
        except OSError:
            if replaced is not None and replaced.path == _name(new) and self._looked_in_this_request():
                self._fs.give_name_back(replaced)
            raise

    def link(self, existing: bytes, new: bytes) -> None:
        self._fs.link(_name(existing), _name(new))

    def chmod_fuse_3(self, path: bytes | None, mode: int, info: Any) -> None:
        hidden = self._hidden_at(path)
        if hidden is not None:
            self._fs.chmod_handle(hidden.handle, mode)
        elif path is None:
            self._fs.chmod_handle(info.contents.fh, mode)
        else:
            self._fs.chmod(_name(path), mode)

    def chown_fuse_3(self, path: bytes | None, uid: int, gid: int, info: Any) -> None:
        uid, gid = ctypes.c_int(uid).value, ctypes.c_int(gid).value  # -1 stands for "as it is"
        hidden = self._hidden_at(path)
        if hidden is not None:
            self._fs.chown_handle(hidden.handle, uid, gid)
        elif path is None:
            self._fs.chown_handle(info.contents.fh, uid, gid)
        else:
            self._fs.chown(_name(path), uid, gid)

    def truncate_fuse_3(self, path: bytes | None, length: int, info: Any) -> None:
        if info:
            self._fs.truncate_handle(info.contents.fh, length)
        elif path is not None:
            self._fs.truncate(_name(path), length)

    def utimens_fuse_3(self, path: bytes | None, times: Any, info: Any) -> None:
        hidden = self._hidden_at(path)
        if hidden is not None:
            self._fs.utimens_handle(hidden.handle, _timespecs(times))
        elif path is None:
            self._fs.utimens_handle(info.contents.fh, _timespecs(times))
        else:
            self._fs.utimens(_name(path), _timespecs(times))

    def statfs(self, path: bytes, target: Any) -> None:
        found = self._fs.statfs()
        values = target.contents
        for field in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "flag", "namemax"):
            setattr(values, f"f_{field}", getattr(found, f"f_{field}"))

    # Extended attributes. A size of 0 asks how much room is needed.

    def setxattr(self, path: bytes, name: bytes, value: Any, size: int, flags: int) -> None:
        self._fs.setxattr(self._path_or_handle(path), os.fsdecode(name), ctypes.string_at(value, size), flags)

    def getxattr(self, path: bytes, name: bytes, buffer: Any, size: int) -> int:
        if name == _CAPABILITY and self._fs.has_no_capability(_name(path)):
            return -errno.ENODATA  # at each write; an exception costs more
        return self._answer(self._fs.getxattr(self._path_or_handle(path), os.fsdecode(name)), buffer, size)

    def listxattr(self, path: bytes, buffer: Any, size: int) -> int:
        names = b"".join(os.fsencode(name) + b"\0" for name in self._fs.listxattr(self._path_or_handle(path)))
        return self._answer(names, buffer, size)

    @staticmethod
    def _answer(value: bytes, buffer: Any, size: int) -> int:
        if size == 0:
            return len(value)
        if len(value) > size:
            return -errno.ERANGE
        ctypes.memmove(buffer, value, len(value))
        return len(value)

    def removexattr(self, path: bytes, name: bytes) -> None:
        self._fs.removexattr(self._path_or_handle(path), os.fsdecode(name))

    # Directories.

    def opendir(self, path: bytes, info: Any) -> None:
        info.contents.fh = self._fs.opendir(_name(path))

    def readdir_fuse_3(self, path: bytes | None, buffer: Any, filler: Any, *rest: Any) -> None:
        _offset, info, flags = rest
        plus = bool(flags & _READDIR_PLUS)
        st = mfusepy.c_stat()
        for dots in (b".", b".."):
            filler(buffer, dots, None, 0, 0)
        known = ctypes.byref(st)
        for entry in self._fs.readdir(info.contents.fh, plus):
            filled = 0
            if entry.attributes is not None:
                _fill(st, entry.attributes, entry.size)
                filled = _FILL_DIR_PLUS
            else:
                st.st_ino, st.st_mode = entry.inode, entry.kind
            if filler(buffer, os.fsencode(entry.name), known if entry.inode else None, 0, filled):
                break

    def releasedir(self, path: bytes | None, info: Any) -> None:
        self._fs.releasedir(info.contents.fh)

    def fsyncdir(self, path: bytes | None, data_only: int, info: Any) -> None:
        self._fs.fsyncdir(info.contents.fh)

    # Files.

    @staticmethod
    def _tell(info: Any, opened: Opened) -> None:
        # Fields of a structure cost more than a comparison, and most opens set none.
        number, keep_cache, direct_io, flushes = opened
        info.fh = number
        if keep_cache:
            info.keep_cache = 1
        if direct_io:
            info.direct_io = 1
        if not flushes:
            info.noflush = 1  # one message less at each close

    def create(self, path: bytes, mode: int, info: Any) -> None:
        self._tell(info.contents, self._fs.create(_name(path), info.contents.flags, mode, _caller()))

    def open(self, path: bytes, info: Any) -> None:
        file = info.contents
        hidden = self._hidden_at(path) if self._hidden else None
        if hidden is None:
            self._tell(file, self._fs.open(_name(path), file.flags))
        else:
            self._tell(file, self._fs.open_hidden(hidden, file.flags))

    def read(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        return self._fs.read_into(info.contents.fh, ctypes.addressof(buffer.contents), size, offset)

    def write(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        file = info.contents
        append = bool(file.flags & os.O_APPEND) and not file.writepage
        return self._fs.write_from(file.fh, ctypes.addressof(buffer.contents), size, offset, append)

    def flush(self, path: bytes | None, info: Any) -> None:
        self._fs.flush(info.contents.fh)

    def release(self, path: bytes | None, info: Any) -> None:
        self._fs.release(info.contents.fh)

    def fsync(self, path: bytes | None, data_only: int, info: Any) -> None:
        self._fs.fsync(info.contents.fh, bool(data_only))

    def fallocate(self, path: bytes | None, mode: int, offset: int, length: int, info: Any) -> None:
        self._fs.fallocate(info.contents.fh, mode, offset, length)

    def lseek(self, path: bytes | None, offset: int, whence: int, info: Any) -> int:
        return self._fs.lseek(info.contents.fh, offset, whence)
