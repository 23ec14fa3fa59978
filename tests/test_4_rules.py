"""Rules and lossless blobs on a real mount."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounting import Mounted

pytestmark = pytest.mark.mount


def rules(mount: Mounted, text: str) -> None:
    (mount.store / ".esrfs" / "rules").write_text(text)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_lossless_blobs_come_back_bit_for_bit(mounted: Mounted, photographs: Path) -> None:
    names = ("coffee.jpg", "camera.jpg", "progressive.jpg", "coffee.png")
    for name in names:
        shutil.copy(photographs / name, mounted.path)
    rules(mounted, "*.jpg lossless\n*.png never\n")
    assert mounted.compact() == {"compacted": 3, "refused": 1}
    assert mounted.explain("coffee.png")["reason"] == "never"
    calls = mounted.status()["engine_calls"]
    for name in names[:3]:
        source, view = (photographs / name).read_bytes(), mounted.path / name
        known = mounted.explain(name)
        assert (known["state"], known["preset"], known["format"]) == ("blob", "lossless", "jpeg")
        assert known["sha256_view"] == known["sha256_original"] == hashlib.sha256(source).hexdigest()
        assert (mounted.store / name).stat().st_size < 0.95 * len(source)
        with view.open("rb", buffering=0) as file:
            assert file.read(128) == source[:128]
        assert mounted.status()["engine_calls"] == calls  # the head comes from the recipe
        assert view.read_bytes() == source
        calls += 1
        assert mounted.status()["engine_calls"] == calls
    with (mounted.path / "coffee.jpg").open("r+b") as file:
        file.seek(0, 2)
        file.write(b"more")
    assert (mounted.store / "coffee.jpg").read_bytes() == (photographs / "coffee.jpg").read_bytes() + b"more"


def test_changed_rules_hold_without_a_remount(unmounted: Mounted, photographs: Path) -> None:
    rules(unmounted, "kept/ never\n")
    folder = unmounted.store / "kept"
    folder.mkdir()
    shutil.copy(photographs / "coffee.jpg", folder)
    unmounted.start("quiet=0")
    wait_until(lambda: unmounted.explain("kept/coffee.jpg")["reason"] == "never")
    unmounted.expected.append("compaction of .* waits: .*line 1")
    rules(unmounted, "kept/ what\n")
    wait_until(lambda: "line 1" in unmounted.status()["compaction"])
    assert unmounted.explain("kept/coffee.jpg")["state"] == "refused"
    rules(unmounted, "# nothing\n")
    wait_until(lambda: unmounted.explain("kept/coffee.jpg")["state"] == "blob")
    assert unmounted.explain("kept/coffee.jpg")["preset"] == "balanced"
