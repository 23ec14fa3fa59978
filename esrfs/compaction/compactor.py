"""Compaction: (original's bytes, policy, network) → a blob's parts, or a verdict why not. A pure function: the same
values give the same bytes, in any process on this kind of machine, and nothing is touched.

Who calls it: the engine's worker. The picture is taken apart, made small and encoded by the plan, rebuilt from those
very bytes, encoded as a view, decoded again, and measured by the gate.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from esrfs import __version__, formats, reconstruction
from esrfs.blob import carried
from esrfs.blob import recipe as recipe_format
from esrfs.blob.carried import Carried
from esrfs.blob.recipe import Coding, Recipe, Scores
from esrfs.blob.reference import reference
from esrfs.compaction import gate, lossless, mosaic, planner, shrinking
from esrfs.compaction import outcome as outcome_format
from esrfs.compaction.encoder import Tuning, encode_avif
from esrfs.compaction.outcome import LOSSLESS, Outcome, Policy, Reason, Verdict
from esrfs.compaction.planner import Curve, Patience, Trial
from esrfs.compaction.refine import Refined, codec_noise
from esrfs.compaction.shrinking import ShrinkerRef
from esrfs.formats import cells
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks import registry
from esrfs.networks.spec import NetworkSpec
from esrfs.reconstruction import Infer, Plan, ReconstructionError

Pixels = npt.NDArray[np.uint8]

SMALLEST_SIDE = 64
"""Pixels. Below that the view's fixed parts weigh more than its pixels."""
_BYTES, _OF_THE_FILE, _OF_A_THREAD = 300_000_000, 5, 100_000_000
"""Memory that compaction takes (``benchmarks.memory``, ``tests.peaks``), besides that of an engine at rest and what the
kind takes for each pixel: bytes, bytes for each of the file's, and for each thread (its tile within a network)."""
_CODED_WHOLE = 60
"""Bytes for each pixel of a picture that is coded in one piece; of larger ones, for as many pixels. libaom takes 42,
and what the metric keeps of such a picture 20."""
_BYTES_REFINING = 400_000_000
"""What refinement takes for each thread at most, with networks that a CPU refines for (lite: 200 MB)."""
_TRIES = 4
"""On the mosaic, for each way."""
_FIRST_LEVEL = {"faithful": 52, "high": 34, "balanced": 26, "small": 20}
"""Where to begin at scale 1: about the middle of what photographs need."""
_HIGHER_WHEN_SMALL = 12
"""By so many levels more must a small picture be encoded, as the network enlarges the codec's noise with it."""
_FAST = 8
"""libaom's speed for the mosaic."""
_FAST_SCORES_LESS, _LESS_BY_LEVEL, _LESS_FROM = 1.3, 0.04, 22
"""Points, on average, at one level, than what is kept scores; the less the higher the level."""
_LIKE_WHEN_SMALL = 16
"""So many levels lower, at full resolution, is what a small picture's level is like in this."""
_EXPLORED = 6
"""libaom's speed, at most, for pictures that are their own mosaic: how much a slower one saves differs between ways by
more than they do."""
_WORST_OF_MOSAIC = 2.5
"""Points by which a picture's worst tile scores less than its mosaic's, on average."""
_SMALL = 2_000_000
"""Pixels up to which another pass costs little, whatever the patience."""
_WAYS_OF_SMALL, _ALIKE = 2, 1.03
"""So many ways are carried out for them: those that take at most so much more than the best, as the trials tell. One
more, of every picture, where that still promises less than the others turned out to take: a level is 5 % of the bytes,
and where headroom hardly grows with the level, a curve says little. (Of larger pictures, if it promises by so much
less.)"""
_CLOSE = 1.1
"""Scales whose mosaics take at most so much more than the best one's are compared by the whole picture. (That takes
half as long as the rest: it is for close decisions.)"""
_TINY = 1_000_000
"""Pixels up to which the encoder is tried in other tunings, too. A recipe weighs 1 to 3 % of such a picture's blob."""
_TUNINGS = (
    Tuning(),
    Tuning({"sharpness": "4"}),
    Tuning({"sharpness": "5"}),
    Tuning({"sharpness": "6"}),
    Tuning({"deltaq-strength": "75"}),
    Tuning({"deltaq-strength": "125"}),
    Tuning({"quant-b-adapt": "1"}),
    Tuning({"enable-palette": "0"}),
    Tuning(bits=8),
)
"""The usual first: ``tune=ssimulacra2`` alone means sharpness 7, strength 100. Each of the others takes up to 1 or 2 %
fewer bytes at the same score for about as many pictures as it takes more (palettes: 5 % of few)."""
_REFINED_MORE, _REFINED_SIZE = 4.0, 0.75
"""What refinement gives at best: points where a small picture scores highest, and a share of its bytes."""
_MOSAIC_SECONDS = 0.25
"""Of the time for refinement, at most."""
_UNSURE = 1.2
"""A way is tried on the whole picture if the mosaic says that it takes at most so much more than what is allowed."""


@dataclass(frozen=True)
class NetworkRef:
    """A network that may be used."""

    name: str
    sha256: bytes
    """Of its file."""
    scale: int
    shrinker: ShrinkerRef | None = None
    """Made for this network."""


def references(networks: Mapping[str, tuple[bytes, NetworkSpec]]) -> list[NetworkRef]:
    """Those of ``networks`` (name → sha256 and description) that enlarge, in their order, each with its shrinker if
    that is among them. Raises ValueError for a shrinker of another scale."""
    shrinkers = {
        name: ShrinkerRef(sha256, spec.margin, int(spec.arguments["reduction"]))
        for name, (sha256, spec) in networks.items()
        if spec.architecture == "Shrinker"
    }
    found = [
        NetworkRef(name, sha256, spec.scale, shrinkers.get(registry.SHRINKER + name))
        for name, (sha256, spec) in networks.items()
        if name not in shrinkers
    ]
    for network in found:
        if network.shrinker is not None and network.shrinker.scale != network.scale:
            raise ValueError(
                f"{registry.SHRINKER}{network.name} makes pictures {network.shrinker.scale} times smaller, but "
                f"{network.name} enlarges {network.scale} times; remove or replace it"
            )
    return found


Refine = Callable[[bytes, Pixels, Pixels, float, float], Refined | None]
"""(network's sha256, the original and its small picture, both RGB, the codec's noise, seconds that it may take) → the
small picture refined (``refine.py``), or None: not by this network on this machine, or not now."""


@dataclass(frozen=True)
class _Way:
    """One way to make a picture small: a scale and what enlarges it, and how the codec samples colour."""

    scale: int
    subsampling: str
    network: NetworkRef | None = None
    shrinker: ShrinkerRef | None = None
    refined: bool = False
    tuning: int = 0
    """Of _TUNINGS."""


@dataclass
class _Picture:
    """Pixels to be made small (all of a picture, or its mosaic), and what is needed again and again while trying."""

    pixels: Pixels
    """H×W×3 or H×W×1: colour as stored, without alpha."""
    threads: int = 1
    reference: Reference = field(init=False)
    _small: dict[int, Pixels] = field(init=False, default_factory=dict)
    _suited: tuple[tuple[ShrinkerRef, int], Image.Image] | None = field(init=False, default=None)
    """What a shrinker made last, and for which level."""
    refined: Image.Image | None = field(init=False, default=None)
    """What refinement made, of one way."""

    def __post_init__(self) -> None:
        self.reference = Reference(self.pixels, threads=self.threads)

    @property
    def gray(self) -> bool:
        return bool(self.pixels.shape[2] == 1)

    def plan(self, way: _Way) -> Plan:
        height, width = self.pixels.shape[:2]
        return Plan(width, height, way.scale, way.network.sha256 if way.network else b"", self.gray)

    def small(self, way: _Way, level: int, infer: Infer) -> Image.Image:
        """As it is encoded at ``level``: ceil(width / scale) × ceil(height / scale)."""
        if way.refined:
            assert self.refined is not None, "made before a refined way is tried"
            return self.refined
        if way.scale == 1:
            return _image(self.pixels)  # not kept: it is as large as the picture
        if way.scale not in self._small:
            self._small[way.scale] = shrinking.reduced(self.pixels, way.scale)
            cells.give_memory_back(self.pixels)
        reduced = self._small[way.scale]
        if way.shrinker is None:
            return _image(reduced)
        key = way.shrinker, shrinking.alike(level)
        if self._suited is None or self._suited[0] != key:
            self._suited = None
            suited = shrinking.suited(self.pixels, reduced, key[1], way.shrinker, infer)
            self._suited = key, _image(suited)
        return self._suited[1]


def compact(
    original: bytes,
    policy: Policy,
    networks: Sequence[NetworkRef],
    infer: Infer,
    checkpoint: Callable[[], None] = lambda: None,
    *,
    reference_key: bytes = b"",
    room: float = math.inf,
    threads: int | None = None,
    refine: Refine | None = None,
) -> Outcome:
    """Try to make a blob of ``original``. ``networks``: those that may enlarge it, tried in this order; without any, it
    is kept at full resolution. ``checkpoint`` is called between steps, and may raise to end it;
    ``reference_key`` (``blob/reference.py``) is the store's, 32 bytes, or empty: then the view refers to nothing;
    ``room`` is the bytes of memory that it may take, ``threads`` how many work at once (as many as there are
    processors); with ``refine`` it also tries a refined small picture.

    Files that can't be compacted are a verdict. Raises ValueError for an unknown preset, and what ``infer`` and
    ``checkpoint`` raise.
    """
    if policy.preset == LOSSLESS:
        return lossless.compact(original, policy, room)
    outcome = _at_a_loss(
        original,
        policy,
        networks,
        infer,
        checkpoint,
        reference_key=reference_key,
        room=room,
        threads=threads or len(os.sched_getaffinity(0)),
        refine=refine,
    )
    checkpoint()
    return lossless.where_better(original, policy, outcome, room)


def memory(split: formats.Split, size: int, threads: int) -> int:
    """Bytes that the compaction of a file of ``size`` bytes takes at most, besides those of an engine at rest."""
    pixels = split.width * split.height
    whole = min(pixels, round(cells.WHOLE_MEGAPIXELS * 1e6))
    of_pixels = split.bytes_per_pixel * pixels + _CODED_WHOLE * whole
    return _BYTES + _OF_THE_FILE * size + _OF_A_THREAD * threads + of_pixels


def _at_a_loss(
    original: bytes,
    policy: Policy,
    networks: Sequence[NetworkRef],
    infer: Infer,
    checkpoint: Callable[[], None],
    *,
    reference_key: bytes,
    room: float,
    threads: int,
    refine: Refine | None,
) -> Outcome:
    wanted = gate.thresholds(policy.preset)
    try:
        split = formats.split(original, policy.max_megapixels)
        if min(split.width, split.height) < SMALLEST_SIDE:
            message = f"{split.width} × {split.height} pixels are too few for compaction to save anything"
            return _refused(Reason.TOO_SMALL, message, split)
        needed = memory(split, len(original), threads)
        if needed > room:
            message = f"it takes {needed / 1e9:.1f} GB of memory, and {room / 1e9:.1f} GB are free now"
            return _refused(Reason.NO_MEMORY, message, split)
        if needed + _BYTES_REFINING * threads > room:
            refine = None
        checkpoint()
        stored = split.pixels()
    except formats.Unsupported as error:
        return Outcome(verdict=Verdict.PASSED_THROUGH, reason=error.reason, message=error.message, kind=error.kind)
    try:
        opacity = None if split.kind == "jpeg" else _opacity(formats.decode(original, policy.max_megapixels))
    except formats.Unsupported as error:  # an odd header
        message = f"its view couldn't be read here to be compared: {error.message}"
        return _refused(Reason.ERROR, message, split)
    colour = np.ascontiguousarray(stored[:, :, : stored.shape[2] - 1] if stored.shape[2] in (2, 4) else stored)
    del stored
    picture = _Picture(colour, threads)
    work = _Compaction(
        original, policy, wanted, split, picture, opacity, threads, infer, checkpoint, reference_key, refine
    )
    return work.run(_ways(picture, networks, planner.PATIENCE[policy.patience]))


def _ways(picture: _Picture, networks: Sequence[NetworkRef], patience: Patience) -> list[_Way]:
    chroma = "4:0:0" if picture.gray else "4:4:4"
    reductions = [
        _Way(network.scale, chroma, network, shrinker)
        for network in networks
        for shrinker in dict.fromkeys((network.shrinker, None) if patience.looks_closer else (network.shrinker,))
    ]
    if picture.gray:
        return [_Way(1, chroma), *reductions]
    # Small pictures in 4:4:4: their chroma has been halved already. At full resolution 4:2:0 saves up to 4 % of most
    # pictures, and some (dark, saturated) pass at no quality with it.
    full = [_Way(1, "4:4:4"), _Way(1, "4:2:0")]
    return [*full, *reductions]


@dataclass(frozen=True)
class _Result:
    """The whole picture at one level, as readers would get it."""

    level: int
    avif: bytes
    fitted: formats.FittedView
    view: bytes
    scores: Scores


@dataclass
class _Compaction:
    original: bytes
    policy: Policy
    wanted: gate.Thresholds
    split: formats.Split
    picture: _Picture
    opacity: Pixels | None
    """What any reader makes of the original's: the gate measures colours, and our own parser may have missed it."""
    threads: int
    infer: Infer
    checkpoint: Callable[[], None]
    reference_key: bytes
    refine: Refine | None = None
    best_score: float | None = None
    hopes: dict[_Way, float] = field(default_factory=dict)
    """Points by which what shrinks would pass if the codec lost nothing, as far as a mosaic tells."""
    encoded: dict[tuple[_Way, int, int], bytes] = field(default_factory=dict)
    """By way, level and speed, of small pictures: what was encoded to explore need not be encoded again."""

    def run(self, ways: list[_Way]) -> Outcome:
        patience = planner.PATIENCE[self.policy.patience]
        allowed = (1 - self.policy.min_saving) * len(self.original)
        done: list[tuple[float, int, Outcome]] = []
        objections: list[tuple[Reason, str]] = []
        some = mosaic.mosaic(self.picture.pixels)
        sample = self.picture if some is self.picture.pixels else _Picture(some, self.threads)
        promising = self._promising(sample, ways, allowed)
        weighed = self._weighed(promising) if sample is not self.picture and patience.looks_closer else promising
        several = self._pixels < _SMALL and patience.looks_closer
        wanted = max(patience.ways, _WAYS_OF_SMALL) if several else patience.ways
        least = math.inf
        """What the best so far takes, as its curve tells it for its level."""
        for way, curve in weighed:
            alike = curve.size <= _ALIKE * weighed[0][1].size
            better = curve.likely < (least if several else least / _ALIKE)
            if len(done) >= (wanted if alike else patience.ways) and not (better and len(done) <= wanted):
                break
            try:
                outcome, level = self._carry_out(way, curve, patience, allowed)
            except (formats.DoesNotFit, ReconstructionError) as error:
                objections.append(_problem(error))
                continue
            if outcome.verdict is not Verdict.COMPACTED:
                assert outcome.reason is not None
                objections.append((outcome.reason, outcome.message))
                continue
            assert outcome.score is not None
            done.append((curve.weight(_stored(outcome), outcome.score - self.wanted.whole), len(done), outcome))
            least = min(least, curve.size * curve.growth ** (level - curve.crossing))
        best = min(done)[-1] if done else None
        best = self._refined(sample, promising, best, patience, allowed) or best
        if best is not None:
            return best
        if not objections:
            objections.append((Reason.QUALITY, "no quality that saves bytes rebuilds it well enough"))
        # The first is that of the most promising way.
        return _refused(*objections[0], self.split, self.best_score)

    def _promising(self, sample: _Picture, ways: list[_Way], allowed: float) -> list[tuple[_Way, Curve]]:
        """What may pass and save enough, as far as a mosaic tells, and the smallest first."""
        small = sample.pixels.size / self.picture.pixels.size
        largest = allowed * small * _UNSURE
        found: list[tuple[_Way, Curve]] = []
        for way in ways:
            if way.scale > 1:
                self.hopes[way] = self._hope(sample, way)
                if self.hopes[way] < 0:
                    continue
            first = round(found[0][1].crossing) if found and way.scale == 1 else self._first_level(way)
            curve = planner.explore(partial(self._try, sample, way), first=first, tries=_TRIES, largest=largest)
            if curve is not None:
                found.append((way, curve))
        return sorted(found, key=lambda each: each[1].size)

    def _weighed(self, promising: list[tuple[_Way, Curve]]) -> list[tuple[_Way, Curve]]:
        """The same with bytes of the whole instead of those of its mosaic, if the best of two scales are close.

        Where tiles meet there are edges, and most pictures have more sky than their mosaic: what that costs differs
        between scales by up to a quarter, and a fast encode of the whole at one level tells it."""
        best = {way.scale: (way, curve) for way, curve in reversed(promising)}
        if len(best) < 2 or sorted(curve.size for _, curve in best.values())[1] > _CLOSE * promising[0][1].size:
            return promising
        larger: dict[int, float] = {}
        for scale, (way, curve) in best.items():
            self.checkpoint()
            level = min(max(round(curve.crossing), planner.LOWEST), planner.HIGHEST)
            whole = len(self._encode(self.picture, way, level, _FAST))
            larger[scale] = whole * curve.growth ** (curve.crossing - level) / curve.size
        weighed = [(way, curve.scaled(larger[way.scale])) for way, curve in promising]
        return sorted(weighed, key=lambda each: each[1].size)

    def _hope(self, sample: _Picture, way: _Way) -> float:
        """Points by which it would pass if the codec lost nothing. (Only shrinking does; most pictures bear little.)"""
        small = sample.small(way, planner.HIGHEST, self.infer)
        pixels = np.asarray(small).reshape(small.height, small.width, -1)
        return self._headroom(sample, reconstruction.enlarge(sample.plan(way), pixels, self.infer))

    def _first_level(self, way: _Way) -> int:
        return _FIRST_LEVEL[self.policy.preset] + (_HIGHER_WHEN_SMALL if way.scale > 1 else 0)

    def _try(self, sample: _Picture, way: _Way, level: int) -> Trial:
        """One level on the mosaic."""
        self.checkpoint()
        avif = self._encode(sample, way, level, self._speed(sample))
        rebuilt = self._rebuild(sample, way, avif)
        headroom = self._headroom(sample, rebuilt)
        if self._speed(sample) > planner.PATIENCE[self.policy.patience].speed:
            like = level - (_LIKE_WHEN_SMALL if way.scale > 1 else 0)
            less = _FAST_SCORES_LESS - _LESS_BY_LEVEL * (like - _LESS_FROM)
            headroom += min(max(less, 0), _FAST_SCORES_LESS)
        return Trial(level, headroom, len(avif))

    def _speed(self, sample: _Picture) -> int:
        """With which the mosaic is encoded."""
        return max(planner.PATIENCE[self.policy.patience].speed, _EXPLORED if sample is self.picture else _FAST)

    def _encode(self, picture: _Picture, way: _Way, level: int, speed: int) -> bytes:
        key = way, level, speed
        if picture is self.picture and key in self.encoded:
            return self.encoded[key]
        small = picture.small(way, level, self.infer)
        cells.give_memory_back(picture.pixels)
        avif = encode_avif(
            small,
            planner.quality(level),
            way.subsampling,
            speed,
            lift=way.network is None,
            tuning=_TUNINGS[way.tuning],
        )
        if picture is self.picture and self._pixels < _SMALL:
            self.encoded[key] = avif
        return avif

    def _headroom(self, sample: _Picture, rebuilt: Pixels) -> float:
        self.checkpoint()
        viewed = np.ascontiguousarray(formats.recoded(self.split, rebuilt))
        scores = gate.measure(sample.reference, sample.pixels, viewed)
        self._note(scores)
        if sample is not self.picture:
            scores = msgspec.structs.replace(scores, worst_tile=scores.worst_tile - _WORST_OF_MOSAIC)
        return gate.headroom(scores, self.wanted)

    def _carry_out(self, way: _Way, curve: Curve, patience: Patience, allowed: float) -> tuple[Outcome, int]:
        """The smallest blob of the whole picture, or why there is none, and its level. Raises DoesNotFit,
        ReconstructionError."""
        if self._pixels < _SMALL:
            patience = replace(patience, content=min(patience.content, 1.0))
        best: list[_Result] = []

        def attempt(level: int) -> Trial:
            result = self._result(way, level, patience.speed)
            headroom = gate.headroom(result.scores, self.wanted)
            better = not best or gate.headroom(best[0].scores, self.wanted) < (0 if headroom >= 0 else headroom)
            if better or (headroom >= 0 and level < best[0].level):
                best[:] = [result]
            return Trial(level, headroom, len(result.avif))

        planner.confirm(attempt, curve, patience, allowed)
        (result,) = best
        if problem := gate.objection(result.scores, self.wanted):
            return _refused(Reason.QUALITY, f"rebuilt, {problem}", self.split, self.best_score), result.level
        if self._pixels < _TINY and patience.looks_closer:
            result = self._tuned(way, curve, result, patience.speed)
        return self._conclude(way, result, allowed), result.level

    def _tuned(self, way: _Way, curve: Curve, plain: _Result, speed: int) -> _Result:
        """``plain``, or what another tuning of the encoder makes of its level, or the level below, if that is less."""

        def weight(result: _Result) -> float:
            return curve.weight(len(result.avif), result.scores.ssimulacra2 - self.wanted.whole)

        best = plain
        for tuning in range(1, len(_TUNINGS)):
            other = replace(way, tuning=tuning)
            for level in range(plain.level, max(plain.level - 2, planner.LOWEST - 1), -1):
                if self._encode(self.picture, other, level, speed) == plain.avif:
                    break  # it has no say in this picture
                try:
                    result = self._result(other, level, speed)
                except (formats.DoesNotFit, ReconstructionError):
                    break
                headroom = gate.headroom(result.scores, self.wanted)
                if headroom < 0:
                    break
                best = min(best, result, key=weight)
                if headroom < curve.slope:
                    break
        return best

    def _refined(
        self,
        sample: _Picture,
        promising: list[tuple[_Way, Curve]],
        best: Outcome | None,
        patience: Patience,
        allowed: float,
    ) -> Outcome | None:
        """A blob of a refined small picture, if that is smaller than ``best`` (the least without refinement)."""
        chosen = self._worth_refining(dict(promising))
        if self.refine is None or chosen is None or self.picture.gray:
            return None
        way, level = chosen
        end = time.monotonic() + self.policy.refinement_seconds
        try:
            noise = self._noise(sample, way, level)
            is_whole = sample is self.picture
            # A mosaic tells for a fraction of the time whether it is worth the rest.
            seconds = self.policy.refinement_seconds * (1 if is_whole else _MOSAIC_SECONDS)
            if not self._refine_small(sample, way, level, noise, seconds):
                return None
            way_refined = replace(way, refined=True)
            curve = planner.explore(partial(self._try, sample, way_refined), first=level, tries=_TRIES)
            if curve is None or (promising and curve.size >= promising[0][1].size):
                return None
            if not is_whole and not self._refine_small(self.picture, way, level, noise, end - time.monotonic()):
                return None
            least = allowed if best is None else min(allowed, _stored(best) - 1)
            outcome, _ = self._carry_out(way_refined, curve, patience, least)
        except (formats.DoesNotFit, ReconstructionError):
            return None
        return outcome if outcome.verdict is Verdict.COMPACTED else None

    def _worth_refining(self, curves: dict[_Way, Curve]) -> tuple[_Way, int] | None:
        """What may turn out smallest when it is refined, and about the level that it will then need."""
        least = min((curve.size for curve in curves.values()), default=math.inf)
        found: list[tuple[float, float, _Way, int]] = []
        for way, hope in self.hopes.items():
            curve = curves.get(way)
            if hope < -_REFINED_MORE or (curve is not None and curve.size * _REFINED_SIZE >= least):
                continue
            level = self._first_level(way) if curve is None else round(curve.crossing - _REFINED_MORE / curve.slope)
            size = math.inf if curve is None else curve.size
            found.append((size, -hope, way, min(max(level, planner.LOWEST), planner.HIGHEST)))
        return min(found, key=lambda each: each[:2])[2:] if found else None

    def _noise(self, sample: _Picture, way: _Way, level: int) -> float:
        """What the codec changes at ``level``, in shades."""
        small = sample.small(way, level, self.infer)
        avif = self._encode(sample, way, level, self._speed(sample))
        return codec_noise(np.asarray(small), reconstruction.decode_small(sample.plan(way), avif))

    def _refine_small(self, picture: _Picture, way: _Way, level: int, noise: float, seconds: float) -> bool:
        """Whether anything of it was refined."""
        assert self.refine is not None and way.network is not None
        self.checkpoint()
        small = np.asarray(picture.small(way, level, self.infer))
        done = self.refine(way.network.sha256, picture.pixels, small, noise, seconds)
        self.checkpoint()
        if done is None or not done.share:
            return False
        picture.refined = _image(done.small)
        return True

    def _result(self, way: _Way, level: int, speed: int) -> _Result:
        self.checkpoint()
        avif = self._encode(self.picture, way, level, speed)
        cells.give_memory_back(self.picture.pixels)
        pixels = self._rebuild(self.picture, way, avif)
        self.checkpoint()
        fitted = formats.fit_view(self.split, pixels, partial(self._note_for_fill, way, level, avif))
        again = formats.encode_scan(fitted.coding, self.split.width, self.split.height, pixels, len(fitted.scan))
        del pixels  # large
        if again != fitted.scan:
            raise ReconstructionError(
                "the view's encoder doesn't give the same bytes twice; please report this with the picture"
            )
        del again
        view = fitted.expand()
        self.checkpoint()
        try:
            decoded = formats.decode(view, self.policy.max_megapixels)
        except formats.Unsupported as error:  # an odd header, which the view has from the original
            raise ReconstructionError(f"its view can't be read here to be compared: {error.message}") from error
        if not _same(_opacity(decoded), self.opacity):
            raise ReconstructionError("its view would have another transparency; please report this with the picture")
        viewed = decoded[:, :, : self.picture.pixels.shape[2]]
        self.checkpoint()
        scores = gate.measure(self.picture.reference, self.picture.pixels, viewed)
        self._note(scores)
        return _Result(level, avif, fitted, view, scores)

    def _conclude(self, way: _Way, result: _Result, allowed: float) -> Outcome:
        fitted = result.fitted
        recipe = Recipe(
            width=self.split.width,
            height=self.split.height,
            original_size=len(self.original),
            sha256_original=hashlib.sha256(self.original).digest(),
            sha256_view=hashlib.sha256(result.view).digest(),
            preset=self.policy.preset,
            scale=way.scale,
            network=way.network.name if way.network else "",
            network_sha256=way.network.sha256 if way.network else b"",
            quality=planner.quality(result.level),
            subsampling=way.subsampling,
            coding=fitted.coding,
            prefix=fitted.prefix,
            scan_length=len(fitted.scan),
            suffix=fitted.suffix,
            encoder=fitted.encoder,
            scores=result.scores,
            created_by=f"esrfs {__version__}",
            reference=self._reference(fitted.scan),
        )
        if len(result.view) != len(self.original):
            message = "its view would not be of the original's size; please report this with the picture"
            return _refused(Reason.ERROR, message, self.split, self.best_score)
        encoded = recipe_format.encode(recipe_format.folded(recipe, result.avif))
        stored = outcome_format.stored_bytes(result.avif, encoded)
        if stored > allowed:
            message = f"it would take {stored:,} bytes of {len(self.original):,}, which saves too little"
            return _refused(Reason.NOT_WORTH_IT, message, self.split, result.scores.ssimulacra2)
        return Outcome(
            verdict=Verdict.COMPACTED,
            recipe=encoded,
            avif=result.avif,
            kind=self.split.kind,
            width=self.split.width,
            height=self.split.height,
            score=result.scores.ssimulacra2,
        )

    # Steps.

    @property
    def _pixels(self) -> int:
        return self.split.width * self.split.height

    def _rebuild(self, picture: _Picture, way: _Way, avif: bytes) -> Pixels:
        self.checkpoint()
        plan = picture.plan(way)
        return reconstruction.enlarge(plan, reconstruction.decode_small(plan, avif), self.infer)

    def _reference(self, scan: bytes) -> bytes:
        return reference(self.reference_key, scan) if self.reference_key else b""

    def _note_for_fill(self, way: _Way, level: int, avif: bytes, coding: Coding, scan: bytes) -> bytes:
        """See ``formats.Note``."""
        said = self._reference(scan)
        if said and self.policy.carry == "full" and isinstance(coding, carried.Coding):
            said += carried.encode(
                Carried(
                    width=self.split.width,
                    height=self.split.height,
                    preset=self.policy.preset,
                    scale=way.scale,
                    network=way.network.name if way.network else "",
                    network_sha256=way.network.sha256 if way.network else b"",
                    quality=planner.quality(level),
                    subsampling=way.subsampling,
                    coding=coding,
                    avif=avif,
                )
            )
        return said

    def _note(self, scores: Scores) -> None:
        self.best_score = max(self.best_score if self.best_score is not None else -math.inf, scores.ssimulacra2)


def _stored(outcome: Outcome) -> int:
    return outcome_format.stored_bytes(outcome.avif, outcome.recipe)


def _opacity(pixels: Pixels) -> Pixels | None:
    """H×W, of H×W×C with alpha; None where all is opaque."""
    alpha = pixels[:, :, -1]
    return alpha.copy() if pixels.shape[2] in (2, 4) and alpha.min() < 255 else None


def _same(one: Pixels | None, other: Pixels | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _problem(error: formats.DoesNotFit | ReconstructionError) -> tuple[Reason, str]:
    if isinstance(error, formats.DoesNotFit):
        return Reason.DOES_NOT_FIT, f"its view can't be made as small as the original: {error}"
    return Reason.ERROR, str(error)


def _refused(reason: Reason, message: str, split: formats.Split, score: float | None = None) -> Outcome:
    return Outcome(
        verdict=Verdict.REFUSED,
        reason=reason,
        message=message,
        kind=split.kind,
        width=split.width,
        height=split.height,
        score=score,
    )


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
