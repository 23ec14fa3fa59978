"""Run as a program: what one piece of work takes at most, in bytes, besides the pictures that it is given.

python -m tests.peaks WORK WIDTH HEIGHT [KIND] [--threads N]

WORK:
rebuild2, rebuild1  a reconstruction at that scale, of a KIND (default jpeg), by a network that does no arithmetic
compact             attempts on a whole picture of a KIND, as a store makes them: at half size by the networks that are
                    shipped, then at full size, twice each, by N threads (default 2); libaom's speed is 10. A view that
                    does not fit has been tried all the same.
lossless            a JPEG as a JPEG XL, and back
metric              SSIMULACRA2

A second line tells what compaction asks for, where it is one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import family
from esrfs import formats, reconstruction
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Recipe, Scores
from esrfs.compaction import compactor, gate, lossless, planner
from esrfs.compaction.encoder import encode_avif
from esrfs.compaction.outcome import Policy
from esrfs.compaction.planner import Curve, Trial
from esrfs.engine import tiles
from esrfs.engine.lanes import Crossing
from esrfs.engine.protocol import Lane
from esrfs.formats.samples import as_bytes
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
        return as_bytes(given).repeat(2, axis=1).repeat(2, axis=2)


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


def _needed(original: bytes, threads: int) -> int:
    return compactor.memory(formats.split(original, Policy().max_megapixels), len(original), threads)


def _compaction(original: bytes, threads: int) -> None:
    policy = Policy(preset="small", min_saving=0)
    references, networks = family.load(policy.network)
    job = Crossing().enter(1, Lane.INTERACTIVE)
    spread = partial(tiles.Crew(threads).spread, job)

    def infer(sha256: bytes, pixels: Pixels) -> Pixels:
        return tiles.enlarge(networks[sha256], pixels, spread)

    split = formats.split(original, policy.max_megapixels)
    stored = split.pixels()
    colour = np.ascontiguousarray(stored[:, :, : stored.shape[2] - 1] if stored.shape[2] in (2, 4) else stored)
    opacity = None if split.kind == "jpeg" else compactor._opacity(formats.decode(original, policy.max_megapixels))
    del stored
    picture = compactor._Picture(colour, threads)
    del colour
    work = compactor._Compaction(
        original, policy, gate.thresholds("small"), split, picture, opacity, threads, infer, job.checkpoint, b""
    )
    patience = replace(planner.PATIENCE["normal"], passes=2, speed=10, content=-math.inf)
    curve = Curve((Trial(30, 0.0, 1000),))
    (doubling,) = references
    outcomes = []
    for way in (compactor._Way(2, "4:4:4", doubling, doubling.shrinker), compactor._Way(1, "4:4:4")):
        with contextlib.suppress(formats.DoesNotFit):
            outcomes.append(work._carry_out(way, curve, patience, math.inf))


def _rebuilding(width: int, height: int, scale: int, kind: str) -> Callable[[], object]:
    small = _picture(-(-width // scale), -(-height // scale))
    avif = encode_avif(small, 50, speed=10)
    del small
    fitted = _fitted(width, height, kind)
    recipe = Recipe(
        width=width,
        height=height,
        original_size=len(fitted.scan) + recipe_format.length(fitted.prefix) + recipe_format.length(fitted.suffix),
        sha256_original=bytes(32),
        sha256_view=bytes(32),
        preset="small",
        scale=scale,
        network="" if scale == 1 else "doubling",
        network_sha256=b"" if scale == 1 else b"doubling",
        quality=50,
        coding=fitted.coding,
        prefix=fitted.prefix,
        scan_length=len(fitted.scan),
        suffix=fitted.suffix,
        encoder="",
        scores=Scores(ssimulacra2=60, worst_tile=50, psnr=30),
        created_by="tests",
    )
    network: tiles.Network = _Doubling()
    return partial(reconstruction.rebuild, recipe, avif, lambda _, pixels: tiles.enlarge(network, pixels))


def _fitted(width: int, height: int, kind: str) -> formats.FittedView:
    """How a view is coded; there is room for it."""
    split = formats.split(ORIGINALS[kind](_picture(width, height)), Policy().max_megapixels)
    return formats.fit_view(split, split.pixels())


def _warm_up() -> None:
    """Load what an engine at rest has loaded."""
    few = np.zeros((300, 300, 3), np.uint8)
    Reference(few).compare(few)
    references, networks = family.load(Policy().network)
    for reference in references:
        networks[reference.sha256](few[None, :64, :64])


def _now(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("rebuild2", "rebuild1", "compact", "lossless", "metric"))
    parser.add_argument("width", type=int)
    parser.add_argument("height", type=int)
    parser.add_argument("kind", choices=ORIGINALS, default="jpeg", nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run: Callable[[], object]
    needed = 0
    if asked.work.startswith("rebuild"):
        run = _rebuilding(asked.width, asked.height, int(asked.work[-1]), asked.kind)
    elif asked.work == "metric":
        pixels = np.asarray(_picture(asked.width, asked.height))
        view = np.clip(pixels, 3, 252)
        run = partial(Reference(pixels, threads=asked.threads).compare, view)
    else:
        original = ORIGINALS[asked.kind](_picture(asked.width, asked.height))
        needed = _needed(original, asked.threads)
        run = partial(_compaction, original, asked.threads)
        if asked.work == "lossless":
            run = partial(lossless.compact, original, Policy())
    _warm_up()
    ctypes.CDLL(None).malloc_trim(0)  # what the preparations left must not hide anything
    Path("/proc/self/clear_refs").write_text("5")
    before = _now("VmRSS")
    run()
    print(_now("VmHWM") - before)
    if needed:
        print(needed)


if __name__ == "__main__":
    main()
