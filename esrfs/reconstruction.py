"""Reconstruction: blob → view. Decode the small picture, enlarge it with the recipe's network, encode it as the recipe
pins.

Compaction calls ``enlarge`` too, so that what the gate measures is what readers get.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from esrfs import formats
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import JpegXlCoding, Recipe, Verbatim
from esrfs.formats import cells, jpegxl, kinds
from esrfs.formats.samples import as_bytes
from esrfs.formats.view import Pixels, Samples

Infer = Callable[[bytes, Samples], Pixels]
"""(sha256 of a network's file, H×W×3 RGB) → (H·s)×(W·s)×3 bytes, s being the network's scale."""

_BLOCK = 32
"""Pixels of the small picture along the side of a block in which it is compared with the rebuilt one."""
_BAND_ROWS = 256
_UNLIKE = 40.0
"""Mean difference (of 255) in one block from which on a rebuilt picture is taken for a failure of the hardware."""


class ReconstructionError(Exception):
    """The blob can't be rebuilt; the message says why, for people."""


class ImplausibleError(ReconstructionError):
    """The rebuilt picture doesn't resemble the blob's: an accelerator's overflow or memory error (DESIGN 9)."""


@dataclass(frozen=True)
class Plan:
    """How a small picture becomes a large one."""

    width: int
    """Of the result, in pixels."""
    height: int
    scale: int
    """The small picture has ceil(width / scale) × ceil(height / scale) pixels."""
    network_sha256: bytes
    """Of the network that enlarges; empty only at scale 1: the picture is taken as it is."""
    gray: bool


def rebuild(recipe: Recipe, avif: bytes, infer: Infer) -> bytes:
    """The whole view, of exactly ``recipe.original_size`` bytes. Whether it is the very one that the recipe pins tells
    its sha256.

    Raises ReconstructionError, ImplausibleError, and what ``infer`` raises.
    """
    try:
        recipe = recipe_format.unfolded(recipe, avif)
    except ValueError as error:
        raise ReconstructionError(str(error)) from error
    if isinstance(recipe.coding, Verbatim):
        return recipe_format.expand(recipe.prefix) + recipe_format.expand(recipe.suffix)
    if isinstance(recipe.coding, JpegXlCoding):
        return _turned_back(recipe, recipe.coding, avif)
    plan = Plan(
        width=recipe.width,
        height=recipe.height,
        scale=recipe.scale,
        network_sha256=recipe.network_sha256,
        gray=recipe.coding.mode in ("L", "LA"),
    )
    pixels = enlarge(plan, decode_small(plan, avif), infer)
    try:
        scan = formats.encode_scan(recipe.coding, recipe.width, recipe.height, pixels, recipe.scan_length)
    except (formats.DoesNotFit, ValueError) as error:
        kind = kinds.COMPACTED[recipe_format.kind_of(recipe.coding)]
        raise ReconstructionError(
            f"the rebuilt picture can't be written as the {kind} that was promised: {error}"
        ) from error
    del pixels
    return b"".join((recipe_format.expand(recipe.prefix), scan, recipe_format.expand(recipe.suffix)))


def _turned_back(recipe: Recipe, coding: JpegXlCoding, picture: bytes) -> bytes:
    """The original, out of the JPEG XL that holds it. Never another: raises ReconstructionError."""
    try:
        scan = jpegxl.scan(picture, recipe.scan_length, coding.behind)
    except ValueError as error:
        raise ReconstructionError(str(error)) from error
    view = b"".join((recipe_format.expand(recipe.prefix), scan, recipe_format.expand(recipe.suffix)))
    if hashlib.sha256(view).digest() != recipe.sha256_view:
        raise ReconstructionError("the JPEG XL was turned into another JPEG than the one that it was made of")
    return view


def decode_small(plan: Plan, avif: bytes) -> Samples:
    """The blob's picture, h×w×3 RGB, h×w×1 for gray; of 16 bits if it has more than 8, and a network is to see it.
    Raises ReconstructionError if it is damaged or not of the size that ``plan`` says."""
    height, width = math.ceil(plan.height / plan.scale), math.ceil(plan.width / plan.scale)
    try:
        pixels = cells.decode(avif, width, height, deep=bool(plan.network_sha256))
    except formats.Unsupported as error:
        raise ReconstructionError(f"the blob's picture can't be decoded: {error.message}") from error
    if pixels.shape == (height, width, 3) and plan.gray:  # An older Pillow decodes gray to RGB.
        pixels = _gray(as_bytes(pixels))
    expected = (height, width, 1 if plan.gray else 3)
    if pixels.shape != expected:
        raise ReconstructionError(f"the blob's picture is of {pixels.shape}, and the recipe says {expected}")
    return pixels


def enlarge(plan: Plan, small: Samples, infer: Infer) -> Pixels:
    """``small`` (h×w×3, ×1 for gray) enlarged to exactly height × width × 3, × 1 for gray.

    Raises ReconstructionError if the network is not of the plan's scale, ImplausibleError.
    """
    if plan.network_sha256:
        colour = np.broadcast_to(small, (*small.shape[:2], 3))  # tiles are copied one by one
        large = infer(plan.network_sha256, colour)
        if large.shape != (small.shape[0] * plan.scale, small.shape[1] * plan.scale, 3):
            raise ReconstructionError(f"the network made {large.shape} of {small.shape} at scale {plan.scale}")
        _check_resemblance(colour, large, plan.scale)
        if plan.gray:
            large = _gray(large)
    elif plan.scale == 1:
        large = as_bytes(small)
    else:
        raise ReconstructionError(f"the recipe names no network for scale {plan.scale}")
    return large[: plan.height, : plan.width]


def _gray(pixels: Pixels) -> Pixels:
    """H×W×3 → H×W×1, luma."""
    height, width = pixels.shape[:2]
    result = np.empty((height, width, 1), dtype=np.uint8)
    for top in range(0, height, _BAND_ROWS):
        rows = np.ascontiguousarray(pixels[top : top + _BAND_ROWS])
        result[top : top + _BAND_ROWS, :, 0] = np.asarray(Image.fromarray(rows).convert("L"))
    return result


def _check_resemblance(small: Samples, large: Pixels, scale: int) -> None:
    """Compare block means: a network changes edges and texture, an overflow makes blocks black."""
    difference = max(
        float(np.abs(expected - found).max())
        for expected, found in zip(_block_means(small, _BLOCK), _block_means(large, _BLOCK * scale), strict=True)
    )
    if difference > _UNLIKE:
        raise ImplausibleError(
            f"the rebuilt picture doesn't resemble the blob's: one part is off by {difference:.0f} of 255; "
            "the hardware that runs the network is to be suspected"
        )


def _block_means(pixels: Samples, block: int) -> Iterator[npt.NDArray[np.float64]]:
    """Of whole blocks (a few pixels at an edge may well change), row by row; of a picture smaller than a block, all in
    one."""
    height, width = (max(side // block * block, min(side, block)) for side in pixels.shape[:2])
    for top in range(0, height, block):
        rows = as_bytes(np.ascontiguousarray(pixels[top : min(top + block, height), :width]))
        yield np.asarray(Image.fromarray(rows).reduce(block), dtype=np.float64)
