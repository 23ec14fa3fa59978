"""Large pictures as AVIF grids: what our code puts together, libavif takes apart."""

from __future__ import annotations

import contextlib
import functools
import io

import numpy as np
import pytest
from PIL import Image

from esrfs import reconstruction
from esrfs.blob import grid
from esrfs.compaction import encoder
from esrfs.formats import cells, libavif
from esrfs.formats.samples import as_bytes
from esrfs.formats.view import Unsupported
from esrfs.reconstruction import Plan, ReconstructionError


def _picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width)
    small = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures above 0.1 megapixels are large, and cells have 0.05."""
    monkeypatch.setattr(cells, "WHOLE_MEGAPIXELS", 0.1)
    monkeypatch.setattr(cells, "_CELL_MEGAPIXELS", 0.05)


encode = functools.partial(encoder.encode_avif, quality=70)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(512, 400), (641, 353), (1200, 100), (100, 1201)])
@pytest.mark.usefixtures("small_cells")
def test_any_reader_shows_the_whole_picture(size: tuple[int, int], mode: str) -> None:
    picture = _picture(*size, mode)
    avif = encode(picture)
    parts = grid.take_apart(avif)
    assert parts is not None
    assert len(parts.cells) > 1
    with Image.open(io.BytesIO(avif)) as image:
        assert (image.size, image.mode) == (size, mode)
        by_pillow = np.asarray(image).reshape(size[1], size[0], -1)
    by_cells = cells.decode(avif, *size)
    # Pillow cuts what is between two shades off, instead of rounding it.
    assert np.abs(by_cells.astype(int) - by_pillow).max() <= 3
    error = by_cells.astype(int) - np.asarray(picture).reshape(by_cells.shape)
    assert np.abs(error).mean() < 4


@pytest.mark.usefixtures("small_cells")
def test_cells_come_back_as_they_were() -> None:
    picture = _picture(512, 300)
    made: list[bytes] = []

    def encode_cell(cell: Image.Image) -> bytes:
        made.append(encoder.encode_avif(cell, 70))
        return made[-1]

    parts = grid.take_apart(cells.encode(picture, encode_cell))
    assert parts is not None
    assert parts.cells == made
    assert (parts.width, parts.height) == picture.size


@pytest.mark.parametrize(
    "size",
    [
        *((16320, 12240), (8192, 6144), (4900, 4000), (65535, 300), (5000, 65000), (400, 65535)),
        *((16_385, 64), (64, 3_125_000), (3_125_000, 64), (40_000, 5000), (70_000, 65)),
    ],
)
def test_layout_of_large_pictures(size: tuple[int, int]) -> None:
    columns, width, height = cells._layout(*size)
    rows = -(-size[1] // height)
    assert width % 64 == height % 64 == 0
    assert width * (columns - 1) < size[0] <= width * columns
    assert rows <= 256
    assert columns <= 256
    assert width * height <= 12e6, "the codec's memory is bounded by a cell's"
    assert max(width, height) <= 16_384, "of an AVIF, libavif reads no more than 32,768"


@pytest.mark.parametrize("size", [(33_000, 17), (16, 66_000), (140_001, 5)])
def test_longer_pictures_than_the_codec_takes(size: tuple[int, int]) -> None:
    """AV1 ends at 65,536 pixels a side, and libavif reads 32,768."""
    picture = _picture(*size)
    avif = encoder.encode_avif(picture, 70, speed=10)
    assert grid.take_apart(avif) is not None
    error = cells.decode(avif, *size).astype(int) - np.asarray(picture)
    assert np.abs(error).mean() < 4


def test_small_pictures_are_one_piece() -> None:
    picture = _picture(300, 200)
    avif = encode(picture)
    assert grid.take_apart(avif) is None
    assert np.array_equal(cells.decode(avif, 300, 200), as_bytes(libavif.decode(avif)))


@pytest.mark.usefixtures("small_cells")
def test_damaged_grids_are_refused() -> None:
    avif = bytearray(encode(_picture(640, 400)))
    plan = Plan(640, 400, 1, b"", gray=False)
    assert reconstruction.decode_small(plan, bytes(avif)).shape == (400, 640, 3)
    with pytest.raises(Unsupported, match="641"):
        cells.decode(bytes(avif), 641, 400)
    for position in range(0, len(avif), 1 + len(avif) // 300):
        broken = bytearray(avif)
        broken[position] ^= 0xFF
        with contextlib.suppress(ReconstructionError):  # but nothing else
            reconstruction.decode_small(plan, bytes(broken))
    for length in range(0, len(avif), 1 + len(avif) // 100):
        with pytest.raises(ReconstructionError):
            reconstruction.decode_small(plan, bytes(avif[:length]))


def test_cells_that_do_not_go_together() -> None:
    one, other = encode(_picture(64, 64)), encode(_picture(128, 64))
    for files, columns in (([one, other], 2), ([one, one, one], 2), ([one, b"no AVIF"], 1), ([one, one[:50]], 1)):
        with pytest.raises(ValueError, match="cell"):
            grid.assemble(files, columns, 128, 64)
