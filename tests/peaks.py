"""Run as a program: what one piece of work takes at most, in bytes, besides the pictures that it is given.

python -m tests.peaks rebuild2|rebuild1|compact2|compact1|metric WIDTH HEIGHT [SPEED]

The digit is the scale. ``compact`` is one attempt on the whole picture, at libaom's SPEED (default 10).
"""

from __future__ import annotations

import ctypes
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from esrfs import formats, reconstruction
from esrfs.blob.recipe import JpegCoding, Recipe, Run, Scores
from esrfs.compaction import compactor, gate
from esrfs.compaction.compactor import NetworkRef
from esrfs.compaction.outcome import Policy
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


def _compaction(original: bytes, scale: int, speed: int) -> None:
    policy = Policy(preset="small")
    split = formats.split(original, policy.max_megapixels)
    picture = compactor._Picture(split.pixels(), 2)
    work = compactor._Compaction(
        original, policy, gate.thresholds("small"), split, picture, 2, _infer, lambda: None, b""
    )
    network = NetworkRef("doubling", b"doubling", 2) if scale == 2 else None
    work._result(compactor._Way(scale, "4:4:4", network), 30, speed)


def _infer(_: bytes, pixels: Pixels) -> Pixels:
    return tiles.enlarge(_Doubling(), pixels)


def _now(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    work, width, height = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    speed = int(sys.argv[4]) if len(sys.argv) > 4 else 10
    torch.set_num_threads(1)
    run: Callable[[], object]
    if work.startswith("rebuild"):
        scale = int(work[-1])
        small = _picture(-(-width // scale), -(-height // scale))
        avif = cells.encode(small, _encode) if cells.is_large(small) else _encode(small)
        recipe = _recipe(width, height, scale)
        del small
        run = partial(reconstruction.rebuild, recipe, avif, _infer)
    elif work.startswith("compact"):
        original = io.BytesIO()
        _picture(width, height).save(original, "JPEG", quality=92)
        run = partial(_compaction, original.getvalue(), int(work[-1]), speed)
    else:
        pixels = np.asarray(_picture(width, height))
        view = np.clip(pixels, 3, 252)
        run = partial(Reference(pixels).compare, view)
    few = np.zeros((300, 300, 3), np.uint8)
    Reference(few).compare(few)  # loads what it needs
    ctypes.CDLL(None).malloc_trim(0)  # what the preparations left must not hide anything
    Path("/proc/self/clear_refs").write_text("5")
    before = _now("VmRSS")
    run()
    print(_now("VmHWM") - before)


if __name__ == "__main__":
    main()
