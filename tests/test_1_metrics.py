"""The gate's metric agrees with the reference implementation, whole and by tile; PSNR is what it says."""

from __future__ import annotations

import importlib.resources
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ssimulacra2 import compute_ssimulacra2

from esrfs.metrics.fidelity import psnr, y_psnr
from esrfs.metrics.ssimulacra2 import Reference

Pixels = np.ndarray


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other: with anything else running, two are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _photograph(name: str) -> Pixels:
    with (importlib.resources.files("skimage") / "data" / f"{name}.png").open("rb") as file, Image.open(file) as image:
        return np.asarray(image.convert("L" if image.mode == "L" else "RGB"))


def _jpeg(pixels: Pixels, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _package(original: Pixels, view: Pixels) -> float:
    files = [io.BytesIO(), io.BytesIO()]
    for file, pixels in zip(files, (original, view), strict=True):
        Image.fromarray(pixels).save(file, "PNG")
    return float(compute_ssimulacra2(*files))


@pytest.mark.parametrize(("name", "quality"), [("astronaut", 90), ("coffee", 60), ("chelsea", 30), ("camera", 10)])
def test_agrees_with_the_package(name: str, quality: int) -> None:
    original = _photograph(name)
    view = _jpeg(original, quality)
    assert Reference(original).compare(view).score == pytest.approx(_package(original, view), abs=0.01)


def test_agrees_on_kodak(kodak: list[Path]) -> None:
    for path, quality in zip(kodak[::8], (20, 70, 95), strict=True):
        original = np.asarray(Image.open(path).convert("RGB"))
        small = Image.fromarray(original).resize((original.shape[1] // 2, original.shape[0] // 2))
        for view in (_jpeg(original, quality), np.asarray(small.resize(original.shape[1::-1]))):
            assert Reference(original).compare(view).score == pytest.approx(_package(original, view), abs=0.01)


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (31, 64), (100, 37), (255, 129), (257, 383), (300, 385)])
def test_agrees_on_odd_and_small_sizes(size: tuple[int, int]) -> None:
    """Below about 256 pixels there are fewer than six resolutions; at odd ones the last pixel halves alone."""
    height, width = size
    original = np.ascontiguousarray(_photograph("coffee")[:height, :width])
    view = _jpeg(original, 60)
    result = Reference(original).compare(view)
    assert result.score == pytest.approx(_package(original, view), abs=0.01)
    assert len(result.tiles) == max(1, round(height / 256)) * max(1, round(width / 256))


def test_pictures_too_small_for_the_reference_still_count() -> None:
    """The reference says 100 below 8×8, whatever is compared. (With one resolution of six, no score is worth much.)"""
    original = np.ascontiguousarray(_photograph("coffee")[100:105, 200:300])
    assert Reference(original).compare(original).score == pytest.approx(100, abs=0.01)
    assert Reference(original).compare(255 - original).score < 90


def test_identical_pictures() -> None:
    original = _photograph("chelsea")
    result = Reference(original).compare(original.copy())
    assert result.score == pytest.approx(100, abs=0.01)
    assert min(result.tiles) == result.worst_tile == pytest.approx(100, abs=0.01)


def test_gray_is_the_same_as_gray_in_three_channels() -> None:
    gray = _photograph("camera")
    view = _jpeg(gray, 50)
    three = Reference(np.stack([gray] * 3, 2)).compare(np.stack([view] * 3, 2))
    assert Reference(gray).compare(view) == three
    assert Reference(gray[..., None]).compare(view[..., None]) == three


def test_the_worst_tile_is_where_the_damage_is() -> None:
    """Eight tiles, two rows by four; one is spoilt."""
    astronaut = _photograph("astronaut")
    original = np.concatenate((astronaut, astronaut[:, ::-1]), axis=1)
    view = original.copy()
    view[256:, 512:768] = _jpeg(np.ascontiguousarray(original[256:, 512:768]), 5)
    result = Reference(original).compare(view)
    assert len(result.tiles) == 8
    assert result.tiles.index(result.worst_tile) == 6
    # Its neighbours feel it through the blur at low resolution.
    assert result.worst_tile < min(20, sorted(result.tiles)[1] - 30)
    assert result.worst_tile < result.score < max(result.tiles)


def test_the_same_damage_everywhere_is_the_same_in_every_tile() -> None:
    """A tile's score is on the whole picture's scale: no tile of an evenly damaged picture is far from the whole."""
    texture = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    original = np.tile(np.asarray(Image.fromarray(texture).resize((256, 256), Image.Resampling.BICUBIC)), (3, 3, 1))
    result = Reference(original).compare(_jpeg(original, 50))
    assert len(result.tiles) == 9
    assert max(abs(tile - result.score) for tile in result.tiles) < 3


def test_kept_or_measured_anew_one_thread_or_two() -> None:
    original = np.tile(_photograph("coffee"), (3, 1, 1))
    first, second = _jpeg(original, 40), _jpeg(original, 70)
    reference = Reference(original)
    expected = [reference.compare(first), reference.compare(second), reference.compare(first)]
    assert expected[0] == expected[2] != expected[1]
    for other in (Reference(original, cache_megapixels=0), Reference(original, threads=2)):
        assert [other.compare(first), other.compare(second), other.compare(first)] == expected


def test_what_can_not_be_compared() -> None:
    reference = Reference(_photograph("camera"))
    with pytest.raises(ValueError, match="can't be compared"):
        reference.compare(_photograph("coffee"))
    with pytest.raises(ValueError, match="takes"):
        Reference(np.zeros((20, 20, 4), np.uint8))


def test_psnr() -> None:
    a = np.full((300, 5, 3), 100, np.uint8)
    assert psnr(a, a) == y_psnr(a, a) == 99
    assert psnr(a, a + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(a, np.full_like(a, 90)) == psnr(np.full_like(a, 90), a) == pytest.approx(28.1308, abs=1e-4)
    # Luma spans 16 to 235: one step in every channel is 219/255 of a step.
    assert y_psnr(a, a + np.uint8(1)) == pytest.approx(48.1308 + 1.3219, abs=1e-3)
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == 0
    with pytest.raises(ValueError, match="can't be compared"):
        psnr(a, a[:1])
