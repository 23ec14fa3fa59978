"""A whole picture through a network, tile by tile: memory stays that of a few tiles, and no tile leaves a trace.

Each tile is given the pixels around it that its output depends on (the network's margin), and nothing where the
picture ends, so that the network's own padding falls where it would fall for the whole. In fp32 on a CPU the result is
bit-identical to one forward of the whole picture.

Tiles of all jobs are run by one crew of threads, one tile and one OpenMP thread each: as fast as OpenMP's own threads
on an idle machine, and much less slowed on a busy one (DESIGN 10).
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from esrfs import formats
from esrfs.engine.lanes import Cancelled, Running
from esrfs.engine.protocol import Lane
from esrfs.formats.view import Pixels, Samples
from esrfs.networks.spread import Spread, in_turn

TILE = 256
"""Input pixels along a tile's side, at most, without its margin. Larger ones fall out of the CPU's caches."""

_NICENESS = 15


class Network(Protocol):
    """As ``networks.loading.Network``."""

    scale: int
    channels: int
    margin: int
    multiple: int

    def __call__(self, tiles: Samples) -> Pixels: ...


@dataclass(frozen=True)
class Tile:
    """A tile of the input, and the part of the input that its output depends on; all in input pixels, ends
    exclusive."""

    top: int
    bottom: int
    left: int
    right: int
    outer_top: int
    outer_bottom: int
    outer_left: int
    outer_right: int


def lay_out(height: int, width: int, margin: int, multiple: int, size: int = TILE) -> list[Tile]:
    """Cover height × width with tiles of nearly equal sides of at most ``size``; all but the last end at multiples of
    ``multiple``, outer edges inside the picture too."""
    margin = math.ceil(margin / multiple) * multiple
    tiles = []
    for top, bottom in _spans(height, size, multiple):
        for left, right in _spans(width, size, multiple):
            outer = (
                max(0, top - margin),
                min(height, bottom + margin),
                max(0, left - margin),
                min(width, right + margin),
            )
            tiles.append(Tile(top, bottom, left, right, *outer))
    return tiles


def _spans(length: int, size: int, multiple: int) -> list[tuple[int, int]]:
    count = math.ceil(length / size)
    edges = sorted({min(length, round(i * length / count / multiple) * multiple) for i in range(count)} | {length})
    return list(itertools.pairwise(edges))


def enlarge(network: Network, pixels: Samples, spread: Spread = in_turn, size: int = TILE) -> Pixels:
    """H×W×channels uint8 or uint16 (RGB, for all but shrinkers) → (H·scale)×(W·scale)×3 uint8, on a
    ``formats.canvas``.

    Raises ValueError for another shape or type, and whatever the network or ``spread`` raise.
    """
    height, width, channels = pixels.shape
    if channels != network.channels or pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"this network takes H×W×{network.channels} samples, not {pixels.shape} of {pixels.dtype}")
    scale = network.scale
    result = formats.canvas(height * scale, width * scale)

    def run(tile: Tile) -> None:
        source = pixels[None, tile.outer_top : tile.outer_bottom, tile.outer_left : tile.outer_right]
        above, before = (tile.top - tile.outer_top) * scale, (tile.left - tile.outer_left) * scale
        rows, columns = (tile.bottom - tile.top) * scale, (tile.right - tile.left) * scale
        result[tile.top * scale : tile.bottom * scale, tile.left * scale : tile.right * scale] = network(source)[
            0, above : above + rows, before : before + columns
        ]

    def task(tile: Tile) -> Callable[[], None]:
        return lambda: run(tile)

    spread([task(tile) for tile in lay_out(height, width, network.margin, network.multiple, size)])
    return result


@dataclass(eq=False)
class _Batch:
    job: Running
    tasks: Iterator[Callable[[], None]]
    running: int = 0
    drained: bool = False
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class Crew:
    """Threads that run the tiles of all jobs, those of the best lane first; with each lane, the oldest job's.

    Compaction has threads of its own, of low priority also for the machine's other programs; they rest while a
    reader's job is about. All fields are protected by ``_changed``.
    """

    def __init__(self, threads: int) -> None:
        """``threads`` at once: 1 for an accelerator."""
        self.threads = threads
        self._changed = threading.Condition()
        self._batches: list[_Batch] = []
        for number in range(threads):
            for kind, background in (("tiles", False), ("tiles-compaction", True)):
                threading.Thread(target=self._work, args=(background,), name=f"{kind}-{number}", daemon=True).start()

    def spread(self, job: Running, tasks: list[Callable[[], None]]) -> None:
        """A :data:`Spread` for ``job``. Raises Cancelled when the job is."""
        batch = _Batch(job, iter(tasks))
        job.on_lane = self._wake  # other threads may be the ones to go on with it
        with self._changed:
            self._batches.append(batch)
            self._changed.notify_all()
        batch.ended.wait()
        if batch.error is not None:
            raise batch.error

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self, background: bool) -> None:
        if background:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._best(background) is not None)
                batch = self._best(background)
                task = next(batch.tasks, None) if batch is not None else None
                if batch is None:
                    continue
                if task is None:
                    batch.drained = True
                    self._leave_if_ended(batch)
                    continue
                batch.running += 1
            error = None
            try:
                if background:
                    batch.job.checkpoint()
                elif batch.job.cancelled:  # A checkpoint would wait, and hold up the very job it waits for.
                    raise Cancelled
                task()
            except BaseException as caught:
                error = caught
            with self._changed:
                batch.running -= 1
                if error is not None:
                    batch.error = error
                    batch.drained = True
                self._leave_if_ended(batch)

    def _best(self, background: bool) -> _Batch | None:
        """[_changed] The batch whose tile is next."""
        open_batches = [
            batch for batch in self._batches if not batch.drained and (batch.job.lane == Lane.COMPACTION) == background
        ]
        return min(open_batches, key=lambda batch: (batch.job.lane, batch.job.number), default=None)

    def _leave_if_ended(self, batch: _Batch) -> None:
        """[_changed]"""
        if batch.drained and not batch.running and batch in self._batches:
            self._batches.remove(batch)
            batch.ended.set()
