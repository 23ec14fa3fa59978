"""The plan for one picture: with which scale, chroma sampling and network it takes the fewest bytes, and at which codec
quality it just passes the gate.

How good a quality turns out is only known by trying it, which is dear for a large picture: encode, enlarge, score. So
each way is tried on a mosaic of the picture at a fast encoder speed, and the curve through those trials tells where
to begin on the whole. There few trials follow, at a careful speed, each of which says how far the curve was off.

Nothing here knows images or networks: a trial is a function from a level of quality to a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

LEVELS = 64
"""AV1 codecs know 64 qualities; Pillow's 0 to 100 maps several numbers to one. Level 0 is the worst."""
LOWEST, HIGHEST = 3, 61
"""Levels that are tried. At the highest an AVIF is about as large as the JPEG that it replaces."""
POINTS_PER_LEVEL = 1.2
"""How much one level adds to the score, before two trials of the picture itself tell."""
GROWTH = 1.05
"""What one level more multiplies the size by; likewise."""
_MARGIN = 0.5
"""Points that the first trial of the whole picture aims at: a mosaic's curve is that much off, mostly, and a second
trial takes as long as the first."""
_LEAN = 0.2
"""How much of what still lies between what fails and what passes the last trial of the whole stays away from failing:
if it fails, nothing of that is saved."""
_NEAR_POINTS, _NEAR_LEVELS = 1.0, 4
"""A curve is known well enough when a trial came so near to its crossing, or two, one on each side, lie so close."""


@dataclass(frozen=True)
class Patience:
    """How much time is spent on a picture for fewer bytes."""

    speed: int
    """libaom's, for what is kept. Against 6: 4 and 2 save about 4 and 8 % at 6 and 12 times the time, 8 costs 13 to
    20 % (DESIGN 10)."""
    passes: int
    """Of the whole picture, at most, for each way that is confirmed."""
    content: float
    """Points of headroom with which a passing level is taken, though a lower one might pass."""
    ways: int
    """How many of the most promising ways are carried out, so that the smallest result is taken."""
    looks_closer: bool
    """Whether close decisions are looked into: a network is tried with its shrinker and without (what a shrinker makes
    takes fewer bytes for most pictures, not for all), close scales are compared by the whole picture, and a small
    picture gets a second way and other tunings of the encoder."""


PATIENCE = {
    "low": Patience(speed=8, passes=2, content=4.0, ways=1, looks_closer=False),
    "normal": Patience(speed=6, passes=3, content=2.5, ways=1, looks_closer=True),
    "high": Patience(speed=4, passes=4, content=1.5, ways=2, looks_closer=True),
    "endless": Patience(speed=2, passes=6, content=0.8, ways=2, looks_closer=True),
}


def quality(level: int) -> int:
    """Pillow's quality for a level."""
    return 100 - round((LEVELS - 1 - level) * 100 / (LEVELS - 1))


@dataclass(frozen=True)
class Trial:
    level: int
    headroom: float
    """Points by which it passes the gate; negative: fails. Grows with the level, nearly always."""
    size: int
    """Bytes of the picture as encoded. Grows with the level."""


Attempt = Callable[[int], Trial]


def _bracket(trials: Sequence[Trial]) -> tuple[Trial, Trial] | None:
    """The highest that fails and the lowest that passes; None if all do the same, or the one lies above the other."""
    below = max((trial for trial in trials if trial.headroom < 0), key=lambda trial: trial.level, default=None)
    above = min((trial for trial in trials if trial.headroom >= 0), key=lambda trial: trial.level, default=None)
    return (below, above) if below and above and below.level < above.level else None


def _slope(first: Trial, second: Trial) -> float:
    """Points per level between them."""
    return min(max((first.headroom - second.headroom) / (first.level - second.level), 0.2), 5.0)


@dataclass(frozen=True)
class Curve:
    """Trials of one way on a mosaic, at least one, by level: how headroom and size grow with the level."""

    trials: tuple[Trial, ...]

    @property
    def crossing(self) -> float:
        """The level, with a fraction, at which the headroom is 0."""
        near = self._nearest()
        return near.level - near.headroom / self.slope

    @property
    def slope(self) -> float:
        """Points per level where the headroom is 0."""
        if len(self.trials) < 2:
            return POINTS_PER_LEVEL
        around = _bracket(self.trials)
        first, second = around or sorted(self.trials, key=lambda trial: abs(trial.headroom))[:2]
        return _slope(first, second)

    @property
    def growth(self) -> float:
        """What one level more multiplies the size by where the headroom is 0."""
        near = self._nearest()
        others = [trial for trial in self.trials if trial.level != near.level]
        if not others:
            return GROWTH
        other = min(others, key=lambda trial: abs(trial.headroom))
        return float(max(1.0, (other.size / near.size) ** (1 / (other.level - near.level))))

    @property
    def rate(self) -> float:
        """What one point more adds to the logarithm of the size, there."""
        return math.log(self.growth) / self.slope

    @property
    def size(self) -> float:
        """Bytes where the headroom is 0."""
        near = self._nearest()
        return float(near.size * self.growth ** (self.crossing - near.level))

    @property
    def likely(self) -> float:
        """Bytes of the level that will pass: half a level above the crossing on average, or less if a trial passed with
        less."""
        passed = [float(trial.size) for trial in self.trials if trial.headroom >= 0]
        return min(self.size * math.sqrt(self.growth), *passed, math.inf)

    def scaled(self, factor: float) -> Curve:
        """Of a picture that takes ``factor`` times the bytes."""
        return Curve(tuple(replace(trial, size=round(trial.size * factor)) for trial in self.trials))

    def weight(self, size: int, spare: float) -> float:
        """What of two results that pass is to be less: the logarithm of bytes, ``size``, less half of what the points
        that it scores more than it must, ``spare``, would cost. They are worth something, since levels are steps and
        one may pass by little and the other by nearly a step; not all, since nobody asked for them. More than a step
        doesn't count at all."""
        return math.log(size) - 0.5 * self.rate * min(spare, self.slope)

    def _nearest(self) -> Trial:
        return min(self.trials, key=lambda trial: abs(trial.headroom))


def explore(attempt: Attempt, *, first: int, tries: int, largest: float = math.inf) -> Curve | None:
    """Trials around the level at which the headroom is 0, at most ``tries``, the first at level ``first``.

    None if no level passes, or what would pass takes more than ``largest`` bytes. (At the lowest level the curve may
    lie above 0 altogether.)
    """
    level = min(max(first, LOWEST), HIGHEST)
    trials: list[Trial] = []
    while True:
        trials.append(attempt(level))
        curve = Curve(tuple(sorted(trials, key=lambda trial: trial.level)))
        below = max((trial.level for trial in trials if trial.headroom < 0), default=LOWEST - 1)
        above = min((trial.level for trial in trials if trial.headroom >= 0), default=HIGHEST + 1)
        if below >= HIGHEST:
            return None
        if len(trials) > 1 and curve.size > largest:
            return None
        near = min(abs(trial.headroom) for trial in trials) < _NEAR_POINTS
        if len(trials) == tries or (near and len(trials) > 1) or above <= min(HIGHEST, below + _NEAR_LEVELS):
            return curve
        wanted = round(curve.crossing)
        if wanted in (trial.level for trial in trials):
            wanted += 1 if trials[-1].headroom < 0 else -1
        level = min(max(wanted, below + 1), above - 1)


def confirm(attempt: Attempt, curve: Curve, patience: Patience, largest: float = math.inf) -> list[Trial]:
    """Trials of the whole picture, towards the lowest level that passes: at most ``patience.passes``, and none after
    one that shows that what passes would take more than ``largest`` bytes."""
    trials: list[Trial] = []
    below, above = LOWEST - 1, HIGHEST + 1
    level = min(max(math.ceil(curve.crossing + _MARGIN / curve.slope), LOWEST), HIGHEST)
    while below < level < above:
        trial = attempt(level)
        trials.append(trial)
        passed = trial.headroom >= 0
        if passed:
            above = level
        else:
            below = level
        around = _bracket(trials)
        slope = _slope(*around) if around else curve.slope
        missing = -trial.headroom / slope  # levels; negative: to spare
        if len(trials) == patience.passes or (passed and trial.headroom < patience.content):
            break
        if not passed and trial.size * GROWTH**missing > largest:
            break
        step = math.ceil(missing + _MARGIN / slope) if passed else max(1, math.ceil(missing + 0.2))
        if around and len(trials) == patience.passes - 1:
            step += math.floor(_LEAN * (above - below))
        level = min(max(level + step, below + 1), above - 1, HIGHEST)
    return trials
