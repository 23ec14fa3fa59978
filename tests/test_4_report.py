"""``esrfs report`` of a mounted store: its counters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esrfs.cli import main
from esrfs.exit_codes import ExitCode
from tests.conftest import photograph
from tests.mounting import Mounted

pytestmark = pytest.mark.mount


def test_waiting_and_cache_hits_are_in_the_report(mounted: Mounted, tmp_path: Path) -> None:
    path = mounted.path / "coffee.jpg"
    photograph("coffee").crop((0, 0, 256, 192)).save(path, quality=96)
    mounted.compact()
    assert mounted.status()["blobs"] == 1
    path.read_bytes()
    assert main.run(["esrfs", "report", str(mounted.path), "-o", str(tmp_path / "r")]) == ExitCode.OK
    values = json.loads((tmp_path / "r" / "report.json").read_text())["status"]
    assert values["mounted"]
    assert sum(values["engine_latency"]["counts"]) == values["engine_calls"] == 1
    assert values["engine_latency"]["seconds"] > 0
    mounted.stop()
    assert main.run(["esrfs", "report", str(mounted.store), "-o", str(tmp_path / "later")]) == ExitCode.OK
    later = json.loads((tmp_path / "later" / "report.json").read_text())["status"]
    assert later.keys() == values.keys(), "programs find the same, mounted or not"
    page = (tmp_path / "r" / "report.html").read_text()
    assert "From the first request for a picture to its last byte" in page
    assert "cache hit rate" in page
