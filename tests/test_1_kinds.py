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


def check_extreme(original: bytes, kind: str) -> None:
    assert formats.identify(original) == kind
    split = formats.split(original, 50)
    view = check_view(original)
    if view is None:
        # the fixed parts of a view weigh more than so few pixels
        assert min(split.width, split.height) < 20 and kind != "bmp"
    else:
        assert kind_of(view.coding) == kind
