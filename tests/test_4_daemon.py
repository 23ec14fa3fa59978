"""``esrfs-daemon`` on a real mount: what it takes when, what it waits for, and what it tells."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import watchdog.observers
from esrfs_daemon import asking, config, status, throttle, walk, watch
from esrfs_daemon import service as service_module
from esrfs_daemon.journal import Journal
from esrfs_daemon.service import Service

from esrfs.store import linux
from esrfs.store.initialise import init
from tests.mounting import Mounted
from tests.small_disk import small_disk
from tests.test_4_migrate import ODD_NAMES, contents, odd_tree, write
from tests.witness import wait_until

pytestmark = [
    pytest.mark.mount,
    # watchdog's books may name a folder twice when folders are renamed while it looks at them. As an error, its warning
    # would end the thread that reads events, as in no real daemon.
    pytest.mark.filterwarnings("ignore:Callback with id:RuntimeWarning"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


def settings(source: Path, to: Path, *, limits: dict[str, Any] | None = None, **rule: Any) -> config.Config:
    between = rule.pop("reconcile_seconds", 3600.0)
    one = config.Rule(source=str(source), destination=str(to), **{"quiet": 0.3, "poll_seconds": 1.0, **rule})
    gentle = config.Throttle(**{"min_free": 0, "on_battery": True, "idle_io": False, **(limits or {})})
    return config.Config(rules=[one], throttle=gentle, reconcile_seconds=between)


@contextlib.contextmanager
def running(what: config.Config) -> Iterator[Service]:
    """The daemon's work, in a thread of this process."""
    service = Service(what)
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(30)
        assert not thread.is_alive()


def rule_of(service: Service) -> status.RuleStatus:
    return service.status.snapshot().rules[0]


def wait_for(service: Service, what: Callable[[status.RuleStatus], object], seconds: float = 30.0) -> None:
    try:
        wait_until(lambda: what(rule_of(service)), seconds)
    except AssertionError:
        raise AssertionError(f"still {rule_of(service)}") from None


def test_files_that_are_there_and_files_that_come(mounted: Mounted, source: Path) -> None:
    write(source / "old" / "a.jpg")
    to = mounted.path / "in"
    with running(settings(source, to, then="delete")) as service:
        wait_until(lambda: contents(to) == {"old/a.jpg": b"content"})
        wait_for(service, lambda rule: rule.reconciles == 1 and rule.state == "idle")
        assert rule_of(service).watch == "events"
        for name in ODD_NAMES:
            write(source / "new \udcff" / name, os.fsencode(name))
        write(source / "elsewhere.tmp", b"renamed when it is whole")
        os.rename(source / "elsewhere.tmp", source / "whole.jpg")
        wait_for(service, lambda rule: rule.migrated_files == 2 + len(ODD_NAMES))
        (source / "empty").mkdir()
        wait_until((to / "empty").exists)
        assert rule_of(service).reconciles == 1, "events told, not a walk"
        assert rule_of(service).touched_files == 2 + len(ODD_NAMES)
    assert contents(source) == {}
    assert len(contents(to)) == 2 + len(ODD_NAMES)


def test_a_slow_writer_is_waited_for(mounted: Mounted, source: Path) -> None:
    """1 KB/s; with the file open all the time, and opened for each piece."""
    to = mounted.path / "in"
    with running(settings(source, to, quiet=0.5)):
        with open(source / "open.mov", "wb", buffering=0) as slow:
            for _ in range(20):
                slow.write(b"x" * 100)
                with open(source / "pieces.mov", "ab") as pieces:
                    pieces.write(b"y" * 100)
                time.sleep(0.1)
                assert not (to / "open.mov").exists()
                assert not (to / "pieces.mov").exists()
            time.sleep(1.5)
            assert not (to / "open.mov").exists(), "quiet, but still open for writing"
        wait_until(lambda: contents(to) == {"open.mov": b"x" * 2000, "pieces.mov": b"y" * 2000})


def test_a_source_that_is_mirrored_stays_whatever_event_names_it(mounted: Mounted, source: Path) -> None:
    (source / "phone" / ".stfolder").mkdir(parents=True)
    with running(settings(source, mounted.path / "in", then="delete")) as service:
        wait_for(service, lambda rule: rule.reconciles == 1)
        write(source / "phone" / "DCIM" / "a.jpg")
        write(source / "b.jpg")
        wait_for(service, lambda rule: rule.migrated_files == 2)
        wait_for(service, lambda rule: rule.state == "idle")
    assert contents(source) == {"phone/DCIM/a.jpg": b"content"}


def test_what_is_in_a_trash_stays_there(mounted: Mounted, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole card or home as the source: its trash lies in it, and what was put there is seen to come there."""
    monkeypatch.setenv("XDG_DATA_HOME", str(source / ".local" / "share"))
    write(source / "a.jpg")
    write(source / ".Trash-1000" / "files" / "deleted.jpg")
    write(source / "Trash" / "a band.jpg")
    to = mounted.path / "in"
    with running(settings(source, to, then="trash", reconcile_seconds=1.0)) as service:
        wait_for(service, lambda rule: rule.migrated_files == 2)
        write(source / "b.jpg")
        wait_for(service, lambda rule: rule.migrated_files == 3)
        reconciled = rule_of(service).reconciles
        wait_for(service, lambda rule: rule.reconciles >= reconciled + 3)
        assert rule_of(service).migrated_files == 3
    assert contents(to).keys() == {"a.jpg", "Trash/a band.jpg", "b.jpg"}
    assert not (to / ".Trash-1000").exists()
    trash = source / ".local" / "share" / "Trash" / "files"
    assert contents(trash).keys() == {"a.jpg", "a band.jpg", "b.jpg"}


@pytest.fixture
def family(source: Path, can_mount: None) -> Iterator[Mounted]:
    """A store in the source, not mounted yet; its view will be in the source, too."""
    (source / "family").mkdir()
    mount = Mounted(source / "family")
    mount.log_path = source.with_name("family.log")
    try:
        yield mount
    finally:
        mount.clean_up()


def plain(store: Path) -> dict[str, bytes]:
    """What is in a store, but for esrfs' own."""
    return {path: data for path, data in contents(store).items() if not path.startswith(".esrfs/")}


@pytest.mark.parametrize("even_if_mirrored", [False, True])
def test_a_store_in_the_source_and_its_view_stay_whatever_event_names_them(  # noqa: PLR0917
    mounted: Mounted,
    source: Path,
    family: Mounted,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    even_if_mirrored: bool,
) -> None:
    """The photographs in a view may be rebuilt ones, and in a store they are blobs."""
    expect_log("a mounted esrfs")
    expect_log("a store of esrfs")
    write(family.store / "p.jpg")
    family.start()
    to = mounted.path / "in"
    with running(settings(source, to, then="delete", even_if_mirrored=even_if_mirrored)) as service:
        wait_for(service, lambda rule: rule.reconciles == 1 and rule.state == "idle")
        (family.path / "p.jpg").chmod(0o640)
        write(family.path / "new" / "q.jpg", b"saved in the view")
        write(family.store / ".esrfs" / "originals" / "kept", b"an original")
        write(family.store / "blob.jpg", b"as the compactor does")
        write(source / "family" / "beside.jpg")
        wait_for(service, lambda rule: rule.migrated_files and rule.waiting_files == 0 and rule.state == "idle")
        assert rule_of(service).migrated_files == 1
    assert contents(to) == {"family/beside.jpg": b"content"}
    assert plain(family.store) == {
        "p.jpg": b"content",
        "new/q.jpg": b"saved in the view",
        "blob.jpg": b"as the compactor does",
    }
    assert (family.store / ".esrfs" / "originals" / "kept").read_bytes() == b"an original"
    said = [record.getMessage() for record in caplog.records if "not migrated as asked" in record.getMessage()]
    assert len(said) == 2, said


def test_a_folder_that_becomes_a_store_while_its_files_settle(
    mounted: Mounted, source: Path, family: Mounted, expect_log: Callable[[str], None]
) -> None:
    """As by ``init --in-place`` and a mount: the names that events told of lead into the view by then."""
    expect_log("a mounted esrfs")
    expect_log("a store of esrfs")
    to = mounted.path / "in"
    with running(settings(source, to, then="delete", quiet=4.0)) as service:
        wait_for(service, lambda rule: rule.reconciles == 1 and rule.state == "idle")
        write(source / "old" / "p.jpg")
        wait_for(service, lambda rule: rule.waiting_files == 1)
        family.config = init(str(source / "old")).config
        family.store, family.path = source / ".old.esrfs", source / "old"
        os.rename(family.path, family.store)
        family.path.mkdir()
        family.start()
        write(source / "later.jpg")
        (source / "old" / "p.jpg").chmod(0o640)
        wait_for(service, lambda rule: rule.migrated_files and rule.waiting_files == 0 and rule.state == "idle")
        time.sleep(5.0)  # what looks changed after its time settles once more
        wait_for(service, lambda rule: rule.waiting_files == 0 and rule.state == "idle")
        assert rule_of(service).migrated_files == 1
    assert contents(to) == {"later.jpg": b"content"}
    assert plain(family.store) == {"p.jpg": b"content"}


def readers() -> list[Any]:
    """watchdog's threads that read events from the kernel."""
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "InotifyFD"]


def test_folders_that_exchange_their_names_do_not_end_the_daemon(mounted: Mounted, source: Path) -> None:
    """As ``init --in-place`` does it. watchdog's books are wrong from then on."""
    for name in ("one", "two", "three"):
        (source / name).mkdir()
        (source / f".{name}").mkdir()
    with running(settings(source, mounted.path / "in", then="delete")) as service:
        wait_for(service, lambda rule: rule.reconciles == 1 and rule.state == "idle")
        for name in ("one", "two", "three"):
            fd = os.open(source, os.O_RDONLY)
            linux.renameat2(fd, name, fd, f".{name}", linux.RENAME_EXCHANGE)
            os.close(fd)
        time.sleep(1.0)
        write(source / "later.jpg")
        wait_for(service, lambda rule: rule.migrated_files == 1 and rule.state == "idle")
        reading = readers()
    assert rule_of(service).state == "stopping"
    assert not [thread for thread in reading if thread.is_alive()]


def test_a_watch_whose_reader_has_ended_is_no_watch(
    mounted: Mounted, source: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("watching has ended unexpectedly")
    with running(settings(source, mounted.path / "in", reconcile_seconds=2.0)) as service:
        wait_for(service, lambda rule: rule.reconciles == 1 and rule.state == "idle")
        if not readers():
            pytest.skip("this watchdog reads its events in the thread that tells of them")
        readers()[0].stop()
        wait_for(service, lambda rule: rule.watch == "polling")
        write(source / "a.jpg")
        wait_for(service, lambda rule: rule.migrated_files == 1)


def test_a_view_in_the_source_that_hangs_does_not_hang_the_daemon(
    mounted: Mounted,
    source: Path,
    family: Mounted,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:
    for text in ("a mounted esrfs", "a store of esrfs", "does not answer"):
        expect_log(text)
    monkeypatch.setattr("esrfs_daemon.asking._ANSWER_SECONDS", 0.5)
    write(family.store / "p.jpg")
    write(source / "a.jpg")
    family.start()
    assert family.process is not None
    time.sleep(1.1)  # the kernel forgets what it knows of the view
    family.process.send_signal(signal.SIGSTOP)
    try:
        with running(settings(source, mounted.path / "in", then="delete")) as service:
            try:
                wait_for(service, lambda rule: rule.reconciles == 1 and rule.migrated_files == 1, 15)
                assert rule_of(service).watch == "polling"
                write(source / "b.jpg")
                wait_for(service, lambda rule: rule.migrated_files == 2, 15)
            finally:
                family.process.send_signal(signal.SIGCONT)
    finally:
        family.process.send_signal(signal.SIGCONT)
    assert plain(family.store) == {"p.jpg": b"content"}
    assert contents(mounted.path / "in") == {"a.jpg": b"content", "b.jpg": b"content"}


@pytest.mark.parametrize("where", ["at its start", "in the middle"])
@pytest.mark.parametrize("end", ["it answers", "the daemon ends"])
def test_a_source_that_hangs_stops_no_other(  # noqa: PLR0917
    mounted: Mounted,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
    where: str,
    end: str,
) -> None:
    """As a folder of a server that is away."""
    expect_log("answer")
    far = tmp_path / "far"
    write(far / "sub" / "far.jpg")
    write(source / "near.jpg")
    answer = threading.Event()

    def hanging(module: Any, name: str, when: Callable[..., bool]) -> None:
        really = getattr(module, name)

        def hangs(*arguments: Any, **named: Any) -> Any:
            if when(*arguments):
                answer.wait()
            return really(*arguments, **named)

        monkeypatch.setattr(module, name, hangs)

    hanging(os, "statvfs", lambda path: path == str(far))
    if where == "at its start":
        hanging(asking, "open_folder", lambda path: path == str(far))
    else:
        hanging(walk, "look", lambda _directory, name, *_: name == "far.jpg")
    monkeypatch.setattr(asking, "_ANSWER_SECONDS", 0.3)
    for name, seconds in {"_LOOK_SECONDS": 0.2, "_LAST_SECONDS": 0.2, "_RETRY_SECONDS": 0.3}.items():
        monkeypatch.setattr(service_module, name, seconds)
    to = mounted.path / "in"
    first = settings(far, to / "far", polling=True)
    both = msgspec.structs.replace(first, rules=[*first.rules, *settings(source, to / "near").rules])
    try:
        with running(both) as service:
            wait_until(lambda: contents(to / "near") == {"near.jpg": b"content"})
            wait_for(service, lambda rule: rule.state == "waiting" and "answer" in rule.reason)
            write(source / "later.jpg")
            wait_until(lambda: len(contents(to / "near")) == 2)
            if end == "it answers":
                answer.set()
                wait_until(lambda: contents(to / "far") == {"sub/far.jpg": b"content"})
                wait_for(service, lambda rule: rule.state == "idle" and not rule.reason)
        assert service.left_behind == (where == "in the middle" and end == "the daemon ends")
    finally:
        answer.set()
    for thread in threading.enumerate():
        if thread.name == "rule-0":
            thread.join()


def test_without_events_the_folder_is_walked(
    mounted: Mounted, source: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("max_user_watches is .* Raise it")

    def full(*_arguments: object, **_named: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(watchdog.observers.Observer, "schedule", full)
    with running(settings(source, mounted.path / "in")) as service:
        wait_for(service, lambda rule: rule.reconciles == 1)
        assert rule_of(service).watch == "polling"
        write(source / "a.jpg")
        wait_for(service, lambda rule: rule.migrated_files == 1)


def test_filesystems_without_events_are_polled(
    mounted: Mounted, source: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("lies on nfs4, where not all changes make events")
    monkeypatch.setattr(watch, "filesystem_type", lambda fd: "nfs4")
    with running(settings(source, mounted.path / "in")) as service:
        write(source / "a.jpg")
        wait_for(service, lambda rule: rule.migrated_files == 1 and rule.watch == "polling")


def test_lost_events_are_made_up_for(
    mounted: Mounted, source: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("queue overflowed")
    with running(settings(source, mounted.path / "in")) as service:
        wait_for(service, lambda rule: rule.reconciles == 1 and rule.state == "idle")
        monkeypatch.setattr(watch._Handler, "on_any_event", lambda self, event: None)  # nobody tells of it
        write(source / "a.jpg")
        time.sleep(1.0)
        assert rule_of(service).migrated_files == 0
        logging.getLogger("watchdog.observers.inotify_c").warning("Inotify queue overflowed; …")
        wait_for(service, lambda rule: rule.migrated_files == 1)


def test_it_waits_for_a_mount_and_never_fills_the_mountpoint(
    mounted: Mounted, source: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("not in a mounted esrfs")
    monkeypatch.setattr("esrfs_daemon.service._RETRY_SECONDS", 0.3)
    write(source / "a.jpg")
    assert mounted.stop() == 0
    with running(settings(source, mounted.path / "in", then="delete")) as service:
        wait_for(service, lambda rule: rule.state == "waiting" and "Mount the store first" in rule.reason)
        assert os.listdir(mounted.path) == []
        mounted.start()
        wait_for(service, lambda rule: rule.migrated_files == 1 and rule.state == "idle")
        assert mounted.stop() == 0, "an idle daemon does not keep a mount busy"
    assert contents(source) == {}
    assert (mounted.store / "in" / "a.jpg").exists()


def test_a_card_that_comes_goes_and_comes_again(
    mounted: Mounted, source: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("is not there")
    monkeypatch.setattr("esrfs_daemon.service._RETRY_SECONDS", 0.3)
    away = source.with_name("away")
    os.rename(source, away)
    with running(settings(source, mounted.path / "in")) as service:
        wait_for(service, lambda rule: rule.state == "waiting")
        for number in range(2):
            write(away / f"{number}.jpg")
            os.rename(away, source)
            service.reconcile()
            wait_for(service, lambda rule, number=number: rule.migrated_files == number + 1)
            os.rename(source, away)
            service.reconcile()
            wait_for(service, lambda rule: rule.state == "waiting")


def test_low_space_and_battery_pause_the_work(
    mounted: Mounted, source: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("stay free")
    monkeypatch.setattr("esrfs_daemon.service._RETRY_SECONDS", 0.3)
    monkeypatch.setattr(throttle, "_LOOK_SECONDS", 0.1)
    write(source / "a.jpg")
    with running(settings(source, mounted.path / "in", limits={"min_free": "900T"})) as service:
        wait_for(service, lambda rule: rule.state == "paused" and "stay free" in rule.reason)
    low = True
    battery = type("Battery", (), {"power_plugged": False})
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery if low else None, raising=False)
    with running(settings(source, mounted.path / "in", limits={"on_battery": False})) as service:
        wait_for(service, lambda rule: rule.state == "paused" and "battery" in rule.reason)
        assert contents(mounted.path) == {}
        low = False
        wait_for(service, lambda rule: rule.migrated_files == 1)


@pytest.mark.parametrize("full_at_the_start", [False, True])
def test_without_room_for_the_journal_it_waits_and_touches_nothing(  # noqa: PLR0917
    mounted: Mounted,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expect_log: Callable[[str], None],
    full_at_the_start: bool,
) -> None:
    expect_log("its disk is full")
    monkeypatch.setattr("esrfs_daemon.service._RETRY_SECONDS", 0.5)
    caplog.set_level(logging.INFO, "esrfs.daemon")
    tries = []
    make_room = Journal.make_room
    monkeypatch.setattr(Journal, "make_room", lambda self: (tries.append(time.monotonic()), make_room(self)))
    to = mounted.path / "in"
    before = {f"{number:03}.jpg": os.urandom(2000) for number in range(100)}
    with small_disk(tmp_path / "disk") as disk:
        journal = disk.path / "state" / "j.db"
        what = msgspec.structs.replace(settings(source, to, then="delete"), journal=str(journal))
        if full_at_the_start:
            disk.fill()
        with running(what) as service:
            if not full_at_the_start:
                write(source / "first.jpg")
                wait_for(service, lambda rule: rule.touched_files == 1 and rule.state == "idle")
                disk.fill()
            for name, content in before.items():
                write(source / name, content)
            wait_for(service, lambda rule: rule.state == "waiting")
            wait_until(lambda: len(tries) > 3)
            assert all(later - sooner > 0.4 for sooner, later in itertools.pairwise(tries))
            reason = rule_of(service).reason
            assert str(journal) in reason
            assert reason.endswith("Make room there; work goes on by itself")
            assert contents(source) == before
            disk.free()
            wait_for(service, lambda rule: rule.touched_files == 100 + (not full_at_the_start))
            wait_for(service, lambda rule: rule.state == "idle")
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(said) == 1, said
        assert any(record.getMessage().endswith("going on") for record in caplog.records)
        with contextlib.closing(Journal(journal)) as known:
            assert known.unfinished(str(source)) == []
    assert contents(source) == {}
    assert before.items() <= contents(to).items()


def test_once_ends_where_there_is_no_room_for_the_journal(mounted: Mounted, source: Path, tmp_path: Path) -> None:
    write(source / "a.jpg")
    what = configure(tmp_path, source, mounted.path / "in")
    with small_disk(tmp_path / "disk") as disk:
        what.write_text(f'journal = "{disk.path}/j.db"\n{what.read_text()}')
        disk.fill()
        command = [sys.executable, "-m", "esrfs_daemon.main", "--config", str(what), "--once"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "its disk is full" in done.stderr
    assert done.stderr.count("Make room there; give the command again") == 1
    assert "Traceback" not in done.stderr
    assert contents(source) == {"a.jpg": b"content"}


def test_problems_are_named_once(mounted: Mounted, source: Path, caplog: pytest.LogCaptureFixture, expect_log) -> None:
    expect_log("named pipe")
    os.mkfifo(source / "pipe")
    write(source / "download.part")
    with running(settings(source, mounted.path / "in", reconcile_seconds=1.0)) as service:
        wait_for(service, lambda rule: rule.reconciles >= 3 and rule.failed_files == 1)
    assert sum("named pipe" in record.getMessage() for record in caplog.records) == 1


def daemon(config_file: Path, *options: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "esrfs_daemon.main", "--config", str(config_file), *options]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> int:
    _out, err = process.communicate(timeout=60)
    sys.stderr.buffer.write(err)
    return process.returncode


def configure(tmp_path: Path, source: Path, to: Path, then: str = "delete", quiet: float = 0.3) -> Path:
    file = tmp_path / "daemon.toml"
    file.write_text(
        f'throttle = {{ min_free = 0, on_battery = true }}\n[[rules]]\nsource = "{source}"\ndestination = "{to}"\n'
        f'then = "{then}"\nquiet = {quiet}\n'
    )
    return file


def test_the_program(mounted: Mounted, source: Path, tmp_path: Path) -> None:
    odd_tree(source, files=10)
    before = contents(source)
    to = mounted.path / "in"
    file = configure(tmp_path, source, to)
    checked = daemon(file, "--check-config")
    assert checked.communicate(timeout=30)[0].decode().strip() == f"{source} → {to}, then delete"
    assert ended(daemon(file, "--once")) == 0
    assert (contents(to), contents(source)) == (before, {})
    process = daemon(file)
    try:
        wait_until(lambda: status.ask() is not None)
        assert ended(daemon(file)) == 7, "one daemon of a user"
        write(source / "new.jpg")
        wait_until(lambda: (status.ask() or {"rules": [{"migrated_files": 0}]})["rules"][0]["migrated_files"] == 1)
        asked = subprocess.run(
            [sys.executable, "-m", "esrfs_daemon.main", "--status"], capture_output=True, check=True, timeout=30
        )
        assert b'"migrated_files": 1' in asked.stdout
    finally:
        process.send_signal(signal.SIGTERM)
        _out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert b"WARNING" not in err
    gone = subprocess.run([sys.executable, "-m", "esrfs_daemon.main", "--status"], capture_output=True, check=False)
    assert gone.returncode == 4


def test_a_daemon_that_is_killed_goes_on_where_it_was(mounted: Mounted, source: Path, tmp_path: Path) -> None:
    for number in range(150):
        write(source / f"{number}.jpg", os.urandom(30_000))
    before = contents(source)
    file = configure(tmp_path, source, mounted.path / "in", quiet=0.0)
    process = daemon(file)
    wait_until(lambda: len(os.listdir(source)) < 150)
    process.kill()
    process.communicate()
    assert {**contents(source), **contents(mounted.path / "in")}.items() >= before.items()
    assert ended(daemon(file, "--once")) == 0
    assert (contents(mounted.path / "in"), contents(source)) == (before, {})


@pytest.mark.slow
def test_a_burst_of_10000_files_is_taken_whole_in_bounded_memory(
    mounted: Mounted, source: Path, tmp_path: Path
) -> None:
    file = configure(tmp_path, source, mounted.path / "in", then="keep")
    process = daemon(file)
    try:
        wait_until(lambda: status.ask() is not None)
        most = 0
        for number in range(10_000):
            (source / f"{number:05}.jpg").write_bytes(b"%d" % number * 500)
        running_process = psutil.Process(process.pid)
        deadline = time.monotonic() + 250
        while (found := status.ask()) and found["rules"][0]["migrated_files"] < 10_000:
            most = max(most, running_process.memory_info().rss)
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        assert most < 150 << 20
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert len(os.listdir(mounted.path / "in")) == 10_000
    print(f"at most {most >> 20} MiB; this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


def test_the_journal_of_the_configuration_is_used(mounted: Mounted, source: Path, tmp_path: Path) -> None:
    write(source / "a.jpg")
    what = settings(source, mounted.path / "in")
    service = Service(config.Config(rules=what.rules, throttle=what.throttle, journal=str(tmp_path / "own" / "j.db")))
    assert service.run_once()
    with contextlib.closing(Journal(tmp_path / "own" / "j.db")) as journal:
        row = journal.latest(str(source), "a.jpg", str(mounted.path / "in"))
    assert row is not None
    assert (row.state, row.verified_by, row.store) == ("done", "read back", mounted.config.id)
