"""What compaction is asked and what it answers; these travel between the mount and the engine."""

from __future__ import annotations

import enum

import msgspec

from esrfs.blob import dictionary

PRESETS: dict[str, tuple[float, float]] = {
    # preset: least SSIMULACRA2 of the whole picture, how far below that the worst 256×256 tile may lie
    "faithful": (85.0, 15.0),
    "high": (70.0, 15.0),
    "balanced": (60.0, 20.0),
    "small": (50.0, 25.0),
}
LOSSLESS = "lossless"
"""In a preset's place: only what comes back bit for bit is compacted."""
NEVER = "never"
"""In a rule (``store/rules.py``): the file stays as it is."""
CHOICES = (*PRESETS, LOSSLESS)
PATIENCES = ("low", "normal", "high", "endless")
"""What each means: ``planner.PATIENCE``."""
REFINEMENTS = ("off", "idle", "always")
"""Whether small pictures are refined (``refine.py``): never; where an accelerator runs networks, or the machine has
nothing else to do; or whatever it takes."""
LONGEST_REFINEMENT = 1800.0
"""Seconds: half of what a compaction may take before the engine is thought to hang."""
CARRIES = ("reference", "full")


class Policy(msgspec.Struct, frozen=True):
    """What the owner of the store asks for."""

    preset: str = "high"
    """One of CHOICES."""
    network: str = "lite"
    """A family of networks (lite: those called lite-x1 to lite-x4, as far as they are here), or the name of one."""
    patience: str = "normal"
    """Of PATIENCES: how much time is spent on each picture for fewer bytes."""
    min_saving: float = 0.2
    """A blob is kept only if it is smaller than the original by at least this share."""
    min_saving_lossless: float = 0.05
    """The same for blobs that give the original back bit for bit."""
    max_megapixels: float = 200.0
    """Larger pictures are left alone: a bound on memory, and against decompression bombs."""
    refinement: str = "off"
    """One of REFINEMENTS."""
    refinement_seconds: float = 300.0
    """That refinement may take for one photograph, at most LONGEST_REFINEMENT. What is not done by then stays as it
    was, so a blob depends on the machine's speed where this ends it, and only there."""
    carry: str = "reference"
    """What a view's fill holds of its blob, one of CARRIES: ``full`` is the whole, for other stores."""


class Verdict(enum.StrEnum):
    COMPACTED = "compacted"
    REFUSED = "refused"
    """esrfs could carry the file, but the gate said no: quality, fit, or not worth it."""
    PASSED_THROUGH = "passed_through"
    """A kind of file that esrfs does not promise anything for; it stays bit for bit."""


class Reason(enum.StrEnum):
    """Why a file is not compacted; stable identifiers, shown beside the message."""

    NOT_A_PICTURE = "not_a_picture"
    UNSUPPORTED_KIND = "unsupported_kind"
    """A picture, but of a kind or with a feature that is passed through (CMYK, 16 bit, animation …)."""
    SIGNED = "signed"
    """Signed over its pixels (C2PA/JUMBF, caBX)."""
    BROKEN = "broken"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"
    QUALITY = "quality"
    DOES_NOT_FIT = "does_not_fit"
    """The rebuilt picture can't be encoded in the original's number of bytes."""
    NOT_WORTH_IT = "not_worth_it"
    NEVER = "never"
    """A rule of the store's owner says so."""
    HARD_LINKS = "hard_links"
    TEMPORARY_NAME = "temporary_name"
    METADATA = "metadata"
    """Owner, mode, ACL, xattrs or times could not be carried over to the blob."""
    NO_MEMORY = "no_memory"
    """The machine has too little memory for it now. Such a file is left, and looked at again later."""
    ENGINE_ENDED = "engine_ended"
    """The engine, or all of esrfs, ended while it was compacted, more than once: a bug, or too little memory. Tried
    again by another version of esrfs, or when somebody asks."""
    ERROR = "error"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one compaction. ``recipe`` (encoded) and ``avif`` (the picture; a JPEG XL if nothing is lost) are
    set for COMPACTED only."""

    verdict: Verdict
    reason: Reason | None = None
    message: str = ""
    """One sentence for people; empty for COMPACTED, but where only a lossless blob would do: why."""
    recipe: bytes = b""
    avif: bytes = b""
    kind: str = ""
    """One of ``formats.kinds.COMPACTED``, or what the content was recognised as; empty if not."""
    width: int = 0
    height: int = 0
    score: float | None = None
    """Best SSIMULACRA2 that was reached, also for REFUSED."""


_BLOB_OVERHEAD = 200
"""Bytes of boxes, footer and padding around picture and recipe; an upper bound."""


def stored_bytes(picture: bytes, recipe: bytes) -> int:
    """About what a blob of these takes (``recipe`` encoded)."""
    return len(picture) + len(dictionary.compressed(recipe)) + _BLOB_OVERHEAD
