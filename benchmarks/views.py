"""Views of photographs: a cold read against its parts measured alone, warm reads against native, and the start.

``python -m benchmarks.views [--rounds N]`` compacts one 12 MP photograph (scikit-image's, enlarged) and prints medians.
"Alone" runs the very functions of the engine in this process, one after the other: decode the blob's AVIF, run the
network over its tiles, encode the JPEG.
"""

from __future__ import annotations

import argparse
import importlib.resources
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks.machine import describe, mounted

_WARM_READS = 50


def _photograph() -> bytes:
    with (importlib.resources.files("skimage") / "data" / "coffee.png").open("rb") as file, Image.open(file) as image:
        large = image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
    output = io.BytesIO()
    large.save(output, "JPEG", quality=92, subsampling="4:2:0")
    return output.getvalue()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _read(path: Path) -> Callable[[], object]:
    def work() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass

    return work


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def _alone(blob: bytes, network_file: bytes, rounds: int) -> dict[str, float]:
    """Seconds of each part of a reconstruction, medians; nothing else of esrfs runs meanwhile."""
    # Only now: torch takes a second to import, and must not compete with the mount.
    import torch  # noqa: PLC0415

    from esrfs import formats, reconstruction  # noqa: PLC0415
    from esrfs.blob import container  # noqa: PLC0415
    from esrfs.engine import tiles  # noqa: PLC0415
    from esrfs.engine.lanes import Crossing  # noqa: PLC0415
    from esrfs.engine.protocol import Lane  # noqa: PLC0415
    from esrfs.networks import loading  # noqa: PLC0415

    torch.set_num_threads(1)
    unpacked = container.unpack(blob)
    recipe = unpacked.recipe
    plan = reconstruction.Plan(recipe.width, recipe.height, recipe.scale, recipe.network_sha256, gray=False)
    crew = tiles.Crew(len(os.sched_getaffinity(0)))
    parts: dict[str, list[float]] = {"decode AVIF": [], "network": [], "encode JPEG": []}
    job = Crossing().enter(1, Lane.INTERACTIVE)
    network = loading.load(network_file) if recipe.network else None

    def infer(_: bytes, pixels: reconstruction.Pixels) -> reconstruction.Pixels:
        return pixels if network is None else tiles.enlarge(network, pixels, partial(crew.spread, job))

    for number in range(rounds + 1):
        times = [time.perf_counter()]
        small = reconstruction.decode_small(plan, unpacked.avif)
        times.append(time.perf_counter())
        large = reconstruction.enlarge(plan, small, infer)
        times.append(time.perf_counter())
        formats.encode_scan(recipe.coding, recipe.width, recipe.height, large, recipe.scan_length)
        times.append(time.perf_counter())
        if number:  # the first round warms up
            for name, start, end in zip(parts, times, times[1:], strict=False):
                parts[name].append(end - start)
    return {name: statistics.median(values) for name, values in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        base = Path(folder)
        native = base / "native.jpg"
        native.write_bytes(_photograph())
        with mounted(base, preset="balanced") as mount:
            rows.append(("mount: process started to first answer", f"{mount.start_seconds:.2f} s"))
            view = mount.path / "photograph.jpg"
            view.write_bytes(native.read_bytes())
            rows.append(
                (
                    "compaction of 12 MP",
                    f"{_seconds(lambda: mount.call('compact', paths=[''], now=True, wait=True)):.1f} s",
                )
            )
            known = mount.call("explain", path="photograph.jpg")
            rows.append(("state, ratio, SSIMULACRA2", f"{known['state']}, {known['ratio']}, {known['quality']}"))
            blob = (mount.store / "photograph.jpg").read_bytes()
            networks = list((mount.store / ".esrfs" / "networks").iterdir())
            cold, warm, plain = [], [], []
            _read(view)()  # starts the engine
            for _ in range(rounds):
                mount.call("cache-clear")
                cold.append(_seconds(_read(view)))
                _read(view)()  # the kernel fills its cache
                for _ in range(_WARM_READS):
                    warm.append(_seconds(_read(view)))
                    plain.append(_seconds(_read(native)))
            before = mount.call("status")["engine_calls"]
            head = [_seconds(lambda: os.close(_head(view))) for _ in range(rounds)]
            for number in range(1000):
                (mount.path / f"small{number}").write_bytes(b"x" * 100)
                (mount.path / f"small{number}").read_bytes()
            rows.append(("RSS of the mount's process after 1,000 files", f"{_rss_mib(mount.pid):.0f} MiB"))
            assert mount.call("status")["engine_calls"] == before, "the head of a view costs no engine call"
        parts = _alone(blob, networks[0].read_bytes() if networks else b"", rounds)
    alone = sum(parts.values())
    rows += [(f"alone: {name}", f"{seconds:.2f} s") for name, seconds in parts.items()]
    rows += [
        ("first 64 KiB of a view", f"{statistics.median(head) * 1e3:.1f} ms"),
        (
            "cold read, whole",
            f"{statistics.median(cold):.2f} s = {statistics.median(cold) / alone:.2f} × its parts alone",
        ),
        (
            "warm read, whole",
            f"{statistics.median(warm) * 1e3:.1f} ms, native {statistics.median(plain) * 1e3:.1f} ms: "
            f"{statistics.median(plain) / statistics.median(warm):.2f} × native's speed",
        ),
    ]
    print(f"{describe()}; {rounds} rounds, medians\n\n| | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


def _head(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    os.pread(descriptor, 65536, 0)
    return descriptor


if __name__ == "__main__":
    main()
