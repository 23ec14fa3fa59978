"""A small picture that stands for a large one while its plan is made: tiles of it, put together.

The tiles are drawn so that the mosaic has flat and busy parts in the picture's own proportion: all tiles, in order of
their detail, are cut into as many groups of equal size as there will be tiles, and each group gives one. Which one
changes from group to group: the one in the middle, the one most like text (hard edges between few tones), like skin,
or of the strongest colour, since these are the places where people see first what went wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]

TILE = 256
"""Pixels: as the gate's tiles."""
ROWS, COLUMNS = 4, 4
_SHRUNK = 4
"""Tiles are looked at at a quarter of the resolution each way."""


class _Kinds(NamedTuple):
    """For each tile of a picture, row by row: how much it is …"""

    detail: Values
    text: Values
    skin: Values
    colour: Values


def mosaic(pixels: Pixels) -> Pixels:
    """1,024 × 1,024 pixels out of H×W×C; a picture not much larger is its own mosaic."""
    height, width = pixels.shape[:2]
    if height < ROWS * TILE or width < COLUMNS * TILE or height * width < 2 * ROWS * COLUMNS * TILE**2:
        return pixels
    across = width // TILE
    chosen = choose(_kinds(pixels), ROWS * COLUMNS)
    tiles = [
        pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        for row, column in (divmod(index, across) for index in sorted(chosen))
    ]
    rows = [np.concatenate(tiles[first : first + COLUMNS], axis=1) for first in range(0, len(tiles), COLUMNS)]
    return np.concatenate(rows)


def choose(kinds: _Kinds, count: int) -> list[int]:
    """Numbers of ``count`` different tiles."""
    order = np.argsort(kinds.detail, kind="stable")
    chosen = []
    for number, group in enumerate(np.array_split(order, count)):
        preferred = (None, kinds.text, kinds.skin, kinds.colour)[number % 4]
        at = len(group) // 2 if preferred is None else int(np.argmax(preferred[group]))
        chosen.append(int(group[at]))
    return chosen


def _kinds(pixels: Pixels) -> _Kinds:
    height, width = (side // TILE * TILE for side in pixels.shape[:2])
    whole = Image.fromarray(pixels[:height, :width, 0] if pixels.shape[2] == 1 else pixels[:height, :width])
    small = np.asarray(whole.reduce(_SHRUNK).convert("YCbCr"), dtype=np.float64)
    luma, blue, red = (_tiles(small[:, :, channel]) for channel in range(3))
    across, down = np.abs(np.diff(luma, axis=2)), np.abs(np.diff(luma, axis=1))
    detail = across.mean((1, 2)) + down.mean((1, 2))
    # Text: few places are neither flat nor an edge.
    hard, soft = (np.stack([np.mean(d > least, (1, 2)) for d in (across, down)]).mean(0) for least in (48, 8))
    # Skin of any complexion lies in one range of chroma (Chai and Ngan, 1999).
    skin = ((blue >= 77) & (blue <= 127) & (red >= 133) & (red <= 173)).mean((1, 2))
    colour = np.hypot(blue - 128, red - 128).mean((1, 2))
    return _Kinds(detail, hard / (soft + 0.01), skin, colour)


def _tiles(plane: Values) -> Values:
    """H×W → tiles × side × side, row by row."""
    side = TILE // _SHRUNK
    rows, columns = plane.shape[0] // side, plane.shape[1] // side
    return plane.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
