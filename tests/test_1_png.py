"""PNG: what is refused and why, and where the bytes of a view lie."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from esrfs import formats
from esrfs.blob import recipe
from esrfs.compaction.outcome import Reason
from esrfs.formats import png

LIMIT = 50.0
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
    chunks = png._chunks(b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND"))
    assert all(part.kind == b"esRF" and not any(part.data) for part in chunks[:-1])


def test_pixels_of_another_shape_are_an_error() -> None:
    split = formats.split(png_bytes(), LIMIT)
    with pytest.raises(ValueError, match="expected uint8"):
        formats.fit_view(split, np.zeros((10, 10, 3), np.uint8))


def refused_files() -> Iterator[tuple[str, bytes, Reason]]:
    good = png_bytes()
    header = good.index(b"IHDR")
    body = good.index(b"IDAT")
    length = int.from_bytes(good[body - 4 : body], "big")
    stream = good[body + 4 : body + 4 + length]
    head, tail = good[: body - 4], chunk(b"IEND")
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    interlaced = chunk(b"IHDR", struct.pack(">IIBBBBB", 200, 150, 8, 2, 0, 0, 1))
    yield "palette", png_bytes(picture().convert("P")), Reason.UNSUPPORTED_KIND
    yield "16 bits", png_bytes(Image.fromarray(np.zeros((9, 9), np.uint16))), Reason.UNSUPPORTED_KIND
    yield "1 bit ", png_bytes(picture().convert("1")), Reason.UNSUPPORTED_KIND
    yield "interlaced", good[:8] + interlaced + good[33:], Reason.UNSUPPORTED_KIND
    yield "tRNS", png_bytes(transparency=(1, 2, 3)), Reason.UNSUPPORTED_KIND
    yield "animated", with_chunk(good, b"acTL", bytes(8)), Reason.UNSUPPORTED_KIND
    yield "iDOT", with_chunk(good, b"iDOT", bytes(28)), Reason.UNSUPPORTED_KIND
    yield "critical", with_chunk(good, b"ABCD", b""), Reason.UNSUPPORTED_KIND
    yield "signed", with_chunk(good, b"caBX", b"jumb"), Reason.SIGNED
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
