"""Colours come back from AVIF of 8 bits as they were, not half a shade of chroma off."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from esrfs.compaction import chroma
from esrfs.compaction.encoder import encode_8_bits


def picture(height: int = 300) -> Image.Image:
    """Soft, colourful, away from black and white."""
    noise = np.random.default_rng(3).integers(40, 216, (height // 10, 24, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((240, height), Image.Resampling.BICUBIC)


def change(image: Image.Image, *, lift: bool, subsampling: str, quality: int) -> list[float]:
    """By which red, green and blue come back different, on average."""
    given = chroma.lifted(image) if lift else image
    with Image.open(io.BytesIO(encode_8_bits(given, quality, subsampling))) as coded:
        return list((np.asarray(coded).astype(float) - np.asarray(image)).mean((0, 1)))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("quality", [50, 90])
def test_colours_come_back(subsampling: str, quality: int) -> None:
    image = picture()
    plain = change(image, lift=False, subsampling=subsampling, quality=quality)
    lifted = change(image, lift=True, subsampling=subsampling, quality=quality)
    assert max(map(abs, plain)) > 0.4
    assert max(map(abs, lifted)) < 0.3
    assert sum(map(abs, lifted)) < 0.5 * sum(map(abs, plain))


def test_every_row_is_lifted_alike() -> None:
    """It is done in bands."""
    rows = np.tile(np.random.default_rng(1).integers(0, 256, (1, 50, 3), dtype=np.uint8), (300, 1, 1))
    lifted = np.asarray(chroma.lifted(Image.fromarray(rows)))
    assert np.array_equal(lifted, np.broadcast_to(lifted[:1], lifted.shape))
    assert not np.array_equal(lifted, rows)
    assert np.abs(lifted.astype(int) - rows).max() <= 3


def test_gray_has_no_chroma() -> None:
    gray = picture().convert("L")
    assert chroma.lifted(gray) is gray


def test_an_encoder_that_rounds_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chroma, "_encoder_cuts", lambda: False)
    image = picture()
    assert chroma.lifted(image) is image
