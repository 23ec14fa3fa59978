"""Nothing is lost, on real mounts: processes are killed and disks fail or fill at every step, and each file stays sound
(see ``witness``). What other programs do at each step is in ``test_5_races``.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from esrfs.control import ControlError
from esrfs.store import plain, recovery, swap
from tests.asking import Asking
from tests.witness import MODE, MTIME, QuickMounted, digest, paused_at, photo, put, wait_until

pytestmark = pytest.mark.mount

COMPACTION_POINTS = ("compact.read", "compact.packed", *swap.FAULT_POINTS)
COMES_AFTER_THE_EXCHANGE = frozenset(swap.FAULT_POINTS[swap.FAULT_POINTS.index("swap.exchanged") :])


T = TypeVar("T")


def mostly_slow(cases: Iterable[T], always: Collection[T]) -> list[object]:
    """All cases; those that are not in ``always`` run with `make test-slow` only."""
    listed = list(cases)
    assert set(always) <= set(listed)
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in always else pytest.mark.slow)
        for case in listed
    ]


def has_its_metadata(path: Path) -> bool:
    st = path.stat()
    found = (stat.S_IMODE(st.st_mode), st.st_mtime_ns, os.getxattr(path, "user.note"))
    return found == (MODE, MTIME, b"mine")


# ---- the mount is killed


@pytest.mark.parametrize("point", COMPACTION_POINTS)
def test_the_mount_is_killed_while_it_compacts(quick: QuickMounted, point: str) -> None:
    quick.start(faults=f"{point}=kill")
    put(quick.path / "photo.jpg", photo())
    (quick.path / "other.jpg").write_bytes(photo(1))
    quick.compact_until_death("photo.jpg")
    quick.restart()
    state = quick.look("photo.jpg", photo())
    assert state == ("blob" if point in COMES_AFTER_THE_EXCHANGE else "original")
    assert (quick.path / "photo.jpg").stat().st_size == len(photo())
    assert has_its_metadata(quick.path / "photo.jpg")
    assert quick.look("other.jpg", photo(1)) == "original"
    assert quick.kept() == ([photo()] if state == "blob" else [])
    assert quick.found() == []
    quick.assert_recovered()
    assert quick.compact()["compacted"] == (1 if state == "blob" else 2), "work goes on after a crash"
    assert quick.look("photo.jpg", photo()) == "blob"


@pytest.mark.parametrize(
    "point", mostly_slow(swap.FAULT_POINTS, ["swap.intended", "swap.exchanged", "swap.directories_synced"])
)
def test_the_mount_is_killed_while_it_compacts_without_exchange(quick: QuickMounted, point: str) -> None:
    """In a store where only esrfs writes (`init --exclusive`) the original is linked, then the blob renamed over it."""
    toml = quick.reserved("store.toml")
    text = toml.read_text().replace("\nexchange = true", "\nexchange = false")
    toml.write_text(text.replace("\nexclusive = false", "\nexclusive = true"))
    quick.start(faults=f"{point}=kill")
    put(quick.path / "photo.jpg", photo())
    quick.compact_until_death("photo.jpg")
    quick.restart()
    renamed = swap.FAULT_POINTS.index(point) >= swap.FAULT_POINTS.index("swap.directories_synced")
    assert quick.look("photo.jpg", photo()) == ("blob" if renamed else "original")
    assert has_its_metadata(quick.path / "photo.jpg")
    assert (quick.path / "photo.jpg").stat().st_nlink == 1
    assert quick.kept() == ([photo()] if renamed else [])
    quick.assert_recovered()
    quick.compact()
    assert quick.look("photo.jpg", photo()) == "blob"


TO_PLAIN_POINTS = [
    (point, links)
    for links in (1, 2)
    for point in plain.FAULT_POINTS
    if point != ("plain.in_place" if links == 1 else "plain.exchanged")
]


@pytest.mark.parametrize(
    ("point", "links"),
    mostly_slow(
        [*TO_PLAIN_POINTS, ("plain.in_place.chunk", 2)],
        [
            ("plain.synced", 1),
            ("plain.exchanged", 1),
            ("plain.discarded", 1),
            ("plain.intended", 2),
            ("plain.looked", 2),
        ],
    ),
)
def test_the_mount_is_killed_while_a_program_writes_to_a_view(quick: QuickMounted, point: str, links: int) -> None:
    """With two names the blob is overwritten in place, which a crash cuts in half; recovery completes it."""
    quick.start()
    in_half = point == "plain.in_place.chunk"
    original = photo().ljust(3 << 19, b"\0") if in_half else photo()  # chunks have 1 MiB
    quick.expected += ["a file that nothing explains was kept"] if in_half else []
    put(quick.path / "photo.jpg", original)
    assert quick.compact()["compacted"] == 1
    view = (quick.path / "photo.jpg").read_bytes()
    if links == 2:
        os.link(quick.path / "photo.jpg", quick.path / "again.jpg")
    quick.stop()
    quick.start(faults=f"{point}=kill")
    with pytest.raises(OSError), open(quick.path / "photo.jpg", "r+b", buffering=0) as file:
        file.write(b"my own bytes")
    quick.wait_for_death()
    quick.restart()
    names = ["photo.jpg", "again.jpg"][:links]
    for name in names:
        assert (quick.path / name).read_bytes() == view, name
        assert has_its_metadata(quick.path / name)
        assert quick.look(name, original, view) in ("blob", "original")
    # What was half overwritten is kept too, since it might be something else after all.
    assert len(quick.found()) == (1 if in_half else 0)
    quick.assert_recovered()
    (quick.path / "photo.jpg").write_bytes(b"and now really")
    assert [(quick.path / name).read_bytes() for name in names] == [b"and now really"] * links


RECOVERY_POINTS = [
    (step, point)
    for step in ("swap.exchanged", "plain.exchanged", "swap.verified")
    for point in recovery.FAULT_POINTS
    if not (step == "swap.verified" and "step" in point)  # then no step is pending
]


@pytest.mark.parametrize(
    ("step", "point"),
    mostly_slow(RECOVERY_POINTS, [*[one for one in RECOVERY_POINTS if one[0] == "swap.exchanged"], RECOVERY_POINTS[6]]),
)
def test_recovery_itself_is_killed(quick: QuickMounted, step: str, point: str) -> None:
    put(quick.start(faults=f"{step}=kill" if step.startswith("swap") else "").path / "photo.jpg", photo())
    wanted = [photo()]
    if step.startswith("swap"):
        quick.compact_until_death()
    else:
        quick.compact()
        wanted.append((quick.path / "photo.jpg").read_bytes())
        quick.stop()
        quick.start(faults=f"{step}=kill")
        with pytest.raises(OSError):
            os.truncate(quick.path / "photo.jpg", 5)
        quick.wait_for_death()
    with pytest.raises(AssertionError, match="did not start"):
        quick.restart(faults=f"{point}=kill")
    quick.restart()
    quick.look("photo.jpg", *wanted)
    assert has_its_metadata(quick.path / "photo.jpg")
    assert quick.found() == []
    quick.assert_recovered()


def test_the_mount_is_killed_while_it_caches_a_view(quick: QuickMounted) -> None:
    quick.start(faults="cache.put=kill")
    put(quick.path / "photo.jpg", photo())
    quick.compact()
    with pytest.raises(OSError):
        (quick.path / "photo.jpg").read_bytes()
    quick.wait_for_death()
    quick.restart()
    assert quick.look("photo.jpg", photo()) == "blob"
    quick.assert_recovered()


def test_the_mount_is_killed_while_originals_leave_the_window(quick: QuickMounted) -> None:
    """The ledger is told before an original goes; should it be there still, it goes the next time."""
    quick.start()
    put(quick.path / "photo.jpg", photo())
    quick.compact()
    quick.stop()
    toml = quick.reserved("store.toml")
    toml.write_text(toml.read_text().replace("undo_days = 30", "undo_days = 0"))
    with pytest.raises(AssertionError, match="did not start"):
        quick.restart(faults="purge.recorded=kill")
        quick.wait_for_death(10)
        raise AssertionError("did not start")  # it may have answered before it died
    assert quick.kept() == [photo()]
    quick.restart()
    wait_until(lambda: quick.kept() == [])
    assert quick.look("photo.jpg", photo()) == "blob"
    quick.assert_recovered()


# ---- the engine is killed

ENGINE_ENDED = r"the engine ended \(it was ended by signal 9\)"


def kill_engine(mount: QuickMounted, flag: Path) -> None:
    """Kill the engine where it waits at a fault point, and nowhere else."""
    wait_until(flag.exists)
    (pid,) = mount.engine_pids()
    os.kill(pid, signal.SIGSTOP)
    flag.unlink()
    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def compacted(quick: QuickMounted) -> QuickMounted:
    """A store in which ``photo.jpg`` is compacted; not mounted, and no view is cached."""
    quick.start()
    put(quick.path / "photo.jpg", photo())
    assert quick.compact()["compacted"] == 1
    quick.stop()
    return quick


def test_the_engine_is_killed_while_it_rebuilds(compacted: QuickMounted, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    compacted.expected.append(ENGINE_ENDED)
    compacted.start(faults=f"engine.rebuild=pause:{flag}")
    reading = Asking((compacted.path / "photo.jpg").read_bytes)
    kill_engine(compacted, flag)
    with paused_at(flag):
        pass
    assert digest(reading.result()) == compacted.explain("photo.jpg")["sha256_view"]
    status = compacted.status()
    assert (status["engine_restarts"], status["engine_failures"], status["engine_calls"]) == (1, 0, 1)


def test_the_engine_is_killed_twice_while_it_rebuilds(compacted: QuickMounted, tmp_path: Path) -> None:
    """EIO, never a short or zero-filled file; nothing of it is cached, and the next read tries again."""
    flag = tmp_path / "flag"
    compacted.expected += [ENGINE_ENDED, "could not be rebuilt"]
    compacted.start(faults=f"engine.rebuild=pause:{flag}")
    empty = compacted.call("cache-show")
    with open(compacted.path / "photo.jpg", "rb", buffering=0) as file:
        reading = Asking(lambda: os.pread(file.fileno(), 1 << 20, 0))
        for _ in range(2):
            kill_engine(compacted, flag)
        with pytest.raises(OSError) as failure:
            reading.result()
        assert failure.value.errno == errno.EIO
        assert compacted.call("cache-show")["views"] == empty["views"] == 0
        again = Asking(lambda: os.pread(file.fileno(), 1 << 20, 0))
        with paused_at(flag):
            pass
        assert digest(again.result()) == compacted.explain("photo.jpg")["sha256_view"]


def test_the_engine_is_killed_while_it_compacts(quick: QuickMounted, tmp_path: Path) -> None:
    """Once: it is tried again. Twice: the file stays, and compaction goes on with others, until it is asked for."""
    flag = tmp_path / "flag"
    quick.expected += [ENGINE_ENDED, "not compacted, the engine failed"]
    quick.start(faults=f"engine.compact=pause:{flag}")
    put(quick.path / "a.jpg", photo())
    compacting = Asking(quick.compact)
    kill_engine(quick, flag)
    with paused_at(flag):
        pass
    assert compacting.result() == {"compacted": 1}
    put(quick.path / "b.jpg", photo(1))
    put(quick.path / "c.jpg", photo(2))
    compacting = Asking(lambda: quick.compact("b.jpg", "c.jpg"))
    for _ in range(2):
        kill_engine(quick, flag)
    with paused_at(flag):
        pass
    assert compacting.result() == {"failed": 1, "compacted": 1}
    assert quick.look("b.jpg", photo(1)) == "original"
    assert quick.explain("b.jpg")["reason"] == "engine_ended"
    assert quick.look("c.jpg", photo(2)) == "blob"
    assert quick.status()["compaction"] == "running"
    assert quick.compact() == {"blob": 2, "refused": 1}
    compacting = Asking(lambda: quick.compact("b.jpg"))
    with paused_at(flag):
        pass
    assert compacting.result() == {"compacted": 1}
    assert quick.look("b.jpg", photo(1)) == "blob"
    assert has_its_metadata(quick.path / "b.jpg")
    quick.assert_recovered()


def test_the_mount_is_killed_with_the_engine_while_it_compacts(quick: QuickMounted, tmp_path: Path) -> None:
    """As when a unit has used up its memory, and is started again: not for ever with the same photograph."""
    flag = tmp_path / "flag"
    quick.expected += ["esrfs ended while this was compacted", "a dead mount of esrfs is there"]
    put(quick.store / "deadly.jpg", photo())
    for _ in range(2):
        quick.start(faults=f"engine.compact=pause:{flag}")
        compacting = Asking(quick.compact)
        wait_until(flag.exists)
        quick.kill()
        flag.unlink()
        with pytest.raises((ControlError, ConnectionError)):
            compacting.result()
    quick.start()
    put(quick.path / "other.jpg", photo(1))
    assert quick.compact() == {"refused": 1, "compacted": 1}
    assert quick.explain("deadly.jpg")["reason"] == "engine_ended"
    assert quick.look("deadly.jpg", photo()) == "original"
    assert quick.compact("deadly.jpg") == {"compacted": 1}
    quick.assert_recovered()


def test_an_engine_that_always_fails_stops_compaction(quick: QuickMounted) -> None:
    quick.expected += [ENGINE_ENDED, "not compacted, the engine failed", "compaction of .* stops"]
    quick.start(faults="engine.compact=kill")
    for number in range(4):
        put(quick.path / f"{number}.jpg", photo())
    assert quick.compact() == {"failed": 3}
    assert quick.status()["compaction"] == "stopped: the engine failed 3 times in a row"
    assert all((quick.path / f"{number}.jpg").read_bytes() == photo() for number in range(4))
    quick.stop()
    quick.start()
    assert quick.compact() == {"compacted": 4}


# ---- disks fail, and fill up

BEFORE_THE_EXCHANGE = ("swap.written", "swap.synced", "swap.intended", "swap.checked")
AFTER_THE_EXCHANGE = ("swap.exchanged", "swap.looked", "swap.directories_synced", "swap.kept", "swap.kept_synced")
STOPS = {
    "ENOSPC": "stopped: no space is left for blobs",
    "EDQUOT": "stopped: no space is left for blobs",
    "EIO": "stopped: the store's disk failed: Input/output error",
}
NOT_COMPACTED = r"not compacted|compaction of .* stops|undo window could not"


@pytest.mark.parametrize(
    ("point", "error"),
    mostly_slow(
        [(point, error) for point in (*BEFORE_THE_EXCHANGE, *AFTER_THE_EXCHANGE) for error in STOPS],
        [("swap.written", "EDQUOT"), ("swap.intended", "ENOSPC"), ("swap.exchanged", "EIO"), ("swap.kept", "ENOSPC")],
    ),
)
def test_the_store_s_disk_fails_while_it_compacts(quick: QuickMounted, point: str, error: str) -> None:
    """The original has its name (again), the state says what is the matter, and `resume` goes on once it is mended."""
    quick.expected.append(NOT_COMPACTED)
    quick.start(faults=f"{point}=errno:{error}")
    put(quick.path / "photo.jpg", photo())
    assert quick.compact() == {"failed": 1}
    assert quick.look("photo.jpg", photo()) == "original"
    assert has_its_metadata(quick.path / "photo.jpg")
    assert quick.status()["compaction"].startswith(STOPS[error])
    assert (quick.kept(), quick.found()) == ([], [])
    quick.assert_recovered()
    quick.call("resume")
    assert quick.status()["compaction"] == "running"
    quick.stop()
    quick.start()
    assert quick.compact() == {"compacted": 1}
    assert quick.look("photo.jpg", photo()) == "blob"


@pytest.mark.parametrize(
    ("point", "error"),
    mostly_slow(
        [(point, error) for point in plain.FAULT_POINTS[:5] for error in ("ENOSPC", "EDQUOT", "EIO")],
        [("plain.written", "EDQUOT"), ("plain.intended", "ENOSPC"), ("plain.exchanged", "EIO")],
    ),
)
def test_the_store_s_disk_fails_while_a_program_writes_to_a_view(
    compacted: QuickMounted, point: str, error: str
) -> None:
    """The program is told, and the blob is as it was."""
    compacted.start(faults=f"{point}=errno:{error}")
    with open(compacted.path / "photo.jpg", "r+b", buffering=0) as file:
        for _ in range(2):
            with pytest.raises(OSError) as failure:
                file.write(b"my own bytes")
            assert failure.value.errno == getattr(errno, error)
    assert compacted.look("photo.jpg", photo()) == "blob"
    assert has_its_metadata(compacted.path / "photo.jpg")
    compacted.assert_recovered()


@pytest.mark.parametrize(
    ("point", "error"),
    mostly_slow(
        [(point, error) for point in ("ledger.append", "ledger.fsync") for error in ("ENOSPC", "EIO")],
        [("ledger.append", "ENOSPC"), ("ledger.fsync", "EIO")],
    ),
)
def test_the_ledger_fails(compacted: QuickMounted, point: str, error: str) -> None:
    """No step is taken that the ledger does not know: compaction is off; programs read, write plain files, delete."""
    put(compacted.store / "other.jpg", photo())
    compacted.expected.append("ledger|not compacted|compaction of .* stops|nothing is compacted")
    compacted.start(faults=f"{point}=errno:{error}")
    assert compacted.look("photo.jpg", photo()) == "blob"
    with pytest.raises(OSError) as failure, open(compacted.path / "photo.jpg", "r+b", buffering=0) as file:
        file.write(b"my own bytes")
    assert failure.value.errno == getattr(errno, error)
    assert compacted.look("photo.jpg", photo()) == "blob"
    (compacted.path / "new").write_bytes(b"new")
    (compacted.path / "new").unlink()
    assert compacted.status()["compaction"] != "running"
    assert compacted.look("other.jpg", photo()) == "original"
    compacted.stop()
    compacted.start()
    assert compacted.compact()["compacted"] == 1
    compacted.assert_recovered()


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_the_cache_s_disk_fails(compacted: QuickMounted, error: str) -> None:
    compacted.expected.append("view cache in .*: writing failed")
    compacted.start(faults=f"cache.put=errno:{error}")
    assert compacted.look("photo.jpg", photo()) == "blob"
    assert compacted.look("photo.jpg", photo()) == "blob"
    assert compacted.call("cache-show")["views"] == 0


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """Call with a directory and MiB: a filesystem of that size is mounted there. Skips where that is not allowed."""
    made: list[Path] = []

    def make(place: Path, mebibytes: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0700", "none", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("this user can't mount a tmpfs")
        made.append(place)

    yield make
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Fill a disk but for ``leave`` bytes; the file that does it."""
    ballast = place / "ballast"
    with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(1 << 16))
    if leave:
        os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


@pytest.fixture
def quick_on_small_disk(
    small_disk: Callable[[Path, int], None], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[QuickMounted]:
    """As ``quick``, with the store on a disk of 4 MiB."""
    small_disk(tmp_path / "store", 4)
    yield request.getfixturevalue("quick")
    request.getfixturevalue("quick").clean_up()


def test_the_store_s_disk_is_full(quick_on_small_disk: QuickMounted) -> None:
    mount = quick_on_small_disk
    mount.expected.append(NOT_COMPACTED)
    mount.start()
    put(mount.path / "photo.jpg", photo())
    put(mount.path / "other.jpg", photo(1))
    assert mount.compact("photo.jpg") == {"compacted": 1}
    ballast = fill(mount.store)
    # Writing: the program is told.
    with pytest.raises(OSError) as failure:
        shutil.copyfile(mount.store / "other.jpg", mount.path / "copy.jpg")
    assert failure.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as failure, open(mount.path / "photo.jpg", "r+b", buffering=0) as file:
        file.write(b"my own bytes")
    assert failure.value.errno == errno.ENOSPC
    assert mount.look("photo.jpg", photo()) == "blob"
    # Compaction: stops, and says so.
    assert mount.compact("other.jpg") == {"failed": 1}
    assert mount.status()["compaction"].startswith("stopped: ")
    assert "full" in mount.status()["compaction"] or "space" in mount.status()["compaction"]
    assert mount.look("other.jpg", photo(1)) == "original"
    # Deleting helps, and so does `resume` then.
    (mount.path / "copy.jpg").unlink(missing_ok=True)
    (mount.path / ballast.name).unlink()
    mount.call("resume")
    assert mount.compact("other.jpg") == {"compacted": 1}
    assert mount.look("other.jpg", photo(1)) == "blob"
    mount.assert_recovered()


def test_a_full_disk_mounts(quick_on_small_disk: QuickMounted) -> None:
    """What is there can be read and deleted, even if not one record fits the ledger."""
    mount = quick_on_small_disk
    mount.expected.append(NOT_COMPACTED + "|nothing is compacted|ledger")
    mount.start()
    put(mount.path / "photo.jpg", photo())
    mount.compact()
    mount.stop()
    ballast = fill(mount.store)
    mount.start()
    assert mount.look("photo.jpg", photo()) == "blob"
    assert mount.status()["compaction"] != "running"
    (mount.path / ballast.name).unlink()
    (mount.path / "new.jpg").write_bytes(photo(1))
    assert mount.look("new.jpg", photo(1)) == "original"
    mount.stop()
    mount.start()
    assert mount.compact("new.jpg") == {"compacted": 1}


def test_a_full_disk_is_recovered_later(quick_on_small_disk: QuickMounted) -> None:
    """A crash, and no room for the ledger's record of how it ended: what is under the name is sound all the while."""
    mount = quick_on_small_disk
    mount.expected.append(NOT_COMPACTED + "|nothing is compacted|ledger|unfinished step")
    mount.start(faults="swap.exchanged=kill")
    put(mount.path / "photo.jpg", photo())
    mount.compact_until_death()
    ballast = fill(mount.store)
    mount.restart()
    assert mount.look("photo.jpg", photo()) in ("blob", "original")
    mount.stop()
    ballast.unlink()
    mount.start()
    assert mount.look("photo.jpg", photo()) == "blob"
    assert mount.kept() == [photo()]
    mount.assert_recovered()


@pytest.mark.parametrize("floor", ["0", "2G"])
def test_the_cache_s_disk_is_full(compacted: QuickMounted, small_disk: Callable[[Path, int], None], floor: str) -> None:
    """Views come without being kept; the disk's other users lose nothing."""
    place = Path(os.environ["XDG_CACHE_HOME"])
    small_disk(place, 1)
    compacted.expected.append("view cache in")
    compacted.start(f"cache_floor={floor}")
    ballast = fill(place)
    size = ballast.stat().st_size
    assert compacted.look("photo.jpg", photo()) == "blob"
    assert compacted.look("photo.jpg", photo()) == "blob"
    assert ballast.stat().st_size == size
    assert compacted.stop() == 0
    compacted.start(f"cache_floor={floor}")
    assert compacted.look("photo.jpg", photo()) == "blob"
    assert compacted.stop() == 0
