"""From points to comparisons: rate–distortion curves, BD-rates, sizes at equal score, scores at equal size.

Everything is per picture first, and only then averaged, so that no picture counts more because it is large.

BD-rate: Bjøntegaard's (VCEG-M33, 2001), the mean difference of log bytes between two curves over the values of the
measure that both reach, as a percentage; with piecewise cubic Hermite interpolation (PCHIP, VCEG-AI11), by the
``bjontegaard`` package. −10 %: a tenth fewer bytes at the same value, on average. Points at which a curve takes more
bytes for no better value are left out first: nobody would use them, and the method needs curves that rise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import bjontegaard
import numpy as np
from scipy.interpolate import PchipInterpolator

from esrfs.evaluate.results import Result, Way

FEWEST_POINTS = 3
LEAST_OVERLAP = 0.2
"""Of the narrower curve's range: below that a BD-rate says too little."""

Curve = Sequence[tuple[float, float]]
"""(bytes, value), both strictly rising."""


def curve(results: Iterable[Result], measure: str) -> list[tuple[float, float]]:
    """Of one picture stored in one way."""
    return rising(
        (result.bytes, value)
        for result in results
        if result.bytes is not None and (value := result.measures.get(measure)) is not None
    )


def rising(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (bytes, value) that are worth their bytes: both rise strictly."""
    kept: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or (size > kept[-1][0] and value > kept[-1][1]):
            kept.append((float(size), value))
    return kept


def bd_rate(anchor: Curve, test: Curve) -> float | None:
    """Percent; negative: ``test`` needs fewer bytes. None if a curve has fewer than 3 points, or they hardly
    overlap."""
    if min(len(anchor), len(test)) < FEWEST_POINTS:
        return None
    low = max(anchor[0][1], test[0][1])
    high = min(anchor[-1][1], test[-1][1])
    narrower = min(anchor[-1][1] - anchor[0][1], test[-1][1] - test[0][1])
    if high - low < LEAST_OVERLAP * narrower:
        return None
    (anchor_bytes, anchor_values), (test_bytes, test_values) = zip(*anchor, strict=True), zip(*test, strict=True)
    return float(
        bjontegaard.bd_rate(
            anchor_bytes,
            anchor_values,
            test_bytes,
            test_values,
            method="pchip",
            require_matching_points=False,
            min_overlap=0,
        )
    )


def bytes_at(points: Curve, value: float) -> float | None:
    """Bytes at which the curve reaches ``value`` (PCHIP through log bytes); None where it doesn't."""
    if len(points) < 2 or not points[0][1] <= value <= points[-1][1]:
        return None
    sizes, values = zip(*points, strict=True)
    return float(np.exp(PchipInterpolator(values, np.log(sizes))(value)))


def value_at(points: Curve, size: float) -> float | None:
    """The curve's value at ``size`` bytes; None where it has none."""
    if len(points) < 2 or not points[0][0] <= size <= points[-1][0]:
        return None
    sizes, values = zip(*points, strict=True)
    return float(PchipInterpolator(np.log(sizes), values)(math.log(size)))


@dataclass(frozen=True)
class Mean:
    value: float
    count: int
    """Pictures that it is the mean of."""


def mean(values: Iterable[float | None]) -> Mean | None:
    known = [value for value in values if value is not None]
    return Mean(statistics.fmean(known), len(known)) if known else None


def geometric_mean(values: Iterable[float | None]) -> Mean | None:
    known = [value for value in values if value is not None]
    return Mean(statistics.geometric_mean(known), len(known)) if known else None


class Comparison:
    """The results of a run, by way and picture."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self.pictures = list(dict.fromkeys(result.picture for result in results))
        self.ways = list(dict.fromkeys(result.way for result in results))
        self._by: dict[tuple[Way, str], list[Result]] = {}
        self._of_way: dict[Way, list[Result]] = {}
        for result in results:
            self._of_way.setdefault(result.way, []).append(result)
            self._by.setdefault((result.way, result.picture), []).append(result)
        self._curves: dict[tuple[Way, str, str], Curve] = {}

    def of(self, way: Way, picture: str) -> list[Result]:
        return self._by.get((way, picture), [])

    def curve(self, way: Way, picture: str, measure: str) -> Curve:
        key = (way, picture, measure)
        if key not in self._curves:
            self._curves[key] = curve(self.of(way, picture), measure)
        return self._curves[key]

    def bd_rate(self, anchor: Way, way: Way, measure: str) -> Mean | None:
        """The mean over pictures, percent."""
        return mean(
            bd_rate(self.curve(anchor, picture, measure), self.curve(way, picture, measure))
            for picture in self.pictures
        )

    def relative_bytes(self, anchor: Way, way: Way, measure: str, value: float) -> Mean | None:
        """Bytes of ``way`` / bytes of ``anchor`` at equal value: the geometric mean over pictures that both bring
        there."""
        ratios = []
        for picture in self.pictures:
            ours = bytes_at(self.curve(way, picture, measure), value)
            theirs = bytes_at(self.curve(anchor, picture, measure), value)
            ratios.append(ours / theirs if ours and theirs else None)
        return geometric_mean(ratios)

    def ratio_at(self, way: Way, measure: str, value: float) -> Mean | None:
        """Bytes of the original / bytes stored at that value: the geometric mean over pictures that reach it."""
        ratios = []
        for picture in self.pictures:
            size = bytes_at(self.curve(way, picture, measure), value)
            ratios.append(self.of(way, picture)[0].original_bytes / size if size else None)
        return geometric_mean(ratios)

    def values_at_ratio(self, way: Way, measure: str, ratio: float) -> list[float]:
        """The values of the pictures, ascending, where the original takes ``ratio`` times the bytes."""
        values = [
            value_at(self.curve(way, picture, measure), results[0].original_bytes / ratio)
            for picture in self.pictures
            if (results := self.of(way, picture))
        ]
        return sorted(value for value in values if value is not None)

    def mean_points(self, way: Way, measure: str) -> list[tuple[float, float]]:
        """(bits per pixel, value) for each quality at which every picture has a result: means over all pictures."""
        by_setting: dict[str, list[Result]] = {}
        for result in self._of_way[way]:
            by_setting.setdefault(result.setting, []).append(result)
        points = []
        for of_one in by_setting.values():
            found = [(result.bits_per_pixel, result.measures.get(measure)) for result in of_one]
            pairs = [(size, value) for size, value in found if size is not None and value is not None]
            if len(pairs) == len(self.pictures):
                sizes, values = zip(*pairs, strict=True)
                points.append((statistics.fmean(sizes), statistics.fmean(values)))
        return sorted(points)

    def seconds_per_megapixel(self, way: Way) -> tuple[float, float]:
        """Medians (to store, to restore) over all trials of ``way``."""
        mine = self._of_way[way]
        kept = [result for result in mine if result.bytes is not None] or mine
        return (
            statistics.median(result.store_seconds / _megapixels(result) for result in kept),
            statistics.median(result.restore_seconds / _megapixels(result) for result in kept),
        )


def _megapixels(result: Result) -> float:
    return result.width * result.height / 1e6
