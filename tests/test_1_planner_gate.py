"""Finding the least quality that passes, and saying why nothing does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esrfs.blob.recipe import Scores
from esrfs.compaction import gate, planner
from esrfs.compaction.outcome import PRESETS
from esrfs.compaction.planner import Trial
from esrfs.metrics.ssimulacra2 import Reference


class Picture:
    """A score that grows with quality as those of photographs do: steep at the bottom, flat at the top."""

    def __init__(self, wanted: float, top: float = 92.0, steepness: float = 25.0) -> None:
        self.wanted, self.top, self.steepness = wanted, top, steepness
        self.levels: list[int] = []

    def headroom(self, level: int) -> float:
        return self.top * (1 - math.exp(-level / self.steepness)) - self.wanted

    def attempt(self, level: int) -> Trial:
        assert level not in self.levels
        self.levels.append(level)
        return Trial(level, self.headroom(level), round(1000 * 1.06**level))


@pytest.mark.parametrize("wanted", [40.0, 55.0, 70.0, 80.0])
@pytest.mark.parametrize("first", [3, 20, 40, 61])
@pytest.mark.parametrize("steepness", [15.0, 25.0])
def test_finds_the_least_that_passes(wanted: float, first: int, steepness: float) -> None:
    picture = Picture(wanted, steepness=steepness)
    best = next(level for level in range(planner.LEVELS) if picture.headroom(level) >= 0)
    found = planner.least_passing(picture.attempt, first=first, tries=8)
    assert found is not None
    assert found.headroom >= 0
    assert found.level <= best + 2 or found.headroom < planner.CLOSE_ENOUGH
    assert len(picture.levels) <= 8


def test_gives_up_when_nothing_passes_or_it_grows_too_large() -> None:
    assert planner.least_passing(Picture(95.0).attempt, first=40, tries=8) is None
    picture = Picture(80.0, steepness=25.0)
    assert planner.least_passing(picture.attempt, first=20, tries=8, largest=3000) is None
    assert len(picture.levels) == 1  # it saw that it would never do


def test_the_lowest_level_is_enough_for_a_flat_picture() -> None:
    found = planner.least_passing(lambda level: Trial(level, 20.0, 100), first=40, tries=8)
    assert found is not None
    assert found.level == planner.LOWEST


def test_levels_are_distinct_qualities() -> None:
    """libavif maps quality to a quantizer of 0 to 63 as here."""
    quantizers = [((100 - planner.quality(level)) * 63 + 50) // 100 for level in range(planner.LEVELS)]
    assert quantizers == list(range(63, -1, -1))


def test_thresholds() -> None:
    for preset, (whole, depth) in PRESETS.items():
        wanted = gate.thresholds(preset)
        assert wanted.whole == whole
        assert wanted.worst_tile == whole - depth
        assert gate.objection(Scores(whole, whole - depth, 30.0), wanted) == ""
        assert gate.headroom(Scores(whole, whole - depth, 30.0), wanted) == 0
        assert "promised" in gate.objection(Scores(whole - 0.01, 99.0, 30.0), wanted)
        assert "worst part" in gate.objection(Scores(99.0, whole - depth - 0.01, 30.0), wanted)
    with pytest.raises(ValueError, match="faithful, high, balanced, small"):
        gate.thresholds("best")


def test_measure_gray_and_colour() -> None:
    rng = np.random.default_rng(1)
    for channels in (1, 3):
        original = rng.integers(0, 256, (80, 90, channels), dtype=np.uint8)
        same = gate.measure(Reference(original), original, original)
        assert same.ssimulacra2 > 99.9
        assert same.psnr == 99.0
        worse = gate.measure(Reference(original), original, 255 - original)
        assert worse.ssimulacra2 < 30
