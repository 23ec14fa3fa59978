"""Damage of unknown kind, drawn at random: for networks that are to restore pictures that esrfs didn't make small.

Real-ESRGAN's second-order degradation (arXiv 2107.10833): blur, resizing, noise and JPEG, then all of it again with
milder settings, and a sinc filter at the end, which makes the ringing and overshoot of sharpened pictures. The ranges
are the paper's. esrfs's own networks don't need it: they know what was done to the picture.
"""

from __future__ import annotations

import io
import math

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]
Kernel = npt.NDArray[np.float64]

_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_KERNEL_SIZES = tuple(range(7, 22, 2))
_SHAPES = ("gaussian", "generalised", "plateau")
_SHAPE_SHARES = (0.70, 0.15, 0.15)
_ALIKE_SHARES = {"gaussian": 0.64, "generalised": 0.8, "plateau": 0.8}
"""How often a kernel of each shape is as wide as high."""
_JPEG = (30, 95)


class _Pass(msgspec.Struct, frozen=True):
    blurred: float
    """How often there is a blur at all."""
    sinc: float
    """How often the blur is a sinc filter."""
    sigma: tuple[float, float]
    larger: float
    smaller: float
    """How often it is resized to more or fewer pixels; else it keeps its size."""
    sizes: tuple[float, float]
    noise: tuple[float, float]
    """Standard deviation of Gaussian noise, in steps of 1/255."""
    grains: tuple[float, float]
    """Strength of Poisson noise."""


_FIRST = _Pass(1.0, 0.1, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
_SECOND = _Pass(0.8, 0.1, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))


def degrade(full: Pixels, scale: int, second_order: bool, rng: np.random.Generator) -> Pixels:
    """H×W×3 RGB → (H/scale)×(W/scale)×3; H and W multiples of ``scale``."""
    height, width = full.shape[:2]
    target = (height // scale, width // scale)
    picture: Floats = full.astype(np.float32) / 255
    picture = _jpeg(_once(picture, (height, width), _FIRST, rng), rng)
    if not second_order:
        return _bytes(_resize(picture, target, rng))
    picture = _once(picture, target, _SECOND, rng)
    # The last two steps in either order: JPEG of a filtered picture, and filters on JPEG's blocks, are both common.
    if rng.random() < 0.5:
        picture = _jpeg(_last_filter(_resize(picture, target, rng), rng), rng)
    else:
        picture = _last_filter(_resize(_jpeg(picture, rng), target, rng), rng)
    return _bytes(picture)


def _once(picture: Floats, size: tuple[int, int], how: _Pass, rng: np.random.Generator) -> Floats:
    """Blur, resizing to ``size`` (height, width) times a random factor, and noise."""
    if rng.random() < how.blurred:
        picture = filtered(picture, _blur_kernel(how, rng))
    draw = rng.random()
    low, high = how.sizes
    if draw < how.larger:
        factor = rng.uniform(1, high)
    elif draw < how.larger + how.smaller:
        factor = rng.uniform(low, 1)
    else:
        factor = 1.0
    picture = _resize(picture, (max(1, round(size[0] * factor)), max(1, round(size[1] * factor))), rng)
    return _noisy(picture, how, rng)


def _blur_kernel(how: _Pass, rng: np.random.Generator) -> Kernel:
    size = int(rng.choice(_KERNEL_SIZES))
    if rng.random() < how.sinc:
        return sinc_kernel(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    shape = str(rng.choice(_SHAPES, p=_SHAPE_SHARES))
    across = rng.uniform(*how.sigma)
    alike = rng.random() < _ALIKE_SHARES[shape]
    down = across if alike else rng.uniform(*how.sigma)
    angle = 0.0 if alike else rng.uniform(-math.pi, math.pi)
    # Around 1 as often below as above it, where the kernel is pointed and flat.
    limits = {"generalised": (0.5, 4.0), "plateau": (1.0, 2.0)}.get(shape, (1.0, 1.0))
    beta = rng.uniform(limits[0], 1) if rng.random() < 0.5 else rng.uniform(1, limits[1])
    return blur_kernel(size, across, down, angle, shape=shape, beta=beta)


def blur_kernel(
    size: int, across: float, down: float, angle: float, *, shape: str = "gaussian", beta: float = 1
) -> Kernel:
    """size×size, odd, sum 1. ``across`` and ``down`` are standard deviations before it turns by ``angle`` (radians).

    With r² the squared distance in units of them: ``gaussian`` is exp(-r²/2), ``generalised`` exp(-(r²)^beta / 2)
    (pointed below 1, flat above), ``plateau`` 1 / (1 + (r²)^beta).
    """
    radius = size // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    u = (x * math.cos(angle) + y * math.sin(angle)) / across
    v = (y * math.cos(angle) - x * math.sin(angle)) / down
    distance = u * u + v * v
    if shape == "plateau":
        kernel: Kernel = 1 / (1 + distance**beta)
    else:
        kernel = np.exp(-0.5 * distance ** (beta if shape == "generalised" else 1))
    normalised: Kernel = kernel / kernel.sum()
    return normalised


def sinc_kernel(size: int, cutoff: float) -> Kernel:
    """The ideal round low-pass filter, cut to size×size (which is what rings), sum 1. ``cutoff``: radians a pixel."""
    radius = size // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    distance = np.hypot(x, y)
    distance[radius, radius] = 1
    bessel = torch.special.bessel_j1(torch.from_numpy(cutoff * distance)).numpy()
    kernel: Kernel = cutoff * bessel / (2 * math.pi * distance)
    kernel[radius, radius] = cutoff**2 / (4 * math.pi)
    normalised: Kernel = kernel / kernel.sum()
    return normalised


def filtered(picture: Floats, kernel: Kernel) -> Floats:
    """H×W×3 → the same; the picture continues as its mirror image."""
    radius = kernel.shape[0] // 2
    padded = np.pad(picture, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    planes = torch.from_numpy(padded).permute(2, 0, 1)[:, None]
    weights = torch.from_numpy(kernel.astype(np.float32))[None, None]
    result: Floats = F.conv2d(planes, weights)[:, 0].permute(1, 2, 0).contiguous().numpy()
    return result


def _last_filter(picture: Floats, rng: np.random.Generator) -> Floats:
    if rng.random() >= 0.8:
        return picture
    return filtered(picture, sinc_kernel(int(rng.choice(_KERNEL_SIZES)), rng.uniform(math.pi / 3, math.pi)))


def _resize(picture: Floats, size: tuple[int, int], rng: np.random.Generator) -> Floats:
    """To ``size`` (height, width), by a random filter."""
    method = _FILTERS[int(rng.integers(len(_FILTERS)))]
    if picture.shape[:2] == size:
        return picture
    planes = [
        Image.fromarray(np.ascontiguousarray(picture[:, :, channel])).resize(size[::-1], method) for channel in range(3)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def _noisy(picture: Floats, how: _Pass, rng: np.random.Generator) -> Floats:
    """Gaussian noise or Poisson's, each as often; the same in all channels in two of five pictures."""
    gray = rng.random() < 0.4
    shape = (*picture.shape[:2], 1) if gray else picture.shape
    if rng.random() < 0.5:
        noise = rng.normal(0, rng.uniform(*how.noise) / 255, shape)
    else:
        light = np.clip(picture, 0, 1)
        light = light @ np.array([[0.299], [0.587], [0.114]]) if gray else light
        # As many photons for full brightness as the picture has shades, to the next power of two.
        photons = 2.0 ** math.ceil(math.log2(max(2, len(np.unique((light * 255).round())))))
        noise = (rng.poisson(light * photons) / photons - light) * rng.uniform(*how.grains)
    noisy: Floats = np.clip(picture + noise, 0, 1).astype(np.float32)
    return noisy


def _jpeg(picture: Floats, rng: np.random.Generator) -> Floats:
    buffer = io.BytesIO()
    Image.fromarray(_bytes(picture)).save(buffer, "JPEG", quality=int(rng.integers(_JPEG[0], _JPEG[1] + 1)))
    with Image.open(buffer) as coded:
        result: Floats = np.asarray(coded).astype(np.float32) / 255
    return result


def _bytes(picture: Floats) -> Pixels:
    pixels: Pixels = (picture * 255).round().clip(0, 255).astype(np.uint8)
    return pixels
