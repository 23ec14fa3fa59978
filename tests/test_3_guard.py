"""The directory below a mount: unwritable while the mount serves, and afterwards as it was, whatever went wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esrfs import whole
from esrfs.mount import guard
from esrfs.mount.guard import guarded
from esrfs.store import linux, mountpoint
from esrfs.store.initialise import init

ExpectLog = Callable[[str], None]


class Below:
    """A directory to mount on, and where the note is kept."""

    def __init__(self, base: Path) -> None:
        self.path = base / "mount"
        self.path.mkdir(mode=0o750)
        self.state = base / "state"
        self.state.mkdir()

    def look(self) -> tuple[int, bool]:
        """(mode, immutable)"""
        descriptor = mountpoint.open_mountpoint(str(self.path))
        try:
            return stat.S_IMODE(os.fstat(descriptor).st_mode), linux.is_immutable(descriptor)
        finally:
            os.close(descriptor)

    def mount(self, ends: bool = True) -> tuple[int, bool]:
        """A mount that comes and, unless it crashes, ends; how the directory was meanwhile."""
        with guarded(str(self.path), self.state) as guard:
            guard.before_mount()
            guard.protect()
            meanwhile = self.look()
            if ends:
                guard.end()
        return meanwhile

    def notes(self) -> list[str]:
        return os.listdir(self.state)


@pytest.fixture
def below(tmp_path: Path) -> Iterator[Below]:
    place = Below(tmp_path)
    yield place
    mountpoint.unprotect_mountpoint(str(place.path))


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs the mount is not root."""

    def refuse(fd: int, on: bool) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(linux, "set_immutable", refuse)


@contextlib.contextmanager
def failing(module: object, name: str, error: BaseException) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, fail)
        yield


def full() -> contextlib.AbstractContextManager[None]:
    return failing(whole, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def test_it_is_unwritable_while_mounted_and_then_as_before(below: Below) -> None:
    mode, immutable = below.mount()
    assert mode == 0o555
    assert immutable == linux_has_flags(below)
    assert below.look() == (0o750, False)
    assert below.notes() == []


def linux_has_flags(below: Below) -> bool:
    """Whether this process and filesystem can make the directory immutable at all."""
    descriptor = mountpoint.open_mountpoint(str(below.path))
    try:
        linux.set_immutable(descriptor, True)
        linux.set_immutable(descriptor, False)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_after_a_crash_it_stays_unwritable_until_a_mount_ends(below: Below) -> None:
    meanwhile = below.mount(ends=False)
    assert below.look() == meanwhile
    below.mount()
    assert below.look() == (0o750, False)
    assert below.notes() == []


class Crash(BaseException):
    pass


def test_a_crash_before_it_is_protected_leaves_no_doubt_how_it_was(below: Below) -> None:
    for step in ("protect_mountpoint", "_sync"):
        with failing(guard, step, Crash()), pytest.raises(Crash):
            below.mount()
        assert below.look() == (0o750, False)
        below.mount()
        assert below.look() == (0o750, False)
        assert below.notes() == []


def test_with_no_room_for_the_note_it_is_left_alone(below: Below, expect_log: ExpectLog) -> None:
    expect_log("stays as it is")
    with full():
        assert below.mount() == (0o750, False)
        assert below.look() == (0o750, False)
    below.mount()
    assert below.look() == (0o750, False)
    assert below.notes() == []


def test_a_note_that_can_not_be_read_changes_nothing(below: Below, expect_log: ExpectLog) -> None:
    expect_log("stays as it is")  # where there is no such flag
    meanwhile = below.mount(ends=False)
    with failing(Path, "read_bytes", OSError(errno.EIO, os.strerror(errno.EIO))):
        assert below.mount() == meanwhile
    below.mount()
    assert below.look() == (0o750, False)


def test_a_note_that_can_not_be_removed_ends_no_mount_badly(below: Below, expect_log: ExpectLog) -> None:
    expect_log("could not be removed")
    with guarded(str(below.path), below.state) as guard:
        guard.before_mount()
        with failing(Path, "unlink", OSError(errno.EROFS, os.strerror(errno.EROFS))):
            guard.end()
    assert below.look() == (0o750, False)
    below.mount()
    assert below.notes() == []


@pytest.mark.parametrize("room", [True, False])
def test_a_mountpoint_of_a_store_in_place_stays_unwritable(below: Below, room: bool) -> None:
    mountpoint.protect_mountpoint(str(below.path))
    before = below.look()
    with contextlib.nullcontext() if room else full():
        assert below.mount() == before
    assert below.look() == before
    assert below.notes() == []


# ---- who is not root


@pytest.mark.usefixtures("ordinary")
def test_an_ordinary_user_protects_it_once_it_is_mounted(below: Below) -> None:
    """fusermount3 refuses a mountpoint that the user can't write to."""
    with guarded(str(below.path), below.state) as guard:
        guard.before_mount()
        assert below.look() == (0o750, False)
        guard.protect()
        assert below.look() == (0o555, False)
    with guarded(str(below.path), below.state) as guard:  # after a crash
        guard.before_mount()
        assert below.look() == (0o750, False)
        guard.end()
    assert below.notes() == []


@pytest.mark.usefixtures("ordinary")
@pytest.mark.parametrize(
    ("crashed", "room"),
    [(None, True), (None, False), ("before it is mounted", True), ("mounted", True), ("mounted", False)],
)
def test_an_ordinary_user_can_mount_a_store_in_place(below: Below, crashed: str | None, room: bool) -> None:
    below.path.rmdir()
    below.path.mkdir()
    init(str(below.path), in_place=True)
    assert below.look() == (0o555, False)
    with contextlib.nullcontext() if room else full():
        for ends in (crashed is None, True):
            with guarded(str(below.path), below.state) as guard:
                guard.before_mount()
                assert below.look()[0] & 0o700 == 0o700
                if ends or crashed == "mounted":
                    guard.protect()
                    assert below.look() == (0o555, False)
                if ends:
                    guard.end()
    assert below.look() == (0o555, False)
    assert below.notes() == []
