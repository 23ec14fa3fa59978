"""TIFF views: the original's bytes, with other pixels in its strips or tiles, each at its offset and of its length.

So no offset in the file changes, and exiftool prints the same. A view, byte for byte::

    all before the first strip or tile              verbatim
    scan    strips or tiles in the file's order; what lies between them is verbatim. Each is compressed as the
            original's is, then zeros up to its length, which decoders don't read. One that does not fit is softened,
            just enough.
    all after the last strip or tile                verbatim: often the directory with all metadata

There is no fill, and so no room for a note.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import PIL
from PIL import Image, features

from esrfs.blob.recipe import Literal, TiffCoding
from esrfs.compaction.outcome import Reason
from esrfs.formats import pixels as pillow
from esrfs.formats import tiff_parse
from esrfs.formats.tiff_parse import DEFLATE, LZW, NONE, OLD_DEFLATE, Structure
from esrfs.formats.view import DoesNotFit, FittedView, Note, Pixels, Unsupported, no_note

_LEVELS = (6, 9)
"""zlib's, tried in this order."""


@dataclass(frozen=True)
class TiffSplit:
    """A TIFF file taken apart; see ``view.Split``."""

    data: bytes
    structure: Structure
    kind: str = "tiff"
    lossless: bool = False
    """A strip may have been softened."""

    @property
    def width(self) -> int:
        return self.structure.width

    @property
    def height(self) -> int:
        return self.structure.height

    def pixels(self) -> Pixels:
        structure = self.structure
        pixels = pillow.decode(self.data, structure.width * structure.height / 1e6)
        if pixels.shape != (structure.height, structure.width, structure.samples):
            raise Unsupported(
                Reason.UNSUPPORTED_KIND, "this TIFF is read in different ways; it stays bit for bit", "tiff"
            )
        if structure.premultiplied and pixels[:, :, -1].min() < 255:
            raise Unsupported(
                Reason.UNSUPPORTED_KIND,
                "this TIFF is transparent, with its colours multiplied by that; esrfs keeps such files bit for bit",
                "tiff",
            )
        return pixels

    def fit(self, pixels: Pixels, note: Note = no_note) -> FittedView:
        """``note`` is left out: there is no fill."""
        structure = self.structure
        order = sorted(structure.parts)
        start, end = order[0][0], sum(order[-1])
        ends = [sum(part) for part in order[:-1]]
        coding = TiffCoding(
            mode="L" if structure.samples < 3 else "RGB",
            compression=structure.compression,
            predictor=structure.predictor,
            planar=structure.planar,
            part_width=structure.part_width,
            part_height=structure.part_height,
            tiled=structure.tiled,
            parts=[(offset - start, length) for offset, length in structure.parts],
            between=[self.data[last:following] for last, (following, _) in zip(ends, order[1:], strict=True)],
        )
        if structure.samples in (2, 4):
            extra = np.ascontiguousarray(self.pixels()[:, :, -1])
            coding = msgspec.structs.replace(coding, extra=zlib.compress(extra.tobytes(), 9))
        return FittedView(
            coding=coding,
            prefix=[Literal(self.data[:start])],
            scan=encode_scan(coding, self.width, self.height, pixels, end - start),
            suffix=[Literal(self.data[end:])],
            encoder=encoder(),
        )


def split(data: bytes, max_megapixels: float) -> TiffSplit:
    """See ``formats.split``."""
    structure = tiff_parse.parse(data)
    pillow.check_dimensions(structure.width, structure.height, max_megapixels, "tiff")
    return TiffSplit(data, structure)


def encode_scan(coding: TiffCoding, width: int, height: int, pixels: Pixels, length: int) -> bytes:
    """See ``formats.encode_scan``."""
    image = pillow.as_image(pixels, width, height, coding.mode)
    extra = None
    if coding.extra:
        plane = zlib.decompressobj().decompress(coding.extra, width * height)
        extra = np.frombuffer(plane, np.uint8).reshape(height, width)
    made = [
        (offset, _fitting(coding, image, extra, place, count))
        for place, (offset, count) in zip(_places(coding, width, height), coding.parts, strict=True)
    ]
    pieces = []
    for index, (_, data) in enumerate(sorted(made)):
        pieces.append(data)
        if index < len(coding.between):
            pieces.append(coding.between[index])
    scan = b"".join(pieces)
    if len(scan) != length:
        raise DoesNotFit(f"its strips take {len(scan)} bytes, and there are {length}")
    return scan


def encoder() -> str:
    """What writes the scans: ``pillow 12.1.0, libtiff 4.7.1, zlib 1.3.1``."""
    return f"pillow {PIL.__version__}, libtiff {features.version('libtiff')}, zlib {zlib.ZLIB_RUNTIME_VERSION}"


@dataclass(frozen=True)
class _Place:
    """Of a strip or tile in the picture; right and bottom may lie outside of it."""

    left: int
    top: int
    right: int
    bottom: int
    sample: int | None
    """Of planar pictures: the plane; None: all samples."""


def _places(coding: TiffCoding, width: int, height: int) -> Iterator[_Place]:
    samples = (1 if coding.mode == "L" else 3) + bool(coding.extra)
    for sample in range(samples) if coding.planar else (None,):
        for top in range(0, height, coding.part_height):
            for left in range(0, width, coding.part_width):
                bottom = top + coding.part_height
                yield _Place(
                    left, top, left + coding.part_width, bottom if coding.tiled else min(bottom, height), sample
                )


def _fitting(coding: TiffCoding, image: Image.Image, extra: Pixels | None, place: _Place, count: int) -> bytes:
    """One strip or tile, of ``count`` bytes. Raises DoesNotFit."""
    part = image.crop((place.left, place.top, min(place.right, image.width), min(place.bottom, image.height)))
    least = -1
    for softer in pillow.softened(part):
        for level in _LEVELS if coding.compression in (DEFLATE, OLD_DEFLATE) else _LEVELS[:1]:
            samples = pillow.as_array(softer)
            if extra is not None:
                samples = np.dstack((samples, extra[place.top : place.bottom, place.left : place.right]))
            if place.sample is not None:
                samples = samples[:, :, place.sample : place.sample + 1]
            beyond = (place.bottom - place.top - samples.shape[0], place.right - place.left - samples.shape[1])
            data = _compressed(coding, np.pad(samples, ((0, beyond[0]), (0, beyond[1]), (0, 0)), mode="edge"), level)
            if len(data) <= count:
                return data + bytes(count - len(data))
            least = len(data)
        if coding.compression == NONE:
            break
    what = "tile" if coding.tiled else "strip"
    raise DoesNotFit(f"a {what} of the rebuilt picture takes {least} bytes, and there are {count}")


def _compressed(coding: TiffCoding, samples: Pixels, level: int) -> bytes:
    if coding.predictor:
        samples = np.diff(samples, axis=1, prepend=np.zeros_like(samples[:, :1]))
    rows = np.ascontiguousarray(samples).reshape(samples.shape[0], -1)
    if coding.compression == NONE:
        return rows.tobytes()
    if coding.compression != LZW:
        return zlib.compress(rows.tobytes(), level)
    out = io.BytesIO()
    Image.fromarray(rows).save(out, "TIFF", compression="tiff_lzw", strip_size=rows.size)
    structure = tiff_parse.parse(out.getvalue())
    offset, length = structure.parts[0]
    assert len(structure.parts) == 1
    return out.getvalue()[offset : offset + length]
