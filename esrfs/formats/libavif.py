"""libavif, called as a C library: AVIF of 10 bits a sample.

With 10 bits AV1 takes fewer bytes for a picture of 8 bits at the same score, since nothing on its way is rounded to
shades that it has not: 1 to 11 % (docs/evaluation.md). Pillow's AVIF encoder knows 8 bits only, and imagecodecs' no
options of libaom (``tune``). But imagecodecs' extension is linked with a libavif that has both, so its functions are
called here through that extension.

libavif keeps its structures' beginnings as they are within a major version ("may be extended in a future release",
avif.h), and its soname says so. Where there is another libavif, or none that codes 10 bits with the tuning that is
wanted, ``is_available`` is false.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

import imagecodecs
import numpy as np

from esrfs.formats.view import Samples

BITS = 10
MOST = 2**BITS - 1
_MAJOR = b"1."
_PIXEL_FORMATS = {"4:4:4": 1, "4:2:0": 3, "4:0:0": 4}
_DECODER_THREADS = 2
_ROWS = 64
"""Converted at once, so that they stay in the processor's cache."""
_OUT_OF_MEMORY = 26  # AVIF_RESULT_OUT_OF_MEMORY
_AOM = 1  # AVIF_CODEC_CHOICE_AOM
_ALL_PLANES = 1  # AVIF_PLANES_YUV
_FULL_RANGE = 1
_RGB = 0  # AVIF_RGB_FORMAT_RGB
_BT709, _SRGB, _BT601 = 1, 13, 6
"""Primaries, transfer and matrix, as Pillow writes them (ISO/IEC 23091-2)."""


class _Data(ctypes.Structure):
    _fields_ = (("data", POINTER(c_uint8)), ("size", c_size_t))


class _Image(ctypes.Structure):
    """The beginning of ``avifImage``."""

    _fields_ = (
        ("width", c_uint32),
        ("height", c_uint32),
        ("depth", c_uint32),
        ("yuv_format", c_int),
        ("yuv_range", c_int),
        ("chroma_position", c_int),
        ("planes", c_void_p * 3),
        ("row_bytes", c_uint32 * 3),
        ("owns_planes", c_int),
        ("alpha", c_void_p),
        ("alpha_row_bytes", c_uint32),
        ("owns_alpha", c_int),
        ("alpha_premultiplied", c_int),
        ("icc", _Data),
        ("primaries", c_uint16),
        ("transfer", c_uint16),
        ("matrix", c_uint16),
    )


class _Rgb(ctypes.Structure):
    """``avifRGBImage``, with room for what a later version adds."""

    _fields_ = (
        ("width", c_uint32),
        ("height", c_uint32),
        ("depth", c_uint32),
        ("format", c_int),
        ("chroma_upsampling", c_int),
        ("chroma_downsampling", c_int),
        ("avoid_libyuv", c_int),
        ("ignore_alpha", c_int),
        ("alpha_premultiplied", c_int),
        ("is_float", c_int),
        ("max_threads", c_int),
        ("pixels", c_void_p),
        ("row_bytes", c_uint32),
        ("later", c_uint8 * 256),
    )


class _Encoder(ctypes.Structure):
    """The beginning of ``avifEncoder``."""

    _fields_ = (
        ("codec", c_int),
        ("max_threads", c_int),
        ("speed", c_int),
        ("keyframe_interval", c_int),
        ("timescale", c_uint64),
        ("repetitions", c_int),
        ("layers", c_uint32),
        ("quality", c_int),
    )


@functools.cache
def is_available(options: tuple[tuple[str, str], ...] = ()) -> bool:
    """Whether this libavif codes 10 bits with these options of libaom: it is tried."""
    gray = np.zeros((16, 16, 3), np.uint8)
    try:
        encode(gray, quality=50, speed=10, subsampling="4:4:4", threads=1, options=dict(options))
    except OSError:
        return False
    return True


def version() -> str:
    """Of this libavif; empty if there is none."""
    library = _library()
    return library.avifVersion().decode() if library is not None else ""


def encode(
    pixels: Samples, *, quality: int, speed: int, subsampling: str, threads: int, options: Mapping[str, str]
) -> bytes:
    """An AVIF of 10 bits a sample. ``pixels``: height × width × 3 (RGB) or × 1, bytes or 16 bits; ``quality``: 0 to
    99; ``speed``: libaom's, 0 to 10; ``options``: libaom's. Colours come back rounded, not cut. Raises OSError,
    MemoryError."""
    library = _library()
    if library is None:
        raise OSError("there is no libavif here that codes 10 bits")
    pixels = np.ascontiguousarray(pixels)
    height, width, channels = pixels.shape
    image = library.avifImageCreate(width, height, BITS, _PIXEL_FORMATS["4:0:0" if channels == 1 else subsampling])
    encoder = library.avifEncoderCreate()
    coded = _Data()
    try:
        if not image or not encoder:
            raise MemoryError
        described = image.contents
        described.yuv_range = _FULL_RANGE
        described.primaries, described.transfer, described.matrix = _BT709, _SRGB, _BT601
        (_set_gray if channels == 1 else _set_colour)(library, image, pixels)
        settings = encoder.contents
        settings.codec, settings.max_threads, settings.speed, settings.quality = _AOM, threads, speed, quality
        for name, value in options.items():
            _check(library, library.avifEncoderSetCodecSpecificOption(encoder, name.encode(), value.encode()))
        _check(library, library.avifEncoderWrite(encoder, image, ctypes.byref(coded)))
        return ctypes.string_at(coded.data, coded.size)
    finally:
        library.avifRWDataFree(ctypes.byref(coded))
        if encoder:
            library.avifEncoderDestroy(encoder)
        if image:
            library.avifImageDestroy(image)


def _set_colour(library: Any, image: Any, pixels: Samples) -> None:
    rgb = _Rgb()
    library.avifRGBImageSetDefaults(ctypes.byref(rgb), image)
    rgb.depth, rgb.format = pixels.itemsize * 8, _RGB
    rgb.pixels, rgb.row_bytes = pixels.ctypes.data, pixels.strides[0]
    _check(library, library.avifImageRGBToYUV(image, ctypes.byref(rgb)))


def _set_gray(library: Any, image: Any, pixels: Samples) -> None:
    _check(library, library.avifImageAllocatePlanes(image, _ALL_PLANES))
    height, width = pixels.shape[:2]
    stride = image.contents.row_bytes[0] // 2
    raw = (c_uint16 * (stride * height)).from_address(image.contents.planes[0])
    plane = np.frombuffer(raw, np.uint16).reshape(height, stride)
    most = np.iinfo(pixels.dtype).max
    for row in range(height):
        plane[row, :width] = (pixels[row, :, 0].astype(np.uint32) * MOST + most // 2) // most


def _check(library: Any, result: int) -> None:
    if result == _OUT_OF_MEMORY:
        raise MemoryError
    if result:
        raise OSError(f"libavif: {library.avifResultToString(result).decode()}")


def decode(avif: bytes) -> Samples:
    """The picture of an AVIF of 10 bits: 16 bits, height × width × 3 or × 1. Whose pixels are more than may be, the
    caller has found out. Raises OSError for a damaged one, ImportError where imagecodecs was built without AVIF."""
    try:
        samples = imagecodecs.avif_decode(avif, numthreads=_DECODER_THREADS)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"libavif: {error}") from error
    if samples.dtype != np.uint16 or samples.max(initial=0) > MOST:
        raise OSError("it is not of 10 bits")
    samples = samples.reshape(*samples.shape[:2], -1)
    for top in range(0, len(samples), _ROWS):
        rows = samples[top : top + _ROWS]
        rows[:] = rows << (16 - BITS) | rows >> (2 * BITS - 16)  # 1,023 becomes 65,535
    return samples


@functools.cache
def _library() -> Any:
    """None where there is none of this major version."""
    try:
        from imagecodecs import _avif  # noqa: PLC0415 (a build of imagecodecs may lack it)

        library = ctypes.CDLL(_avif.__file__)
        library.avifVersion.restype = c_char_p
        if not library.avifVersion().startswith(_MAJOR):
            return None
        image, encoder = POINTER(_Image), POINTER(_Encoder)
        library.avifResultToString.restype = c_char_p
        library.avifImageCreate.restype = image
        library.avifImageCreate.argtypes = (c_uint32, c_uint32, c_uint32, c_int)
        library.avifImageDestroy.argtypes = (image,)
        library.avifImageAllocatePlanes.argtypes = (image, c_int)
        library.avifRGBImageSetDefaults.argtypes = (c_void_p, image)
        library.avifImageRGBToYUV.argtypes = (image, c_void_p)
        library.avifEncoderCreate.restype = encoder
        library.avifEncoderDestroy.argtypes = (encoder,)
        library.avifEncoderSetCodecSpecificOption.argtypes = (encoder, c_char_p, c_char_p)
        library.avifEncoderWrite.argtypes = (encoder, image, c_void_p)
        library.avifRWDataFree.argtypes = (c_void_p,)
    except (ImportError, OSError, AttributeError):
        return None
    return library
