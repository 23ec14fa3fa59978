"""The pixels of a JPEG, and whether its compressed pixels are intact.

libjpeg reports damage by warnings, which Pillow drops. But a scan that is intact ends exactly where its last block
does, and after nearly any damage it does not: the Huffman codes fall into step again some blocks too early or too late.
So bytes put after the scan (and after each restart interval) must change nothing; and without its last two bytes (some
encoders write one too many) the scan must decode to something else, whatever follows it. Without restarts this refuses
exactly what libjpeg warns of, in our tests; with restarts, an interval with too much data is not noticed.

What Pillow decodes is made of the tables, frame and scan only: thumbnails, MPF and EXIF are none of its business here.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from esrfs.compaction.outcome import Reason
from esrfs.formats.jpeg_parse import DHT, DQT, DRI, Structure, intervals
from esrfs.formats.pixels import DECODE_ERRORS, as_array
from esrfs.formats.view import Pixels, Unsupported

_JFIF = bytes.fromhex("ffe000104a46494600010100000100010000")
_ENDINGS = (b"\xaa\x55\xcc\x33" * 8, b"", b"\xff\x00" * 32, b"\x55\xaa\x33\xcc" * 8)

_TELLING = b"\xff\xdb\x01\x06" + b"".join(bytes([number, 1, *[16] * 63]) for number in range(4))
"""Quantisation tables (a DQT segment) that show a change of any coefficient: nothing is bright enough to clip."""


def intact_pixels(data: bytes, structure: Structure) -> Pixels:
    """uint8, height × width × 1 or 3. Raises Unsupported (BROKEN) if the compressed pixels are damaged."""
    scan = data[structure.scan_start : structure.scan_end]
    tables = [segment.raw for segment in structure.segments if segment.marker == DQT]
    pixels = _decoded(structure, tables, scan)
    parts = intervals(scan)
    longer = b"".join(
        part + _ENDINGS[0] + (bytes([0xFF, 0xD0 | index & 7]) if index < len(parts) - 1 else b"")
        for index, part in enumerate(parts)
    )
    if not np.array_equal(_decoded(structure, tables, longer), pixels):
        raise _damaged("its pixels end too early")
    shorter = scan[:-2].removesuffix(b"\xff")
    if _changes(structure, tables, pixels, shorter):
        return pixels
    # white or black may have swallowed the change: again, with a quantisation that shows it
    if _changes(structure, [_TELLING], _decoded(structure, [_TELLING], scan), shorter):
        return pixels
    raise _damaged("there is more data than pixels")


def _changes(structure: Structure, tables: list[bytes], pixels: Pixels, scan: bytes) -> bool:
    """Whether ``scan``, with anything after it, decodes to other than ``pixels``."""
    return any(not np.array_equal(_decoded(structure, tables, scan + ending), pixels) for ending in _ENDINGS)


def _decoded(structure: Structure, tables: list[bytes], scan: bytes) -> Pixels:
    coding = [segment.raw for segment in structure.segments if segment.marker in (DHT, DRI)]
    data = b"".join((b"\xff\xd8", _JFIF, *tables, *coding, structure.frame.raw, structure.sos, scan, b"\xff\xd9"))
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.mode != structure.mode or image.size != (structure.width, structure.height):
                raise _damaged("its header contradicts itself")
            return as_array(image)
    except DECODE_ERRORS as error:
        raise _damaged(f"its pixels can't be decoded ({error})") from error


def _damaged(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this JPEG is damaged: {what}; it stays bit for bit", "jpeg")
