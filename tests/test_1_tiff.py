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
from tests.test_1_png import ELSEWHERE, picture

LIMIT = 50.0
PREDICTOR, ORIENTATION, XMP, C2PA = 317, 274, 700, 52545
CAPTION = b"Grandmother's garden, the summer before she moved to town.\0"


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


def test_xmp_turns_no_pixels() -> None:
    """Where the directory says nothing, Pillow turns them by what XMP says."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    original = tiff_bytes(tiffinfo={XMP: xmp})
    assert np.array_equal(formats.split(original, LIMIT).pixels(), np.asarray(picture()))


def behind_its_pixels(compression: str, reach: int) -> bytes:
    """A TIFF whose caption and XMP directly follow its pixels, and whose only strip is said to be longer by ``reach``
    bytes than it is. (Of the last strip some programs write the length of a whole one; readers don't mind.)"""
    packed = tiff_bytes(compression=compression, strip_size=1 << 20)
    start, length = tiff_parse.parse(packed).parts[0]
    pixels = packed[start : start + length]
    pixels += bytes(len(pixels) % 2)
    numbers = {256: 200, 257: 150, 259: {"raw": 1, "tiff_lzw": 5, "tiff_adobe_deflate": 8}[compression], 262: 2}
    entries = {tag: (3, 1, value) for tag, value in numbers.items()}
    entries |= {273: (4, 1, 16), 277: (3, 1, 3), 278: (3, 1, 150), 279: (4, 1, length + reach)}
    data = struct.pack("<HHH", 8, 8, 8) + bytes(2) + pixels
    entries |= {258: (3, 3, 8), 270: (2, len(CAPTION), 8 + len(data))}
    data += CAPTION
    directory = b"".join(struct.pack("<HHII", tag, *entries[tag]) for tag in sorted(entries))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("reach", [4, 150])
def test_what_follows_a_strip_that_is_said_to_be_longer_stays(reach: int) -> None:
    original = behind_its_pixels("raw", reach)
    split = formats.split(original, LIMIT)
    assert np.array_equal(split.pixels(), np.asarray(picture()))
    data = formats.fit_view(split, rebuilt(split.pixels())).expand()
    assert data[16 + 200 * 150 * 3 :] == original[16 + 200 * 150 * 3 :]
    assert np.array_equal(formats.decode(data, LIMIT), rebuilt(split.pixels()))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("reach", [4, 150])
def test_a_compressed_strip_that_reaches_into_metadata_is_left_alone(compression: str, reach: int) -> None:
    sound = formats.split(behind_its_pixels(compression, 0), LIMIT)
    assert np.array_equal(sound.pixels(), np.asarray(picture()))
    with pytest.raises(formats.Unsupported, match="metadata, or another picture, within its pixels"):
        formats.split(behind_its_pixels(compression, reach), LIMIT)


@pytest.mark.parametrize("entry", [(513, 4, 1), (273, 4, 1)])
def test_a_strip_that_reaches_into_a_thumbnail_is_left_alone(entry: tuple[int, int, int]) -> None:
    original = tiff_bytes(compression="tiff_lzw", strip_size=1 << 20)
    start, length = tiff_parse.parse(original).parts[0]
    lengths = {513: 514, 273: 279}[entry[0]]
    for at, refused in ((start + length, False), (start + length - 1, True)):
        small = [(254, 4, 1, 1), (*entry, at), (lengths, 4, 1, 50)]
        page = struct.pack("<H", len(small)) + b"".join(struct.pack("<HHII", *each) for each in small) + bytes(4)
        directory = struct.unpack_from("<I", original, 4)[0]
        link = directory + 2 + 12 * struct.unpack_from("<H", original, directory)[0]
        data = original + bytes(50)
        data = data[:link] + struct.pack("<I", len(data)) + data[link + 4 :] + page
        if refused:
            with pytest.raises(formats.Unsupported, match="another picture, within its pixels"):
                formats.split(data, LIMIT)
        else:
            formats.split(data, LIMIT)


@pytest.mark.parametrize("rubbish", [1 << 30, 16, 100])
def test_exif_that_is_not_there_or_says_that_something_follows(rubbish: int) -> None:
    """Programs that copy Exif leave such numbers."""
    original = tiff_bytes(tiffinfo={330: 0})
    assert formats.split(with_value(original, 330, 1 << 30), LIMIT)
    entry = struct.pack("<HHHII", 1, 305, 2, 4, 0x41414100)
    data = with_value(original, 330, len(original)) + entry + struct.pack("<I", rubbish)
    assert np.array_equal(formats.split(data, LIMIT).pixels(), np.asarray(picture()))


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
    yield "C2PA", tiff_bytes(tiffinfo={C2PA: b"jumb"}), Reason.SIGNED
    behind = io.BytesIO()
    small = picture("RGB", 40, 30)
    small.encoderinfo = {"tiffinfo": {254: 1, C2PA: b"jumb"}}
    picture().save(behind, "TIFF", save_all=True, append_images=[small])
    yield "C2PA", behind.getvalue(), Reason.SIGNED
    yield "a server keeps", tiff_bytes(tiffinfo={XMP: ELSEWHERE}), Reason.SIGNED
    large = [(256, 4, 1, 201), (257, 4, 1, 150)]
    directory = struct.pack("<H", len(large)) + b"".join(struct.pack("<HHII", *each) for each in large) + bytes(4)
    first = tiff_bytes(tiffinfo={330: 0})
    yield "RAW files", with_value(first, 330, len(first)) + directory, Reason.UNSUPPORTED_KIND
    yield "multiplied", with_value(tiff_bytes(picture("RGBA")), 338, 1), Reason.UNSUPPORTED_KIND


@pytest.mark.parametrize(
    ("word", "data", "reason"),
    [pytest.param(*case, id=f"{number}-{case[0]}") for number, case in enumerate(refused_files())],
)
def test_refusals_say_why(word: str, data: bytes, reason: Reason) -> None:
    with pytest.raises(formats.Unsupported) as caught:
        formats.split(data, LIMIT).pixels()
    assert caught.value.reason is reason
    assert word in caught.value.message
    assert caught.value.kind == "tiff"
