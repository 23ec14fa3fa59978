"""What every benchmark needs: the machine in a line, and a mount that is taken down again."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esrfs import control
from esrfs.compaction.outcome import Policy
from esrfs.store.initialise import init


def describe() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, load {os.getloadavg()[0]:.1f} at the end"


@dataclass(frozen=True)
class Mount:
    store: Path
    path: Path
    socket: Path
    pid: int
    start_seconds: float
    """From the start of the process to the first answer."""

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        return control.call(self.socket, op, **arguments)


@contextlib.contextmanager
def mounted(base: Path, preset: str = "high") -> Iterator[Mount]:
    """A new store under ``base``, mounted, with directories of its own for state, cache and sockets."""
    store, path = base / "store", base / "mount"
    path.mkdir()
    for kind in ("STATE", "CACHE", "DATA"):
        os.environ[f"XDG_{kind}_HOME"] = str(base / "xdg" / kind.lower())
    os.environ["XDG_RUNTIME_DIR"] = str(base / "run")
    (base / "run").mkdir(mode=0o700)
    config = init(str(store), policy=Policy(preset=preset)).config
    command = [sys.executable, "-m", "esrfs.mount", str(store), str(path), "quiet=3600"]
    reader, writer = os.pipe()
    start = time.perf_counter()
    process = subprocess.Popen(command, pass_fds=[writer], env={**os.environ, "ESRFS_READY_FD": str(writer)})
    os.close(writer)
    answer = os.read(reader, 1 << 16)
    seconds = time.perf_counter() - start
    os.close(reader)
    try:
        if b"ready" not in answer:
            raise SystemExit(f"the mount did not start: {answer.decode()}")
        socket = control.find(config.id, str(path))
        assert socket is not None
        yield Mount(store, path, socket, process.pid, seconds)
    finally:
        process.terminate()
        process.wait()
