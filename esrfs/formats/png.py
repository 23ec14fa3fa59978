"""PNG views: the original's chunks, our pixels, and fill, in exactly the original's number of bytes.

A view, byte for byte::

    signature and the chunks before IDAT   verbatim
    esRF    fill: the note (a reference to the blob, and what ``view.Note`` says) and zeros, in chunks of 1 MiB or less;
            private, ancillary, not safe to copy (an editor drops them)
    IDAT    the header of one chunk, whose length is pinned: programs that list chunks, or look for the first pixels,
            need no network
    scan    that chunk's data, a zlib stream with as many empty deflate blocks at its beginning as make its length the
            pinned one, and its checksum
    esRF    fill; with the note if there was no room for it before
    the chunks after IDAT, IEND, and all that follows, verbatim and at their offset

Pictures of few colours (a palette, or gray of 2 or 4 bits) keep them: each pixel becomes one of them, with error
diffusion, or without where the view is too long with it. What is transparent stays exact: the alpha channel, the pixels
of a transparent colour (tRNS), those of palette entries that are not opaque.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass

import msgspec
import numpy as np
import PIL
from PIL import Image, features

from esrfs.blob.recipe import Literal, PngCoding, Run, Span
from esrfs.formats import png_parse
from esrfs.formats.colours import numbered
from esrfs.formats.pixels import DECODE_ERRORS, as_array, as_image, bands, softened
from esrfs.formats.png_parse import CHUNK_BYTES, SIGNATURE, Pass, Structure, broken, chunk_bytes, chunks_of, passes
from esrfs.formats.view import (
    TAIL_BYTES,
    DoesNotFit,
    FittedView,
    Note,
    Pixels,
    front_fill,
    joined,
    no_note,
    noted,
)

LEVELS = (3, 6, 9)
"""zlib levels that are tried in this order until the view fits: its size is given, so the fastest is the best."""
_QUICK_MEGAPIXELS = {3: math.inf, 6: 64.0, 9: 8.0}
"""Up to which each is tried: readers wait for it. A megapixel takes 0.2, 0.4 and 2 seconds, noise 8 by the last."""

_FILL = b"esRF"
_FILL_DATA = 1 << 20
_CHUNK_HEADER, _CHUNK_CHECKSUM = 8, 4
_LONGEST = (1 << 31) - 1
"""Bytes of data in one chunk."""
_FIVE, _SIX = b"\x00\x00\x00\xff\xff", b"\x02\x00\x00\x00\xff\xff"
"""Deflate blocks that inflate to nothing, of so many bytes: a stored one, and a stored one after one of fixed codes."""
_SLACK = 64
"""Bytes that the stream may grow at least, where there is room, on other hardware."""


@dataclass(frozen=True)
class PngSplit:
    """A PNG file taken apart; see ``view.Split``."""

    data: bytes
    structure: Structure
    kind: str = "png"

    @property
    def width(self) -> int:
        return self.structure.width

    @property
    def height(self) -> int:
        return self.structure.height

    @property
    def lossless(self) -> bool:
        return not self.structure.colours and not self.structure.key

    @property
    def bytes_per_pixel(self) -> int:
        return 17 + 6 * self.structure.interlaced + 8 * (self.structure.mode in ("LA", "RGBA"))

    def pixels(self) -> Pixels:
        structure = self.structure
        if structure.colours:
            channels = {"L": [0], "LA": [0, 3], "RGB": [0, 1, 2], "RGBA": [0, 1, 2, 3]}[structure.mode]
            return np.ascontiguousarray(structure.colours.pixels[:, channels])[self.numbers()]
        pixels = self._samples()
        if not structure.key:
            return pixels
        alpha = np.where((pixels == np.frombuffer(structure.key, np.uint8)).all(axis=2), 0, 255).astype(np.uint8)
        return np.dstack((pixels, alpha))

    def numbers(self) -> Pixels:
        """Height × width: each pixel's number in ``colours``. Raises Unsupported (BROKEN)."""
        assert self.structure.colours
        numbers = self._samples(palette=True)[:, :, 0]
        if numbers.max() >= len(self.structure.colours.pixels):
            raise broken("it uses colours that its palette does not have")
        return numbers

    def _samples(self, palette: bool = False) -> Pixels:
        header = self.structure.header
        chunks = [(b"IHDR", header), (b"IDAT", self.structure.stream), (b"IEND", b"")]
        if palette:
            chunks[:1] = [(b"IHDR", header[:9] + b"\3" + header[10:]), (b"PLTE", bytes(3 << self.structure.bits))]
        return _decoded(SIGNATURE + b"".join(chunk_bytes(*chunk) for chunk in chunks))

    def fit(self, pixels: Pixels, note: Note = no_note) -> FittedView:
        return _fit(self, pixels, note)


def split(data: bytes, max_megapixels: float) -> PngSplit:
    """See ``formats.split``."""
    return PngSplit(data, png_parse.parse(data, max_megapixels))


def encode_scan(coding: PngCoding, width: int, height: int, pixels: Pixels, length: int) -> bytes:
    """See ``formats.encode_scan``."""
    exact = _exact(coding, width, height)
    base = as_image(pixels, width, height, _colour_mode(coding.mode))
    for image in softened(base):
        stream = _stream(coding, image, exact)
        rest = length - _CHUNK_CHECKSUM - len(stream)
        if _can_pad(rest):
            return _padded(stream, rest)
    raise DoesNotFit(f"the rebuilt picture needs {len(stream) + _CHUNK_CHECKSUM} bytes, and there are {length}")


def encoder() -> str:
    """What writes the scans: ``pillow 12.1.0, zlib-ng 2.2.5``."""
    zlib_ng = features.version("zlib_ng")
    return f"pillow {PIL.__version__}, {f'zlib-ng {zlib_ng}' if zlib_ng else 'zlib ' + str(features.version('zlib'))}"


def _fit(split: PngSplit, pixels: Pixels, note: Note) -> FittedView:
    base = as_image(pixels, split.width, split.height, _colour_mode(split.structure.mode))
    free = -1
    first = _coding(split)
    exact = _exact(first, split.width, split.height)
    for dither in (True, False) if split.structure.colours else (False,):
        for level in LEVELS:
            if split.width * split.height > _QUICK_MEGAPIXELS[level] * 1e6:
                break
            coding = msgspec.structs.replace(first, compress_level=level, dither=dither)
            stream = _stream(coding, base, exact)
            free = split.structure.scan_end - split.structure.scan_start - CHUNK_BYTES - len(stream)
            if _can_pad(free) and split.structure.scan_end - split.structure.scan_start < _LONGEST:
                return _lay_out(split, coding, stream, free, note)
    if free > 0:
        raise DoesNotFit(f"{free} bytes are left, which no fill takes")
    raise DoesNotFit(f"the rebuilt picture is {-free} bytes too long for the original's size")


def _coding(split: PngSplit) -> PngCoding:
    coding = PngCoding(
        mode=split.structure.mode,
        compress_level=LEVELS[0],
        bits=split.structure.bits,
        interlaced=split.structure.interlaced,
        colours=split.structure.colours.pixels.tobytes() if split.structure.colours else b"",
        key=split.structure.key,
    )
    if split.structure.mode in ("L", "RGB"):
        return coding
    alpha = split.pixels()[:, :, -1]
    exact = alpha.tobytes()
    if split.structure.colours:
        exact += split.numbers()[alpha < 255].tobytes()
    return msgspec.structs.replace(coding, alpha=zlib.compress(exact, 9))


def _lay_out(split: PngSplit, coding: PngCoding, stream: bytes, free: int, note: Note) -> FittedView:
    slack = min(free, max(_SLACK, len(stream) // 64))
    if free - slack < CHUNK_BYTES:
        slack = free
    tail = min(free - slack, TAIL_BYTES)
    front = front_fill(split.structure.scan_start + _CHUNK_HEADER, free - slack - tail, CHUNK_BYTES, free)
    tail = free - slack - front
    header = struct.pack(">I", len(stream) + slack) + b"IDAT"
    scan = _padded(stream, slack)
    wanted = note(coding, scan)
    in_front = noted(wanted, _fill_room(front))
    behind = b"" if in_front else noted(wanted, _fill_room(tail))
    return FittedView(
        coding=coding,
        prefix=joined([Literal(split.data[: split.structure.scan_start]), *_fill(front, in_front), Literal(header)]),
        scan=scan,
        suffix=joined([*_fill(tail, behind), Literal(split.data[split.structure.scan_end :])]),
        encoder=encoder(),
    )


def _fill_room(count: int) -> int:
    """Bytes of data in ``count`` bytes of fill."""
    return count - -(-count // (CHUNK_BYTES + _FILL_DATA)) * CHUNK_BYTES


def _fill(count: int, note: bytes) -> list[Span]:
    """``count`` bytes of esRF chunks; 0, or at least 12."""
    spans: list[Span] = []
    while count:
        size = min(count, CHUNK_BYTES + _FILL_DATA)
        if 0 < count - size < CHUNK_BYTES:
            size -= CHUNK_BYTES
        room = size - CHUNK_BYTES
        said, note = note[:room], note[room:]
        zeros = room - len(said)
        checksum = zlib.crc32(b"".join((_FILL, said, bytes(zeros))))
        head, end = struct.pack(">I", room) + _FILL + said, struct.pack(">I", checksum)
        spans += [Literal(head), Run(0, zeros), Literal(end)]
        count -= size
    return spans


def _can_pad(count: int) -> bool:
    """Whether a stream can be made longer by ``count`` bytes: by 0, 5, 6, 10, 11, 12, and so on; all from 20 on."""
    return count >= 0 and count >= count % 5 * len(_SIX)


def _padded(stream: bytes, count: int) -> bytes:
    """A chunk's data, ``count`` bytes longer than ``stream``, and its checksum."""
    sixes = count % 5
    data = stream[:2] + _SIX * sixes + _FIVE * ((count - sixes * len(_SIX)) // len(_FIVE)) + stream[2:]
    return data + struct.pack(">I", zlib.crc32(data, zlib.crc32(b"IDAT")))


def _stream(coding: PngCoding, image: Image.Image, exact: Pixels | None) -> bytes:
    """The pixels as a zlib stream; ``exact``: see ``_exact``."""
    if coding.colours:
        image = _in_colours(coding, image, exact)
    elif coding.key:
        assert exact is not None
        image = _with_key(coding, image, exact)
    elif exact is not None:
        image = image.copy()
        image.putalpha(Image.fromarray(exact))
    if not coding.interlaced:
        return _compressed(coding, image)
    compressor = zlib.compressobj(coding.compress_level)
    pieces = []
    for part in passes(image.width, image.height, True):
        fresh = _pass_of(image, part)
        if image.mode == "P":
            fresh.putpalette(bytes(3 << coding.bits))
        pieces.append(compressor.compress(zlib.decompress(_compressed(coding, fresh))))
    return b"".join((*pieces, compressor.flush()))


def _pass_of(image: Image.Image, part: Pass) -> Image.Image:
    """The pixels of one pass."""
    pixels = np.empty((part.height, part.width, len(image.getbands())), dtype=np.uint8)
    for top, rows in bands(image):  # of a multiple of 8 rows
        first = -(-(top - part.top) // part.down) if top > part.top else 0
        mine = rows[part.top + first * part.down - top :: part.down, part.left :: part.across]
        pixels[first : first + len(mine)] = mine
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def _compressed(coding: PngCoding, image: Image.Image) -> bytes:
    options = {"bits": coding.bits} if image.mode == "P" else {}
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=coding.compress_level, **options)
    return b"".join(chunk.data for chunk in chunks_of(out.getvalue()) if chunk.kind == b"IDAT")


def _exact(coding: PngCoding, width: int, height: int) -> Pixels | None:
    """The alpha plane, height × width; of a picture with ``colours`` height × width × 2: that, and the numbers of the
    pixels that are not opaque."""
    if coding.mode in ("L", "RGB"):
        return None
    plain = np.frombuffer(zlib.decompressobj().decompress(coding.alpha, 2 * width * height), np.uint8)
    alpha = plain[: width * height].reshape(height, width)
    if not coding.colours:
        return alpha
    numbers = np.zeros((height, width), np.uint8)
    numbers[alpha < 255] = plain[width * height :]
    return np.dstack((alpha, numbers))


def _in_colours(coding: PngCoding, image: Image.Image, exact: Pixels | None) -> Image.Image:
    """An image of mode P whose pixels are numbers of ``coding.colours``."""
    numbers = numbered(image, np.frombuffer(coding.colours, np.uint8).reshape(-1, 4), coding.dither)
    if exact is not None:
        numbers = np.where(exact[:, :, 0] < 255, exact[:, :, 1], numbers)
    result = Image.fromarray(numbers)
    result.putpalette(bytes(3 << coding.bits))  # only their number counts
    return result


def _with_key(coding: PngCoding, image: Image.Image, alpha: Pixels) -> Image.Image:
    """The transparent colour where it was, and nowhere else."""
    pixels = as_array(image)
    key = np.frombuffer(coding.key, np.uint8)
    same = (pixels == key).all(axis=2)
    pixels[same, 0] = key[0] + 1 if key[0] < 255 else 254
    pixels[alpha == 0] = key
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def _colour_mode(mode: str) -> str:
    return "L" if mode in ("L", "LA") else "RGB"


def _decoded(data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return as_array(image)
    except DECODE_ERRORS as error:
        raise broken(f"its pixels can't be decoded ({error})") from error
