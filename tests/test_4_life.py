"""The life of a mount: start, use, end, crash, start again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from esrfs import config, control
from esrfs.exit_codes import ExitCode
from esrfs.mount import lifecycle
from tests.mounting import FAST, Mounted, exiftool, kill_mounts
from tests.witness import wait_until

pytestmark = pytest.mark.mount


def test_photographs_go_in_shrink_and_come_back(mounted: Mounted, photographs: Path) -> None:
    subprocess.run(["cp", "-a", f"{photographs}/.", str(mounted.path)], check=True)
    result = mounted.compact()
    assert result["compacted"] >= 5, mounted.log()
    for source in sorted(path for path in photographs.rglob("*") if path.is_file()):
        relative = str(source.relative_to(photographs))
        view = mounted.path / relative
        ours, theirs = view.stat(), source.stat()
        assert (ours.st_size, ours.st_mtime_ns, ours.st_mode) == (theirs.st_size, theirs.st_mtime_ns, theirs.st_mode)
        known = mounted.explain(relative)
        if known["state"] == "blob":
            assert known["stored_bytes"] < source.stat().st_size
            assert len(view.read_bytes()) == source.stat().st_size
            if shutil.which("exiftool"):
                assert exiftool(view) == exiftool(source), relative
        else:
            assert view.read_bytes() == source.read_bytes()


def test_the_mount_process_stays_small_and_without_torch(mounted: Mounted, photographs: Path) -> None:
    shutil.copy(photographs / "coffee.jpg", mounted.path)
    mounted.compact()
    assert (mounted.path / "coffee.jpg").read_bytes()
    assert mounted.process is not None
    maps = Path(f"/proc/{mounted.process.pid}/maps").read_text()
    assert "torch" not in maps
    assert "numpy" not in maps


def test_bursts_of_readers_leave_nothing_in_memory(mounted: Mounted) -> None:
    """For each libfuse starts threads, and ends most of them again."""

    def memory() -> int:
        assert mounted.process is not None
        status = Path(f"/proc/{mounted.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    def burst() -> None:
        barrier = threading.Barrier(32)

        def read() -> None:
            barrier.wait(60)
            for number in range(4):
                (mounted.path / str(number)).read_bytes()

        readers = [threading.Thread(target=read) for _ in range(32)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()

    for number in range(4):
        (mounted.path / str(number)).write_bytes(bytes(4096))
    for _ in range(10):
        burst()
    before = memory()
    for _ in range(100):
        burst()
        time.sleep(0.01)
    assert memory() - before < 2 << 20


def test_views_are_the_same_after_cache_clear_and_remount(mounted: Mounted, photographs: Path) -> None:
    shutil.copy(photographs / "astronaut.jpg", mounted.path)
    mounted.compact()
    view = mounted.path / "astronaut.jpg"
    first = view.read_bytes()
    mounted.call("cache-clear")
    assert view.read_bytes() == first
    assert mounted.stop() == 0
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    mounted.start()
    assert view.read_bytes() == first


def test_a_killed_mount_is_no_empty_directory_and_is_mounted_again(mounted: Mounted, photographs: Path) -> None:
    mounted.expected.append("a dead mount of esrfs is there")
    shutil.copy(photographs / "coffee.jpg", mounted.path)
    mounted.kill()
    with pytest.raises(OSError, match="Transport endpoint is not connected"):
        os.listdir(mounted.path)
    subprocess.run(["umount", "-l", str(mounted.path)], check=True)
    assert mounted.path.stat().st_mode & 0o222 == 0, "below the dead mount nobody should write"
    mounted.start()
    assert (mounted.path / "coffee.jpg").read_bytes() == (photographs / "coffee.jpg").read_bytes()
    mounted.stop()
    assert mounted.path.stat().st_mode & 0o777 == 0o755, "a clean end leaves the directory as it was"


_LIBFUSE_FAILS = """
import sys
from esrfs.mount import binding, lifecycle
serve = binding.mfusepy.FUSE.__init__
def fail(self, *arguments, **options):
    if "{when}" == "late":
        serve(self, *arguments, **options)
    raise RuntimeError(8)
binding.mfusepy.FUSE.__init__ = fail
raise SystemExit(lifecycle.run("{mount.store}", "{mount.path}", [], True))
"""


@pytest.mark.parametrize(("when", "code"), [("late", ExitCode.OK), ("early", ExitCode.MOUNT_FAILED)])
def test_an_error_of_libfuse_counts_only_before_anything_was_served(
    unmounted: Mounted, when: str, code: ExitCode
) -> None:
    """When a lazily unmounted mount goes with its last open file, and a thread is taking just that release, the kernel
    says that the connection was aborted, and libfuse takes it for an error: 1 in 8 of small mounts with 4 files."""
    program = _LIBFUSE_FAILS.format(when=when, mount=unmounted)
    with open(unmounted.log_path, "wb") as log_file:
        process = subprocess.Popen([sys.executable, "-c", program], stderr=log_file)
    wait_until(lambda: process.poll() is not None or control.find(unmounted.config.id, str(unmounted.path)) is not None)
    subprocess.run(["umount", "-l", str(unmounted.path)], capture_output=True, check=False)
    assert process.wait(30) == code
    log = unmounted.log()
    assert ("could not be mounted" in log) == (when == "early"), log


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_state_directory_that_takes_nothing_stops_no_mount(unmounted: Mounted, tmp_path: Path, how: str) -> None:
    """Full: of a store that was mounted before. Read-only: of one that never was, so that there is no directory."""
    state = tmp_path / ".xdg" / "state"
    state.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", state], check=False).returncode:
        pytest.skip("this user can't mount a tmpfs")
    try:
        if how == "full":
            unmounted.start()
            unmounted.stop()
            with contextlib.suppress(OSError), open(state / "filler", "wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
        else:
            subprocess.run(["mount", "-o", "remount,ro", state], check=True)
        unmounted.expected += ["store.catalog: ", "stays as it is, with nothing to keep programs from writing"]
        unmounted.start()
        (unmounted.path / "file").write_text("text")
        assert (unmounted.store / "file").read_text() == "text"
        unmounted.stop()
        (unmounted.path / "file").touch()  # it is writable as before
    finally:
        subprocess.run(["umount", "-l", state], check=True)


def test_background_mount_and_umount_by_command(unmounted: Mounted) -> None:
    esrfs = [sys.executable, "-m", "esrfs.cli.main"]
    subprocess.run([*esrfs, "mount", str(unmounted.store), str(unmounted.path)], check=True, timeout=30)
    (unmounted.path / "file").write_text("text")
    again = subprocess.run(
        [*esrfs, "mount", str(unmounted.store), str(unmounted.path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert again.returncode == 7
    assert "mounted already" in again.stderr
    subprocess.run([*esrfs, "umount", str(unmounted.path)], check=True, timeout=30)
    assert os.listdir(unmounted.path) == []
    assert (unmounted.store / "file").read_text() == "text"


def in_background(mounted: Mounted, ready_fd: int, patch: str = "") -> None:
    """As ``esrfs mount`` starts it, with what ``patch`` does first."""
    script = f"import sys\nfrom esrfs.mount import lifecycle\n{patch}\nlifecycle.serve_in_background(sys.argv[1:])"
    mounted.process = subprocess.Popen(
        [sys.executable, "-c", script, str(mounted.store), str(mounted.path), *FAST],
        env={**os.environ, lifecycle.READY_FD_VARIABLE: str(ready_fd)},
        pass_fds=[ready_fd],
        stderr=subprocess.DEVNULL,
    )


def test_a_mount_whose_starter_was_killed_does_all_its_work(unmounted: Mounted) -> None:
    """Ctrl-C, while it was not yet ready."""
    reader, writer = os.pipe()
    os.close(reader)
    in_background(unmounted, writer)
    os.close(writer)
    wait_until(lambda: control.find(unmounted.config.id, str(unmounted.path)) is not None)
    wait_until(lambda: unmounted.status()["compaction"] == "running")


def test_a_thread_that_ends_by_a_bug_is_in_the_log(unmounted: Mounted) -> None:
    reader, writer = os.pipe()
    in_background(unmounted, writer, "lifecycle.Mount._keep_lease = lambda self: 1 / 0")
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert json.loads(pipe.read()) == {"ready": True}
    log = config.state_directory(unmounted.config.id) / "mount.log"
    wait_until(lambda: "ZeroDivisionError" in log.read_text())
    assert "esrfs-lease" in log.read_text()


def test_mount_refuses_what_would_hide_files(unmounted: Mounted) -> None:
    (unmounted.path / "in the way").touch()
    esrfs = [sys.executable, "-m", "esrfs.cli.main", "mount", str(unmounted.store)]
    refused = subprocess.run([*esrfs, str(unmounted.path)], capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 5
    assert "not empty" in refused.stderr
    inside = unmounted.store / "inside"
    inside.mkdir()
    refused = subprocess.run([*esrfs, str(inside)], capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 5
    unknown = subprocess.run(
        [*esrfs, str(unmounted.path), "-o", "colour=blue"], capture_output=True, text=True, timeout=30, check=False
    )
    assert unknown.returncode == 2
    assert "colour=blue" in unknown.stderr


def test_a_test_does_not_wait_for_ever_for_a_mount_that_hangs(mounted: Mounted) -> None:
    """The kernel holds who waits for it, whatever signals come, and so pytest's time limit."""
    assert mounted.process is not None
    mounted.process.send_signal(signal.SIGSTOP)
    os.waitpid(mounted.process.pid, os.WUNTRACED)  # all its threads stand still
    limit = threading.Timer(0.5, kill_mounts)  # as in conftest, when the test's time is nearly over
    limit.start()
    with pytest.raises(OSError) as failure:
        os.listdir(mounted.path)
    limit.join()
    assert failure.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
