"""One trial: a picture stored in one way at one quality, brought back in every way to grow it, timed and measured.

Runs in worker processes, one thread each. A worker keeps the picture and the networks of its last trials.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from esrfs import formats, reconstruction
from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import JpegXlCoding
from esrfs.compaction import compactor, shrinking
from esrfs.compaction.outcome import Policy, Verdict
from esrfs.engine import tiles
from esrfs.evaluate import codecs
from esrfs.evaluate.measures import Original
from esrfs.evaluate.results import Result, Way
from esrfs.formats.samples import as_bytes
from esrfs.formats.view import Pixels, Samples
from esrfs.networks import loading, registry

T = TypeVar("T")

ESRFS = "esrfs"
SHRINKS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
}
"""Pillow's, which are antialiased."""
GROWS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
MAX_MEGAPIXELS = 200.0
_PR_SET_PDEATHSIG = 1
SMALLEST_SIDE = 64
_KEY = bytes(32)
"""A store's, by which its views refer to their blobs: the recipe holds that, too."""


class CodecFailedError(Exception):
    """For people: which picture a codec can't write."""


@dataclass(frozen=True)
class Picture:
    """A file that can be evaluated."""

    path: Path
    name: str
    """Below the folder that is evaluated."""
    sha256: str


@dataclass(frozen=True)
class Trial:
    """One encoding; the results are those of every ``grows``, each with what it is made by."""

    picture: Picture
    codec: str
    scale: int
    shrink: str
    setting: str
    grows: tuple[tuple[str, str], ...]
    """(way to grow, Result.made_by)"""
    measures: tuple[str, ...]


def prepare_process() -> None:
    """For worker processes: trials run side by side, so each is to keep to one core, out of the way of other work."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # the command may be killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then ends this process
    torch.set_num_threads(1)
    os.nice(5)


def examine(path: Path, name: str) -> Picture | str:
    """What can be evaluated, or why it can't be, for people."""
    try:
        data = path.read_bytes()
        pixels = formats.decode(data, MAX_MEGAPIXELS)
    except OSError as error:
        return f"can't be read: {error.strerror or error}"
    except formats.Unsupported as error:
        return error.message
    if min(pixels.shape[:2]) < SMALLEST_SIDE:
        return f"{pixels.shape[1]} × {pixels.shape[0]} pixels are too few to measure"
    return Picture(path, name, hashlib.sha256(data).hexdigest())


def run(trial: Trial) -> list[Result]:
    """Raises OSError when the picture or a network can't be read any more, CodecFailedError."""
    return _compact(trial) if trial.codec == ESRFS else _encode(trial)


@functools.lru_cache(maxsize=1)
def _load(picture: Picture) -> tuple[bytes, Original]:
    data = picture.path.read_bytes()
    return data, Original(as_rgb(formats.decode(data, MAX_MEGAPIXELS)))


def as_rgb(pixels: Pixels) -> Pixels:
    """H×W×3 of what ``formats.decode`` gives; transparency is left out."""
    colour = pixels[:, :, :1] if pixels.shape[2] < 3 else pixels[:, :, :3]
    return np.ascontiguousarray(np.broadcast_to(colour, (*pixels.shape[:2], 3)))


@functools.lru_cache(maxsize=8)
def _network(name: str) -> tuple[bytes, loading.Network]:
    data = registry.find(name).read_bytes()
    return hashlib.sha256(data).digest(), loading.load(data, name=name)


def shrunk(pixels: Pixels, scale: int, kernel: str) -> Pixels:
    """ceil(H / scale) × ceil(W / scale) × 3; a side that ``scale`` doesn't divide is continued by its last pixels."""
    if scale == 1:
        return pixels
    padded = shrinking.continued(pixels, scale)
    size = (padded.shape[1] // scale, padded.shape[0] // scale)
    return np.asarray(Image.fromarray(padded).resize(size, SHRINKS[kernel]))


def grown(small: Samples, scale: int, how: str, height: int, width: int) -> Pixels:
    """height × width × 3; ``how`` is empty (only at scale 1), a kernel of ``GROWS`` or a network's name."""
    if not how:
        large = as_bytes(small)
    elif how in GROWS:
        size = (small.shape[1] * scale, small.shape[0] * scale)
        large = np.asarray(Image.fromarray(as_bytes(small)).resize(size, GROWS[how]))
    else:
        large = tiles.enlarge(_network(how)[1], small)
    return np.ascontiguousarray(large[:height, :width])


def _encode(trial: Trial) -> list[Result]:
    data, original = _load(trial.picture)
    height, width = original.pixels.shape[:2]
    codec = codecs.load(trial.codec)
    quality = int(trial.setting)
    try:
        encoded, store_seconds = _timed(
            lambda: codec.encode(shrunk(original.pixels, trial.scale, trial.shrink), quality)
        )
        small, decode_seconds = _timed(functools.partial(codec.decode, encoded))
    except (OSError, ValueError, RuntimeError) as error:  # too wide for it, mostly
        raise CodecFailedError(
            f"{trial.picture.name} can't be stored as {codecs.LABELS[codec.name]}: {error}"
        ) from error
    results = []
    for grow, made_by in trial.grows:
        if grow and grow not in GROWS:
            _network(grow)  # loading it is not part of the time
        version, grow_seconds = _timed(functools.partial(grown, small, trial.scale, grow, height, width))
        results.append(
            Result(
                picture=trial.picture.name,
                sha256=trial.picture.sha256,
                way=Way(trial.codec, trial.scale, trial.shrink, grow),
                setting=trial.setting,
                made_by=made_by,
                width=width,
                height=height,
                original_bytes=len(data),
                kind=formats.identify(data),
                bytes=len(encoded),
                measures=original.measure(version, trial.measures),
                store_seconds=store_seconds,
                restore_seconds=decode_seconds + grow_seconds,
            )
        )
    return results


def version_of(trial: Trial, grow: str) -> Pixels:
    """The picture as it comes back, H×W×3 RGB; for showing. Not for esrfs."""
    _, original = _load(trial.picture)
    codec = codecs.load(trial.codec)
    small = codec.decode(codec.encode(shrunk(original.pixels, trial.scale, trial.shrink), int(trial.setting)))
    return grown(small, trial.scale, grow, *original.pixels.shape[:2])


def original_of(picture: Picture) -> Pixels:
    return _load(picture)[1].pixels


def _compact(trial: Trial) -> list[Result]:
    """The picture's file through compaction, to a blob, and back to a view."""
    data, original = _load(trial.picture)
    height, width = original.pixels.shape[:2]
    ((name, made_by),) = trial.grows
    networks = {member: _network(member) for member in registry.family(name)}
    by_sha256 = dict(networks.values())

    def infer(sha256: bytes, pixels: Pixels) -> Pixels:
        return tiles.enlarge(by_sha256[sha256], pixels)

    references = compactor.references(
        {member: (sha256, network.spec) for member, (sha256, network) in networks.items()}
    )
    policy = Policy(preset=trial.setting, network=name, max_megapixels=MAX_MEGAPIXELS)
    outcome, store_seconds = _timed(
        lambda: compactor.compact(data, policy, references, infer, reference_key=_KEY, threads=1)
    )
    size, note, measured, restore_seconds = None, f"{outcome.reason}: {outcome.message}", {}, 0.0
    if outcome.verdict == Verdict.COMPACTED:
        recipe = recipe_format.decode(outcome.recipe)
        size = len(container.pack(outcome.avif, outcome.recipe, bytes(16), bytes(32)))
        view, restore_seconds = _timed(lambda: reconstruction.rebuild(recipe, outcome.avif, infer))
        measured = original.measure(as_rgb(formats.decode(view, MAX_MEGAPIXELS)), trial.measures)
        if isinstance(recipe.coding, JpegXlCoding):
            note = "without loss"
        else:
            note = f"scale {recipe.scale}, quality {recipe.quality}" + (f", {recipe.network}" if recipe.network else "")
    return [
        Result(
            picture=trial.picture.name,
            sha256=trial.picture.sha256,
            way=Way(ESRFS, 0, "", name),
            setting=trial.setting,
            made_by=made_by,
            width=width,
            height=height,
            original_bytes=len(data),
            kind=formats.identify(data),
            bytes=size,
            measures=measured,
            store_seconds=store_seconds,
            restore_seconds=restore_seconds,
            note=note,
        )
    ]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun
