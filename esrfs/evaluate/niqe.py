"""NIQE: how unnatural a picture looks, without knowing its original. Smaller is better; photographs lie at about 2 to
5.

Mittal, Soundararajan, Bovik, "Making a 'completely blind' image quality analyzer", IEEE Signal Processing Letters
20(3), 2013: the luma, divided by its local contrast, follows a generalised Gaussian in natural pictures. Its
parameters and those of the products of neighbours (18 at each of two resolutions, for each 96×96 patch) are compared
with those of pristine photographs, as the Mahalanobis distance between two Gaussians.

The authors' model is not used: the copies that packages carry come without a licence of their own. ``niqe-model.npz``
was made with ``python -m esrfs.evaluate.niqe ../shared/data/train/a ../shared/data/train/b`` from our training
photographs (Unsplash and Creative Commons licences; only these 702 numbers are kept). So values compare pictures here
with each other, and not with published ones.

Don't optimise for it: it likes sharpness and noise, also where the original had none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import scipy.special
from PIL import Image

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

PATCH = 96
"""Pixels along a patch's side at full resolution; half of that at half."""
_FEWEST_PATCHES = 4
_SHARP = 0.75
"""The model is made of patches with at least this share of the contrast of their picture's best one."""
_MODEL = Path(__file__).with_name("niqe-model.npz")

_OFFSETS = np.arange(-3, 4)
_WINDOW = np.exp(-0.5 * (_OFFSETS / (7 / 6)) ** 2)
_WINDOW /= _WINDOW.sum()

_SHAPES = np.arange(0.2, 10.001, 0.001)
"""Shape parameters that are tried (2: Gaussian, 1: Laplacian)."""
_RATIOS = scipy.special.gamma(2 / _SHAPES) ** 2 / (scipy.special.gamma(1 / _SHAPES) * scipy.special.gamma(3 / _SHAPES))
"""(E|x|)² / E(x²) of a generalised Gaussian of that shape; grows with it."""


def niqe(pixels: Pixels) -> float | None:
    """Of an H×W×3 RGB picture; None for one with fewer than 4 whole patches."""
    measured, _ = features(_luma(pixels))
    if len(measured) < _FEWEST_PATCHES:
        return None
    mean, covariance = _model()
    difference = measured.mean(axis=0) - mean
    together = (covariance + np.cov(measured, rowvar=False)) / 2
    return float(np.sqrt(difference @ np.linalg.pinv(together) @ difference))


def features(luma: Floats) -> tuple[Floats, Floats]:
    """(patches × 36 parameters, contrast of each patch) of an H×W luma, 0 to 255. Rows and columns beyond the last
    whole patch don't count."""
    rows, columns = luma.shape[0] // PATCH, luma.shape[1] // PATCH
    if not rows or not columns:
        return np.empty((0, 36)), np.empty(0)
    luma = luma[: rows * PATCH, : columns * PATCH]
    normal, contrast = _normalised(luma)
    whole = Image.fromarray(luma.astype(np.float32))
    half = np.asarray(whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BICUBIC), dtype=np.float64)
    fine = _parameters(_patches(normal, PATCH))
    coarse = _parameters(_patches(_normalised(half)[0], PATCH // 2))
    return np.hstack((fine, coarse)), _patches(contrast, PATCH).mean(axis=(1, 2))


def make_model(pictures: Sequence[Pixels]) -> tuple[Floats, Floats]:
    """Mean and covariance of the parameters of sharp patches in pristine photographs."""
    kept = []
    for pixels in pictures:
        measured, contrast = features(_luma(pixels))
        if len(measured):
            kept.append(measured[contrast > _SHARP * contrast.max()])
    together = np.concatenate(kept)
    return together.mean(axis=0), np.cov(together, rowvar=False)


def _luma(pixels: Pixels) -> Floats:
    return np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float64)


def _normalised(luma: Floats) -> tuple[Floats, Floats]:
    """The luma less its local mean, divided by its local contrast (+ 1); and the contrast."""
    mean = _blur(luma)
    contrast = np.sqrt(np.abs(_blur(luma**2) - mean**2))
    return (luma - mean) / (contrast + 1), contrast


def _blur(plane: Floats) -> Floats:
    down = scipy.ndimage.correlate1d(plane, _WINDOW, axis=0, mode="nearest")
    result: Floats = scipy.ndimage.correlate1d(down, _WINDOW, axis=1, mode="nearest")
    return result


def _patches(plane: Floats, side: int) -> Floats:
    rows, columns = plane.shape[0] // side, plane.shape[1] // side
    return plane.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side, side)


def _parameters(patches: Floats) -> Floats:
    """patches × 18: shape and mean width of the patch itself; shape, mean, left and right width of each product."""
    shape, _, left, right = _asymmetric_gaussian(patches)
    found = [shape, (left + right) / 2]
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        found += _asymmetric_gaussian(patches * np.roll(patches, (down, across), axis=(1, 2)))
    return np.stack(found, axis=1)


def _asymmetric_gaussian(patches: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Shape, mean, left and right width of the asymmetric generalised Gaussian that fits each patch's values, by
    moments (Lasmar, Stitou, Berthoumieu, 2009). A patch without contrast gets widths of 0."""
    values = patches.reshape(len(patches), -1)
    squares = values**2
    below = values < 0
    left = np.sqrt((squares * below).sum(axis=1) / np.maximum(below.sum(axis=1), 1))
    right = np.sqrt((squares * ~below).sum(axis=1) / np.maximum((~below).sum(axis=1), 1))
    balance = left / np.maximum(right, 1e-12)
    ratio = np.abs(values).mean(axis=1) ** 2 / np.maximum(squares.mean(axis=1), 1e-12)
    ratio *= (balance**3 + 1) * (balance + 1) / (balance**2 + 1) ** 2
    above = np.clip(np.searchsorted(_RATIOS, ratio), 1, len(_RATIOS) - 1)
    shape = _SHAPES[above - (ratio - _RATIOS[above - 1] < _RATIOS[above] - ratio)]
    first, second, third = (scipy.special.gamma(number / shape) for number in (1, 2, 3))
    width = np.sqrt(first / third)
    return shape, width * (right - left) * second / first, width * left, width * right


@functools.cache
def _model() -> tuple[Floats, Floats]:
    with np.load(_MODEL, allow_pickle=False) as stored:
        mean, upper = stored["mean"], stored["upper"]
    covariance = np.zeros((len(mean), len(mean)))
    covariance[np.triu_indices(len(mean))] = upper
    return mean, covariance + np.triu(covariance, 1).T


def _main(folders: Sequence[str]) -> None:
    paths = sorted(path for folder in folders for path in Path(folder).glob("*.jpg"))
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    mean, covariance = make_model(pictures)
    np.savez_compressed(_MODEL, mean=mean, upper=covariance[np.triu_indices(len(mean))])
    print(f"{_MODEL}: made from {len(pictures)} photographs")


if __name__ == "__main__":
    _main(sys.argv[1:])
