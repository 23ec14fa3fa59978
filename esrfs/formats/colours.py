"""Pictures of few colours: which of them stands for each pixel."""

from __future__ import annotations

import numpy as np
from PIL import Image

from esrfs.formats.view import Pixels


def numbered(image: Image.Image, colours: Pixels, dither: bool) -> Pixels:
    """Height × width: for each pixel of ``image`` (L or RGB) the number of a colour.

    ``colours``: 1 to 256 of them × 4, RGB and alpha, at least one of them opaque; only opaque ones are chosen.
    ``dither``: with error diffusion.
    """
    choice = np.flatnonzero(colours[:, 3] == 255)
    choice = np.concatenate((choice, np.repeat(choice[:1], 256 - len(choice))))
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours[choice, :3].tobytes())
    way = Image.Dither.FLOYDSTEINBERG if dither else Image.Dither.NONE
    numbers: Pixels = choice.astype(np.uint8)[np.asarray(image.convert("RGB").quantize(palette=palette, dither=way))]
    return numbers


def all_gray(colours: Pixels) -> bool:
    """Whether red, green and blue are the same in each colour."""
    return bool((colours[:, :1] == colours[:, 1:3]).all())
