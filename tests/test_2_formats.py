"""Views, for any picture: exact length, decodable, envelope verbatim; and no bytes at all make the parsers crash."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from esrfs import formats
from esrfs.blob import recipe
from esrfs.formats import jpeg_parse
from esrfs.formats.pixels import check_dimensions

LIMIT = 10.0


def made_picture(width: int, height: int, mode: str, seed: int, noise: float) -> Image.Image:
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([(x * (k + 1) + y * 3) * 2.0 for k in range(len(mode))], axis=2)
    pixels = (pixels + random.normal(0, noise, pixels.shape)) % 256
    pixels = pixels.astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if len(mode) == 1 else pixels)


def rebuilt(pixels: formats.Pixels) -> formats.Pixels:
    colours = pixels[:, :, :1] if pixels.shape[2] < 3 else pixels[:, :, :3]
    image = Image.fromarray(np.ascontiguousarray(colours.squeeze(2) if colours.shape[2] == 1 else colours))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)))


def check_view(original: bytes) -> formats.FittedView | None:
    split = formats.split(original, LIMIT)
    pixels = split.pixels()
    try:
        view = formats.fit_view(split, rebuilt(pixels))
    except formats.DoesNotFit:
        return None
    data = view.expand()
    assert len(data) == len(original)
    again = formats.split(data, LIMIT)
    assert again.pixels().shape == pixels.shape
    scan = formats.encode_scan(view.coding, split.width, split.height, rebuilt(pixels), len(view.scan))
    assert scan == view.scan
    return view


@settings(deadline=None, max_examples=150)
@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    mode=st.sampled_from(["L", "RGB"]),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    quality=st.integers(20, 100),
    optimize=st.booleans(),
    progressive=st.booleans(),
    restarts=st.integers(0, 20),
    extra=st.integers(0, 70_000),
    trailing=st.binary(max_size=50),
    seed=st.integers(0, 1000),
)
def test_any_jpeg_gets_a_view_of_its_size(
    *, width: int, height: int, mode: str, subsampling: str, quality: int, optimize: bool, progressive: bool,
    restarts: int, extra: int, trailing: bytes, seed: int,
) -> None:  # fmt: skip
    image = made_picture(width, height, mode, seed, noise=20)
    out = io.BytesIO()
    image.save(
        out,
        "JPEG",
        progressive=progressive and quality < 90,  # Pillow's room for larger ones is too small
        quality=quality,
        subsampling=subsampling if mode == "RGB" else -1,
        optimize=optimize,
        restart_marker_blocks=restarts,
        comment=b"a comment",
    )
    made = out.getvalue()
    original = made[:-2] + b"\xff" * extra + made[-2:] + trailing
    view = check_view(original)
    if extra > 50_000:
        assert view is not None
        assert recipe.expand(view.prefix).startswith(original[: original.index(b"a comment") + 9])
        assert recipe.expand(view.suffix).endswith(b"\xff\xd9" + trailing)
    if view is not None and trailing:  # libultrahdr takes two of them for a marker
        data = view.expand()
        end = jpeg_parse.parse(data).eoi
        assert (end - len(data[:end].rstrip(b"\xff"))) % 2 == 0


@settings(deadline=None, max_examples=100)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    mode=st.sampled_from(["L", "LA", "RGB", "RGBA"]),
    colours=st.sampled_from([0, 0, 3, 13, 200]),
    level=st.integers(0, 9),
    noise=st.floats(0, 60),
    trailing=st.binary(max_size=50),
    seed=st.integers(0, 1000),
)
def test_any_png_gets_a_view_of_its_size(
    *, width: int, height: int, mode: str, colours: int, level: int, noise: float, trailing: bytes, seed: int
) -> None:
    out = io.BytesIO()
    image = made_picture(width, height, mode, seed, noise)
    if colours:
        image = image.convert("RGB").quantize(colours)
        image.putpalette(((image.getpalette() or []) + [0] * 600)[: 3 * colours])
    image.save(out, "PNG", compress_level=level)
    original = out.getvalue() + trailing
    view = check_view(original)
    if view is not None:
        assert recipe.expand(view.prefix).startswith(original[: original.index(b"IDAT") - 4])
        assert recipe.expand(view.suffix).endswith(original[original.rindex(b"IEND") - 4 :])


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    mode=st.sampled_from(["L", "RGB"]),
    colours=st.sampled_from([0, 0, 3, 200]),
    trailing=st.binary(max_size=50),
    seed=st.integers(0, 1000),
)
def test_any_bmp_gets_a_view_of_its_size(
    *, width: int, height: int, mode: str, colours: int, trailing: bytes, seed: int
) -> None:
    out = io.BytesIO()
    image = made_picture(width, height, mode, seed, 20)
    (image.convert("RGB").quantize(colours) if colours else image).save(out, "BMP")
    assert check_view(out.getvalue() + trailing) is not None


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    mode=st.sampled_from(["RGB", "RGBA"]),
    lossless=st.booleans(),
    quality=st.integers(30, 100),
    exif=st.sampled_from([b"", b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"]),
    trailing=st.binary(max_size=50),
    seed=st.integers(0, 1000),
)
def test_any_webp_gets_a_view_of_its_size(
    *, width: int, height: int, mode: str, lossless: bool, quality: int, exif: bytes, trailing: bytes, seed: int
) -> None:
    out = io.BytesIO()
    made_picture(width, height, mode, seed, 20).save(out, "WEBP", lossless=lossless, quality=quality, exif=exif)
    view = check_view(out.getvalue() + trailing)
    assert view is None or recipe.expand(view.suffix).endswith(trailing)


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    mode=st.sampled_from(["L", "LA", "RGB", "RGBA"]),
    compression=st.sampled_from(["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"]),
    strip=st.integers(1, 20_000),
    trailing=st.binary(max_size=50),
    seed=st.integers(0, 1000),
)
def test_any_tiff_gets_a_view_of_its_size(
    *, width: int, height: int, mode: str, compression: str, strip: int, trailing: bytes, seed: int
) -> None:
    out = io.BytesIO()
    if compression == "jpeg":
        mode = mode.removesuffix("A")
        strip = max(strip, 3 * width)  # Pillow can't write less than a row
    made_picture(width, height, mode, seed, 20).save(out, "TIFF", compression=compression, strip_size=strip)
    view = check_view(out.getvalue() + trailing)
    assert view is not None or compression != "raw"


def small_files() -> list[bytes]:
    files = []
    for kind, options in (
        ("JPEG", {"quality": 60}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "jpeg"}),
    ):
        out = io.BytesIO()
        made_picture(40, 30, "RGB", 1, 10).save(out, kind, **options)
        files.append(out.getvalue())
    return files


FILES = small_files()


@settings(deadline=None, max_examples=300)
@given(
    data=st.sampled_from(FILES),
    position=st.floats(0, 1),
    replacement=st.binary(max_size=8),
    removed=st.integers(0, 200),
)
def test_damaged_files_are_refused_or_read_never_a_crash(
    data: bytes, position: float, replacement: bytes, removed: int
) -> None:
    offset = int(position * len(data))
    broken = data[:offset] + replacement + data[offset + removed :]
    try:
        split = formats.split(broken, LIMIT)
        pixels = split.pixels()
    except formats.Unsupported as error:
        assert error.message
    else:
        assert pixels.shape[:2] == (split.height, split.width)
    try:
        formats.decode(broken, LIMIT)
    except formats.Unsupported as error:
        assert error.message


@given(data=st.one_of(st.binary(max_size=400), st.binary(max_size=400).map(lambda tail: b"\xff\xd8\xff" + tail)))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(formats.Unsupported):
        formats.split(data, LIMIT)
    assert isinstance(formats.identify(data), str)


def test_identify_by_content() -> None:
    assert [formats.identify(data) for data in FILES] == ["jpeg", "png", "webp", "gif", "bmp", "tiff", "tiff"]
    assert formats.identify(b"\0\0\0\x18ftypheic") == "heic"
    assert formats.identify(b"\0\0\0\x18ftypisom") == "mp4"
    assert formats.identify(b"") == ""
    assert formats.identify(b"Plain words, not a picture") == ""


def test_decode_cuts_to_eight_bits_and_limits_pixels() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 5), 0x8000, np.uint16)).save(out, "PNG")
    assert formats.decode(out.getvalue(), LIMIT)[0, 0, 0] == 0x80
    with pytest.raises(formats.Unsupported, match="megapixels"):
        formats.decode(FILES[0], 0.001)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["JPEG", "PNG"]),
    side=st.integers(64, 200),
    extra=st.integers(0, 70_000),
    length=st.sampled_from([32, 33, 1000, 66_000]),
)
def test_a_note_changes_nothing_but_fill(kind: str, side: int, extra: int, length: int) -> None:
    """The scan is as without it; what the note is made of is just what is in the view."""
    image = made_picture(side, side, "RGB", side, 20)
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 95, "comment": bytes(extra)[:65000]} if kind == "JPEG" else {}))
    original = out.getvalue()
    split = formats.split(original, LIMIT)
    seen: list[bytes] = []

    def note(coding: recipe.Coding, scan: bytes) -> bytes:
        seen.append(scan)
        return np.random.default_rng(3).integers(1, 256, length, dtype=np.uint8).tobytes()

    try:
        plain = formats.fit_view(split, rebuilt(split.pixels()))
    except formats.DoesNotFit:
        return
    noted = formats.fit_view(split, rebuilt(split.pixels()), note)
    assert (noted.scan, noted.coding) == (plain.scan, plain.coding)
    assert len(noted.expand()) == len(plain.expand())
    moved = recipe.length(noted.prefix) - recipe.length(plain.prefix)
    assert moved in ((0, 42) if kind == "JPEG" else (0,))
    if kind == "JPEG":
        assert seen[-1].rstrip(b"\xff") == noted.scan.rstrip(b"\xff")
    else:
        assert seen[-1] == noted.scan
    assert np.array_equal(formats.decode(noted.expand(), LIMIT), formats.decode(plain.expand(), LIMIT))
    before, after = (np.frombuffer(view.expand(), np.uint8) for view in (plain, noted))
    changed = np.flatnonzero(before != after)
    if kind == "JPEG" and len(changed) and not moved:
        assert not before[changed].any()
        text = noted.expand()
        assert text.index(b"esrfs\0") <= changed[0]
        assert note(noted.coding, b"")[:32] in text
    if moved:
        assert note(noted.coding, b"")[:32] in noted.expand()


def test_a_pictures_own_size_is_within_that_limit() -> None:
    """Blobs are decoded with their own size as the limit, in megapixels: 89 × 89 / 1e6 * 1e6 is less than 89 × 89."""
    for width in range(1, 1000):
        check_dimensions(width, 89, width * 89 / 1e6, "avif")
        with pytest.raises(formats.Unsupported):
            check_dimensions(width, 89, (width * 89 - 1) / 1e6, "avif")
