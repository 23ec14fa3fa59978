"""Run as a program: what one piece of work takes at most, in bytes, besides the pictures that it is given.

python -m tests.peaks rebuild2|rebuild1|compact2|compact1|metric WIDTH HEIGHT [KIND [SPEED]]

The digit is the scale. ``compact`` is one attempt on the whole picture, of a KIND (default jpeg), at libaom's SPEED
(default 10); a view that does not fit has been tried all the same. A second line tells what compaction asks for.
"""

from __future__ import annotations

import contextlib
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
from tests.test_1_png import interlaced

Pixels = reconstruction.Pixels


class _Doubling:
    """A network that repeats each pixel."""

    scale = 2
    channels = 3
    margin = 6
    multiple = 1

    def __call__(self, given: Pixels) -> Pixels:
        return given.repeat(2, axis=1).repeat(2, axis=2)


def _picture(width: int, height: int) -> Image.Image:
    few = np.random.default_rng(1).integers(0, 256, (height // 64 + 1, width // 64 + 1, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BILINEAR)


def _deflated(image: Image.Image, level: int = 1) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=level)
    return out.getvalue()


def _translucent(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _in_strips(image: Image.Image, rows: int) -> bytes:
    """A TIFF of JPEGs."""
    image = image.crop((0, 0, image.width, image.height // rows * rows))
    out = io.BytesIO()
    image.save(out, "TIFF", compression="jpeg", quality=92, strip_size=image.width * rows * 3)
    return out.getvalue()


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


ORIGINALS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: _saved(image, "JPEG", quality=92),
    "jpeg-progressive": lambda image: _saved(image, "JPEG", quality=92, progressive=True),
    "png": _deflated,
    "png-alpha": lambda image: _deflated(_translucent(image)),
    "png-palette": lambda image: _deflated(image.quantize(256), 0),
    "png-interlaced": lambda image: interlaced(_deflated(image, 0)),
    "webp": lambda image: _saved(image, "WEBP", quality=75),
    "webp-lossless": lambda image: _saved(image, "WEBP", lossless=True, quality=0, method=0),
    "tiff": lambda image: _saved(image, "TIFF"),
    "tiff-deflate": lambda image: _saved(image, "TIFF", compression="tiff_adobe_deflate", strip_size=1 << 20),
    "tiff-alpha": lambda image: _saved(_translucent(image), "TIFF"),
    "tiff-jpeg": lambda image: _in_strips(image, 16),
    "tiff-jpeg-whole": lambda image: _in_strips(image, image.height),
    "bmp": lambda image: _saved(image, "BMP"),
}
"""By KIND."""


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


def _asked(original: bytes) -> int:
    return compactor.memory(formats.split(original, Policy().max_megapixels), len(original))


def _compaction(original: bytes, scale: int, speed: int) -> None:
    policy = Policy(preset="small")
    split = formats.split(original, policy.max_megapixels)
    stored = split.pixels()
    colour = np.ascontiguousarray(stored[:, :, : stored.shape[2] - 1] if stored.shape[2] in (2, 4) else stored)
    del stored
    picture = compactor._Picture(colour, 2)
    del colour
    work = compactor._Compaction(
        original, policy, gate.thresholds("small"), split, picture, 2, _infer, lambda: None, b""
    )
    network = NetworkRef("doubling", b"doubling", 2) if scale == 2 else None
    with contextlib.suppress(formats.DoesNotFit):
        work._result(compactor._Way(scale, "4:4:4", network), 30, speed)


def _infer(_: bytes, pixels: Pixels) -> Pixels:
    return tiles.enlarge(_Doubling(), pixels)


def _now(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    work, width, height = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    kind = sys.argv[4] if len(sys.argv) > 4 else "jpeg"
    speed = int(sys.argv[5]) if len(sys.argv) > 5 else 10
    torch.set_num_threads(1)
    run: Callable[[], object]
    asked = 0
    if work.startswith("rebuild"):
        scale = int(work[-1])
        small = _picture(-(-width // scale), -(-height // scale))
        avif = cells.encode(small, _encode) if cells.is_large(small) else _encode(small)
        recipe = _recipe(width, height, scale)
        del small
        run = partial(reconstruction.rebuild, recipe, avif, _infer)
    elif work.startswith("compact"):
        original = ORIGINALS[kind](_picture(width, height))
        asked = _asked(original)
        run = partial(_compaction, original, int(work[-1]), speed)
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
    if asked:
        print(asked)


if __name__ == "__main__":
    main()
