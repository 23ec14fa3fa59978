"""JPEG inside TIFF (compression 7): each strip or tile is a JPEG of its own, less the tables that all of them share.

Within a strip or tile everything is the original's but its Huffman tables and entropy-coded data; restart intervals are
left out, and FF bytes (fill before a marker) make it as long as it was, so that its end and what follows it stay where
they are. The file's own tables are not touched: quantisation is the original's, and if the Huffman tables there are the
standard ones, strips are coded by them.

Libraries read the shared tables once, and a strip's own tables stay in force for those that are read after it. So
either all strips have tables of a kind, or none has; a file where only some have is refused.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from PIL import Image

from esrfs.blob.recipe import TiffStream
from esrfs.compaction.outcome import Reason
from esrfs.formats import jpeg_parse
from esrfs.formats.jpeg import HUFFMAN_COLOUR, HUFFMAN_GRAY, natural, room_for_all
from esrfs.formats.jpeg_decode import intact_pixels
from esrfs.formats.jpeg_parse import DHT, DQT, DRI, Segment
from esrfs.formats.jpeg_progressive import huffman_tables
from esrfs.formats.tiff_parse import Structure
from esrfs.formats.view import Pixels, Unsupported

P = ParamSpec("P")
T = TypeVar("T")

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_LONGEST_TABLES = 1 << 14
"""Bytes; four tables of each sort take 2.2 kB."""
_MOST_TABLES = 32
"""Segments of them: they are read again for each strip or tile."""
_FROM_TABLE_CLASS = {0: slice(1, 29), 1: slice(30, None)}
"""Where the standard DC and AC tables lie in ``HUFFMAN_GRAY`` and ``HUFFMAN_COLOUR``, without their numbers."""


def streams(data: bytes, structure: Structure) -> tuple[list[TiffStream], list[int]]:
    """What is around the entropy-coded data of the strips or tiles: each that there is, and for each strip or tile its
    number. Raises Unsupported."""
    _check_tables(structure.tables)
    found: dict[bytes, int] = {}
    made: list[TiffStream] = []
    stream_of = []
    kinds = set()
    for index in range(len(structure.parts)):
        stream, own = _stream(data, structure, index)
        kinds.add(own)
        key = b"".join((stream.head, stream.sos, stream.tail))
        if key not in found:
            found[key] = len(made)
            made.append(stream)
        stream_of.append(found[key])
    if len(kinds) > 1:
        raise _passed("has tables of their own in only some of its strips or tiles")
    return made, stream_of


def has_standard_tables(structure: Structure) -> bool:
    """Whether the shared tables are the standard Huffman tables, which have a code for everything."""
    tables: dict[int, bytes] = {}
    for segment in _shared(structure.tables):
        if segment.marker == DHT:
            tables |= huffman_tables(segment.payload)
    wanted = {kind << 4: HUFFMAN_GRAY[where] for kind, where in _FROM_TABLE_CLASS.items()}
    if structure.ycbcr:
        wanted |= {kind << 4 | 1: HUFFMAN_COLOUR[where] for kind, where in _FROM_TABLE_CLASS.items()}
    return all(tables.get(number) == table for number, table in wanted.items())


def decoded(data: bytes, structure: Structure) -> Iterator[Pixels]:
    """The pixels of each strip or tile. Raises Unsupported (BROKEN)."""
    for index in range(len(structure.parts)):
        stream = _joined(data, structure, index)
        yield _ours(intact_pixels, stream, _parsed(stream, structure), rgb=not structure.ycbcr)


def encoded(stream: TiffStream, samples: Pixels, *, ycbcr: bool, own_tables: bool) -> bytes:
    """A strip or tile, without fill (which belongs before ``stream.tail``)."""
    image = Image.fromarray(samples[:, :, 0] if samples.shape[2] == 1 else samples)
    out = io.BytesIO()
    options = {
        "qtables": natural(stream.quantisation),
        "subsampling": stream.subsampling,
        "keep_rgb": not ycbcr,
        "optimize": own_tables,
    }
    if own_tables:
        with room_for_all(image):
            image.save(out, "JPEG", **options)
    else:
        image.save(out, "JPEG", **options)
    made = out.getbuffer()
    tables = []
    offset = 2
    while made[offset + 1] != jpeg_parse.SOS:
        end = offset + 2 + int.from_bytes(made[offset + 2 : offset + 4], "big")
        if made[offset + 1] == DHT and own_tables:
            tables.append(made[offset:end])
        offset = end
    start = offset + 2 + int.from_bytes(made[offset + 2 : offset + 4], "big")
    return b"".join((stream.head, *tables, stream.sos, made[start:-2], stream.tail))


def _stream(data: bytes, structure: Structure, index: int) -> tuple[TiffStream, frozenset[int]]:
    """Of a strip or tile; and which tables it has of its own."""
    joined = _joined(data, structure, index)
    parsed = _parsed(joined, structure)
    if parsed.progressive:
        raise _passed("is compressed by progressive JPEG")
    height, width = _size(structure, index)
    if (parsed.height, parsed.width) != (height, width):
        raise _passed("has a strip or tile of another size than its directory says")
    if len(parsed.components) != (1 if structure.planar else structure.samples):
        raise _broken("a strip or tile has another number of samples than its directory says")
    shared, own = len(structure.tables[2:-2]), []
    at = 0
    for segment in parsed.segments:
        if at >= shared:
            own.append(segment)
        at += len(segment.raw)
    head = b"".join(segment.raw for segment in own if segment.marker not in (DHT, DRI))
    numbers = [1 if structure.ycbcr and place else 0 for place in range(len(parsed.components))]
    components = b"".join(
        bytes([part.id, number * 0x11]) for part, number in zip(parsed.components, numbers, strict=True)
    )
    stream = TiffStream(
        head=_SOI + head,
        sos=parsed.sos[:5] + components + b"\x00\x3f\x00",
        tail=joined[parsed.eoi :],
        quantisation=parsed.quantisation,
        subsampling=parsed.subsampling,
    )
    return stream, frozenset(segment.marker for segment in own if segment.marker in (DQT, DHT))


def _joined(data: bytes, structure: Structure, index: int) -> bytes:
    """A strip or tile with the shared tables: a whole JPEG."""
    offset, length = structure.parts[index]
    if data[offset : offset + 2] != _SOI:
        raise _broken("a strip or tile is no JPEG")
    return b"".join((_SOI, structure.tables[2:-2], data[offset + 2 : offset + length]))


def _parsed(joined: bytes, structure: Structure) -> jpeg_parse.Structure:
    return _ours(jpeg_parse.parse, joined, rgb=not structure.ycbcr)


def _size(structure: Structure, index: int) -> tuple[int, int]:
    """Height and width of a strip or tile."""
    if structure.tiled:
        return structure.part_height, structure.part_width
    strips = -(-structure.height // structure.part_height)
    top = index % strips * structure.part_height
    return min(structure.part_height, structure.height - top), structure.width


def _check_tables(tables: bytes) -> None:
    if not tables:
        return
    if len(tables) > _LONGEST_TABLES:
        raise _passed("has unusually large JPEG tables")
    if not (tables.startswith(_SOI) and tables.endswith(_EOI)):
        raise _broken("its JPEG tables are cut")
    for number, segment in enumerate(_shared(tables)):
        if segment.marker not in (DQT, DHT):
            raise _passed("has more than tables among its JPEG tables")
        if number == _MOST_TABLES:
            raise _passed("has unusually many JPEG tables")


def _shared(tables: bytes) -> Iterator[Segment]:
    """The segments of the shared tables."""
    offset, end = 2, len(tables) - 2
    while offset < end:
        following = offset + 2 + int.from_bytes(tables[offset + 2 : offset + 4], "big")
        if tables[offset] != 0xFF or not offset + 4 <= following <= end:
            raise _broken("its JPEG tables are damaged")
        yield Segment(tables[offset + 1], tables[offset:following], tables[offset + 4 : following])
        offset = following


def _ours(work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """The same, but what it refuses is this TIFF."""
    try:
        return work(*given, **named)
    except Unsupported as error:
        message = error.message.replace("this JPEG", "in this TIFF a JPEG", 1)
        raise Unsupported(error.reason, message, "tiff") from error


def _broken(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this TIFF is damaged: {what}; it stays bit for bit", "tiff")


def _passed(what: str) -> Unsupported:
    return Unsupported(Reason.UNSUPPORTED_KIND, f"this TIFF {what}; esrfs keeps such files bit for bit", "tiff")
