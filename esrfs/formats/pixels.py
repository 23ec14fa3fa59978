"""Pixels in and out of Pillow, with limits.

Pillow's own limit (a warning, then an error, by a global) is switched off: every picture's dimensions are checked here
before anything is decoded.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFilter, UnidentifiedImageError

from esrfs.compaction.outcome import Reason
from esrfs.formats.identify import identify
from esrfs.formats.tiff_parse import upright
from esrfs.formats.view import Pixels, Unsupported

Image.MAX_IMAGE_PIXELS = None

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM", "JPEG2000", "QOI", "TGA", "PSD")
_PLAIN_MODES = ("L", "LA", "RGB", "RGBA")
_SOFTENING_PIXELS = (0.35, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2, 3.0)
"""Radii of the low-pass, in pixels, that a reconstruction may be given to fit."""

_BAND_ROWS = 256
_BLURRED_ROWS, _BLUR_REACHES = 512, 16
"""Rows that are blurred at once, and how far a blur of the largest radius reaches, at most: 3 passes of 4."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes pixels upright, by EXIF's orientation."""

DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    RuntimeError,
)
"""What Pillow raises for broken files (MemoryError aside)."""


def check_dimensions(width: int, height: int, max_megapixels: float, kind: str) -> None:
    """Raises Unsupported (TOO_LARGE) for more than ``max_megapixels`` × 1,000,000 pixels, BROKEN for none."""
    if width < 1 or height < 1:
        raise Unsupported(Reason.BROKEN, f"the header says {width} × {height} pixels", kind)
    if width * height > round(max_megapixels * 1e6):  # the limit may be a picture's own size, divided
        message = f"{width} × {height} pixels are more than the limit of {max_megapixels:g} megapixels"
        raise Unsupported(Reason.TOO_LARGE, message, kind)


def decode(data: bytes, max_megapixels: float) -> Pixels:
    """See ``formats.decode``. JPEGs are decoded by simplejpeg, which gives what Pillow does, takes 3 bytes a pixel
    instead of 7, and looks at no metadata: Pillow reads no JPEG whose colour profile or JFIF header is cut."""
    kind = identify(data)
    if kind == "jpeg":
        with contextlib.suppress(ValueError):  # damaged: Pillow shows what there is
            return _jpeg(data, max_megapixels)
    if kind == "tiff":
        data = upright(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; only pixels are asked for here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                check_dimensions(*image.size, max_megapixels, kind or str(image.format).lower())
                if kind == "tiff":
                    image.getexif()[ExifTags.Base.Orientation] = 1  # it turns by what XMP says, too
                return as_array(_eight_bit(image))
    except UnidentifiedImageError as error:
        if kind:
            raise Unsupported(Reason.UNSUPPORTED_KIND, f"this {kind} file can't be decoded here", kind) from error
        raise Unsupported(Reason.NOT_A_PICTURE, "this is no picture that can be decoded here", kind) from error
    except DECODE_ERRORS as error:
        raise Unsupported(Reason.BROKEN, f"the picture is damaged: {error}", kind) from error


def check_header(data: bytes, max_megapixels: float) -> None:
    """Raises Unsupported for a picture whose header says that it has more pixels, or that Pillow finds none in."""
    kind = identify(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                check_dimensions(*image.size, max_megapixels, kind)
    except DECODE_ERRORS as error:
        raise Unsupported(Reason.BROKEN, f"the picture is damaged: {error}", kind) from error


def shown_as(data: bytes) -> tuple[int, bytes]:
    """What else tells how a picture looks that ``decode`` reads: EXIF's orientation (1: as stored) and its ICC profile
    (empty: none)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return image.getexif().get(ExifTags.Base.Orientation, 1), image.info.get("icc_profile") or b""
    except DECODE_ERRORS:
        return 1, b""


def upright_image(image: Image.Image, orientation: int) -> Image.Image:
    """``image`` as it is to be seen whose pixels are stored in this EXIF orientation."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _jpeg(data: bytes, max_megapixels: float) -> Pixels:
    """Raises ValueError for what Pillow is to look at: CMYK, damaged files."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("Gray", "RGB", "YCbCr"):
        raise ValueError(colours)
    check_dimensions(width, height, max_megapixels, "jpeg")
    pixels: Pixels = simplejpeg.decode_jpeg(data, "GRAY" if colours == "Gray" else "RGB", strict=True)
    return pixels


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in _PLAIN_MODES and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.asarray(image.convert("I"), dtype=np.int64)
        return Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return image.convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def as_array(image: Image.Image) -> Pixels:
    """uint8, height × width × channels."""
    image.load()
    array = np.empty((image.height, image.width, len(image.getbands())), dtype=np.uint8)
    for top, rows in bands(image):
        array[top : top + len(rows)] = rows
    return array


def bands(image: Image.Image) -> Iterator[tuple[int, Pixels]]:
    """The rows of a picture, some at a time: the first one's number, and height × width × channels of uint8.

    Pillow makes an array of a whole picture by way of two copies of it as bytes.
    """
    for top in range(0, image.height, _BAND_ROWS):
        band = image.crop((0, top, image.width, min(top + _BAND_ROWS, image.height)))
        rows = np.asarray(band, dtype=np.uint8)
        yield top, rows.reshape(band.height, band.width, -1)


def give_memory_back() -> None:
    """Return what is free within the heap to the system, where the C library can. Pillow's large images are made of
    blocks from there, and leave holes that numpy's arrays don't fill."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def canvas(height: int, width: int) -> Pixels:
    """Room for a picture: height × width × 3, each pixel in 4 bytes as Pillow has them, so that it can become an
    image without a copy."""
    return np.empty((height, width, 4), dtype=np.uint8)[:, :, :3]


def as_image(pixels: Pixels, width: int, height: int, mode: str) -> Image.Image:
    """An image of ``mode`` (L or RGB) from uint8 height × width [× 1 to 4]; alpha is left out, gray and RGB are
    converted.

    Raises ValueError for pixels of another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[:2] != (height, width):
        raise ValueError(f"expected uint8 pixels of {height} × {width}, got {pixels.dtype} {pixels.shape}")
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels not in (1, 2, 3, 4):
        raise ValueError(f"expected 1 to 4 channels, got {channels}")
    if channels in (1, 2):
        image = Image.fromarray(np.ascontiguousarray(pixels.reshape(height, width, channels)[:, :, 0]))
    elif (owner := _canvas_of(pixels)) is not None:
        image = Image.frombuffer("RGBX", (width, height), owner, "raw", "RGBX", owner.strides[0], 1)
    else:
        image = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    return image if image.mode == mode else image.convert(mode)


def as_image_for_jpeg(pixels: Pixels, width: int, height: int, mode: str) -> Image.Image:
    """As ``as_image``; but a ``canvas`` becomes an image of mode RGBX that shares its memory. Pillow's JPEG encoder
    makes the same of it as of RGB."""
    owner = _canvas_of(pixels)
    if mode != "RGB" or owner is None or pixels.shape[:2] != (height, width):
        return as_image(pixels, width, height, mode)
    return Image.frombuffer("RGBX", (width, height), owner, "raw", "RGBX", owner.strides[0], 1)


def _canvas_of(pixels: Pixels) -> Pixels | None:
    """The whole canvas that ``pixels`` begin; None if they lie elsewhere, or otherwise."""
    owner = pixels.base
    if (
        isinstance(owner, np.ndarray)
        and owner.ndim == 3
        and owner.shape[2] == 4
        and owner.flags.c_contiguous
        and owner.dtype == np.uint8
        and pixels.strides == owner.strides
        and pixels.ctypes.data == owner.ctypes.data
    ):
        return owner
    return None


def blurred(image: Image.Image, radius: float, canvas: Image.Image | None = None) -> Image.Image:
    """``image`` after Pillow's Gaussian blur, in ``canvas`` (of its mode and size, overwritten) if there is one.

    In bands: Pillow takes two more copies of what it is given. Its blur adds up whole numbers and reaches but a few
    rows far, so the result is, bit for bit, that of the picture as a whole.
    """
    out = canvas or Image.new(image.mode, image.size)
    for top in range(0, image.height, _BLURRED_ROWS):
        above = min(top, _BLUR_REACHES)
        bottom = min(top + _BLURRED_ROWS, image.height)
        band = image.crop((0, top - above, image.width, min(bottom + _BLUR_REACHES, image.height)))
        band = band.filter(ImageFilter.GaussianBlur(radius))
        out.paste(band.crop((0, above, image.width, above + bottom - top)), (0, top))
    return out


def softened(image: Image.Image) -> Iterator[Image.Image]:
    """``image``, then ever softer versions of it: what to try until it fits. Each lasts until the next is asked for."""
    yield image
    canvas: Image.Image | None = None
    for radius in _SOFTENING_PIXELS:
        canvas = blurred(image, radius, canvas)
        yield canvas
