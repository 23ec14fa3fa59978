"""The plan for one picture: at which scale and codec quality it takes the fewest bytes and still passes the gate.

How good a quality turns out is only known by trying it, which is dear for a large picture: encode, enlarge, score. So
each scale is first tried on a sample of the picture, to choose between scales and to know where to begin on the whole.

Nothing here knows images or networks: a trial is a function from a level of quality to a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

LEVELS = 64
"""AV1 codecs know 64 qualities; Pillow's 0 to 100 maps several numbers to one. Level 0 is the worst."""
LOWEST, HIGHEST = 3, 61
"""Levels that are tried. At the highest an AVIF is about as large as the JPEG that it replaces."""
CLOSE_ENOUGH = 1.5
"""Points of headroom at which a passing level is not worth improving: about one level."""
_POINTS_PER_LEVEL = 1.2
"""How much one level adds to the score, before two trials of the picture itself tell."""


_GROWTH = 1.04
"""What one level more multiplies the size by, at least."""


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


def least_passing(
    attempt: Callable[[int], Trial],
    *,
    first: int,
    tries: int,
    low: int = LOWEST,
    high: int = HIGHEST,
    largest: float = float("inf"),
) -> Trial | None:
    """The lowest level that passes, as found with at most ``tries`` trials, the first at level ``first``.

    None if none of them passes: even ``high`` fails, or what would pass takes more than ``largest`` bytes.
    A trial that passes is returned even if it is larger than that: a lower level may not have been tried.
    """
    worse: Trial | None = None
    better: Trial | None = None
    trials: list[Trial] = []
    level = min(max(first, low), high)
    for _ in range(tries):
        trial = attempt(level)
        trials.append(trial)
        if trial.headroom >= 0:
            better = trial
            if trial.headroom < CLOSE_ENOUGH:
                break
        else:
            worse = trial
            needed = max(1, min(_guess(trials), high) - level)
            if trial.size * _GROWTH**needed > largest:
                break
        floor = worse.level + 1 if worse else low
        ceiling = better.level - 1 if better else high
        if floor > ceiling:
            break
        # Lines cut a curve's one end off again and again; halving now and then doesn't.
        halve = worse and better and len(trials) % 2
        level = (floor + ceiling) // 2 if halve else min(max(_guess(trials), floor), ceiling)
    return better


def _guess(trials: list[Trial]) -> int:
    """Where the headroom should be a little above 0, by the line through the two trials nearest to that."""
    known = sorted(trials, key=lambda trial: abs(trial.headroom))
    slope = _POINTS_PER_LEVEL
    if len(known) > 1:
        measured = (known[0].headroom - known[1].headroom) / (known[0].level - known[1].level)
        slope = min(max(measured, 0.1), 5.0)
    step = (CLOSE_ENOUGH / 3 - known[0].headroom) / slope
    return known[0].level + (math.ceil(step) if step > 0 else math.floor(step))
