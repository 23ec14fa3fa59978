"""Cases of the vfs that random sequences don't reach: another program does something between two steps of an operation,
and disks that fail.

The second program's step is put there by a hook in the system call before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from esrfs.cache import ViewCache
from esrfs.engine.client import Engine
from esrfs.store import metadata
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep.claims import Claims
from esrfs.vfs import native
from esrfs.vfs.filesystem import Entry, Filesystem
from esrfs.vfs.view import Content
from tests.test_2_vfs_operations import SCAN, FakeEngine, make_blob


class Place:
    """A vfs over a store in which blobs appear."""

    def __init__(self, store: Store, cache: ViewCache) -> None:
        self.root = Path(store.path)
        self._store = store
        self._engine = FakeEngine()
        self.fs = Filesystem(store, cast(Engine, self._engine), cache, Claims())

    def blob(self, name: str, number: int = 1) -> bytes:
        """Now there is one; its view."""
        blob, view = make_blob(self._store, self._engine, number)
        (self.root / name).write_bytes(blob)
        return view

    def rebuilt_from_now_on(self, view: bytes, otherwise: bytes) -> None:
        """Another machine's engine does not repeat it exactly."""
        self._engine.views[hashlib.sha256(view).digest()] = otherwise

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        return self.fs.open(name, flags).number

    def read(self, number: int) -> bytes:
        buffer = ctypes.create_string_buffer(20_000)
        count = self.fs.read_into(number, ctypes.addressof(buffer), 20_000, 0)
        return buffer.raw[:count]

    def write(self, number: int, content: bytes) -> None:
        buffer = ctypes.create_string_buffer(content, len(content))
        assert self.fs.write_from(number, ctypes.addressof(buffer), len(content), 0) == len(content)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    init(str(tmp_path / "store"))
    with open_store(str(tmp_path / "store")) as store:
        cache = ViewCache(tmp_path / "cache", 1 << 24, 0)
        made = Place(store, cache)
        yield made
        assert len(made.fs.handles) == 0
        made.fs.close()
        made.fs.clear_cache()
        cache.close()
    assert not [each for each in open_files() if each.startswith(str(tmp_path / "store"))]


def open_files() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], None]], None]:
    """``after(call, step)``: the first time that ``os.<call>`` has done its work, ``step`` runs before it returns."""

    def hook(call: str, step: Callable[[], None]) -> None:
        real = getattr(os, call)

        def hooked(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            monkeypatch.setattr(os, call, real)
            step()
            return result

        monkeypatch.setattr(os, call, hooked)

    return hook


After = Callable[[str, Callable[[], None]], None]


def test_a_file_opened_while_a_blob_becomes_plain_keeps_its_own_descriptor(place: Place, after: After) -> None:
    view = place.blob("photograph")
    (place.root / "other").write_bytes(b"other")
    writer = place.open("photograph", os.O_RDWR)
    readers = [place.open("photograph") for _ in range(3)]
    opened = []

    def step() -> None:
        for number in readers:
            place.fs.release(number)
        opened.extend(place.open("other", os.O_RDWR) for _ in readers)  # they get the numbers that are free

    after("dup2", step)
    place.write(writer, b"X")
    assert place.read(writer) == b"X" + view[1:]
    assert [place.read(number) for number in opened] == [b"other"] * 3
    for number in opened:
        place.write(number, b"OTHER")
    assert (place.root / "other").read_bytes() == b"OTHER"
    assert (place.root / "photograph").read_bytes() == b"X" + view[1:]
    for number in (writer, *opened):
        place.fs.release(number)


@pytest.mark.parametrize("name", ["photograph", "link"])
def test_handles_opened_while_a_blob_becomes_plain_are_of_one_file(place: Place, after: After, name: str) -> None:
    view = place.blob("photograph")
    if name == "link":  # then it is turned within its own inode
        os.link(place.root / "photograph", place.root / name)
    first = place.open("photograph", os.O_RDWR)
    second: list[int] = []
    after("dup2", lambda: second.append(place.open(name, os.O_RDWR)))
    place.write(first, b"X")
    assert place.read(first) == place.read(second[0]) == b"X" + view[1:]
    file = place.fs.handles.get(second[0]).file
    assert file is place.fs.handles.get(first).file
    place.fs.release(first)
    assert place.fs.handles.is_open(file.key)
    place.write(second[0], b"Y")
    place.fs.release(second[0])
    assert (place.root / name).read_bytes() == b"Y" + view[1:]


def test_attributes_asked_while_a_blob_becomes_plain_are_of_one_of_them(place: Place, after: After) -> None:
    view = place.blob("photograph")
    writer = place.open("photograph", os.O_RDWR)
    after("fstat", lambda: place.write(writer, b"X"))
    st, size = place.fs.stat_handle(writer)
    assert size == len(view) == st.st_size
    place.fs.release(writer)


def close_what_is_used(place: Place, monkeypatch: pytest.MonkeyPatch, numbers: list[int]) -> list[int]:
    """From now on the first of these handles whose descriptor another operation goes by is closed just before, by its
    program; in a list, as soon as it happened."""
    closed: list[int] = []

    def hook(call: str) -> None:
        real = getattr(os, call)

        def hooked(used: Any, *arguments: Any, **named: Any) -> Any:
            for number in numbers if not closed else ():
                if used in (descriptor := place.fs.handles.get(number).descriptor, f"/proc/self/fd/{descriptor}"):
                    closed.append(number)
                    place.fs.release(number)
                    break
            return real(used, *arguments, **named)

        monkeypatch.setattr(os, call, hooked)

    hook("dup")
    hook("open")
    return closed


@pytest.mark.parametrize("kind", ["photograph", "plain"])
def test_a_file_is_deleted_while_one_of_its_programs_closes_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (place.root / "plain").write_bytes(b"content")
    content = {"photograph": place.blob("photograph"), "plain": b"content"}[kind]
    numbers = [place.open(kind) for _ in range(2)]
    closed = close_what_is_used(place, monkeypatch, numbers)
    hidden = place.fs.hide(kind)
    assert len(closed) == 1
    assert not (place.root / kind).exists()
    assert place.read(hidden.handle) == content
    place.fs.release(*set(numbers) - set(closed))


@pytest.mark.parametrize("kind", ["photograph", "plain"])
def test_a_deleted_file_is_opened_while_one_of_its_programs_closes_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (place.root / "plain").write_bytes(b"content")
    content = {"photograph": place.blob("photograph"), "plain": b"content"}[kind]
    first = place.open(kind)
    hidden = place.fs.hide(kind)
    numbers = [first, *(place.fs.open_hidden(hidden, os.O_RDONLY).number for _ in range(5)), hidden.handle]
    closed = close_what_is_used(place, monkeypatch, numbers)
    again = place.fs.open_hidden(hidden, os.O_RDONLY).number
    assert len(closed) == 1
    assert place.read(again) == content
    for number in set(numbers) - set(closed) | {again}:
        if number != hidden.handle:  # it ends with the last program's
            place.fs.release(number)


def test_a_photograph_is_deleted_while_its_last_program_closes_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.blob("photograph")
    blob = (place.root / "photograph").read_bytes()
    number = place.open("photograph")
    nameless = place.fs._shared.nameless
    real, kept = nameless.copy, []

    def copy(descriptor: int, reference: bytes) -> None:
        place.fs.release(number)
        kept.append(os.pread(descriptor, 1 << 20, 0))
        real(descriptor, reference)

    monkeypatch.setattr(nameless, "copy", copy)
    place.fs.hide("photograph")
    assert kept == [blob]
    assert not (place.root / "photograph").exists()


def test_a_blob_that_can_not_be_removed_costs_no_write(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    view = place.blob("photograph")
    number = place.open("photograph", os.O_RDWR)

    def fail(*_: object) -> bool:
        raise OSError(errno.EIO, "a bad sector")

    monkeypatch.setattr(metadata, "same_content", fail)
    place.write(number, b"X")
    place.write(number, b"Y")
    place.fs.release(number)
    assert (place.root / "photograph").read_bytes() == b"Y" + view[1:]
    assert "could not be removed from staging" in caplog.text
    caplog.clear()  # the record has the error, and with it the frames and the view in them


# ---- the cache's disk


@pytest.fixture
def lose(place: Place, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]) -> Callable[[int], Content]:
    """``lose(handle)``: from now on the disk does not give the rebuilt view that this handle reads."""
    expect_log("the cache's disk does not give")

    def lose(number: int) -> Content:
        view = place.fs.handles.get(number).file.view
        assert view is not None
        content = view.content
        assert content is not None
        real = native.pread_into

        def pread_into(descriptor: int, *arguments: int) -> int:
            if descriptor == content.descriptor.number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor, *arguments)

        monkeypatch.setattr(native, "pread_into", pread_into)
        return content  # as long as that lives, no other file has its number

    return lose


def test_a_view_that_the_cache_loses_is_rebuilt(place: Place, lose: Callable[[int], Content]) -> None:
    view = place.blob("photograph")
    first = place.open("photograph")
    assert place.read(first) == view
    lost = lose(first)
    assert place.read(first) == view
    second = place.open("photograph")
    assert place.read(second) == view
    assert place.fs.handles.get(second).file.view.content is not lost  # type: ignore[union-attr]
    for number in (first, second):
        place.fs.release(number)


@pytest.mark.parametrize("how", ["unreadable", "short"])
def test_the_first_write_to_a_view_that_the_cache_lost_is_to_all_of_it(
    place: Place, tmp_path: Path, expect_log: Callable[[str], None], how: str
) -> None:
    """The plain file is a copy of the view: what was missing of that would be missing for good."""
    expect_log("the cache's disk does not give")
    view = place.blob("photograph")
    first = place.open("photograph")
    assert place.read(first) == view
    place.fs.release(first)
    place.fs._shared.recent.clear()
    [cached] = (tmp_path / "cache").rglob("*.val")
    if how == "short":
        os.truncate(cached, 5000)
    else:
        cached.unlink()
        cached.symlink_to("/proc/self/mem")  # where nothing is at address 0: EIO
    writer = place.open("photograph", os.O_RDWR)
    place.write(writer, b"X")
    assert place.read(writer) == b"X" + view[1:]
    place.fs.release(writer)


def test_nobody_reads_bytes_of_two_reconstructions(
    place: Place, lose: Callable[[int], Content], expect_log: Callable[[str], None]
) -> None:
    view = place.blob("photograph")
    first = place.open("photograph")
    assert place.read(first) == view
    lost = lose(first)
    other = view.replace(SCAN, SCAN[::-1])
    assert other != view
    place.rebuilt_from_now_on(view, other)
    expect_log("was rebuilt to other bytes")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            place.read(first)
    place.fs.release(first)
    again = place.open("photograph")
    assert place.read(again) == other
    place.fs.release(again)
    del lost


def listing(fs: Filesystem) -> dict[str, Entry]:
    number = fs.opendir("")
    try:
        return {entry.name: entry for entry in fs.readdir(number, True)}
    finally:
        fs.releasedir(number)


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, name: str | int, number: int) -> None:
    """``os.<call>`` of this name, or descriptor, fails with this errno."""
    real = getattr(os, call)

    def refusing(path: Any, *arguments: Any, **named: Any) -> Any:
        if path == name:
            raise OSError(number, os.strerror(number), name)
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, call, refusing)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_size_that_can_not_be_known_is_not_guessed(
    place: Place, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """tar, rsync and Samba would take the blob's size for the photograph's."""
    views = {name: place.blob(name, i) for i, name in enumerate(("photograph", "other"))}
    with monkeypatch.context() as patch:
        refuse(patch, "open", "photograph", number)
        with pytest.raises(OSError) as raised:
            place.fs.stat("photograph")
        assert raised.value.errno == number
        found = listing(place.fs)
    assert found.keys() == views.keys()
    assert found["photograph"].attributes is None
    assert stat.S_ISREG(found["photograph"].kind)
    assert found["photograph"].inode == (place.root / "photograph").stat().st_ino
    assert found["other"].size == len(views["other"])
    assert listing(place.fs)["photograph"].size == len(views["photograph"])


def test_what_is_not_ours_to_read_is_shown_as_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.blob("photograph")
    refuse(monkeypatch, "open", "photograph", errno.EACCES)
    assert place.fs.stat("photograph")[1] == (place.root / "photograph").stat().st_size
    assert listing(place.fs)["photograph"].attributes is not None


def test_a_program_with_a_write_lease_is_waited_for(place: Place) -> None:
    """As a file server takes one for its client; the open that does not wait breaks it, but fails."""
    view = place.blob("photograph")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    descriptor = os.open(place.root / "photograph", os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    letting_go = threading.Timer(0.3, os.close, [descriptor])
    letting_go.start()
    try:
        assert place.fs.stat("photograph")[1] == len(view)
    finally:
        letting_go.join()
        signal.signal(signal.SIGIO, before)


def test_a_handle_whose_file_the_server_forgot_ends_all_the_same(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS, when another machine deleted it. It would count as open, and be left out of compaction, for ever."""
    (place.root / "file").write_bytes(bytes(128 + 13))  # as long as a blob may be
    number = place.open("file", os.O_RDWR)
    place.write(number, b"X")
    refuse(monkeypatch, "fstat", place.fs.handles.get(number).descriptor, errno.ESTALE)
    place.fs.release(number)
    assert not place.fs.handles.is_open(((place.root / "file").stat().st_dev, (place.root / "file").stat().st_ino))


@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_name_that_goes_while_it_is_listed_is_not_listed(
    place: Place, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    place.blob("photograph")
    (place.root / "other").touch()
    refuse(monkeypatch, call, "photograph", errno.ENOENT)
    with pytest.raises(FileNotFoundError):
        place.fs.stat("photograph")
    assert listing(place.fs).keys() == {"other"}


def test_a_name_whose_inode_can_not_be_read_is_listed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror job would delete its copy of what is missing."""
    place.blob("photograph")
    refuse(monkeypatch, "stat", "photograph", errno.EIO)
    assert listing(place.fs)["photograph"] == Entry("photograph", None, 0, 0, 0)
