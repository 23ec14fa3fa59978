"""Run as a program: what one piece of work takes at most, in bytes, besides the pictures that it is given.

python -m tests.peaks rebuild2|rebuild1|metric WIDTH HEIGHT
"""

from __future__ import annotations

import ctypes
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from esrfs import reconstruction
from esrfs.blob.recipe import JpegCoding, Recipe, Run, Scores
from esrfs.engine import tiles
from esrfs.formats import cells
from esrfs.metrics.ssimulacra2 import Reference

Pixels = reconstruction.Pixels


class _Doubling:
    """A network that repeats each pixel."""

    scale = 2
    margin = 6
    multiple = 1

    def __call__(self, given: Pixels) -> Pixels:
        return given.repeat(2, axis=1).repeat(2, axis=2)


def _picture(width: int, height: int) -> Image.Image:
    few = np.random.default_rng(1).integers(0, 256, (height // 64 + 1, width // 64 + 1, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BILINEAR)


def _encode(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "AVIF", quality=50, speed=10, subsampling="4:4:4")
    return out.getvalue()


def _recipe(width: int, height: int, scale: int) -> Recipe:
    scan = width * height // 4
    return Recipe(
        width=width,
        height=height,
        original_size=scan + 2,
        sha256_original=bytes(32),
        sha256_view=bytes(32),
        preset="small",
        scale=scale,
        network="" if scale == 1 else "doubling",
        network_sha256=b"" if scale == 1 else b"doubling",
        quality=50,
        coding=JpegCoding(mode="RGB", subsampling="4:2:0", quantisation=[[16] * 64] * 3),
        prefix=[Run(0, 1)],
        scan_length=scan,
        suffix=[Run(0, 1)],
        encoder="",
        scores=Scores(ssimulacra2=60, worst_tile=50, psnr=30),
        created_by="tests",
    )


def _now(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    work, width, height = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if work.startswith("rebuild"):
        scale = int(work.removeprefix("rebuild"))
        recipe = _recipe(width, height, scale)
        small = _picture(-(-width // scale), -(-height // scale))
        avif = cells.encode(small, _encode) if cells.is_large(small) else _encode(small)
    else:
        original = np.asarray(_picture(width, height))
        view = np.clip(original, 3, 252)
        Reference(original[:300, :300]).compare(view[:300, :300])  # loads what it needs
    ctypes.CDLL(None).malloc_trim(0)  # what the preparations left must not hide anything
    Path("/proc/self/clear_refs").write_text("5")
    before = _now("VmRSS")
    if work.startswith("rebuild"):
        view_bytes = reconstruction.rebuild(recipe, avif, lambda _, pixels: tiles.enlarge(_Doubling(), pixels))
        assert len(view_bytes) == recipe.original_size
    else:
        Reference(original).compare(view)
    print(_now("VmHWM") - before)


if __name__ == "__main__":
    main()
