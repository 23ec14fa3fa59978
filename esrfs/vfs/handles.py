"""Open files and directories, and whose bytes the kernel caches for a path.

A handle follows the inode, not the path (editors rename files that are still open). All handles of one inode share an
:class:`OpenFile`, so that they turn together when a blob becomes a plain file.

Lock order: ``Handles.changing`` (held while a blob becomes a plain file, which writes to the disk), then
``Handles._lock`` (dictionaries only, never held across a system call that waits).

The descriptor of a handle may be closed at any moment by the program whose handle it is, and the number then be
another file's. So who uses another one's does it within ``nothing_closed``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from esrfs.vfs.view import View

Key = tuple[int, int]
"""(st_dev, st_ino)"""

_MOST_PATHS = 50_000


@dataclass(eq=False, slots=True)
class OpenFile:
    """One inode that is open in this mount."""

    key: Key
    path: str
    """Where it was last known to be, relative to the store; follows renames through this mount."""
    view: View | None
    """Set while the file is a blob; None for a plain file."""
    handles: set[Handle] = field(default_factory=set)
    removed: bool = False
    """Its last known name was removed through this mount."""
    changed: bool = False
    """A program has written to it since it was opened."""


@dataclass(eq=False, slots=True)
class Handle:
    number: int
    file: OpenFile
    descriptor: int
    """Of the store's file. When a blob becomes a plain file, this very number is made to mean the new one (dup2)."""
    writable: bool
    pages: Pages | None = None
    """Set when this handle's reads go through the kernel's page cache."""
    written: bool = False
    stands_in: bool = False
    """No program's: ours, for a file without a name (see ``removed``). Ends with the last of the programs' handles."""


@dataclass(eq=False, slots=True)
class Pages:
    """Whose bytes the kernel's page cache holds for a path (each path has pages of its own in FUSE's high-level
    API)."""

    identity: object
    file: OpenFile | None
    opens: int


class Handles:
    def __init__(self) -> None:
        self.changing = threading.Lock()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._handles: dict[int, Handle] = {}
        self._files: dict[Key, OpenFile] = {}
        self._pages: dict[str, Pages] = {}
        self._directories: dict[int, int] = {}
        self._left_open: list[int] | None = None  # descriptors that are still to be closed, while nothing is

    def __len__(self) -> int:
        return len(self._handles)

    def get(self, number: int) -> Handle:
        return self._handles[number]

    def is_open(self, key: Key) -> bool:
        return key in self._files

    def is_plain(self, key: Key) -> bool:
        """Whether the file is open, and no blob."""
        file = self._files.get(key)
        return file is not None and file.view is None

    def file(self, key: Key) -> OpenFile | None:
        return self._files.get(key)

    def add(self, key: Key, path: str, descriptor: int, writable: bool, view: View | None) -> Handle:
        """A new handle; joins the open file of this inode if there is one, and then ``view`` is not used."""
        with self._lock:
            file = self._files.get(key)
            if file is None:
                file = self._files[key] = OpenFile(key, path, view)
            else:
                file.path, file.removed = path, False
            handle = Handle(next(self._numbers), file, descriptor, writable)
            file.handles.add(handle)
            self._handles[handle.number] = handle
        return handle

    def add_to_read(self, key: Key, path: str, descriptor: int, identity: object) -> tuple[int, bool]:
        """:meth:`add` and :meth:`admit` in one step, for the most frequent open: of a plain file, for reading. (number,
        keep what the kernel holds); number 0, and nothing done, if another file is in use by this path, or this one is
        open as a view."""
        with self._lock:
            pages = self._pages.get(path)
            file = self._files.get(key)
            if file is None:
                if pages is not None and pages.opens > 0 and pages.file is not None:
                    return 0, False
                file = self._files[key] = OpenFile(key, path, None)
            elif file.view is not None or (pages is not None and pages.opens > 0 and pages.file is not file):
                return 0, False
            else:
                file.path, file.removed = path, False
            keep = pages is not None and (pages.opens > 0 or pages.identity == identity)
            if pages is None:
                pages = self._pages[path] = Pages(identity, file, 0)
                self._drop_oldest()
            pages.identity, pages.file = identity, file
            pages.opens += 1
            number = next(self._numbers)
            handle = self._handles[number] = Handle(number, file, descriptor, False, pages)
            file.handles.add(handle)
        return number, keep

    def add_created(self, key: Key, path: str, descriptor: int, writable: bool) -> Handle:
        """A handle of a file that was made just now, by the open that it answers: nobody else can have it open, and the
        kernel caches nothing for it."""
        with self._lock:
            file = self._files[key] = OpenFile(key, path, None, changed=True)
            pages = self._pages[path] = Pages(None, file, 1)
            handle = Handle(next(self._numbers), file, descriptor, writable, pages, written=True)
            file.handles.add(handle)
            self._handles[handle.number] = handle
            self._drop_oldest()
        return handle

    def __contains__(self, number: int) -> bool:
        return number in self._handles

    def join(self, file: OpenFile, descriptor: int, writable: bool, *, stands_in: bool = False) -> Handle | None:
        """A new handle of an open file, whatever its name; None if it is not open any more."""
        with self._lock:
            if not file.handles:
                return None
            handle = Handle(next(self._numbers), file, descriptor, writable, stands_in=stands_in)
            file.handles.add(handle)
            self._handles[handle.number] = handle
        return handle

    def remove(self, number: int) -> Handle:
        """Forget a handle and close what it alone held; the handle, for what is left to do."""
        with self._lock:
            handle = self._handles.pop(number)
            file = handle.file
            file.handles.discard(handle)
            ended = [handle]
            if file.handles and all(each.stands_in for each in file.handles):
                ended += file.handles
                for each in file.handles:
                    del self._handles[each.number]
                file.handles.clear()
            if not file.handles and self._files.get(file.key) is file:
                del self._files[file.key]
            if handle.pages is not None:
                handle.pages.opens -= 1
                if handle.pages.opens == 0:
                    handle.pages.file = None
            if self._left_open is not None:
                self._left_open += [each.descriptor for each in ended]
                return handle
        for each in ended:
            os.close(each.descriptor)
        return handle

    @contextlib.contextmanager
    def nothing_closed(self) -> Iterator[None]:
        """Under ``changing``: no handle's descriptor is closed meanwhile; those of handles that go are closed after."""
        with self._lock:
            self._left_open = []
        try:
            yield
        finally:
            with self._lock:
                left, self._left_open = self._left_open, None
            for descriptor in left:
                with contextlib.suppress(OSError):  # a program's late write error, of which its release can't tell
                    os.close(descriptor)

    def turn_plain(self, file: OpenFile, descriptor: int, key: Key) -> None:
        """Under ``changing``: the file is a plain one from now on, the inode ``key`` that is open as ``descriptor``,
        which stays the caller's. All its handles turn, also those that come meanwhile."""
        turned: set[Handle] = set()
        with self.nothing_closed():
            while True:
                with self._lock:
                    left = file.handles - turned
                    if not left:
                        if self._files.get(file.key) is file:
                            del self._files[file.key]
                        self._join_files(self._files.get(key), file)
                        file.key = key
                        self._files[key] = file
                        file.view = None
                        return
                for each in left:
                    os.dup2(descriptor, each.descriptor, inheritable=False)
                turned |= left

    @staticmethod
    def _join_files(other: OpenFile | None, file: OpenFile) -> None:
        """A program opened the plain file by its name before it was known to be what ``file`` becomes."""
        if other is None or other is file:
            return
        for handle in other.handles:
            handle.file = file
            if handle.pages is not None and handle.pages.file is other:
                handle.pages.file = file
        file.handles |= other.handles
        file.path, file.removed = other.path, other.removed
        file.changed |= other.changed
        other.handles = set()

    # Whose pages the kernel holds.

    def in_use(self, path: str) -> OpenFile | None:
        """The file that is read by this path at present: all that is read by it should be of this file."""
        pages = self._pages.get(path)
        return None if pages is None else pages.file

    def admit(self, handle: Handle, path: str, identity: object) -> tuple[bool, bool]:
        """Decide how the kernel may cache this open: (keep what it holds, bypass the cache).

        ``identity`` names the very bytes that will be served; None for those of a view that is still to be rebuilt,
        whose open bypasses the cache anyway. The kernel drops a path's pages at each open that may not keep them. An
        open of another file, while a file is in use by this path, bypasses the cache, so that its reads are not mixed
        with the other's.
        """
        with self._lock:
            pages = self._pages.get(path)
            if pages is None:
                pages = self._pages[path] = Pages(identity, handle.file, 0)
                keep = False
                self._drop_oldest()
            elif pages.opens > 0:
                if pages.file is not handle.file:
                    return False, True
                keep = True
                pages.identity = identity or pages.identity
            else:
                keep = identity is not None and pages.identity == identity
                pages.identity = identity
                pages.file = handle.file
            pages.opens += 1
            handle.pages = pages
            return keep, False

    def _drop_oldest(self) -> None:
        """Forget about a path that was first opened long ago; the next open of it drops the kernel's pages."""
        if len(self._pages) > _MOST_PATHS:
            path, pages = next(iter(self._pages.items()))
            del self._pages[path]
            if pages.opens > 0:
                self._pages[path] = pages

    # Names.

    def renamed(self, old: str, new: str, *, exchanged: bool, directory: bool) -> None:
        """Follow a rename through this mount; ``directory`` if either may be one, so that all below moves too."""
        with self._lock:
            moved = self._take(old, directory)
            replaced = self._take(new, directory)
            for path, pages in moved.items():
                self._pages[new + path[len(old) :]] = pages
            if exchanged:
                for path, pages in replaced.items():
                    self._pages[old + path[len(new) :]] = pages
            for file in self._files.values():
                if not directory and file.path not in (old, new):
                    continue
                if file.path == old or file.path.startswith(old + "/"):
                    file.path = new + file.path[len(old) :]
                elif file.path == new or file.path.startswith(new + "/"):
                    if exchanged:
                        file.path = old + file.path[len(new) :]
                    else:
                        file.removed = True

    def removed(self, path: str) -> None:
        """Follow an unlink through this mount."""
        with self._lock:
            self._pages.pop(path, None)
            for file in self._files.values():
                if file.path == path:
                    file.removed = True

    def _take(self, path: str, directory: bool) -> dict[str, Pages]:
        names = [path] if path in self._pages else []
        if directory:
            names += [key for key in self._pages if key.startswith(path + "/")]
        return {name: self._pages.pop(name) for name in names}

    # Directories.

    def add_directory(self, descriptor: int) -> int:
        number = next(self._numbers)
        self._directories[number] = descriptor
        return number

    def directory(self, number: int) -> int:
        return self._directories[number]

    def remove_directory(self, number: int) -> None:
        os.close(self._directories.pop(number))
