"""WebP views: the original's chunks, our picture, and fill, in exactly the original's number of bytes.

A view, byte for byte::

    RIFF header and the chunks before the picture   verbatim
    esRF    fill (the note, see ``view.Note``, and zeros), so that the scan gets a round offset; in files with VP8X
            only, since the simple format has its picture first
    ALPH    verbatim: the alpha of a lossy picture
    VP8 or VP8L     the header of the picture's chunk; its length is pinned
    scan    that chunk's data: what libwebp wrote, and zeros, which decoders don't read
    esRF    fill; with the note if there was no room for it before
    the chunks after the picture, and all that follows the RIFF   verbatim and at their offset

A lossy picture gets the highest of some qualities that fits: WebP has no quantisation tables that could be kept, and
the original's size bounds it anyway.
"""

from __future__ import annotations

import bisect
import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Literal as OneOf

import msgspec
import PIL
from PIL import Image, features

from esrfs.blob.recipe import Literal, Run, Span, WebpCoding
from esrfs.compaction.outcome import Reason
from esrfs.formats.pixels import DECODE_ERRORS, as_array, as_image, check_dimensions, softened
from esrfs.formats.signed import check_xmp
from esrfs.formats.view import (
    TAIL_BYTES,
    DoesNotFit,
    FittedView,
    Note,
    Pixels,
    Unsupported,
    front_fill,
    joined,
    no_note,
    noted,
)

QUALITIES = (30, 50, 65, 75, 80, 85, 90, 95)
"""Of lossy pictures."""
EFFORTS = ((4, 75), (6, 75))
"""libwebp's method and quality for lossless pictures, tried in this order until the view fits. (A quality of 100 takes
some 20 times as long as the second, and gains nothing; views that were made by it are still written so.)"""
_QUICK_MEGAPIXELS = (48.0, 24.0)
"""Up to which each is tried: readers wait for it, about a second for each megapixel."""

_HEADER = 8
"""Bytes of a chunk before its data."""
_FILL = b"esRF"
_SLACK = 64
_MOST_CHUNKS = 1 << 16
_ANIMATION = 0x02
"""A flag in VP8X."""
_PICTURE = (b"VP8 ", b"VP8L")


@dataclass(frozen=True)
class _Chunk:
    kind: bytes
    data: bytes
    start: int
    end: int
    """Offsets in the file; the byte that makes an odd length even is part of it."""


@dataclass(frozen=True)
class WebpSplit:
    """A WebP file taken apart; see ``view.Split``."""

    data: bytes
    width: int
    height: int
    mode: OneOf["RGB", "RGBA"]
    lossless: bool
    extended: bool
    """Whether there is a VP8X chunk: only then may others lie before the picture."""
    alpha: bytes
    """The ALPH chunk; empty: none."""
    start: int
    """Offset of the ALPH chunk, or of the picture's."""
    end: int
    """Offset after the picture's chunk."""
    riff_end: int
    kind: str = "webp"

    @property
    def bytes_per_pixel(self) -> int:
        return 20 + 8 * (self.mode == "RGBA" or bool(self.alpha))

    def pixels(self) -> Pixels:
        try:
            with Image.open(io.BytesIO(self.data[: self.riff_end]), formats=("WEBP",)) as image:
                if image.size != (self.width, self.height):
                    raise _broken("its headers contradict each other")
                return as_array(image.convert(self.mode))
        except DECODE_ERRORS as error:
            raise _broken(f"its pixels can't be decoded ({error})") from error

    def fit(self, pixels: Pixels, note: Note = no_note) -> FittedView:
        return _fit(self, pixels, note)


def split(data: bytes, max_megapixels: float) -> WebpSplit:
    """See ``formats.split``."""
    riff_end = 8 + int.from_bytes(data[4:8], "little")
    if riff_end > len(data):
        raise _broken("it is shorter than its header says")
    chunks = _chunks(data, riff_end)
    kinds = [chunk.kind for chunk in chunks]
    if b"C2PA" in kinds:
        message = "this WebP carries C2PA Content Credentials, which sign its pixels; it stays bit for bit"
        raise Unsupported(Reason.SIGNED, message, "webp")
    for chunk in chunks:
        if chunk.kind == b"XMP ":
            check_xmp(chunk.data, "webp", "WebP")
    extended = kinds[:1] == [b"VP8X"]
    if extended and len(chunks[0].data) != 10:
        raise _broken("its VP8X header is malformed")
    if b"ANIM" in kinds or b"ANMF" in kinds or (extended and chunks[0].data[0] & _ANIMATION):
        raise _passed("is animated")
    pictures = [index for index, kind in enumerate(kinds) if kind in _PICTURE]
    if len(pictures) != 1 or (not extended and pictures != [0]):
        raise _broken("it has no picture" if not pictures else "it has several pictures, or one at a wrong place")
    picture = chunks[pictures[0]]
    before = chunks[pictures[0] - 1] if pictures[0] else None
    alpha = before if before is not None and before.kind == b"ALPH" else None
    lossless = picture.kind == b"VP8L"
    if kinds.count(b"ALPH") != (alpha is not None) or (lossless and alpha):
        raise _broken("its alpha is at a wrong place")
    width, height, transparent = _lossless_header(picture.data) if lossless else _lossy_header(picture.data)
    check_dimensions(width, height, max_megapixels, "webp")
    if lossless and width * height > _QUICK_MEGAPIXELS[0] * 1e6:
        raise _passed(f"is lossless and of more than {_QUICK_MEGAPIXELS[0]:g} megapixels, which readers would wait for")
    if extended:
        canvas = (_u24(chunks[0].data[4:7]) + 1, _u24(chunks[0].data[7:10]) + 1)
        if canvas != (width, height):
            raise _broken("its headers contradict each other")
        transparent = transparent or bool(alpha)  # readers see it also where VP8X denies it
    return WebpSplit(
        data=data,
        width=width,
        height=height,
        mode="RGBA" if transparent else "RGB",
        lossless=lossless,
        extended=extended,
        alpha=data[alpha.start : alpha.end] if alpha else b"",
        start=alpha.start if alpha else picture.start,
        end=picture.end,
        riff_end=riff_end,
    )


def encode_scan(coding: WebpCoding, width: int, height: int, pixels: Pixels, length: int) -> bytes:
    """See ``formats.encode_scan``."""
    alpha = _alpha_image(coding, width, height)
    for image in softened(as_image(pixels, width, height, "RGB")):
        stream = _stream(coding, image, alpha)
        if len(stream) <= length:
            return stream + bytes(length - len(stream))
    raise DoesNotFit(f"the rebuilt picture needs {len(stream)} bytes, and there are {length}")


def encoder() -> str:
    """What writes the scans: ``pillow 12.1.0, libwebp 1.6.0``."""
    return f"pillow {PIL.__version__}, libwebp {features.version('webp')}"


def _fit(split: WebpSplit, pixels: Pixels, note: Note) -> FittedView:
    image = as_image(pixels, split.width, split.height, "RGB")
    room = split.end - split.start - len(split.alpha) - _HEADER
    coding, stream = _lossless(split, image, room) if split.lossless else _lossy(image, room)
    if len(stream) > room:
        raise DoesNotFit(f"the rebuilt picture is {len(stream) - room} bytes too long for the original's size")
    return _lay_out(split, coding, stream, room, note)


def _lossy(image: Image.Image, room: int) -> tuple[WebpCoding, bytes]:
    """The highest quality that fits, or the lowest."""
    streams: dict[int, bytes] = {}

    def size(quality: int) -> float:
        try:
            streams[quality] = _stream(WebpCoding(mode="RGB", lossless=False, quality=quality), image, None)
        except DoesNotFit:
            if quality == QUALITIES[0]:
                raise
            return math.inf
        return len(streams[quality])

    fitting = bisect.bisect_right(QUALITIES, float(room), key=size)
    quality = QUALITIES[max(fitting - 1, 0)]
    if quality not in streams:
        size(quality)
    return WebpCoding(mode="RGB", lossless=False, quality=quality), streams[quality]


def _lossless(split: WebpSplit, image: Image.Image, room: int) -> tuple[WebpCoding, bytes]:
    coding = WebpCoding(mode=split.mode, lossless=True)
    if split.mode == "RGBA":
        coding = msgspec.structs.replace(coding, alpha=zlib.compress(split.pixels()[:, :, 3].tobytes(), 9))
    alpha = _alpha_image(coding, split.width, split.height)
    for (method, quality), most in zip(EFFORTS, _QUICK_MEGAPIXELS, strict=True):
        if split.width * split.height > most * 1e6:
            break
        coding = msgspec.structs.replace(coding, method=method, quality=quality)
        stream = _stream(coding, image, alpha)
        if len(stream) <= room:
            break
    return coding, stream


def _lay_out(split: WebpSplit, coding: WebpCoding, stream: bytes, room: int, note: Note) -> FittedView:
    free = room - len(stream)
    slack = min(free, max(_SLACK, len(stream) // 64))
    tail = min(free - slack, TAIL_BYTES)
    before = split.start + len(split.alpha) + _HEADER
    front = front_fill(before, free - slack - tail, _HEADER, free) if split.extended else 0  # even, as all chunks are
    tail = (free - slack - front) // 2 * 2
    if tail < _HEADER or room % 2:  # odd: the byte that would make it even is missing, at the file's very end
        tail = 0
    length = room - front - tail
    scan = stream + bytes(length - len(stream))
    wanted = note(coding, scan)
    in_front = noted(wanted, max(0, front - _HEADER))
    behind = b"" if in_front else noted(wanted, max(0, tail - _HEADER))
    header = (b"VP8L" if split.lossless else b"VP8 ") + struct.pack("<I", length)
    return FittedView(
        coding=coding,
        prefix=joined(
            [Literal(split.data[: split.start]), *_fill(front, in_front), Literal(split.alpha), Literal(header)]
        ),
        scan=scan,
        suffix=joined([*_fill(tail, behind), Literal(split.data[split.end :])]),
        encoder=encoder(),
    )


def _fill(count: int, note: bytes) -> list[Span]:
    """``count`` bytes of an esRF chunk: 0, or 8 and more, an even number."""
    if not count:
        return []
    header = _FILL + struct.pack("<I", count - _HEADER)
    return [Literal(header + note), Run(0, count - _HEADER - len(note))]


def _stream(coding: WebpCoding, image: Image.Image, alpha: Image.Image | None) -> bytes:
    """The data of the picture's chunk."""
    if alpha is not None:
        image = image.copy()
        image.putalpha(alpha)
    out = io.BytesIO()
    try:
        image.save(
            out, "WEBP", lossless=coding.lossless, quality=coding.quality, method=coding.method, exact=coding.lossless
        )
    except ValueError as error:  # lossy, of tens of megapixels: what is said of their blocks has 512 KiB at most
        raise DoesNotFit(f"libwebp can't write it at this quality ({error})") from error
    made = out.getvalue()
    return next(chunk.data for chunk in _chunks(made, len(made)) if chunk.kind in _PICTURE)


def _alpha_image(coding: WebpCoding, width: int, height: int) -> Image.Image | None:
    if coding.mode == "RGB":
        return None
    return Image.frombytes("L", (width, height), zlib.decompressobj().decompress(coding.alpha, width * height))


def _chunks(data: bytes, end: int) -> list[_Chunk]:
    """All chunks of the RIFF. Raises Unsupported (BROKEN)."""
    chunks: list[_Chunk] = []
    offset = 12
    while offset < end:
        if offset + _HEADER > end:
            raise _broken("there are bytes between its chunks that belong to none")
        kind, length = struct.unpack_from("<4sI", data, offset)
        after = offset + _HEADER + length + length % 2
        if after > end + length % 2:
            raise _broken("a chunk is longer than the file")
        if len(chunks) == _MOST_CHUNKS:
            raise _passed(f"has more than {_MOST_CHUNKS} chunks")
        chunks.append(_Chunk(kind, data[offset + _HEADER : offset + _HEADER + length], offset, min(after, end)))
        offset = after
    return chunks


def _lossy_header(data: bytes) -> tuple[int, int, bool]:
    """Width, height, and that it has no alpha."""
    if len(data) < 10 or data[3:6] != b"\x9d\x01\x2a" or data[0] & 1:
        raise _broken("its picture does not begin with its header")
    if data[0] >> 1 & 7:
        raise _passed("is coded with other filters than most (VP8 version 1 to 3)")
    width, height = struct.unpack_from("<HH", data, 6)
    if width >> 14 or height >> 14:
        raise _passed("asks to be scaled when shown")
    return width & 0x3FFF, height & 0x3FFF, False


def _lossless_header(data: bytes) -> tuple[int, int, bool]:
    """Width, height, and whether it has alpha."""
    if len(data) < 5 or data[0] != 0x2F:
        raise _broken("its picture does not begin with its header")
    bits = int.from_bytes(data[1:5], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)


def _u24(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _broken(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this WebP is damaged: {what}; it stays bit for bit", "webp")


def _passed(what: str) -> Unsupported:
    return Unsupported(Reason.UNSUPPORTED_KIND, f"this WebP {what}; esrfs keeps such files bit for bit", "webp")
