"""A picture as a blob's AVIF: of 10 bits a sample where there is a libavif for that, else of 8, by Pillow."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
from PIL import Image

from esrfs.compaction import chroma
from esrfs.formats import cells, libavif

_THREADS = 8
"""libaom gives other bytes with one thread than with several, the same with any number of several; tiles chosen
automatically depend on the number."""
_BEST = {"tune": "ssimulacra2"}
"""libaom's tuning for the gate's metric: 4.5 % fewer bytes than its default (DESIGN 10)."""


@dataclass(frozen=True)
class Tuning:
    """What suits one picture and not another."""

    options: Mapping[str, str] = field(default_factory=dict)
    """libaom's, beside the usual; for those that this libaom knows."""
    bits: int = 10
    """Of a sample, 8 or 10. With 10 nothing is rounded on the codec's way, mostly for fewer bytes at an equal score;
    with 8 it is, which below a score of 50, and of fine grain, takes fewer."""


_USUAL = Tuning()


def encode_avif(
    image: Image.Image,
    quality: int,
    subsampling: str = "4:4:4",
    speed: int = 6,
    *,
    lift: bool = False,
    tuning: Tuning = _USUAL,
) -> bytes:
    """Encode a picture for a blob; ``quality`` is 0 to 99, ``speed`` libaom's; ``lift``: so that colours come back as
    they were, where 8 bits would change them (``chroma.py``). The bytes don't depend on the machine's number of
    processors. Large pictures are coded in cells, which bounds the memory."""
    if cells.is_large(image):
        encode = partial(encode_avif, quality=quality, subsampling=subsampling, speed=speed, lift=lift, tuning=tuning)
        return cells.encode(image, encode)
    if tuning.bits > 8 and libavif.is_available(tuple(_BEST.items())):
        options = {**_BEST, **tuning.options}
        return libavif.encode(
            np.asarray(image).reshape(image.height, image.width, -1),
            quality=quality,
            speed=speed,
            subsampling=subsampling,
            threads=_THREADS,
            options=options if libavif.is_available(tuple(options.items())) else _BEST,
        )
    return encode_8_bits(chroma.lifted(image) if lift else image, quality, subsampling, speed, tuning=tuning.options)


def encode_8_bits(
    image: Image.Image,
    quality: int,
    subsampling: str = "4:4:4",
    speed: int = 6,
    *,
    tuning: Mapping[str, str] | None = None,
) -> bytes:
    """By Pillow, as one piece: the plain AVIF that blobs are measured against, and what they are where there is no
    other encoder."""
    best = _known_to_pillow()
    out = io.BytesIO()
    image.save(
        out,
        "AVIF",
        quality=quality,
        speed=speed,
        subsampling="4:0:0" if image.mode == "L" else subsampling,
        codec="aom",
        max_threads=_THREADS,
        autotiling=False,
        tile_rows=0,
        tile_cols=0,
        advanced={**best, **(tuning or {})} if best else {},
    )
    return out.getvalue()


@cache
def _known_to_pillow() -> dict[str, str]:
    """The best tuning, if Pillow's libaom has it."""
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), "AVIF", codec="aom", max_threads=1, advanced=_BEST)
    except (OSError, ValueError):
        return {}
    return _BEST
