"""How fast a migration is, beside ``cp -a`` of the same files onto the same mount.

``python -m benchmarks.migration [--rounds N] [--base DIRECTORY] [--folders FOLDER…]``. The migration also fsyncs each
file, reads it back past the page cache and compares; ``cp -a`` does none of that, so it stands here with and without a
``sync`` after it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from esrfs_daemon import config, once
from esrfs_daemon.journal import Journal
from esrfs_daemon.throttle import Throttle
from esrfs_daemon.walk import Filters

from benchmarks import machine

WORKLOADS = {
    "photographs of 6 MB": (60, 6 << 20),
    "photographs of 1 MB": (300, 1 << 20),
    "small files of 64 KiB": (1500, 64 << 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", default=None, help="where source and store lie; /dev/shm measures without a disk")
    parser.add_argument("--folders", nargs="+", type=Path, help="copies of these, instead of files of random bytes")
    arguments = parser.parse_args()
    print("| workload | `cp -a` | `cp -a` and `sync` | migration | of `cp -a` | of `cp -a` and `sync` |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.base) as name, machine.mounted(Path(name)) as mount:
        source = Path(name) / "source"
        for title, fill in workloads(arguments.folders).items():
            fill(source)
            sizes = [path.stat().st_size for path in source.rglob("*") if path.is_file()]
            rates: dict[str, list[float]] = {}
            for number, how in enumerate(("cp", "synced", "migration") * arguments.rounds):
                os.sync()
                began = time.perf_counter()
                # Each into a folder of its own: ext4 is slow to make files where many were deleted seconds before.
                copy(how, source, mount.path / f"to {number}")
                rates.setdefault(how, []).append(sum(sizes) / (time.perf_counter() - began) / 1e6)
            cp, synced, migration = (statistics.median(rates[how]) for how in ("cp", "synced", "migration"))
            row = [f"{len(sizes)} {title}", *(f"{rate:.0f} MB/s" for rate in (cp, synced, migration))]
            print(f"| {' | '.join(row)} | {migration / cp:.2f} | {migration / synced:.2f} |")
            for folder in (source, *mount.path.iterdir()):
                shutil.rmtree(folder)
    print(f"\n{machine.describe()}; {arguments.rounds} rounds, medians")


def workloads(folders: Sequence[Path] | None) -> dict[str, Callable[[Path], None]]:
    """What makes each workload's files in a folder, by title."""
    if not folders:
        return {title: partial(_of_random_bytes, count, size) for title, (count, size) in WORKLOADS.items()}
    return {f"files of {', '.join(each.name for each in folders)}": partial(_copies_of, folders)}


def _of_random_bytes(count: int, size: int, to: Path) -> None:
    (to / "DCIM").mkdir(parents=True)
    for number in range(count):
        (to / "DCIM" / f"{number:05}.jpg").write_bytes(os.urandom(size))


def _copies_of(folders: Sequence[Path], to: Path) -> None:
    for each in folders:
        shutil.copytree(each, to / each.name, copy_function=shutil.copyfile)
    for folder, _, _ in os.walk(to):
        os.chmod(folder, 0o755)  # those of a corpus may be read-only


def copy(how: str, source: Path, to: Path) -> None:
    if how == "migration":
        limits = Throttle(config.Throttle(min_free=0, on_battery=True), threading.Event())
        with (
            tempfile.TemporaryDirectory(dir=source.parent) as state,
            contextlib.closing(Journal(Path(state) / "journal.db")) as journal,
            once.prepared(str(source), str(to), journal, limits, Filters()) as work,
        ):
            report = work.migrate("keep", quiet=0.0)
        assert not report.failed + report.later
    else:
        subprocess.run(["cp", "-a", str(source), str(to)], check=True)
        if how == "synced":
            os.sync()


if __name__ == "__main__":
    main()
