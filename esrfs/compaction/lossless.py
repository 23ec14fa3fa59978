"""Compaction without loss: what the gate refuses, and what its owner wants bit for bit, still shrinks where it can.

JPEG only, by transcoding to JPEG XL. A PNG is left alone: pixels and filters are easily kept in fewer bytes, but the
very same file comes back only from the very same version of whatever deflated it, and a promise for ever can't rest on
that.
"""

from __future__ import annotations

import hashlib
import math

from esrfs import __version__
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import JpegXlCoding, Literal, Recipe, Scores
from esrfs.compaction.outcome import LOSSLESS, Outcome, Policy, Reason, Verdict, stored_bytes
from esrfs.formats import identify, jpegxl, pixels
from esrfs.formats.jpegxl import Transcoded
from esrfs.formats.view import Unsupported

_WORTH_COMPARING = 0.6
"""Of the original's size: a lossy blob that takes no more is not compared with a lossless one (of about 0.8)."""
_HOPELESS = (Reason.NOT_A_PICTURE, Reason.BROKEN, Reason.TOO_LARGE, Reason.NO_MEMORY)


def compact(original: bytes, policy: Policy, room: float = math.inf) -> Outcome:
    """A blob from which ``original`` comes back bit for bit, or why there is none; made in ``room`` bytes of memory."""
    kind = identify(original)
    if kind != "jpeg":
        message = "only JPEG files shrink without loss, so that they come back bit for bit"
        return Outcome(verdict=Verdict.PASSED_THROUGH, reason=Reason.UNSUPPORTED_KIND, message=message, kind=kind)
    try:
        return _blob(original, policy, jpegxl.transcode(original, policy.max_megapixels, room), "")
    except Unsupported as error:
        verdict = Verdict.REFUSED if error.reason is Reason.NO_MEMORY else Verdict.PASSED_THROUGH
        return Outcome(verdict=verdict, reason=error.reason, message=error.message, kind=kind)


def where_better(original: bytes, policy: Policy, lossy: Outcome, room: float = math.inf) -> Outcome:
    """``lossy``, or a lossless outcome in its place: where that was refused, or takes as many bytes."""
    compacted = lossy.verdict is Verdict.COMPACTED
    allowed = stored_bytes(lossy.avif, lossy.recipe) if compacted else len(original)
    if lossy.reason in _HOPELESS or allowed < _WORTH_COMPARING * len(original) or identify(original) != "jpeg":
        return lossy
    pixels.give_memory_back()
    try:
        transcoded = jpegxl.transcode(original, policy.max_megapixels, room)
    except Unsupported as error:
        if error.reason is Reason.NO_MEMORY and not compacted:  # so that it is tried again
            return Outcome(verdict=Verdict.REFUSED, reason=error.reason, message=error.message, kind="jpeg")
        return lossy
    outcome = _blob(original, policy, transcoded, lossy.message)
    if outcome.verdict is not Verdict.COMPACTED or stored_bytes(outcome.avif, outcome.recipe) > allowed:
        return lossy
    return outcome


def _blob(original: bytes, policy: Policy, transcoded: Transcoded, note: str) -> Outcome:
    sha256 = hashlib.sha256(original).digest()
    recipe = Recipe(
        width=transcoded.width,
        height=transcoded.height,
        original_size=len(original),
        sha256_original=sha256,
        sha256_view=sha256,
        preset=LOSSLESS,
        scale=1,
        network="",
        network_sha256=b"",
        quality=100,
        coding=JpegXlCoding(behind=transcoded.behind),
        prefix=[Literal(transcoded.prefix)],
        scan_length=transcoded.scan_length,
        suffix=[Literal(transcoded.suffix)],
        encoder="",
        scores=Scores(ssimulacra2=100.0, worst_tile=100.0, psnr=99.0),
        created_by=f"esrfs {__version__}",
        note=note,
    )
    encoded = recipe_format.encode(recipe)
    stored = stored_bytes(transcoded.picture, encoded)
    if stored > (1 - policy.min_saving_lossless) * len(original):
        message = f"without loss it would take {stored:,} bytes of {len(original):,}, which saves too little"
        return Outcome(verdict=Verdict.REFUSED, reason=Reason.NOT_WORTH_IT, message=message, kind="jpeg")
    return Outcome(
        verdict=Verdict.COMPACTED,
        message=note,
        recipe=encoded,
        avif=transcoded.picture,
        kind="jpeg",
        width=transcoded.width,
        height=transcoded.height,
        score=100.0,
    )
