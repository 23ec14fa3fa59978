"""Small and large plain files: the native directory, a tuned mfusepy pass-through, and esrfs, in one run.

``python -m benchmarks.small_files [--rounds N]`` prints operations per second (the median of the rounds), and the
ratios of esrfs to the pass-through and to native. The three take turns within each round, so that a machine whose
speed drifts does not favour one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.machine import describe, mounted

FILES = 1000
SIZE = 64 * 1024
LARGE_MIB = 256


def _threads(count: int, work: Callable[[int], None]) -> None:
    """``work(i)`` for every i below FILES, on ``count`` threads."""

    def part(start: int) -> None:
        for number in range(start, FILES, count):
            work(number)

    threads = [threading.Thread(target=part, args=(start,)) for start in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def workloads(directory: Path) -> Iterator[tuple[str, float]]:
    """(name, operations per second) of each workload in ``directory``."""
    data = os.urandom(SIZE)
    names = [os.fspath(directory / f"file{number}") for number in range(FILES)]

    def create(number: int) -> None:
        fd = os.open(names[number], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, data)
        os.close(fd)

    def read(number: int) -> None:
        fd = os.open(names[number], os.O_RDONLY)
        os.read(fd, SIZE)
        os.close(fd)

    def unlink(number: int) -> None:
        os.unlink(names[number])

    def measured(name: str, count: int, work: Callable[[], object]) -> tuple[str, float]:
        start = time.perf_counter()
        work()
        return name, count / (time.perf_counter() - start)

    for threads in (1, 4):
        yield measured(f"create 64 KiB, {threads} thr., files/s", FILES, lambda n=threads: _threads(n, create))  # type: ignore[misc]
        yield measured(f"read 64 KiB, {threads} thr., files/s", FILES, lambda n=threads: _threads(n, read))  # type: ignore[misc]
        if threads == 1:
            yield measured("ls -l, entries/s", FILES, lambda: [entry.stat() for entry in os.scandir(directory)])
        yield measured(
            f"unlink, {threads} thr., files/s", FILES, lambda n=threads: _threads(n, lambda i: os.unlink(names[i]))
        )  # type: ignore[misc]
    yield measured(
        "stat of missing names /s", 4000, lambda: [os.path.exists(f"{directory}/no{i}") for i in range(4000)]
    )
    block = os.urandom(1 << 20)
    large = directory / "large"

    def write() -> None:
        with open(large, "wb", buffering=0) as file:
            for _ in range(LARGE_MIB):
                file.write(block)

    def scan() -> None:
        with open(large, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass

    yield measured("write, MiB/s", LARGE_MIB, write)
    yield measured("read after write, MiB/s", LARGE_MIB, scan)
    yield measured("read again, MiB/s", LARGE_MIB, scan)
    large.unlink()


@contextlib.contextmanager
def _passthrough(base: Path) -> Iterator[Path]:
    root, mountpoint = base / "peer", base / "peer-mount"
    root.mkdir()
    mountpoint.mkdir()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.passthrough", str(root), str(mountpoint)])
    try:
        while not os.path.ismount(mountpoint):
            time.sleep(0.02)
        yield mountpoint
    finally:
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=False)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # memory: the disk is not what is measured
        base = Path(folder)
        native = base / "native"
        native.mkdir()
        with _passthrough(base) as peer, mounted(base) as mount:
            for number in range(rounds + 1):
                for where, directory in (("native", native), ("pass-through", peer), ("esrfs", mount.path)):
                    for name, value in workloads(directory):
                        if number:  # the first round warms up
                            figures.setdefault(name, {}).setdefault(where, []).append(value)
    print(f"{describe()}; {rounds} rounds, medians; backing store in memory (/dev/shm)\n")
    print("| workload | native | pass-through | esrfs | esrfs / pass-through | esrfs / native |")
    print("|---|---|---|---|---|---|")
    for name, values in figures.items():
        plain, peer_value, ours = (statistics.median(values[where]) for where in ("native", "pass-through", "esrfs"))
        row = (f"{plain:,.0f}", f"{peer_value:,.0f}", f"{ours:,.0f}", f"{ours / peer_value:.2f}", f"{ours / plain:.3f}")
        print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
