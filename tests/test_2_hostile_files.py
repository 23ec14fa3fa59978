"""Hostile files, and what a dying disk leaves of good ones: read or refused in little time and memory, whatever is in
them. Lengths are such that the square of them takes minutes."""

from __future__ import annotations

import io
import random
import re
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from esrfs import formats
from esrfs.blob import carried, container, grid
from esrfs.blob import recipe as recipe_format
from esrfs.compaction import homecoming
from esrfs.formats import jpegxl, png_parse, scan, tiff_parse
from esrfs.formats.view import Unsupported

LIMIT = 10.0


def picture(mode: str, width: int = 80, height: int = 70) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([(x * (k + 1) * 2 + y * 3) % 256 for k in range(len(mode))], axis=2).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if len(mode) == 1 else pixels)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


FILES = [
    saved(picture("RGB"), "JPEG"),
    saved(picture("RGB"), "JPEG", restart_marker_blocks=3),
    saved(picture("L"), "JPEG", progressive=True),
    saved(picture("RGB"), "PNG"),
    saved(picture("RGBA"), "PNG"),
    saved(picture("RGB").quantize(5), "PNG", transparency=2),
    saved(picture("RGB"), "WEBP"),
    saved(picture("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    saved(picture("RGB"), "TIFF"),
    saved(picture("RGBA"), "TIFF", compression="tiff_lzw"),
    saved(picture("L"), "TIFF", compression="tiff_adobe_deflate"),
    saved(picture("RGB"), "BMP"),
    saved(picture("RGBA"), "BMP"),
    saved(picture("L").quantize(20), "BMP"),
]


@contextmanager
def within(seconds: float, mebibytes: float) -> Iterator[None]:
    """Python's own memory and numpy's; tracing makes it several times slower."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        yield
        took, most = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < seconds
    assert most < mebibytes * 2**20


def refused(data: bytes, parse: Callable[[bytes], object] = lambda data: formats.split(data, LIMIT)) -> str:
    with pytest.raises(Unsupported) as error:
        parse(data)
    return error.value.message


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks' checksums are right, as far as there are chunks."""
    parts, offset = [data[:8]], 8
    while offset + 12 <= len(data):
        end = offset + 8 + int.from_bytes(data[offset : offset + 4], "big")
        if end + 4 > len(data):
            break
        parts += [data[offset:end], struct.pack(">I", zlib.crc32(data[offset + 4 : end]))]
        offset = end + 4
    return b"".join((*parts, data[offset:]))


@settings(deadline=None, max_examples=400)
@given(data=st.sampled_from(FILES), seed=st.integers(0, 1 << 32))
def test_files_with_some_bytes_changed(data: bytes, seed: int) -> None:
    """Mostly near the beginning, where lengths and offsets are, and by numbers that are hard on arithmetic."""
    draw = random.Random(seed)
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = int(len(changed) * draw.random() ** draw.choice((1, 3)))
        number = draw.choice((b"\0", b"\x7f", b"\x80", b"\xff", draw.randbytes(1)))
        if draw.random() < 0.7:
            changed[at : at + 1] = number
        elif draw.random() < 0.7:
            changed[at : at + 4] = draw.choice((b"\0\0\0\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        else:
            del changed[at : draw.choice((at + 10, len(changed)))]
    broken = with_checksums(bytes(changed)) if data.startswith(b"\x89PNG") and draw.random() < 0.8 else bytes(changed)
    try:
        split = formats.split(broken, LIMIT)
        assert split.pixels().shape[:2] == (split.height, split.width)
    except Unsupported as error:
        assert error.message
    scan.find(broken)
    if broken.startswith(b"\xff\xd8\xff"):
        try:
            jpegxl.transcode(broken, LIMIT)
        except Unsupported as error:
            assert error.message


def jpeg_with(inside: bytes, before_scan: bytes = b"") -> bytes:
    """A JPEG with ``inside`` in the midst of its scan, and ``before_scan`` after SOI."""
    data = FILES[0]
    middle = len(data) - 100
    return data[:2] + before_scan + data[2:middle] + inside + data[middle:]


@pytest.mark.parametrize("end", [b"\0", b"\xff\xd0"])
def test_a_jpeg_with_a_block_of_ff(end: bytes) -> None:
    """As erased flash reads, and what a program that rescues files puts in the place of what it can't read."""
    data = jpeg_with(b"\x12" + b"\xff" * (1 << 18) + end)
    with within(5, 20):
        scan.find(data)
        formats.split(data, LIMIT) if end == b"\0" else refused(data)
        refused(data, lambda data: jpegxl.transcode(data, LIMIT)) if end != b"\0" else None


def test_a_jpeg_that_ends_in_ff() -> None:
    data = FILES[0][:-100] + b"\xff" * (1 << 18)
    with within(5, 20):
        assert "end-of-image" in refused(data)
        assert "end-of-image" in refused(data, lambda data: jpegxl.transcode(data, LIMIT))
        assert scan.find(data) is None


def test_a_jpeg_with_much_fill_before_a_segment() -> None:
    data = jpeg_with(b"", b"\xff" * (1 << 21))
    with within(5, 40):
        assert formats.split(data, LIMIT).width == 80


def test_a_jpeg_of_very_many_segments() -> None:
    data = jpeg_with(b"", b"\xff\xdb\0\2" * 70_000)
    assert "segments" in refused(data)
    assert "segments" in refused(data, lambda data: jpegxl.transcode(data, LIMIT))
    assert scan.find(data) is None


def test_a_jpeg_of_a_million_restarts() -> None:
    data = jpeg_with(b"\xff\xd0" * 1_000_000)
    with within(15, 3):
        assert "restart markers" in refused(data)


def test_a_jpeg_that_promises_sixty_million_restarts() -> None:
    data = bytearray(jpeg_with(b"", b"\xff\xdd\0\4\0\1"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with within(5, 10):
        refused(bytes(data))


def test_a_png_of_very_many_chunks() -> None:
    data = FILES[3]
    data = data[:33] + struct.pack(">I4sI", 0, b"teSt", zlib.crc32(b"teSt")) * 270_000 + data[33:]
    assert "chunks" in refused(data)
    assert scan.find(data) is None


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("cut", [0, 1, 5, 1 << 20])
def test_a_png_whose_pixels_come_in_several_pieces(level: int, cut: int) -> None:
    """Of noise: they are several mebibytes, of which all must be there, and no more."""
    pixels = np.random.default_rng(1).integers(0, 256, (1000, 2000, 3), np.uint8)
    rows = np.concatenate([np.zeros((1000, 1), np.uint8), pixels.reshape(1000, -1)], axis=1)
    stream = zlib.compress(rows.tobytes(), level)
    header = struct.pack(">IIBBBBB", 2000, 1000, 8, 2, 0, 0, 0)

    def png(stream: bytes) -> bytes:
        chunks = [(b"IHDR", header), (b"IDAT", stream), (b"IEND", b"")]
        return png_parse.SIGNATURE + b"".join(png_parse.chunk_bytes(*chunk) for chunk in chunks)

    if not cut:
        assert np.array_equal(formats.split(png(stream), LIMIT).pixels(), pixels)
        return
    assert "cut, or more" in refused(png(stream[:-cut]))
    assert "cut, or more" in refused(png(stream + bytes(cut)))


@pytest.mark.parametrize("interlace", [0, 1])
def test_a_png_of_one_very_long_row(interlace: int) -> None:
    """200 megapixels of nothing, in 0.8 MB: it is looked at before anybody asks how much memory there is."""
    header = struct.pack(">IIBBBBB", 200_000_000, 1, 8, 6, 0, 0, interlace)
    row = zlib.compressobj(9)
    stream = b"".join([row.compress(b"\0"), *(row.compress(bytes(1 << 22)) for _ in range(190)), row.flush()])
    chunks = [(b"IHDR", header), (b"IDAT", stream), (b"IEND", b"")]
    data = png_parse.SIGNATURE + b"".join(png_parse.chunk_bytes(*chunk) for chunk in chunks)
    with within(20, 40):
        assert "cut, or more" in refused(data, lambda data: formats.split(data, 200))


@given(width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 400), damage=st.integers(0, 5))
def test_a_png_whose_rows_lie_across_pieces(width: int, height: int, size: int, damage: int) -> None:
    """Whole, each way; cut; too long; and with a filter that does not exist in one row."""
    rows = bytearray(np.zeros((height, 1 + width), np.uint8).tobytes())
    if damage == 1:
        rows[(height // 2) * (1 + width)] = 5
    stream = zlib.compress(bytes(rows if damage != 2 else rows[:-1]) + b"\0" * (damage == 3))
    stream += b"\0" * (damage == 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png_parse, "_INFLATED", size)
        try:
            png_parse._check_stream(stream, png_parse.passes(width, height, False), 8)
        except Unsupported as error:
            assert ("filter" in error.message) == (damage == 1)
            assert 1 <= damage <= 4
        else:
            assert damage in (0, 5)


def test_a_webp_of_very_many_chunks() -> None:
    data = FILES[7]
    more = b"teSt\0\0\0\0" * 70_000
    assert "chunks" in refused(data[:4] + struct.pack("<I", len(data) + len(more) - 8) + data[8:] + more)


def tiff(width: int, height: int, entries: dict[int, tuple[int, int, int]], tail: bytes) -> bytes:
    """``entries``: by tag, type, count and value. ``tail`` is at offset 1000."""
    plain = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 262: (3, 1, 1)}
    listed = sorted({**plain, **entries}.items())
    directory = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in listed)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(listed)) + directory + bytes(4)).ljust(1000, b"\0") + tail


@pytest.mark.parametrize(("kind", "size"), [(1, 1), (3, 2), (4, 4)])
def test_a_tiff_of_millions_of_strips(kind: int, size: int) -> None:
    count = (1 << 22) // size
    data = tiff(8, count, {273: (kind, count, 1000), 278: (3, 1, 1), 279: (kind, count, 1000)}, b"\1" * (1 << 22))
    with within(5, 40):
        refused(data)
        assert scan.find(data) is None


def test_a_tiff_of_one_huge_tile() -> None:
    tile = zlib.compress(bytes(1 << 16))
    entries = {
        259: (3, 1, 8),
        322: (4, 1, 1 << 16),
        323: (4, 1, 1 << 16),
        324: (4, 1, 1000),
        325: (4, 1, len(tile)),
    }
    data = tiff(100, 100, entries, tile)
    with within(5, 20):
        assert "larger than its picture" in refused(data)
    assert tiff_parse.parse(tiff(100, 100, {**entries, 322: (4, 1, 256), 323: (4, 1, 256)}, tile)).tiled


def test_a_tiff_whose_tiles_reach_far_beyond_it() -> None:
    """12,800,000 pixels, and 13,421,772,800 in its tiles, each of which is coded as a whole."""
    tile = zlib.compress(bytes(1 << 16))
    count = 200_000 // 4096 + 1
    places = b"".join(struct.pack("<I", 1000 + 8 * count + number * len(tile)) for number in range(count))
    lengths = struct.pack("<I", len(tile)) * count
    entries = {
        259: (3, 1, 8),
        322: (4, 1, 1 << 12),
        323: (4, 1, 1 << 12),
        324: (4, count, 1000),
        325: (4, count, 1000 + 4 * count),
    }
    data = tiff(64, 200_000, entries, places + lengths + tile * count)
    assert "far beyond" in refused(data, tiff_parse.parse)


def test_a_tiff_of_many_strips_with_many_jpeg_tables() -> None:
    """They are read again for each strip."""
    strip = FILES[0]
    count = 10_000
    tables = b"\xff\xd8" + b"\xff\xdb\0\2" * 4000 + b"\xff\xd9"
    places = b"".join(struct.pack("<I", 1000 + 8 * count + number * len(strip)) for number in range(count))
    after = 1000 + 8 * count + count * len(strip)
    entries = {
        258: (3, 1, 8),
        259: (3, 1, 7),
        262: (3, 1, 6),
        273: (4, count, 1000),
        277: (3, 1, 3),
        278: (4, 1, 70),
        279: (4, count, 1000 + 4 * count),
        347: (7, len(tables), after),
    }
    tail = places + struct.pack("<I", len(strip)) * count + strip * count + tables
    with within(10, 100):
        assert "many JPEG tables" in refused(tiff(80, 70 * count, entries, tail), lambda data: formats.split(data, 100))


def test_a_bmp_that_is_cut_in_its_palette_or_its_header() -> None:
    data = FILES[-1]
    for length in (26, 40, 53, 54, 60):
        assert "damaged" in refused(data[:length])
    core = data[:14] + struct.pack("<IHHHH", 12, 80, 70, 1, 8)
    assert "damaged" in refused(core)


def test_a_grid_of_one_cell_again_and_again() -> None:
    cell = saved(picture("RGB", 64, 64), "AVIF", quality=50)
    made = bytearray(grid.assemble([cell] * 2500, 50, 64 * 50, 64 * 50))
    assert (taken := grid.take_apart(bytes(made))) is not None
    assert len(taken.cells) == 2500
    # All cells, each with the bytes of all.
    places = made.index(b"iloc") + 12
    first = int.from_bytes(made[places + 14 + 6 : places + 14 + 10], "big")
    for number in range(1, 2501):
        struct.pack_into(">II", made, places + 14 * number + 6, first, len(made) - first)
    with within(5, 60):
        assert grid.take_apart(bytes(made)) is None


def test_much_that_seems_to_be_carried() -> None:
    part = bytes(32) + b"esrfblob" + b"\x7f\xff\xff\xff"
    with within(5, 30):
        assert carried.find([part + bytes(60)] * 50_000) is None


def test_a_carried_recipe_with_millions_of_lists() -> None:
    fields = {"type": "jpeg", "mode": "L", "subsampling": "4:4:4"}
    many = b"\xdd" + struct.pack(">I", 1 << 22) + b"\x90" * (1 << 22)
    coding = b"\x84" + recipe_format.msgspec.msgpack.encode(fields)[1:] + b"\xacquantisation" + many
    body = b"\x81\xa6coding" + coding
    with within(5, 40):
        assert carried.find([bytes(32) + b"esrfblob" + struct.pack(">I", len(body)) + body]) is None


def test_an_envelope_of_runs_that_are_a_little_too_short() -> None:
    data = (bytes(255) + b"\1" + b"\xff" * 255 + b"\1") * (1 << 16)
    began = time.perf_counter()
    assert homecoming.spans(data) == [recipe_format.Literal(data)]
    assert time.perf_counter() - began < 4


@given(st.lists(st.tuples(st.sampled_from([0, 1, 0xFF]), st.sampled_from([1, 2, 255, 256, 257, 600])), max_size=12))
def test_an_envelope_in_spans_is_the_same(parts: list[tuple[int, int]]) -> None:
    data = b"".join(bytes([value]) * count for value, count in parts)
    found = homecoming.spans(data)
    assert recipe_format.expand(found) == data
    runs = [match.span() for match in re.finditer(rb"\x00{256,}|\xff{256,}", data)]
    assert [span.count for span in found if isinstance(span, recipe_format.Run)] == [end - at for at, end in runs]


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 1 << 32))
def test_blobs_with_some_bytes_changed(seed: int) -> None:
    draw = random.Random(seed)
    changed = bytearray(BLOB)
    for _ in range(draw.choice((1, 2, 5))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    if draw.random() < 0.3:
        del changed[draw.randrange(len(changed)) :]
    with suppress(container.NotABlob, container.BlobDamaged):
        container.unpack(bytes(changed))


def _blob() -> bytes:
    data = FILES[0]
    recipe = recipe_format.Recipe(
        width=80,
        height=70,
        original_size=len(data),
        sha256_original=bytes(32),
        sha256_view=bytes(32),
        preset="high",
        scale=1,
        network="",
        network_sha256=b"",
        quality=50,
        coding=recipe_format.JpegCoding(mode="RGB", subsampling="4:4:4", quantisation=[[1] * 64] * 3),
        prefix=[recipe_format.Literal(data[:100]), recipe_format.Run(0, 50)],
        scan_length=len(data) - 150,
        suffix=[],
        encoder="",
        scores=recipe_format.Scores(70.0, 60.0, 40.0),
        created_by="test",
    )
    return container.pack(saved(picture("RGB"), "AVIF"), recipe_format.encode(recipe), bytes(16), bytes(32))


BLOB = _blob()
