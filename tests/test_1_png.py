"""PNG: what is refused and why, and where the bytes of a view lie."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from esrfs import formats
from esrfs.blob import recipe
from esrfs.compaction.outcome import Reason
from esrfs.formats import png, png_parse

LIMIT = 50.0
ELSEWHERE = b'<rdf:Description dcterms:provenance="https://example.org/manifests/1"/>'
"""XMP that says where Content Credentials are kept."""
MODES = ["L", "LA", "RGB", "RGBA"]


def picture(mode: str = "RGB", width: int = 200, height: int = 150) -> Image.Image:
    random = np.random.default_rng(3)
    channels = len(mode)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([(x + 2 * y) * 255 / (width + 2 * height)] * channels, axis=2)
    pixels = np.clip(pixels + random.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def png_bytes(image: Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, "PNG", **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(data: bytes, kind: bytes, payload: bytes, before: bytes = b"IDAT") -> bytes:
    offset = data.index(before) - 4
    return data[:offset] + chunk(kind, payload) + data[offset:]


def softer(image: Image.Image) -> formats.Pixels:
    return np.asarray(image.convert("RGB" if "RGB" in image.mode else "L").filter(ImageFilter.GaussianBlur(1)))


@pytest.mark.parametrize("mode", MODES)
def test_view_has_the_originals_size_chunks_and_alpha(mode: str) -> None:
    image = picture(mode)
    info = PngInfo()
    info.add_text("Title", "a title")
    original = with_chunk(png_bytes(image, pnginfo=info), b"tIME", bytes(7), before=b"IEND") + b"trailing"
    split = formats.split(original, LIMIT)
    assert np.array_equal(split.pixels().squeeze(), np.asarray(image))
    view = formats.fit_view(split, softer(image))
    data = view.expand()
    assert len(data) == len(original)
    first, last = original.index(b"IDAT") - 4, original.index(b"tIME") - 4
    assert data.startswith(original[:first])
    assert data[last:] == original[last:]
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.text["Title"] == "a title"  # type: ignore[attr-defined]
        assert opened.mode == mode
        if mode in ("LA", "RGBA"):
            assert np.array_equal(np.asarray(opened)[:, :, -1], np.asarray(image)[:, :, -1])
    again = formats.encode_scan(view.coding, split.width, split.height, softer(image), len(view.scan))
    assert again == view.scan


def test_scan_starts_at_a_round_offset_and_the_tail_is_fill() -> None:
    image = picture("RGB", 500, 400)
    original = png_bytes(image)
    view = formats.fit_view(formats.split(original, LIMIT), np.asarray(image) // 8 * 8)
    assert recipe.length(view.prefix) % 65536 == 0
    assert recipe.length(view.suffix) > 8192
    assert view.expand().count(b"esRF") == 2
    # Who lists the chunks needs no pixels: one IDAT, its header before the scan, and its end is where the scan ends.
    header = recipe.expand(view.prefix)[-8:]
    assert header == struct.pack(">I", len(view.scan) - 4) + b"IDAT"


@pytest.mark.parametrize("count", [0, 5, 6, 10, 11, 12, *range(15, 19), *range(20, 60), 100_000])
def test_a_stream_is_made_longer_and_still_inflates(count: int) -> None:
    pixels = bytes(range(256)) * 10
    stream = zlib.compress(pixels)
    data = png._padded(stream, count)[:-4]
    assert len(data) == len(stream) + count
    assert zlib.decompress(data) == pixels
    assert [count for count in range(30) if not png._can_pad(count)] == [1, 2, 3, 4, 7, 8, 9, 13, 14, 19]


def test_a_reconstruction_that_needs_more_is_softened_into_the_same_length() -> None:
    image = picture()
    split = formats.split(png_bytes(image), LIMIT)
    view = formats.fit_view(split, softer(image))
    scan = formats.encode_scan(view.coding, split.width, split.height, np.asarray(image), len(view.scan))
    assert len(scan) == len(view.scan)
    with pytest.raises(formats.DoesNotFit):
        formats.encode_scan(view.coding, split.width, split.height, np.asarray(image), 100)


@pytest.mark.parametrize("count", [0, 12, 13, 1 << 20, *range((1 << 20) + 8, (1 << 20) + 30), 5 << 20])
def test_fill_is_exact(count: int) -> None:
    data = recipe.expand(png._fill(count, b""))
    assert len(data) == count
    chunks = png_parse.chunks_of(b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND"))
    assert all(part.kind == b"esRF" and not any(part.data) for part in chunks[:-1])


def test_pixels_of_another_shape_are_an_error() -> None:
    split = formats.split(png_bytes(), LIMIT)
    with pytest.raises(ValueError, match="expected uint8"):
        formats.fit_view(split, np.zeros((10, 10, 3), np.uint8))


def interlaced(data: bytes) -> bytes:
    """A PNG with the same pixels, written in the seven passes of Adam7."""
    parts = png_parse.chunks_of(data)
    width, height, bits, colour = struct.unpack(">IIBB", parts[0].data[:10])
    with Image.open(io.BytesIO(data)) as image:
        samples = np.asarray(image) if bits == 8 else np.asarray(image.convert("L")) // 17
    rows = []
    for left, top, across, down in png_parse._ADAM7:
        for row in samples[top::down, left::across]:
            if row.size and bits == 4:
                even = np.append(row, 0) if len(row) % 2 else row
                row = (even[::2] << 4 | even[1::2]).astype(np.uint8)  # noqa: PLW2901
            if row.size:
                rows.append(b"\0" + row.tobytes())
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 1))
    others = b"".join(chunk(part.kind, part.data) for part in parts[1:] if part.kind not in (b"IDAT", b"IEND"))
    return data[:8] + header + others + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND")


def gray_of_4_bits(image: Image.Image) -> bytes:
    levels = (np.asarray(image.convert("L")) // 16).astype(np.uint8)
    levels = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    rows = b"".join(b"\0" + (row[::2] << 4 | row[1::2]).astype(np.uint8).tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", *image.size, 4, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def transparent_corner(image: Image.Image) -> Image.Image:
    """With black in a corner, to be made transparent."""
    image.paste(0, (0, 0, 60, 50))
    return image


def variants() -> Iterator[tuple[str, bytes]]:
    yield "palette", png_bytes(picture().quantize(200), compress_level=1)
    yield "palette of 4 bits", png_bytes(picture().quantize(16), bits=4, compress_level=0)
    yield "palette of 2 bits", png_bytes(picture().quantize(4), bits=2, compress_level=0)
    yield "gray palette", png_bytes(picture("L").convert("P"), compress_level=1)
    yield "transparent palette", png_bytes(picture().quantize(200), transparency=bytes(range(100)), compress_level=1)
    yield "gray of 4 bits", gray_of_4_bits(picture("L"))
    yield "transparent gray of 4 bits", with_chunk(gray_of_4_bits(picture("L")), b"tRNS", b"\0\5")
    yield "transparent colour", png_bytes(transparent_corner(picture()), transparency=(0, 0, 0))
    yield "transparent gray", png_bytes(transparent_corner(picture("L")), transparency=0)
    for mode in MODES:
        yield f"interlaced {mode}", interlaced(png_bytes(picture(mode)))
    yield "interlaced of odd size", interlaced(png_bytes(picture("RGB", 61, 43)))
    yield "interlaced, narrow", interlaced(png_bytes(picture("RGB", 3, 200)))
    yield "interlaced gray of 4 bits", interlaced(gray_of_4_bits(picture("L", 70, 50)))


@pytest.mark.parametrize(("name", "original"), [pytest.param(*case, id=case[0]) for case in variants()])
def test_colours_depth_interlacing_and_transparency_stay(name: str, original: bytes, tmp_path: Path) -> None:
    split = formats.split(original, LIMIT)
    pixels = split.pixels()
    with Image.open(io.BytesIO(original)) as image:
        expected = np.asarray(image.convert("RGBA"))
    if name != "transparent gray of 4 bits":  # Pillow looks for its tRNS among samples of 8 bits
        assert np.array_equal(expected, np.asarray(rgba(pixels)))
    colour = pixels[:, :, :1] if pixels.shape[2] < 3 else pixels[:, :, :3]
    rebuilt = np.asarray(Image.fromarray(colour.squeeze()).filter(ImageFilter.GaussianBlur(1)))
    view = formats.fit_view(split, rebuilt)
    data = view.expand()
    assert len(data) == len(original)
    assert data[:33] == original[:33]  # the header: size, depth, colour type, interlacing
    after = formats.split(data, LIMIT).pixels()
    assert after.shape == pixels.shape
    if pixels.shape[2] in (2, 4):
        assert np.array_equal(after[:, :, -1], pixels[:, :, -1])
        assert (after[:, :, -1] < 255).any()
    if split.lossless:
        assert np.array_equal(after[:, :, : colour.shape[2]].squeeze(), rebuilt)
    else:
        opaque = after[:, :, -1] == 255 if pixels.shape[2] in (2, 4) else np.full(after.shape[:2], True)
        difference = np.abs(after[:, :, : colour.shape[2]].squeeze()[opaque].astype(int) - rebuilt[opaque])
        assert difference.mean() < (50 if "2 bits" in name else 25)
    assert formats.encode_scan(view.coding, split.width, split.height, rebuilt, len(view.scan)) == view.scan
    if shutil.which("pngcheck"):
        (tmp_path / "view.png").write_bytes(data)
        subprocess.run(["pngcheck", "-q", str(tmp_path / "view.png")], check=True)


@pytest.mark.parametrize(
    ("original", "colour"),
    [
        (lambda: png_bytes(transparent_corner(picture()), compress_level=1), b"\xff\0" * 3),
        (lambda: png_bytes(transparent_corner(picture("L")), compress_level=1), b"\1\0"),
        (lambda: gray_of_4_bits(transparent_corner(picture("L"))), b"\0\x30"),
    ],
    ids=["colour", "gray", "gray of 4 bits"],
)
def test_a_transparent_colour_that_no_pixel_can_have(
    original: Callable[[], bytes], colour: bytes, expect_log: Callable[[str], None]
) -> None:
    """libpng, and so most programs, takes its low bits; Wikipedia had such a picture."""
    expect_log("out-of-range samples")
    data = with_chunk(original(), b"tRNS", colour)
    alpha = imagecodecs.png_decode(data)[..., -1]
    assert 0 < (alpha == 0).mean() < 1
    split = formats.split(data, LIMIT)
    pixels = split.pixels()
    other = np.clip(pixels[:, :, :1] if pixels.shape[2] < 3 else pixels[:, :, :3], 9, 255)
    view = formats.fit_view(split, other).expand()
    assert np.array_equal(imagecodecs.png_decode(view)[..., -1], alpha)
    assert np.array_equal(formats.decode(view, LIMIT)[:, :, 0], formats.split(view, LIMIT).pixels()[:, :, 0])


def rgba(pixels: formats.Pixels) -> Image.Image:
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[pixels.shape[2]]
    return Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels).convert("RGBA")


def test_an_opaque_pixel_of_the_transparent_colour_is_made_another() -> None:
    image = transparent_corner(picture())
    split = formats.split(png_bytes(image, transparency=(0, 0, 0)), LIMIT)
    black = np.zeros((150, 200, 3), np.uint8)
    after = formats.split(formats.fit_view(split, black).expand(), LIMIT).pixels()
    assert np.array_equal(after[:, :, 3], split.pixels()[:, :, 3])


def refused_files() -> Iterator[tuple[str, bytes, Reason]]:
    good = png_bytes()
    header = good.index(b"IHDR")
    body = good.index(b"IDAT")
    length = int.from_bytes(good[body - 4 : body], "big")
    stream = good[body + 4 : body + 4 + length]
    head, tail = good[: body - 4], chunk(b"IEND")
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    broken_palette = png_bytes(picture().quantize(4))
    yield "16 bits", png_bytes(Image.fromarray(np.zeros((9, 9), np.uint16))), Reason.UNSUPPORTED_KIND
    yield "2 colours", png_bytes(picture().convert("1")), Reason.UNSUPPORTED_KIND
    yield (
        "no colour is opaque",
        with_chunk(png_bytes(picture().quantize(4)), b"tRNS", bytes(4)),
        Reason.UNSUPPORTED_KIND,
    )
    start = broken_palette.index(b"PLTE") - 4
    yield (
        "does not have",
        broken_palette[:start] + chunk(b"PLTE", bytes(6)) + broken_palette[start + 24 :],
        Reason.BROKEN,
    )
    yield "palette is missing", broken_palette[:start] + broken_palette[start + 24 :], Reason.BROKEN
    wrong = chunk(b"IHDR", struct.pack(">IIBBBBB", 200, 150, 4, 2, 0, 0, 0))
    yield "no standard", good[:8] + wrong + good[33:], Reason.BROKEN
    yield "animated", with_chunk(good, b"acTL", bytes(8)), Reason.UNSUPPORTED_KIND
    yield "iDOT", with_chunk(good, b"iDOT", bytes(28)), Reason.UNSUPPORTED_KIND
    yield "critical", with_chunk(good, b"ABCD", b""), Reason.UNSUPPORTED_KIND
    yield "signed", with_chunk(good, b"caBX", b"jumb"), Reason.SIGNED
    yield "a server keeps", with_chunk(good, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + ELSEWHERE), Reason.SIGNED
    yield "checksum", good[: header + 20] + b"!" + good[header + 21 :], Reason.BROKEN
    yield "too early", good[:-12], Reason.BROKEN
    yield "longer than the file", good[: len(good) // 2], Reason.BROKEN
    yield "no pixels", head + tail, Reason.BROKEN
    yield "cut", head + chunk(b"IDAT", stream[: len(stream) // 2]) + tail, Reason.BROKEN
    yield "more than", head + chunk(b"IDAT", zlib.compress(bytes(601 * 151))) + tail, Reason.BROKEN
    yield "more than", head + chunk(b"IDAT", stream + b"more") + tail, Reason.BROKEN
    yield "filter", head + chunk(b"IDAT", zlib.compress(b"\x07" * 601 * 150)) + tail, Reason.BROKEN
    yield "damaged", head + chunk(b"IDAT", b"nonsense") + tail, Reason.BROKEN
    yield "other chunks", head + chunk(b"IDAT", stream[:9]) + chunk(b"tEXt") + chunk(b"IDAT") + tail, Reason.BROKEN
    yield "limit", good[:8] + huge + good[33:], Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("word", "data", "reason"), [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in refused_files()]
)
def test_refusals_say_why(word: str, data: bytes, reason: Reason) -> None:
    with pytest.raises(formats.Unsupported) as caught:
        formats.split(data, LIMIT).pixels()
    assert caught.value.reason is reason
    assert word in caught.value.message
    assert caught.value.kind == "png"


@pytest.mark.skipif(shutil.which("pngcheck") is None, reason="pngcheck is not installed")
@pytest.mark.parametrize("mode", MODES)
def test_pngcheck_accepts_views(tmp_path: Path, mode: str) -> None:
    image = picture(mode)
    view = formats.fit_view(formats.split(png_bytes(image), LIMIT), softer(image))
    path = tmp_path / "view.png"
    path.write_bytes(view.expand())
    subprocess.run(["pngcheck", "-q", str(path)], check=True)


def test_of_a_large_picture_no_level_is_tried_that_readers_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    original = png_bytes()
    tried: list[int] = []

    def stream(coding: recipe.PngCoding, *_: object) -> bytes:
        tried.append(coding.compress_level)
        return bytes(len(original))

    monkeypatch.setattr(png, "_stream", stream)
    for most, levels in (({3: 1.0, 6: 1.0, 9: 1.0}, [3, 6, 9]), ({3: 1.0, 6: 0.02, 9: 0.02}, [3])):
        monkeypatch.setattr(png, "_QUICK_MEGAPIXELS", most)
        tried.clear()
        with pytest.raises(formats.DoesNotFit):
            formats.fit_view(formats.split(original, LIMIT), softer(picture()))
        assert tried == levels
