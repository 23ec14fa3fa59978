"""What a picture's kind costs: palettes, AVIF sources, and the fit of JPEG views (of sharper ones, and of those with
texture, too), on parts of Kodak's pictures.

``python -m benchmarks.formats [FOLDER]`` (default ../shared/data/eval/kodak24) prints, for each, the bytes of a blob's
picture as a share of the original's, and SSIMULACRA2 against the original.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from benchmarks import texture
from esrfs import formats
from esrfs.blob.recipe import JpegCoding
from esrfs.compaction.encoder import encode_avif
from esrfs.formats import jpeg
from esrfs.formats.samples import as_bytes
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks import loading, registry
from esrfs.train import store_degradation

_NUMBERS = (5, 13, 23)
_PART = (0, 0, 512, 384)
_LIMIT = 10.0
_QUALITIES = (30, 40, 50, 60, 70, 80)
_LEVEL = 44
"""Of the planner, where pictures are shrunk."""


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _rebuilt(avif: bytes) -> formats.Pixels:
    return as_bytes(store_degradation.decode(avif))


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
            how = f"tables × {coarser:.2f}, softened by {view.coding.softened:g} pixels"
            print(f"{what}, rebuilt {scores[0]:.1f}, as a view {scores[1]:.1f}, {how}")


def _sharper(source: Image.Image) -> None:
    """What it costs to make a picture fit that is sharper than the original, in two ways."""
    settings = jpeg._settings
    for quality, amount in itertools.product((30, 50, 75, 90), (50, 100)):
        original = _encoded(source, "JPEG", quality=quality, optimize=True)
        split = formats.split(original, _LIMIT)
        reference = Reference(split.pixels())
        rebuilt = Image.fromarray(_rebuilt(encode_avif(Image.fromarray(split.pixels()), 70)))
        pixels = np.asarray(rebuilt.filter(ImageFilter.UnsharpMask(1, amount, 0)))
        told = []
        for way in (settings, _only_coarser):
            jpeg._settings = way
            try:
                view = formats.fit_view(split, pixels)
            except formats.DoesNotFit:
                told.append("does not fit")
                continue
            finally:
                jpeg._settings = settings
            assert isinstance(view.coding, JpegCoding)
            score = reference.compare(formats.decode(view.expand(), _LIMIT)).score
            told.append(f"{score:.1f} (softened by {view.coding.softened:g}, tables × {view.coding.coarser:g})")
        density = len(original) * 8 / pixels[:, :, 0].size
        print(
            f"    sharpened by {amount} %, JPEG of quality {quality}, {density:.2f} bpp: rebuilt "
            f"{reference.compare(pixels).score:.1f}, as a view {told[0]}; by tables alone {told[1]}",
            flush=True,
        )


def _textured(source: Image.Image) -> None:
    """What it costs to make a picture fit that a network of texture has rebuilt."""
    networks = texture.between(*(registry.find(name).read_bytes() for name in ("lite-x2", "lite-x2-texture")))
    shrinker = loading.load(registry.find("shrink-lite-x2").read_bytes())
    for quality, optimised in itertools.product((30, 50, 75, 90), (False, True)):
        original = _encoded(source, "JPEG", quality=quality, optimize=optimised)
        split = formats.split(original, _LIMIT)
        reference = Reference(split.pixels())
        small = texture.coded(split.pixels(), shrinker, _LEVEL, 2)
        for much, network in networks.items():
            pixels = network(small[None])[0]
            try:
                view = formats.fit_view(split, pixels)
            except formats.DoesNotFit:
                told = "does not fit"
            else:
                assert isinstance(view.coding, JpegCoding)
                score = reference.compare(formats.decode(view.expand(), _LIMIT)).score
                told = f"{score:.1f} (softened by {view.coding.softened:g}, tables × {view.coding.coarser:g})"
            tables = "its own Huffman tables" if optimised else "the standard ones"
            print(
                f"    texture {much:g}, JPEG of quality {quality}, {tables}: rebuilt "
                f"{reference.compare(pixels).score:.1f}, as a view {told}",
                flush=True,
            )


def _only_coarser(_: list[int]) -> Iterator[tuple[float, float]]:
    yield from ((factor, 0.0) for factor in (1.0, *jpeg.COARSER))


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
        _sharper(source)
        _textured(source)


if __name__ == "__main__":
    main()
