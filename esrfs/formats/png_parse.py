"""The structure of a PNG file, and what esrfs refuses to touch in it.

Accepted: 8 bits a sample in gray, RGB, with alpha or without; palettes; gray of 2 and 4 bits; interlaced or not. Every
checksum is checked, and that the compressed pixels are whole.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal as OneOf

import numpy as np

from esrfs.compaction.outcome import Reason
from esrfs.formats.colours import all_gray
from esrfs.formats.pixels import check_dimensions
from esrfs.formats.signed import check_xmp
from esrfs.formats.view import Pixels, Unsupported

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK_BYTES = 12
"""Of a chunk without its data."""
_MOST_CHUNKS = 1 << 18
"""Encoders write some kilobytes of pixels in each."""
_PIECE = 1 << 20
"""Of the compressed pixels that are inflated at once: what is not yet inflated is copied each time."""
_INFLATED = 1 << 22
"""Bytes that come of it at once, at most."""
_CUT = "its compressed pixels are cut, or more than its header says"

Mode = OneOf["L", "LA", "RGB", "RGBA"]
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_MODES: dict[int, Mode] = {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}
_REFUSED = {
    b"acTL": "is animated",
    b"fcTL": "is animated",
    b"fdAT": "is animated",
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
class Colours:
    """The colours of a picture that has few."""

    pixels: Pixels
    """Number of colours × 4: RGB and alpha."""

    @property
    def opaque(self) -> bool:
        return bool((self.pixels[:, 3] == 255).all())


@dataclass(frozen=True)
class Pass:
    """The pixels that one pass of an interlaced picture holds (Adam7); all of a picture that is not."""

    left: int
    top: int
    across: int
    down: int
    width: int
    height: int


@dataclass(frozen=True)
class Structure:
    width: int
    height: int
    bits: int
    """Of a sample."""
    interlaced: bool
    mode: Mode
    """Of the pixels that the samples stand for."""
    colours: Colours | None
    """Of a picture whose samples are their numbers."""
    key: bytes
    """The colour that is transparent, a byte for each sample; empty: none."""
    header: bytes
    """The data of IHDR."""
    scan_start: int
    """Offset of the first IDAT chunk."""
    scan_end: int
    """Offset after the last IDAT chunk."""
    stream: bytes
    """The zlib stream of all IDAT chunks."""


def parse(data: bytes, max_megapixels: float) -> Structure:
    """Take a PNG file apart. Raises Unsupported (UNSUPPORTED_KIND, SIGNED, BROKEN, TOO_LARGE)."""
    parts = chunks_of(data)
    header = parts[0]
    if header.kind != b"IHDR" or len(header.data) != 13:
        raise broken("it does not begin with its header")
    width, height, bits, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", header.data)
    check_dimensions(width, height, max_megapixels, "png")
    for chunk in parts:
        if chunk.kind in (b"caBX", b"dSIG"):
            message = "this PNG is signed over its pixels (C2PA Content Credentials or dSIG); it stays bit for bit"
            raise Unsupported(Reason.SIGNED, message, "png")
        if chunk.kind == b"iTXt":
            check_xmp(chunk.data, "png", "PNG")
        if chunk.kind in _REFUSED:
            raise _passed(_REFUSED[chunk.kind])
    if bits == 16:
        raise _passed("has 16 bits a sample")
    if bits == 1:
        raise _passed("has 2 colours, which PNG itself makes smaller than any picture of them")
    if (colour not in (0, 3) or bits not in (2, 4, 8)) and (colour not in _MODES or bits != 8):
        raise broken("its header has values that no standard knows")
    if compression or filtering or interlace > 1:
        raise broken("its header has values that no standard knows")
    pixel_chunks = [index for index, chunk in enumerate(parts) if chunk.kind == b"IDAT"]
    if not pixel_chunks or parts[-1].kind != b"IEND":
        raise broken("it has no pixels" if not pixel_chunks else "it has no end")
    first, last = pixel_chunks[0], pixel_chunks[-1]
    if last - first + 1 != len(pixel_chunks):
        raise broken("there are other chunks between its pixels")
    for chunk in parts:
        if not chunk.kind[0] & 0x20 and chunk.kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            raise _passed(f"has a critical chunk {chunk.kind.decode('latin-1')!r} that esrfs does not know")
    stream = b"".join(chunk.data for chunk in parts[first : last + 1])
    _check_stream(stream, passes(width, height, bool(interlace)), bits * len(_MODES.get(colour, "P")))
    transparent = next((chunk.data for chunk in parts[:first] if chunk.kind == b"tRNS"), None)
    colours, key = None, b""
    if colour == 3 or bits < 8:
        colours = _palette(parts[:first], transparent) if colour == 3 else _grays(bits, transparent)
        mode = _mode(gray=all_gray(colours.pixels), alpha=not colours.opaque)
    else:
        key = _key(transparent, len(_MODES[colour])) if colour in (0, 2) else b""
        mode = _mode(gray=colour in (0, 4), alpha=colour in (4, 6) or bool(key))
    return Structure(
        width=width,
        height=height,
        bits=bits,
        interlaced=bool(interlace),
        mode=mode,
        colours=colours,
        key=key,
        header=header.data,
        scan_start=parts[first].start,
        scan_end=parts[last].end,
        stream=stream,
    )


def _mode(*, gray: bool, alpha: bool) -> OneOf["L", "LA", "RGB", "RGBA"]:
    if gray:
        return "LA" if alpha else "L"
    return "RGBA" if alpha else "RGB"


def _palette(chunks: list[Chunk], transparent: bytes | None) -> Colours:
    entries = next((chunk.data for chunk in chunks if chunk.kind == b"PLTE"), b"")
    if not entries or len(entries) % 3 or len(entries) > 3 * 256:
        raise broken("its palette is missing or malformed")
    pixels = np.full((len(entries) // 3, 4), 255, np.uint8)
    pixels[:, :3] = np.frombuffer(entries, np.uint8).reshape(-1, 3)
    alpha = (transparent or b"")[: len(pixels)]
    pixels[: len(alpha), 3] = np.frombuffer(alpha, np.uint8)
    if not (pixels[:, 3] == 255).any():
        raise _passed("has a palette of which no colour is opaque")
    return Colours(pixels)


def _grays(bits: int, transparent: bytes | None) -> Colours:
    count = 1 << bits
    pixels = np.full((count, 4), 255, np.uint8)
    pixels[:, :3] = (np.arange(count) * (255 // (count - 1)))[:, None]
    if transparent is not None and len(transparent) == 2:
        pixels[int.from_bytes(transparent, "big") % count, 3] = 0  # as in _key
    return Colours(pixels)


def _key(transparent: bytes | None, samples: int) -> bytes:
    """One byte of each sample; empty if there is none. Of values that no sample can have libpng takes the low bits,
    and other readers nothing: what is meant for the first stays as it is, and to the others it is a colour."""
    if transparent is None or len(transparent) != 2 * samples:
        return b""
    return transparent[1::2]


def chunk_bytes(kind: bytes, data: bytes | memoryview) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)))


def chunks_of(data: bytes) -> list[Chunk]:
    """All chunks up to IEND. Raises Unsupported (BROKEN) for a wrong checksum or a missing end."""
    chunks: list[Chunk] = []
    offset = len(SIGNATURE)
    while not chunks or chunks[-1].kind != b"IEND":
        if offset + CHUNK_BYTES > len(data):
            raise broken("it ends too early")
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + CHUNK_BYTES + length
        if length > 0x7FFFFFFF or end > len(data):
            raise broken("a chunk is longer than the file")
        if len(chunks) == _MOST_CHUNKS:
            raise _passed(f"has more than {_MOST_CHUNKS} chunks")
        body = data[offset + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
            raise broken(f"the checksum of its chunk {kind.decode('latin-1')!r} is wrong")
        chunks.append(Chunk(kind, body, offset, end))
        offset = end
    return chunks


def passes(width: int, height: int, interlaced: bool) -> Iterator[Pass]:
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        if left < width and top < height:
            yield Pass(left, top, across, down, -(-(width - left) // across), -(-(height - top) // down))


def _check_stream(stream: bytes, passes: Iterator[Pass], bits: int) -> None:
    """That the compressed pixels (``bits`` each) are whole, neither more nor less than the header says, with filters
    that exist. A row may be as long as a picture: they come in pieces that know nothing of rows."""
    pieces = _inflated(stream)
    piece, at = b"", 0
    try:
        for part in passes:
            row = 1 + (part.width * bits + 7) // 8
            due, filter_at = row * part.height, 0
            while due:
                if at == len(piece):
                    piece, at = next(pieces, b""), 0
                    if not piece:
                        raise broken(_CUT)
                end = min(len(piece), at + due)
                if any(value > 4 for value in set(piece[at + filter_at : end : row])):
                    raise broken("a row has a filter that does not exist")
                filter_at = (filter_at - (end - at)) % row
                due -= end - at
                at = end
        if at < len(piece) or next(pieces, b""):
            raise broken(_CUT)
    except zlib.error as error:
        raise broken(f"its compressed pixels are damaged ({error})") from error


def _inflated(stream: bytes) -> Iterator[bytes]:
    """The content of a zlib stream in pieces of at most ``_INFLATED`` bytes. Raises zlib.error, and Unsupported if the
    stream is cut or goes on after its end."""
    inflater = zlib.decompressobj()
    given: bytes | memoryview = b""
    for start in range(0, len(stream), _PIECE):
        given = memoryview(stream)[start : start + _PIECE]
        while given and not inflater.eof:
            if piece := inflater.decompress(given, _INFLATED):
                yield piece
            given = inflater.unconsumed_tail
        if given:
            break
    while not inflater.eof and (piece := inflater.decompress(b"", _INFLATED)):
        yield piece
    if not inflater.eof or inflater.unused_data or given:
        raise broken(_CUT)


def broken(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this PNG is damaged: {what}; it stays bit for bit", "png")


def _passed(what: str) -> Unsupported:
    return Unsupported(Reason.UNSUPPORTED_KIND, f"this PNG {what}; esrfs keeps such files bit for bit", "png")
