"""What a picture's kind costs: palettes, AVIF sources, and the fit of JPEG views, on parts of Kodak's pictures.

``python -m benchmarks.formats [FOLDER]`` (default ../shared/data/eval/kodak24) prints, for each, the bytes of a blob's
picture as a share of the original's, and SSIMULACRA2 against the original.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from esrfs import formats
from esrfs.blob.recipe import JpegCoding
from esrfs.compaction.compactor import encode_avif
from esrfs.metrics.ssimulacra2 import Reference

_NUMBERS = (5, 13, 23)
_PART = (0, 0, 512, 384)
_LIMIT = 10.0
_QUALITIES = (30, 40, 50, 60, 70, 80)


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _rebuilt(avif: bytes) -> formats.Pixels:
    with Image.open(io.BytesIO(avif)) as image:
        return np.asarray(image.convert("RGB"))


def _palettes(source: Image.Image) -> None:
    for name, dither in (("plain", Image.Dither.NONE), ("dithered", Image.Dither.FLOYDSTEINBERG)):
        few = source.quantize(palette=source.quantize(256), dither=dither)
        original = np.asarray(few.convert("RGB"))
        size = len(_encoded(few, "PNG", optimize=True))
        reference = Reference(original)
        for quality in (50, 70, 85):
            avif = encode_avif(Image.fromarray(original), quality)
            ways = {
                "nearest": Image.Dither.NONE,
                "diffused": Image.Dither.FLOYDSTEINBERG,
            }
            found = {
                way: Image.fromarray(_rebuilt(avif)).quantize(palette=few, dither=how) for way, how in ways.items()
            }
            scores = [
                f"{way} {reference.compare(np.asarray(each.convert('RGB'))).score:.0f}" for way, each in found.items()
            ]
            print(f"    palette, {name}: blob {len(avif) / size:.2f}, score {', '.join(scores)}")


def _avif_sources(source: Image.Image) -> None:
    for quality in (60, 75, 85):
        original = _encoded(source, "AVIF", quality=quality, speed=6, subsampling="4:2:0", max_threads=1)
        pixels = _rebuilt(original)
        own = Reference(np.asarray(source)).compare(pixels).score
        reference = Reference(pixels)
        for blob_quality in _QUALITIES:
            avif = encode_avif(Image.fromarray(pixels), blob_quality)
            score = reference.compare(_rebuilt(avif)).score
            if score >= 70:
                print(
                    f"    AVIF that scores {own:.0f} against its source: blob {len(avif) / len(original):.2f}, "
                    f"score {score:.0f}"
                )
                break


def _fit(source: Image.Image) -> None:
    for name, options in {
        "quality 50": {"quality": 50},
        "quality 75": {"quality": 75},
        "quality 75, optimised": {"quality": 75, "optimize": True},
        "quality 85, progressive": {"quality": 85, "progressive": True},
        "quality 92": {"quality": 92},
    }.items():
        original = _encoded(source, "JPEG", **options)
        split = formats.split(original, _LIMIT)
        pixels = split.pixels()
        reference = Reference(pixels)
        for quality in (45, 60, 75):
            avif = encode_avif(Image.fromarray(pixels), quality)
            rebuilt = _rebuilt(avif)
            density = len(original) * 8 / pixels[:, :, 0].size
            what = f"    JPEG, {name}, {density:.2f} bpp: blob {len(avif) / len(original):.2f}"
            try:
                view = formats.fit_view(split, rebuilt)
            except formats.DoesNotFit:
                print(f"{what}, does not fit")
                continue
            assert isinstance(view.coding, JpegCoding)
            after = formats.split(view.expand(), _LIMIT).pixels()
            coarser = sum(view.coding.quantisation[0]) / sum(_tables(original))
            scores = [reference.compare(each).score for each in (rebuilt, after)]
            print(f"{what}, rebuilt {scores[0]:.1f}, as a view {scores[1]:.1f}, tables × {coarser:.2f}")


def _tables(data: bytes) -> list[int]:
    with Image.open(io.BytesIO(data)) as image:
        tables: dict[int, list[int]] = image.quantization  # type: ignore[attr-defined]
        return tables[0]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data/eval/kodak24")
    for number in _NUMBERS:
        with Image.open(folder / f"{number}.png") as image:
            source = image.convert("RGB").crop(_PART)
        print(f"{folder.name}/{number}.png")
        _palettes(source)
        _avif_sources(source)
        _fit(source)


if __name__ == "__main__":
    main()
