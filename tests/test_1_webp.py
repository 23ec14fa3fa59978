"""WebP: what is refused and why, and where the bytes of a view lie."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from esrfs import formats
from esrfs.blob import recipe
from esrfs.blob.recipe import WebpCoding
from esrfs.compaction.outcome import Reason
from esrfs.formats import webp
from tests.test_1_png import ELSEWHERE, picture

LIMIT = 50.0
EXIF = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"


def webp_bytes(image: Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, "WEBP", **options)
    return out.getvalue()


def with_chunks(data: bytes, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """Chunks put before the first one, or at the end."""
    size = int.from_bytes(data[4:8], "little")
    body = data[8:12] + before + data[12 : 8 + size] + after
    return b"RIFF" + struct.pack("<I", len(body)) + body + data[8 + size :]


def chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def rebuilt(pixels: formats.Pixels, radius: float = 1) -> formats.Pixels:
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)))


CASES = {
    "lossy": webp_bytes(quality=90),
    "lossy, odd size": webp_bytes(picture("RGB", 61, 43), quality=90),
    "lossy with alpha": webp_bytes(picture("RGBA"), quality=90),
    "lossy with EXIF": webp_bytes(picture("RGB", 500, 400), quality=95, exif=EXIF),
    "lossless": webp_bytes(lossless=True),
    "lossless with alpha": webp_bytes(picture("RGBA"), lossless=True, exact=True),
    "lossless with EXIF": webp_bytes(picture("RGB", 300, 200), lossless=True, exif=EXIF),
    "lossless with alpha and EXIF": webp_bytes(picture("RGBA"), lossless=True, exact=True, exif=EXIF),
    "with an unknown chunk last": with_chunks(webp_bytes(quality=90, exif=EXIF), after=chunk(b"abcd", b"kept")),
    "with bytes after it": webp_bytes(quality=90) + b"trailing",
}


@pytest.mark.parametrize("name", CASES)
def test_view_has_the_originals_size_chunks_and_alpha(name: str, tmp_path: Path) -> None:
    original = CASES[name]
    split = formats.split(original, LIMIT)
    pixels = split.pixels()
    view = formats.fit_view(split, rebuilt(pixels))
    data = view.expand()
    assert len(data) == len(original)
    before, after = (
        [part for part in webp._chunks(each, 8 + int.from_bytes(each[4:8], "little")) if part.kind != b"esRF"]
        for each in (original, data)
    )
    assert [part.kind for part in after] == [part.kind for part in before]
    for old, new in zip(before, after, strict=True):
        assert old.data == new.data or old.kind in (b"VP8 ", b"VP8L")
    assert data.endswith(b"trailing") == original.endswith(b"trailing")
    again = formats.split(data, LIMIT).pixels()
    if pixels.shape[2] == 4:
        assert np.array_equal(again[:, :, 3], pixels[:, :, 3])
    if split.lossless:
        assert np.array_equal(again[:, :, :3], rebuilt(pixels))
    else:
        assert np.abs(again[:, :, :3].astype(int) - rebuilt(pixels)).mean() < 5
    scan = formats.encode_scan(view.coding, split.width, split.height, rebuilt(pixels), len(view.scan))
    assert scan == view.scan
    if shutil.which("webpinfo"):
        (tmp_path / "view.webp").write_bytes(data)
        subprocess.run(["webpinfo", "-quiet", str(tmp_path / "view.webp")], check=True)


def test_alpha_that_the_header_denies() -> None:
    """Readers show it: they ask the pixels."""
    data = bytearray(CASES["lossless with alpha and EXIF"])
    at = data.index(b"VP8X") + 8
    assert data[at] & 0x10
    data[at] &= ~0x10
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGBA"
        alpha = np.asarray(image)[:, :, 3]
    split = formats.split(bytes(data), LIMIT)
    view = formats.fit_view(split, rebuilt(split.pixels())).expand()
    with Image.open(io.BytesIO(view)) as image:
        assert image.mode == "RGBA"
        assert np.array_equal(np.asarray(image)[:, :, 3], alpha)
    assert alpha.min() < 255


def test_scan_starts_at_a_round_offset_where_the_format_allows() -> None:
    split = formats.split(CASES["lossy with EXIF"], LIMIT)
    view = formats.fit_view(split, rebuilt(split.pixels(), 8))
    assert recipe.length(view.prefix) % 4096 == 0
    assert recipe.length(view.suffix) > 8192
    simple = formats.split(webp_bytes(picture("RGB", 500, 400), quality=95), LIMIT)
    assert recipe.length(formats.fit_view(simple, rebuilt(simple.pixels(), 8)).prefix) == 20


def test_the_fill_says_the_note() -> None:
    for name in ("lossy", "lossy with EXIF"):
        split = formats.split(CASES[name], LIMIT)
        view = formats.fit_view(split, rebuilt(split.pixels(), 4), lambda coding, scan: b"n" * 32)
        assert view.expand().count(b"n" * 32) == 1


def test_the_best_quality_that_fits_is_taken() -> None:
    split = formats.split(webp_bytes(quality=80), LIMIT)
    fitting = formats.fit_view(split, rebuilt(split.pixels()))
    softer = formats.fit_view(split, rebuilt(split.pixels(), 3))
    assert isinstance(fitting.coding, recipe.WebpCoding)
    assert isinstance(softer.coding, recipe.WebpCoding)
    assert softer.coding.quality >= fitting.coding.quality >= 80
    noise = np.random.default_rng(1).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    with pytest.raises(formats.DoesNotFit, match="bytes too long"):
        formats.fit_view(formats.split(webp_bytes(quality=10), LIMIT), noise)


def test_a_reconstruction_that_needs_more_is_softened_into_the_same_length() -> None:
    split = formats.split(webp_bytes(lossless=True), LIMIT)
    view = formats.fit_view(split, rebuilt(split.pixels()))
    scan = formats.encode_scan(view.coding, split.width, split.height, split.pixels(), len(view.scan))
    assert len(scan) == len(view.scan)
    data = recipe.expand(view.prefix) + scan + recipe.expand(view.suffix)
    assert formats.split(data, LIMIT).pixels().shape == (150, 200, 3)


def refused_files() -> Iterator[tuple[str, bytes, Reason]]:
    good = webp_bytes(quality=90)
    extended = webp_bytes(quality=90, exif=EXIF)
    lossless = webp_bytes(lossless=True)
    cut = b"RIFF\4\0\0\0WEBP"
    frames = webp_bytes(save_all=True, append_images=[picture("RGB", 200, 150).rotate(90)])
    yield "animated", frames, Reason.UNSUPPORTED_KIND
    yield "C2PA", with_chunks(extended, after=chunk(b"C2PA", b"jumb")), Reason.SIGNED
    yield "a server keeps", with_chunks(extended, after=chunk(b"XMP ", ELSEWHERE)), Reason.SIGNED
    yield "VP8 version", good[:20] + bytes([good[20] | 2]) + good[21:], Reason.UNSUPPORTED_KIND
    yield "scaled", good[:27] + bytes([good[27] | 0x40]) + good[28:], Reason.UNSUPPORTED_KIND
    yield "shorter than", good[:-50], Reason.BROKEN
    yield "longer than the file", good[:16] + b"\xff" + good[17:], Reason.BROKEN
    yield "no picture", with_chunks(b"RIFF\4\0\0\0WEBP", after=chunk(b"abcd", b"")), Reason.BROKEN
    yield "wrong place", with_chunks(good, before=chunk(b"abcd", b"12")), Reason.BROKEN
    yield "several pictures", with_chunks(extended, after=good[12:]), Reason.BROKEN
    yield "contradict", extended[:24] + b"\1" + extended[25:], Reason.BROKEN
    yield "begin with its header", good[:23] + b"\0" + good[24:], Reason.BROKEN
    yield "begin with its header", lossless[:20] + b"\0" + lossless[21:], Reason.BROKEN
    yield "can't be decoded", with_chunks(cut, after=chunk(b"VP8 ", good[20:2000])), Reason.BROKEN


@pytest.mark.parametrize(
    ("word", "data", "reason"), [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in refused_files()]
)
def test_refusals_say_why(word: str, data: bytes, reason: Reason) -> None:
    with pytest.raises(formats.Unsupported) as caught:
        formats.split(data, LIMIT).pixels()
    assert caught.value.reason is reason
    assert word in caught.value.message
    assert caught.value.kind == "webp"


@pytest.mark.parametrize("most", [60, 0])
def test_a_quality_that_libwebp_can_not_write_does_not_fit(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lossy pictures of tens of megapixels: "encoding error 6", a part of the file is limited to 512 KiB."""
    original = webp_bytes(quality=90)
    split = formats.split(original, LIMIT)
    pixels = rebuilt(split.pixels())
    save = Image.Image.save

    def limited(image: Image.Image, out: io.BytesIO, kind: str, **options: Any) -> None:
        if options["quality"] > most:
            raise ValueError("encoding error 6")
        save(image, out, kind, **options)

    monkeypatch.setattr(Image.Image, "save", limited)
    if not most:
        with pytest.raises(formats.DoesNotFit, match="libwebp can't write it"):
            formats.fit_view(split, pixels)
        return
    view = formats.fit_view(split, pixels)
    assert isinstance(view.coding, WebpCoding)
    assert 30 <= view.coding.quality <= most
    assert len(view.expand()) == len(original)


def test_a_lossless_picture_that_readers_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """libwebp takes a second for each megapixel, and after two minutes a read fails."""
    original = CASES["lossless"]
    tried: list[int] = []

    def stream(coding: WebpCoding, *_: object) -> bytes:
        tried.append(coding.method)
        return bytes(len(original))

    monkeypatch.setattr(webp, "_stream", stream)
    pixels = picture()
    for most, methods in (((1.0, 1.0), [4, 6]), ((1.0, 0.02), [4])):
        monkeypatch.setattr(webp, "_QUICK_MEGAPIXELS", most)
        tried.clear()
        with pytest.raises(formats.DoesNotFit):
            formats.fit_view(formats.split(original, LIMIT), np.asarray(pixels))
        assert tried == methods
    monkeypatch.setattr(webp, "_QUICK_MEGAPIXELS", (0.02, 0.02))
    with pytest.raises(formats.Unsupported, match="readers would wait") as error:
        formats.split(original, LIMIT)
    assert error.value.reason is Reason.UNSUPPORTED_KIND
    assert not formats.split(CASES["lossy"], LIMIT).lossless, "lossy ones are quick"
