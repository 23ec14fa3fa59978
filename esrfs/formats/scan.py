"""Where a picture file's compressed pixels lie, without decoding them: for files that may be views which came home.

Who uses it: the mount's process, for files that any program wrote. So it imports neither numpy nor Pillow, reads
markers and lengths only, and takes time in proportion to the file's size whatever is in it. A format that is not here
has views which don't come home; they are compacted anew.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from esrfs.blob.reference import without_fill
from esrfs.formats import tiff_parse
from esrfs.formats.identify import identify
from esrfs.formats.view import Unsupported

_ENDS_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_JPEG_TABLES = frozenset({*range(0xC0, 0xD0), 0xDB, 0xDD})
"""What a decoder needs besides the scan: frame, Huffman and quantisation tables, restart interval."""
_SOI, _EOI, _SOS, _APP13 = 0xD8, 0xD9, 0xDA, 0xED
_JPEG_FILL = b"esrfs\0"
_CHUNK_FILL = b"esRF"
"""In PNG and WebP."""
_PNG_TABLES = (b"IHDR", b"PLTE", b"tRNS")
_WEBP_PICTURES = (b"VP8 ", b"VP8L")
_WEBP_TABLES = (b"ALPH",)
_BMP_FILE_HEADER = 14
_MOST_PARTS = 1 << 16
"""Segments, chunks or scans that are looked at: more are none that a view has."""


@dataclass(frozen=True)
class Scan:
    """The scan of a file, in the sense of ``blob/recipe.py``."""

    kind: str
    start: int
    end: int
    """Fill that the scan may end in (FF in a JPEG) does not count."""
    fill_end: int
    """Where such fill ends."""
    tables: tuple[bytes, ...]
    """What else tells how the pixels look, in the file's order."""
    said: tuple[bytes, ...]
    """What the fill says, in the file's order: the data of each of its segments or chunks."""


def find(data: bytes) -> Scan | None:
    """The scan of a picture file; None where there is none that a view could have."""
    kind = identify(data)
    if kind == "jpeg":
        return _jpeg(data)
    if kind == "png":
        return _png(data)
    if kind == "webp":
        return _webp(data)
    if kind == "tiff":
        return _tiff(data)
    if kind == "bmp":
        return _bmp(data)
    return None


def _jpeg(data: bytes) -> Scan | None:
    start, found, said = _jpeg_head(data)
    if not start:
        return None
    offset = start
    for _ in range(_MOST_PARTS):
        match = _ENDS_SCAN.search(data, offset)
        if match is None:
            return None
        fill_end = match.start()
        if data[match.end() - 1] == _EOI:
            end = start + without_fill(memoryview(data)[start:fill_end])
            return Scan("jpeg", start, end, fill_end, found, said)
        # another scan of the same picture, or its tables
        offset = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return None


def _jpeg_head(data: bytes) -> tuple[int, tuple[bytes, ...], tuple[bytes, ...]]:
    """Where the first scan starts (0: there is none), tables, and what the fill says."""
    found, said = [], []
    offset, start = 2, 0
    for _ in range(_MOST_PARTS):
        header = data[offset : offset + 4]
        if header[:2] == b"\xff\xff":
            offset += 1
            continue
        end = offset + 2 + int.from_bytes(header[2:], "big")
        if len(header) < 4 or header[0] != 0xFF or header[1] in (_SOI, _EOI) or not offset + 4 <= end <= len(data):
            break
        if header[1] in _JPEG_TABLES or header[1] == _SOS:
            found.append(data[offset:end])
        elif header[1] == _APP13 and data.startswith(_JPEG_FILL, offset + 4):
            said.append(data[offset + 4 + len(_JPEG_FILL) : end])
        offset = end
        if header[1] == _SOS:
            start = offset
            break
    return start, tuple(found), tuple(said)


def _png(data: bytes) -> Scan | None:
    places, found, said = _png_head(data)
    if len(places) != 1:
        return None  # views have one chunk of pixels
    start, end = places[0]
    return Scan("png", start, end, end, found, said)


def _png_head(data: bytes) -> tuple[list[tuple[int, int]], tuple[bytes, ...], tuple[bytes, ...]]:
    """Where the data of each IDAT chunk starts and its checksum ends, tables, and what the fill says."""
    places, found, said = [], [], []
    offset = 8
    for _ in range(_MOST_PARTS):
        header = data[offset : offset + 8]
        kind, body = header[4:], offset + 8
        end = body + int.from_bytes(header[:4], "big") + 4
        if len(header) < 8 or end > len(data) or kind == b"IEND":
            break
        if kind == b"IDAT":
            places.append((body, end))
        elif kind in _PNG_TABLES:
            found.append(data[offset:end])
        elif kind == _CHUNK_FILL:
            said.append(data[body : end - 4])
        offset = end
    return places, tuple(found), tuple(said)


def _webp(data: bytes) -> Scan | None:
    places, found, said = _webp_head(data)
    if len(places) != 1:
        return None
    start, end = places[0]
    return Scan("webp", start, end, end, found, said)


def _webp_head(data: bytes) -> tuple[list[tuple[int, int]], tuple[bytes, ...], tuple[bytes, ...]]:
    """Where the data of each picture chunk starts and ends, what else its pixels need, and what the fill says."""
    places, found, said = [], [], []
    offset = 12
    for _ in range(_MOST_PARTS):
        header = data[offset : offset + 8]
        kind, body = header[:4], offset + 8
        end = body + int.from_bytes(header[4:], "little")
        if len(header) < 8 or end > len(data):
            break
        if kind in _WEBP_PICTURES:
            places.append((body, end))
        elif kind in _WEBP_TABLES:
            found.append(data[offset:end])
        elif kind == _CHUNK_FILL:
            said.append(data[body:end])
        offset = end + end % 2
    return places, tuple(found), tuple(said)


def _tiff(data: bytes) -> Scan | None:
    """There is no fill. Programs that write metadata move the strips; they are known again if they stay together."""
    try:
        structure = tiff_parse.parse(data)
    except Unsupported:
        return None
    order = sorted(structure.parts)
    start, end = order[0][0], sum(order[-1])
    if end <= start:
        return None
    moved = [(offset - start, length) for offset, length in structure.parts]
    said = repr(dataclasses.replace(structure, parts=moved)).encode()
    return Scan("tiff", start, end, end, (said,), ())


def _bmp(data: bytes) -> Scan | None:
    """There is neither fill nor anybody who rewrites what is around the pixels; but there are copies."""
    start = int.from_bytes(data[10:14], "little")
    if int.from_bytes(data[14:18], "little") == 12:
        width, height = (int.from_bytes(data[at : at + 2], "little") for at in (18, 20))
        bits = int.from_bytes(data[24:26], "little")
    else:
        width, height = (int.from_bytes(data[at : at + 4], "little", signed=True) for at in (18, 22))
        bits = int.from_bytes(data[28:30], "little")
    end = start + (width * bits + 31) // 32 * 4 * abs(height)
    if not _BMP_FILE_HEADER < start < end <= len(data):
        return None
    return Scan("bmp", start, end, end, (data[_BMP_FILE_HEADER:start],), ())
