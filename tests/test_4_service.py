"""A mount as a service manager runs it: told when it is ready, cleared away when its process was killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esrfs.exit_codes import ExitCode
from tests.mounting import Mounted

pytestmark = pytest.mark.mount

ESRFS = [sys.executable, "-m", "esrfs.cli.main"]


def umount_dead(path: Path) -> subprocess.CompletedProcess[str]:
    """What the unit does after the end of its process."""
    command = [*ESRFS, "umount", "--dead", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What a service manager is told."""
    address = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(address))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(address))
        listening.settimeout(30)
        yield listening


def test_ready_is_told_when_reads_work_and_stopping_at_the_end(
    unmounted: Mounted, photographs: Path, manager: socket.socket
) -> None:
    shutil.copy(photographs / "coffee.jpg", unmounted.store)
    unmounted.start()
    message = manager.recv(4096).decode()
    assert message.splitlines() == ["READY=1", f"STATUS=shows {unmounted.store}"]
    assert (unmounted.path / "coffee.jpg").read_bytes() == (photographs / "coffee.jpg").read_bytes()
    unmounted.stop()
    assert manager.recv(4096) == b"STOPPING=1"


def broken_mount(mount: Mounted, operation: str) -> list[str]:
    """A mount of a store on a disk that fails at one operation."""
    script = mount.store.parent / "broken.py"
    script.write_text(
        "import errno\n"
        "from esrfs.mount import lifecycle\n"
        "from esrfs.vfs.filesystem import Filesystem\n"
        "def fail(*_):\n"
        "    raise OSError(errno.EIO, 'the disk fails')\n"
        f"assert hasattr(Filesystem, {operation!r})\n"
        f"Filesystem.{operation} = fail\n"
        f"raise SystemExit(lifecycle.run({str(mount.store)!r}, {str(mount.path)!r}, ['quiet=3600'], True))\n"
    )
    return [sys.executable, str(script)]


def test_a_view_that_can_not_be_listed_is_never_ready(unmounted: Mounted, manager: socket.socket) -> None:
    command = broken_mount(unmounted, "opendir")
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == ExitCode.MOUNT_FAILED, result.stderr
    assert "can't be read" in result.stderr
    assert not os.path.ismount(unmounted.path)
    assert manager.recv(4096) == b"STOPPING=1"


def test_a_file_that_can_not_be_read_does_not_hold_the_mount_up(unmounted: Mounted, manager: socket.socket) -> None:
    (unmounted.store / "damaged").write_text("text")
    process = subprocess.Popen(broken_mount(unmounted, "open"), stderr=subprocess.DEVNULL)
    try:
        assert manager.recv(4096).startswith(b"READY=1")
        assert os.listdir(unmounted.path) == ["damaged"]
        with pytest.raises(OSError, match="Input/output error"):
            (unmounted.path / "damaged").read_text()
    finally:
        process.terminate()
        process.wait(60)


def test_the_journal_gets_the_levels_of_a_mount(unmounted: Mounted) -> None:
    """What systemd does: the log goes to a socket, whose identity is in the environment."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        st = os.fstat(theirs.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{st.st_dev}:{st.st_ino}"}
        command = [*ESRFS, "mount", "--foreground", str(unmounted.store), str(unmounted.path)]
        process = subprocess.Popen(command, stderr=theirs, env=environment)
        ours.settimeout(30)
        try:
            assert ours.recv(4096).decode().startswith("<6>esrfs.mount: ")
        finally:
            process.terminate()
            process.wait(60)


def test_a_mount_lives_with_the_capabilities_that_its_unit_leaves_it(
    unmounted: Mounted, needs: Callable[[str], str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can take capabilities away and mount")
    unit = (Path(__file__).resolve().parent.parent / "systemd" / "system" / "esrfs@.service").read_text()
    lines = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    left = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in " ".join(lines).split())
    command = [needs("setpriv"), "--bounding-set", f"-all,{left}", "--inh-caps", "-all", *ESRFS]
    command += ["mount", str(unmounted.store), str(unmounted.path), "-o", "quiet=3600"]
    subprocess.run(command, check=True, timeout=60)
    try:
        file = unmounted.path / "file"
        file.write_text("text")
        os.chown(file, 1234, 1234)
        file.chmod(0o4640)
        os.setxattr(file, "user.note", b"mine")
        os.mkfifo(unmounted.path / "fifo")
        st = (unmounted.store / "file").stat()
        assert (st.st_uid, st.st_mode & 0o7777) == (1234, 0o4640)
        assert os.getxattr(file, "user.note") == b"mine"
    finally:
        subprocess.run([*ESRFS, "umount", str(unmounted.path)], check=True, timeout=60)
    assert unmounted.path.stat().st_mode & 0o222, "its directory is as it was before"


def test_a_dead_mount_is_cleared_away_and_its_directory_stays_unwritable(mounted: Mounted) -> None:
    (mounted.path / "file").write_text("text")
    mounted.kill()
    with pytest.raises(OSError, match="Transport endpoint is not connected"):
        os.listdir(mounted.path)
    result = umount_dead(mounted.path)
    assert result.returncode == 0
    assert "was dead" in result.stderr
    assert os.listdir(mounted.path) == []
    assert mounted.path.stat().st_mode & 0o222 == 0
    mounted.start()
    assert (mounted.path / "file").read_text() == "text"


def test_a_mount_that_lives_is_never_cleared_away(mounted: Mounted, tmp_path: Path) -> None:
    (mounted.path / "file").write_text("text")
    result = umount_dead(mounted.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (mounted.path / "file").read_text() == "text"
    # And where nothing is mounted, or nothing is, there is nothing to do.
    assert umount_dead(tmp_path).returncode == 0
    assert umount_dead(tmp_path / "nowhere").returncode == 0
