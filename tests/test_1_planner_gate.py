"""Finding the least quality that passes, on a mosaic and then on the whole; and what the gate asks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esrfs.blob.recipe import Scores
from esrfs.compaction import gate, mosaic, planner
from esrfs.compaction.outcome import PATIENCES, PRESETS
from esrfs.compaction.planner import Curve, Trial
from esrfs.metrics import colour
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
        assert planner.LOWEST <= level <= planner.HIGHEST
        self.levels.append(level)
        return Trial(level, self.headroom(level), round(1000 * 1.06**level))

    @property
    def crossing(self) -> float:
        return -self.steepness * math.log(1 - self.wanted / self.top) if self.wanted < self.top else math.inf


@pytest.mark.parametrize("wanted", [40.0, 55.0, 70.0, 80.0])
@pytest.mark.parametrize("first", [15, 25, 40])
@pytest.mark.parametrize("steepness", [15.0, 25.0])
def test_the_curve_of_a_mosaic_tells_where_to_begin(wanted: float, first: int, steepness: float) -> None:
    picture = Picture(wanted, steepness=steepness)
    curve = planner.explore(picture.attempt, first=first, tries=4)
    assert curve is not None
    assert len(picture.levels) <= 4
    assert abs(curve.crossing - picture.crossing) < 1.5
    assert curve.size == pytest.approx(1000 * 1.06**picture.crossing, rel=0.1)


def test_exploring_gives_up_when_nothing_passes_or_it_grows_too_large() -> None:
    assert planner.explore(Picture(95.0).attempt, first=40, tries=8) is None
    picture = Picture(80.0, steepness=25.0)
    assert planner.explore(picture.attempt, first=20, tries=8, largest=3000) is None
    assert len(picture.levels) == 2  # it saw that it would never do


def test_the_lowest_level_is_enough_for_a_flat_picture() -> None:
    def attempt(level: int) -> Trial:
        return Trial(level, 20.0 + level / 100, 100)

    curve = planner.explore(attempt, first=40, tries=8)
    assert curve is not None
    trials = planner.confirm(attempt, curve, planner.PATIENCE["endless"])
    assert trials[0].level == planner.LOWEST


@pytest.mark.parametrize("patience", PATIENCES)
@pytest.mark.parametrize("off", [-4.0, -1.0, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("wanted", [50.0, 60.0, 70.0, 78.0])
def test_the_whole_picture_passes_in_few_trials(patience: str, off: float, wanted: float) -> None:
    """The mosaic's curve may be off by a few points."""
    sample, whole = Picture(wanted + off, steepness=18.0), Picture(wanted, steepness=18.0)
    curve = planner.explore(sample.attempt, first=30, tries=4)
    assert curve is not None
    trials = planner.confirm(whole.attempt, curve, planner.PATIENCE[patience])
    passed = [trial for trial in trials if trial.headroom >= 0]
    assert passed
    assert len(trials) <= min(planner.PATIENCE[patience].passes, 3)
    best = math.ceil(whole.crossing)
    assert min(trial.level for trial in passed) <= best + (1 if patience in ("high", "endless") else 5)


def test_a_curve_with_a_bend_is_searched_between_what_fails_and_what_passes() -> None:
    """A smooth picture whose worst tile decides: steep where it fails, flat where it passes. By the slope of the flat
    part, trials end far from where it passes."""

    def attempt(level: int) -> Trial:
        bend = 35
        headroom = 4.0 + (0.41 if level >= bend else 1.7) * (level - bend)
        return Trial(level, headroom, round(1000 * 1.04**level))

    curve = planner.explore(attempt, first=46, tries=4)
    assert curve is not None
    assert abs(curve.crossing - 32.6) < 3
    for off in (-6, 0, 6):  # of the whole

        def shifted(level: int, off: int = off) -> Trial:
            return Trial(level, attempt(level - off).headroom, attempt(level).size)

        trials = planner.confirm(shifted, curve, planner.PATIENCE["normal"])
        assert min(trial.level for trial in trials if trial.headroom >= 0) <= 33 + off + 4


def test_the_last_trial_of_the_whole_is_not_spent_on_the_very_edge() -> None:
    """A mosaic whose two trials lie side by side tells too flat a slope; the second trial of the whole then lies
    far below, and between both the score bends. (As 30-type_error of exif-samples at `high`.)"""

    def attempt(level: int) -> Trial:
        slope = 1.12 if level >= 46 else 0.62
        return Trial(level, -0.7 + slope * (level - 46), round(1000 * 1.08**level))

    curve = Curve((Trial(46, -0.61, 12011), Trial(47, -0.26, 12856)))
    trials = planner.confirm(attempt, curve, planner.PATIENCE["normal"])
    assert len(trials) == 3
    assert min(trial.level for trial in trials if trial.headroom >= 0) <= 48


def test_points_that_nobody_asked_for_count_half() -> None:
    """With 5 % more bytes for a level of 1.2 points, 1.5 % more bytes for a point more is less, 2.5 % is not."""
    curve = Curve((Trial(30, -0.6, 1000), Trial(31, 0.6, 1050)))
    assert curve.growth == pytest.approx(1.05)
    assert curve.rate == pytest.approx(math.log(1.05) / 1.2)
    assert curve.weight(1015, 1.1) < curve.weight(1000, 0.1)
    assert curve.weight(1025, 1.1) > curve.weight(1000, 0.1)
    assert curve.weight(1030, 9.0) > curve.weight(1000, 0.1)  # more than a step doesn't count


def test_what_a_curve_promises_is_a_level_s_bytes() -> None:
    """Levels are steps: what just passes by the curve is half a step less than what will be taken, on average."""
    open_end = Curve((Trial(30, -2.4, 1000), Trial(31, -1.2, 1050)))
    assert open_end.size == pytest.approx(1000 * 1.05**2)
    assert open_end.likely == pytest.approx(1000 * 1.05**2.5)
    passed = Curve((Trial(30, -1.15, 1000), Trial(31, 0.05, 1050)))
    assert passed.size < passed.likely == 1050


def test_a_curve_of_a_larger_picture_has_the_same_levels() -> None:
    curve = Curve((Trial(30, -1.0, 1000), Trial(33, 2.6, 1157)))
    larger = curve.scaled(7.5)
    assert larger.size == pytest.approx(7.5 * curve.size, rel=1e-3)
    assert (larger.crossing, larger.slope) == (curve.crossing, curve.slope)
    assert larger.growth == pytest.approx(curve.growth, rel=1e-3)


def test_no_more_trials_when_it_would_be_too_large() -> None:
    curve = Curve((Trial(30, 0.0, 1000), Trial(31, 1.0, 1050)))
    picture = Picture(80.0)
    trials = planner.confirm(picture.attempt, curve, planner.PATIENCE["endless"], largest=5000)
    assert len(trials) == 1


def test_levels_are_distinct_qualities() -> None:
    """libavif maps quality to a quantizer of 0 to 63 as here."""
    quantizers = [((100 - planner.quality(level)) * 63 + 50) // 100 for level in range(planner.LEVELS)]
    assert quantizers == list(range(63, -1, -1))


def test_every_patience_is_explained() -> None:
    assert tuple(planner.PATIENCE) == PATIENCES
    speeds = [patience.speed for patience in planner.PATIENCE.values()]
    assert speeds == sorted(speeds, reverse=True)


def test_thresholds() -> None:
    for preset, (whole, depth) in PRESETS.items():
        wanted = gate.thresholds(preset)
        assert wanted.whole == whole
        assert wanted.worst_tile == whole - depth
        good = Scores(whole, whole - depth, 30.0, wanted.colour, wanted.worst_colour)
        assert gate.objection(good, wanted) == ""
        assert gate.headroom(good, wanted) == 0
        for bad, word in [
            (Scores(whole - 0.01, 99.0, 30.0), "promised"),
            (Scores(99.0, whole - depth - 0.01, 30.0), "worst part"),
            (Scores(99.0, 99.0, 30.0, wanted.colour + 0.01, 0.0), "colours"),
            (Scores(99.0, 99.0, 30.0, 0.0, wanted.worst_colour + 0.01), "colours"),
        ]:
            assert word in gate.objection(bad, wanted)
            assert gate.headroom(bad, wanted) < 0
    with pytest.raises(ValueError, match="faithful, high, balanced, small"):
        gate.thresholds("best")


def test_measure_gray_and_colour() -> None:
    rng = np.random.default_rng(1)
    for channels in (1, 3):
        original = rng.integers(0, 256, (80, 90, channels), dtype=np.uint8)
        same = gate.measure(Reference(original), original, original)
        assert same.ssimulacra2 > 99.9
        assert same.psnr == 99.0
        assert same.colour == same.worst_colour == 0.0
        worse = gate.measure(Reference(original), original, 255 - original)
        assert worse.ssimulacra2 < 30


def test_a_shift_of_hue_does_not_pass() -> None:
    """Of a large, flat, saturated area: structure stays as it is."""
    original = np.full((256, 256, 3), (200, 20, 30), np.uint8)
    original[:, 128:] = (20, 160, 40)
    view = original.copy()
    view[:, :128] = (200, 60, 10)
    scores = gate.measure(Reference(original), original, view)
    assert scores.worst_colour > 8
    otherwise_perfect = Scores(99.0, 99.0, 30.0, scores.colour, scores.worst_colour)
    assert "colours" in gate.objection(otherwise_perfect, gate.thresholds("small"))


# ---- the second metric and the mosaic


# Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula", 2005, table 1: some of its pairs.
@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
        ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
        ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0009), 7.1792),
        ((50.0, -0.0010, 2.4900), (50.0, 0.0009, -2.4900), 4.8045),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((50.0, 2.5, 0.0), (50.0, 3.1736, 0.5854), 1.0000),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
    ],
)
def test_ciede2000(first: tuple[float, ...], second: tuple[float, ...], difference: float) -> None:
    for a, b in ((first, second), (second, first)):
        assert colour.ciede2000(np.array(a), np.array(b)) == pytest.approx(difference, abs=6e-5)


def test_lab_is_that_of_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.color")
    rgb = np.random.default_rng(2).integers(0, 256, (50, 3), dtype=np.uint8)
    assert np.abs(colour.lab(rgb) - skimage.rgb2lab(rgb)).max() < 0.01


def test_noise_is_no_error_of_colour() -> None:
    rng = np.random.default_rng(3)
    original = np.full((320, 320, 3), (120, 90, 60), np.uint8)
    noisy = np.clip(original + rng.normal(0, 6, original.shape), 0, 255).round().astype(np.uint8)
    assert colour.compare(original, noisy).worst < 1.5


def test_a_mosaic_has_the_pictures_parts_in_proportion() -> None:
    """A quarter of this picture is busy, one tile is red."""
    rng = np.random.default_rng(4)
    picture = np.full((2048, 2560, 3), 128, np.uint8)
    picture[:, :640] = rng.integers(0, 256, (2048, 640, 3))
    picture[512:768, 1024:1280] = (200, 10, 10)
    made = mosaic.mosaic(picture)
    assert made.shape == (1024, 1024, 3)
    tiles = made.reshape(4, 256, 4, 256, 3).swapaxes(1, 2).reshape(16, 256, 256, 3)
    busy = sum(tile.std() > 40 and tile[:, :, 1].std() > 40 for tile in tiles)
    assert 3 <= busy <= 5
    assert any((tile == (200, 10, 10)).all() for tile in tiles)


@pytest.mark.parametrize("shape", [(1023, 5000, 3), (1200, 1200, 1), (100, 90, 3)])
def test_a_small_picture_is_its_own_mosaic(shape: tuple[int, int, int]) -> None:
    picture = np.zeros(shape, np.uint8)
    assert mosaic.mosaic(picture) is picture
