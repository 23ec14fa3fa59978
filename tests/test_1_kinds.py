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


@pytest.mark.parametrize("kind", kinds.COMPACTED)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 4000), (4000, 1), (17, 3000), (3000, 3), (3, 5000)])
def test_extreme_shapes(kind: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(2).integers(100, 140, (size[1], size[0], 3), dtype=np.uint8)
    for options in OPTIONS[kind]:
        out = io.BytesIO()
        Image.fromarray(noise).save(out, kind, **options)
        assert formats.identify(out.getvalue()) == kind
        view = check_view(out.getvalue())
        if view is None:
            assert min(size) < 20 and kind != "bmp"  # the fixed parts of a view weigh more than so few pixels
        else:
            assert kind_of(view.coding) == kind
