"""JPEG files made smaller without loss: transcoded to JPEG XL, which gives them back byte for byte.

libjxl keeps the DCT coefficients, codes them better (a camera's file takes about 80 % of its bytes) and notes in a box
(``jbrd``) what it takes to write the same JPEG again. What writes it again follows from ISO/IEC 18181 alone, not from a
version of an encoder. Metadata is kept aside by the caller: the JPEG that goes into the JPEG XL has none.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

import imagecodecs

from esrfs.compaction.outcome import Reason
from esrfs.formats.pixels import check_dimensions
from esrfs.formats.view import TAIL_BYTES, Unsupported

SIGNATURE = b"\x00\x00\x00\x0cJXL \r\n\x87\n"

_BYTES, _OF_THE_FILE, _OF_A_PIXEL = 200_000_000, 5, 20
"""Memory that transcoding takes at most (``tests.peaks``): libjxl holds all coefficients."""
_HEAD_BLOCKS = (65536, 16384, 4096)
_LITTLE = 100
"""The file's size divided by this is little."""
_EOI, _SOS, _DNL = 0xD9, 0xDA, 0xDC
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_KEPT_BY_THE_CALLER = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}
"""APP1 to APP15 and COM. JFIF's APP0 and Adobe's APP14 say what the colours mean."""
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_MOST_SEGMENTS = 1 << 16


@dataclass(frozen=True)
class Transcoded:
    """A JPEG file as a JPEG XL and what lies around its scans: prefix + scan + suffix is the file."""

    picture: bytes
    prefix: bytes
    """All before the first scan, and some of it."""
    scan_length: int
    """Bytes of :func:`scan`."""
    behind: int
    """Bytes of the transcoded JPEG that follow the scan."""
    suffix: bytes
    """The scans' last bytes, EOI and all that follows."""
    width: int
    height: int


def transcode(data: bytes, max_megapixels: float, room: float = math.inf) -> Transcoded:
    """Transcode a JPEG file, in ``room`` bytes of memory, and check that it comes back byte for byte.

    Raises Unsupported: BROKEN for what is no sound JPEG, UNSUPPORTED_KIND for what JPEG XL doesn't hold (CMYK,
    arithmetic coding, 12 bits …), TOO_LARGE, NO_MEMORY, ERROR if another JPEG came back.
    """
    kept, width, height, start = _before_scan(data)
    check_dimensions(width, height, max_megapixels, "jpeg")
    needed = _BYTES + _OF_THE_FILE * len(data) + _OF_A_PIXEL * width * height
    if needed > room:
        message = f"it takes {needed / 1e9:.1f} GB of memory, and {room / 1e9:.1f} GB are free now"
        raise Unsupported(Reason.NO_MEMORY, message, "jpeg")
    end = _end_of_scans(data, start)
    bare = b"".join((b"\xff\xd8", *kept, data[start:end], b"\xff\xd9"))
    try:
        picture = bytes(imagecodecs.jpegxl_encode_jpeg(bare))
        same = scan(picture, end - start, behind=2) == data[start:end]
    except (imagecodecs.JpegxlError, ValueError) as error:
        raise Unsupported(Reason.UNSUPPORTED_KIND, f"JPEG XL can't hold this JPEG ({error})", "jpeg") from error
    if not same or not picture.startswith(SIGNATURE):
        raise Unsupported(Reason.ERROR, "JPEG XL doesn't give this JPEG back byte for byte", "jpeg")
    first, last = _without_work(start, end, len(data))
    return Transcoded(picture, data[:first], last - first, end - last + 2, data[last:], width, height)


def _without_work(start: int, end: int, size: int) -> tuple[int, int]:
    """Which part of the scans is left to the engine: what programs read with a file's head and tail is kept beside the
    JPEG XL, where that costs little. Reads come in pages, read-ahead in larger blocks."""
    unit = max((unit for unit in _HEAD_BLOCKS if unit <= size / _LITTLE), default=1)
    tail = TAIL_BYTES if size / _LITTLE >= TAIL_BYTES else 0
    first, last = -(-start // unit) * unit, end - tail
    return (first, last) if first < last else (start, end)


def scan(picture: bytes, length: int, behind: int) -> bytes:
    """Of the JPEG within a JPEG XL: the ``length`` bytes that have ``behind`` bytes after them.

    Raises ValueError if there is no such JPEG.
    """
    try:
        bare = bytes(imagecodecs.jpegxl_decode_jpeg(picture, numthreads=0))
    except imagecodecs.JpegxlError as error:
        raise ValueError(f"the JPEG XL can't be turned back into its JPEG: {error}") from error
    if len(bare) < length + behind:
        raise ValueError(f"the JPEG XL holds a JPEG of {len(bare)} bytes, too few for a scan of {length}")
    return bare[len(bare) - behind - length : len(bare) - behind]


def _before_scan(data: bytes) -> tuple[list[bytes], int, int, int]:
    """The segments before the first scan that belong to the picture, its width and height, where the scan begins."""
    kept: list[bytes] = []
    width = height = 0
    offset = 2
    while True:
        marker, end = _segment(data, offset)
        if marker in _FRAMES and end - offset >= 11:
            height, width = struct.unpack_from(">HH", data, offset + 5)
        if marker not in _KEPT_BY_THE_CALLER:
            kept.append(data[offset:end])
            if len(kept) > _MOST_SEGMENTS:
                raise _broken(f"it has more than {_MOST_SEGMENTS} segments")
        offset = end
        if marker == _SOS:
            return kept, width, height, offset


def _end_of_scans(data: bytes, offset: int) -> int:
    """Where EOI is, after one scan or several with tables between them."""
    while True:
        found = _MARKER_IN_SCAN.search(data, offset)
        if found is None:
            raise _broken("it has no end-of-image marker")
        offset = found.end() - 2
        if data[offset + 1] == _EOI:
            return offset
        _, offset = _segment(data, offset)


def _segment(data: bytes, offset: int) -> tuple[int, int]:
    """The marker at ``offset`` and where its segment ends."""
    if len(data) < offset + 4 or data[offset] != 0xFF:
        raise _broken("a segment is missing or follows other bytes")
    marker, length = data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4], "big")
    end = offset + 2 + length
    if length < 2 or end > len(data) or not 0xC0 <= marker <= 0xFE or marker in range(0xD0, 0xDA) or marker == _DNL:
        raise _broken(f"there is a malformed segment 0x{marker:02X}")
    return marker, end


def _broken(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this JPEG is damaged: {what}", "jpeg")
