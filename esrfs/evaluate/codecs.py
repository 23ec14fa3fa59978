"""The codecs that are compared, each with settings of its own that say "with care, and in bearable time".

They are fixed here, apart from what compaction uses, so that results of different versions of esrfs can be compared.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import imagecodecs
import numpy as np
from PIL import Image, features

from esrfs.formats import libavif
from esrfs.formats.view import Pixels, Samples


class CodecMissingError(Exception):
    """For people: which codec can't be used here, and what to do."""


@dataclass(frozen=True)
class Codec:
    name: str
    settings: str
    """What else the bytes depend on; part of a result's key."""
    qualities: tuple[int, ...]
    """From coarse to fine; what is tried unless others are asked for."""
    small_qualities: tuple[int, ...]
    """The same for pictures that were shrunk: as growing enlarges the codec's noise too, they need finer ones."""
    encode: Callable[[Pixels, int], bytes]
    """H×W×3 RGB and a quality of 1 to 100 → a file."""
    decode: Callable[[bytes], Samples]
    """Bytes, or what there is more of them."""


NAMES = ("jpeg", "webp", "avif", "avif10", "jxl")
LABELS = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "avif10": "AVIF of 10 bits", "jxl": "JPEG XL"}
_BEST_OF_AOM = (("tune", "ssimulacra2"),)
_AVIF_QUALITIES = (25, 32, 40, 48, 56, 65, 75, 85, 92), (38, 50, 62, 72, 82, 90, 96)
_JXL_EFFORT = 7
_AVIF_SPEED = 6
_WEBP_METHOD = 5


def load(name: str) -> Codec:
    """Raises CodecMissingError when this Pillow was built without it, or a package is not installed."""
    match name:
        case "jpeg":
            version = features.version("libjpeg_turbo") or features.version("jpg")
            settings = f"libjpeg {version}, 4:2:0, progressive, optimised"
            return Codec(
                name,
                settings,
                (20, 30, 40, 50, 60, 72, 84, 91, 95),
                (40, 60, 75, 85, 91, 95, 98),
                _encode_jpeg,
                _decode,
            )
        case "webp":
            _require(name, "webp")
            settings = f"libwebp {features.version('webp')}, method {_WEBP_METHOD}"
            return Codec(
                name,
                settings,
                (12, 22, 35, 50, 62, 75, 85, 92, 97),
                (35, 55, 72, 82, 90, 95, 99),
                _encode_webp,
                _decode,
            )
        case "avif":
            _require(name, "avif")
            tuning = _avif_tuning() or "default tune"
            settings = f"libavif {features.version('avif')}, aom, speed {_AVIF_SPEED}, 4:4:4, {tuning}"
            return Codec(
                name,
                settings,
                *_AVIF_QUALITIES,
                _encode_avif,
                _decode,
            )
        case "avif10":
            if not libavif.is_available(_BEST_OF_AOM):
                message = "this imagecodecs has no libavif that codes 10 bits; one from PyPI has it: "
                raise CodecMissingError(f"{message}pip install -U imagecodecs")
            settings = f"libavif {libavif.version()}, aom, speed {_AVIF_SPEED}, 4:4:4, {'='.join(*_BEST_OF_AOM)}"
            return Codec(
                name,
                settings,
                *_AVIF_QUALITIES,
                _encode_avif10,
                libavif.decode,
            )
        case "jxl":
            if not imagecodecs.JPEGXL.available:
                message = "this imagecodecs was built without JPEG XL; one from PyPI has it: pip install -U imagecodecs"
                raise CodecMissingError(message)
            settings = f"{imagecodecs.jpegxl_version()}, effort {_JXL_EFFORT}"
            return Codec(
                name,
                settings,
                (25, 38, 48, 57, 65, 75, 83, 90, 95),
                (40, 55, 68, 78, 87, 93, 97),
                _encode_jxl,
                _decode_jxl,
            )
    raise CodecMissingError(f"there is no codec {name!r}; there are {', '.join(NAMES)}")


def _require(name: str, feature: str) -> None:
    if not features.check(feature):
        raise CodecMissingError(f"this Pillow was built without {name}; one from PyPI has it: pip install -U pillow")


def _encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    return _saved(pixels, "JPEG", quality=quality, subsampling="4:2:0", progressive=True, optimize=True)


def _encode_webp(pixels: Pixels, quality: int) -> bytes:
    return _saved(pixels, "WEBP", quality=quality, method=_WEBP_METHOD)


def _encode_avif(pixels: Pixels, quality: int) -> bytes:
    tuning = _avif_tuning()
    return _saved(
        pixels,
        "AVIF",
        quality=quality,
        speed=_AVIF_SPEED,
        subsampling="4:4:4",
        codec="aom",
        max_threads=1,  # several give other bytes
        autotiling=False,
        advanced=dict([tuning.split("=")]) if tuning else {},
    )


@functools.cache
def _avif_tuning() -> str:
    """The best that this libaom knows; empty for its default."""
    try:
        _saved(np.zeros((16, 16, 3), np.uint8), "AVIF", codec="aom", max_threads=1, advanced=dict(_BEST_OF_AOM))
    except (OSError, ValueError):
        return ""
    return "=".join(*_BEST_OF_AOM)


def _encode_avif10(pixels: Pixels, quality: int) -> bytes:
    return libavif.encode(
        pixels, quality=quality, speed=_AVIF_SPEED, subsampling="4:4:4", threads=1, options=dict(_BEST_OF_AOM)
    )


def _encode_jxl(pixels: Pixels, quality: int) -> bytes:
    return bytes(imagecodecs.jpegxl_encode(pixels, distance=jxl_distance(quality), effort=_JXL_EFFORT, numthreads=1))


def jxl_distance(quality: float) -> float:
    """libjxl's own translation of a JPEG-like quality (``JxlEncoderDistanceFromQuality``)."""
    if quality >= 100:
        return 0.0
    if quality >= 30:
        return 0.1 + (100 - quality) * 0.09
    return 53 / 3000 * quality**2 - 23 / 20 * quality + 25


def _decode_jxl(data: bytes) -> Pixels:
    return np.asarray(imagecodecs.jpegxl_decode(data, numthreads=1), dtype=np.uint8)


def _saved(pixels: Pixels, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def _decode(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))
