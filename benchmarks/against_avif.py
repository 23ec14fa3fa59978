"""Whole blobs against plain AVIF, at the same score and at the same promises, picture by picture and preset by preset.

    python -m benchmarks.against_avif FOLDER… --keep FILE [--presets …] [--patience normal] [--network lite] [--table]
        [--speed N] [--sampling 4:4:4 4:2:0]

Each picture is compacted as a store does it; what counts is the blob as it would lie there, all boxes and the padding
included. The peer is the AVIF file that Pillow writes of the same picture at full resolution, with the speed of that
patience (or ``--speed``) and tuned for SSIMULACRA2: of each chroma sampling the lowest of libaom's 64 qualities that
scores what the view scores or more, and the one below it; log bytes are interpolated between the two, to the view's own
score. The fewest bytes of all samplings are the peer's (``--sampling 4:4:4``: of that one only, as everywhere else).

At an equal score, AVIF may have lost a part of the picture, or a colour, that the preset promises to keep. So there is
a second comparison, with the lowest quality that passes the preset's whole gate as the blob's view had to. There, both
have levels to choose from, and nothing is interpolated.

Results and the points of AVIF's curves are kept in FILE (JSON lines) at once: stop it when you like, and the same
command goes on; AVIF's points serve every version of esrfs. At the end, or at once with ``--table`` (of what there is),
it prints Markdown.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image, features

from benchmarks import family
from benchmarks.machine import describe
from esrfs import formats
from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Scores
from esrfs.compaction import compactor, gate, planner
from esrfs.compaction.outcome import PATIENCES, PRESETS, Policy, Verdict
from esrfs.evaluate import grid
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.reconstruction import Pixels

_KEY = bytes(32)
"""The store's, for references and the footer: without one a recipe is shorter than in a store."""
_ENCODER_THREADS = 8
"""libaom gives other bytes with one thread than with several; compaction has this many."""
_ALIKE = 1.01
"""Up to here a blob counts as no larger."""
_BANDS = ((40, 50), (50, 60), (60, 70), (70, 80), (80, 90))
_NONE = "–"
_FURTHER = 4
"""Levels that the search for AVIF's quality goes on by where nothing tells better."""


class Point(msgspec.Struct, frozen=True, tag="avif"):
    """Plain AVIF of one picture."""

    sha256: str
    """Of the picture's file."""
    made_by: str
    """Encoder and its settings."""
    sampling: str
    level: int
    bytes: int
    scores: Scores


class Stored(msgspec.Struct, frozen=True, tag="blob", kw_only=True):
    """One picture at one preset."""

    sha256: str
    made_by: str
    """Code, networks and policy."""
    preset: str
    name: str
    how: str
    """``÷2 q60 4:4:4``, or why there is no blob."""
    picture: int = 0
    """Bytes of the AVIF in it."""
    blob: int = 0
    score: float = 0.0


Line = Point | Stored


@dataclass(frozen=True)
class Row:
    """What is printed of one blob; bytes of plain AVIF, NaN where it doesn't get there."""

    stored: Stored
    alike: float = math.nan
    """At the view's score."""
    passing: float = math.nan
    """That passes the same gate."""

    @property
    def ratios(self) -> list[tuple[float, float]]:
        """What is set against what: the blob, its picture, and the blob again."""
        return [(self.stored.blob, self.alike), (self.stored.picture, self.alike), (self.stored.blob, self.passing)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, required=True, help="results and AVIF's curves, JSON lines")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--patience", choices=PATIENCES, default="normal")
    parser.add_argument("--network", default="lite")
    parser.add_argument("--speed", type=int, help="of the peer; that of the patience unless given")
    parser.add_argument("--sampling", nargs="+", choices=("4:4:4", "4:2:0"), default=["4:4:4", "4:2:0"])
    parser.add_argument("--table", action="store_true", help="compact and encode nothing; print what there is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy(patience=arguments.patience, network=arguments.network)
    references, infer = family.ready(policy.network)
    shown = " ".join(reference.sha256.hex()[:16] for reference in references)
    made_by = f"{grid.own_version()}, {policy.patience}, {policy.network} {shown}"
    speed = arguments.speed or planner.PATIENCE[policy.patience].speed
    peer_by = f"libavif {features.version('avif')}, aom, speed {speed}, tune=ssimulacra2"
    kept = _read(arguments.keep)
    stored = {(line.sha256, line.preset): line for line in kept if isinstance(line, Stored) and line.made_by == made_by}
    points = [line for line in kept if isinstance(line, Point) and line.made_by == peer_by]
    files = {path: path.read_bytes() for folder in arguments.folders for path in sorted(folder.iterdir())}
    pictures = {hashlib.sha256(data).hexdigest(): data for path, data in files.items() if path.suffix == ".png"}
    names = {hashlib.sha256(data).hexdigest(): f"{path.parent.name}/{path.stem}" for path, data in files.items()}
    rows: list[Row] = []
    with arguments.keep.open("ab") as out:

        def keep(line: Line) -> None:
            out.write(msgspec.json.encode(line) + b"\n")
            out.flush()

        for sha256, data in pictures.items():
            peers = [
                _Peer(
                    data,
                    sha256,
                    peer_by,
                    sampling,
                    speed,
                    None if arguments.table else keep,
                    {point.level: point for point in points if (point.sha256, point.sampling) == (sha256, sampling)},
                )
                for sampling in arguments.sampling
            ]
            for preset in arguments.presets:
                line = stored.get((sha256, preset))
                if line is None and not arguments.table:
                    line = _compact(data, msgspec.structs.replace(policy, preset=preset), references, infer)
                    line = msgspec.structs.replace(line, sha256=sha256, made_by=made_by, name=names[sha256])
                    keep(line)
                if line is None:
                    continue
                row = Row(line)
                if line.blob:
                    row = Row(
                        line,
                        _fewest(peer.bytes_at(line.score) for peer in peers),
                        _fewest(peer.bytes_that_pass(preset) for peer in peers),
                    )
                rows.append(row)
                shown = f"{_shown(line.blob / row.alike)}, {_shown(line.blob / row.passing)}"
                print(f"{line.name} {preset}: {line.how}, {shown}", file=sys.stderr, flush=True)
    print(f"esrfs {made_by}; {peer_by}, {' or '.join(arguments.sampling)}; {describe()}\n")
    _print_pictures(rows)
    _print_means(rows, arguments.presets)


def _read(path: Path) -> list[Line]:
    """A line that a crash cut short is as if it were not there."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            lines.append(msgspec.json.decode(line, type=Line))
        except msgspec.DecodeError:
            continue
    return lines


def _compact(data: bytes, policy: Policy, references: list[compactor.NetworkRef], infer: compactor.Infer) -> Stored:
    outcome = compactor.compact(data, policy, references, infer, reference_key=_KEY)
    blank = Stored(sha256="", made_by="", preset=policy.preset, name="", how=outcome.message)
    if outcome.verdict is not Verdict.COMPACTED:
        return blank
    recipe = recipe_format.decode(outcome.recipe)
    return msgspec.structs.replace(
        blank,
        how=f"÷{recipe.scale} q{recipe.quality} {recipe.subsampling}",
        picture=len(outcome.avif),
        blob=len(container.pack(outcome.avif, outcome.recipe, bytes(container.STORE_ID_BYTES), _KEY)),
        score=recipe.scores.ssimulacra2,
    )


@dataclass
class _Peer:
    """Plain AVIF of one picture, in one chroma sampling."""

    data: bytes
    sha256: str
    made_by: str
    sampling: str
    speed: int
    keep: Callable[[Point], None] | None
    """None: encode nothing, take the points that there are."""
    points: dict[int, Point]
    """By level."""

    def bytes_at(self, score: float) -> float | None:
        """None where AVIF doesn't get there, or it takes an encode that is not wanted."""
        high = self._lowest(score)
        if high is None or high - 1 not in self.points:
            return None
        worse, better = self.points[high - 1], self.points[high]
        share = (score - self._score(high - 1)) / (self._score(high) - self._score(high - 1))
        return float(worse.bytes ** (1 - share) * better.bytes**share)

    def bytes_that_pass(self, preset: str) -> int | None:
        """Of the lowest quality whose scores pass the gate; None as above."""
        wanted = gate.thresholds(preset)
        lowest = self._lowest(wanted.whole)
        if lowest is None:
            return None
        for level in range(lowest, planner.LEVELS - 1):  # the last is lossless, and refuses to be tuned
            if level not in self.points and self.keep is None:
                return None
            if not gate.objection(self._at(level).scores, wanted):
                return self._at(level).bytes
        return None

    def _lowest(self, score: float) -> int | None:
        """The lowest level that scores so much."""
        low, high = -1, planner.LEVELS - 1
        while high - low > 1:
            level = self._between(low, high, score)
            if level not in self.points and self.keep is None:
                return None
            if self._at(level).scores.ssimulacra2 < score:
                low = level
            else:
                high = level
        return high if high in self.points else None

    def _between(self, low: int, high: int, score: float) -> int:
        """The level to look at next, above ``low`` and below ``high``."""
        known = sorted(self.points)
        worse = [level for level in known if low < level < high and self._score(level) < score]
        under = max(worse, default=None)
        if under is not None:
            return under
        over = min((level for level in known if low < level < high), default=None)
        if over is not None:
            return over
        if low in self.points and high in self.points:
            worse, better = self._score(low), self._score(high)
            guess = low + round((high - low) * (score - worse) / max(better - worse, 0.1))
        elif low in self.points or high in self.points:
            one = low if low in self.points else high
            guess = one + round((score - self._score(one)) / planner.POINTS_PER_LEVEL)
            guess = min(max(guess, one - _FURTHER), one + _FURTHER)
        else:
            guess = planner.LEVELS // 2
        return min(max(guess, low + 1), high - 1)

    def _score(self, level: int) -> float:
        return self.points[level].scores.ssimulacra2

    def _at(self, level: int) -> Point:
        if level not in self.points:
            out = io.BytesIO()
            self._image.save(
                out,
                "AVIF",
                quality=planner.quality(level),
                speed=self.speed,
                subsampling=self.sampling,
                codec="aom",
                max_threads=_ENCODER_THREADS,
                autotiling=False,
                advanced={"tune": "ssimulacra2"},
            )
            with Image.open(io.BytesIO(out.getvalue())) as decoded:
                scores = gate.measure(self._reference, self._pixels, np.asarray(decoded.convert("RGB")))
            size = len(out.getvalue())
            point = Point(self.sha256, self.made_by, self.sampling, level, size, scores)
            self.points[level] = point
            assert self.keep is not None
            self.keep(point)
        return self.points[level]

    @functools.cached_property
    def _pixels(self) -> Pixels:
        return np.ascontiguousarray(formats.decode(self.data, 300)[:, :, :3])

    @functools.cached_property
    def _image(self) -> Image.Image:
        return Image.fromarray(self._pixels)

    @functools.cached_property
    def _reference(self) -> Reference:
        return Reference(self._pixels, threads=len(os.sched_getaffinity(0)))


def _fewest(sizes: Iterable[float | None]) -> float:
    return min((size for size in sizes if size is not None), default=math.nan)


def _print_pictures(rows: Sequence[Row]) -> None:
    heads = ["picture", "preset", "how", "score", "blob, bytes", "AVIF, same score", "AVIF, same promises"]
    print(f"| {' | '.join([*heads, 'blob : first', 'its picture : first', 'blob : second'])} |")
    print("|---" * 10 + "|")
    for row in rows:
        line = row.stored
        cells = [line.name, line.preset, line.how]
        if line.blob:
            cells += [f"{line.score:.1f}", f"{line.blob:,}", _shown(row.alike, ",.0f"), _shown(row.passing, ",.0f")]
            cells += [_shown(size / other) for size, other in row.ratios]
        print(f"| {' | '.join(cells)} |")


def _print_means(rows: Sequence[Row], presets: Sequence[str]) -> None:
    known = [row for row in rows if row.stored.blob]
    groups: dict[str, list[Row]] = {preset: [row for row in known if row.stored.preset == preset] for preset in presets}
    for low, high in _BANDS:
        groups[f"scores {low} to {high}"] = [row for row in known if low <= row.stored.score < high]
    heads = ["", "blobs", "of AVIF of the same score", "its picture", "larger", "largest"]
    print(f"\n| {' | '.join([*heads, 'of AVIF that passes', 'larger', 'largest', 'AVIF does not pass'])} |")
    print("|---" * 10 + "|")
    for folder in sorted({row.stored.name.split("/")[0] for row in known}):
        for label, group in groups.items():
            chosen = [row for row in group if row.stored.name.startswith(f"{folder}/")]
            if not chosen:
                continue
            ratios = [[size / other for size, other in row.ratios] for row in chosen]
            alike, picture, passing = zip(*ratios, strict=True)
            missing = sum(map(math.isnan, passing))
            cells = [f"{folder}, {label}", str(len(chosen)), _mean(alike), _mean(picture), *_largest(alike)]
            print(f"| {' | '.join([*cells, _mean(passing), *_largest(passing), str(missing)])} |")
    print(f"\nMeans are geometric. Larger: by more than {_ALIKE - 1:.0%}.")


def _mean(ratios: Sequence[float]) -> str:
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return f"{statistics.geometric_mean(known):.3f}" if known else _NONE


def _largest(ratios: Sequence[float]) -> list[str]:
    """How many are larger, the largest."""
    larger = sum(ratio > _ALIKE for ratio in ratios)
    return [str(larger), _shown(max((ratio for ratio in ratios if not math.isnan(ratio)), default=math.nan))]


def _shown(value: float, how: str = ".3f") -> str:
    return _NONE if math.isnan(value) else format(value, how)


if __name__ == "__main__":
    main()
