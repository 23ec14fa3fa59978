"""The pixels of a JPEG, and whether its compressed pixels are intact.

libjpeg goes on after damage and reports it by warnings, which Pillow drops; simplejpeg makes them errors. After nearly
any damage there is one: the Huffman codes fall into step again some blocks too early or too late, so a scan or restart
interval ends before its data or after it. A few bytes too many before a marker are no damage: some encoders write them.

What is decoded is made of the tables, frame and scans only: thumbnails, MPF and EXIF are none of its business here.
"""

from __future__ import annotations

import simplejpeg

from esrfs.compaction.outcome import Reason
from esrfs.formats.jpeg_parse import DHT, DQT, DRI, Structure
from esrfs.formats.view import Pixels, Unsupported

_JFIF = bytes.fromhex("ffe000104a46494600010100000100010000")
_ADOBE_RGB = bytes.fromhex("ffee000e41646f626500640000000000")


def intact_pixels(data: bytes, structure: Structure, *, rgb: bool = False) -> Pixels:
    """uint8, height × width × 1 or 3; ``rgb``: its components are red, green and blue. Raises Unsupported (BROKEN) if
    the compressed pixels are damaged."""
    tables = [segment.raw for segment in structure.segments if segment.marker in (DQT, DHT, DRI)]
    scans = memoryview(data)[structure.scan_start : structure.scan_end]
    colours = _ADOBE_RGB if rgb else _JFIF
    picture = b"".join((b"\xff\xd8", colours, *tables, structure.frame.raw, structure.sos, scans, b"\xff\xd9"))
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(picture, "GRAY" if structure.mode == "L" else "RGB", strict=True)
    except ValueError as error:
        if "nsufficient memory" in str(error):  # libjpeg's own words, which simplejpeg takes for damage
            raise MemoryError(str(error)) from error
        raise _damaged(f"its pixels can't be decoded ({error})") from error
    if pixels.shape[:2] != (structure.height, structure.width):
        raise _damaged("its header contradicts itself")
    return pixels


def _damaged(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this JPEG is damaged: {what}; it stays bit for bit", "jpeg")
