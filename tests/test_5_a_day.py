"""A day in the life of a library: import, migration, compaction, viewers, edits, deletions, undo, and a power cut."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from esrfs_daemon import status
from PIL import Image

from esrfs.control import ControlError
from tests.test_4_daemon import configure, daemon
from tests.test_4_migrate import contents
from tests.witness import QuickMounted, digest, photo, put, wait_until

pytestmark = pytest.mark.mount


def name_of(number: int) -> str:
    return f"{100 + number // 50}CANON/IMG_{number:04}.jpg"


def import_card(card: Path, count: int) -> dict[str, bytes]:
    written = {}
    for number in range(count):
        path = card / name_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, photo(number % 3), mtime_ns=1_600_000_000_000_000_000 + number * 10**9)
        written[name_of(number)] = photo(number % 3)
    return written


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_day_of_200_photographs(quick: QuickMounted, tmp_path: Path) -> None:
    live_a_day(quick, tmp_path, 200)


def test_a_day_of_few_photographs(quick: QuickMounted, tmp_path: Path) -> None:
    live_a_day(quick, tmp_path, 12)


def live_a_day(quick: QuickMounted, tmp_path: Path, count: int) -> None:
    card = tmp_path / "card"
    card.mkdir()
    quick.start()
    library = quick.path / "library"
    process = daemon(configure(tmp_path, card, library))
    try:
        wait_until(lambda: status.ask() is not None)
        written = import_card(card, count)
        with contextlib.suppress(ControlError):
            wait_until((library / name_of(0)).exists)
            quick.compact("library")  # while files still come
        wait_until(lambda: contents(card) == {}, 120)
        wait_until(lambda: (status.ask() or {"rules": [{"state": ""}]})["rules"][0]["state"] == "idle")
        for name in written:
            quick.look(f"library/{name}", *[written[name]])
        quick.compact("library")
        small = [name for name in written if quick.explain(f"library/{name}")["state"] == "blob"]
        assert len(small) > count // 2

        views = {name: (library / name).read_bytes() for name in small[:20]}
        for name, view in views.items():
            with Image.open(io.BytesIO(view)) as picture:
                picture.load()
                assert picture.size == (320, 240)
            assert len(view) == len(written[name])

        edited, rotated, restored, *deleted = small[0], small[1], small[2], small[3], small[4]
        if shutil.which("exiftool"):
            command = ["exiftool", "-q", "-overwrite_original", "-ImageDescription=A caption", str(library / edited)]
            subprocess.run(command, check=True, timeout=60)
            shown = subprocess.run(
                ["exiftool", "-s3", "-ImageDescription", str(library / edited)], capture_output=True, check=True
            )
            assert shown.stdout == b"A caption\n"
        with Image.open(library / rotated) as picture:
            turned = io.BytesIO()
            picture.transpose(Image.Transpose.ROTATE_90).save(turned, "JPEG", quality=95)
        (library / rotated).write_bytes(turned.getvalue())
        for name in deleted:
            (library / name).unlink()
        assert quick.call("restore", paths=[f"library/{restored}"])["files"][0]["state"] == "restored"
        assert (library / restored).read_bytes() == written[restored]
        after_edits = {name: (library / name).read_bytes() for name in (edited, rotated, restored)}
        descriptor = os.open(library / rotated, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

        # More comes from the card, and in the middle of it everything dies.
        put(card / "late.jpg", photo(1))
        wait_until(lambda: not (card / "late.jpg").exists() or any(library.glob(".esrfs-*")))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    quick.kill()
    quick.restart()
    process = daemon(configure(tmp_path, card, library))
    try:
        wait_until(lambda: status.ask() is not None)
        wait_until(lambda: contents(card) == {}, 60)
        time.sleep(0.5)
        expected = {*written, "late.jpg"} - set(deleted)
        assert set(contents(library)) == expected
        for name in expected - after_edits.keys() - {"late.jpg"}:
            state = quick.look(f"library/{name}", written[name])
            if name in views:
                assert (library / name).read_bytes() == views[name]
            assert state == ("blob" if name in small else "original")
        for name, content in after_edits.items():
            assert (library / name).read_bytes() == content
        assert (library / "late.jpg").read_bytes() == photo(1)
        kept = {digest(content) for content in quick.kept()}
        assert {digest(written[name]) for name in small} <= kept | {digest(written[restored])}
    finally:
        process.terminate()
        _out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    quick.assert_recovered()
