"""The same operations in a native directory and on a mount, and what a program saw of each.

A scenario is a function of a root directory that returns what it observed (values, and the names of errors). Both
places lie on the same filesystem, so everything that the mount does not change on purpose has to be equal.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.mounting import Mounted

_libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_XDG = ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR")


@dataclass(frozen=True)
class Twin:
    native: Path
    mounted: Path
    stored: Path
    """``mounted``, behind the mount."""


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What it returns, or the name of the error that it meets."""
    try:
        return function(*arguments, **options)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def same(twin: Twin, scenario: Callable[[Path], Any]) -> Any:
    """Play the scenario in both places; its observations, the trees after it, and the store's tree must be equal."""
    expected = scenario(twin.native)
    found = scenario(twin.mounted)
    if isinstance(found, list):
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours == theirs, f"observation {step}: {ours!r} on the mount, {theirs!r} on the store's filesystem"
    assert found == expected
    assert tree(twin.mounted) == tree(twin.native)
    assert tree(twin.stored) == tree(twin.native), "the store holds something else than the view shows"
    return found


def tree(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """Names, kinds, modes, owners, link counts, contents, targets and xattrs of everything below ``root``."""
    found: dict[bytes, tuple[Any, ...]] = {}
    top = os.fsencode(root)
    for directory, directories, files in os.walk(top):
        for name in [*directories, *files]:
            path = os.path.join(directory, name)
            st = os.lstat(path)
            content: Any = None
            if stat.S_ISREG(st.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(st.st_mode):
                content = os.readlink(path)
            xattrs = {key: os.getxattr(path, key, follow_symlinks=False) for key in listed(path)}
            found[os.path.relpath(path, top)] = (st.st_mode, st.st_uid, st.st_gid, st.st_nlink, content, xattrs)
    return found


def listed(path: Any) -> list[str]:
    return sorted(os.listxattr(path) if isinstance(path, int) else os.listxattr(path, follow_symlinks=False))


def utimensat(path: Path | int, access: tuple[int, int], modification: tuple[int, int]) -> None:
    """utimensat(2) on a path, or futimens(3) on a descriptor; (seconds, ns) where ns may be UTIME_NOW or UTIME_OMIT."""
    times = (ctypes.c_long * 4)(*access, *modification)
    if isinstance(path, int):
        result = _libc.futimens(path, times)
    else:
        result = _libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0)
    _check(result)


def renameat2(old: Path, new: Path, flags: int) -> None:
    _check(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    _check(_libc.fallocate(descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def getxattr_into(path: Path, name: str, room: int) -> int:
    """getxattr(2) with a buffer of ``room`` bytes; the size that it returns."""
    size: int = _libc.getxattr(os.fsencode(path), name.encode(), ctypes.create_string_buffer(max(room, 1)), room)
    return _check(size)


def listxattr_into(path: Path, room: int) -> int:
    size: int = _libc.listxattr(os.fsencode(path), ctypes.create_string_buffer(max(room, 1)), room)
    return _check(size)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@contextlib.contextmanager
def opened(path: Path | str | bytes, flags: int, mode: int = 0o644, dir_fd: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Shared:
    """A mount that a whole module uses, with the directories (XDG) that it was started with."""

    mount: Mounted
    environment: dict[str, str]

    def adopt(self, monkeypatch: pytest.MonkeyPatch) -> Mounted:
        """Let this test find the mount's control socket."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        return self.mount


@contextlib.contextmanager
def shared_mount(base: Path) -> Iterator[Shared]:
    """A mount for a whole module. At its end, no file of the store may still be open in the mount's process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _XDG:
            directory = base / ".xdg" / name
            directory.mkdir(parents=True, mode=0o700)
            patch.setenv(name, str(directory))
        mount = Mounted(base)
        shared = Shared(mount, {name: os.environ[name] for name in _XDG})
        try:
            mount.start()
            os.listdir(mount.path)
            before = descriptors(mount)
            yield shared
            for name, value in shared.environment.items():
                patch.setenv(name, value)
            check_nothing_leaked(mount, before)
        finally:
            for name, value in shared.environment.items():
                patch.setenv(name, value)
            mount.clean_up()


def descriptors(mount: Mounted) -> dict[int, str]:
    """What the mount's process has open, but for directories (kept for a moment to save look-ups), the view cache's
    own files, and what leads to its engine."""
    assert mount.process is not None
    directory = Path(f"/proc/{mount.process.pid}/fd")
    found = {}
    for number in os.listdir(directory):
        with contextlib.suppress(OSError):
            path = os.readlink(directory / number)
            st = os.stat(directory / number)
            if (
                not stat.S_ISDIR(st.st_mode)
                and not stat.S_ISSOCK(st.st_mode)
                and not stat.S_ISFIFO(st.st_mode)
                and ".db" not in path
            ):
                found[int(number)] = path
    return found


def check_nothing_leaked(mount: Mounted, before: dict[int, str], seconds: float = 10.0) -> None:
    """As gocryptfs does after each test: the mount has no more open than before (``release`` comes after ``close``)."""
    mount.call("cache-clear")  # the views that were open last stay open for a moment
    deadline = time.monotonic() + seconds
    while True:
        left = {number: path for number, path in descriptors(mount).items() if before.get(number) != path}
        if not left:
            break
        assert time.monotonic() < deadline, f"still open in the mount's process: {left}"
        time.sleep(0.1)
    assert mount.status()["open_handles"] == 0
