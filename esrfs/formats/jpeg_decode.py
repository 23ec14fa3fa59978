"""The pixels of a JPEG, and whether its compressed pixels are intact.

libjpeg reports damage by warnings, which Pillow drops. But a scan that is intact ends exactly where its last block
does, and after nearly any damage it does not: the Huffman codes fall into step again some blocks too early or too late.
So bytes put after the scan (and after each restart interval) must change nothing; and without its last byte the scan
must decode to something else, whatever follows it.

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


def intact_pixels(data: bytes, structure: Structure) -> Pixels:
    """uint8, height × width × 1 or 3. Raises Unsupported (BROKEN) if the compressed pixels are damaged."""
    scan = data[structure.scan_start : structure.scan_end]
    pixels = _decoded(structure, scan)
    parts = intervals(scan)
    longer = b"".join(
        part + _ENDINGS[0] + (bytes([0xFF, 0xD0 | index & 7]) if index < len(parts) - 1 else b"")
        for index, part in enumerate(parts)
    )
    if not np.array_equal(_decoded(structure, longer), pixels):
        raise _damaged("its pixels end too early")
    shorter = scan[: -2 if scan.endswith(b"\xff\x00") else -1]
    if all(np.array_equal(_decoded(structure, shorter + ending), pixels) for ending in _ENDINGS):
        raise _damaged("there is more data than pixels")
    return pixels


def _decoded(structure: Structure, scan: bytes) -> Pixels:
    tables = [segment.raw for segment in structure.segments if segment.marker in (DQT, DHT, DRI)]
    data = b"".join((b"\xff\xd8", _JFIF, *tables, structure.frame.raw, structure.sos, scan, b"\xff\xd9"))
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.mode != structure.mode or image.size != (structure.width, structure.height):
                raise _damaged("its header contradicts itself")
            return as_array(image)
    except DECODE_ERRORS as error:
        raise _damaged(f"its pixels can't be decoded ({error})") from error


def _damaged(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this JPEG is damaged: {what}; it stays bit for bit", "jpeg")
