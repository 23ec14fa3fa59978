"""``esrfs status`` tells of the migration daemon, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from esrfs_daemon import config, status
from esrfs_daemon.status import RuleStatus, Status

from esrfs.cli import inspecting, main
from esrfs.store.initialise import init


@pytest.fixture
def store(tmp_path: Path) -> Path:
    init(str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Status]:
    """What answers as a running daemon does, with a rule for this mount and one for another."""
    rules = [
        RuleStatus(name="camera", source="/media/camera", destination=str(tmp_path / "mount" / "camera"), then="keep"),
        RuleStatus(name="other", source="/elsewhere", destination="/another/mount", then="keep"),
    ]
    told = Status(rules)
    server = status.serve(told, lambda: None)
    yield told
    server.stop()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main.run(["esrfs", "status", *arguments]) == 0
    return capsys.readouterr().out


def test_without_a_daemon(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\ndaemon " not in run(capsys, str(store))
    assert json.loads(run(capsys, "--json", str(store)))["daemon"] is None


def test_a_daemon_that_is_wanted_and_not_there(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config.default_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    assert "not running" in run(capsys, str(store))


def test_a_daemon_that_runs(store: Path, daemon: Status, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.add(0, migrated_files=2, migrated_bytes=3_000_000, failed_files=1)
    daemon.update(0, state="paused", reason="on battery", waiting_files=4)
    out = run(capsys, str(store))
    assert "/media/camera: paused (on battery), 4 waiting, 2 files moved (3 MB), 1 failed, see its log" in out
    told = json.loads(run(capsys, "--json", str(store)))["daemon"]
    assert told["rules"][0]["migrated_files"] == 2
    # Of a mount only what comes to it.
    rows = inspecting._daemon_rows(told, str(tmp_path / "mount"))
    assert [row[1].split(":")[0] for row in rows] == ["/media/camera"]
