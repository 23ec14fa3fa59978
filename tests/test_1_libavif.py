"""AVIF of 10 bits a sample, and what is done where there is no encoder for it."""

from __future__ import annotations

import contextlib
import hashlib
import io

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from esrfs import formats, reconstruction
from esrfs.blob import grid
from esrfs.blob import recipe as recipe_format
from esrfs.compaction import compactor, encoder
from esrfs.compaction.compactor import Policy
from esrfs.compaction.encoder import Tuning
from esrfs.compaction.outcome import Verdict
from esrfs.formats import cells, libavif, samples
from esrfs.formats.view import Samples, Unsupported
from esrfs.networks import loading, registry
from tests.witness import photo

OPTIONS = {"tune": "ssimulacra2"}


def ramp(height: int = 150, width: int = 230) -> Samples:
    """16 bits: slopes of so little that bytes would show them as stairs. Sides that nothing divides."""
    across = np.linspace(20_000, 24_000, width)[None, :, None]
    down = np.linspace(0, 3_000, height)[:, None, None]
    return (across + down + np.array([0, 4_000, 9_000])).astype(np.uint16)


def coded(pixels: Samples, quality: int = 95, subsampling: str = "4:4:4", threads: int = 2) -> bytes:
    return libavif.encode(pixels, quality=quality, speed=8, subsampling=subsampling, threads=threads, options=OPTIONS)


@pytest.fixture(autouse=True)
def _with_an_encoder() -> None:
    assert libavif.is_available(tuple(OPTIONS.items())), "the versions in constraints.txt have it"


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("bits", [8, 16])
def test_colours_come_back(subsampling: str, bits: int) -> None:
    """Neither cut off nor rounded to bytes: a shade of 255 is 257 of 65,535."""
    pixels = ramp() if bits == 16 else samples.as_bytes(ramp())
    again = libavif.decode(coded(pixels, subsampling=subsampling))
    assert (again.dtype, again.shape) == (np.uint16, pixels.shape)
    off = again.astype(float) - samples.as_16_bits(pixels)
    assert np.abs(off.mean((0, 1))).max() < 0.4 * 257
    if bits == 16:
        assert np.abs(off).mean() < 0.3 * 257


@pytest.mark.parametrize("bits", [8, 16])
def test_gray_comes_back(bits: int) -> None:
    pixels = (ramp() if bits == 16 else samples.as_bytes(ramp()))[:, :, :1]
    avif = coded(pixels)
    again = libavif.decode(avif)
    assert again.shape == pixels.shape
    assert np.abs(again.astype(float) - samples.as_16_bits(pixels)).max() < 2 * 257
    with Image.open(io.BytesIO(avif)) as image:
        assert (image.size, image.mode) == ((230, 150), "L")


def test_other_readers_show_it() -> None:
    avif = coded(ramp())
    assert grid.is_deep(avif)
    with Image.open(io.BytesIO(avif)) as image:
        shown = np.asarray(image).astype(int)
    assert np.abs(shown - samples.as_bytes(libavif.decode(avif))).max() <= 3


def test_bytes_and_16_bits() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert np.array_equal(samples.as_bytes(samples.as_16_bits(every)), every)
    between = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    assert np.array_equal(samples.as_bytes(between), np.rint(between / 257))


def test_white_and_black_stay() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    again = libavif.decode(coded(pixels, 99))
    assert again[:, :24].max() < 600 and again[:, 40:].min() > 65535 - 600


def test_the_number_of_processors_has_no_say() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    assert coded(pixels, 40, threads=2) == coded(pixels, 40, threads=8)


def test_options_that_there_are_not() -> None:
    assert not libavif.is_available((("tune", "nonsense"),))
    with pytest.raises(OSError, match="libavif"):
        libavif.encode(ramp(), quality=50, speed=8, subsampling="4:4:4", threads=2, options={"no-such-option": "1"})
    image = Image.fromarray(samples.as_bytes(ramp()))
    assert encoder.encode_avif(image, 50, tuning=Tuning({"no-such-option": "1"})) == encoder.encode_avif(image, 50)


def test_every_tuning_of_the_planner_is_known() -> None:
    for tuning in compactor._TUNINGS:
        assert libavif.is_available(tuple({**OPTIONS, **tuning.options}.items())), tuning


def test_a_tuning_of_8_bits() -> None:
    image = Image.fromarray(samples.as_bytes(ramp()))
    eight = encoder.encode_avif(image, 50, tuning=Tuning(bits=8))
    assert eight == encoder.encode_8_bits(image, 50)
    assert imagecodecs.avif_decode(eight).dtype == np.uint8
    assert imagecodecs.avif_decode(encoder.encode_avif(image, 50)).dtype == np.uint16


def test_damaged_ones_are_refused() -> None:
    avif = coded(ramp(64, 64))
    for length in range(0, len(avif), 1 + len(avif) // 40):
        with pytest.raises(Unsupported):
            cells.decode(avif[:length], 64, 64)
    place = avif.index(b"av1C")
    lying = bytearray(encoder.encode_8_bits(Image.fromarray(samples.as_bytes(ramp(64, 64))), 50))
    lying[lying.index(b"av1C") + 6] |= 0x40  # it says that it has more than 8 bits
    with pytest.raises(Unsupported):
        cells.decode(bytes(lying), 64, 64)
    hidden = bytearray(avif)
    hidden[place + 6] &= ~0x40 & 0xFF  # and this one that it has 8: whatever comes of it, no other exception
    with contextlib.suppress(Unsupported):
        assert cells.decode(bytes(hidden), 64, 64).shape == (64, 64, 3)
    with pytest.raises(Unsupported, match="limit"):
        cells.decode(coded(ramp(65, 64)), 64, 64)


def test_bytes_where_no_network_looks() -> None:
    avif = coded(ramp())
    assert cells.decode(avif, 230, 150).dtype == np.uint8
    assert cells.decode(avif, 230, 150, deep=True).dtype == np.uint16


def test_where_there_is_no_such_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs are of 8 bits then, as those of the first versions are; and those are rebuilt as ever."""
    data = registry.find("lite-x2").read_bytes()
    network, sha256 = loading.load(data), hashlib.sha256(data).digest()

    def infer(_: bytes, pixels: Samples) -> formats.Pixels:
        return network(pixels[None])[0]

    references = [compactor.NetworkRef("lite-x2", sha256, 2)]
    original = photo(2)
    sizes = []
    for bits in (10, 8):
        if bits == 8:
            monkeypatch.setattr(libavif, "is_available", lambda options=(): False)
        for networks in ([], references):
            outcome = compactor.compact(original, Policy(preset="small"), networks, infer)
            assert outcome.verdict is Verdict.COMPACTED
            assert grid.is_deep(outcome.avif) == (bits == 10)
            recipe = recipe_format.decode(outcome.recipe)
            view = reconstruction.rebuild(recipe, outcome.avif, infer)
            assert hashlib.sha256(view).digest() == recipe.sha256_view
            sizes.append(len(outcome.avif))
    assert len(set(sizes)) > 1


def test_where_imagecodecs_has_no_avif(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise imagecodecs.DelayedImportError("_avif")

    monkeypatch.setattr(imagecodecs, "avif_decode", missing)
    again = cells.decode(coded(ramp()), 230, 150, deep=True)
    assert again.dtype == np.uint8
    assert np.abs(again.astype(int) - samples.as_bytes(ramp())).max() <= 4


def test_a_libavif_of_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its structures may be others."""
    monkeypatch.setattr(libavif, "_MAJOR", b"2.")
    libavif._library.cache_clear()
    libavif.is_available.cache_clear()
    try:
        assert not libavif.is_available()
        assert libavif.version() == ""
        with pytest.raises(OSError, match="10 bits"):
            coded(ramp())
    finally:
        monkeypatch.undo()
        libavif._library.cache_clear()
        libavif.is_available.cache_clear()
