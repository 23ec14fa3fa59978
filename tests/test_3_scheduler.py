"""The scheduler's walk of a store: what it finds, and how the catalog follows files that were moved or deleted behind
the mount; and how compaction stops for a full disk, and goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from esrfs.engine.client import Engine
from esrfs.store.catalog import Catalog, Entry
from esrfs.store.identity import Identity
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep import scheduler as scheduler_module
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import CompactionUnavailable, Workshop
from esrfs.upkeep.scheduler import Scheduler

ExpectLog = Callable[[str], None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(str(tmp_path / "store"))
    with open_store(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(str(tmp_path / "catalog"))
    yield opened
    opened.close()


def walked(store: Store, catalog: Catalog) -> set[str]:
    """Let a scheduler walk the store, and take all files as not pictures, once; the paths that the catalog knows."""
    workshop = Workshop(store, cast(Engine, None), catalog, Claims(), lambda: True)
    scheduler = Scheduler(workshop, quiet_seconds=0.0)
    for _ in range(10):
        scheduler._step()
    assert scheduler.pending == 0
    scheduler.stop()
    return {entry.path for _, entry in catalog.entries()}


def test_the_catalog_follows_what_is_moved_and_forgets_what_is_gone(store: Store, catalog: Catalog) -> None:
    root = Path(store.path)
    (root / "folder").mkdir()
    for name in ("kept", "moved", "deleted", "folder/below"):
        (root / name).write_text("no picture")
    (root / "empty").touch()
    assert walked(store, catalog) == {"kept", "moved", "deleted", "folder/below"}
    os.rename(root / "moved", root / "folder" / "elsewhere")
    os.rename(root / "folder", root / "renamed")
    os.unlink(root / "deleted")
    assert walked(store, catalog) == {"kept", "renamed/elsewhere", "renamed/below"}
    assert catalog.get(Identity.from_stat(os.lstat(root / "kept"))) is not None


def test_what_was_brought_back_is_remembered_whatever_becomes_of_its_name(store: Store, catalog: Catalog) -> None:
    path = Path(store.path) / "picture"
    path.write_text("content")
    identity = Identity.from_stat(os.lstat(path))
    catalog.put(identity, Entry(state="original", view_size=7, stored_bytes=512, path="picture"))
    os.unlink(path)
    assert walked(store, catalog) == {"picture"}


@pytest.fixture
def full(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> tuple[Scheduler, dict[str, int], list[str]]:
    """A scheduler on a disk of which as much is free as the dictionary says (in floors); and how often it made room."""
    (Path(store.path) / "file").write_text("no picture")
    free: dict[str, int] = {"floors": 0}
    calls: list[str] = []
    monkeypatch.setattr(scheduler_module, "_is_free", lambda store, times: free["floors"] >= times)
    workshop = Workshop(store, cast(Engine, None), catalog, Claims(), lambda: True)
    return Scheduler(workshop, 0.0, lambda: calls.append("room")), free, calls


def begin(scheduler: Scheduler) -> None:
    """Find the file, and come to it."""
    for _ in range(2):
        scheduler._step()


def look_again(scheduler: Scheduler) -> str:
    """What its state is after its next look, however far off that is."""
    scheduler._next_look_for_room = 0.0
    for waiting in scheduler._queue.values():
        waiting.due = 0.0
    scheduler._step()
    return scheduler.state


Full = tuple[Scheduler, dict[str, int], list[str]]


def test_after_a_full_disk_compaction_goes_on_by_itself_when_there_is_much_room(
    full: Full, expect_log: ExpectLog, caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("compaction of .* stops")
    caplog.set_level("INFO")
    scheduler, free, calls = full
    begin(scheduler)
    assert scheduler.state.startswith("stopped: the store's disk is nearly full")
    assert calls == ["room"]
    scheduler._step()
    assert calls == ["room"]  # not at every tick
    free["floors"] = 1
    assert look_again(scheduler).startswith("stopped")
    assert calls == ["room", "room"]
    with pytest.raises(CompactionUnavailable, match="nearly full"):
        scheduler.compact_now([""], emit=lambda *_: True)
    free["floors"] = 2
    assert look_again(scheduler) == "off"
    assert "there is room again" in caplog.text
    assert scheduler.counts["passed_through"] == 1


def test_while_it_is_paused_it_does_not_go_on(full: Full, expect_log: ExpectLog) -> None:
    expect_log("compaction of .* stops")
    scheduler, free, _ = full
    begin(scheduler)
    scheduler.pause()
    free["floors"] = 2
    look_again(scheduler)
    assert scheduler._stopped_because
    assert not scheduler.counts


def test_a_quota_that_is_used_up_is_waited_for_ever_longer(
    full: Full, expect_log: ExpectLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("compaction of .* stops|no space is left")
    scheduler, free, _ = full
    free["floors"] = 100

    def over_quota(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patched:
        patched.setattr(scheduler_module.compact, "compact", over_quota)
        begin(scheduler)
        assert scheduler.state == "stopped: no space is left for blobs"
        waits = [scheduler._room_wait]
        patched.setattr(scheduler_module.linux, "reserve", over_quota)
        assert look_again(scheduler).startswith("stopped")
        patched.undo()
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(scheduler_module.compact, "compact", over_quota)
            look_again(scheduler)
            waits.append(scheduler._room_wait)
    assert waits == [60.0, 120.0, 240.0]
    assert look_again(scheduler) == "off"


def test_what_failed_waits_for_somebody(full: Full, expect_log: ExpectLog) -> None:
    expect_log("compaction of .* stops")
    scheduler, free, _ = full
    begin(scheduler)
    scheduler._stop("the store's disk failed")  # graver than the lack of room
    free["floors"] = 100
    assert look_again(scheduler) == "stopped: the store's disk failed"
    scheduler._stop("the disk is full", for_room=True)
    assert look_again(scheduler) == "stopped: the store's disk failed"
    scheduler.resume()
    assert look_again(scheduler) == "off"
