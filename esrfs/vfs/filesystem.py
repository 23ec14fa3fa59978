"""The operations of the mounted filesystem, on paths relative to the store's root (``str`` with surrogateescape, ""
is the root) and on handle numbers.

Plain files pass through to the store's filesystem; a blob is shown as its photograph. Every operation raises OSError
with the errno that the program shall see.

What takes one system call is here. Beside it: ``opening`` (and the order in which a file is used, so that compaction
never swaps it under a program), ``changing`` (a blob becomes a plain file), ``names`` (renaming and deleting),
``creating`` (whose is what is made).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from esrfs.cache import ViewCache
from esrfs.engine.client import Engine
from esrfs.engine.protocol import Lane
from esrfs.store.beneath import beneath
from esrfs.store.layout import RESERVED, Store
from esrfs.upkeep.claims import Claims
from esrfs.vfs import changing, creating, names, native, opening, xattrs
from esrfs.vfs.creating import Caller
from esrfs.vfs.directories import DEFAULT_ACL
from esrfs.vfs.opening import Opened
from esrfs.vfs.removed import Hidden
from esrfs.vfs.shared import Shared, creatable, visible
from esrfs.vfs.view import Waits

_SHARE_OF_THREADS_THAT_MAY_WAIT = 0.75


class Entry(NamedTuple):
    """A directory entry, with attributes where they were asked for and could be had."""

    name: str
    attributes: os.stat_result | None
    size: int
    inode: int
    kind: int
    """File type bits of st_mode. This and ``inode`` are 0 where nothing is known but the name."""


class Filesystem:
    def __init__(
        self,
        store: Store,
        engine: Engine,
        cache: ViewCache,
        claims: Claims,
        *,
        on_change: Callable[[str], None] = lambda path: None,
        explain: Callable[[str], dict[str, object]] | None = None,
        wait_seconds: float = 120.0,
        threads: int = 1024,
        errors_at_close: bool = True,
    ) -> None:
        """``on_change`` is told each path whose file came to rest after a change; ``explain`` answers ``user.esrfs.*``;
        ``threads`` is how many callbacks can run at once: three quarters of them may wait for reconstructions;
        ``errors_at_close``: the store's filesystem may tell of a failed write only at close, as those on a network do.
        """
        self._shared = shared = Shared(
            store=store,
            engine=engine,
            cache=cache,
            claims=claims,
            waits=Waits(int(threads * _SHARE_OF_THREADS_THAT_MAY_WAIT), wait_seconds),
            on_change=on_change,
            errors_at_close=errors_at_close,
            gives_away=os.geteuid() == 0,
        )
        self._explain = explain
        self.store, self.cache, self.claims, self.waits = store, cache, claims, shared.waits
        self.handles, self.attributes = shared.handles, shared.attributes
        self._directories, self._capabilities = shared.directories, shared.capabilities

    # Names.

    def stat(self, path: str) -> tuple[os.stat_result, int]:
        """lstat, and the size that the view shows."""
        directory, name = self._directories.parent(visible(path))
        st = os.stat(name, dir_fd=directory.number, follow_symlinks=False)
        return st, self.attributes.size(directory.number, name, st)

    def stat_handle(self, number: int) -> tuple[os.stat_result, int]:
        return opening.shown_by(self.handles.get(number))

    def readlink(self, path: str) -> str:
        directory, name = self._directories.parent(visible(path))
        return os.readlink(name, dir_fd=directory.number)

    def mknod(self, path: str, mode: int, device: int, caller: Caller) -> None:
        directory, name = self._directories.parent(creatable(path))
        os.mknod(name, creating.permissions(directory, mode, caller), device, dir_fd=directory.number)
        creating.give(self._shared, directory.number, name, mode, caller)

    def mkdir(self, path: str, mode: int, caller: Caller) -> None:
        directory, name = self._directories.parent(creatable(path))
        os.mkdir(name, creating.permissions(directory, mode, caller), dir_fd=directory.number)
        self._directories.forget(path)  # should another have had this name, moved away behind the mount
        creating.give(self._shared, directory.number, name, 0, caller)

    def symlink(self, target: str, path: str, caller: Caller) -> None:
        directory, name = self._directories.parent(creatable(path))
        os.symlink(target, name, dir_fd=directory.number)
        creating.give(self._shared, directory.number, name, 0, caller)

    def unlink(self, path: str) -> None:
        names.unlink(self._shared, path)

    def hide(self, path: str) -> Hidden:
        """Unlink a file that is open, or was until just now; what stands for it from now on."""
        return names.hide(self._shared, path)

    def release_hidden(self, number: int) -> None:
        names.release_hidden(self._shared, number)

    def give_name_back(self, hidden: Hidden) -> None:
        """The rename that was to replace the file failed."""
        names.give_name_back(self._shared, hidden)

    def rmdir(self, path: str) -> None:
        directory, name = self._directories.parent(visible(path))
        os.rmdir(name, dir_fd=directory.number)
        self._directories.forget(path)

    def rename(self, old: str, new: str, flags: int) -> None:
        """renameat2 with its flags: none, RENAME_NOREPLACE or RENAME_EXCHANGE."""
        names.rename(self._shared, old, new, flags)

    def link(self, existing: str, new: str) -> None:
        from_directory, from_name = self._directories.parent(visible(existing))
        to_directory, to_name = self._directories.parent(creatable(new))
        os.link(
            from_name,
            to_name,
            src_dir_fd=from_directory.number,
            dst_dir_fd=to_directory.number,
            follow_symlinks=False,
        )

    # Attributes.

    def chmod(self, path: str, mode: int) -> None:
        directory, name = self._directories.parent(visible(path))
        creating.chmod(directory.number, name, mode)

    def chmod_handle(self, number: int, mode: int) -> None:
        os.fchmod(self.handles.get(number).descriptor, mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        directory, name = self._directories.parent(visible(path))
        os.chown(name, uid, gid, dir_fd=directory.number, follow_symlinks=False)

    def chown_handle(self, number: int, uid: int, gid: int) -> None:
        os.fchown(self.handles.get(number).descriptor, uid, gid)

    def utimens(self, path: str, timespecs: int | None) -> None:
        """``timespecs``: address of two ``struct timespec`` as they came, with UTIME_NOW and UTIME_OMIT; None for
        now."""
        directory, name = self._directories.parent(visible(path))
        native.utimens_at(directory.number, name, timespecs)

    def utimens_handle(self, number: int, timespecs: int | None) -> None:
        native.futimens(self.handles.get(number).descriptor, timespecs)

    def truncate(self, path: str, length: int) -> None:
        opened = self.open(path, os.O_WRONLY | (os.O_TRUNC if length == 0 else 0))
        try:
            if length:
                self.truncate_handle(opened.number, length)
        finally:
            self.release(opened.number)

    def truncate_handle(self, number: int, length: int) -> None:
        handle = self.handles.get(number)
        changing.begin_change(self._shared, handle)
        os.ftruncate(handle.descriptor, length)

    def statfs(self) -> os.statvfs_result:
        return os.fstatvfs(self.store.root_fd)

    # Extended attributes of a path, or of a handle's file by the handle's number.

    def has_no_capability(self, path: str) -> bool:
        """Whether the file is known to have no ``security.capability``, which the kernel asks for at each write."""
        return self._capabilities.is_known_absent(path)

    def getxattr(self, path: str | int, name: str) -> bytes:
        if isinstance(path, int):
            return os.getxattr(self.handles.get(path).descriptor, name)
        visible(path)
        if name == xattrs.CAPABILITY and self.has_no_capability(path):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        if xattrs.is_ours(name):
            if self._explain is None:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            return xattrs.value(name, self._explain(path))
        directory, last = self._directories.parent(path)
        try:
            return os.getxattr(f"/proc/self/fd/{directory.number}/{last}", name, follow_symlinks=False)
        except OSError as error:
            if name == xattrs.CAPABILITY and error.errno == errno.ENODATA:
                self._capabilities.note_absent(path)
            raise

    def setxattr(self, path: str | int, name: str, value: bytes, flags: int) -> None:
        if xattrs.is_ours(name):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if isinstance(path, int):
            os.setxattr(self.handles.get(path).descriptor, name, value, flags)
            return
        directory, last = self._directories.parent(visible(path))
        os.setxattr(f"/proc/self/fd/{directory.number}/{last}", name, value, flags, follow_symlinks=False)
        if name == DEFAULT_ACL:
            self._directories.forget(path)
        elif name == xattrs.CAPABILITY:
            self._capabilities.forget()

    def listxattr(self, path: str | int) -> list[str]:
        if isinstance(path, int):
            return os.listxattr(self.handles.get(path).descriptor)
        directory, last = self._directories.parent(visible(path))
        return os.listxattr(f"/proc/self/fd/{directory.number}/{last}", follow_symlinks=False)

    def removexattr(self, path: str | int, name: str) -> None:
        if xattrs.is_ours(name):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if isinstance(path, int):
            os.removexattr(self.handles.get(path).descriptor, name)
            return
        directory, last = self._directories.parent(visible(path))
        os.removexattr(f"/proc/self/fd/{directory.number}/{last}", name, follow_symlinks=False)
        if name == DEFAULT_ACL:
            self._directories.forget(path)

    # Directories.

    def opendir(self, path: str) -> int:
        return self.handles.add_directory(
            beneath(self.store.root_fd, visible(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        )

    def readdir(self, number: int, with_attributes: bool) -> Iterator[Entry]:
        """All entries but ``.`` and ``..``; the reserved directory is left out of the root's."""
        descriptor = self.handles.directory(number)
        at_root = os.path.sameopenfile(descriptor, self.store.root_fd)
        if not with_attributes:
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    if not (at_root and entry.name == RESERVED):
                        yield Entry(entry.name, None, 0, entry.inode(), _kind(entry))
            return
        for name in os.listdir(descriptor):
            if at_root and name == RESERVED:
                continue
            st = None
            try:
                st = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                found = Entry(name, st, self.attributes.size(descriptor, name, st), st.st_ino, st.st_mode)
            except FileNotFoundError:
                continue  # removed since
            except OSError:  # who asks for this one's attributes gets the error; the others are listed all the same
                known = (0, 0) if st is None else (st.st_ino, stat.S_IFMT(st.st_mode))
                found = Entry(name, None, 0, *known)
            yield found

    def releasedir(self, number: int) -> None:
        self.handles.remove_directory(number)

    def fsyncdir(self, number: int) -> None:
        os.fsync(self.handles.directory(number))

    # Files.

    def create(self, path: str, flags: int, mode: int, caller: Caller) -> Opened:
        return opening.create(self._shared, path, flags, mode, caller)

    def open(self, path: str, flags: int) -> Opened:
        return opening.open_file(self._shared, path, flags)

    def open_hidden(self, hidden: Hidden, flags: int) -> Opened:
        """Open, through /proc, a file that has no name any more."""
        return opening.open_hidden(self._shared, hidden, flags)

    def read_into(self, number: int, address: int, size: int, offset: int) -> int:
        """Read up to ``size`` bytes at ``offset`` to memory at ``address``; the number of bytes, 0 at the end."""
        handle = self.handles.get(number)
        view = handle.file.view
        if view is None:
            return native.pread_into(handle.descriptor, address, size, offset)
        count = view.read_into(address, size, offset, handle.file.path)
        if count is not None:
            return count
        content = changing.content(handle, view)
        return native.pread_into(content.descriptor.number, address, size, offset)

    def write_from(self, number: int, address: int, size: int, offset: int, append: bool = False) -> int:
        """``append``: at the end, wherever that is by now, and not at ``offset``."""
        handle = self.handles.get(number)
        if not handle.written or handle.file.view is not None:
            changing.begin_change(self._shared, handle)
        if append:
            return native.append_from(handle.descriptor, address, size, offset)
        return native.pwrite_from(handle.descriptor, address, size, offset)

    def fallocate(self, number: int, mode: int, offset: int, length: int) -> None:
        handle = self.handles.get(number)
        changing.begin_change(self._shared, handle)
        native.fallocate(handle.descriptor, mode, offset, length)

    def lseek(self, number: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE: a view is all data."""
        handle = self.handles.get(number)
        view = handle.file.view
        if view is None:
            return os.lseek(handle.descriptor, offset, whence)
        if offset >= view.size or offset < 0:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return offset if whence == os.SEEK_DATA else view.size

    def flush(self, number: int) -> None:
        """A program closes a descriptor, or died: what only it waited for is no longer urgent. Reports late write
        errors."""
        handle = self.handles.get(number)
        view = handle.file.view
        if view is not None:
            view.demote(number)
        if handle.writable and handle.file.view is None:
            os.close(os.dup(handle.descriptor))  # NFS and quotas report from close

    def fsync(self, number: int, data_only: bool) -> None:
        handle = self.handles.get(number)
        if handle.file.view is not None:
            return  # a blob is durable before it takes a name
        (os.fdatasync if data_only else os.fsync)(handle.descriptor)

    def release(self, number: int) -> None:
        opening.release(self._shared, number)

    # The cache.

    def clear_cache(self) -> int:
        """Drop all rebuilt views that nobody has open; how many there were in the cache."""
        self._shared.recent.clear()
        return self.cache.clear()

    # The mount's end.

    def close(self) -> None:
        """To be called when nobody uses it any more. What is still being rebuilt, for a later try, is given up."""
        self.waits.ending = True
        self._shared.removed.close()

    def warm(self, path: str) -> None:
        """Have the view of the blob at ``path`` in the cache; waits behind readers. Raises OSError."""
        opened = self.open(path, os.O_RDONLY)
        try:
            handle = self.handles.get(opened.number)
            view = handle.file.view
            if view is not None and view.content is None:
                changing.content(handle, view, Lane.READ_AHEAD)
        finally:
            self.release(opened.number)

    def fail_waiting_reads(self) -> None:
        """Let nobody wait any longer: the mount ends."""
        self.waits.ending = True
        self._shared.engine.close()


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    with contextlib.suppress(OSError):
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    return 0
