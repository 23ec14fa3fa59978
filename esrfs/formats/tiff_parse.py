"""The structure of a TIFF file, and what esrfs refuses to touch in it.

Accepted: classic TIFF (not BigTIFF), one picture of 8 bits a sample, gray or RGB, with one extra sample (alpha) or
without, in strips or tiles, chunky or planar, uncompressed or in LZW or Deflate with predictor 1 or 2. Or each strip or
tile is a JPEG (``tiff_jpeg``). Reduced pictures (thumbnails) may follow. RAW files in TIFF's clothes are refused.
"""

from __future__ import annotations

import bisect
import struct
from dataclasses import dataclass

from esrfs.compaction.outcome import Reason
from esrfs.formats.signed import check_xmp
from esrfs.formats.view import Unsupported

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR = 273, 274, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _EXTRA, _FORMAT = 322, 323, 324, 325, 338, 339
_JPEG_TABLES = 347
_XMP, _DNG, _C2PA = 700, 50706, 52545
_NUMBERS = {1: "B", 3: "H", 4: "I", 7: "B", 13: "I"}
"""Types of entries that hold what is asked for here: byte, short, long, bytes without a meaning, where
a directory is."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes of a value of each type of entry that there is."""
_DIRECTORIES = (330, 34665, 34853, 40965)
"""Entries that tell where further directories are: of pictures, Exif, GPS, interoperability."""
_OTHER_PIXELS = ((_STRIP_OFFSETS, _STRIP_BYTES), (_TILE_OFFSETS, _TILE_BYTES), (513, 514))
"""Of reduced pictures: where their strips, tiles or JPEG are, and their lengths."""
_PAGES = 32
_MOST_ENTRIES = 1 << 16
"""Of all directories. A camera's hold some hundreds."""
_MOST_VALUES = 1 << 18
"""Of an entry: strips of one row of a picture of 87,000 rows and three planes. (As Python's numbers they take 50 times
the room, and the mount's process reads them, too.)"""
_LARGEST_TILE = 1 << 24
"""Pixels, of a picture that has no more."""
_TILES_OF_PICTURE = 4
"""How many times as many pixels as the picture its tiles have at most, unless they are few: each is coded whole."""
NONE, LZW, JPEG, DEFLATE, OLD_DEFLATE = 1, 5, 7, 8, 32946
_COMPRESSIONS = {
    2: "CCITT fax",
    3: "CCITT fax",
    4: "CCITT fax",
    6: "old-style JPEG",
    32773: "PackBits",
    34712: "JPEG 2000",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_YCBCR = 6
_PHOTOMETRICS = {
    0: "codes white as 0",
    3: "has a palette",
    4: "is a mask",
    5: "is CMYK",
    _YCBCR: "is YCbCr",
    8: "is CIELab",
    32803: "is a camera's RAW file",
    34892: "is a camera's RAW file",
}


@dataclass(frozen=True)
class Structure:
    width: int
    height: int
    samples: int
    """1 gray, 2 gray and another, 3 RGB, 4 RGB and another."""
    premultiplied: bool
    """Whether colours are multiplied by the extra sample, which is alpha."""
    compression: int
    predictor: bool
    planar: bool
    """Each sample's plane for itself."""
    part_width: int
    """Of a strip or tile, in pixels; tiles reach over the picture's edge, strips do not."""
    part_height: int
    tiled: bool
    parts: list[tuple[int, int]]
    """Offset and length in bytes of each strip or tile, in TIFF's order; of uncompressed ones no more than their pixels
    take."""
    ycbcr: bool
    """Colours are luma and chroma: JPEG's."""
    tables: bytes
    """Of JPEG: what its strips or tiles share, as a JPEG without a picture; may be empty."""


def parse(data: bytes) -> Structure:
    """Take a TIFF file apart. Raises Unsupported (UNSUPPORTED_KIND, SIGNED, BROKEN)."""
    try:
        return _parse(data)
    except struct.error as error:
        raise _broken("it ends too early") from error


def upright(data: bytes) -> bytes:
    """The same file, but with the orientation that turns nothing: Pillow would turn its pixels."""
    try:
        order = _order(data)
        offset = _entries(data, struct.unpack_from(order + "I", data, 4)[0], order)[0].get(_ORIENTATION)
        if offset is None or _values(data, offset, order) == [1]:
            return data
        return data[: offset + 8] + struct.pack(order + "H", 1) + data[offset + 10 :]
    except (struct.error, Unsupported):
        return data  # whoever decodes it will find out


def _parse(data: bytes) -> Structure:
    order = _order(data)
    entries, following = _entries(data, struct.unpack_from(order + "I", data, 4)[0], order)

    def get(tag: int, default: list[int]) -> list[int]:
        return _values(data, entries[tag], order) if tag in entries else default

    if _DNG in entries or get(_SUBFILE, [0])[0] & 1:
        raise _passed("holds a small picture first, as RAW files do")
    _check_other_pages(data, following, order)
    compression = get(_COMPRESSION, [1])[0]
    if compression not in (NONE, LZW, JPEG, DEFLATE, OLD_DEFLATE):
        raise _passed(f"is compressed by {_COMPRESSIONS.get(compression, f'method {compression}')}")
    photometric = get(_PHOTOMETRIC, [-1])[0]
    ycbcr = photometric == _YCBCR and compression == JPEG
    if photometric not in (1, 2) and not ycbcr:
        raise _passed(_PHOTOMETRICS.get(photometric, "has an unusual colour space"))
    samples = get(_SAMPLES, [1])[0]
    bits = get(_BITS, [1])
    if any(each != 8 for each in bits):
        raise _passed(f"has {max(bits)} bit{'s' if max(bits) > 1 else ''} a sample")
    if any(each != 1 for each in get(_FORMAT, [1])):
        raise _passed("has samples that are no plain numbers")
    colours = 1 if photometric == 1 else 3
    if samples not in (colours, colours + 1):
        raise _passed(f"has {samples} samples a pixel")
    if compression == JPEG and samples != colours:
        raise _passed("has another sample beside its colours, which JPEG does not keep exactly")
    if get(_FILL_ORDER, [1]) != [1]:
        raise _passed("has its bits in reverse order")
    predictor = get(_PREDICTOR, [1])[0]
    if predictor not in (1, 2):
        raise _passed("has an unusual predictor")
    width, height = get(_WIDTH, [0])[0], get(_HEIGHT, [0])[0]
    planar = get(_PLANAR, [1])[0] == 2 and samples > 1
    if planar and ycbcr:
        raise _passed("keeps luma and chroma in planes")
    tiled = _TILE_OFFSETS in entries
    if tiled:
        part_width, part_height = get(_TILE_WIDTH, [0])[0], get(_TILE_HEIGHT, [0])[0]
        places = list(zip(get(_TILE_OFFSETS, []), get(_TILE_BYTES, []), strict=False))
    else:
        part_width, part_height = width, min(get(_ROWS, [height])[0], height)
        places = list(zip(get(_STRIP_OFFSETS, []), get(_STRIP_BYTES, []), strict=False))
    if part_width < 1 or part_height < 1:
        raise _broken("its header says 0 pixels")
    if tiled and part_width * part_height > max(width * height, _LARGEST_TILE):
        raise _passed("has tiles that are larger than its picture")
    cover = -(-width // part_width) * -(-height // part_height)
    if tiled and cover * part_width * part_height > max(_TILES_OF_PICTURE * width * height, _LARGEST_TILE):
        raise _passed("has tiles that reach far beyond its picture")
    expected = cover * (samples if planar else 1)
    _check_places(places, expected, len(data))
    if compression == NONE:
        # Some programs write the length of a whole strip for the last one, too, which then reaches into what follows.
        row = part_width * (1 if planar else samples)
        down = -(-height // part_height)
        due = [part_height] * len(places)
        if not tiled:
            due[down - 1 :: down] = [height - (down - 1) * part_height] * (len(places) // down)
        places = [(start, min(length, rows * row)) for (start, length), rows in zip(places, due, strict=True)]
    _check_directories(data, order, places, width * height)
    return Structure(
        width=width,
        height=height,
        samples=samples,
        premultiplied=samples > colours and get(_EXTRA, [0])[0] == 1,
        compression=compression,
        predictor=predictor == 2 and compression not in (NONE, JPEG),
        planar=planar,
        part_width=part_width,
        part_height=part_height,
        tiled=tiled,
        parts=places,
        ycbcr=ycbcr,
        tables=bytes(get(_JPEG_TABLES, [])) if compression == JPEG else b"",
    )


def _order(data: bytes) -> str:
    """How ``struct`` names the file's byte order."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    if struct.unpack_from(order + "H", data, 2)[0] != 42:
        raise _passed("is a BigTIFF")
    return order


def _entries(data: bytes, offset: int, order: str) -> tuple[dict[int, int], int]:
    """Of a directory: offsets of its entries by tag, and the offset of the next directory, or 0."""
    count = struct.unpack_from(order + "H", data, offset)[0]
    entries: dict[int, int] = {}
    for place in range(offset + 2, offset + 2 + 12 * count, 12):
        entries.setdefault(struct.unpack_from(order + "H", data, place)[0], place)
    return entries, struct.unpack_from(order + "I", data, offset + 2 + 12 * count)[0]


def _values(data: bytes, offset: int, order: str) -> list[int]:
    """Of an entry; at least one."""
    kind, count = struct.unpack_from(order + "HI", data, offset + 2)
    if kind not in _NUMBERS or not count:
        raise _broken("an entry of its directory has a wrong type")
    if count > _MOST_VALUES:
        raise _passed("has very many strips or tiles")
    size = struct.calcsize(order + _NUMBERS[kind])
    start = offset + 8 if size * count <= 4 else struct.unpack_from(order + "I", data, offset + 8)[0]
    if start + size * count > len(data):
        raise _broken("an entry of its directory lies outside of the file")
    return list(struct.unpack_from(f"{order}{count}{_NUMBERS[kind]}", data, start))


def _check_other_pages(data: bytes, offset: int, order: str) -> None:
    for _ in range(_PAGES):
        if not offset:
            return
        entries, offset = _entries(data, offset, order)
        if _SUBFILE not in entries or not _values(data, entries[_SUBFILE], order)[0] & 1:
            break
    raise _passed("holds several pictures")


def _check_places(places: list[tuple[int, int]], expected: int, size: int) -> None:
    if len(places) != expected or not places:
        raise _broken(f"it has {len(places)} strips or tiles where {expected} are due")
    end = 8
    for start, length in sorted(places):
        if start < end or not length:
            raise _broken("its strips or tiles overlap")
        end = start + length
    if end > size:
        raise _broken("its pixels lie outside of the file")


def _check_directories(data: bytes, order: str, places: list[tuple[int, int]], pixels: int) -> None:
    """That no directory, none of its values and no other picture lies within the strips or tiles, which are written
    anew as a whole: lengths in a file may be wrong, and decoders don't mind ones that are too large. And that no
    directory holds a signature, or a picture of more pixels: then this one is a RAW file's, to be shown in lists."""
    parts = sorted(places)
    ends = [sum(part) for part in parts]

    def check(start: int, length: int) -> None:
        index = bisect.bisect_right(ends, start)
        if index < len(parts) and parts[index][0] < start + length:
            raise _passed("has metadata, or another picture, within its pixels")

    first = struct.unpack_from(order + "I", data, 4)[0]
    waiting, pages, seen, left = [first], {first}, set(), _MOST_ENTRIES
    while waiting:
        offset = waiting.pop()
        if not offset or offset in seen:
            continue
        seen.add(offset)
        try:
            entries, following = _entries(data, offset, order)
        except struct.error:
            if offset in pages:
                raise
            continue  # an Exif directory that is not there, say: readers of pictures don't mind
        if _C2PA in entries:
            message = "this TIFF carries C2PA Content Credentials, which sign its pixels; it stays bit for bit"
            raise Unsupported(Reason.SIGNED, message, "tiff")
        if _WIDTH in entries and _HEIGHT in entries:
            width, height = (_values(data, entries[tag], order)[0] for tag in (_WIDTH, _HEIGHT))
            if width * height > pixels:
                raise _passed("holds a small picture first, as RAW files do")
        if offset in pages:  # nothing follows one of Exif, whatever some programs leave in that place
            waiting.append(following)
            pages.add(following)
        count = struct.unpack_from(order + "H", data, offset)[0]
        check(offset, 2 + 12 * count + 4)
        left -= 1 + count
        for place in range(offset + 2, offset + 2 + 12 * count, 12):
            kind, number, value = struct.unpack_from(order + "HII", data, place + 2)
            if (size := _SIZES.get(kind, 0) * number) > 4:
                check(value, size)
                if place == entries.get(_XMP):
                    check_xmp(data[value : value + size], "tiff", "TIFF")
        for tag in _DIRECTORIES:
            if tag in entries:
                found = _values(data, entries[tag], order)
                left -= len(found)
                waiting += found
        for starts, lengths in _OTHER_PIXELS if offset != first else ():
            if starts in entries and lengths in entries:
                others = list(zip(*(_values(data, entries[tag], order) for tag in (starts, lengths)), strict=False))
                left -= len(others)
                for other in others:
                    check(*other)
        if left < 0:
            raise _passed("has very many entries in its directories")


def _broken(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this TIFF is damaged: {what}; it stays bit for bit", "tiff")


def _passed(what: str) -> Unsupported:
    return Unsupported(Reason.UNSUPPORTED_KIND, f"this TIFF {what}; esrfs keeps such files bit for bit", "tiff")
