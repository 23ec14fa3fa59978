"""``esrfs-daemon`` on a real mount: what it takes when, what it waits for, and what it tells."""

from __future__ import annotations

import contextlib
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

import psutil
import pytest
import watchdog.observers
from esrfs_daemon import config, status, throttle, watch
from esrfs_daemon.journal import Journal
from esrfs_daemon.service import Service

from tests.mounting import Mounted
from tests.test_4_migrate import ODD_NAMES, contents, odd_tree, write
from tests.witness import wait_until

pytestmark = pytest.mark.mount


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
