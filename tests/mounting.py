"""A real mount for tests: made in a temporary directory, watched, and always taken down again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from esrfs import control
from esrfs.compaction.outcome import Policy
from esrfs.store.initialise import init

_TROUBLE = re.compile(r"^(WARNING|ERROR|CRITICAL) |Traceback", re.MULTILINE)
FAST = ["quiet=3600"]
"""Options of a mount in which compaction comes only when a test asks."""


def kill_mounts() -> None:
    """End the mounts that this process serves. Who waits for one of them gets an error then."""
    for pid in _children("self"):
        with contextlib.suppress(OSError):
            if b"mount\0--foreground" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def _children(pid: int | str) -> list[int]:
    """Processes that this one's threads have started."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found += map(int, children.read_text().split())
    return found


class Mounted:
    """One store, its mountpoint, and the process that serves it (in the foreground, as a child of the test)."""

    program = "esrfs.cli.main"
    """The module that is run."""

    def __init__(self, base: Path, *, preset: str = "balanced", patience: str = "low", exclusive: bool = False) -> None:
        """With little patience a picture is stored much sooner; how few bytes it takes, other tests look at."""
        self.store = base / "store"
        self.path = base / "mount"
        self.log_path = base / "mount.log"
        self.path.mkdir(exist_ok=True)
        self.config = init(str(self.store), policy=Policy(preset=preset, patience=patience), exclusive=exclusive).config
        self.process: subprocess.Popen[bytes] | None = None
        self.expected: list[str] = []
        """Regular expressions of log lines that this test provokes."""

    def start(self, *options: str, faults: str = "") -> Mounted:
        """Mount, and wait until it answers. ``options`` are single values of ``-o``; compaction waits to be asked."""
        environment = {**os.environ, "ESRFS_FAULTS": faults}
        command = [sys.executable, "-m", self.program, "mount", "--foreground", str(self.store), str(self.path)]
        command += ["-o", ",".join([*FAST, *options])]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 60
        while control.find(self.config.id, str(self.path)) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the mount did not start:\n{self.log()}")
            time.sleep(0.02)
        return self

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        socket = control.find(self.config.id, str(self.path))
        assert socket is not None, f"the mount does not answer:\n{self.log()}"
        return control.call(socket, op, **arguments)

    def compact(self, *paths: str) -> dict[str, Any]:
        """Compact now, and wait; ``paths`` are relative to the store."""
        return self.call("compact", paths=list(paths) or [""], now=True, wait=True)

    def status(self) -> dict[str, Any]:
        return self.call("status")

    def explain(self, path: str) -> dict[str, Any]:
        return self.call("explain", path=path)

    def stop(self) -> int:
        """Unmount by SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """As a crash would: SIGKILL. The mountpoint is dead until the next start."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def wait_for_death(self, seconds: float = 60.0) -> None:
        """For a fault point that kills the mount."""
        assert self.process is not None
        self.process.wait(seconds)

    def engine_pids(self) -> list[int]:
        assert self.process is not None
        return _children(self.process.pid)

    def clean_up(self) -> None:
        """Take down whatever is there, and fail for what the log says that nobody expected."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
            if self.process.poll() is None:
                self.kill()
        while subprocess.run(["umount", "-l", str(self.path)], capture_output=True, check=False).returncode == 0:
            pass
        subprocess.run(["chattr", "-i", str(self.path)], capture_output=True, check=False)
        lines = self.log().splitlines()
        trouble = [line for line in lines if _TROUBLE.search(line)]
        unexpected = [line for line in trouble if not any(re.search(pattern, line) for pattern in self.expected)]
        assert not unexpected, (
            "unexpected in the mount's log:\n" + "\n".join(unexpected) + "\n\nall of it:\n" + self.log()
        )


def exiftool(path: Path) -> Any:
    """What exiftool says of a file, without what the file system says."""
    output = subprocess.run(["exiftool", "-j", "-G", "-struct", str(path)], capture_output=True, check=True).stdout
    values = json.loads(output)[0]
    left_out = ("SourceFile", "File:Directory", "File:FileName", "File:FileModifyDate", "File:FileAccessDate")
    left_out += ("File:FileInodeChangeDate", "File:FilePermissions")
    return {key: value for key, value in values.items() if key not in left_out}
