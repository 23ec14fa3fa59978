"""The gate: what a view must measure against its original before a blob may take the original's place.

The view that is measured is the encoded one, decoded again: the very bytes that readers will get.
"""

from __future__ import annotations

from dataclasses import dataclass

from esrfs.blob.recipe import Scores
from esrfs.compaction.outcome import PRESETS
from esrfs.metrics import colour, fidelity
from esrfs.metrics.ssimulacra2 import Pixels, Reference

_COLOUR = {"faithful": (0.7, 3.0), "high": (1.2, 5.0), "balanced": (1.6, 6.5), "small": (2.0, 8.0)}
"""For each preset: CIEDE2000 on average, and what one block in a thousand may exceed."""
_POINTS_PER_COLOUR, _POINTS_PER_WORST_COLOUR = 20.0, 5.0
"""What colour counts beside SSIMULACRA2's points where one figure is asked: about as a codec's levels move them."""


@dataclass(frozen=True)
class Thresholds:
    whole: float
    """SSIMULACRA2."""
    worst_tile: float
    """SSIMULACRA2."""
    colour: float
    """CIEDE2000 on average, at most."""
    worst_colour: float
    """CIEDE2000 that one block in a thousand may exceed."""


def thresholds(preset: str) -> Thresholds:
    """Raises ValueError for a preset that doesn't exist."""
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    whole, depth = PRESETS[preset]
    return Thresholds(whole, whole - depth, *_COLOUR[preset])


def measure(reference: Reference, original: Pixels, view: Pixels) -> Scores:
    """Compare two pictures of one shape, H×W×1 or H×W×3; ``reference`` was made of ``original``.

    Rounded, so that a score in a recipe doesn't depend on the order in which some library adds.
    """
    comparison = reference.compare(view)
    error = colour.compare(original, view)
    return Scores(
        ssimulacra2=round(comparison.score, 2),
        worst_tile=round(comparison.worst_tile, 2),
        psnr=round(fidelity.psnr(original, view), 2),
        colour=round(error.mean, 2),
        worst_colour=round(error.worst, 2),
    )


def headroom(scores: Scores, wanted: Thresholds) -> float:
    """Points by which the scores pass (0 and more) or fail (negative): of the threshold that they pass least."""
    return min(
        scores.ssimulacra2 - wanted.whole,
        scores.worst_tile - wanted.worst_tile,
        (wanted.colour - scores.colour) * _POINTS_PER_COLOUR,
        (wanted.worst_colour - scores.worst_colour) * _POINTS_PER_WORST_COLOUR,
    )


def objection(scores: Scores, wanted: Thresholds) -> str:
    """Why these scores don't pass, as half a sentence for people; empty if they do."""
    if scores.ssimulacra2 < wanted.whole:
        return f"it scores {scores.ssimulacra2:.1f} where {wanted.whole:.0f} is promised"
    if scores.worst_tile < wanted.worst_tile:
        return f"its worst part scores {scores.worst_tile:.1f} where {wanted.worst_tile:.0f} is promised"
    if scores.colour > wanted.colour or scores.worst_colour > wanted.worst_colour:
        return (
            f"its colours are off by {scores.colour:.1f} and in places by {scores.worst_colour:.1f} (CIEDE2000), "
            f"where {wanted.colour:g} and {wanted.worst_colour:g} are promised"
        )
    return ""
