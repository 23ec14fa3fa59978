"""Opening names inside a store without ever following a link out of it.

A path is a ``str`` (surrogateescape) relative to the root descriptor, without leading or doubled slashes; ``""`` is the
root itself. The kernel resolves it in one call (openat2, RESOLVE_BENEATH and no symlinks); where it can't (an old
kernel, a path longer than PATH_MAX), directories are opened one by one, which refuses symlinks just as well.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from esrfs.store import linux

_RESOLVE = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RETRIES = 16


def beneath(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open ``path`` under ``root_fd`` and return a close-on-exec descriptor, the caller's to close.

    ``flags`` as for os.open; ``mode`` counts only with O_CREAT or O_TMPFILE. Raises OSError; ELOOP for a symlink
    anywhere in the path (unless O_PATH | O_NOFOLLOW asks for a link itself, which :func:`parent` serves better), EXDEV
    for a path that leaves the root.
    """
    encoded = os.fsencode(path) or b"."
    creates = bool(flags & os.O_CREAT) or flags & os.O_TMPFILE == os.O_TMPFILE
    for _ in range(_RETRIES):
        try:
            return linux.openat2(root_fd, encoded, flags, mode if creates else 0, _RESOLVE)
        except OSError as error:
            if error.errno == errno.EAGAIN and not flags & os.O_NONBLOCK:
                continue  # a rename elsewhere raced with ".."; the kernel asks to try again
            if error.errno not in (errno.ENOSYS, errno.ENAMETOOLONG):
                raise
            break
    return _step_by_step(root_fd, encoded, flags, mode)


def _step_by_step(root_fd: int, path: bytes, flags: int, mode: int) -> int:
    *directories, last = [part for part in path.split(b"/") if part not in (b"", b".")] or [b"."]
    if b".." in (*directories, last):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), os.fsdecode(path))
    at = root_fd
    try:
        for directory in directories:
            try:
                deeper = os.open(directory, _DIRECTORY, dir_fd=at)
            finally:
                if at != root_fd:
                    os.close(at)
                    at = root_fd
            at = deeper
        return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=at)
    finally:
        if at != root_fd:
            os.close(at)


def parent(root_fd: int, path: str) -> tuple[int, str, bool]:
    """``(directory, name, owned)`` such that *at() calls on ``directory`` and ``name`` reach ``path``.

    ``owned`` says whether the caller has to close ``directory`` (it is ``root_fd`` itself for a name in the root). The
    root is ``(root_fd, ".", False)``. Raises OSError as :func:`beneath` does.
    """
    above, _, name = path.rpartition("/")
    if not above:
        return root_fd, name or ".", False
    return beneath(root_fd, above, os.O_PATH | os.O_DIRECTORY), name, True


@contextmanager
def open_parent(root_fd: int, path: str) -> Iterator[tuple[int, str]]:
    """:func:`parent` for one block; ``directory`` can be fsynced (it is opened O_RDONLY, not O_PATH)."""
    above, _, name = path.rpartition("/")
    directory = beneath(root_fd, above, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory, name or "."
    finally:
        os.close(directory)
