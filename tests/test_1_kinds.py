"""The list of kinds, and pictures of extreme shapes in each of them."""

from __future__ import annotations

import importlib
import io
import typing
from typing import Any

import numpy as np
import pytest
from PIL import Image

from esrfs import formats
from esrfs.blob.recipe import PictureCoding, kind_of
from esrfs.compaction.outcome import Reason
from esrfs.formats import kinds
from tests.test_1_png import interlaced
from tests.test_2_formats import check_view

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "jpeg": [{"quality": 90}, {"quality": 60, "progressive": True}],
    "png": [{"compress_level": 1}],
    "webp": [{"quality": 90}, {"lossless": True}],
    "tiff": [{"compression": "raw"}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}],
    "bmp": [{}],
}


def test_every_kind_has_a_module_a_coding_and_a_name() -> None:
    tags = {coding.__struct_config__.tag for coding in typing.get_args(PictureCoding)}
    assert tags == set(kinds.COMPACTED)
    for kind, name in kinds.COMPACTED.items():
        module = importlib.import_module(f"esrfs.formats.{kind}")
        assert callable(module.split)
        assert callable(module.encode_scan)
        assert name in kinds.in_words()


SIZES = [(1, 1), (2, 1), (1, 4000), (4000, 1), (17, 3000), (3000, 3), (3, 5000)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(100, 140, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", kinds.COMPACTED)
@pytest.mark.parametrize("size", SIZES)
def test_extreme_shapes(kind: str, size: tuple[int, int]) -> None:
    for options in OPTIONS[kind]:
        out = io.BytesIO()
        noise(*size).save(out, kind, **options)
        check_extreme(out.getvalue(), kind)


@pytest.mark.parametrize("size", SIZES)
def test_extreme_shapes_of_palettes_and_interlaced_pictures(size: tuple[int, int]) -> None:
    few = noise(*size).quantize(16)
    few.putpalette(((few.getpalette() or []) + [0] * 48)[:48])
    for image in (noise(*size), few):
        out = io.BytesIO()
        image.save(out, "PNG", compress_level=0)
        check_extreme(out.getvalue(), "png")
        if image.mode == "RGB":
            check_extreme(interlaced(out.getvalue()), "png")


LONGEST = [
    # the longest side that a kind has, or that a test bears
    ("jpeg", 65_500, {"quality": 90}),
    ("jpeg", 65_500, {"quality": 60, "progressive": True}),
    ("png", 100_000, {"compress_level": 1}),
    ("webp", 16_383, {"quality": 90}),
    ("webp", 16_383, {"lossless": True}),
    ("tiff", 100_000, {"compression": "raw"}),
    ("tiff", 100_000, {"compression": "raw", "strip_size": 1}),
    ("tiff", 100_000, {"compression": "tiff_lzw"}),
    ("tiff", 100_000, {"compression": "tiff_adobe_deflate"}),
    ("bmp", 100_000, {}),
]


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(("kind", "side", "options"), LONGEST)
def test_pictures_of_one_row_or_one_column(kind: str, side: int, options: dict[str, Any], upright: bool) -> None:
    out = io.BytesIO()
    noise(*((1, side) if upright else (side, 1))).save(out, kind, **options)
    check_extreme(out.getvalue(), kind)


@pytest.mark.parametrize("side", [65_501, 65_535])
def test_a_jpeg_that_is_longer_than_libjpeg_reads(side: int) -> None:
    """It says so, and of no damage."""
    out = io.BytesIO()
    noise(65_500, 1).save(out, "jpeg")
    data = bytearray(out.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 7 : frame + 9] = side.to_bytes(2, "big")
    with pytest.raises(formats.Unsupported, match="65,500") as error:
        formats.split(bytes(data), 50)
    assert error.value.reason is Reason.UNSUPPORTED_KIND


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(81, 64), (64, 81), (97, 95), (79, 113), (65, 65)])
def test_odd_sides_with_halved_chroma(size: tuple[int, int], progressive: bool) -> None:
    """The last chroma sample stands for one pixel; the view's must be where the original's is."""
    for subsampling in ("4:2:0", "4:2:2"):
        out = io.BytesIO()
        noise(*size).save(out, "jpeg", quality=95, subsampling=subsampling, progressive=progressive)
        original = out.getvalue()
        split = formats.split(original, 50)
        view = formats.fit_view(split, split.pixels())
        assert check_view(original) is not None
        error = split.pixels().astype(int) - formats.decode(view.expand(), 50)
        assert np.abs(error[-1]).mean() < 3, "the last row"
        assert np.abs(error[:, -1]).mean() < 3, "the last column"


def check_extreme(original: bytes, kind: str) -> None:
    assert formats.identify(original) == kind
    split = formats.split(original, 50)
    view = check_view(original)
    if view is None:
        # the fixed parts of a view weigh more than so few pixels
        assert min(split.width, split.height) < 20 and kind != "bmp"
    else:
        assert kind_of(view.coding) == kind
