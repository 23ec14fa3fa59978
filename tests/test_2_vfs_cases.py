"""Cases of the vfs that random sequences don't reach: another program does something between two steps of an operation.

The second program's step is put there by a hook in the system call before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from esrfs.cache import ViewCache
from esrfs.engine.client import Engine
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep.claims import Claims
from esrfs.vfs.filesystem import Filesystem
from tests.test_2_vfs_operations import FakeEngine, make_blob


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
