"""The plan for one picture: at which scale and codec quality it takes the fewest bytes and still passes the gate.

How good a quality turns out is only known by trying it, which is dear for a large picture: encode, enlarge, score. So
each scale is first tried on a sample of the picture, to choose between scales and to know where to begin on the whole.

Nothing here knows images or networks: a trial is a function from quality to a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

LOWEST, HIGHEST = 5, 97
"""Codec qualities that are tried. At 97 an AVIF is about as large as the JPEG it replaces."""
CLOSE_ENOUGH = 0.6
"""Points of headroom at which a passing quality is not worth improving: about one step of quality."""
_POINTS_PER_STEP = 0.7
"""How much one step of quality adds to the score, before two trials of the picture itself tell."""


@dataclass(frozen=True)
class Trial:
    quality: int
    """0 to 100."""
    headroom: float
    """Points by which it passes the gate; negative: fails. Grows with quality, nearly always."""
    size: int
    """Bytes of the picture as encoded. Grows with quality."""


def least_passing(
    attempt: Callable[[int], Trial],
    *,
    first: int,
    tries: int,
    low: int = LOWEST,
    high: int = HIGHEST,
    largest: float = float("inf"),
) -> Trial | None:
    """The lowest quality that passes, as found with at most ``tries`` trials, the first at quality ``first``.

    None if none of them passes: even ``high`` fails, or a quality fails that takes more than ``largest`` bytes
    already. A trial that passes is returned even if it is larger than that: a lower quality may not have been tried.
    """
    worse: Trial | None = None
    better: Trial | None = None
    trials: list[Trial] = []
    quality = min(max(first, low), high)
    for _ in range(tries):
        trial = attempt(quality)
        trials.append(trial)
        if trial.headroom >= 0:
            better = trial
            if trial.headroom < CLOSE_ENOUGH:
                break
        else:
            worse = trial
            if trial.size > largest:
                break
        floor = worse.quality + 1 if worse else low
        ceiling = better.quality - 1 if better else high
        if floor > ceiling:
            break
        quality = min(max(_guess(trials), floor), ceiling)
    return better


def _guess(trials: list[Trial]) -> int:
    """Where the headroom should be a little above 0, by the line through the two trials nearest to that."""
    known = sorted(trials, key=lambda trial: abs(trial.headroom))
    slope = _POINTS_PER_STEP
    if len(known) > 1:
        measured = (known[0].headroom - known[1].headroom) / (known[0].quality - known[1].quality)
        slope = min(max(measured, 0.1), 5.0)
    step = (CLOSE_ENOUGH / 3 - known[0].headroom) / slope
    return known[0].quality + (math.ceil(step) if step > 0 else math.floor(step))
