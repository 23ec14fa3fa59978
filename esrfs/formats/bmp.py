"""BMP views: the original's bytes, with other pixels in their place. There is no fill, and no room for any:
uncompressed pixels take just as many bytes as before.

A view, byte for byte::

    headers, palette and what else lies before the pixels    verbatim
    scan    the rows, bottom-up or top-down as in the original; their padding is 0
    what follows the pixels (a colour profile)               verbatim

Accepted: 24 and 32 bits a pixel, and 8 bits with a palette; uncompressed. The fourth byte of 32 bits stays exact.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import msgspec
import numpy as np
import PIL

from esrfs.blob.recipe import BmpCoding, Literal
from esrfs.compaction.outcome import Reason
from esrfs.formats.colours import all_gray, numbered
from esrfs.formats.pixels import as_array, as_image, check_dimensions
from esrfs.formats.view import DoesNotFit, FittedView, Note, Pixels, Unsupported, no_note

_FILE_HEADER = 14
_CORE = 12
_PLAIN, _RLE8, _RLE4, _MASKS, _JPEG, _PNG, _MASKS_WITH_ALPHA = range(7)
_USUAL_MASKS = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)


@dataclass(frozen=True)
class BmpSplit:
    """A BMP file taken apart; see ``view.Split``."""

    data: bytes
    width: int
    height: int
    coding: BmpCoding
    start: int
    """Offset of the first row."""
    kind: str = "bmp"

    @property
    def lossless(self) -> bool:
        return not self.coding.colours

    @property
    def bytes_per_pixel(self) -> int:
        return 10

    def pixels(self) -> Pixels:
        rows = self._rows()
        if self.coding.bits == 8:
            return self._of_colours(rows[:, : self.width])
        return rows[:, : self.width * self.coding.bits // 8].reshape(self.height, self.width, -1)[:, :, 2::-1]

    def _of_colours(self, numbers: Pixels) -> Pixels:
        if not self.coding.colours:
            return numbers[:, :, None]
        colours = np.frombuffer(self.coding.colours, np.uint8).reshape(-1, 4)
        if numbers.max() >= len(colours):
            raise _broken("it uses colours that its palette does not have")
        return colours[:, : 1 if self.coding.mode == "L" else 3][numbers]

    def _rows(self) -> Pixels:
        """All of them, with padding, from the top."""
        length = _row_bytes(self.coding, self.width)
        rows = np.frombuffer(self.data, np.uint8, length * self.height, self.start).reshape(self.height, length)
        return rows if self.coding.top_down else rows[::-1]

    def fit(self, pixels: Pixels, note: Note = no_note) -> FittedView:
        """``note`` is left out: there is no fill."""
        coding = self.coding
        if coding.bits == 32:
            fourth = self._rows()[:, 3 : self.width * 4 : 4]
            coding = msgspec.structs.replace(coding, fourth=zlib.compress(fourth.tobytes(), 9))
        length = _row_bytes(coding, self.width) * self.height
        return FittedView(
            coding=coding,
            prefix=[Literal(self.data[: self.start])],
            scan=encode_scan(coding, self.width, self.height, pixels, length),
            suffix=[Literal(self.data[self.start + length :])],
            encoder=encoder(),
        )


def split(data: bytes, max_megapixels: float) -> BmpSplit:
    """See ``formats.split``."""
    start, header_size = struct.unpack_from("<II", data, 10)
    if _FILE_HEADER + header_size > len(data):
        raise _broken("its header is cut")
    width, height, planes, bits, compression = _header(data, header_size)
    check_dimensions(width, abs(height), max_megapixels, "bmp")
    if planes != 1:
        raise _broken(f"its header says {planes} planes")
    if compression in (_RLE8, _RLE4, _JPEG, _PNG):
        raise _passed("is compressed")
    if bits not in (8, 24, 32):
        raise _passed(f"has {bits} bit{'s' if bits > 1 else ''} a pixel")
    if compression in (_MASKS, _MASKS_WITH_ALPHA) and (bits != 32 or data[54:66] != _USUAL_MASKS):
        raise _passed("has an unusual layout of its pixels")
    if compression not in (_PLAIN, _MASKS, _MASKS_WITH_ALPHA):
        raise _broken("its header names a compression that does not exist")
    colours = _palette(data, header_size, start) if bits == 8 else None
    gray = colours is not None and all_gray(colours)
    ramp = np.repeat(np.arange(256)[:, None], 3, axis=1)
    if colours is not None and len(colours) == 256 and np.array_equal(colours[:, :3], ramp):
        colours = None  # numbers are shades
    coding = BmpCoding(
        mode="L" if gray else "RGB",
        bits=bits,
        top_down=height < 0,
        colours=colours.tobytes() if colours is not None else b"",
    )
    if start < _FILE_HEADER + header_size or start + _row_bytes(coding, width) * abs(height) > len(data):
        raise _broken("its pixels lie outside of the file")
    return BmpSplit(data, width, abs(height), coding, start)


def encode_scan(coding: BmpCoding, width: int, height: int, pixels: Pixels, length: int) -> bytes:
    """See ``formats.encode_scan``."""
    row = _row_bytes(coding, width)
    if row * height != length:
        raise DoesNotFit(f"{height} rows take {row * height} bytes, and there are {length}")
    image = as_image(pixels, width, height, coding.mode)
    rows = np.zeros((height, row), np.uint8)
    if coding.colours:
        rows[:, :width] = numbered(image, np.frombuffer(coding.colours, np.uint8).reshape(-1, 4), dither=True)
    elif coding.bits == 8:
        rows[:, :width] = as_array(image)[:, :, 0]
    else:
        samples = coding.bits // 8
        places = rows[:, : width * samples].reshape(height, width, samples)
        places[:, :, :3] = as_array(image)[:, :, ::-1]
        if samples == 4:
            fourth = zlib.decompressobj().decompress(coding.fourth, width * height)
            places[:, :, 3] = np.frombuffer(fourth, np.uint8).reshape(height, width)
        rows[:, : width * samples] = places.reshape(height, -1)
    return (rows if coding.top_down else rows[::-1]).tobytes()


def encoder() -> str:
    """What writes the scans: ``pillow 12.1.0`` (it chooses among few colours)."""
    return f"pillow {PIL.__version__}"


def _header(data: bytes, size: int) -> tuple[int, int, int, int, int]:
    """Width, height (negative: top-down), planes, bits a pixel, compression."""
    if size == _CORE:
        return (*struct.unpack_from("<HHHH", data, 18), _PLAIN)
    if size < 40:
        raise _broken("its header is too short")
    return struct.unpack_from("<iiHHI", data, 18)


def _palette(data: bytes, header_size: int, start: int) -> Pixels:
    """Up to 256 colours × 4."""
    each = 3 if header_size == _CORE else 4
    count = 256 if header_size == _CORE else struct.unpack_from("<I", data, 46)[0] or 256
    first = _FILE_HEADER + header_size
    count = min(count, 256, (min(start, len(data)) - first) // each)
    if count < 1:
        raise _broken("its palette is missing")
    entries = np.frombuffer(data, np.uint8, count * each, first).reshape(count, each)
    colours = np.full((count, 4), 255, np.uint8)
    colours[:, :3] = entries[:, 2::-1]
    return colours


def _row_bytes(coding: BmpCoding, width: int) -> int:
    return (width * coding.bits + 31) // 32 * 4


def _broken(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"this BMP is damaged: {what}; it stays bit for bit", "bmp")


def _passed(what: str) -> Unsupported:
    return Unsupported(Reason.UNSUPPORTED_KIND, f"this BMP {what}; esrfs keeps such files bit for bit", "bmp")
