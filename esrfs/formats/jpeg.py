"""JPEG views: the original's segments, our tables and scan, and fill, in exactly the original's number of bytes.

A view, byte for byte::

    SOI
    the original's segments before SOS, verbatim and in their order, with its DQT and SOF in their places. Quantisation
        values are changed in place when the view had to be quantised more coarsely (a low-pass is tried first:
        ``_settings``). DHT and DRI are left out, except
        before an APPn or COM segment: those must not move, since exiftool prints offsets in them and MPF counts from
        its own place. There a DHT stays (ours, later, replaces it) and a DRI stays with its interval set to 0. Left
        out, too, is the fill of an earlier view, whose pixels were edited.
    DHT     the standard tables of ITU-T T.81, annex K, which have a code for every symbol; only those of the first scan
            in a progressive picture
    APP13   "esrfs\\0", then the note (a reference to the blob, and what ``view.Note`` says) over as many segments as it
            takes, then zeros: fill, 0 to 36 segments; readers ignore it there, and the scan gets a round offset
    SOS     with the original's component numbers
    scan    pinned length: entropy-coded data (of a progressive picture all that follows the first SOS: further scans
            and their tables, too), then FF bytes (fill before a marker), a little for later differences
    FF      fill up to where the original's EOI is, 8 KiB or more where there is room
    EOI     and all that follows it in the original, at its offset

Where something follows the picture, the FF bytes before EOI are even in number: libultrahdr takes two of them for a
marker, and after an odd number would miss the picture's end, and with it the gain map. (A later reconstruction that
differs may end earlier by an odd number.) The fill before SOS is longer by a byte instead.
"""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import PIL
from PIL import Image, ImageFile, features

from esrfs.blob.recipe import JpegCoding, Literal, Run, Span
from esrfs.blob.reference import REFERENCE_BYTES
from esrfs.formats import jpeg_parse, jpeg_progressive
from esrfs.formats.jpeg_decode import intact_pixels
from esrfs.formats.jpeg_parse import DHT, DQT, DRI, Structure
from esrfs.formats.pixels import as_array, as_image_for_jpeg, blurred, check_dimensions, softened
from esrfs.formats.view import TAIL_BYTES, DoesNotFit, FittedView, Note, Pixels, front_fill, joined, no_note, noted

COARSER = (1.08, 1.17, 1.27, 1.38, 1.5)
"""Factors on the quantisation that are tried in this order until the view fits."""
SLIGHTLY_SOFTER, SOFTER = (0.35, 0.42, 0.5), (0.6, 0.75, 0.9)
"""Radii of a low-pass in pixels, likewise."""
_COARSE = 29
"""Mean value of a luma table that is coarse: libjpeg's at quality 75."""

_FILL_HEADER = b"\xff\xed\x00\x00esrfs\x00"
_FILL_SMALLEST = len(_FILL_HEADER)
_FILL_LARGEST = 2 + 65535
_FILL_SEGMENTS = 36
_MOST_FILL = _FILL_SEGMENTS * _FILL_LARGEST - 1
"""Before SOS; one byte may be added."""
_ZIGZAG = (
    *(
        0,
        1,
        8,
        16,
        9,
        2,
        3,
        10,
        17,
        24,
        32,
        25,
        18,
        11,
        4,
        5,
        12,
        19,
        26,
        33,
        40,
        48,
        41,
        34,
        27,
        20,
        13,
        6,
        7,
        14,
        21,
        28,
    ),
    *(
        35,
        42,
        49,
        56,
        57,
        50,
        43,
        36,
        29,
        22,
        15,
        23,
        30,
        37,
        44,
        51,
        58,
        59,
        52,
        45,
        38,
        31,
        39,
        46,
        53,
        60,
        61,
        54,
        47,
    ),
    *(55, 62, 63),
)
"""The natural (row by row) index of each coefficient in zigzag order."""
HUFFMAN_GRAY = bytes.fromhex(
    "0000010501010101010100000000000000000102030405060708090a0b"
    "100002010303020403050504040000017d01020300041105122131410613516107227114328191a1082342b1c11552d1f024336272"
    "82090a161718191a25262728292a3435363738393a434445464748494a535455565758595a636465666768696a737475767778797a"
    "838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9da"
    "e1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
)
HUFFMAN_COLOUR = bytes.fromhex(
    "0100030101010101010101010000000000000102030405060708090a0b"
    "1100020102040403040705040400010277000102031104052131061241510761711322328108144291a1b1c109233352f0156272d1"
    "0a162434e125f11718191a262728292a35363738393a434445464748494a535455565758595a636465666768696a73747576777879"
    "7a82838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8"
    "d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"
)
_DC_TABLE = 1 + 16 + 12
"""Bytes of a DC table: number, counts by length, categories."""
_BLOCKS = {"4:4:4": [0, 1, 1], "4:2:2": [0, 0, 1, 1], "4:2:0": [0, 0, 0, 0, 1, 1]}
"""For each block of an MCU of colour the number of its Huffman table."""
_maxblock_lock = threading.Lock()  # protects Pillow's ImageFile.MAXBLOCK, a global


@dataclass(frozen=True)
class JpegSplit:
    """A JPEG file taken apart; see ``view.Split``."""

    data: bytes
    structure: Structure
    kind: str = "jpeg"
    lossless: bool = False

    @property
    def width(self) -> int:
        return self.structure.width

    @property
    def height(self) -> int:
        return self.structure.height

    @property
    def bytes_per_pixel(self) -> int:
        return 22 if self.structure.progressive else 16  # libjpeg holds all coefficients of a progressive picture

    def pixels(self) -> Pixels:
        return intact_pixels(self.data, self.structure)

    def fit(self, pixels: Pixels, note: Note = no_note) -> FittedView:
        return _fit(self, pixels, note)


def split(data: bytes, max_megapixels: float) -> JpegSplit:
    """See ``formats.split``."""
    structure = jpeg_parse.parse(data)
    check_dimensions(structure.width, structure.height, max_megapixels, "jpeg")
    return JpegSplit(data, structure)


def encode_scan(coding: JpegCoding, width: int, height: int, pixels: Pixels, length: int) -> bytes:
    """See ``formats.encode_scan``."""
    for image in softened(_softened(coding, as_image_for_jpeg(pixels, width, height, coding.mode))):
        scan = _scan(coding, image)
        if len(scan) <= length:
            return b"".join((scan, b"\xff" * (length - len(scan))))
    raise DoesNotFit(f"the rebuilt picture needs {len(scan)} bytes, and there are {length}")


def recoded(coding: JpegCoding, pixels: Pixels, *, rgb: bool = False) -> Pixels:
    """See ``formats.recoded``; ``rgb``: colours are not converted."""
    height, width = pixels.shape[:2]
    out = io.BytesIO()
    as_image_for_jpeg(pixels, width, height, coding.mode).save(
        out, "JPEG", qtables=natural(coding.quantisation), subsampling=coding.subsampling, keep_rgb=rgb
    )
    with Image.open(out) as image:
        return as_array(image)


def encoder() -> str:
    """What writes the scans: ``pillow 12.1.0, libjpeg-turbo 3.1.0``."""
    return f"pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo') or features.version('jpg')}"


def _fit(split: JpegSplit, pixels: Pixels, note: Note) -> FittedView:
    structure = split.structure
    image = as_image_for_jpeg(pixels, structure.width, structure.height, structure.mode)
    over = 0
    for factor, radius in _settings(structure.quantisation[0]):
        coding = _coarser(structure.coding, factor, radius)
        tables = _envelope(structure, factor) + _huffman(structure.mode, structure.progressive)
        scan = _scan(coding, _softened(coding, image))
        free = structure.eoi - len(tables) - len(_scan_header(structure)) - len(scan)
        if free >= 0 and (free % 2 == 0 or free > _FILL_SMALLEST or not _is_followed(split)):
            return _lay_out(split, coding, tables, scan, free, note(coding, bytes(scan)))
        over = -free
    raise DoesNotFit(
        f"the rebuilt picture is {over} bytes too long, even softened, or quantised {COARSER[-1]:g} times more coarsely"
    )


def _settings(luma: list[int]) -> Iterator[tuple[float, float]]:
    """Factors and radii, the least harm first (docs/formats.md). Slightly softer costs less than coarser, mostly; and
    what was quantised coarsely falls apart when its blocks are quantised again with other steps."""
    yield 1.0, 0.0
    yield from ((1.0, radius) for radius in SLIGHTLY_SOFTER)
    coarser, softer = [(factor, 0.0) for factor in COARSER], [(1.0, radius) for radius in SOFTER]
    yield from (softer + coarser if sum(luma) >= _COARSE * len(luma) else coarser + softer)


def _softened(coding: JpegCoding, image: Image.Image) -> Image.Image:
    return blurred(image, coding.softened) if coding.softened else image


def _lay_out(  # noqa: PLR0917
    split: JpegSplit, coding: JpegCoding, tables: bytes, scan: memoryview, free: int, note: bytes
) -> FittedView:
    header = _scan_header(split.structure)
    slack = min(free, len(scan) // 64 + 64)
    tail = min(free - slack, TAIL_BYTES)
    front = front_fill(len(tables) + len(header), free - slack - tail, _FILL_SMALLEST, _MOST_FILL)
    if not front and note and free - slack >= _FILL_SMALLEST + REFERENCE_BYTES:
        front = _FILL_SMALLEST + REFERENCE_BYTES
    if _is_followed(split) and (free - front) % 2:
        front = front + 1 if front else _FILL_SMALLEST + (free - _FILL_SMALLEST) % 2
        slack = min(slack, free - front)
    tail = free - slack - front
    return FittedView(
        coding=coding,
        prefix=joined([Literal(tables), *_fill(front, note), Literal(header)]),
        scan=b"".join((scan, b"\xff" * slack)),
        suffix=joined([Run(0xFF, tail), Literal(split.data[split.structure.eoi :])]),
        encoder=encoder(),
    )


def _is_followed(split: JpegSplit) -> bool:
    """Whether there is something after the picture."""
    return split.structure.eoi + 2 < len(split.data)


def _fill(count: int, note: bytes) -> list[Span]:
    note = noted(note, count - -(-count // _FILL_LARGEST) * _FILL_SMALLEST)
    spans: list[Span] = []
    while count:
        size = min(count, _FILL_LARGEST)
        if 0 < count - size < _FILL_SMALLEST:
            size -= _FILL_SMALLEST
        room = size - _FILL_SMALLEST
        said, note = note[:room], note[room:]
        header = _FILL_HEADER[:2] + struct.pack(">H", size - 2) + _FILL_HEADER[4:]
        spans += [Literal(header + said), Run(0, room - len(said))]
        count -= size
    return spans


def _envelope(structure: Structure, factor: float) -> bytes:
    """All before our Huffman tables."""
    last = max((index for index, segment in enumerate(structure.segments) if segment.is_envelope), default=-1)
    parts = [b"\xff\xd8"]
    for index, segment in enumerate(structure.segments):
        raw = segment.raw
        if (segment.marker == DHT or segment.is_fill) and index > last:
            continue
        if segment.marker == DRI:
            if index > last:
                continue
            raw = raw[:-2] + b"\0\0"
        elif segment.marker == DQT and factor != 1.0:
            raw = raw[: -len(segment.payload)] + _coarser_tables(segment.payload, factor)
        parts.append(raw)
    return b"".join(parts)


def _coarser_tables(payload: bytes, factor: float) -> bytes:
    parts = []
    for precision, number, values in jpeg_parse.quantisation_tables(payload):
        parts.append(bytes([precision << 4 | number]))
        parts.append(struct.pack(">64H" if precision else ">64B", *_scaled(values, factor)))
    return b"".join(parts)


def _coarser(coding: JpegCoding, factor: float, radius: float) -> JpegCoding:
    tables = [_scaled(values, factor) for values in coding.quantisation]
    return msgspec.structs.replace(coding, quantisation=tables, coarser=factor, softened=radius)


def _scaled(values: list[int], factor: float) -> list[int]:
    return [min(255, int(value * factor + 0.5)) for value in values]


def _scan_header(structure: Structure) -> bytes:
    if structure.progressive:
        return jpeg_progressive.scan_header(structure.coding.components)
    count = len(structure.components)
    body = b"".join(bytes([part.id, 0x11 if index else 0x00]) for index, part in enumerate(structure.components))
    return struct.pack(">HHB", 0xFF00 | jpeg_parse.SOS, 6 + 2 * count, count) + body + b"\x00\x3f\x00"


def _huffman(mode: str, progressive: bool) -> bytes:
    tables = [HUFFMAN_GRAY] if mode == "L" else [HUFFMAN_GRAY, HUFFMAN_COLOUR]
    body = b"".join(table[:_DC_TABLE] if progressive else table for table in tables)
    return struct.pack(">HH", 0xFF00 | DHT, 2 + len(body)) + body


def natural(quantisation: list[list[int]]) -> list[list[int]]:
    """Quantisation tables, row by row, of such in zigzag order."""
    tables = [[0] * 64 for _ in quantisation]
    for table, values in zip(tables, quantisation, strict=True):
        for index, value in zip(_ZIGZAG, values, strict=True):
            table[index] = value
    return tables


def _scan(coding: JpegCoding, image: Image.Image) -> memoryview:
    """What is between ``image``'s (first) SOS and EOI."""
    tables = natural(coding.quantisation)
    out = io.BytesIO()
    if coding.progressive:
        with room_for_all(image):
            image.save(out, "JPEG", qtables=tables, subsampling=coding.subsampling, progressive=True)
        data = out.getvalue()
        blocks = [0] if coding.mode == "L" else _BLOCKS[coding.subsampling]
        units = jpeg_parse.units(coding.subsampling, image.width, image.height)
        standard = [table[1:_DC_TABLE] for table in (HUFFMAN_GRAY, HUFFMAN_COLOUR)]
        return memoryview(jpeg_progressive.scans(data, blocks, units, standard, coding.components))
    image.save(out, "JPEG", qtables=tables, subsampling=coding.subsampling, optimize=False)
    made = out.getbuffer()  # no copy
    return made[_scan_start(made) : -2]


@contextmanager
def room_for_all(image: Image.Image) -> Iterator[None]:
    """libjpeg writes a progressive picture, or one with Huffman tables of its own, in one go, and Pillow's guess at the
    room that takes may be too small."""
    with _maxblock_lock:
        before = ImageFile.MAXBLOCK
        ImageFile.MAXBLOCK = max(before, 4 * image.width * image.height)
        try:
            yield
        finally:
            ImageFile.MAXBLOCK = before


def _scan_start(data: memoryview) -> int:
    offset = 2
    while True:
        end = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        if data[offset + 1] == jpeg_parse.SOS:
            return end
        offset = end
