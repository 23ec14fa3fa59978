"""The structure of a JPEG file, and what esrfs refuses to touch in it.

Accepted: 8 bits, Huffman coding, one interleaved sequential scan (SOF0, SOF1) or progressive scans (SOF2), gray or
YCbCr with 4:4:4, 4:2:2 or 4:2:0. The picture's end is found by walking through its scans: thumbnails and what follows
the picture hold markers of their own.
"""

from __future__ import annotations

import itertools
import re
import struct
from dataclasses import dataclass
from typing import Literal as OneOf

from esrfs.blob.recipe import JpegCoding
from esrfs.blob.reference import without_fill
from esrfs.compaction.outcome import Reason
from esrfs.formats.signed import check_xmp
from esrfs.formats.view import Unsupported

SOI, EOI, SOS, DQT, DHT, DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
APP0, APP1, APP11, APP13, APP14, APP15, COM = 0xE0, 0xE1, 0xEB, 0xED, 0xEE, 0xEF, 0xFE
FILL = b"esrfs\0"
"""What the data of an APP13 segment of fill begin with."""
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_SOF_NAMES = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical progressive",
    0xC7: "hierarchical lossless",
    0xC9: "arithmetic-coded",
    0xCA: "progressive arithmetic-coded",
    0xCB: "lossless arithmetic-coded",
    0xCD: "hierarchical arithmetic-coded",
    0xCE: "hierarchical progressive arithmetic-coded",
    0xCF: "hierarchical lossless arithmetic-coded",
    0xF7: "JPEG-LS",
}
_LONGEST_SIDE = 65_500
"""Pixels: libjpeg's own limit, a little less than the format's."""
_MOST_SCANS = 200
"""Encoders write 3 to 20; each takes a pass over all of the picture, and hostile files have thousands."""
_MOST_SEGMENTS = 1 << 16
"""Before the first scan. Cameras write some dozens."""
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""In a scan, FF 00 stands for a byte FF and FF D0 to FF D7 are restarts; any other marker ends it. (FF before it is
fill. With ``+`` after the first FF the time would grow with the square of the length of each run of FF that is none:
what a dying card leaves of a picture.)"""
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_FILL_BYTES = re.compile(rb"\xff*")


@dataclass(frozen=True)
class Segment:
    marker: int
    raw: bytes
    """With the marker, its length field, and fill bytes before it."""
    payload: bytes

    @property
    def is_envelope(self) -> bool:
        """Whether it is the owner's (metadata), not a table of the picture, and no fill of ours."""
        return (APP0 <= self.marker <= APP15 or self.marker == COM) and not self.is_fill

    @property
    def is_fill(self) -> bool:
        """Whether a view was filled with it; it says whose pixels those were."""
        return self.marker == APP13 and self.payload.startswith(FILL)


@dataclass(frozen=True)
class Component:
    id: int
    sampling: tuple[int, int]
    table: int
    """Number of its quantisation table."""


@dataclass(frozen=True)
class Structure:
    segments: list[Segment]
    """All between SOI and SOS, in the file's order."""
    frame: Segment
    width: int
    height: int
    components: list[Component]
    progressive: bool
    sos: bytes
    """The (first) SOS segment."""
    scan_start: int
    scan_end: int
    """Without fill bytes before EOI. A progressive picture's other scans, with their tables, lie between."""
    eoi: int
    """Offset of the EOI marker's two bytes."""
    restart_interval: int
    """In MCUs; 0: no restarts."""
    quantisation: list[list[int]]
    """For each component, in zigzag order."""
    mode: OneOf["L", "RGB"]
    subsampling: OneOf["4:4:4", "4:2:2", "4:2:0"]

    @property
    def coding(self) -> JpegCoding:
        return JpegCoding(
            mode=self.mode,
            subsampling=self.subsampling,
            quantisation=self.quantisation,
            progressive=self.progressive,
            components=bytes(component.id for component in self.components) if self.progressive else b"",
        )


def parse(data: bytes, *, rgb: bool = False) -> Structure:
    """Take a JPEG file apart. ``rgb``: what it lies in says that its components are red, green and blue. Raises
    Unsupported (UNSUPPORTED_KIND, SIGNED, BROKEN)."""
    segments, sos, scan_start = _segments(data)
    _refuse_signed(segments)
    frame = _frame(segments)
    height, width, components = _components(frame)
    mode, subsampling = _colour(segments, components, rgb)
    progressive = frame.marker == 0xC2
    _check_scan_header(sos, components, progressive)
    scan_end, eoi = _scans_end(data, scan_start) if progressive else _scan_end(data, scan_start)
    interval = 0
    for segment in segments:
        if segment.marker == DRI:
            if len(segment.payload) != 2:
                raise _broken("its restart interval is malformed")
            interval = int.from_bytes(segment.payload, "big")
    structure = Structure(
        segments=segments,
        frame=frame,
        width=width,
        height=height,
        components=components,
        progressive=progressive,
        sos=sos,
        scan_start=scan_start,
        scan_end=scan_end,
        eoi=eoi,
        restart_interval=interval,
        quantisation=_tables(segments, components),
        mode=mode,
        subsampling=subsampling,
    )
    if not progressive:
        _check_restarts(structure, data)
    return structure


def quantisation_tables(payload: bytes) -> list[tuple[int, int, list[int]]]:
    """The tables of a DQT segment's payload: (0 for 8-bit or 1 for 16-bit values, number, 64 values in zigzag order).

    Raises Unsupported (BROKEN) if it is malformed.
    """
    tables = []
    offset = 0
    while offset < len(payload):
        precision, number = payload[offset] >> 4, payload[offset] & 15
        size = 64 << precision
        values = payload[offset + 1 : offset + 1 + size]
        if precision > 1 or number > 3 or len(values) != size:
            raise _broken("a quantisation table is malformed")
        tables.append((precision, number, list(struct.unpack(">64H" if precision else ">64B", values))))
        offset += 1 + size
    return tables


def _segments(data: bytes) -> tuple[list[Segment], bytes, int]:
    """The segments before SOS, the SOS segment, and where the scan starts."""
    segments: list[Segment] = []
    offset = 2
    while True:
        start = offset
        fill = _FILL_BYTES.match(data, offset)
        assert fill is not None  # it matches nothing, too
        offset = max(offset, fill.end() - 1)
        header = data[offset : offset + 4]
        if len(header) < 4:
            raise _broken("it ends before its pixels")
        if header[0] != 0xFF:
            raise _broken("there are bytes between its segments that belong to none")
        marker = header[1]
        length = int.from_bytes(header[2:], "big")
        if marker in _SOF_NAMES:
            raise _passed(f"this JPEG is {_SOF_NAMES[marker]}")
        if marker == EOI:
            raise _broken("it has no pixels")
        if marker in (0xCC, 0xDC, 0xDE, 0xDF) or not (0xC0 <= marker <= 0xFE) or marker in range(0xD0, 0xD9):
            raise _passed(f"this JPEG has a marker 0x{marker:02X} that is rare before the pixels")
        end = offset + 2 + length
        if length < 2 or end > len(data):
            raise _broken("a segment is longer than the file")
        if marker == SOS:
            return segments, data[offset:end], end
        if len(segments) == _MOST_SEGMENTS:
            raise _passed(f"this JPEG has more than {_MOST_SEGMENTS} segments")
        segments.append(Segment(marker, data[start:end], data[offset + 4 : end]))
        offset = end


def _refuse_signed(segments: list[Segment]) -> None:
    if any(segment.marker == APP11 and segment.payload.startswith(b"JP") for segment in segments):
        message = (
            "this JPEG carries JUMBF boxes (C2PA Content Credentials and the like), which sign its pixels; it stays"
        )
        raise Unsupported(Reason.SIGNED, message + " bit for bit", "jpeg")
    for segment in segments:
        if segment.marker == APP1 and segment.payload.startswith(_XMP):
            check_xmp(segment.payload, "jpeg", "JPEG")


def _frame(segments: list[Segment]) -> Segment:
    frames = [segment for segment in segments if segment.marker in (0xC0, 0xC1, 0xC2)]
    if len(frames) != 1:
        raise _broken("it has no frame header" if not frames else "it has several frame headers")
    return frames[0]


def _components(frame: Segment) -> tuple[int, int, list[Component]]:
    payload = frame.payload
    if len(payload) < 6 or len(payload) != 6 + 3 * payload[5]:
        raise _broken("its frame header is malformed")
    precision, height, width, count = struct.unpack_from(">BHHB", payload)
    if precision != 8:
        raise _passed(f"this JPEG has {precision} bits a sample")
    if not width:
        raise _broken("its frame header says 0 pixels")
    if not height:
        raise _passed("this JPEG tells its height after its pixels")
    if max(width, height) > _LONGEST_SIDE:
        raise _passed(f"this JPEG has a side of more than {_LONGEST_SIDE:,} pixels, which libjpeg does not read")
    if count not in (1, 3):
        raise _passed("this JPEG is CMYK" if count == 4 else f"this JPEG has {count} components")
    components = []
    for index in range(count):
        number, sampling, table = payload[6 + 3 * index : 9 + 3 * index]
        components.append(Component(number, (sampling >> 4, sampling & 15), table))
    return height, width, components


def _colour(
    segments: list[Segment], components: list[Component], rgb: bool
) -> tuple[OneOf["L", "RGB"], OneOf["4:4:4", "4:2:2", "4:2:0"]]:
    if len(components) == 1:
        return "L", "4:4:4"
    if rgb:
        if any(component.sampling != (1, 1) for component in components):
            raise _passed("this JPEG is coded as RGB, and sampled")
        return "RGB", "4:4:4"
    for segment in segments:
        if segment.marker == APP14 and segment.payload.startswith(b"Adobe") and len(segment.payload) >= 12:
            if segment.payload[11] == 0:
                raise _passed("this JPEG is coded as RGB")
            if segment.payload[11] == 2:
                raise _passed("this JPEG is coded as YCCK")
    if bytes(component.id for component in components) in (b"RGB", b"rgb"):
        raise _passed("this JPEG is coded as RGB")
    sampling = [component.sampling for component in components]
    if sampling == [(1, 1)] * 3:
        return "RGB", "4:4:4"
    if sampling == [(2, 1), (1, 1), (1, 1)]:
        return "RGB", "4:2:2"
    if sampling == [(2, 2), (1, 1), (1, 1)]:
        return "RGB", "4:2:0"
    known = {(1, 2): "4:4:0", (4, 1): "4:1:1", (4, 2): "4:1:0"}
    name = known.get(sampling[0]) if sampling[1:] == [(1, 1)] * 2 else None
    name = name or " ".join(f"{across}x{down}" for across, down in sampling)
    raise _passed(f"this JPEG has colour sampling {name}")


def _check_scan_header(sos: bytes, components: list[Component], progressive: bool) -> None:
    count = len(components)
    if len(sos) < 5 or len(sos) != 8 + 2 * sos[4]:
        raise _broken("its scan header is malformed")
    if progressive:
        return  # the decoder checks all of them
    if sos[4] != count:
        raise _passed("this JPEG has one scan for each component")
    if [sos[5 + 2 * index] for index in range(count)] != [component.id for component in components]:
        raise _broken("its scan names other components than its frame")
    if sos[-3:] != b"\x00\x3f\x00":
        raise _broken("its scan header is not one of sequential coding")


def _scan_end(data: bytes, start: int) -> tuple[int, int]:
    """Where the scan's last byte ends, and where EOI is."""
    end, marker_at = _marker_after(data, start)
    marker = data[marker_at + 1]
    if marker == EOI:
        return end, marker_at
    if marker in (SOS, DHT, DQT):
        raise _passed("this JPEG has several scans")
    raise _broken(f"there is a marker 0x{marker:02X} within its pixels")


def _scans_end(data: bytes, start: int) -> tuple[int, int]:
    """The same for all scans of a progressive picture."""
    scans = 1
    while True:
        end, marker_at = _marker_after(data, start)
        marker = data[marker_at + 1]
        if marker == EOI:
            return end, marker_at
        if marker not in (SOS, DHT, DRI):
            raise _passed(f"this JPEG has a marker 0x{marker:02X} between its scans")
        scans += marker == SOS
        if scans > _MOST_SCANS:
            raise _passed(f"this JPEG has more than {_MOST_SCANS} scans")
        start = marker_at + 2 + int.from_bytes(data[marker_at + 2 : marker_at + 4], "big")


def _marker_after(data: bytes, start: int) -> tuple[int, int]:
    """Where the compressed data from ``start`` ends, and where the marker after it is."""
    found = _NEXT_MARKER.search(data, start)
    if found is None:
        raise _passed("this JPEG has no end-of-image marker (it is cut or still being written)")
    return start + without_fill(memoryview(data)[start : found.start()]), found.start()


def _tables(segments: list[Segment], components: list[Component]) -> list[list[int]]:
    tables = {}
    for segment in segments:
        if segment.marker == DQT:
            for _, number, values in quantisation_tables(segment.payload):
                tables[number] = values
    chosen = [tables.get(component.table) for component in components]
    result = [values for values in chosen if values is not None]
    if len(result) != len(chosen):
        raise _broken("a quantisation table is missing")
    if any(not 1 <= value <= 255 for values in result for value in values):
        raise _passed("this JPEG has quantisation values beyond 1 to 255")
    return result


def units(subsampling: str, width: int, height: int) -> int:
    """MCUs of a picture."""
    across, down = {"4:4:4": (8, 8), "4:2:2": (16, 8), "4:2:0": (16, 16)}[subsampling]
    return -(-width // across) * -(-height // down)


def _check_restarts(structure: Structure, data: bytes) -> None:
    total = units(structure.subsampling, structure.width, structure.height)
    expected = -(-total // structure.restart_interval) - 1 if structure.restart_interval else 0
    found = (match[1][0] & 7 for match in _RESTART.finditer(data, structure.scan_start, structure.scan_end))
    due = (index & 7 for index in range(expected))
    if any(one != other for one, other in itertools.zip_longest(found, due)):
        raise _broken(f"its pixels don't have just the {expected} restart markers in order that are due")


def _broken(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this JPEG is damaged: {what}; it stays bit for bit", "jpeg")


def _passed(what: str) -> Unsupported:
    return Unsupported(Reason.UNSUPPORTED_KIND, f"{what}; esrfs keeps such files bit for bit", "jpeg")
