"""What the formats have in common: a file taken apart, a view put together, and the ways in which that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from esrfs.blob import recipe
from esrfs.blob.recipe import Coding, Literal, PictureCoding, Run, Span
from esrfs.blob.reference import REFERENCE_BYTES
from esrfs.compaction.outcome import Reason

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]
    Samples = npt.NDArray[np.unsignedinteger]  # bytes, or 16 bits: 65,535 is what 255 is among bytes
else:
    Pixels = Samples = "numpy.ndarray"

SCAN_ALIGNMENTS = (65536, 4096)
"""The scan starts at a multiple of the first where the size allows, else of the next: the bytes before it are served
without a network, and programs read files in such blocks."""
TAIL_BYTES = 8192
"""Fill after the scan, where there is room: programs that look at a file's end read that much."""

Note = Callable[[Coding, bytes], bytes]
"""(how the pixels are coded, the scan) → what the fill shall say: nothing, or a reference (``blob/reference.py``), or a
reference and after it the whole blob. A format without fill, or without room in it, leaves it out (``noted``)."""


def no_note(coding: Coding, scan: bytes) -> bytes:
    """The fill says nothing."""
    return b""


def noted(note: bytes, room: int) -> bytes:
    """As much of ``note`` as is put into fill with ``room`` for so many bytes: all of it, or its reference, or
    nothing."""
    if len(note) <= room:
        return note
    return note[:REFERENCE_BYTES] if room >= REFERENCE_BYTES else b""


class Unsupported(Exception):  # noqa: N818
    """esrfs does not compact this file; ``message`` says why, in a sentence for people."""

    def __init__(self, reason: Reason, message: str, kind: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.kind = kind
        """As ``identify`` names it."""


class DoesNotFit(Exception):  # noqa: N818
    """These pixels can't be encoded in the number of bytes that there is."""


@dataclass(frozen=True)
class FittedView:
    """A view: ``prefix``, ``scan`` and ``suffix`` have exactly the original's length together."""

    coding: PictureCoding
    prefix: list[Span]
    scan: bytes
    suffix: list[Span]
    encoder: str
    """Names and versions of the libraries that wrote the scan."""

    def expand(self) -> bytes:
        """The view's bytes."""
        return recipe.expand(self.prefix) + self.scan + recipe.expand(self.suffix)


class Split(Protocol):
    """A picture file taken apart."""

    @property
    def kind(self) -> str:
        """One of ``kinds.COMPACTED``."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether a view decodes to just the pixels that were put in."""
        ...

    @property
    def width(self) -> int:
        """In pixels as stored: EXIF rotation is not applied."""
        ...

    @property
    def height(self) -> int: ...

    @property
    def bytes_per_pixel(self) -> int:
        """Memory that compaction takes for each pixel, besides what the file's size adds (docs/benchmarks.md)."""
        ...

    def pixels(self) -> Pixels:
        """uint8, height × width × C as stored; C: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.

        Raises Unsupported (BROKEN) if the compressed pixels are damaged.
        """
        ...

    def fit(self, pixels: Pixels, note: Note = no_note) -> FittedView:
        """See ``formats.fit_view``."""
        ...


def front_fill(header: int, available: int, smallest: int, largest: int) -> int:
    """How many bytes of fill to put between ``header`` bytes and the scan, so that the scan starts at a round offset.

    0 or ``smallest`` to ``largest`` bytes, at most ``available``.
    """
    for unit in SCAN_ALIGNMENTS:
        start = (header + min(available, largest)) // unit * unit
        if start - header >= smallest:
            return start - header
        if start == header:
            return 0
    return 0


def joined(spans: list[Span]) -> list[Span]:
    """The same bytes in as few spans as possible."""
    result: list[Span] = []
    for span in spans:
        last = result[-1] if result else None
        if isinstance(span, Literal) and isinstance(last, Literal):
            result[-1] = Literal(last.data + span.data)
        elif isinstance(span, Run) and isinstance(last, Run) and span.value == last.value:
            result[-1] = Run(span.value, last.count + span.count)
        elif recipe.length([span]):
            result.append(span)
    return result
