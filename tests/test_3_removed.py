"""Files deleted or replaced while open: what happens when the step after the hiding fails, or never comes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from esrfs.cache import ViewCache
from esrfs.engine.client import Engine
from esrfs.store import recovery
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep.claims import Claims
from esrfs.vfs import removed
from esrfs.vfs.creating import Caller
from esrfs.vfs.filesystem import Filesystem


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(str(tmp_path / "store"))
    with open_store(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def fs(store: Store, tmp_path: Path) -> Iterator[Filesystem]:
    cache = ViewCache(tmp_path / "cache", 1 << 20, 0)
    yield Filesystem(store, cast(Engine, None), cache, Claims())
    cache.close()


def create(fs: Filesystem, name: str, content: str) -> int:
    number = fs.create(name, os.O_RDWR, 0o644, Caller(os.geteuid(), os.getegid(), 0)).number
    Path(fs.store.path, name).write_text(content)
    return number


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed just now"])
def test_the_target_of_a_rename_that_fails_gets_its_name_back(fs: Filesystem, links: int, closed: bool) -> None:
    number = create(fs, "target", "content")
    if links == 2:
        fs.link("target", "other")
    if closed:
        fs.release(number)
    hidden = fs.hide("target")
    assert not Path(fs.store.path, "target").exists()
    fs.give_name_back(hidden)
    assert Path(fs.store.path, "target").read_text() == "content"
    assert fs.stat("target")[0].st_nlink == links
    fs.close()
    assert Path(fs.store.path, "target").read_text() == "content"
    if not closed:
        fs.release(number)
    assert len(fs.handles) == 0


def test_a_name_that_somebody_took_meanwhile_is_theirs(fs: Filesystem, caplog: pytest.LogCaptureFixture) -> None:
    number = create(fs, "target", "content")
    hidden = fs.hide("target")
    Path(fs.store.path, "target").write_text("newer")
    fs.give_name_back(hidden)
    assert Path(fs.store.path, "target").read_text() == "newer"
    assert "could not be given back its name" in caplog.text
    caplog.clear()
    fs.release(number)
    fs.close()


def test_a_crash_between_hiding_and_replacing_loses_nothing(
    fs: Filesystem, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("could not be removed from staging")
    create(fs, "target", "content")
    fs.hide("target")
    fs.store.close()  # as a kill would: its ledger's lock is gone, the name lies in staging
    with open_store(str(tmp_path / "store")) as again:
        report = recovery.recover(again)
        assert len(report.found) == 1
        kept = Path(again.path, ".esrfs", "originals", report.found[0])
        assert kept.read_text() == "content"
        assert os.listdir(again.staging_fd) == []
    fs.close()  # its thread finds no staging any more, which a killed process would not live to see


def test_without_a_thread_names_are_let_go_of_later(
    fs: Filesystem, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """The name is gone when the thread is wanted, so the deletion succeeded; the next one, or the end, clears up."""
    expect_log("take up room in staging")
    start, refusing = threading.Thread.start, [True]

    def refuse(thread: threading.Thread) -> None:
        if refusing and thread.name == "esrfs-removed":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(removed, "_LIFE_SECONDS", 0.0)
    numbers = [create(fs, name, "content") for name in ("first", "second", "third")]
    fs.hide("first")
    assert not Path(fs.store.path, "first").exists()
    assert len(os.listdir(fs.store.staging_fd)) == 1
    refusing.clear()
    fs.hide("second")
    deadline = time.monotonic() + 5
    while os.listdir(fs.store.staging_fd):
        assert time.monotonic() < deadline, "nobody cleared up"
        time.sleep(0.01)
    for number in numbers:
        fs.release(number)
    fs.close()


def test_the_end_clears_up_without_a_thread(
    fs: Filesystem, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("take up room in staging")

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    number = create(fs, "target", "content")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    fs.hide("target")
    fs.release(number)
    fs.close()
    assert os.listdir(fs.store.staging_fd) == []
