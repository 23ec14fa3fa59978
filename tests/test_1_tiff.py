"""TIFF: what is refused and why, and that no offset changes."""

from __future__ import annotations

import io
import math
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageFilter

from esrfs import formats
from esrfs.blob.recipe import TiffCoding
from esrfs.compaction.outcome import Reason
from esrfs.formats import tiff, tiff_parse
from tests.test_1_png import picture

LIMIT = 50.0
PREDICTOR, ORIENTATION = 317, 274


def tiff_bytes(image: Image.Image | None = None, compression: str = "raw", **options: Any) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, "TIFF", compression=compression, **options)
    return out.getvalue()


def rebuilt(pixels: formats.Pixels) -> formats.Pixels:
    colours = pixels[:, :, :1] if pixels.shape[2] < 3 else pixels[:, :, :3]
    return np.asarray(Image.fromarray(np.ascontiguousarray(colours).squeeze()).filter(ImageFilter.GaussianBlur(1)))


def check_view(original: bytes, path: Path) -> formats.FittedView:
    split = formats.split(original, LIMIT)
    pixels = split.pixels()
    view = formats.fit_view(split, rebuilt(pixels))
    data = view.expand()
    assert len(data) == len(original)
    before, after = tiff_parse.parse(original), tiff_parse.parse(data)
    assert before == after  # all offsets and lengths, too
    left = sorted(before.parts)
    ends = [0, *(start + length for start, length in left)]
    for end, start in zip(ends, [*(start for start, _ in left), len(data)], strict=True):
        assert data[end:start] == original[end:start]
    again = formats.split(data, LIMIT).pixels()
    colours = 1 if pixels.shape[2] < 3 else 3
    assert np.array_equal(again[:, :, :colours].squeeze(), rebuilt(pixels))
    assert np.array_equal(again[:, :, colours:], pixels[:, :, colours:])
    scan = formats.encode_scan(view.coding, split.width, split.height, rebuilt(pixels), len(view.scan))
    assert scan == view.scan
    if shutil.which("tiffinfo"):
        path.write_bytes(data)
        done = subprocess.run(["tiffinfo", "-D", str(path)], check=True, capture_output=True, text=True)
        assert "rror" not in done.stderr
    return view


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_only_pixels_change(mode: str, compression: str, tmp_path: Path) -> None:
    options = {} if compression == "raw" else {"tiffinfo": {PREDICTOR: 2}}
    original = tiff_bytes(picture(mode), compression, **options)
    check_view(original, tmp_path / "view.tiff")


@pytest.mark.skipif(shutil.which("tiffcp") is None, reason="tiffcp is not installed")
@pytest.mark.parametrize("compression", ["lzw:2", "lzw", "zip:2", "none"])
@pytest.mark.parametrize(
    "layout", ["-p separate", "-t -w 64 -l 48", "-t -w 64 -l 48 -p separate", "-r 7", "-B", "-L -r 1000"]
)
def test_strips_tiles_planes_and_byte_orders(compression: str, layout: str, tmp_path: Path) -> None:
    (tmp_path / "in.tiff").write_bytes(tiff_bytes())
    subprocess.run(["tiffcp", "-c", compression, *layout.split(), "in.tiff", "out.tiff"], cwd=tmp_path, check=True)
    check_view((tmp_path / "out.tiff").read_bytes(), tmp_path / "view.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_those_that_are_stored(orientation: int, tmp_path: Path) -> None:
    """Pillow turns TIFF pixels when it decodes them, as it does for no other kind."""
    original = tiff_bytes(tiffinfo={ORIENTATION: orientation})
    assert formats.split(original, LIMIT).pixels().shape == (150, 200, 3)
    assert np.array_equal(formats.decode(original, LIMIT), np.asarray(picture()))
    data = check_view(original, tmp_path / "view.tiff").expand()
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[ORIENTATION] == orientation


def test_a_strip_that_does_not_fit_is_softened() -> None:
    original = tiff_bytes(picture("L"), "tiff_adobe_deflate", strip_size=200 * 10)
    split = formats.split(original, LIMIT)
    noisy = np.asarray(picture("L")).copy()
    noisy[40:60] = np.random.default_rng(1).integers(0, 256, (20, 200), dtype=np.uint8)
    data = formats.fit_view(split, noisy).expand()
    after = formats.split(data, LIMIT).pixels()[:, :, 0]
    assert np.array_equal(after[:40], noisy[:40])
    assert not np.array_equal(after[40:60], noisy[40:60])
    assert np.array_equal(after[60:], noisy[60:])
    flat = tiff_bytes(Image.new("L", (200, 150)), "tiff_adobe_deflate")
    with pytest.raises(formats.DoesNotFit, match="a strip of the rebuilt picture takes"):
        formats.fit_view(formats.split(flat, LIMIT), noisy)


def test_of_a_large_picture_no_level_is_tried_that_readers_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level is tried again for each softer version, and after two minutes a read fails."""
    original = tiff_bytes(compression="tiff_adobe_deflate")
    split, pixels = formats.split(original, LIMIT), np.asarray(picture())
    tried: list[int] = []

    def compressed(coding: TiffCoding, samples: formats.Pixels, level: int) -> bytes:
        tried.append(level)
        return bytes(len(original))

    monkeypatch.setattr(tiff, "_compressed", compressed)
    for six, nine, levels in ((1.0, 1.0, {3, 6, 9}), (1.0, 0.02, {3, 6}), (0.02, 0.02, {3})):
        monkeypatch.setattr(tiff, "_QUICK_MEGAPIXELS", {3: math.inf, 6: six, 9: nine})
        tried.clear()
        with pytest.raises(formats.DoesNotFit):
            formats.fit_view(split, pixels)
        assert set(tried) == levels
        assert tried == sorted(levels) * (len(tried) // len(levels)), "the fastest first, for each softer version"


def test_views_are_written_by_the_levels_that_their_recipe_tells() -> None:
    original = tiff_bytes(compression="tiff_adobe_deflate")
    split, pixels = formats.split(original, LIMIT), np.asarray(picture())
    view = formats.fit_view(split, rebuilt(pixels))
    assert isinstance(view.coding, TiffCoding)
    assert view.coding.levels == (3, 6, 9)
    older = msgspec.to_builtins(view.coding)
    del older["levels"]
    before = msgspec.convert(older, TiffCoding)
    assert before.levels == (6, 9), "as all were written before recipes told it"
    scans = [
        formats.encode_scan(coding, split.width, split.height, rebuilt(pixels), len(view.scan))
        for coding in (view.coding, before)
    ]
    assert scans[0] == view.scan != scans[1]


def test_a_thumbnail_after_the_picture_stays() -> None:
    out = io.BytesIO()
    small = picture("RGB", 40, 30)
    small.encoderinfo = {"tiffinfo": {254: 1}}
    picture().save(out, "TIFF", save_all=True, append_images=[small], tiffinfo={254: 0})
    split = formats.split(out.getvalue(), LIMIT)
    data = formats.fit_view(split, rebuilt(split.pixels())).expand()
    with Image.open(io.BytesIO(data)) as image:
        image.seek(1)
        assert np.array_equal(np.asarray(image), np.asarray(small))


def with_value(data: bytes, tag: int, value: int) -> bytes:
    """``data`` (little-endian) with another value in an entry of its directory."""
    offset = struct.unpack_from("<I", data, 4)[0]
    for place in range(offset + 2, offset + 2 + 12 * struct.unpack_from("<H", data, offset)[0], 12):
        if struct.unpack_from("<H", data, place)[0] == tag:
            return data[: place + 8] + struct.pack("<I", value) + data[place + 12 :]
    raise AssertionError(tag)


def refused_files() -> Iterator[tuple[str, bytes, Reason]]:
    good = tiff_bytes()
    lzw = tiff_bytes(picture("L"), "tiff_lzw", tiffinfo={254: 0})
    pages = io.BytesIO()
    picture().save(pages, "TIFF", save_all=True, append_images=[picture("L")])
    yield "several pictures", pages.getvalue(), Reason.UNSUPPORTED_KIND
    yield "16 bits", tiff_bytes(Image.fromarray(np.zeros((9, 9), np.uint16))), Reason.UNSUPPORTED_KIND
    yield "1 bit ", tiff_bytes(picture().convert("1")), Reason.UNSUPPORTED_KIND
    yield "CMYK", tiff_bytes(picture().convert("CMYK")), Reason.UNSUPPORTED_KIND
    yield "palette", tiff_bytes(picture().quantize(20)), Reason.UNSUPPORTED_KIND
    yield "PackBits", tiff_bytes(compression="packbits"), Reason.UNSUPPORTED_KIND
    yield "BigTIFF", tiff_bytes(big_tiff=True), Reason.UNSUPPORTED_KIND
    yield "RAW files", with_value(lzw, 254, 1), Reason.UNSUPPORTED_KIND
    yield "RAW file", with_value(good, 262, 32803), Reason.UNSUPPORTED_KIND
    yield "samples a pixel", with_value(good, 277, 5), Reason.UNSUPPORTED_KIND
    yield "strips or tiles where", with_value(good, 278, 10), Reason.BROKEN
    yield "outside", good[:-40000], Reason.BROKEN
    yield "0 pixels", with_value(good, 256, 0), Reason.BROKEN
    yield "too early", good[:9], Reason.BROKEN
    yield "damaged", lzw[:8] + b"\xff" * 4000 + lzw[4008:], Reason.BROKEN
    huge = with_value(with_value(with_value(good, 256, 60000), 257, 60000), 278, 60000)
    yield "limit", huge, Reason.TOO_LARGE
    yield "multiplied", with_value(tiff_bytes(picture("RGBA")), 338, 1), Reason.UNSUPPORTED_KIND


@pytest.mark.parametrize(
    ("word", "data", "reason"), [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in refused_files()]
)
def test_refusals_say_why(word: str, data: bytes, reason: Reason) -> None:
    with pytest.raises(formats.Unsupported) as caught:
        formats.split(data, LIMIT).pixels()
    assert caught.value.reason is reason
    assert word in caught.value.message
    assert caught.value.kind == "tiff"
