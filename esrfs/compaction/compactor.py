"""Compaction: (original's bytes, policy, network) → a blob's parts, or a verdict why not. A pure function: the same
values give the same bytes, in any process on this kind of machine, and nothing is touched.

Who calls it: the engine's worker. The picture is taken apart, made small and encoded by the plan, rebuilt from those
very bytes, encoded as a view, decoded again, and measured by the gate.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from esrfs import __version__, formats, reconstruction
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Coding, Recipe, Scores
from esrfs.blob.reference import reference
from esrfs.compaction import gate, lossless, planner
from esrfs.compaction import outcome as outcome_format
from esrfs.compaction.outcome import LOSSLESS, Outcome, Policy, Reason, Verdict
from esrfs.compaction.planner import Trial
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.reconstruction import Infer, Plan, ReconstructionError

Pixels = npt.NDArray[np.uint8]

SMALLEST_SIDE = 64
"""Pixels. Below that the view's fixed parts weigh more than its pixels."""
_SAMPLE_TILE = 256
_SAMPLE_TILES = (4, 6)
"""Rows and columns of parts that stand for the whole picture while the plan is made: 1.6 megapixels."""
_TRIES = 5
_FIRST_LEVEL = {"faithful": 50, "high": 34, "balanced": 27, "small": 21}
"""Where to begin at scale 1: about the middle of what photographs need."""
_HIGHER_WHEN_SMALL = 12
"""By so many levels more must a small picture be encoded, as the network enlarges the codec's noise with it."""
_SPEED = 6
"""libaom's: 4 would save 4 % at 6 times the time, 8 costs 13 to 20 % more bytes (DESIGN 10)."""


@dataclass(frozen=True)
class NetworkRef:
    """The network that a store uses."""

    name: str
    sha256: bytes
    """Of its file."""
    scale: int


@dataclass(frozen=True)
class _Way:
    """One way to make a picture small: a scale and what enlarges it."""

    scale: int
    network_sha256: bytes = b""
    network_name: str = ""


@dataclass
class _Picture:
    """Pixels to be made small (all of a picture, or a sample), and what is needed again and again while trying."""

    pixels: Pixels
    """H×W×3 or H×W×1: colour as stored, without alpha."""
    reference: Reference = field(init=False)
    _small: dict[int, Image.Image] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = Reference(self.pixels)

    @property
    def gray(self) -> bool:
        return bool(self.pixels.shape[2] == 1)

    def plan(self, way: _Way) -> Plan:
        height, width = self.pixels.shape[:2]
        return Plan(width, height, way.scale, way.network_sha256, self.gray)

    def small(self, scale: int) -> Image.Image:
        """ceil(width / scale) × ceil(height / scale). A side that ``scale`` doesn't divide is continued by its last
        pixels, so that each small pixel stands for ``scale`` × ``scale`` large ones at its place."""
        if scale not in self._small:
            height, width = self.pixels.shape[:2]
            pixels = self.pixels
            if height % scale or width % scale:
                pixels = np.pad(pixels, ((0, -height % scale), (0, -width % scale), (0, 0)), mode="edge")
            image = _image(pixels)
            size = (pixels.shape[1] // scale, pixels.shape[0] // scale)
            self._small[scale] = image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC)
        return self._small[scale]


@dataclass(frozen=True)
class _Attempt:
    """What came of one level of quality on the whole picture."""

    avif: bytes
    scores: Scores


def compact(
    original: bytes,
    policy: Policy,
    network: NetworkRef | None,
    infer: Infer,
    checkpoint: Callable[[], None] = lambda: None,
    *,
    reference_key: bytes = b"",
) -> Outcome:
    """Try to make a blob of ``original``. ``checkpoint`` is called between steps, and may raise to end it;
    ``reference_key`` (``blob/reference.py``) is the store's, 32 bytes, or empty: then the view refers to nothing.

    Files that can't be compacted are a verdict. Raises ValueError for an unknown preset, and what ``infer`` and
    ``checkpoint`` raise.
    """
    if policy.preset == LOSSLESS:
        return lossless.compact(original, policy)
    outcome = _at_a_loss(original, policy, network, infer, checkpoint, reference_key=reference_key)
    checkpoint()
    return lossless.where_better(original, policy, outcome)


def _at_a_loss(
    original: bytes,
    policy: Policy,
    network: NetworkRef | None,
    infer: Infer,
    checkpoint: Callable[[], None],
    *,
    reference_key: bytes,
) -> Outcome:
    wanted = gate.thresholds(policy.preset)
    try:
        split = formats.split(original, policy.max_megapixels)
        if min(split.width, split.height) < SMALLEST_SIDE:
            message = f"{split.width} × {split.height} pixels are too few for compaction to save anything"
            return _refused(Reason.TOO_SMALL, message, split)
        checkpoint()
        stored = split.pixels()
    except formats.Unsupported as error:
        return Outcome(verdict=Verdict.PASSED_THROUGH, reason=error.reason, message=error.message, kind=error.kind)
    colour = np.ascontiguousarray(stored[:, :, : stored.shape[2] - 1] if stored.shape[2] in (2, 4) else stored)
    del stored
    ways = [_Way(1)]
    if network is not None:
        ways.append(_Way(network.scale, network.sha256, network.name))
    return _Compaction(original, policy, wanted, split, _Picture(colour), infer, checkpoint, reference_key).run(ways)


@dataclass
class _Compaction:
    original: bytes
    policy: Policy
    wanted: gate.Thresholds
    split: formats.Split
    picture: _Picture
    infer: Infer
    checkpoint: Callable[[], None]
    reference_key: bytes
    best_score: float | None = None
    _attempts: dict[tuple[_Way, int], _Attempt] = field(default_factory=dict)

    def run(self, ways: list[_Way]) -> Outcome:
        allowed = (1 - self.policy.min_saving) * len(self.original)
        plans: list[tuple[float, _Way, int]] = []
        objections: list[tuple[Reason, str]] = []
        sample = _Picture(_sample(self.picture.pixels))
        ratio = self.picture.pixels.size / sample.pixels.size
        for way in ways:
            largest = min([allowed * 1.2, *(size for size, _, _ in plans)]) / ratio  # No use in what another way beats.
            try:
                trial = self._search(sample, way, self._first_level(way), largest)
            except (formats.DoesNotFit, ReconstructionError) as error:
                objections.append(_problem(error))
                continue
            if trial is not None:
                plans.append((trial.size * ratio, way, trial.level))
        if not plans and not objections:
            objections.append((Reason.QUALITY, "no quality that saves bytes rebuilds it well enough"))
        del sample
        for _, way, level in sorted(plans, key=lambda plan: plan[0]):
            try:
                trial = self._search(self.picture, way, level, allowed)
                if trial is None:
                    objections.append((Reason.QUALITY, f"rebuilt, {self._nearest_objection(way)}"))
                    continue
                outcome = self._conclude(way, trial.level, allowed)
            except (formats.DoesNotFit, ReconstructionError) as error:
                objections.append(_problem(error))
                continue
            if outcome.verdict == Verdict.COMPACTED:
                return outcome
            assert outcome.reason is not None
            objections.append((outcome.reason, outcome.message))
        # The first is that of the most promising way.
        return _refused(*objections[0], self.split, self.best_score)

    def _first_level(self, way: _Way) -> int:
        return _FIRST_LEVEL[self.policy.preset] + (_HIGHER_WHEN_SMALL if way.scale > 1 else 0)

    def _search(self, picture: _Picture, way: _Way, first: int, largest: float) -> Trial | None:
        """The lowest level at which ``picture``, the whole one or a sample, passes the gate."""

        def attempt(level: int) -> Trial:
            if picture.pixels is self.picture.pixels:
                whole = self._attempt(way, level)
                return Trial(level, gate.headroom(whole.scores, self.wanted), len(whole.avif))
            avif = self._encode(picture, way, level)
            scores = gate.measure(picture.reference, picture.pixels, self._enlarge(picture, way, avif))
            self._note(scores)
            return Trial(level, gate.headroom(scores, self.wanted), len(avif))

        return planner.least_passing(attempt, first=first, tries=_TRIES, largest=largest)

    def _attempt(self, way: _Way, level: int) -> _Attempt:
        """The whole picture at one level, measured as readers will see it. Raises DoesNotFit, ReconstructionError."""
        if (way, level) not in self._attempts:
            avif = self._encode(self.picture, way, level)
            scores = self._measure(self._as_viewed(self._enlarge(self.picture, way, avif)))
            self._note(scores)
            self._attempts[way, level] = _Attempt(avif, scores)
        return self._attempts[way, level]

    def _nearest_objection(self, way: _Way) -> str:
        scores = [attempt.scores for (tried, _), attempt in self._attempts.items() if tried == way]
        return gate.objection(max(scores, key=lambda each: gate.headroom(each, self.wanted)), self.wanted)

    def _conclude(self, way: _Way, level: int, allowed: float) -> Outcome:
        """Rebuild the picture from its bytes once more, make the view, measure what readers will get, and write the
        recipe. Raises DoesNotFit, ReconstructionError."""
        avif = self._attempts[way, level].avif
        pixels = self._enlarge(self.picture, way, avif)
        self.checkpoint()
        fitted = formats.fit_view(self.split, pixels, self._note_for_fill)
        width, height = self.split.width, self.split.height
        again = formats.encode_scan(fitted.coding, width, height, pixels, len(fitted.scan))
        del pixels  # large
        if again != fitted.scan:
            message = "the view's encoder doesn't give the same bytes twice; please report this with the picture"
            return _refused(Reason.ERROR, message, self.split, self.best_score)
        del again
        view = fitted.expand()
        self.checkpoint()
        scores = self._measure(self._decode(view))
        if problem := gate.objection(scores, self.wanted):
            return _refused(Reason.QUALITY, f"rebuilt, {problem}", self.split, self.best_score)
        recipe = Recipe(
            width=width,
            height=height,
            original_size=len(self.original),
            sha256_original=hashlib.sha256(self.original).digest(),
            sha256_view=hashlib.sha256(view).digest(),
            preset=self.policy.preset,
            scale=way.scale,
            network=way.network_name,
            network_sha256=way.network_sha256,
            quality=planner.quality(level),
            coding=fitted.coding,
            prefix=fitted.prefix,
            scan_length=len(fitted.scan),
            suffix=fitted.suffix,
            encoder=fitted.encoder,
            scores=scores,
            created_by=f"esrfs {__version__}",
            reference=self._reference(fitted.scan),
        )
        if len(view) != len(self.original):
            message = "its view would not be of the original's size; please report this with the picture"
            return _refused(Reason.ERROR, message, self.split, self.best_score)
        encoded = recipe_format.encode(recipe)
        stored = outcome_format.stored_bytes(avif, encoded)
        if stored > allowed:
            message = f"it would take {stored:,} bytes of {len(self.original):,}, which saves too little"
            return _refused(Reason.NOT_WORTH_IT, message, self.split, scores.ssimulacra2)
        return Outcome(
            verdict=Verdict.COMPACTED,
            recipe=encoded,
            avif=avif,
            kind=self.split.kind,
            width=width,
            height=height,
            score=scores.ssimulacra2,
        )

    # Steps.

    def _encode(self, picture: _Picture, way: _Way, level: int) -> bytes:
        self.checkpoint()
        return encode_avif(picture.small(way.scale), planner.quality(level))

    def _enlarge(self, picture: _Picture, way: _Way, avif: bytes) -> Pixels:
        self.checkpoint()
        plan = picture.plan(way)
        return reconstruction.enlarge(plan, reconstruction.decode_small(plan, avif), self.infer)

    def _as_viewed(self, pixels: Pixels) -> Pixels:
        """What decoders will make of the view. Where that is what was put in, it is only made in the end."""
        if self.split.lossless:
            return pixels
        self.checkpoint()
        view = formats.fit_view(self.split, pixels).expand()
        del pixels  # large; nobody else holds it
        return self._decode(view)

    def _decode(self, view: bytes) -> Pixels:
        pixels = formats.decode(view, self.policy.max_megapixels)
        return pixels[:, :, : self.picture.pixels.shape[2]]  # without alpha, which is the original's

    def _measure(self, view: Pixels) -> Scores:
        self.checkpoint()
        return gate.measure(self.picture.reference, self.picture.pixels, view)

    def _reference(self, scan: bytes) -> bytes:
        return reference(self.reference_key, scan) if self.reference_key else b""

    def _note_for_fill(self, coding: Coding, scan: bytes) -> bytes:
        return self._reference(scan)

    def _note(self, scores: Scores) -> None:
        self.best_score = max(self.best_score if self.best_score is not None else -math.inf, scores.ssimulacra2)


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


def _sample(pixels: Pixels) -> Pixels:
    """Parts spread evenly over the picture, put together as one; of a picture not much larger than that, all of it."""
    rows, columns = _SAMPLE_TILES if pixels.shape[1] >= pixels.shape[0] else _SAMPLE_TILES[::-1]
    height, width = rows * _SAMPLE_TILE, columns * _SAMPLE_TILE
    if pixels.shape[0] < height or pixels.shape[1] < width or pixels.shape[0] * pixels.shape[1] < 2 * height * width:
        return pixels
    tops = np.linspace(0, pixels.shape[0] - _SAMPLE_TILE, rows).astype(int)
    lefts = np.linspace(0, pixels.shape[1] - _SAMPLE_TILE, columns).astype(int)
    return np.concatenate(
        [
            np.concatenate([pixels[top : top + _SAMPLE_TILE, left : left + _SAMPLE_TILE] for left in lefts], axis=1)
            for top in tops
        ]
    )


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def encode_avif(image: Image.Image, quality: int) -> bytes:
    """Encode a picture for a blob; ``quality`` is 0 to 99. The bytes don't depend on the machine's number of
    processors."""
    out = io.BytesIO()
    image.save(
        out,
        "AVIF",
        quality=quality,
        speed=_SPEED,
        # At full resolution 4:2:0 takes as many bytes for the same score, and there are pictures (dark, saturated) that
        # no quality makes good with it.
        subsampling="4:0:0" if image.mode == "L" else "4:4:4",
        codec="aom",
        # libaom with one thread gives other bytes than with several; tiles chosen automatically depend on the number,
        # too.
        max_threads=1,
        autotiling=False,
        tile_rows=0,
        tile_cols=0,
        advanced=_tuning(),
    )
    return out.getvalue()


@functools.cache
def _tuning() -> dict[str, str]:
    """libaom's tuning for the gate's metric, where this libaom has it: 4.5 % fewer bytes than its default (DESIGN
    10)."""
    best = {"tune": "ssimulacra2"}
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), "AVIF", codec="aom", max_threads=1, advanced=best)
    except (OSError, ValueError):
        return {}
    return best
