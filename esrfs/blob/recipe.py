"""The recipe: the record inside a blob that says how to rebuild its view, byte for byte.

This module is the reference for the recipe's format. A recipe is a msgpack map with the field names below (short keys
would save a few dozen bytes and cost every later reader), compressed by the container (``container.py``). Fields may
be added with a default; a field's meaning never changes; a reader that meets a larger ``version`` shows the blob as
the picture it is.

A view is ``prefix + scan + suffix``. Prefix and suffix are written down here (``Literal`` bytes and runs of one
byte), so that everything but the compressed pixels is served without a network. Only the scan needs the engine.
"""

from __future__ import annotations

from typing import Annotated
from typing import Literal as OneOf

import msgspec
from msgspec import Meta

RECIPE_VERSION = 1


class Literal(msgspec.Struct, frozen=True, tag="bytes"):
    """These very bytes."""

    data: bytes


class Run(msgspec.Struct, frozen=True, tag="run"):
    """``count`` times the byte ``value`` (0 to 255): fill."""

    value: int
    count: int


Span = Literal | Run


class JpegCoding(msgspec.Struct, frozen=True, tag="jpeg"):
    """How pixels become the entropy-coded data of a JPEG with the standard Huffman tables (ITU-T T.81, annex K); of a
    progressive one its first scan, the headers and tables of the further scans, and these."""

    mode: OneOf["L", "RGB"]
    subsampling: OneOf["4:4:4", "4:2:2", "4:2:0"]
    quantisation: Annotated[list[Annotated[list[int], Meta(max_length=64)]], Meta(max_length=4)]
    """One table of 64 values (zigzag order, 1 to 255) for each component."""
    progressive: bool = False
    components: bytes = b""
    """The components' numbers, one byte each; set for progressive pictures, whose later scans name them."""
    softened: float = 0.0
    """Radius (Pillow's, in pixels) of the low-pass that the rebuilt picture is given, so that the view fits."""
    coarser: float = 1.0
    """By what the original's quantisation was multiplied, so that the view fits; ``quantisation`` is the product."""


class PngCoding(msgspec.Struct, frozen=True, tag="png"):
    """How pixels become the data of one IDAT chunk."""

    mode: OneOf["L", "LA", "RGB", "RGBA"]
    compress_level: int
    alpha: bytes = b""
    """The alpha plane (height × width bytes), zlib-compressed, exact; empty for modes without alpha. After it, if there
    are ``colours``, the numbers (a byte each) of the pixels whose alpha is below 255, row by row."""
    bits: int = 8
    """Of a sample: 2, 4, 8; other than 8 only with ``colours``."""
    interlaced: bool = False
    """Adam7."""
    colours: bytes = b""
    """Red, green, blue, alpha of each colour that there is: samples are their numbers. Empty: samples are values."""
    dither: bool = False
    """Whether pixels become ``colours`` with error diffusion."""
    key: bytes = b""
    """The colour (a byte for each sample) that is transparent, and so only for pixels whose alpha is 0."""


class WebpCoding(msgspec.Struct, frozen=True, tag="webp"):
    """How pixels become the data of a VP8 or VP8L chunk."""

    mode: OneOf["RGB", "RGBA"]
    """RGBA for lossless pictures with alpha only; a lossy picture's is a chunk of its own."""
    lossless: bool
    quality: int = 75
    """libwebp's, 0 to 100."""
    method: int = 4
    """libwebp's, 0 to 6."""
    alpha: bytes = b""
    """The alpha plane (height × width bytes), zlib-compressed, exact; empty for RGB."""


class TiffStream(msgspec.Struct, frozen=True):
    """What is around the entropy-coded data of a strip or tile that is a JPEG."""

    head: bytes
    """SOI and what follows it up to the scan's header, without Huffman tables and restart interval."""
    sos: bytes
    """The scan's header; Huffman tables are numbered as the standard's (0 luma, 1 chroma; 0 for red, green, blue)."""
    tail: bytes
    """EOI, and what is left of the strip."""
    quantisation: list[list[int]]
    """One table of 64 values (zigzag order, 1 to 255) for each component."""
    subsampling: OneOf["4:4:4", "4:2:2", "4:2:0"]


class TiffCoding(msgspec.Struct, frozen=True, tag="tiff"):
    """How pixels become the strips or tiles of a TIFF."""

    mode: OneOf["L", "RGB"]
    compression: int
    """As TIFF numbers it: 1 none, 5 LZW, 7 JPEG, 8 and 32946 Deflate."""
    predictor: bool
    """Whether samples are stored as differences to those on their left."""
    planar: bool
    """Whether each sample's plane lies for itself."""
    part_width: int
    """Of a strip or tile, in pixels."""
    part_height: int
    tiled: bool
    """Tiles reach over the picture's edge."""
    parts: list[tuple[int, int]]
    """Offset in the scan, and length, of each strip or tile, in TIFF's order: by rows, then by planes."""
    between: list[bytes]
    """What lies between them, in the file's order."""
    extra: bytes = b""
    """The sample after gray or RGB, alpha mostly (height × width bytes), zlib-compressed, exact; empty: none."""
    streams: list[TiffStream] = []
    """Of JPEG: each that there is."""
    stream_of: list[int] = []
    """For each strip or tile the number of its stream."""
    ycbcr: bool = False
    """Of JPEG: whether colours are converted."""
    own_tables: bool = False
    """Of JPEG: whether each strip or tile has the Huffman tables that suit it; else they have none, and the standard
    ones are among the file's tables."""
    levels: tuple[OneOf[3, 6, 9], ...] = (6, 9)
    """Of Deflate: zlib's, tried in this order, for the picture as it is and for each softer version of it."""


class BmpCoding(msgspec.Struct, frozen=True, tag="bmp"):
    """How pixels become the rows of an uncompressed BMP."""

    mode: OneOf["L", "RGB"]
    bits: int
    """Of a pixel: 8, 24 or 32."""
    top_down: bool
    colours: bytes = b""
    """Red, green, blue and 255 of each colour of the palette; empty at 8 bits: numbers are shades of gray."""
    fourth: bytes = b""
    """The fourth bytes of pixels of 32 bits (alpha, or nothing), from the top, zlib-compressed."""


class Verbatim(msgspec.Struct, frozen=True, tag="verbatim"):
    """There is no scan: prefix and suffix are the whole view. So a user's file is kept that is itself a blob of this
    store (somebody copied it from the store into the mount): wrapped, it comes back bit for bit instead of as a
    photograph."""


class JpegXlCoding(msgspec.Struct, frozen=True, tag="jpegxl"):
    """Nothing was lost: the blob's picture is a JPEG XL (ISO/IEC 18181) that holds a JPEG which was transcoded, and
    with it what it takes to write that JPEG again byte for byte (the box ``jbrd``). The transcoded JPEG has no
    metadata; its end is the original's from the first scan to EOI. The scan is cut out of it; ``prefix`` and ``suffix``
    hold the rest of the original, and some of the scans' first and last bytes, so that programs which look at a file's
    head or tail cause no work. The view is the original."""

    behind: int
    """Bytes of the transcoded JPEG that follow the scan, EOI included."""


PictureCoding = JpegCoding | PngCoding | WebpCoding | TiffCoding | BmpCoding
Coding = PictureCoding | Verbatim | JpegXlCoding


class Own(msgspec.Struct, frozen=True):
    """Bytes of the view that are the blob's own picture's; the prefix has a run of zeros in their place."""

    at: int
    """Offset in the view."""
    start: int
    """Offset in the picture."""
    count: int


_LEAST_OWN = 64


class Scores(msgspec.Struct, frozen=True):
    """What the gate measured on the encoded view against the original's pixels."""

    ssimulacra2: float
    """Whole picture; 100 is identical, 70 "high quality"."""
    worst_tile: float
    """SSIMULACRA2 of the worst 256×256 tile."""
    psnr: float
    """dB over all samples; 99 for identical pictures."""
    colour: float = 0.0
    """CIEDE2000 between blocks of 16×16 pixels, on average; 0 for gray, and in the first blobs of format 1."""
    worst_colour: float = 0.0
    """The same, which one block in a thousand exceeds."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    version: int = RECIPE_VERSION
    width: int
    """Of the view, in pixels as stored (EXIF orientation not applied)."""
    height: int
    original_size: int
    """Bytes of the original, and so of the view: st_size for ever."""
    sha256_original: bytes
    sha256_view: bytes
    preset: str
    """The policy's preset that this blob passed: faithful, high, balanced, small; ``lossless`` where the view is the
    original, bit for bit."""
    scale: int
    """1 to 4: the AVIF has ceil(width / scale) × ceil(height / scale) pixels."""
    network: str
    """Name of the network that enlarges, for people; empty at scale 1 without a filter."""
    network_sha256: bytes
    """Of the network's file; the store keeps a copy under ``networks/``. Empty when there is no network."""
    quality: int
    """AVIF quality of the blob's picture (Pillow's scale, 0 to 100)."""
    subsampling: str = "4:4:4"
    """The AVIF's own chroma sampling, for people; 4:0:0 for gray."""
    coding: Coding
    prefix: list[Span]
    scan_length: int
    suffix: list[Span]
    encoder: str
    """Versions that wrote the scan, e.g. ``pillow 12.1.0, libjpeg-turbo 3.1.0``: explains a later difference."""
    scores: Scores
    created_by: str
    """``esrfs 0.1.0``."""
    reference: bytes = b""
    """What the view's fill says of its blob, where there is room (``reference.py``), 32 bytes; empty in the first
    blobs of format 1."""
    note: str = ""
    """For people: why nothing of it may be lost, where that is so though the policy allows it."""
    own: list[Own] = []
    """Where the view carries its blob (``carried.py``); empty once a blob was read (``unfolded``)."""

    @property
    def megapixels(self) -> float:
        return self.width * self.height / 1e6


def kind_of(coding: Coding) -> str:
    """Of a picture's coding: its kind, as ``formats.kinds`` lists it; else the coding's tag."""
    return "jpeg" if isinstance(coding, JpegXlCoding) else str(coding.__struct_config__.tag)


def folded(recipe: Recipe, picture: bytes) -> Recipe:
    """``recipe`` with what its prefix holds of ``picture`` taken out, to be put in again by :func:`unfolded`."""
    spans: list[Span] = []
    own: list[Own] = []
    at = taken = 0
    for span in recipe.prefix:
        rest = span.data if isinstance(span, Literal) else b""
        while len(picture) - taken >= _LEAST_OWN and len(rest) >= _LEAST_OWN:
            start = rest.find(picture[taken : taken + _LEAST_OWN])
            if start < 0:
                break
            count = _common(rest[start:], picture[taken:])
            spans += [Literal(rest[:start]), Run(0, count)] if start else [Run(0, count)]
            own.append(Own(at + start, taken, count))
            at, taken, rest = at + start + count, taken + count, rest[start + count :]
        if rest or not isinstance(span, Literal):
            spans.append(Literal(rest) if isinstance(span, Literal) else span)
            at += length(spans[-1:])
    return msgspec.structs.replace(recipe, prefix=spans, own=own) if own else recipe


def unfolded(recipe: Recipe, picture: bytes) -> Recipe:
    """``recipe`` with the picture's bytes in its prefix. Raises ValueError if it has no place for them."""
    if not recipe.own:
        return recipe
    own = {each.at: each for each in recipe.own}
    spans: list[Span] = []
    at = 0
    for span in recipe.prefix:
        each = own.pop(at, None) if isinstance(span, Run) else None
        data = picture[each.start : each.start + each.count] if each is not None else b""
        at += length([span])
        if each is not None and (len(data) != each.count or not isinstance(span, Run) or span.count != each.count):
            raise ValueError("the recipe's prefix and its picture don't fit together")
        spans.append(span if each is None else Literal(data))
    if own:
        raise ValueError("the recipe's prefix has no place for its picture")
    return msgspec.structs.replace(recipe, prefix=spans, own=[])


def _common(one: bytes, other: bytes) -> int:
    """How many bytes at their beginning are the same."""
    same, differs = 0, min(len(one), len(other)) + 1
    while differs - same > 1:
        middle = (same + differs) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            differs = middle
    return same


def length(spans: list[Span]) -> int:
    """Bytes that ``spans`` stand for."""
    return sum(len(span.data) if isinstance(span, Literal) else span.count for span in spans)


def expand(spans: list[Span]) -> bytes:
    """The bytes that ``spans`` stand for."""
    return b"".join(span.data if isinstance(span, Literal) else bytes([span.value]) * span.count for span in spans)


def encode(recipe: Recipe) -> bytes:
    return msgspec.msgpack.encode(recipe)


_decoder = msgspec.msgpack.Decoder(Recipe)


def decode(data: bytes) -> Recipe:
    """Read a recipe and check what a reader relies on.

    Raises ValueError when ``data`` is no recipe, is of a newer version, or its parts don't add up to ``original_size``.
    """
    try:
        recipe = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a recipe: {error}") from error
    if recipe.version > RECIPE_VERSION:
        raise ValueError(f"recipe version {recipe.version} is newer than this esrfs reads ({RECIPE_VERSION})")
    if length(recipe.prefix) + recipe.scan_length + length(recipe.suffix) != recipe.original_size:
        raise ValueError("the recipe's parts don't add up to the size of its view")
    return recipe
