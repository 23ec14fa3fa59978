"""TIFF views: the original's bytes, with other pixels in its strips or tiles, each at its offset and of its length.

So no offset in the file changes, and exiftool prints the same. A view, byte for byte::

    all before the first strip or tile              verbatim
    scan    strips or tiles in the file's order; what lies between them is verbatim. Each is compressed as the
            original's is, then zeros up to its length, which decoders don't read (of JPEG: ``tiff_jpeg``). One that
            does not fit is softened, just enough.
    all after the last strip or tile                verbatim: often the directory with all metadata

There is no fill, and so no room for a note.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal as OneOf

import msgspec
import numpy as np
from PIL import Image, features

from esrfs.blob.recipe import JpegCoding, Literal, TiffCoding, TiffStream
from esrfs.compaction.outcome import Reason
from esrfs.formats import jpeg, tiff_jpeg, tiff_parse
from esrfs.formats import pixels as pillow
from esrfs.formats.tiff_parse import DEFLATE, JPEG, LZW, NONE, OLD_DEFLATE, Structure
from esrfs.formats.view import DoesNotFit, FittedView, Note, Pixels, Unsupported, no_note

_QUICK_MEGAPIXELS: dict[OneOf[3, 6, 9], float] = {3: math.inf, 6: 32.0, 9: 2.0}
"""Up to which each of zlib's levels is tried, the fastest first: readers wait for it. A megapixel takes up to 0.1, 0.5
and 8 seconds, and that again for each softer version that is tried."""


@dataclass(frozen=True)
class TiffSplit:
    """A TIFF file taken apart; see ``view.Split``."""

    data: bytes
    structure: Structure
    streams: list[TiffStream]
    """Of JPEG, as in ``TiffCoding``."""
    stream_of: list[int]
    kind: str = "tiff"
    lossless: bool = False
    """A strip may have been softened."""

    @property
    def width(self) -> int:
        return self.structure.width

    @property
    def height(self) -> int:
        return self.structure.height

    @property
    def bytes_per_pixel(self) -> int:
        structure = self.structure
        largest = structure.part_width * structure.part_height / (structure.width * structure.height)
        # of a JPEG with Huffman tables of its own libjpeg holds all coefficients
        of_parts = round(20 * min(1.0, largest)) if structure.compression == JPEG else 0
        return (12 if structure.compression == NONE else 18) + of_parts + 4 * (structure.samples in (2, 4))

    def pixels(self) -> Pixels:
        structure = self.structure
        if structure.compression == JPEG:
            return self._of_jpegs()
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

    def _of_jpegs(self) -> Pixels:
        structure = self.structure
        pixels = np.empty((structure.height, structure.width, structure.samples), dtype=np.uint8)
        places = _places(_layout(structure), structure.width, structure.height)
        for place, part in zip(places, tiff_jpeg.decoded(self.data, structure), strict=True):
            samples = slice(None) if place.sample is None else slice(place.sample, place.sample + 1)
            where = pixels[place.top : place.bottom, place.left : place.right, samples]
            where[:] = part[: where.shape[0], : where.shape[1]]
        return pixels

    def fit(self, pixels: Pixels, note: Note = no_note) -> FittedView:
        """``note`` is left out: there is no fill."""
        structure = self.structure
        order = sorted(structure.parts)
        start, end = order[0][0], sum(order[-1])
        ends = [sum(part) for part in order[:-1]]
        coding = msgspec.structs.replace(
            _layout(structure),
            parts=[(offset - start, length) for offset, length in structure.parts],
            between=[self.data[last:following] for last, (following, _) in zip(ends, order[1:], strict=True)],
            streams=self.streams,
            stream_of=self.stream_of,
        )
        if structure.samples in (2, 4):
            extra = np.ascontiguousarray(self.pixels()[:, :, -1])
            coding = msgspec.structs.replace(coding, extra=zlib.compress(extra.tobytes(), 9))
        coding, scan = self._coded(coding, pixels, end - start)
        return FittedView(
            coding=coding,
            prefix=[Literal(self.data[:start])],
            scan=scan,
            suffix=[Literal(self.data[end:])],
            encoder=encoder(),
        )

    def _coded(self, coding: TiffCoding, pixels: Pixels, length: int) -> tuple[TiffCoding, bytes]:
        """Of JPEG: with the standard Huffman tables if all fits by them as it is; else softened where it has to be,
        with other tables if that takes less of it."""
        if coding.compression != JPEG:
            return coding, encode_scan(coding, self.width, self.height, pixels, length)
        if not tiff_jpeg.has_standard_tables(self.structure):
            coding = msgspec.structs.replace(coding, own_tables=True)
            return coding, encode_scan(coding, self.width, self.height, pixels, length)
        with contextlib.suppress(DoesNotFit):
            return coding, _scan(coding, self.width, self.height, pixels, length, softenings=1)
        with contextlib.suppress(DoesNotFit):
            better = msgspec.structs.replace(coding, own_tables=True)
            return better, encode_scan(better, self.width, self.height, pixels, length)
        return coding, encode_scan(coding, self.width, self.height, pixels, length)


def recoded(split: TiffSplit, pixels: Pixels) -> Pixels:
    """See ``formats.recoded``."""
    if not split.streams:
        return pixels
    planes = len(split.streams[0].quantisation) < pixels.shape[2]
    coding = JpegCoding(
        mode="L" if planes or split.structure.samples == 1 else "RGB",
        subsampling=split.streams[0].subsampling,
        quantisation=split.streams[0].quantisation,
    )
    if planes:
        return np.dstack([jpeg.recoded(coding, pixels[:, :, sample]) for sample in range(pixels.shape[2])])
    return jpeg.recoded(coding, pixels, rgb=not split.structure.ycbcr)


def _layout(structure: Structure) -> TiffCoding:
    """What tells where strips or tiles are in the picture; where they are in the file is left out."""
    return TiffCoding(
        mode="L" if structure.samples < 3 else "RGB",
        compression=structure.compression,
        predictor=structure.predictor,
        planar=structure.planar,
        part_width=structure.part_width,
        part_height=structure.part_height,
        tiled=structure.tiled,
        parts=[],
        between=[],
        ycbcr=structure.ycbcr,
        levels=_levels(structure),
    )


def _levels(structure: Structure) -> tuple[OneOf[3, 6, 9], ...]:
    megapixels = structure.width * structure.height / 1e6
    return tuple(level for level, most in _QUICK_MEGAPIXELS.items() if megapixels <= most)


def split(data: bytes, max_megapixels: float) -> TiffSplit:
    """See ``formats.split``."""
    structure = tiff_parse.parse(data)
    pillow.check_dimensions(structure.width, structure.height, max_megapixels, "tiff")
    streams, stream_of = tiff_jpeg.streams(data, structure) if structure.compression == JPEG else ([], [])
    return TiffSplit(data, structure, streams, stream_of)


def encode_scan(coding: TiffCoding, width: int, height: int, pixels: Pixels, length: int) -> bytes:
    """See ``formats.encode_scan``."""
    return _scan(coding, width, height, pixels, length)


def _scan(  # noqa: PLR0917
    coding: TiffCoding, width: int, height: int, pixels: Pixels, length: int, softenings: int | None = None
) -> bytes:
    """``softenings``: how many of them are tried, the picture as it is counted; None: all. Raises DoesNotFit."""
    image = pillow.as_image_for_jpeg(pixels, width, height, coding.mode)  # without a copy; parts are made RGB
    extra = None
    if coding.extra:
        plane = zlib.decompressobj().decompress(coding.extra, width * height)
        extra = np.frombuffer(plane, np.uint8).reshape(height, width)
    made = []
    for index, (place, (offset, count)) in enumerate(zip(_places(coding, width, height), coding.parts, strict=True)):
        stream = coding.streams[coding.stream_of[index]] if coding.streams else None
        made.append((offset, _fitting(coding, image, extra, place, count, stream, softenings)))
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
    """What writes the scans: ``pillow 12.1.0, libjpeg-turbo 3.1.0, libtiff 4.7.1, zlib 1.3.1``."""
    libraries = f"libtiff {features.version('libtiff')}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
    return f"{jpeg.encoder()}, {libraries}"


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


def _fitting(  # noqa: PLR0917
    coding: TiffCoding,
    image: Image.Image,
    extra: Pixels | None,
    place: _Place,
    count: int,
    stream: TiffStream | None,
    softenings: int | None,
) -> bytes:
    """One strip or tile, of ``count`` bytes. Raises DoesNotFit."""
    part = image.crop((place.left, place.top, min(place.right, image.width), min(place.bottom, image.height)))
    part = part if part.mode == coding.mode else part.convert(coding.mode)
    least = -1
    for softer in itertools.islice(pillow.softened(part), softenings):
        for level in coding.levels if coding.compression in (DEFLATE, OLD_DEFLATE) else (0,):
            samples = pillow.as_array(softer)
            if extra is not None:
                samples = np.dstack((samples, extra[place.top : place.bottom, place.left : place.right]))
            if place.sample is not None:
                samples = samples[:, :, place.sample : place.sample + 1]
            beyond = (place.bottom - place.top - samples.shape[0], place.right - place.left - samples.shape[1])
            if any(beyond):
                samples = np.pad(samples, ((0, beyond[0]), (0, beyond[1]), (0, 0)), mode="edge")
            if stream is None:
                data, tail = _compressed(coding, samples, level), b""
            else:
                data = tiff_jpeg.encoded(stream, samples, ycbcr=coding.ycbcr, own_tables=coding.own_tables)
                tail = stream.tail
            if len(data) <= count:
                fill = (b"\xff" if stream else b"\0") * (count - len(data))
                return b"".join((data[: len(data) - len(tail)], fill, tail))
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
