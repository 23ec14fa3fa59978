"""Picture files: split a file into pixels and envelope, and make a view of exactly as many bytes from other pixels.

``split`` (what is in this file, can esrfs promise anything for it?), then ``Split.pixels()``, then ``fit_view`` (once,
at compaction: pins every byte but the scan) and ``encode_scan`` (at each reconstruction: the scan again). ``decode``
reads any picture.

This package itself imports neither numpy nor Pillow, so that processes which must stay small may use ``identify`` and
the exceptions; the other functions import them when first called.
"""

from __future__ import annotations

from typing import Any, Protocol

from esrfs.blob.recipe import PictureCoding, kind_of
from esrfs.compaction.outcome import Reason
from esrfs.formats import kinds
from esrfs.formats.identify import identify
from esrfs.formats.view import DoesNotFit, FittedView, Note, Pixels, Split, Unsupported, no_note

__all__ = [
    "DoesNotFit",
    "FittedView",
    "Note",
    "Pixels",
    "Split",
    "Unsupported",
    "canvas",
    "decode",
    "encode_scan",
    "fit_view",
    "identify",
    "no_note",
    "split",
]


class _Kind(Protocol):
    """What the module of each kind has."""

    def split(self, data: bytes, max_megapixels: float) -> Split: ...

    def encode_scan(self, coding: Any, width: int, height: int, pixels: Pixels, length: int) -> bytes: ...


def split(data: bytes, max_megapixels: float) -> Split:
    """Take a picture file apart and check that esrfs can keep its promises for it.

    Nothing is decoded yet but, for PNG, the compressed stream is checked. Raises Unsupported with the reason.
    """
    kind = identify(data)
    if not kind:
        raise Unsupported(Reason.NOT_A_PICTURE, "esrfs knows no picture format in this file; it stays as it is", kind)
    if kind not in kinds.COMPACTED:
        message = f"esrfs compacts {kinds.in_words()} files; this one is {kind} and stays bit for bit"
        raise Unsupported(Reason.UNSUPPORTED_KIND, message, kind)
    return _module(kind).split(data, max_megapixels)


def _module(kind: str) -> _Kind:
    from esrfs.formats import bmp, jpeg, png, tiff, webp  # noqa: PLC0415

    modules: dict[str, _Kind] = {"jpeg": jpeg, "png": png, "webp": webp, "tiff": tiff, "bmp": bmp}
    return modules[kind]


def fit_view(split: Split, pixels: Pixels, note: Note = no_note) -> FittedView:
    """Encode ``pixels`` (uint8, height × width [× 1 or 3; alpha is taken from the original]) as a view of exactly the
    original's size: its envelope verbatim, the rest filled. ``note`` tells what the fill says.

    Raises DoesNotFit when no allowed setting gets it into that size, ValueError for pixels of another shape.
    """
    return split.fit(pixels, note)


def encode_scan(coding: PictureCoding, width: int, height: int, pixels: Pixels, length: int) -> bytes:
    """The scan of a view again: exactly ``length`` bytes, the same for the same pixels and encoder.

    Pixels that differ from those at compaction (other hardware) and would need more are softened, just enough.
    Raises DoesNotFit if even that is not enough, ValueError for pixels of another shape.
    """
    return _module(kind_of(coding)).encode_scan(coding, width, height, pixels, length)


def recoded(split: Split, pixels: Pixels) -> Pixels:
    """What decoders make of ``pixels``, of any size, when they are coded as a view of ``split`` would be that has room
    enough: what its codec loses can be known before the whole view is made."""
    from esrfs.formats import jpeg, tiff  # noqa: PLC0415

    if isinstance(split, jpeg.JpegSplit):
        return jpeg.recoded(split.structure.coding, pixels)
    return tiff.recoded(split, pixels) if isinstance(split, tiff.TiffSplit) else pixels


def decode(data: bytes, max_megapixels: float) -> Pixels:
    """Pixels of any picture that Pillow reads: uint8, height × width × 1 to 4, as stored (no EXIF rotation, no colour
    management; 16 bit is cut to 8, palettes and CMYK become RGB, the first of several frames counts).

    Raises Unsupported (NOT_A_PICTURE, UNSUPPORTED_KIND, TOO_LARGE, BROKEN).
    """
    from esrfs.formats import pixels  # noqa: PLC0415

    try:
        return pixels.decode(data, max_megapixels)
    except Unsupported as error:
        if error.kind != "png":
            raise
        # Pillow reads no PNG with more than a mebibyte of compressed text, profile or XMP in it.
        try:
            return split(data, max_megapixels).pixels()
        except Unsupported:
            raise error from None


def canvas(height: int, width: int) -> Pixels:
    """Room for a picture (height × width × 3) that ``encode_scan`` and ``fit_view`` need not copy."""
    from esrfs.formats import pixels  # noqa: PLC0415

    return pixels.canvas(height, width)
