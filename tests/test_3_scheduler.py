"""The scheduler's walk of a store: what it finds, and how the catalog follows files that were moved or deleted behind
the mount; how compaction stops for a full disk, and goes on; what it does when a photograph ends the engine, or when no
blob can get its name."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from esrfs.blob import container
from esrfs.compaction.outcome import LOSSLESS, Outcome, Policy, Verdict
from esrfs.engine.client import Engine, EngineSettings
from esrfs.store import exchange, linux
from esrfs.store.catalog import Catalog, Entry
from esrfs.store.identity import Identity
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep import compact as compact_module
from esrfs.upkeep import scheduler as scheduler_module
from esrfs.upkeep import status
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import CompactionUnavailable, Workshop
from esrfs.upkeep.explain import explain
from esrfs.upkeep.scheduler import Scheduler
from tests.test_3_swap import ORIGINAL, blob_bytes

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


# ---- photographs that end the engine

ENGINE_ENDED = r"the engine ended|not compacted, the engine failed"


def put(store: Store, name: str, order: str) -> None:
    """A file that looks like a photograph, with which the fake engine does as told."""
    (Path(store.path) / name).write_bytes(b"BM" + bytes(24) + order.encode())


class Compacting:
    """A scheduler with an engine that obeys, on a store; once more after a restart of the mount."""

    def __init__(self, place: Path) -> None:
        self.place = place
        if not (place / "store").exists():
            init(str(place / "store"), policy=Policy(preset=LOSSLESS))
        self.store = open_store(str(place / "store"))
        self.catalog = Catalog(str(place / "catalog"))
        self.engine = Engine(EngineSettings(handler="fake_engine_handler"), lambda _: b"")
        workshop = Workshop(self.store, self.engine, self.catalog, Claims(), lambda: True)
        self.scheduler = Scheduler(workshop, quiet_seconds=0.0)

    def work(self) -> Compacting:
        """Come to every file that waits, as often as it waits."""
        self.scheduler._next_walk = 0.0
        for _ in range(10):
            for waiting in self.scheduler._queue.values():
                waiting.due = 0.0
            self.scheduler._step()
        return self

    def compact(self, *paths: str) -> dict[str, int]:
        return dict(self.scheduler.compact_now(paths or [""], emit=lambda *_: True))

    def verdict(self, path: str) -> tuple[str, str | None]:
        known = explain(self.store, self.catalog, path)
        return known.state, known.reason

    def close(self) -> None:
        self.scheduler.stop()
        self.engine.close()
        self.catalog.close()
        self.store.close()


@pytest.fixture
def begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Compacting]]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with contextlib.ExitStack() as opened:

        def begin_anew() -> Compacting:
            opened.close()
            return opened.enter_context(contextlib.closing(Compacting(tmp_path)))

        yield begin_anew


BeginAnew = Callable[[], Compacting]


def test_a_photograph_that_ends_the_engine_is_left_and_others_are_compacted(
    begin_anew: BeginAnew, expect_log: ExpectLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expect_log(ENGINE_ENDED)
    mount = begin_anew()
    put(mount.store, "deadly", "die")
    mount.work()
    assert mount.scheduler.state == "off"  # that is, it did not stop
    assert mount.verdict("deadly") == ("refused", "engine_ended")
    assert re.search("deadly: .*the engine ended", caplog.text)
    put(mount.store, "good", "refuse")
    assert mount.work().verdict("good") == ("refused", "quality")
    put(mount.store, "as well", "refuse")
    assert mount.compact() == {"refused": 3}
    assert mount.engine.counters.restarts == 2, "it is not tried a third time"
    mount = begin_anew().work()
    assert mount.engine.counters.restarts == 0, "nor after a restart"
    assert mount.compact("deadly") == {"failed": 1}, "unless somebody asks for it"
    assert mount.engine.counters.restarts == 2
    assert mount.work().scheduler.state == "off"
    assert mount.engine.counters.restarts == 2
    monkeypatch.setattr(compact_module, "__version__", "another")
    assert mount.work().engine.counters.restarts == 4, "or esrfs is another, whose engine may not end"
    assert mount.work().engine.counters.restarts == 4


def test_an_engine_that_ended_once_with_a_photograph_gets_it_again(
    begin_anew: BeginAnew, expect_log: ExpectLog, tmp_path: Path
) -> None:
    expect_log(ENGINE_ENDED)
    mount = begin_anew()
    put(mount.store, "photograph", f"die-once {tmp_path}/flag")
    assert mount.work().verdict("photograph") == ("refused", "quality")
    assert mount.engine.counters.restarts == 1
    assert mount.catalog.ends(Identity.from_stat(os.lstat(Path(mount.store.path) / "photograph"))) == 0


def test_photographs_that_end_the_engine_one_after_the_other_are_not_to_blame(
    begin_anew: BeginAnew, expect_log: ExpectLog
) -> None:
    expect_log(ENGINE_ENDED + "|compaction of .* stops")
    mount = begin_anew()
    for number in range(4):
        put(mount.store, f"{number}", "die")
    assert mount.compact() == {"failed": 3}
    assert mount.scheduler.state == "stopped: the engine failed 3 times in a row"
    assert {mount.verdict(f"{number}") for number in range(4)} == {("pending", None)}
    for number in range(4):
        put(mount.store, f"{number}", "refuse")
    mount.scheduler.resume()
    mount.work()
    assert {mount.verdict(f"{number}") for number in range(4)} == {("refused", "quality")}


def test_the_same_photograph_asked_for_again_and_again_does_not_stop_compaction(
    begin_anew: BeginAnew, expect_log: ExpectLog
) -> None:
    expect_log(ENGINE_ENDED)
    mount = begin_anew()
    put(mount.store, "deadly", "die")
    for _ in range(3):
        assert mount.compact("deadly") == {"failed": 1}
    assert mount.scheduler.state == "off"


def test_files_that_the_engine_never_sees_do_not_hide_that_it_fails(
    begin_anew: BeginAnew, expect_log: ExpectLog
) -> None:
    expect_log(ENGINE_ENDED + "|compaction of .* stops")
    mount = begin_anew()
    for number in range(3):
        put(mount.store, f"{number}.bmp", "die")
        (Path(mount.store.path) / f"{number}.txt").write_text("no picture")
        mount.work()
    assert mount.scheduler.state == "stopped: the engine failed 3 times in a row"


def test_verdicts_of_before_are_no_reason_to_stop(
    begin_anew: BeginAnew, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    expect_log("compaction of .* stops")
    monkeypatch.setattr(scheduler_module, "_REFUSALS_IN_A_ROW", 3)
    mount = begin_anew()
    for number in range(2):
        put(mount.store, f"{number}", "refuse")
    for _ in range(3):
        assert mount.compact() == {"refused": 2}
    assert mount.scheduler.state == "off"
    put(mount.store, "3", "refuse")
    assert mount.compact()["refused"] >= 1
    assert mount.scheduler.state.startswith("stopped: the gate refused 3 pictures")


# ---- photographs whose name can't be given to a blob


@pytest.fixture
def engine_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a path each time that the engine is asked for a blob, which it makes of ORIGINAL."""
    blob = container.unpack(blob_bytes(store))
    runs: list[str] = []

    def ask(workshop: Workshop, original: object, claim: object, policy: object) -> Outcome:
        runs.append("run")
        return Outcome(verdict=Verdict.COMPACTED, avif=blob.avif, recipe=blob.recipe_bytes)

    monkeypatch.setattr(compact_module, "_ask_engine", ask)
    return runs


@pytest.fixture
def archive(store: Store) -> Path:
    folder = Path(store.path) / "archive"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(ORIGINAL)
    return folder


@contextlib.contextmanager
def write_protected(folder: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
        return
    with immutable(folder):  # root may write to all other folders
        yield


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            linux.set_immutable(descriptor, True)
        except OSError as error:
            pytest.skip(f"nothing can be made immutable here: {error}")
        yield
        linux.set_immutable(descriptor, False)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def mounted_on(folder: Path, *how: str) -> Iterator[None]:
    if os.geteuid() != 0 or subprocess.run(["mount", *how, folder], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        (folder / "photo.jpg").write_bytes(ORIGINAL)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def no_exchange(folder: Path) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "exchange", refuse)
        yield


BLOCKED = {
    "write-protected": (write_protected, "its folder is write-protected", 0),
    "immutable": (lambda folder: immutable(folder / "photo.jpg"), "marked immutable", 0),
    "another disk": (lambda folder: mounted_on(folder, "-t", "tmpfs", "tmpfs"), "another filesystem", 0),
    "the same disk, mounted": (lambda folder: mounted_on(folder, "--bind", str(folder)), "another filesystem", 0),
    "only the exchange tells": (no_exchange, "can't be exchanged", 1),
}


@pytest.mark.parametrize("why", BLOCKED)
def test_a_photograph_whose_name_no_blob_can_get_costs_no_engine_and_is_told_once(  # noqa: PLR0917
    store: Store, catalog: Catalog, archive: Path, engine_runs: list[str], expect_log: ExpectLog,
    caplog: pytest.LogCaptureFixture, why: str,
) -> None:  # fmt: skip
    expect_log("not compacted: .*tried again now and then")
    block, said, runs = BLOCKED[why]
    scheduler = Scheduler(Workshop(store, cast(Engine, None), catalog, Claims(), lambda: True), 0.0)
    with block(archive):
        waits = []
        for turn in range(4):
            scheduler._next_walk = 0.0
            for _ in range(3):
                scheduler._step()
            waiting = scheduler._queue["archive/photo.jpg"]
            waits.append(waiting.wait)
            if turn == 1 and runs:
                continue  # the walk and the wait alone let it be
            waiting.due = 0.0
        assert waits == ([60.0, 120.0, 120.0, 240.0] if runs else [60.0, 120.0, 240.0, 480.0])
        assert len(engine_runs) == (3 if runs else 0)
        assert [record.getMessage() for record in caplog.records if said in record.getMessage()] == [
            record.getMessage() for record in caplog.records
        ]
        assert len(caplog.records) == 1
        known = explain(store, catalog, "archive/photo.jpg")
        assert known.state == "pending"
        assert said in (known.message or "")
        assert status.count(store, catalog).pending == 1
        assert scheduler.still_waiting(["archive/photo.jpg"]) == 0, "nobody waits a day for it"
        told: list[str] = []
        scheduler.compact_now(["archive/photo.jpg"], lambda done, *_: told.append(done.message) is None)
        assert said in told[0]


@pytest.mark.parametrize("why", ["write-protected", "immutable"])
def test_it_has_its_turn_when_its_folder_can_be_changed_again(  # noqa: PLR0917
    store: Store, catalog: Catalog, archive: Path, engine_runs: list[str], expect_log: ExpectLog, why: str
) -> None:
    expect_log("not compacted: .*tried again now and then")
    scheduler = Scheduler(Workshop(store, cast(Engine, None), catalog, Claims(), lambda: True), 0.0)
    with BLOCKED[why][0](archive):
        for _ in range(3):
            scheduler._step()
        assert scheduler.pending == 1
    scheduler._next_walk = 0.0
    for _ in range(3):
        scheduler._step()
    assert scheduler.counts["compacted"] == 1
    assert scheduler.pending == 0
    assert explain(store, catalog, "archive/photo.jpg").state == "blob"


def test_a_file_that_the_disk_does_not_open_waits_ever_longer(
    store: Store, catalog: Catalog, archive: Path, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    expect_log("not compacted")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN))

    monkeypatch.setattr(compact_module, "_compact_open", fail)
    scheduler = Scheduler(Workshop(store, cast(Engine, None), catalog, Claims(), lambda: True), 0.0)
    waits = []
    for _ in range(13):
        for _ in range(2):
            scheduler._step()
        waits.append(scheduler._queue["archive/photo.jpg"].wait)
        scheduler._queue["archive/photo.jpg"].due = 0.0
    assert waits[:3] == [60.0, 120.0, 240.0]
    assert waits[-1] == 86400.0
    assert scheduler.state == "off"
