"""PNG views: the original's chunks, our pixels, and fill, in exactly the original's number of bytes.

A view, byte for byte::

    signature and the chunks before IDAT   verbatim
    esRF    fill: the note (a reference to the blob, and what ``view.Note`` says) and zeros, in chunks of 1 MiB or less;
            private, ancillary, not safe to copy (an editor drops them)
    IDAT    the header of one chunk, whose length is pinned: programs that list chunks, or look for the first pixels,
            need no network
    scan    that chunk's data, a zlib stream with as many empty deflate blocks at its beginning as make its length the
            pinned one, and its checksum
    esRF    fill; with the note if there was no room for it before
    the chunks after IDAT, IEND, and all that follows, verbatim and at their offset
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Literal as OneOf

import PIL
from PIL import Image, features

from esrfs.blob.recipe import Literal, PngCoding, Run, Span
from esrfs.compaction.outcome import Reason
from esrfs.formats.pixels import DECODE_ERRORS, as_array, as_image, check_dimensions, softened
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

LEVELS = (3, 6, 9)
"""zlib levels that are tried in this order until the view fits: its size is given, so the fastest is the best."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FILL = b"esRF"
_FILL_DATA = 1 << 20
_CHUNK = 12
"""Bytes of a chunk without its data."""
_CHUNK_HEADER, _CHUNK_CHECKSUM = 8, 4
_LONGEST = (1 << 31) - 1
"""Bytes of data in one chunk."""
_FIVE, _SIX = b"\x00\x00\x00\xff\xff", b"\x02\x00\x00\x00\xff\xff"
"""Deflate blocks that inflate to nothing, of so many bytes: a stored one, and a stored one after one of fixed codes."""
_SLACK = 64
"""Bytes that the stream may grow at least, where there is room, on other hardware."""
_MODES: dict[int, OneOf["L", "LA", "RGB", "RGBA"]] = {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}
_REFUSED = {
    b"acTL": "is animated",
    b"fcTL": "is animated",
    b"fdAT": "is animated",
    b"tRNS": "marks one colour as transparent (tRNS)",
    b"iDOT": "tells where its compressed pixels lie (iDOT, of Apple)",
    b"CgBI": "is in Apple's own variant of PNG",
}


@dataclass(frozen=True)
class Chunk:
    kind: bytes
    data: bytes
    start: int
    end: int
    """Offsets in the file."""


@dataclass(frozen=True)
class PngSplit:
    """A PNG file taken apart; see ``view.Split``."""

    data: bytes
    width: int
    height: int
    mode: OneOf["L", "LA", "RGB", "RGBA"]
    scan_start: int
    """Offset of the first IDAT chunk."""
    scan_end: int
    """Offset after the last IDAT chunk."""
    stream: bytes
    """The zlib stream of all IDAT chunks."""
    kind: str = "png"
    lossless: bool = True

    def pixels(self) -> Pixels:
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, _colour_type(self.mode), 0, 0, 0)
        parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", self.stream), _chunk(b"IEND", b""))
        return _decoded(_SIGNATURE + b"".join(parts))

    def fit(self, pixels: Pixels, note: Note = no_note) -> FittedView:
        return _fit(self, pixels, note)


def split(data: bytes, max_megapixels: float) -> PngSplit:
    """See ``formats.split``."""
    chunks = _chunks(data)
    header = chunks[0]
    if header.kind != b"IHDR" or len(header.data) != 13:
        raise _broken("it does not begin with its header")
    width, height, bits, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", header.data)
    check_dimensions(width, height, max_megapixels, "png")
    for chunk in chunks:
        if chunk.kind in (b"caBX", b"dSIG"):
            message = "this PNG is signed over its pixels (C2PA Content Credentials or dSIG); it stays bit for bit"
            raise Unsupported(Reason.SIGNED, message, "png")
        if chunk.kind in _REFUSED:
            raise _passed(_REFUSED[chunk.kind])
    if colour == 3:
        raise _passed("has a palette")
    if bits != 8:
        raise _passed(f"has {bits} bit{'s' if bits > 1 else ''} a sample")
    if interlace == 1:
        raise _passed("is interlaced")
    if colour not in _MODES or compression or filtering or interlace:
        raise _broken("its header has values that no standard knows")
    pixel_chunks = [index for index, chunk in enumerate(chunks) if chunk.kind == b"IDAT"]
    if not pixel_chunks or chunks[-1].kind != b"IEND":
        raise _broken("it has no pixels" if not pixel_chunks else "it has no end")
    first, last = pixel_chunks[0], pixel_chunks[-1]
    if last - first + 1 != len(pixel_chunks):
        raise _broken("there are other chunks between its pixels")
    for chunk in chunks:
        if not chunk.kind[0] & 0x20 and chunk.kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            raise _passed(f"has a critical chunk {chunk.kind.decode('latin-1')!r} that esrfs does not know")
    mode = _MODES[colour]
    stream = b"".join(chunk.data for chunk in chunks[first : last + 1])
    _check_stream(stream, width, height, mode)
    return PngSplit(data, width, height, mode, chunks[first].start, chunks[last].end, stream)


def encode_scan(coding: PngCoding, width: int, height: int, pixels: Pixels, length: int) -> bytes:
    """See ``formats.encode_scan``."""
    alpha = _alpha_image(coding, width, height)
    base = as_image(pixels, width, height, _colour_mode(coding.mode))
    for image in softened(base):
        stream = _stream(coding, image, alpha)
        rest = length - _CHUNK_CHECKSUM - len(stream)
        if _can_pad(rest):
            return _padded(stream, rest)
    raise DoesNotFit(f"the rebuilt picture needs {len(stream) + _CHUNK_CHECKSUM} bytes, and there are {length}")


def encoder() -> str:
    """What writes the scans: ``pillow 12.1.0, zlib-ng 2.2.5``."""
    zlib_ng = features.version("zlib_ng")
    return f"pillow {PIL.__version__}, {f'zlib-ng {zlib_ng}' if zlib_ng else 'zlib ' + str(features.version('zlib'))}"


def _fit(split: PngSplit, pixels: Pixels, note: Note) -> FittedView:
    base = as_image(pixels, split.width, split.height, _colour_mode(split.mode))
    alpha = b""
    if split.mode in ("LA", "RGBA"):
        alpha = zlib.compress(split.pixels()[:, :, -1].tobytes(), 9)
    free = -1
    for level in LEVELS:
        coding = PngCoding(mode=split.mode, compress_level=level, alpha=alpha)
        stream = _stream(coding, base, _alpha_image(coding, split.width, split.height))
        free = split.scan_end - split.scan_start - _CHUNK - len(stream)
        if _can_pad(free) and split.scan_end - split.scan_start < _LONGEST:
            return _lay_out(split, coding, stream, free, note)
    if free > 0:
        raise DoesNotFit(f"{free} bytes are left, which no fill takes")
    raise DoesNotFit(f"the rebuilt picture is {-free} bytes too long for the original's size")


def _lay_out(split: PngSplit, coding: PngCoding, stream: bytes, free: int, note: Note) -> FittedView:
    slack = min(free, max(_SLACK, len(stream) // 64))
    if free - slack < _CHUNK:
        slack = free
    tail = min(free - slack, TAIL_BYTES)
    front = front_fill(split.scan_start + _CHUNK_HEADER, free - slack - tail, _CHUNK, free)
    tail = free - slack - front
    header = struct.pack(">I", len(stream) + slack) + b"IDAT"
    scan = _padded(stream, slack)
    wanted = note(coding, scan)
    in_front = noted(wanted, _fill_room(front))
    behind = b"" if in_front else noted(wanted, _fill_room(tail))
    return FittedView(
        coding=coding,
        prefix=joined([Literal(split.data[: split.scan_start]), *_fill(front, in_front), Literal(header)]),
        scan=scan,
        suffix=joined([*_fill(tail, behind), Literal(split.data[split.scan_end :])]),
        encoder=encoder(),
    )


def _fill_room(count: int) -> int:
    """Bytes of data in ``count`` bytes of fill."""
    return count - -(-count // (_CHUNK + _FILL_DATA)) * _CHUNK


def _fill(count: int, note: bytes) -> list[Span]:
    """``count`` bytes of esRF chunks; 0, or at least 12."""
    spans: list[Span] = []
    while count:
        size = min(count, _CHUNK + _FILL_DATA)
        if 0 < count - size < _CHUNK:
            size -= _CHUNK
        room = size - _CHUNK
        said, note = note[:room], note[room:]
        zeros = room - len(said)
        checksum = zlib.crc32(b"".join((_FILL, said, bytes(zeros))))
        head, end = struct.pack(">I", room) + _FILL + said, struct.pack(">I", checksum)
        spans += [Literal(head), Run(0, zeros), Literal(end)]
        count -= size
    return spans


def _can_pad(count: int) -> bool:
    """Whether a stream can be made longer by ``count`` bytes: by 0, 5, 6, 10, 11, 12, and so on; all from 20 on."""
    return count >= 0 and count >= count % 5 * len(_SIX)


def _padded(stream: bytes, count: int) -> bytes:
    """A chunk's data, ``count`` bytes longer than ``stream``, and its checksum."""
    sixes = count % 5
    data = stream[:2] + _SIX * sixes + _FIVE * ((count - sixes * len(_SIX)) // len(_FIVE)) + stream[2:]
    return data + struct.pack(">I", zlib.crc32(data, zlib.crc32(b"IDAT")))


def _stream(coding: PngCoding, image: Image.Image, alpha: Image.Image | None) -> bytes:
    """The pixels as a zlib stream."""
    if alpha is not None:
        image = image.copy()
        image.putalpha(alpha)
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=coding.compress_level)
    return b"".join(chunk.data for chunk in _chunks(out.getvalue()) if chunk.kind == b"IDAT")


def _alpha_image(coding: PngCoding, width: int, height: int) -> Image.Image | None:
    if coding.mode in ("L", "RGB"):
        return None
    plane = zlib.decompressobj().decompress(coding.alpha, width * height)
    return Image.frombytes("L", (width, height), plane)


def _colour_mode(mode: str) -> str:
    return "L" if mode in ("L", "LA") else "RGB"


def _colour_type(mode: str) -> int:
    return next(number for number, name in _MODES.items() if name == mode)


def _chunk(kind: bytes, data: bytes | memoryview) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)))


def _chunks(data: bytes) -> list[Chunk]:
    """All chunks up to IEND. Raises Unsupported (BROKEN) for a wrong checksum or a missing end."""
    chunks: list[Chunk] = []
    offset = len(_SIGNATURE)
    while not chunks or chunks[-1].kind != b"IEND":
        if offset + _CHUNK > len(data):
            raise _broken("it ends too early")
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + _CHUNK + length
        if length > 0x7FFFFFFF or end > len(data):
            raise _broken("a chunk is longer than the file")
        body = data[offset + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
            raise _broken(f"the checksum of its chunk {kind.decode('latin-1')!r} is wrong")
        chunks.append(Chunk(kind, body, offset, end))
        offset = end
    return chunks


def _check_stream(stream: bytes, width: int, height: int, mode: str) -> None:
    """That the compressed pixels are whole, neither more nor less than the header says, with filters that exist."""
    row = 1 + width * len(mode)
    inflater = zlib.decompressobj()
    seen = 0
    try:
        while not inflater.eof:
            # whole rows at a time bound the memory, and put each row's filter byte at a known place
            part = inflater.decompress(stream, max(1, (1 << 22) // row) * row)
            stream = inflater.unconsumed_tail
            if not part and not inflater.eof:
                break
            if seen % row == 0 and any(value > 4 for value in set(part[::row])):
                raise _broken("a row has a filter that does not exist")
            seen += len(part)
            if seen > row * height:
                break
    except zlib.error as error:
        raise _broken(f"its compressed pixels are damaged ({error})") from error
    if not inflater.eof or seen != row * height or inflater.unused_data:
        raise _broken("its compressed pixels are cut, or more than its header says")


def _decoded(data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return as_array(image)
    except DECODE_ERRORS as error:
        raise _broken(f"its pixels can't be decoded ({error})") from error


def _broken(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this PNG is damaged: {what}; it stays bit for bit", "png")


def _passed(what: str) -> Unsupported:
    return Unsupported(Reason.UNSUPPORTED_KIND, f"this PNG {what}; esrfs keeps such files bit for bit", "png")
