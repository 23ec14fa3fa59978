"""Crops that show, side by side, what equal bytes look like in each way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esrfs.evaluate import page, trial
from esrfs.evaluate.curves import Comparison, bytes_at
from esrfs.evaluate.page import Shown
from esrfs.evaluate.results import Result, Way
from esrfs.evaluate.trial import ESRFS, Picture, Trial

Pixels = npt.NDArray[np.uint8]

SCORE = 60
"""SSIMULACRA2 of the way that the others' sizes are compared with."""
SIDE = 192
"""Pixels of a crop."""
_MOST_WAYS = 9


@dataclass(frozen=True)
class CropRow:
    title: str
    pictures: list[Shown]


def rows(
    comparison: Comparison, pictures: Sequence[Picture], anchor: Way, label: Callable[[Way], str], most: int
) -> list[CropRow]:
    """For up to ``most`` pictures, spread evenly. Raises OSError when a picture is gone."""
    usable = [picture for picture in pictures if comparison.of(anchor, picture.name)]
    if not usable or most < 1:
        return []
    step = max(1, len(usable) // most)
    return [_row(comparison, picture, anchor, label) for picture in usable[::step][:most]]


def _row(comparison: Comparison, picture: Picture, anchor: Way, label: Callable[[Way], str]) -> CropRow:
    curve = comparison.curve(anchor, picture.name, "ssimulacra2")
    size = bytes_at(curve, SCORE) if curve else None
    anchors = [result for result in comparison.of(anchor, picture.name) if result.bytes]
    target = size or sorted(result.bytes or 0 for result in anchors)[len(anchors) // 2]
    original = trial.original_of(picture)
    top, left = busiest(original, SIDE)
    found = [page.shown(_cut(original, top, left), f"Part of {picture.name}, the original", "original")]
    for way in _some_ways(comparison):
        results = [result for result in comparison.of(way, picture.name) if result.bytes]
        if not results:
            continue
        nearest = min(results, key=lambda result: abs((result.bytes or 0) / target - 1))
        version = _cut(_again(picture, nearest), top, left)
        found.append(page.shown(version, f"The same part as {label(way)} gives it", f"{label(way)}: {_told(nearest)}"))
    return CropRow(f"{picture.name}, at about {target / 1e3:,.0f} kB", found)


def _some_ways(comparison: Comparison) -> list[Way]:
    """Those at full resolution, then bicubically shrunk ones with networks first."""
    ways = [way for way in comparison.ways if way.codec != ESRFS]
    kernels = ("bicubic", "lanczos")
    whole = [way for way in ways if way.scale == 1]
    grown = [way for way in ways if way.scale > 1 and way.shrink == "bicubic" and way.codec == "avif"]
    return (whole + sorted(grown, key=lambda way: (way.grow in kernels, way.scale)))[:_MOST_WAYS]


def _again(picture: Picture, result: Result) -> Pixels:
    way = result.way
    again = Trial(picture, way.codec, way.scale, way.shrink, result.setting, (), ())
    return trial.version_of(again, way.grow)


def _told(result: Result) -> str:
    score = result.measures.get("ssimulacra2")
    told = f"{(result.bytes or 0) / 1e3:,.1f} kB"
    return told if score is None else f"{told}, SSIMULACRA2 {score:.1f}"


def _cut(pixels: Pixels, top: int, left: int) -> Pixels:
    return np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE])


def busiest(pixels: Pixels, side: int) -> tuple[int, int]:
    """Top and left of the square, on a grid of half its side, where neighbours differ most."""
    luma = pixels.astype(np.int16).sum(axis=2)
    height, width = luma.shape
    places = [
        (top, left)
        for top in range(0, max(height - side, 0) + 1, side // 2)
        for left in range(0, max(width - side, 0) + 1, side // 2)
    ]

    def busyness(place: tuple[int, int]) -> float:
        part = luma[place[0] : place[0] + side, place[1] : place[1] + side]
        return float(np.abs(np.diff(part, axis=0)).mean() + np.abs(np.diff(part, axis=1)).mean())

    return max(places, key=busyness)
