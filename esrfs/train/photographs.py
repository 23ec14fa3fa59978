"""The photographs to learn from, and random patches of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from esrfs.compaction import refine
from esrfs.engine import room
from esrfs.formats import samples
from esrfs.formats.pixels import DECODE_ERRORS
from esrfs.formats.view import Pixels, Samples
from esrfs.networks import loading
from esrfs.train import real_esrgan, store_degradation
from esrfs.train.settings import RealEsrganDegradation, Stage, Training, TrainingError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class Photograph(msgspec.Struct, frozen=True):
    content: bytes
    """SHA-256 of the pixels."""
    full: Pixels
    """H×W×3, RGB; H and W multiples of the scale."""
    small: tuple[Samples, ...]
    """Versions of the downscaled picture, (H/scale)×(W/scale)×3: clean first, then coded ones. Empty where the
    degradation is drawn anew for each patch."""
    levels: tuple[int, ...] = ()
    """The codec's, of the coded versions."""
    noise: tuple[float, ...] = ()
    """What the codec changed in them: root mean square, shades."""


class Batch(msgspec.Struct, frozen=True):
    small: Samples
    """N×patch×patch×3; for a shrinker as ``compaction.shrinking.pack`` packs it."""
    full: Pixels
    """N×(patch·scale)×(patch·scale)×3."""
    error: npt.NDArray[np.float32] | None = None
    """For a shrinker: what the codec changed, shades, N×patch×patch×3."""
    sigma: npt.NDArray[np.float32] | None = None
    """For a shrinker: its root mean square over the whole photograph, N."""


def find(folder: Path) -> list[Path]:
    """Every picture under ``folder``, in the same order on every filesystem. Raises TrainingError if there is none,
    OSError for a folder that can't be read."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave it out, and say nothing

    names = (Path(above, name) for above, _, files in os.walk(folder, onerror=refuse) for name in files)
    found = sorted(path for path in names if path.suffix.lower() in SUFFIXES)
    if not found:
        raise TrainingError(f"{folder} holds no pictures to train on ({', '.join(sorted(SUFFIXES))})")
    return found


def set_aside(paths: Sequence[Path], count: int) -> tuple[list[Path], list[Path]]:
    """``count`` photographs to measure with and the rest to learn from. By the hash of the names, so that adding
    photographs later moves few of them from one side to the other. At least one stays to learn from."""
    count = min(count, len(paths) - 1)
    by_hash = sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest())
    aside = set(by_hash[:count])
    return [path for path in paths if path in aside], [path for path in paths if path not in aside]


def check(learn: Sequence[Path], aside: Sequence[Path], training: Training) -> None:
    """Whether patches can be cut out of these, and all of them be held in memory, before anything is made of them.
    Looks at the files' headers only. Raises TrainingError."""
    patch = max(stage.patch for stage in training.stages) * training.scale
    # Of a small picture's samples: the clean version's have 1 byte, the coded ones' 2.
    versions = 0 if isinstance(training.degradation, RealEsrganDegradation) else 2 * training.degradation.versions + 1
    pixels = 0
    for number, path in enumerate((*learn, *aside)):
        with _opened(path) as picture:
            width, height = _enlarged_size(picture.size, training)
        pixels += width * height
        if number < len(learn) and min(width, height) < patch:
            raise TrainingError(
                f"{path} has only {width} × {height} pixels, and patches are {patch} wide; take it out of the folder, "
                "or make `patch` smaller"
            )
    needed, there = 3 * pixels * (1 + versions / training.scale**2), room.available()
    if needed > there:
        raise TrainingError(
            f"{len(learn) + len(aside)} photographs of {pixels / 1e6:,.0f} megapixels take {needed / 1e9:.1f} GB of "
            f"memory, and there are {there / 1e9:.1f}; give fewer, or parts of them (a megapixel each is plenty)"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Raises TrainingError when the file is no picture, or what the block does shows that it is damaged."""
    try:
        with Image.open(path) as picture:
            yield picture
    except DECODE_ERRORS as error:
        raise TrainingError(f"{path} can't be read as a picture ({error}); take it out of the folder") from error


def read_rgb(path: Path) -> Pixels:
    """Raises TrainingError when the file is no picture."""
    with _opened(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _enlarged_size(size: tuple[int, int], training: Training) -> tuple[int, int]:
    factor = 1.0 if isinstance(training.degradation, RealEsrganDegradation) else training.degradation.enlarged
    return round(size[0] * factor), round(size[1] * factor)


def _enlarged(pixels: Pixels, training: Training) -> Pixels:
    size = pixels.shape[1], pixels.shape[0]
    larger = _enlarged_size(size, training)
    return pixels if larger == size else np.asarray(Image.fromarray(pixels).resize(larger, Image.Resampling.BICUBIC))


def load(
    paths: Sequence[Path],
    training: Training,
    cache: Path,
    progress: Callable[[], None] = lambda: None,
    shrinker: loading.Network | None = None,
) -> list[Photograph]:
    """Read photographs and make their small versions (with the degradation's ``shrinker``); the same for the same
    seed. What AVIF makes of a picture is kept in ``cache`` and not made again. ``progress`` is called once for each."""

    def one(path: Path) -> Photograph:
        scale = training.scale
        full = _enlarged(read_rgb(path), training)
        full = np.ascontiguousarray(full[: full.shape[0] // scale * scale, : full.shape[1] // scale * scale])
        content = hashlib.sha256(full.tobytes()).digest()
        small: tuple[Samples, ...] = ()
        levels: tuple[int, ...] = ()
        noise: tuple[float, ...] = ()
        if not isinstance(training.degradation, RealEsrganDegradation):
            # By the picture's content: the versions of one don't depend on which others are there.
            levels = store_degradation.draw_levels(content, scale, training.degradation, seed=training.seed)
            small = store_degradation.versions(full, scale, levels, cache, shrinker)
            noise = tuple(refine.codec_noise(samples.as_bytes(small[0]), coded) for coded in small[1:])
        progress()
        return Photograph(content, full, small, levels, noise)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, paths))


class Patch(msgspec.Struct, frozen=True):
    """A place in a photograph, small pixels, and how it is turned."""

    photograph: Photograph
    version: int
    """Which of its small ones."""
    top: int
    left: int
    side: int
    turn: int
    mirror: bool

    def of(self, pixels: Samples, scale: int = 1) -> Samples:
        """Cut out of a picture that is ``scale`` times as large as the small one."""
        top, left, side = self.top * scale, self.left * scale, self.side * scale
        return turned(pixels[top : top + side, left : left + side], self.turn, self.mirror)


def draw_patch(
    photographs: Sequence[Photograph],
    training: Training,
    stage: Stage,
    rng: np.random.Generator,
    *,
    first: int = 0,
    grid: int = 1,
) -> Patch:
    """A random one, of a random version from ``first`` on, at a multiple of ``grid``. What is drawn in which order is
    part of what makes a training repeatable."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    version = int(rng.integers(first, max(first + 1, len(photograph.small))))
    top, left = (
        int(rng.integers((side // training.scale - stage.patch) // grid + 1)) * grid
        for side in photograph.full.shape[:2]
    )
    turn, mirror = int(rng.integers(4)), bool(rng.integers(2))
    return Patch(photograph, version, top, left, stage.patch, turn, mirror)


def draw_batch(photographs: Sequence[Photograph], training: Training, stage: Stage, rng: np.random.Generator) -> Batch:
    """Random patches of random photographs, flipped and turned, and what the degradation makes of them."""
    scale, patch = training.scale, stage.patch
    small = np.empty((stage.batch, patch, patch, 3), np.uint16)
    full = np.empty((stage.batch, patch * scale, patch * scale, 3), np.uint8)
    for index in range(stage.batch):
        drawn = draw_patch(photographs, training, stage, rng)
        full[index] = drawn.of(drawn.photograph.full, scale)
        if isinstance(training.degradation, RealEsrganDegradation):
            degraded: Samples = real_esrgan.degrade(full[index], scale, training.degradation.second_order, rng)
        else:
            degraded = drawn.of(drawn.photograph.small[drawn.version])
        small[index] = samples.as_16_bits(degraded)
    return Batch(small, full)


def turned(pixels: Samples, turn: int, mirror: bool) -> Samples:
    """By ``turn`` right angles, then mirrored."""
    result = np.rot90(pixels, turn)
    return result[:, ::-1] if mirror else result
