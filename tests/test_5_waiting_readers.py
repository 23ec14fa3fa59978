"""Programs that wait for slow reconstructions stop nobody else, and every wait has an end."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import gallery as making
from tests.conftest import _exif, photograph
from tests.gallery import Gallery, GalleryMount, results, start_readers, vary

pytestmark = pytest.mark.mount

_READERS = 300
_PROMISED_SECONDS = 0.05
_SLOW = "engine.rebuild=sleep:600"
_NAME = "picture.jpg"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """A small photograph, compacted."""
    base = tmp_path_factory.mktemp("gallery")
    source = base / _NAME
    photograph("coffee").resize((320, 208)).save(source, quality=95, exif=_exif())
    return making.make_gallery(base, [source])


@pytest.fixture
def mount(tmp_path: Path, gallery: Gallery, can_mount: None) -> Iterator[GalleryMount]:
    """Not started yet."""
    made = GalleryMount(tmp_path, gallery)
    try:
        yield made
    finally:
        made.clean_up()


def fill(mount: GalleryMount, gallery: Gallery, count: int, folder: str = "cold") -> list[Path]:
    """Put ``count`` different blobs into the store; their paths in the mount."""
    (mount.store / folder).mkdir(exist_ok=True)
    for number in range(count):
        (mount.store / folder / f"{number}.jpg").write_bytes(vary(gallery, _NAME, number).blob)
    return [mount.path / folder / f"{number}.jpg" for number in range(count)]


def sha256(gallery: Gallery, number: int) -> str:
    return hashlib.sha256(vary(gallery, _NAME, number).view).hexdigest()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait until ``condition`` holds; the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, "it did not come to pass"
        time.sleep(0.02)
    return time.monotonic() - start


def is_mounted(path: Path) -> bool:
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def end(readers: subprocess.Popen[str]) -> None:
    readers.kill()
    readers.wait(30)
    assert readers.stdout is not None
    readers.stdout.close()


@pytest.mark.slow
def test_300_waiting_readers_stop_nobody_and_sigterm_ends_them(mount: GalleryMount, gallery: Gallery) -> None:
    """sshfs and rclone stand still when as many reads wait as there are threads (10 in libfuse); a path lock of
    libfuse's high-level API blocks rename and unlink as soon as one read waits."""
    paths = fill(mount, gallery, _READERS + 8)
    plain = mount.store / "cold" / "plain.txt"
    plain.write_text("plain\n")
    mount.start(faults=_SLOW)
    readers = start_readers(paths[:_READERS])
    until(lambda: mount.status()["open_handles"] >= _READERS)
    time.sleep(1)
    spare = iter(paths[_READERS:])
    names = iter(range(100))

    def rename_parent() -> None:
        mount.path.joinpath("cold").rename(mount.path / "moved")
        mount.path.joinpath("moved").rename(mount.path / "cold")

    def rename_waited_for() -> None:
        name = paths[0]
        name.rename(f"{name}.moved")
        Path(f"{name}.moved").rename(name)

    def unlink_waited_for() -> None:
        paths[100 + next(names)].unlink()

    def create() -> None:
        with open(mount.path / "cold" / f"new {next(names)}", "wb") as file:
            file.write(b"new")

    def stat_cold() -> None:
        start = 10 * next(names)  # others each time: for a second the kernel answers by itself
        for path in paths[start : start + 10]:
            path.stat()

    jobs: dict[str, Callable[[], object]] = {
        "stat of 10 cold files": stat_cold,
        "ls of the folder": lambda: os.listdir(mount.path / "cold"),
        "cat of a plain file": (mount.path / "cold" / "plain.txt").read_bytes,
        "head of a cold file": lambda: os.close(os.open(paths[5], os.O_RDONLY)),
        "create": create,
        "rename of the parent and back": rename_parent,
        "rename of a file that is waited for and back": rename_waited_for,
        "unlink of a cold file": lambda: next(spare).unlink(),
        "unlink of a file that is waited for": unlink_waited_for,
    }
    try:
        times = {what: best_of(3, job) for what, job in jobs.items()}
        listing = ["ls", "-l", str(mount.path / "cold")]
        times["ls -l of 300 cold files, a process"] = best_of(
            3, lambda: subprocess.run(listing, check=True, capture_output=True)
        )
        for what, seconds in times.items():
            print(f"{what}: {seconds * 1000:.1f} ms")
        # A process that lists 300 names is measured against the same on the store, which is what the machine can do.
        native = best_of(3, lambda: subprocess.run([*listing[:2], str(mount.store)], check=True, capture_output=True))
        assert times.pop("ls -l of 300 cold files, a process") < 2 * _PROMISED_SECONDS + native
        assert not {what: seconds for what, seconds in times.items() if seconds >= _PROMISED_SECONDS}
        assert readers.poll() is None, "they still wait"

        start = time.monotonic()
        code = mount.stop()
        took = time.monotonic() - start
        print(f"SIGTERM with {_READERS} waiting readers: {took:.1f} s")
        assert code == 0
        assert took < 30
        assert not is_mounted(mount.path)
        outcome = results(readers)
        assert set(outcome.values()) <= {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}
    finally:
        end(readers)
    # The mountpoint can be used again, and everything is as it was.
    mount.start()
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() == sha256(gallery, 0)


def best_of(times: int, job: Callable[[], object]) -> float:
    """Seconds. The machine may be busy with something else for a moment."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        job()
        best = min(best, time.perf_counter() - start)
    return best


def test_more_readers_than_may_wait_fail_and_the_rest_goes_on(mount: GalleryMount, gallery: Gallery) -> None:
    paths = fill(mount, gallery, 40)
    mount.expected.append("reads wait for reconstructions already")
    mount.start("threads=32", faults=_SLOW)
    readers = start_readers(paths)
    try:
        until(lambda: mount.log().count("reads wait for reconstructions already") == 40 - 24)
        assert len(os.listdir(mount.path / "cold")) == 40
    finally:
        end(readers)


def test_many_readers_of_one_file_are_one_call(mount: GalleryMount, gallery: Gallery) -> None:
    (path,) = fill(mount, gallery, 1)
    mount.start(faults="engine.rebuild=sleep:2")
    readers = [start_readers([path] * 25), start_readers([path] * 25)]
    for each in readers:
        assert results(each) == {path: sha256(gallery, 0)}
    status = mount.status()
    assert status["engine_calls"] == 1
    assert (status["cache_hits"], status["engine_failures"], status["engine_inexact"]) == (0, 0, 0)


@pytest.mark.parametrize("how", ["read", "mmap"])
def test_a_killed_reader_is_gone_at_once_and_its_job_is_cancelled(
    mount: GalleryMount, gallery: Gallery, how: str
) -> None:
    """The kernel keeps a killed process until its read is answered: without a look at the caller, Ctrl-C would take as
    long as the time limit."""
    paths = fill(mount, gallery, 2)
    mount.start(faults="engine.rebuild=sleep:4")
    reader = start_readers(paths[:1]) if how == "read" else _mapping(paths[0])
    try:
        until(lambda: mount.status()["engine_calls"] == 1)
        reader.kill()
        took = until(lambda: reader.poll() is not None, 4)
        print(f"a reader ({how}) that was killed is gone after {took:.2f} s")
        assert took < 2
        until(lambda: mount.status()["open_handles"] == 0, 4)
    finally:
        end(reader)
    assert hashlib.sha256(paths[1].read_bytes()).hexdigest() == sha256(gallery, 1)
    until(lambda: mount.status()["engine_state"] == "idle")
    assert mount.call("cache-show")["views"] == 1
    assert mount.status()["engine_failures"] == 0


def test_one_of_two_readers_is_killed_and_the_other_gets_its_view(mount: GalleryMount, gallery: Gallery) -> None:
    (path,) = fill(mount, gallery, 1)
    mount.start(faults="engine.rebuild=sleep:3")
    killed, waiting = start_readers([path]), start_readers([path])
    until(lambda: mount.status()["engine_calls"] == 1)
    end(killed)
    assert results(waiting) == {path: sha256(gallery, 0)}
    assert mount.status()["engine_calls"] == 1


def test_two_processes_wait_at_one_descriptor_and_one_is_killed(mount: GalleryMount, gallery: Gallery) -> None:
    """A descriptor that was inherited: the mount sees one handle."""
    (path,) = fill(mount, gallery, 1)
    mount.start(faults="engine.rebuild=sleep:3")
    program = (
        "import hashlib, os, sys, time\n"
        "descriptor = os.open(sys.argv[1], os.O_RDONLY)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.pread(descriptor, 1 << 20, 0)\n"
        "    os._exit(0)\n"
        "time.sleep(1)\n"
        "os.kill(child, 9)\n"
        "data = b''\n"
        "while part := os.pread(descriptor, 1 << 20, len(data)):\n"
        "    data += part\n"
        "os.waitpid(child, 0)\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == sha256(gallery, 0)


def _mapping(path: Path) -> subprocess.Popen[str]:
    """A process that reads ``path`` through mmap, and waits in a page fault."""
    program = (  # a private mapping: shared ones of direct reads need libfuse 3.17
        "import mmap, sys\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)\n"
        "    print('open', flush=True)\n"
        "    print(len(bytes(pages)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "open"
    return process


def test_the_time_limit_ends_a_wait_and_the_log_says_why(mount: GalleryMount, gallery: Gallery) -> None:
    paths = fill(mount, gallery, 1)
    mount.expected += [r"cold/0\.jpg: not rebuilt within 3 s", "the engine reported nothing", "engine ended"]
    mount.start("time_limit=3", faults="engine.rebuild=sleep:8")
    start = time.monotonic()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        paths[0].read_bytes()
    took = time.monotonic() - start
    assert 2.9 <= took < 8
    assert "cold/0.jpg: not rebuilt within 3 s; the read fails with EIO" in mount.log()
    # What the recipe alone tells is served all the same.
    with open(paths[0], "rb", buffering=0) as file:
        assert file.read(500) == vary(gallery, _NAME, 0).view[:500]


def test_a_picture_that_takes_longer_than_anybody_waits_is_there_at_a_later_try(
    mount: GalleryMount, gallery: Gallery
) -> None:
    """Else a large photograph could never be read on a small computer."""
    paths = fill(mount, gallery, 1)
    mount.expected += [r"cold/0\.jpg: not rebuilt within 3 s"]
    mount.start("time_limit=3", faults="engine.rebuild=sleep:4.5")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        paths[0].read_bytes()
    until(lambda: mount.call("cache-show")["views"] == 1)
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() == sha256(gallery, 0)
    status = mount.status()
    assert (status["engine_calls"], status["engine_restarts"]) == (1, 0)


def test_a_failing_engine_is_tried_twice_and_then_the_read_fails(mount: GalleryMount, gallery: Gallery) -> None:
    paths = fill(mount, gallery, 1)
    mount.expected += [r"cold/0\.jpg: could not be rebuilt \(the engine ended twice", r"the engine ended \("]
    mount.start(faults="engine.rebuild=kill")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        paths[0].read_bytes()
    status = mount.status()
    assert (status["engine_calls"], status["engine_restarts"], status["engine_failures"]) == (1, 2, 1)
    assert mount.call("cache-show")["views"] == 0, "a failure is never cached"
    mount.stop()
    mount.start()
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() == sha256(gallery, 0)


def test_an_engine_that_is_killed_is_started_again_and_the_read_succeeds(mount: GalleryMount, gallery: Gallery) -> None:
    paths = fill(mount, gallery, 3)
    mount.expected.append(r"the engine ended \(it was ended by signal 9\) with \d jobs")
    mount.start(faults="engine.rebuild=sleep:1.5")
    readers = start_readers(paths)
    until(lambda: mount.status()["engine_calls"] >= 1)
    for pid in mount.engine_pids():
        os.kill(pid, signal.SIGKILL)
    assert results(readers) == {path: sha256(gallery, number) for number, path in enumerate(paths)}
    assert mount.status()["engine_restarts"] == 1


def test_sigterm_lets_a_read_finish_that_is_nearly_through(mount: GalleryMount, gallery: Gallery) -> None:
    paths = fill(mount, gallery, 1)
    mount.start(faults="engine.rebuild=sleep:2")
    readers = start_readers(paths)
    until(lambda: mount.status()["engine_calls"] == 1)
    assert mount.stop() == 0
    assert results(readers) == {paths[0]: sha256(gallery, 0)}
    assert not is_mounted(mount.path)


def test_umount_says_busy_and_a_lazy_one_lets_readers_finish(mount: GalleryMount, gallery: Gallery) -> None:
    paths = fill(mount, gallery, 1)
    mount.start(faults="engine.rebuild=sleep:3")
    readers = start_readers(paths)
    until(lambda: mount.status()["engine_calls"] == 1)
    busy = subprocess.run(["umount", str(mount.path)], capture_output=True, text=True, check=False)
    assert busy.returncode != 0
    assert "busy" in busy.stderr
    assert is_mounted(mount.path)
    subprocess.run(["umount", "-l", str(mount.path)], check=True)
    assert not is_mounted(mount.path)
    assert results(readers) == {paths[0]: sha256(gallery, 0)}
    assert mount.process is not None
    assert mount.process.wait(20) == 0, "the process ends with the last open file"
    mount.start()
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() == sha256(gallery, 0)


def test_the_umount_command_while_readers_wait(mount: GalleryMount, gallery: Gallery) -> None:
    """`esrfs umount` says that it is busy, as umount(8) does, and nothing is lost by it."""
    paths = fill(mount, gallery, 1)
    mount.start(faults="engine.rebuild=sleep:3")
    readers = start_readers(paths)
    until(lambda: mount.status()["engine_calls"] == 1)
    command = [sys.executable, "-m", "esrfs.cli.main", "umount", str(mount.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    print(done.returncode, done.stderr)
    assert results(readers) == {paths[0]: sha256(gallery, 0)}
    if done.returncode:
        assert "busy" in done.stderr.lower() or "in use" in done.stderr.lower()
        assert is_mounted(mount.path)
        assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    assert mount.process is not None
    assert mount.process.wait(20) == 0
    assert not is_mounted(mount.path)


def test_an_idle_engine_gives_its_memory_back_and_comes_again(mount: GalleryMount, gallery: Gallery) -> None:
    paths = fill(mount, gallery, 2)
    mount.start("engine_idle=1")
    assert mount.status()["engine_state"] == "stopped"
    assert mount.engine_pids() == []
    for number, path in enumerate(paths):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256(gallery, number)
        assert mount.status()["engine_state"] == "idle"
        assert len(mount.engine_pids()) == 1
        until(lambda: mount.status()["engine_state"] == "stopped")
        until(lambda: mount.engine_pids() == [])
    assert mount.status()["engine_restarts"] == 0


def test_deleting_a_file_that_is_waited_for(mount: GalleryMount, gallery: Gallery) -> None:
    """The reader has it open, so it gets its view; the name stays gone."""
    paths = fill(mount, gallery, 1)
    mount.start(faults="engine.rebuild=sleep:1")
    readers = start_readers(paths)
    until(lambda: mount.status()["engine_calls"] == 1)
    paths[0].unlink()
    assert not paths[0].exists()
    assert results(readers) == {paths[0]: sha256(gallery, 0)}
    assert not paths[0].exists()
    assert os.listdir(mount.store / "cold") == []


def test_the_mount_is_killed_while_readers_wait(mount: GalleryMount, gallery: Gallery) -> None:
    paths = fill(mount, gallery, 5)
    mount.expected.append("a dead mount of esrfs is there")
    mount.start(faults=_SLOW)
    readers = start_readers(paths)
    until(lambda: mount.status()["engine_calls"] >= 1)
    engine = mount.engine_pids()
    mount.kill()
    assert set(results(readers, 20).values()) <= {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in engine))
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    mount.start()
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() == sha256(gallery, 0)
