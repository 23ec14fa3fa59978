"""Originals that their owner asked back stay originals, until the owner names them to be compacted: the store's ledgers
say so, for what a catalog knows of a file ends with its next ``chmod``."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest

from esrfs import faults
from esrfs.blob import container
from esrfs.compaction.outcome import Outcome, Verdict
from esrfs.engine.client import Engine
from esrfs.store import layout, ledger
from esrfs.store.catalog import Catalog
from esrfs.store.initialise import init
from esrfs.store.layout import RESERVED, open_store
from esrfs.upkeep import compact as compact_module
from esrfs.upkeep.asked_back import AskedBack
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import Workshop
from esrfs.upkeep.explain import explain
from esrfs.upkeep.restore import restore
from esrfs.upkeep.scheduler import Scheduler
from tests.test_3_swap import ORIGINAL, blob_bytes


class Mount:
    """What a mount does in the background, on a store that others may have open, too."""

    def __init__(self, root: Path, catalog: Path) -> None:
        self.root = root
        self.store = open_store(str(root))
        self.catalog = Catalog(str(catalog))
        workshop = Workshop(self.store, cast(Engine, None), self.catalog, Claims(), lambda: True)
        self.scheduler = Scheduler(workshop, quiet_seconds=0.0)

    def work(self) -> None:
        self.scheduler._next_walk = 0.0
        for _ in range(3):
            self.scheduler._step()

    def is_original(self, name: str) -> bool:
        return (self.root / name).read_bytes() == ORIGINAL

    def bring_back(self, name: str) -> None:
        assert [one.state for one in restore(self.store, [name], catalog=self.catalog)] == ["restored"]
        assert self.is_original(name)

    def close(self) -> None:
        self.scheduler.stop()
        self.catalog.close()
        self.store.close()


BeginMount = Callable[..., Mount]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BeginMount]:
    """Mounts of one store, in which every photograph can be compacted, by catalog and by host."""
    init(str(tmp_path / "store"))
    with open_store(str(tmp_path / "store")) as store:
        blob = container.unpack(blob_bytes(store))

    def ask(workshop: Workshop, original: object, claim: object, policy: object) -> Outcome:
        return Outcome(verdict=Verdict.COMPACTED, avif=blob.avif, recipe=blob.recipe_bytes)

    monkeypatch.setattr(compact_module, "_ask_engine", ask)
    with ExitStack() as opened:

        def begin(catalog: str = "catalog", host: str = "here", root: str = "store") -> Mount:
            monkeypatch.setattr(layout.socket, "gethostname", lambda: host)
            mount = Mount(tmp_path / root, tmp_path / catalog)
            opened.callback(mount.close)
            return mount

        yield begin


@pytest.fixture
def mount(begin: BeginMount) -> Mount:
    """``photo.jpg`` was compacted, and brought back."""
    mount = begin()
    (mount.root / "photo.jpg").write_bytes(ORIGINAL)
    mount.work()
    assert not mount.is_original("photo.jpg")
    mount.bring_back("photo.jpg")
    return mount


@pytest.mark.parametrize("deed", ["nothing", "rename", "chmod", "setxattr", "copy"])
def test_what_was_asked_back_stays_whatever_is_done_to_the_file(mount: Mount, deed: str) -> None:
    file, name = mount.root / "photo.jpg", "photo.jpg"
    mount.work()
    match deed:
        case "rename":
            name = "renamed.jpg"
            file.rename(mount.root / name)
        case "chmod":
            file.chmod(0o604)
        case "setxattr":
            os.setxattr(file, "user.note", b"mine")
        case "copy":
            name = "copy.jpg"
            shutil.copyfile(file, mount.root / name)
    mount.work()
    assert mount.is_original(name)
    known = explain(mount.store, mount.catalog, name)
    assert known.state == "original"
    assert "brought back" in (known.message or "")
    assert mount.scheduler.pending == 0


def test_it_stays_for_a_mount_that_has_another_catalog(mount: Mount, begin: BeginMount) -> None:
    mount.close()
    again = begin(catalog="another")
    again.work()
    assert again.is_original("photo.jpg")


def test_it_stays_when_the_store_is_copied(mount: Mount, begin: BeginMount, tmp_path: Path) -> None:
    mount.close()
    shutil.copytree(tmp_path / "store", tmp_path / "moved", symlinks=True)
    moved = begin(catalog="another", root="moved")
    moved.work()
    assert moved.is_original("photo.jpg")


def test_it_stays_when_another_host_brought_it_back_just_now(begin: BeginMount) -> None:
    compactor = begin()
    for name in ("photo.jpg", "second.jpg"):
        (compactor.root / name).write_bytes(ORIGINAL)
        compactor.work()  # from here on it has read the ledgers
    begin(catalog="there", host="elsewhere").bring_back("photo.jpg")
    compactor.work()
    assert compactor.is_original("photo.jpg")
    assert not compactor.is_original("second.jpg")


def test_whom_the_owner_names_is_compacted_and_then_is_as_any_other(mount: Mount, begin: BeginMount) -> None:
    def compact() -> dict[str, int]:
        return dict(mount.scheduler.compact_now(["photo.jpg"], emit=lambda *_: True))

    (mount.root / "photo.jpg").chmod(0o604)
    assert compact() == {"compacted": 1}
    (mount.root / "photo.jpg").unlink()
    (mount.root / "photo.jpg").write_bytes(ORIGINAL)
    mount.work()
    assert not mount.is_original("photo.jpg"), "nobody asked for this one"
    mount.bring_back("photo.jpg")
    (mount.root / "photo.jpg").chmod(0o640)
    mount.work()
    assert mount.is_original("photo.jpg")
    mount.close()
    again = begin(catalog="another")
    again.work()
    assert again.is_original("photo.jpg")


def test_one_of_two_alike_is_named_and_the_other_stays(mount: Mount) -> None:
    (mount.root / "second.jpg").write_bytes(ORIGINAL)
    assert dict(mount.scheduler.compact_now(["second.jpg"], emit=lambda *_: True)) == {"compacted": 1}
    mount.bring_back("second.jpg")
    assert dict(mount.scheduler.compact_now(["second.jpg"], emit=lambda *_: True)) == {"compacted": 1}
    (mount.root / "photo.jpg").chmod(0o604)
    mount.work()
    assert mount.is_original("photo.jpg")
    assert not mount.is_original("second.jpg")


def test_one_with_several_names_was_brought_back_in_place(begin: BeginMount) -> None:
    mount = begin()
    file = mount.root / "photo.jpg"
    file.write_bytes(ORIGINAL)
    mount.work()
    os.link(file, mount.root / "second.jpg")
    mount.bring_back("photo.jpg")
    (mount.root / "second.jpg").unlink()
    mount.work()
    assert mount.is_original("photo.jpg")
    assert dict(mount.scheduler.compact_now(["photo.jpg"], emit=lambda *_: True)) == {"compacted": 1}
    file.unlink()
    file.write_bytes(ORIGINAL)
    mount.work()
    assert not mount.is_original("photo.jpg")


def test_only_what_was_carried_through_counts(begin: BeginMount, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a restoring that failed."""
    mount = begin()
    (mount.root / "photo.jpg").write_bytes(ORIGINAL)
    mount.work()

    def fail(point: str) -> None:
        if point == "plain.looked":
            raise OSError(28, "made up")

    with monkeypatch.context() as patched:
        patched.setattr(faults, "reach", fail)
        assert restore(mount.store, ["photo.jpg"], catalog=mount.catalog)[0].state == "failed"
    assert not AskedBack(mount.store).holds(sha256())
    mount.bring_back("photo.jpg")
    assert AskedBack(mount.store).holds(sha256())
    assert not AskedBack(mount.store).holds(b"\1" * 32)


def sha256() -> bytes:
    return hashlib.sha256(ORIGINAL).digest()


def test_a_record_that_is_being_written_is_read_when_it_is_whole(mount: Mount) -> None:
    mount.close()
    settled = mount.root / RESERVED / "ledger" / ledger.SETTLED
    (written,) = settled.iterdir()
    lines = written.read_bytes().splitlines(keepends=True)
    growing = mount.root / RESERVED / "ledger" / written.name
    written.unlink()
    with open_store(str(mount.root)) as store:
        asked = AskedBack(store)
        said = []
        for end in range(len(lines)):
            growing.write_bytes(b"".join(lines[:end]) + lines[end][:40])
            said.append(asked.holds(sha256()))
            growing.write_bytes(b"".join(lines[: end + 1]))
        assert asked.holds(sha256())
        assert not any(said)
        growing.write_bytes(growing.read_bytes() + b"0123 damaged\n")
        growing.rename(written)  # its process ends
        assert asked.holds(sha256())
        assert AskedBack(store).holds(sha256())
