"""Figures for Prometheus, from a real mount."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from esrfs import prometheus
from esrfs.exit_codes import ExitCode
from esrfs.mount import figures
from tests.mounting import Mounted
from tests.witness import QuickMounted, photo, put, wait_until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((prometheus.LOOPBACK, 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> dict[str, float]:
    """Samples by name, with their labels in braces as in the text."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def wait_for(port: int) -> dict[str, float]:
    def answers() -> bool:
        try:
            return "esrfs_store_files{state=blob}" in scrape(port)
        except urllib.error.URLError:
            return False

    wait_until(answers)
    return scrape(port)


@pytest.mark.mount
def test_a_mount_tells_its_figures(quick: QuickMounted) -> None:
    put(quick.store / "a.jpg", photo(2))
    (quick.store / "notes.txt").write_text("no photograph")
    port = free_port()
    quick.start(f"metrics={port}")
    assert quick.compact()["compacted"] == 1, quick.log()
    quick.call("cache-clear")
    for _ in range(2):
        assert len((quick.path / "a.jpg").read_bytes()) == len(photo(2))
    with open(quick.path / "notes.txt", "rb"):
        found = wait_for(port)
    documented = (Path(__file__).resolve().parent.parent / "docs" / "operations.md").read_text()
    for name in found:
        bare = re.sub(r"(_bucket|_count|_sum)?(\{.*)?$", "", name)
        assert bare in documented or bare.startswith("process_"), name
    about = next(name for name in found if name.startswith("esrfs_mount_info{"))
    assert f"mountpoint={quick.path}" in about
    assert quick.config.id in about
    assert found["esrfs_store_files{state=blob}"] == 1
    assert found["esrfs_store_files{state=passed_through}"] == 1
    assert found["esrfs_store_view_bytes"] == len(photo(2)) + len("no photograph")
    assert 0 < found["esrfs_store_stored_bytes"] < found["esrfs_store_view_bytes"]
    assert (found["esrfs_undo_files"], found["esrfs_undo_bytes"]) == (1, len(photo(2)))
    assert found["esrfs_store_counted_timestamp_seconds"] == pytest.approx(time.time(), abs=60)
    assert found["esrfs_store_free_bytes"] > 0
    assert found["esrfs_compactions_total{to=compacted}"] == 1
    assert found["esrfs_compaction_running"] == 1
    assert found["esrfs_open_handles"] >= 1
    assert (found["esrfs_waiting_reads"], found["esrfs_waiting_reads_limit"]) == (0, 768)
    assert found["esrfs_cache_misses_total"] >= 1
    assert found["esrfs_cache_bytes"] <= found["esrfs_cache_limit_bytes"]
    assert found["esrfs_engine_failures_total"] == 0
    assert found["esrfs_reconstruction_seconds_count"] == found["esrfs_reconstruction_seconds_bucket{le=+Inf}"]
    assert found["esrfs_reconstructions_total"] >= 1
    assert found["process_resident_memory_bytes"] > 1 << 20


@pytest.mark.mount
def test_an_address_that_is_taken_costs_the_figures_only(unmounted: Mounted) -> None:
    unmounted.expected.append("metrics can't be served at 127.0.0.1 port")
    with socket.socket() as taken:
        taken.bind((prometheus.LOOPBACK, 0))
        taken.listen()
        unmounted.start(f"metrics={taken.getsockname()[1]}")
        (unmounted.path / "file").write_text("text")
        wait_until(lambda: "metrics can't be served" in unmounted.log())
    assert unmounted.stop() == 0


@pytest.mark.mount
def test_a_wrong_address_is_told_before_anything_is_mounted(unmounted: Mounted) -> None:
    command = [sys.executable, "-m", "esrfs.cli.main", "mount", str(unmounted.store), str(unmounted.path)]
    result = subprocess.run(
        [*command, "-o", "metrics=example:80"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == ExitCode.USAGE
    assert "'example:80' is no address for metrics" in result.stderr


def test_the_daemon_tells_its_figures(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    configuration = tmp_path / "daemon.toml"
    configuration.write_text(f'[[rules]]\nname = "camera"\nsource = "{source}"\ndestination = "{tmp_path}/nowhere"\n')
    port = free_port()
    command = [sys.executable, "-m", "esrfs_daemon.main", "--config", str(configuration), "--metrics", str(port)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        found: dict[str, float] = {}

        def has_walked() -> bool:
            with contextlib.suppress(urllib.error.URLError):
                found.update(scrape(port))
            return found.get(f"esrfs_daemon_working{labels}") == 0

        labels = f"{{rule=camera,source={source}}}"
        wait_until(has_walked)
        documented = (Path(__file__).resolve().parent.parent / "docs" / "operations.md").read_text()
        for name in found:
            assert name.partition("{")[0] in documented or name.startswith("process_"), name
        assert found[f"esrfs_daemon_migrated_files_total{labels}"] == 0
    finally:
        process.terminate()
        assert process.wait(30) == 0, (tmp_path / "log").read_text()


def test_the_daemon_refuses_a_wrong_address() -> None:
    command = [sys.executable, "-m", "esrfs_daemon.main", "--metrics", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == ExitCode.USAGE
    assert "is no address for metrics" in result.stderr


def test_addresses() -> None:
    assert prometheus.parse_address("9420") == ("127.0.0.1", 9420)
    assert prometheus.parse_address("0.0.0.0:9420") == ("0.0.0.0", 9420)
    assert prometheus.parse_address("[::1]:9420") == ("::1", 9420)
    for wrong in ("", "0", "65536", "localhost:1", "::1:9420", "1.2.3:80", "1.2.3.400:80", "[::g]:80", "127.0.0.1"):
        with pytest.raises(ValueError, match="is no address for metrics"):
            prometheus.parse_address(wrong)


def test_a_mount_that_is_not_asked_imports_nothing_for_it() -> None:
    script = "import sys, esrfs.mount.lifecycle; print({'prometheus_client', 'http.server'} & set(sys.modules) or '')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_the_store_is_counted_seldom_and_never_by_a_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def count() -> None:
        begun.append(1)
        if len(begun) == 2:
            raise OSError("the disk fails")
        time.sleep(0.05)

    contents = figures.Contents(count)
    started = time.monotonic()
    assert contents.latest() is None
    assert contents.latest() is None
    assert time.monotonic() - started < 0.05
    wait_until(lambda: not contents._counting)
    assert len(begun) == 1
    contents.latest()
    assert len(begun) == 1, "what was counted a moment ago is not counted again"
    assert contents._due > time.monotonic() + figures._COUNT_SECONDS / 2
    contents._due = 0.0
    contents.latest()
    wait_until(lambda: len(begun) == 2 and not contents._counting)
    assert contents._due > time.monotonic()


@pytest.mark.parametrize("what", ["no thread", "a bug"])
def test_a_count_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    done = []

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    contents = figures.Contents(lambda: done.append(1))  # type: ignore[arg-type, return-value]
    with monkeypatch.context() as patch:
        if what == "no thread":
            patch.setattr(threading.Thread, "start", fail)
        else:
            patch.setattr(threading, "excepthook", lambda end: None)
            patch.setattr(contents, "_count", fail)
        contents.latest()
        wait_until(lambda: not contents._counting)
    contents._due = 0.0
    contents.latest()
    wait_until(lambda: done)
