"""Pixels between numpy and Pillow: the same values, by ways that need less memory."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from esrfs import formats
from esrfs.formats import jpeg
from esrfs.formats import pixels as between

Pixels = np.ndarray


def _noise(height: int, width: int, channels: int) -> Pixels:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _on_canvas(pixels: Pixels, rows: int = 0, columns: int = 0) -> Pixels:
    """The same pixels on a canvas that is larger by so many rows and columns."""
    canvas = formats.canvas(pixels.shape[0] + rows, pixels.shape[1] + columns)
    canvas[:] = 77
    canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
    return canvas[: pixels.shape[0], : pixels.shape[1]]


def _saved(image: Image.Image, **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=83, **how)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("height", [1, 255, 256, 257, 700])
def test_as_array_by_bands_is_the_whole(mode: str, height: int) -> None:
    channels = len(mode)
    image = Image.frombytes(mode, (31, height), _noise(height, 31, channels).tobytes())
    array = between.as_array(image)
    assert array.shape == (height, 31, channels)
    assert array.tobytes() == image.tobytes()


@pytest.mark.parametrize("extra", [(0, 0), (1, 0), (0, 1), (1, 3)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_canvas_is_encoded_like_an_array_and_not_copied(extra: tuple[int, int], subsampling: str) -> None:
    plain = _noise(65, 97, 3)
    canvas = _on_canvas(plain, *extra)
    shared = between.as_image_for_jpeg(canvas, 97, 65, "RGB")
    assert shared.mode == "RGBX"
    assert _saved(shared, subsampling=subsampling) == _saved(Image.fromarray(plain), subsampling=subsampling)
    for one, other in zip(between.softened(shared), between.softened(Image.fromarray(plain)), strict=True):
        assert _saved(one) == _saved(other)
    canvas[:] = 0
    assert np.asarray(shared)[:, :, :3].max() == 0, "they share memory"


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("height", [1, 31, 32, 33, 48, 49, 150])
def test_a_blur_by_bands_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, mode: str, height: int) -> None:
    """Recipes pin views whose pictures were blurred as a whole."""
    monkeypatch.setattr(between, "_BLURRED_ROWS", 32)
    image = Image.frombytes(mode, (37, height), _noise(height, 37, len(mode)).tobytes())
    given = image.tobytes()
    canvas = Image.new(mode, image.size)
    for radius in (*between._SOFTENING_PIXELS, *jpeg.SLIGHTLY_SOFTER, *jpeg.SOFTER):
        whole = image.filter(ImageFilter.GaussianBlur(radius)).tobytes()
        assert between.blurred(image, radius).tobytes() == whole
        assert between.blurred(image, radius, canvas) is canvas
        assert canvas.tobytes() == whole
    assert image.tobytes() == given


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_image_of_a_canvas_is_of_the_mode_that_was_asked_for(mode: str) -> None:
    plain = _noise(33, 20, 3)
    image = between.as_image(_on_canvas(plain, 1, 1), 20, 33, mode)
    assert image.mode == mode
    assert np.array_equal(np.asarray(image), np.asarray(Image.fromarray(plain).convert(mode)))


def test_parts_of_arrays_that_are_no_canvas() -> None:
    """A part that begins elsewhere, colour of RGBA, every second row: copied, with the right values."""
    canvas = _on_canvas(_noise(40, 40, 3))
    rgba = _noise(40, 40, 4)
    for part in (canvas[1:, 2:], canvas[::2], canvas[:, ::-1], rgba[:, :, :3], rgba[:, :, 1:]):
        height, width = part.shape[:2]
        image = between.as_image_for_jpeg(part, width, height, "RGB")
        assert np.array_equal(np.asarray(image.convert("RGB")), part)
    with pytest.raises(ValueError, match="expected"):
        between.as_image_for_jpeg(canvas, 41, 40, "RGB")
