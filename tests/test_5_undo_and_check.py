"""What an owner does with a store on a real mount: bring originals back, delete, pause, mount it twice, check it."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esrfs.control import ControlError
from esrfs.exit_codes import ExitCode
from tests.asking import Asking
from tests.witness import MODE, MTIME, QuickMounted, digest, paused_at, photo, put, wait_until

pytestmark = pytest.mark.mount


def esrfs(*arguments: str | Path, program: str = "tests.remembering_mount") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def in_days(days: int) -> str:
    return (datetime.date.today() + datetime.timedelta(days=days)).isoformat()


# ---- the undo window


def test_restore_brings_the_original_back_bit_for_bit(quick: QuickMounted) -> None:
    quick.start()
    put(quick.path / "photo.jpg", photo())
    assert quick.compact() == {"compacted": 1}
    # What was done to the file since stays: restoring is about content.
    (quick.path / "photo.jpg").chmod(0o604)
    os.utime(quick.path / "photo.jpg", ns=(MTIME, MTIME + 5))
    assert quick.explain("photo.jpg")["undo_until"] == in_days(30)
    status = quick.status()
    assert (status["undo_files"], status["undo_bytes"], status["freed_by"]) == (1, len(photo()), in_days(30))
    done = esrfs("restore", quick.path / "photo.jpg")
    assert done.returncode == 0, done.stderr
    assert (quick.path / "photo.jpg").read_bytes() == (quick.store / "photo.jpg").read_bytes() == photo()
    st = (quick.path / "photo.jpg").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_mtime_ns) == (0o604, MTIME + 5)
    assert os.getxattr(quick.path / "photo.jpg", "user.note") == b"mine"
    assert quick.explain("photo.jpg")["state"] == "original"
    assert quick.compact("") == {"original": 1}, "what was brought back is left alone"
    assert quick.compact("photo.jpg") == {"compacted": 1}, "until somebody names it"
    assert quick.look("photo.jpg", photo()) == "blob"
    quick.assert_recovered()


def test_what_can_not_be_brought_back_stays_as_it_is(quick: QuickMounted) -> None:
    quick.start()
    put(quick.path / "photo.jpg", photo())
    (quick.path / "notes").write_text("notes")
    quick.compact()
    with open(quick.path / "photo.jpg", "rb"):
        answer = quick.call("restore", paths=["photo.jpg", "notes"])["files"]
    assert [(one["path"], one["state"]) for one in answer] == [("photo.jpg", "failed"), ("notes", "failed")]
    assert "in use" in answer[0]["message"]
    for path in quick.reserved("originals").iterdir():
        path.unlink()
    wait_until(lambda: quick.status()["open_handles"] == 0)
    answer = quick.call("restore", paths=["photo.jpg"])["files"]
    assert "left the undo window" in answer[0]["message"]
    assert quick.look("photo.jpg", photo()) == "blob"


def test_a_photograph_that_changes_while_it_is_brought_back_stays_changed(quick: QuickMounted, tmp_path: Path) -> None:
    """Behind the mount: replaced or deleted between the look and the exchange."""
    flag = tmp_path / "flag"
    quick.start(faults=f"plain.intended=pause:{flag}")
    for name in ("replaced.jpg", "deleted.jpg"):
        put(quick.path / name, photo())
    quick.compact()
    restoring = Asking(lambda: quick.call("restore", paths=["replaced.jpg"])["files"])
    with paused_at(flag):
        (quick.store / "new").write_bytes(b"newer")
        (quick.store / "new").rename(quick.store / "replaced.jpg")
    restoring.result()
    assert (quick.store / "replaced.jpg").read_bytes() == b"newer"
    restoring = Asking(lambda: quick.call("restore", paths=["deleted.jpg"])["files"])
    with paused_at(flag):
        (quick.store / "deleted.jpg").unlink()
    restoring.result()
    assert not (quick.store / "deleted.jpg").exists()
    quick.assert_recovered()


@pytest.mark.parametrize("how", ["unlink", "rename over", "unlink behind the mount, then read what took its place"])
def test_deleting_a_photograph_drops_its_cached_view(quick: QuickMounted, how: str) -> None:
    quick.start()
    put(quick.path / "photo.jpg", photo())
    quick.compact()
    (quick.path / "photo.jpg").read_bytes()
    assert quick.call("cache-show")["views"] == 1
    match how:
        case "unlink":
            (quick.path / "photo.jpg").unlink()
            assert quick.call("cache-show")["views"] == 0
        case "rename over":
            (quick.path / "other").write_bytes(b"other")
            (quick.path / "other").rename(quick.path / "photo.jpg")
            assert quick.call("cache-show")["views"] == 0
        case _:
            (quick.store / "photo.jpg").unlink()
            put(quick.store / "photo.jpg", photo(1))
            assert (quick.path / "photo.jpg").read_bytes() == photo(1)
    assert quick.kept() == [photo()], "its original stays for its time"


def test_a_view_that_is_open_survives_its_deletion(quick: QuickMounted) -> None:
    quick.start()
    put(quick.path / "photo.jpg", photo())
    quick.compact()
    with open(quick.path / "photo.jpg", "rb", buffering=0) as file:
        (quick.path / "photo.jpg").unlink()
        shown = file.read()
        assert len(shown) == len(photo())
        assert (quick.path / "photo.jpg").exists() is False
        file.seek(0)
        assert file.read() == shown


# ---- pause and resume


def test_pause_stops_compaction_at_once_and_resume_goes_on(quick: QuickMounted, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    quick.start("quiet=0.2", faults=f"engine.compact=pause:{flag}")
    put(quick.path / "photo.jpg", photo())
    with paused_at(flag):
        begun = time.monotonic()
        assert esrfs("pause", quick.path).returncode == 0
        assert quick.status()["compaction"] == "paused"
        assert time.monotonic() - begun < 10
    time.sleep(1.5)
    assert quick.look("photo.jpg", photo()) == "original"
    with pytest.raises(ControlError, match="paused"):
        quick.compact()
    assert not flag.exists()
    quick.stop()
    quick.start("quiet=0.2")
    assert quick.status()["compaction"] == "paused", "also after a remount"
    assert esrfs("resume", quick.store).returncode == 0
    wait_until(lambda: quick.explain("photo.jpg")["state"] == "blob")
    assert quick.look("photo.jpg", photo()) == "blob"


# ---- two mounts of one store


@pytest.fixture
def second(quick: QuickMounted, tmp_path: Path) -> Iterator[QuickMounted]:
    """Another mount of the same store, with state and cache of its own, as on another machine; not mounted yet."""
    other = QuickMounted.__new__(QuickMounted)
    other.store, other.path, other.log_path = quick.store, tmp_path / "second", tmp_path / "second.log"
    other.config, other.process, other.expected = quick.config, None, []
    other.path.mkdir()
    yield other
    other.clean_up()


def test_two_mounts_of_one_store(quick: QuickMounted, second: QuickMounted) -> None:
    quick.start()
    second.start()
    assert quick.status()["compaction"] == "running"
    assert second.status()["compaction"] == "off: another mount compacts this store"
    put(quick.path / "photo.jpg", photo())
    put(quick.path / "held.jpg", photo(1))
    assert (second.path / "photo.jpg").read_bytes() == photo()
    with open(second.path / "held.jpg", "rb", buffering=0) as held:
        assert held.read(1000) == photo(1)[:1000]
        with pytest.raises(ControlError, match="another mount compacts"):
            second.compact()
        assert quick.compact() == {"compacted": 2}, "a reader elsewhere is no obstacle"
        # Who has the original open goes on with it.
        held.seek(0)
        assert held.read() == photo(1)
    time.sleep(1.1)
    for mount in (quick, second):
        assert mount.look("photo.jpg", photo()) == "blob"
        assert mount.look("held.jpg", photo(1)) == "blob"
        assert stat.S_IMODE((mount.path / "photo.jpg").stat().st_mode) == MODE
    assert (second.path / "photo.jpg").read_bytes() == (quick.path / "photo.jpg").read_bytes()
    # A writer at the other mount keeps this one's compactor away.
    put(second.path / "written.jpg", photo(2))
    with open(second.path / "written.jpg", "r+b", buffering=0) as writer:
        assert quick.compact("written.jpg") == {"left": 1}
        writer.write(photo(2)[:10])
    wait_until(lambda: not second.is_open("written.jpg"))
    assert quick.compact("written.jpg") == {"compacted": 1}
    # One goes, the other takes over when it looks next.
    quick.stop()
    assert second.look("written.jpg", photo(2)) == "blob"


def test_a_write_at_one_mount_while_the_other_compacts(
    quick: QuickMounted, second: QuickMounted, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    quick.start(faults=f"swap.checked=pause:{flag}")
    second.start()
    put(quick.path / "photo.jpg", photo())
    wait_until(lambda: not quick.is_open("photo.jpg"))
    compacting = Asking(quick.compact)
    with paused_at(flag):

        def write() -> None:
            with open(second.path / "photo.jpg", "r+b", buffering=0) as file:
                file.write(b"my own bytes")

        writing = Asking(write)
        writing.join(0.3)
        assert writing.is_alive(), "the lease holds it"
        os.listdir(second.path)
    writing.result(5)
    assert compacting.result(5) == {"left": 1}
    time.sleep(1.1)
    for mount in (quick, second):
        assert mount.look("photo.jpg", b"my own bytes" + photo()[12:]) == "original"


def test_the_second_mount_takes_over_when_the_first_is_killed(quick: QuickMounted, second: QuickMounted) -> None:
    quick.start(faults="swap.exchanged=kill")
    put(quick.path / "photo.jpg", photo())
    quick.compact_until_death()
    second.start()  # it recovers what the other left behind
    assert second.status()["compaction"] == "running"
    assert second.look("photo.jpg", photo()) == "blob"
    assert second.kept() == [photo()]
    second.assert_recovered()


# ---- check


def check(store: Path) -> tuple[int, dict[str, set[str]]]:
    """Exit code and, for each problem, the paths that have it. With the real engine."""
    done = esrfs("check", "--deep", "--json", store, program="esrfs.cli.main")
    report = json.loads(done.stdout)
    found: dict[str, set[str]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["problem"], set()).add(finding["path"])
    return done.returncode, found


def test_check_says_sound_or_what_is_damaged(quick: QuickMounted) -> None:
    quick.start()
    for name in ("a.jpg", "b.jpg"):
        put(quick.path / name, photo())
    put(quick.path / "soft.jpg", photo(2))
    (quick.path / "notes").write_text("notes")
    assert quick.compact()["compacted"] == 3
    assert quick.explain("soft.jpg")["network"] == "lite-x2"
    assert check(quick.path) == (ExitCode.OK, {}), "while it is mounted"
    quick.stop()
    saved = quick.store.with_name("saved")
    shutil.copytree(quick.store, saved, symlinks=True)

    blob = bytearray((quick.store / "a.jpg").read_bytes())
    blob[len(blob) // 3] ^= 1
    st = (quick.store / "a.jpg").stat()
    with open(quick.store / "a.jpg", "r+b") as file:
        file.write(blob)
    os.utime(quick.store / "a.jpg", ns=(st.st_atime_ns, st.st_mtime_ns))
    gone = next(quick.reserved("originals").iterdir())
    gone.unlink()
    code, found = check(quick.store)
    assert code == ExitCode.DAMAGE
    assert found == {"blob_damaged": {"a.jpg"}, "original_missing": {f".esrfs/originals/{gone.name}"}}

    for network in (saved / ".esrfs" / "networks").iterdir():
        network.unlink()
    code, found = check(saved)
    assert code == ExitCode.OK, "the very same files come with esrfs"
    assert found.keys() == {"network_elsewhere"}


def test_a_flipped_byte_is_never_shown(quick: QuickMounted) -> None:
    """Wherever it is in the blob: the size may be known, but no wrong pixel is served, and restoring mends it."""
    quick.expected += ["could not be rebuilt", "its blob is damaged"]
    quick.start()
    put(quick.path / "photo.jpg", photo())
    quick.compact()
    view = (quick.path / "photo.jpg").read_bytes()
    good = (quick.store / "photo.jpg").read_bytes()
    step = len(good) // 16
    for offset in range(step // 2, len(good), step):
        quick.call("cache-clear")
        blob = bytearray(good)
        blob[offset] ^= 0x10
        (quick.store / "new").write_bytes(blob)
        (quick.store / "new").rename(quick.store / "photo.jpg")
        try:
            shown = (quick.path / "photo.jpg").read_bytes()
        except OSError:
            continue
        assert shown in (view, bytes(blob)), offset  # a damaged footer: it is the AVIF that it is
    (quick.store / "new").write_bytes(good)
    (quick.store / "new").rename(quick.store / "photo.jpg")
    assert digest((quick.path / "photo.jpg").read_bytes()) == digest(view)
