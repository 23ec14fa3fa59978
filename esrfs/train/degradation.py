"""From photographs to training pairs: the store's own way of making a picture small.

A pair is a full-size picture and its downscaled one, as the engine will see it: Pillow's bicubic reduction, either
clean or through AVIF at 4:4:4 as a blob holds it. Pairs are made once, before training: AVIF would cost more than
the network.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class Degradation(msgspec.Struct, frozen=True):
    scale: int
    coded_versions: int
    """AVIF versions of each photograph, beside the clean one: n / (n + 1) of the patches are coded."""
    quality_low: int
    quality_high: int
    """AVIF quality (Pillow's scale) is drawn from this range, both ends included."""
    speed: int = 8


class Pair(msgspec.Struct, frozen=True):
    full: Pixels
    """H×W×3, RGB; H and W multiples of the scale."""
    small: tuple[Pixels, ...]
    """Versions of the downscaled picture, (H/scale)×(W/scale)×3: clean first, then coded ones."""


def find_photographs(folder: Path) -> list[Path]:
    """Every picture under ``folder``, in the same order on every filesystem. Raises ValueError if there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no pictures to train on ({', '.join(sorted(SUFFIXES))})")
    return found


def read_rgb(path: Path) -> Pixels:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def shrink(full: Pixels, scale: int) -> Pixels:
    """Pillow's bicubic reduction; H and W must be multiples of ``scale``."""
    height, width = full.shape[:2]
    return np.asarray(Image.fromarray(full).resize((width // scale, height // scale), Image.Resampling.BICUBIC))


def through_avif(small: Pixels, quality: int, speed: int = 8) -> Pixels:
    """What is left of a picture after AVIF at ``quality``, 4:4:4."""
    buffer = io.BytesIO()
    Image.fromarray(small).save(buffer, "AVIF", quality=quality, speed=speed, subsampling="4:4:4", max_threads=1)
    with Image.open(buffer) as picture:
        return np.asarray(picture.convert("RGB"))


def make_pair(path: Path, degradation: Degradation, rng: np.random.Generator) -> Pair:
    full = read_rgb(path)
    scale = degradation.scale
    full = full[: full.shape[0] // scale * scale, : full.shape[1] // scale * scale]
    clean = shrink(full, scale)
    qualities = rng.integers(degradation.quality_low, degradation.quality_high + 1, degradation.coded_versions)
    return Pair(full, (clean, *(through_avif(clean, int(quality), degradation.speed) for quality in qualities)))


def make_pairs(
    paths: Sequence[Path], degradation: Degradation, seed: int, progress: Callable[[], None] = lambda: None
) -> list[Pair]:
    """Pairs of all photographs, the same for the same seed. ``progress`` is called once for each."""

    def one(item: tuple[int, Path]) -> Pair:
        number, path = item
        pair = make_pair(path, degradation, np.random.default_rng([seed, number]))
        progress()
        return pair

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, enumerate(paths)))


def draw_batch(
    pairs: Sequence[Pair], batch: int, patch: int, scale: int, rng: np.random.Generator
) -> tuple[Pixels, Pixels]:
    """Random patches, flipped and turned: (batch×patch×patch×3 small, batch×(patch·scale)×(patch·scale)×3 full)."""
    small = np.empty((batch, patch, patch, 3), np.uint8)
    full = np.empty((batch, patch * scale, patch * scale, 3), np.uint8)
    for index in range(batch):
        pair = pairs[int(rng.integers(len(pairs)))]
        version = pair.small[int(rng.integers(len(pair.small)))]
        top = int(rng.integers(version.shape[0] - patch + 1))
        left = int(rng.integers(version.shape[1] - patch + 1))
        turn, mirror = int(rng.integers(4)), bool(rng.integers(2))
        size = patch * scale
        for target, source in (
            (small, version[top : top + patch, left : left + patch]),
            (full, pair.full[top * scale : top * scale + size, left * scale : left * scale + size]),
        ):
            turned = np.rot90(source, turn)
            target[index] = turned[:, ::-1] if mirror else turned
    return small, full
