"""The operations of the mounted filesystem, on paths relative to the store's root (``str`` with surrogateescape, ""
is the root) and on handle numbers.

Plain files pass through to the store's filesystem; a blob is shown as its photograph. Every operation raises OSError
with the errno that the program shall see.

Using a file follows one order, so that compaction never swaps it under a program (see ``upkeep/claims.py``): open it,
enter the handle in the table, enter the claim; after waiting for a swap, start over by name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from esrfs.cache import ViewCache
from esrfs.engine.client import Engine
from esrfs.engine.protocol import Lane
from esrfs.store import linux, plain
from esrfs.store.beneath import beneath
from esrfs.store.examine import examine, is_damaged, may_be_blob, recipe_of
from esrfs.store.identity import Identity
from esrfs.store.layout import RESERVED, Store
from esrfs.store.nameless import LastName, Nameless
from esrfs.upkeep.claims import Claims
from esrfs.vfs import native, xattrs
from esrfs.vfs.attributes import Attributes
from esrfs.vfs.descriptor import Descriptor
from esrfs.vfs.directories import DEFAULT_ACL, Directories, Directory
from esrfs.vfs.handles import Handle, Handles, OpenFile
from esrfs.vfs.recent import Recent
from esrfs.vfs.removed import Hidden, Removed
from esrfs.vfs.view import Content, View, Waits
from esrfs.vfs.wrap import wrap_if_needed

log = logging.getLogger("esrfs.vfs")

_PASSED_TO_STORE = os.O_ACCMODE | os.O_DSYNC | os.O_SYNC
"""O_DIRECT would demand aligned buffers, O_NOATIME the owner's rights; both are between program and mount. O_APPEND is
said with each write: the kernel writes dirty pages of a mapping through whichever handle it finds."""
_ALWAYS = os.O_NOFOLLOW | os.O_CLOEXEC
_TO_READ = os.O_RDONLY | _ALWAYS
_MORE_THAN_READING = os.O_ACCMODE | os.O_TRUNC | os.O_DSYNC | os.O_SYNC
_TRIES = 16
_SHARE_OF_THREADS_THAT_MAY_WAIT = 0.75


class Caller(NamedTuple):
    """Who asks, for what is created."""

    uid: int
    gid: int
    umask: int


class Opened(NamedTuple):
    """A handle, and how the kernel may cache its reads."""

    number: int
    keep_cache: bool = False
    direct_io: bool = False
    flushes: bool = True
    """Whether :meth:`Filesystem.flush` has anything to do for this handle."""


class Entry(NamedTuple):
    """A directory entry, with attributes where they were asked for."""

    name: str
    attributes: os.stat_result | None
    size: int
    inode: int
    kind: int
    """File type bits of st_mode."""


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
        self.store = store
        self._engine = engine
        self.cache = cache
        self.claims = claims
        self._on_change = on_change
        self._explain = explain
        self.handles = Handles()
        self._capabilities = xattrs.Capabilities()
        self._recent = Recent()
        claims.is_open = self.handles.is_open
        self._directories = Directories(store.root_fd)
        self._removed = Removed(store)
        self._nameless = Nameless(store)
        self.attributes = Attributes(store, self.handles.is_plain)
        self.waits = Waits(int(threads * _SHARE_OF_THREADS_THAT_MAY_WAIT), wait_seconds)
        self._gives_away = os.geteuid() == 0
        self._errors_at_close = errors_at_close

    # Names.

    @staticmethod
    def _visible(path: str) -> str:
        """``path``, unless it lies in the reserved directory. Raises ENOENT."""
        if path.startswith(RESERVED) and (len(path) == len(RESERVED) or path[len(RESERVED)] == "/"):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return path

    @staticmethod
    def _creatable(path: str) -> str:
        if path.startswith(RESERVED) and (len(path) == len(RESERVED) or path[len(RESERVED)] == "/"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return path

    def stat(self, path: str) -> tuple[os.stat_result, int]:
        """lstat, and the size that the view shows."""
        directory, name = self._directories.parent(self._visible(path))
        st = os.stat(name, dir_fd=directory.number, follow_symlinks=False)
        return st, self.attributes.size(directory.number, name, st)

    def stat_handle(self, number: int) -> tuple[os.stat_result, int]:
        handle = self.handles.get(number)
        st = os.fstat(handle.descriptor)
        view = handle.file.view
        return st, st.st_size if view is None else view.size

    def readlink(self, path: str) -> str:
        directory, name = self._directories.parent(self._visible(path))
        return os.readlink(name, dir_fd=directory.number)

    def mknod(self, path: str, mode: int, device: int, caller: Caller) -> None:
        directory, name = self._directories.parent(self._creatable(path))
        os.mknod(name, self._mode(directory, mode, caller), device, dir_fd=directory.number)
        self._give(directory.number, name, mode, caller)

    def mkdir(self, path: str, mode: int, caller: Caller) -> None:
        directory, name = self._directories.parent(self._creatable(path))
        os.mkdir(name, self._mode(directory, mode, caller), dir_fd=directory.number)
        self._directories.forget(path)  # should another have had this name, moved away behind the mount
        self._give(directory.number, name, 0, caller)

    def symlink(self, target: str, path: str, caller: Caller) -> None:
        directory, name = self._directories.parent(self._creatable(path))
        os.symlink(target, name, dir_fd=directory.number)
        self._give(directory.number, name, 0, caller)

    @staticmethod
    def _mode(directory: Directory, mode: int, caller: Caller) -> int:
        """``mode`` less the umask, which does not count where the parent has a default ACL (the store applies that)."""
        return mode if directory.has_default_acl() else mode & ~caller.umask

    def _give(self, directory: int, name: str, mode: int, caller: Caller) -> None:
        """A mount run by root creates in the caller's name; the group stays where the parent's set-group-id bit gave
        it."""
        if not self._gives_away or (caller.uid == 0 and caller.gid == 0):
            return
        inherits = os.fstat(directory).st_mode & stat.S_ISGID
        set_ids = mode & (stat.S_ISUID | stat.S_ISGID)  # chown clears them
        created = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode if set_ids else 0
        os.chown(name, caller.uid, -1 if inherits else caller.gid, dir_fd=directory, follow_symlinks=False)
        if set_ids:
            _chmod(directory, name, stat.S_IMODE(created))

    def unlink(self, path: str) -> None:
        directory, name = self._directories.parent(self._visible(path))
        last = self._last_name(directory.number, name)
        if last is None or self.handles.is_open((last.device, last.inode)):
            os.unlink(name, dir_fd=directory.number)
        else:
            self._nameless.unlink(directory.number, name, last)
        self.handles.removed(path)
        if last is not None:
            self._forget_view(last.view_key)

    def hide(self, path: str) -> Hidden:
        """Unlink a file that is open, or was until just now, and keep a handle of it (see ``vfs/removed.py``) as long
        as programs have some."""
        directory, name = self._directories.parent(self._visible(path))
        st = os.stat(name, dir_fd=directory.number, follow_symlinks=False)
        last = self._last_name(directory.number, name)
        file = self.handles.file((st.st_dev, st.st_ino))
        handle = None if file is None else self._another(file, stands_in=True)
        number = 0 if handle is None else handle.number
        try:
            if handle is not None and handle.file.view is not None:
                self._nameless.copy(handle.descriptor, handle.file.view.recipe.reference)
            hidden = self._removed.take(path, directory.number, name, number, st.st_nlink)
        except BaseException:
            self.release_hidden(number)
            raise
        self.handles.removed(path)
        if last is not None:
            self._forget_view(last.view_key)
        return hidden

    def release_hidden(self, number: int) -> None:
        with contextlib.suppress(KeyError):  # it has ended with the programs' handles
            self.handles.remove(number)

    def _another(self, file: OpenFile, flags: int = os.O_RDONLY, *, stands_in: bool = False) -> Handle | None:
        """A further handle of an open file, whatever its name is; None if it is not open any more. Raises OSError."""
        with self.handles.changing:  # what a blob's descriptors mean does not change meanwhile
            handle = next(iter(list(file.handles)), None)
            if handle is None:
                return None
            if file.view is not None:
                descriptor = os.dup(handle.descriptor)
            else:
                descriptor = os.open(f"/proc/self/fd/{handle.descriptor}", (flags & _PASSED_TO_STORE) | os.O_CLOEXEC)
            try:
                another = self.handles.join(file, descriptor, _is_writable(flags), stands_in=stands_in)
            except BaseException:
                os.close(descriptor)
                raise
            if another is None:
                os.close(descriptor)
            return another

    def open_hidden(self, hidden: Hidden, flags: int) -> Opened:
        """Open, through /proc, a file that has no name any more."""
        handle = self._another(self.handles.get(hidden.handle).file, _for_truncation(flags))
        if handle is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            if handle.writable:
                self._prepare_for_writing(handle, flags)
            view = handle.file.view
            # The other handles' pages are this very file's.
            return Opened(handle.number, keep_cache=True, direct_io=view is not None and view.content is None)
        except BaseException:
            self.handles.remove(handle.number)
            raise

    def give_name_back(self, hidden: Hidden) -> None:
        """The rename that was to replace the file failed."""
        directory, name = self._directories.parent(hidden.path)
        self._removed.give_back(hidden, directory.number, name)
        if hidden.handle in self.handles:
            file = self.handles.get(hidden.handle).file
            file.path, file.removed = hidden.path, False

    def _last_name(self, directory: int, name: str) -> LastName | None:
        """Of the blob whose last name this is; None for anything else."""
        try:
            st = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if st.st_nlink > 1 or not may_be_blob(st):
                return None
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _ALWAYS, dir_fd=directory)
        except OSError:
            return None
        try:
            st = os.fstat(descriptor)
            blob = examine(self.store, descriptor, st)
            recipe = None if blob is None else recipe_of(descriptor, st, blob)
            if recipe is None:
                return None
            return LastName(recipe.reference, recipe.sha256_view.hex(), st.st_dev, st.st_ino, st.st_size)
        except (OSError, ValueError):
            return None  # a damaged blob is deleted all the same
        finally:
            os.close(descriptor)

    def rmdir(self, path: str) -> None:
        directory, name = self._directories.parent(self._visible(path))
        os.rmdir(name, dir_fd=directory.number)
        self._directories.forget(path)

    def rename(self, old: str, new: str, flags: int) -> None:
        """renameat2 with its flags: none, RENAME_NOREPLACE or RENAME_EXCHANGE."""
        from_directory, from_name = self._directories.parent(self._visible(old))
        to_directory, to_name = self._directories.parent(self._creatable(new))
        moves = os.stat(from_name, dir_fd=from_directory.number, follow_symlinks=False)
        exchanged = bool(flags & linux.RENAME_EXCHANGE)
        is_directory = stat.S_ISDIR(moves.st_mode) or exchanged
        replaced = None
        if flags == 0:
            replaced = self._last_name(to_directory.number, to_name)
            with self._nameless.replacing(to_directory.number, to_name, replaced):
                os.rename(from_name, to_name, src_dir_fd=from_directory.number, dst_dir_fd=to_directory.number)
        else:
            linux.renameat2(from_directory.number, from_name, to_directory.number, to_name, flags)
        if is_directory:
            self._directories.forget(old)
            self._directories.forget(new)
        self.handles.renamed(old, new, exchanged=exchanged, directory=is_directory)
        if replaced is not None:
            self._forget_view(replaced.view_key)
        self._on_change(new)
        if exchanged:
            self._on_change(old)

    def link(self, existing: str, new: str) -> None:
        from_directory, from_name = self._directories.parent(self._visible(existing))
        to_directory, to_name = self._directories.parent(self._creatable(new))
        os.link(
            from_name,
            to_name,
            src_dir_fd=from_directory.number,
            dst_dir_fd=to_directory.number,
            follow_symlinks=False,
        )

    # Attributes.

    def chmod(self, path: str, mode: int) -> None:
        directory, name = self._directories.parent(self._visible(path))
        _chmod(directory.number, name, mode)

    def chmod_handle(self, number: int, mode: int) -> None:
        os.fchmod(self.handles.get(number).descriptor, mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        directory, name = self._directories.parent(self._visible(path))
        os.chown(name, uid, gid, dir_fd=directory.number, follow_symlinks=False)

    def chown_handle(self, number: int, uid: int, gid: int) -> None:
        os.fchown(self.handles.get(number).descriptor, uid, gid)

    def utimens(self, path: str, timespecs: int | None) -> None:
        """``timespecs``: address of two ``struct timespec`` as they came, with UTIME_NOW and UTIME_OMIT; None for
        now."""
        directory, name = self._directories.parent(self._visible(path))
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
        self._begin_change(handle)
        os.ftruncate(handle.descriptor, length)

    def statfs(self) -> os.statvfs_result:
        return os.fstatvfs(self.store.root_fd)

    # Extended attributes.

    # Extended attributes of a path, or of a handle's file by the handle's number.

    def has_no_capability(self, path: str) -> bool:
        """Whether the file is known to have no ``security.capability``, which the kernel asks for at each write."""
        return self._capabilities.is_known_absent(path)

    def getxattr(self, path: str | int, name: str) -> bytes:
        if isinstance(path, int):
            return os.getxattr(self.handles.get(path).descriptor, name)
        self._visible(path)
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
        directory, last = self._directories.parent(self._visible(path))
        os.setxattr(f"/proc/self/fd/{directory.number}/{last}", name, value, flags, follow_symlinks=False)
        if name == DEFAULT_ACL:
            self._directories.forget(path)
        elif name == xattrs.CAPABILITY:
            self._capabilities.forget()

    def listxattr(self, path: str | int) -> list[str]:
        if isinstance(path, int):
            return os.listxattr(self.handles.get(path).descriptor)
        directory, last = self._directories.parent(self._visible(path))
        return os.listxattr(f"/proc/self/fd/{directory.number}/{last}", follow_symlinks=False)

    def removexattr(self, path: str | int, name: str) -> None:
        if xattrs.is_ours(name):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if isinstance(path, int):
            os.removexattr(self.handles.get(path).descriptor, name)
            return
        directory, last = self._directories.parent(self._visible(path))
        os.removexattr(f"/proc/self/fd/{directory.number}/{last}", name, follow_symlinks=False)
        if name == DEFAULT_ACL:
            self._directories.forget(path)

    # Directories.

    def opendir(self, path: str) -> int:
        return self.handles.add_directory(
            beneath(self.store.root_fd, self._visible(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
            try:
                st = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except OSError:
                continue  # removed since
            yield Entry(name, st, self.attributes.size(descriptor, name, st), st.st_ino, st.st_mode)

    def releasedir(self, number: int) -> None:
        self.handles.remove_directory(number)

    def fsyncdir(self, number: int) -> None:
        os.fsync(self.handles.directory(number))

    # Files.

    def create(self, path: str, flags: int, mode: int, caller: Caller) -> Opened:
        directory, name = self._directories.parent(self._creatable(path))
        create_flags = (flags & _PASSED_TO_STORE) | os.O_CREAT | os.O_EXCL | _ALWAYS
        try:
            descriptor = os.open(name, create_flags, self._mode(directory, mode, caller), dir_fd=directory.number)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            return self.open(path, flags)
        try:
            if self._gives_away:
                self._give(directory.number, name, mode, caller)
            st = os.fstat(descriptor)
            handle = self.handles.add_created((st.st_dev, st.st_ino), path, descriptor, _is_writable(flags))
        except BaseException:
            os.close(descriptor)
            raise
        self._capabilities.note_absent(path)
        return Opened(handle.number, flushes=self._errors_at_close)

    def open(self, path: str, flags: int) -> Opened:
        if not flags & _MORE_THAN_READING:
            opened = self._open_to_read(path, flags)
            if opened is not None:
                return opened
        self._visible(path)
        flags = _for_truncation(flags)
        in_use = self.handles.in_use(path)
        if in_use is not None and not _is_writable(flags):
            opened = self._open_what_is_in_use(path, in_use)
            if opened is not None:
                return opened
        for _ in range(_TRIES):
            opened = self._open_once(path, flags)
            if opened is not None:
                return opened
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def _open_to_read(self, path: str, flags: int) -> Opened | None:
        """:meth:`open` for what most opens are: for reading, of a file that nobody has replaced behind the mount. It is
        written for speed, in one piece; None, and nothing done, for all else."""
        if path.startswith(RESERVED):
            return None
        directory, name = self._directories.parent(path)
        descriptor = os.open(name, _TO_READ, dir_fd=directory.number)
        try:
            st = os.fstat(descriptor)
            key = (st.st_dev, st.st_ino)
            blob = may_be_blob(st)
            if blob:
                in_use = self.handles.in_use(path)
                number, keep = 0, False
            else:
                identity = (*key, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
                number, keep = self.handles.add_to_read(key, path, descriptor, identity)
        except BaseException:
            os.close(descriptor)
            raise
        if blob and (in_use is None or in_use.key == key):
            return self._opened((directory, name), path, flags, descriptor, st)
        if not number:
            os.close(descriptor)
            return None
        if self.claims.enter(key):
            try:
                still = self._is_still(directory.number, name, st)
            except BaseException:
                self.handles.remove(number)
                raise
            if not still:
                self.handles.remove(number)
                return None
        return Opened(number, keep, False, False)

    def _open_what_is_in_use(self, path: str, file: OpenFile) -> Opened | None:
        """Behind the mount the name was given to another file, while programs still read the first one here. For the
        kernel both are one file, with one set of pages: so who opens it now reads the first one too, as long as that is
        open. None in the usual case, and where the new file has another size: the kernel knows but one."""
        directory, name = self._directories.parent(path)
        st = os.stat(name, dir_fd=directory.number, follow_symlinks=False)
        if (st.st_dev, st.st_ino) == file.key or file.removed:
            return None
        shown = self.attributes.size(directory.number, name, st)
        handle = self._another(file)
        if handle is None:
            return None
        try:
            st, size = self.stat_handle(handle.number)
            if size == shown:
                return self._admit(handle, path, st)
        except BaseException:
            self.handles.remove(handle.number)
            raise
        self.handles.remove(handle.number)
        return None

    def _open_once(self, path: str, flags: int) -> Opened | None:
        """None when the name came to mean another file meanwhile, so that it has to be tried again."""
        directory, name = self._directories.parent(path)
        descriptor = os.open(name, (flags & _PASSED_TO_STORE) | _ALWAYS, dir_fd=directory.number)
        try:
            st = os.fstat(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return self._opened((directory, name), path, flags, descriptor, st)

    def _opened(
        self, place: tuple[Directory, str], path: str, flags: int, descriptor: int, st: os.stat_result
    ) -> Opened | None:
        """The rest of :meth:`_open_once`, which owns ``descriptor`` from here on."""
        directory, name = place
        view = None
        try:
            if may_be_blob(st):
                descriptor, view = self._as_view(descriptor, st, flags, path)
        except BaseException:
            os.close(descriptor)
            raise
        handle = self.handles.add((st.st_dev, st.st_ino), path, descriptor, _is_writable(flags), view)
        try:
            claimed = self.claims.enter(handle.file.key)
            turned_plain = view is not None and handle.file.view is None
            in_doubt = claimed or view is not None or handle.writable
            if turned_plain or (in_doubt and not self._is_still(directory.number, name, st)):
                self.handles.remove(handle.number)
                return None
            if handle.writable:
                self._prepare_for_writing(handle, flags)
                st = os.fstat(handle.descriptor)
            return self._admit(handle, path, st)
        except BaseException:
            self.handles.remove(handle.number)
            raise

    @staticmethod
    def _is_still(directory: int, name: str, st: os.stat_result) -> bool:
        try:
            return os.path.samestat(st, os.stat(name, dir_fd=directory, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _as_view(self, descriptor: int, st: os.stat_result, flags: int, path: str) -> tuple[int, View | None]:
        """(descriptor, view) for what is open as ``descriptor``, if it is a blob: then opened for reading only, however
        the program asked, as a blob itself is never written to. Else ``descriptor`` as it is, and None."""
        if self.handles.is_plain((st.st_dev, st.st_ino)):
            return descriptor, None  # it is being written: no blob, whatever its last bytes look like just now
        reader = descriptor
        if _is_writable(flags):
            try:
                reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            except PermissionError:
                return descriptor, None
        view = None
        try:
            view = self._view_of(reader, st, path)
        finally:
            if reader != descriptor:
                os.close(reader if view is None else descriptor)
        return (descriptor, None) if view is None else (reader, view)

    def _view_of(self, descriptor: int, st: os.stat_result, path: str) -> View | None:
        identity = _identity(st)
        recent = self._recent.get(identity)
        if recent is not None:
            if recent.content is not None:
                self.cache.hits += 1
            return recent
        blob = examine(self.store, descriptor, st)
        try:
            if blob is None:
                if is_damaged(self.store, descriptor, st):
                    raise ValueError("its footer's checksum differs")
                return None
            recipe = recipe_of(descriptor, st, blob)
        except ValueError as error:
            log.error("%s: its blob is damaged (%s); reading it fails with EIO. Try `esrfs restore`.", path, error)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        if recipe is None:
            return None
        self.attributes.remember(Identity.from_stat(st), recipe.original_size)
        view = View(Descriptor(os.dup(descriptor)), recipe, self._engine, self.cache, self.waits)
        self._recent.add(identity, view)
        return view

    def _prepare_for_writing(self, handle: Handle, flags: int) -> None:
        """So that errors come from open: O_TRUNC makes a plain file at once, else the view is rebuilt now."""
        if flags & os.O_TRUNC:
            self._begin_change(handle, keep_content=False)
            os.ftruncate(handle.descriptor, 0)
        elif handle.file.view is not None:
            self._content(handle, handle.file.view)

    def _admit(self, handle: Handle, path: str, st: os.stat_result) -> Opened:
        view = handle.file.view
        identity: object = _identity(st)
        if view is not None:
            content = view.look_in_cache(by_the_way=True)
            if content is None:
                # Until it is rebuilt: the kernel's read-ahead must not ask for pixels that the program never reads.
                self.handles.admit(handle, path, None)
                return Opened(handle.number, direct_io=True)
            identity = (identity, content.sha256)
        keep, direct = self.handles.admit(handle, path, identity)
        return Opened(handle.number, keep, direct, flushes=handle.writable and self._errors_at_close)

    def read_into(self, number: int, address: int, size: int, offset: int) -> int:
        """Read up to ``size`` bytes at ``offset`` to memory at ``address``; the number of bytes, 0 at the end."""
        handle = self.handles.get(number)
        view = handle.file.view
        if view is None:
            return native.pread_into(handle.descriptor, address, size, offset)
        count = view.read_into(address, size, offset)
        if count is not None:
            return count
        content = self._content(handle, view)
        return native.pread_into(content.descriptor.number, address, size, offset)

    @staticmethod
    def _content(handle: Handle, view: View, lane: Lane = Lane.INTERACTIVE) -> Content:
        """The rebuilt view; waits for it. Raises OSError: EIO, or EINTR when who asks was killed."""
        content = view.content or view.look_in_cache()
        if content is not None:
            return content
        return view.rebuild(lane, handle.number, handle.file.path)

    def write_from(self, number: int, address: int, size: int, offset: int, append: bool = False) -> int:
        """``append``: at the end, wherever that is by now, and not at ``offset``."""
        handle = self.handles.get(number)
        if not handle.written or handle.file.view is not None:
            self._begin_change(handle)
        if append:
            return native.append_from(handle.descriptor, address, size, offset)
        return native.pwrite_from(handle.descriptor, address, size, offset)

    def fallocate(self, number: int, mode: int, offset: int, length: int) -> None:
        handle = self.handles.get(number)
        self._begin_change(handle)
        native.fallocate(handle.descriptor, mode, offset, length)

    def _begin_change(self, handle: Handle, keep_content: bool = True) -> None:
        """Make sure that the handle's file is a plain file, and that its coming to rest is noticed."""
        file = handle.file
        handle.written = file.changed = True
        view = file.view
        if view is None:
            return
        content = self._content(handle, view) if keep_content else None
        with self.handles.changing:
            if file.view is not view:  # another handle was first
                return

            def write_view(descriptor: int) -> None:
                if content is not None:
                    _copy(content.descriptor.number, descriptor)

            self._nameless.copy(handle.descriptor, view.recipe.reference)
            path = None if file.removed else file.path
            descriptor = plain.materialise(self.store, path, handle.descriptor, write_view)
            try:
                st = os.fstat(descriptor)
                for each in list(file.handles):
                    os.dup2(descriptor, each.descriptor, inheritable=False)
            finally:
                os.close(descriptor)
            self.handles.rekey(file, (st.st_dev, st.st_ino))
            file.view = None

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
        handle = self.handles.get(number)
        file = handle.file
        if not file.changed:
            self.handles.remove(number)
            if file.view is not None and not file.handles and file.view.takes_memory:
                self._recent.drop(file.view.key)
            return
        guard = self._guard_of(handle)
        self.handles.remove(number)
        if guard is not None:
            wrap_if_needed(self.store, file, guard.descriptor)
            self.handles.remove(guard.number)
        if not file.handles and not file.removed:
            self._on_change(file.path)

    def _guard_of(self, handle: Handle) -> Handle | None:
        """A handle that keeps the file shown as plain while it is wrapped; None if it can't be taken for a blob."""
        file = handle.file
        if (
            file.view is not None
            or file.removed
            or len(file.handles) > 1
            or not may_be_blob(os.fstat(handle.descriptor))
        ):
            return None
        try:
            descriptor = os.open(f"/proc/self/fd/{handle.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        return self.handles.add(file.key, file.path, descriptor, False, None)

    # The cache.

    def _forget_view(self, key: str) -> None:
        self._recent.drop(key)
        self.cache.drop(key)

    def clear_cache(self) -> int:
        """Drop all rebuilt views that nobody has open; how many there were in the cache."""
        self._recent.clear()
        return self.cache.clear()

    # The mount's end.

    def close(self) -> None:
        """To be called when nobody uses it any more."""
        self._removed.close()

    def warm(self, path: str) -> None:
        """Have the view of the blob at ``path`` in the cache; waits behind readers. Raises OSError."""
        opened = self.open(path, os.O_RDONLY)
        try:
            handle = self.handles.get(opened.number)
            view = handle.file.view
            if view is not None and view.content is None:
                self._content(handle, view, Lane.READ_AHEAD)
        finally:
            self.release(opened.number)

    def fail_waiting_reads(self) -> None:
        """Let nobody wait any longer: the mount ends."""
        self.waits.ending = True
        self._engine.close()


def _identity(st: os.stat_result) -> tuple[int, ...]:
    """As ``store.identity.Identity``, in the form that is cheapest to make: this runs at every open."""
    return (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def _for_truncation(flags: int) -> int:
    """Linux truncates also what is opened for reading only; the kernel has asked for the right to write then."""
    if flags & os.O_TRUNC and not _is_writable(flags):
        return flags & ~os.O_ACCMODE | os.O_RDWR
    return flags


def _chmod(directory: int, name: str, mode: int) -> None:
    """chmod(2) that follows no symlink, should one have come by this name: fchmodat can't promise that."""
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.chmod(f"/proc/self/fd/{descriptor}", mode)
    finally:
        os.close(descriptor)


def _is_writable(flags: int) -> bool:
    return (flags & os.O_ACCMODE) != os.O_RDONLY


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


def _copy(source: int, target: int) -> None:
    """The whole content of ``source`` to ``target``, from offset 0."""
    offset, size = 0, os.fstat(source).st_size
    while offset < size:
        count = os.sendfile(target, source, offset, size - offset)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        offset += count
