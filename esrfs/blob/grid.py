"""A large picture as an AVIF of several cells, each coded by itself (ISO/IEC 23008-12: derived image ``grid``).

An AV1 encoder takes about 40 bytes of memory for each pixel, and a decoder 9, of the whole picture or of one cell.
Viewers put cells together by themselves. What is written is what libavif writes for its grids::

    ftyp    of the first cell
    meta    hdlr, pitm (item 1), iloc, iinf (1: grid; 2 …: av01, hidden), iref (dimg from 1 to the others), iprp
    mdat    the grid's own 8 or 12 bytes, then the cells' in the order in which one reads

This module knows boxes and bytes only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ESSENTIAL = 0x80
_HIGH_BITDEPTH = 0x40
_SHARED = (b"pixi", b"av1C", b"colr")
"""Properties of a cell besides its size (ispe), in the order in which they are written."""


@dataclass(frozen=True)
class Grid:
    """An AVIF taken apart."""

    width: int
    """Pixels of the whole picture. The last cells of rows and columns may reach beyond it."""
    height: int
    columns: int
    cells: list[bytes]
    """An AVIF file each, row by row."""


class _Unexpected(Exception):  # noqa: N818
    """The file is not built as this module knows it."""


def assemble(cells: Sequence[bytes], columns: int, width: int, height: int) -> bytes:
    """The AVIF file of ``width`` × ``height`` pixels whose cells are these AVIF files, all of one size and coding, row
    by row. Raises ValueError for cells that don't go together."""
    try:
        parts = [_Single.parse(cell) for cell in cells]
    except (_Unexpected, struct.error) as error:
        raise ValueError(f"a cell is no plain AVIF: {error}") from error
    first = parts[0]
    if len(cells) % columns or any(part.properties != first.properties for part in parts):
        raise ValueError("cells of different size or coding don't make a grid")
    large = max(width, height) > 0xFFFF
    rows = len(cells) // columns
    own = struct.pack(">BBBB" + ("II" if large else "HH"), 0, large, rows - 1, columns - 1, width, height)
    whole_size = _full_box(b"ispe", struct.pack(">II", width, height))
    shared = [first.properties[kind] for kind in _SHARED if kind in first.properties]
    properties = [whole_size, first.properties[b"ispe"], *shared]
    of_grid = [1, *(3 + index for index, each in enumerate(shared) if each[4:8] != b"av1C")]
    of_cell = [2, *(3 + index | (_ESSENTIAL if each[4:8] == b"av1C" else 0) for index, each in enumerate(shared))]
    numbers = range(2, 2 + len(cells))
    meta = _Meta(
        handler=first.handler,
        items=[(b"grid", False), *((b"av01", True) for _ in cells)],
        references=_box(b"dimg", struct.pack(f">HH{len(cells)}H", 1, len(cells), *numbers)),
        properties=properties,
        associations=[of_grid, *(of_cell for _ in cells)],
    )
    return _file(first.brands, meta, [own, *(part.data for part in parts)])


def take_apart(avif: bytes) -> Grid | None:
    """The cells of a file that ``assemble`` made; None for any other."""
    try:
        boxes = dict(_boxes(avif, 0, len(avif)))
        meta = _meta_boxes(avif, boxes)
        types = _item_types(avif, meta)
        places = _places(avif, meta)
        if types.get(1) != b"grid" or set(types) != set(places) or set(types.values()) != {b"grid", b"av01"}:
            return None
        own = _data(avif, places, 1)
        _, flags, rows, columns = own[:4]
        width, height = struct.unpack_from(">II" if flags & 1 else ">HH", own, 4)
        listed = [(kind, avif[start - 8 : end]) for kind, (start, end) in _boxes(avif, *_properties_span(avif, meta))]
        sizes = [raw for kind, raw in listed if kind == b"ispe"]
        shared = {kind: raw for kind, raw in listed if kind in _SHARED}
        if len(sizes) != 2 or len(listed) != 2 + len(shared) or len(types) != 1 + (rows + 1) * (columns + 1):
            return None
        single = _Meta(
            handler=_raw(avif, meta[b"hdlr"]),
            items=[(b"av01", False)],
            references=b"",
            properties=[sizes[1], *shared.values()],
            associations=[
                [1, *(2 + index | (_ESSENTIAL if kind == b"av1C" else 0) for index, kind in enumerate(shared))]
            ],
        )
        brands = _raw(avif, boxes[b"ftyp"])
        cells = [_file(brands, single, [_data(avif, places, number)]) for number in sorted(types)[1:]]
    except (_Unexpected, struct.error, KeyError, ValueError):
        return None
    return Grid(width, height, columns + 1, cells)


def is_deep(avif: bytes) -> bool:
    """Whether a file of one picture, as libavif writes it, has more than 8 bits a sample (AV1-ISOBMFF 2.3.3)."""
    try:
        configuration = _Single.parse(avif).properties[b"av1C"]
        return bool(configuration[10] & _HIGH_BITDEPTH)
    except (_Unexpected, struct.error, KeyError, IndexError, ValueError):
        return False


@dataclass(frozen=True)
class _Single:
    """A file of one picture, as libavif writes it."""

    brands: bytes
    handler: bytes
    properties: dict[bytes, bytes]
    """Whole boxes, by type."""
    data: bytes

    @classmethod
    def parse(cls, avif: bytes) -> _Single:
        boxes = dict(_boxes(avif, 0, len(avif)))
        meta = _meta_boxes(avif, boxes)
        places = _places(avif, meta)
        if len(places) != 1:
            raise _Unexpected(f"it has {len(places)} items")
        (number,) = places
        listed = [(kind, avif[start - 8 : end]) for kind, (start, end) in _boxes(avif, *_properties_span(avif, meta))]
        if {kind for kind, _ in listed} - {b"ispe", *_SHARED} or len(dict(listed)) != len(listed):
            raise _Unexpected("it has properties that a cell has not")
        handler = _raw(avif, meta[b"hdlr"])
        return cls(_raw(avif, boxes[b"ftyp"]), handler, dict(listed), _data(avif, places, number))


@dataclass(frozen=True)
class _Meta:
    handler: bytes
    items: list[tuple[bytes, bool]]
    """Type, and whether it is hidden. The first has number 1 and is the picture."""
    references: bytes
    properties: list[bytes]
    associations: list[list[int]]
    """For each item, its properties, counted from 1."""


def _file(brands: bytes, meta: _Meta, data: Sequence[bytes]) -> bytes:
    lengths = [len(each) for each in data]
    # The places have a size that doesn't depend on their values, so the first try tells where the data begin.
    header = _meta_box(meta, lengths, 0)
    start = len(brands) + len(header) + 8
    if start + sum(lengths) > 0xFFFFFFFF:
        raise ValueError("a file of 4 GiB or more is no AVIF picture")
    return b"".join((brands, _meta_box(meta, lengths, start), struct.pack(">I", 8 + sum(lengths)), b"mdat", *data))


def _meta_box(meta: _Meta, lengths: list[int], start: int) -> bytes:
    places = [struct.pack(">BBH", 0x44, 0, len(lengths))]
    infos = []
    for number, (length, (kind, hidden)) in enumerate(zip(lengths, meta.items, strict=True), 1):
        places.append(struct.pack(">HHHII", number, 0, 1, start, length))
        infos.append(_full_box(b"infe", struct.pack(">HH4s", number, 0, kind) + b"Color\0", 2, int(hidden)))
        start += length
    associations = b"".join(
        struct.pack(f">HB{len(each)}B", number, len(each), *each) for number, each in enumerate(meta.associations, 1)
    )
    owned = _full_box(b"ipma", struct.pack(">I", len(meta.items)) + associations)
    parts = (
        meta.handler,
        _full_box(b"pitm", struct.pack(">H", 1)),
        _full_box(b"iloc", b"".join(places)),
        _full_box(b"iinf", struct.pack(">H", len(infos)) + b"".join(infos)),
        _full_box(b"iref", meta.references) if meta.references else b"",
        _box(b"iprp", _box(b"ipco", b"".join(meta.properties)) + owned),
    )
    return _full_box(b"meta", b"".join(parts))


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _full_box(kind: bytes, content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags) + content)


# Reading.

_Span = tuple[int, int]
"""Where a box's content begins and ends."""


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, _Span]]:
    while start < end:
        size, kind = struct.unpack_from(">I4s", data, start)
        if size < 8 or start + size > end:
            raise _Unexpected("a box is longer than what holds it")
        yield kind, (start + 8, start + size)
        start += size


def _meta_boxes(data: bytes, boxes: dict[bytes, _Span]) -> dict[bytes, _Span]:
    if b"meta" not in boxes:
        raise _Unexpected("it has no meta box")
    start, end = boxes[b"meta"]
    meta = dict(_boxes(data, start + 4, end))
    if not {b"hdlr", b"pitm", b"iloc", b"iinf", b"iprp"} <= set(meta):
        raise _Unexpected("its meta box lacks something")
    return meta


def _raw(data: bytes, span: _Span) -> bytes:
    return data[span[0] - 8 : span[1]]


def _properties_span(data: bytes, meta: dict[bytes, _Span]) -> _Span:
    return dict(_boxes(data, *meta[b"iprp"]))[b"ipco"]


def _item_types(data: bytes, meta: dict[bytes, _Span]) -> dict[int, bytes]:
    start, end = meta[b"iinf"]
    types = {}
    for _, (inner, _) in _boxes(data, start + 6, end):
        version, number, _, kind = struct.unpack_from(">B3xHH4s", data, inner)
        if version != 2:
            raise _Unexpected("an item is described in another version")
        types[number] = kind
    return types


def _places(data: bytes, meta: dict[bytes, _Span]) -> dict[int, _Span]:
    """Where each item's data begin and end."""
    start, _ = meta[b"iloc"]
    version, sizes, count = struct.unpack_from(">B3xHH", data, start)
    if version != 0 or sizes != 0x4400:
        raise _Unexpected("its places are written in another way")
    places = {}
    for index in range(count):
        number, _, extents, offset, length = struct.unpack_from(">HHHII", data, start + 8 + 14 * index)
        if extents != 1 or offset + length > len(data):
            raise _Unexpected("an item lies in several places")
        places[number] = (offset, offset + length)
    if sum(end - start for start, end in places.values()) > len(data):
        raise _Unexpected("items overlap")  # in few bytes there could be the same cell 65,536 times
    return places


def _data(data: bytes, places: dict[int, _Span], number: int) -> bytes:
    start, end = places[number]
    return data[start:end]
