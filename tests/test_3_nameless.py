"""Blobs without a name: how they come in, how long they stay, and that what can't be kept is deleted all the same."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from esrfs import faults
from esrfs.store import ledger, nameless
from esrfs.store.initialise import init
from esrfs.store.layout import RESERVED, Store, open_store
from esrfs.store.nameless import LastName, Nameless

REFERENCE = bytes(range(32))


@pytest.fixture
def store(tmp_path: Path) -> Any:
    root = tmp_path / "store"
    init(str(root), undo_days=10)
    with open_store(str(root)) as one:
        yield one


def room(store: Store) -> Path:
    return Path(store.path, RESERVED, "blobs")


def blob(store: Store, name: str = "a.jpg", content: bytes = b"blob") -> LastName:
    path = Path(store.path, name)
    path.write_bytes(content)
    st = path.stat()
    return LastName(REFERENCE, "", st.st_dev, st.st_ino, st.st_size)


def found(store: Store, reference: bytes = REFERENCE) -> list[bytes]:
    contents = []
    for descriptor in nameless.find(store, reference):
        contents.append(os.read(descriptor, 1000))
        os.close(descriptor)
    return contents


def test_an_unlinked_blob_is_kept(store: Store) -> None:
    last = blob(store)
    Nameless(store).unlink(store.root_fd, "a.jpg", last)
    assert not Path(store.path, "a.jpg").exists()
    assert found(store) == [b"blob"]
    assert found(store, bytes(32)) == found(store, b"") == []


def test_a_replaced_blob_is_kept_with_one_name(store: Store) -> None:
    last = blob(store)
    with Nameless(store).replacing(store.root_fd, "a.jpg", last):
        Path(store.path, "new").write_bytes(b"new")
        Path(store.path, "new").rename(Path(store.path, "a.jpg"))
    assert found(store) == [b"blob"]
    assert next(room(store).iterdir()).stat().st_nlink == 1


def test_a_rename_that_fails_leaves_nothing(store: Store) -> None:
    last = blob(store)
    with pytest.raises(OSError, match="no"), Nameless(store).replacing(store.root_fd, "a.jpg", last):
        raise OSError(errno.EIO, "no")
    assert found(store) == []
    assert Path(store.path, "a.jpg").stat().st_nlink == 1


def test_what_somebody_gave_the_name_to_meanwhile_is_not_kept(store: Store) -> None:
    last = blob(store)
    Path(store.path, "other").write_bytes(b"other")
    Path(store.path, "other").rename(Path(store.path, "a.jpg"))
    Nameless(store).unlink(store.root_fd, "a.jpg", last)
    assert not Path(store.path, "a.jpg").exists()
    assert not list(room(store).iterdir())
    Path(store.path, "a.jpg").mkdir()
    Path(store.path, "a.jpg", "inside").write_bytes(b"x")
    with pytest.raises(IsADirectoryError):
        Nameless(store).unlink(store.root_fd, "a.jpg", last)
    assert Path(store.path, "a.jpg", "inside").read_bytes() == b"x"
    with Nameless(store).replacing(store.root_fd, "a.jpg", last):
        pass
    assert not list(room(store).iterdir())


def test_an_open_blob_is_copied(store: Store) -> None:
    blob(store)
    with Path(store.path, "a.jpg").open("rb") as file:
        Nameless(store).copy(file.fileno(), REFERENCE)
    assert found(store) == [b"blob"]
    assert Path(store.path, "a.jpg").stat().st_nlink == 1


def test_what_cannot_be_kept_is_deleted_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    last = blob(store)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "another filesystem")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        Nameless(store).unlink(store.root_fd, "a.jpg", last)
    assert not Path(store.path, "a.jpg").exists()
    last = blob(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with Nameless(store).replacing(store.root_fd, "a.jpg", last):
            Path(store.path, "a.jpg").unlink()
    monkeypatch.setitem(faults._actions, "nameless.copied", "errno:ENOSPC")
    blob(store)
    with Path(store.path, "a.jpg").open("rb") as file:
        Nameless(store).copy(file.fileno(), REFERENCE)
    assert not list(room(store).iterdir())


@pytest.mark.parametrize(("reference", "days"), [(b"", 10), (REFERENCE, 0)])
def test_not_kept(store: Store, reference: bytes, days: int) -> None:
    """Blobs of the first days of format 1; stores whose owner wants nothing to be kept."""
    store.config = structs.replace(store.config, undo_days=days)
    last = LastName(reference, *(getattr(blob(store), name) for name in ("view_key", "device", "inode", "size")))
    Nameless(store).unlink(store.root_fd, "a.jpg", last)
    assert not Path(store.path, "a.jpg").exists()
    assert not list(room(store).iterdir())


def test_they_stay_as_long_as_originals_do(store: Store) -> None:
    live(store, 1)
    Nameless(store).unlink(store.root_fd, "a.jpg", blob(store))
    live(store, 9, start=1)
    assert nameless.purge(store) == 0
    assert found(store) == [b"blob"]
    live(store, 1, start=10)
    assert nameless.purge(store) == len(b"blob")
    assert not list(room(store).iterdir())


def test_a_mount_that_lives_for_weeks_counts_its_days(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    live(store, 1)
    keeper = Nameless(store)
    keeper.unlink(store.root_fd, "a.jpg", blob(store))
    live(store, 20, start=1)
    monkeypatch.setattr("time.monotonic", lambda: 1e9)
    keeper.unlink(store.root_fd, "b.jpg", blob(store, "b.jpg", b"later"))
    nameless.purge(store)
    assert found(store) == [b"later"]


def live(store: Store, days: int, start: int = 0) -> None:
    for number in range(start, start + days):
        ledger.mark_day(store.ledger_fd, date=f"day {number}", boot=f"boot {number}", uptime=0)


def test_the_oldest_make_room_for_the_newest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameless, "MOST_BYTES", 25)
    keeper = Nameless(store)
    for number in range(5):
        keeper.unlink(store.root_fd, f"{number}", blob(store, f"{number}", b"%010d" % number))
    assert sorted(found(store)) == [b"%010d" % 3, b"%010d" % 4]
    keeper = Nameless(store)  # another mount
    keeper.unlink(store.root_fd, "5", blob(store, "5", b"%010d" % 5))
    assert sorted(found(store)) == [b"%010d" % 4, b"%010d" % 5]
    keeper.unlink(store.root_fd, "6", blob(store, "6", bytes(26)))
    assert len(found(store)) == 2, "larger than all of them may be together"
    monkeypatch.setattr(nameless, "MOST_BYTES", 10)
    nameless.purge(store)
    assert found(store) == [b"%010d" % 5]
    assert nameless.purge(store, all_of_them=True) == 10
    assert found(store) == []


def test_what_a_crash_left_goes(store: Store) -> None:
    last = blob(store)
    (room(store) / ".0123456789abcdef").write_bytes(b"half a copy")
    os.link(Path(store.path, "a.jpg"), room(store) / f"{last.reference.hex()}-{'0' * 16}.0")
    nameless.purge(store)
    assert not list(room(store).iterdir())
    assert Path(store.path, "a.jpg").read_bytes() == b"blob"


def test_threads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameless, "MOST_BYTES", 100)
    keeper = Nameless(store)

    def work(thread: int) -> None:
        for number in range(40):
            name = f"{thread}-{number}"
            keeper.unlink(store.root_fd, name, blob(store, name, b"%010d" % number))
            nameless.purge(store)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found(store)) <= 10
    assert sorted(os.listdir(store.path)) == [RESERVED]


def test_a_read_only_store_without_the_directory(store: Store) -> None:
    room(store).rmdir()
    with open_store(store.path, readonly=True) as other:
        assert list(nameless.find(other, REFERENCE)) == []
        assert nameless.purge(other) == 0
