"""Large pictures to AVIF and back, cell by cell (``blob/grid.py``): the codec's memory is that of one cell."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from esrfs.blob import grid
from esrfs.compaction.outcome import Reason
from esrfs.formats import libavif
from esrfs.formats import pixels as plain
from esrfs.formats.samples import as_bytes
from esrfs.formats.view import Pixels, Samples, Unsupported

WHOLE_MEGAPIXELS = 16.0
"""Smaller pictures are coded as a whole. (No decoder smoothes edges between cells, and older ffmpeg shows the first
cell only.)"""
_CELL_MEGAPIXELS = 8.0
_LONGEST_SIDE = 16_384
"""Pixels of a picture, or of a cell, that is coded in one piece: AV1 ends at 65,536, libavif reads 32,768."""
_LEAVES_MUCH = 4.0
"""Megapixels from which on a step leaves more in the heap than the pages' return costs time."""
_ALIGNMENT = 64
"""Pixels: an AV1 superblock, so that no cell begins within one."""


def is_large(image: Image.Image) -> bool:
    """Whether a picture is to be coded in cells."""
    return image.width * image.height > WHOLE_MEGAPIXELS * 1e6 or max(image.size) > _LONGEST_SIDE


def give_memory_back(pixels: Pixels) -> None:
    """After a step on a large picture: what the step left in the heap would add to what the next one takes."""
    if pixels.shape[0] * pixels.shape[1] > _LEAVES_MUCH * 1e6:
        plain.give_memory_back()


def encode(image: Image.Image, encode_cell: Callable[[Image.Image], bytes]) -> bytes:
    """``image`` as an AVIF of cells, each coded by ``encode_cell``."""
    columns, width, height = _layout(image.width, image.height)
    cells = [
        encode_cell(_cell(image, left, top, width, height))
        for top in range(0, image.height, height)
        for left in range(0, image.width, width)
    ]
    return grid.assemble(cells, columns, image.width, image.height)


def _layout(width: int, height: int) -> tuple[int, int, int]:
    """Columns, and width and height of a cell: nearly square, and as equal as can be."""
    count = math.ceil(width * height / (_CELL_MEGAPIXELS * 1e6))
    columns = max(min(count, round(math.sqrt(count * width / height))), math.ceil(width / _LONGEST_SIDE))
    rows = max(math.ceil(count / columns), math.ceil(height / _LONGEST_SIDE))
    cell_width = _aligned(width / columns)
    return math.ceil(width / cell_width), cell_width, _aligned(height / rows)


def _aligned(size: float) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _cell(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """A part of the picture; beyond its right and lower edge its last pixels go on."""
    part = np.asarray(image.crop((left, top, min(left + width, image.width), min(top + height, image.height))))
    lacking = [(0, height - part.shape[0]), (0, width - part.shape[1]), (0, 0)]
    return Image.fromarray(np.pad(part, lacking[: part.ndim], mode="edge"))


def decode(avif: bytes, width: int, height: int, *, deep: bool = False) -> Samples:
    """The picture (height × width × 1 or 3, a canvas if it has cells): bytes, or ``deep``: 16 bits, if it has more than
    8. Raises Unsupported if it is damaged, or larger than that."""
    parts = grid.take_apart(avif)
    if parts is None:
        return _decode_one(avif, width * height / 1e6, deep=deep)
    if (parts.width, parts.height) != (width, height):
        raise _damaged(f"its grid is of {parts.width} × {parts.height} pixels, not {width} × {height}")
    rows = len(parts.cells) // parts.columns
    limit = (width + _ALIGNMENT) * (height + _ALIGNMENT) / 1e6
    first = _decode_one(parts.cells[0], limit, deep=deep)
    high, wide, channels = first.shape
    if channels not in (1, 3) or not _covers(high, rows, height) or not _covers(wide, parts.columns, width):
        raise _damaged("its cells don't make its picture")
    as_canvas = channels == 3 and first.dtype == np.uint8
    result = plain.canvas(height, width) if as_canvas else np.empty((height, width, channels), dtype=first.dtype)
    for number, data in enumerate(parts.cells):
        cell = _decode_one(data, limit, deep=deep)
        if cell.shape != first.shape or cell.dtype != first.dtype:
            raise _damaged("its cells are of different kinds")
        top, left = number // parts.columns * high, number % parts.columns * wide
        area = result[top : top + high, left : left + wide]
        area[:] = cell[: area.shape[0], : area.shape[1]]
    return result


def _decode_one(avif: bytes, max_megapixels: float, *, deep: bool) -> Samples:
    if not grid.is_deep(avif):
        return plain.decode(avif, max_megapixels)
    plain.check_header(avif, max_megapixels)
    try:
        samples = libavif.decode(avif)
    except ImportError:
        return plain.decode(avif, max_megapixels)  # to 8 bits; the view won't be the very one
    except OSError as error:
        raise _damaged(str(error)) from error
    return samples if deep else as_bytes(samples)


def _covers(cell: int, count: int, whole: int) -> bool:
    return cell * (count - 1) < whole <= cell * count


def _damaged(what: str) -> Unsupported:
    return Unsupported(Reason.BROKEN, f"the picture is damaged: {what}", "avif")
