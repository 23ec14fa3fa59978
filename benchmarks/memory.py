"""Memory that large photographs take: the peak of the engine's process and of the mount's, in bytes for each pixel.

``python -m benchmarks.memory [--megapixels 12 50 100 200] [--kinds jpeg] [--preset balanced]`` makes a picture of each
size and kind (a mosaic of scikit-image's photographs, with a little grain), copies it into a mount, compacts it,
empties the cache of views, and reads the view; the engine stays. Peaks are the kernel's (VmHWM of /proc/PID/status). A
view must be as long as its original, and a picture that differs from it by a few shades at most, seen from far.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.resources
import io
import itertools
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.machine import Mount, describe, mounted

_PHOTOGRAPHS = ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg")
_SIDE = 1000
"""Pixels along the side of each photograph in the mosaic."""


_KINDS: dict[str, dict[str, object]] = {
    "jpeg": {"format": "JPEG", "quality": 92, "subsampling": "4:2:0"},
    "progressive": {"format": "JPEG", "quality": 92, "subsampling": "4:2:0", "progressive": True},
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "quality": 75, "method": 0},
    "tiff": {"format": "TIFF"},
    "deflated": {"format": "TIFF", "compression": "tiff_adobe_deflate", "strip_size": 1 << 20},
    "bmp": {"format": "BMP"},
}
"""How Pillow saves each. A lossless WebP of more than 48 megapixels is passed through."""
_FAR = 16
"""Both pictures are made smaller by this before they are compared."""
_ALIKE = 8.0
"""Shades that they may differ by then, on average over a pixel's colours, in the worst of a thousand pixels."""


def photograph(megapixels: float, kind: str = "jpeg") -> bytes:
    """A picture of 4:3."""
    height = math.isqrt(int(megapixels * 1e6 * 3 / 4)) // 16 * 16
    width = height * 4 // 3 // 16 * 16
    tiles = []
    for name in _PHOTOGRAPHS:
        with (importlib.resources.files("skimage") / "data" / name).open("rb") as file, Image.open(file) as image:
            side = min(image.size)
            tiles.append(image.convert("RGB").crop((0, 0, side, side)).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
    grain = np.random.default_rng(1).normal(0, 2.0, (_SIDE, _SIDE, 1))
    mosaic = Image.new("RGB", (width, height))
    for number, (top, left) in enumerate((y, x) for y in range(0, height, _SIDE) for x in range(0, width, _SIDE)):
        grainy = np.asarray(tiles[number % len(tiles)], dtype=np.float64) + np.roll(grain, number * 37, axis=1)
        mosaic.paste(Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8)), (left, top))
    output = io.BytesIO()
    mosaic.save(output, **_KINDS[kind])  # type: ignore[arg-type]  # of which Pillow knows only some
    return output.getvalue()


@dataclass
class Peaks:
    """Bytes."""

    mount: int = 0
    engine: int = 0
    seconds: float = 0.0


def peak(pid: int) -> int:
    """Bytes of memory that a process had at most since ``forget_peak``; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@contextlib.contextmanager
def watched(mount: Mount) -> Iterator[Peaks]:
    """The peaks of the mount's process and of its engine from here to the end of the block."""
    peaks = Peaks()
    for pid in (mount.pid, *children(mount.pid)):
        with contextlib.suppress(OSError):
            forget_peak(pid)
    ended = threading.Event()

    def look() -> None:
        over = False
        while not over:
            over = ended.wait(0.05)
            peaks.engine = max([peaks.engine, *map(peak, children(mount.pid))])
            peaks.mount = max(peaks.mount, peak(mount.pid))

    thread = threading.Thread(target=look)
    start = time.perf_counter()
    thread.start()
    try:
        yield peaks
    finally:
        peaks.seconds = time.perf_counter() - start
        ended.set()
        thread.join()


def _read(path: Path) -> bytes:
    """Waits as long as it takes: a read ends after two minutes with EIO, and the work goes on."""
    while True:
        try:
            with open(path, "rb", buffering=0) as file:
                return b"".join(iter(lambda: file.read(1 << 20), b""))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            print(f"{path.name}: {error.strerror}; once more", flush=True)


def _difference(one: bytes, other: bytes) -> float:
    """Shades between two pictures seen from far, in all but the worst thousandth of the pixels."""
    far = []
    for data in (one, other):
        with Image.open(io.BytesIO(data)) as image:
            far.append(np.asarray(image.convert("RGB").reduce(_FAR), dtype=np.float64))
    return float(np.quantile(np.abs(far[0] - far[1]).mean(axis=2), 0.999))


def _row(what: str, peaks: Peaks, pixels: int) -> str:
    engine, mount = peaks.engine / 2**20, peaks.mount / 2**20
    return f"| {what} | {engine:,.0f} | {peaks.engine / pixels:.1f} | {mount:,.0f} | {peaks.seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[12, 50, 100, 200])
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=["jpeg"])
    parser.add_argument("--preset", default="balanced")
    arguments = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    print(
        "| picture | work | engine, MiB | bytes/pixel | mount, MiB | seconds |\n|---|---|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory() as folder, mounted(Path(folder), arguments.preset) as mount:
        (mount.path / "small.jpg").write_bytes(photograph(1))
        mount.call("compact", paths=[""], now=True, wait=True)  # starts the engine
        for megapixels, kind in itertools.product(arguments.megapixels, arguments.kinds):
            _measure(mount, megapixels, kind)
    print(f"\n{describe()}")


def _measure(mount: Mount, megapixels: float, kind: str) -> None:
    original = photograph(megapixels, kind)
    with Image.open(io.BytesIO(original)) as image:
        width, height = image.size
    path = mount.path / f"{megapixels:g}.{kind}"
    path.write_bytes(original)
    time.sleep(1.0)  # A release comes after its close, and what is open is not compacted.
    with watched(mount) as compaction:
        mount.call("compact", paths=[path.name], now=True, wait=True)
    known = mount.call("explain", path=path.name)
    picture = f"{kind}, {width} × {height}, {len(original) / 2**20:.0f} MiB"
    is_blob = known["state"] == "blob"
    state = f"scale {known['scale']}, {path.stat().st_blocks / 2**11:.1f} MiB" if is_blob else known["state"]
    print(_row(f"{picture} | compaction ({state})", compaction, width * height), flush=True)
    mount.call("cache-clear")
    if is_blob:
        with watched(mount) as reconstruction:
            view = _read(path)
        print(_row(f"{picture} | reconstruction", reconstruction, width * height), flush=True)
        assert len(view) == len(original), f"{len(view)} bytes of {len(original)}"
        assert (difference := _difference(original, view)) < _ALIKE, f"{difference:.1f} shades"
    path.unlink()


if __name__ == "__main__":
    main()
