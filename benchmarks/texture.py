"""From fidelity to texture: what networks between a fidelity network and its adversarial partner make of pictures.

    python -m benchmarks.texture FIDELITY ADVERSARIAL PICTURE… [--shrinker shrink-lite-x2] [--level 44] [--crop 0]
        [--sheet FILE.png [--show NAME@LEFT,TOP …]]

Each picture is shrunk and coded as a store does it, at one of the planner's levels (and shrunk only: clean), and
rebuilt by the network at textures from 0 (FIDELITY) to 1 (ADVERSARIAL). Means over pictures; sharpness is the energy of
the luma's Laplacian, and pattern that of what alternates between green and magenta over 8 pixels or more, each as a
part of the original's: a network that outwits its discriminator makes such patterns beside edges. ``--sheet`` draws
parts of the coded pictures side by side, each pixel as two by two. Networks are files, or names of networks that are
here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import uniform_filter1d

from benchmarks.machine import describe
from esrfs.compaction import shrinking
from esrfs.evaluate import crops
from esrfs.evaluate.niqe import niqe
from esrfs.formats.samples import as_bytes
from esrfs.formats.view import Pixels, Samples
from esrfs.metrics.fidelity import y_psnr
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks import loading, registry
from esrfs.networks.interpolation import interpolate
from esrfs.networks.loading import Network
from esrfs.train.photographs import read_rgb
from esrfs.train.store_degradation import code, decode

TEXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)
_SHOWN = (0.0, 0.5, 1.0)
_SIDE = 128
"""Pixels of a part on the sheet."""
_TIMES = 2
_GAP, _LINE = 8, 26

_LENGTH = 8
"""Pixels of a pattern."""

FIGURES = ("Y-PSNR", "SSIMULACRA2", "NIQE", "sharpness", "pattern")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fidelity")
    parser.add_argument("adversarial")
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--shrinker", default="shrink-lite-x2")
    parser.add_argument("--level", type=int, default=44)
    parser.add_argument("--crop", type=int, default=0, help="only the middle, so many pixels wide and high; 0: all")
    parser.add_argument("--sheet", type=Path, help="the PNG to write")
    parser.add_argument("--show", nargs="+", help="parts for the sheet, NAME@LEFT,TOP; else each picture's busiest")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks = between(
        *(registry.file_or_name(name).read_bytes() for name in (arguments.fidelity, arguments.adversarial))
    )
    shrinker = loading.load(registry.file_or_name(arguments.shrinker).read_bytes())
    scale = networks[0.0].scale
    originals = {path.name: _middle(read_rgb(path), arguments.crop, scale) for path in arguments.pictures}
    versions = {
        name: versions_of(full, networks, small)
        for name, full in originals.items()
        for small in [coded(full, shrinker, arguments.level, scale)]
    }
    clean = {name: versions_of(full, networks, shrinking.reduced(full, scale)) for name, full in originals.items()}
    _print(originals, versions, clean, arguments.level)
    print(f"\n{describe()}")
    if arguments.sheet:
        places = [_place(shown) for shown in arguments.show or ()]
        places = places or [(name, *crops.busiest(full, _SIDE)[::-1]) for name, full in originals.items()]
        sheet(originals, versions, places).save(arguments.sheet, optimize=True)
        print(f"{arguments.sheet}: {arguments.sheet.stat().st_size:,} bytes")


def between(fidelity: bytes, adversarial: bytes) -> dict[float, Network]:
    return {texture: loading.load(interpolate(fidelity, adversarial, texture, "between")) for texture in TEXTURES}


def versions_of(full: Pixels, networks: dict[float, Network], small: Samples) -> dict[str, Pixels]:
    """What is made of ``small``, by the sheet's labels."""
    bicubic = np.asarray(Image.fromarray(as_bytes(small)).resize(full.shape[1::-1], Image.Resampling.BICUBIC))
    return {"bicubic": bicubic} | {label(texture): network(small[None])[0] for texture, network in networks.items()}


def label(texture: float) -> str:
    return f"texture {texture:g}"


def sharpness(pixels: Pixels) -> float:
    """Mean energy of the luma's Laplacian."""
    luma = np.asarray(Image.fromarray(pixels).convert("L"), np.float64)
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float(np.square(around - 4 * luma[1:-1, 1:-1]).mean())


def pattern(pixels: Pixels) -> float:
    """Mean energy of green less magenta where it alternates from row to row or from column to column."""
    colour = pixels @ np.array([-0.5, 1, -0.5])
    energy = 0.0
    for plane in (colour, colour.T):
        signs = np.where(np.arange(plane.shape[1]) % 2, -1.0, 1.0)
        energy += float(np.square(uniform_filter1d(plane * signs, _LENGTH, axis=1)).mean())
    return energy / 2


def sheet(
    originals: dict[str, Pixels], versions: dict[str, dict[str, Pixels]], places: Sequence[tuple[str, int, int]]
) -> Image.Image:
    """A row for each (name, left, top), a column for the original, bicubic and some textures."""
    columns = ["original", "bicubic", *map(label, _SHOWN)]
    side = _SIDE * _TIMES
    width, height = len(columns) * (side + _GAP) + _GAP, _LINE + len(places) * (side + _LINE) + _GAP
    drawn = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(16)
    for column, text in enumerate(columns):
        x = _GAP + column * (side + _GAP)
        draw.text((x, 4), text, "black", font)
        for row, (name, left, top) in enumerate(places):
            y = _LINE + row * (side + _LINE)
            pixels = originals[name] if text == "original" else versions[name][text]
            part = np.ascontiguousarray(pixels[top : top + _SIDE, left : left + _SIDE])
            shown = Image.fromarray(part)
            drawn.paste(shown.resize((shown.width * _TIMES, shown.height * _TIMES), Image.Resampling.NEAREST), (x, y))
            if not column:
                draw.text((x, y + side + 4), f"{name}, at {left}, {top}", "black", font)
    return drawn


def _print(
    originals: dict[str, Pixels],
    versions: dict[str, dict[str, Pixels]],
    clean: dict[str, dict[str, Pixels]],
    level: int,
) -> None:
    print(f"| {len(originals)} pictures | {' | '.join(f'{name}, level {level}' for name in FIGURES)} | ", end="")
    print(" | ".join(f"{name}, clean" for name in FIGURES) + " |\n|" + "---|" * (1 + 2 * len(FIGURES)))
    references = {name: Reference(full) for name, full in originals.items()}
    own = np.mean([_niqe(full) for full in originals.values()])
    print(f"| original | | | {own:.2f} | 1.00 | 1.00 |" + " |" * len(FIGURES))
    falls = 0
    before: list[float] = []
    for column in ("bicubic", *map(label, TEXTURES)):
        cells = []
        for made in (versions, clean):
            rows = [_figures(full, made[name][column], references[name]) for name, full in originals.items()]
            cells += [f"{mean:.2f}" for mean in np.mean(rows, axis=0)]
            if made is versions and column != "bicubic":
                falls += bool(before) and all(row[0] < then for row, then in zip(rows, before, strict=True))
                before = [row[0] for row in rows]
        print(f"| {column} | {' | '.join(cells)} |", flush=True)
    print(f"\nIn {falls} of {len(TEXTURES) - 1} steps the Y-PSNR of every picture falls (level {level}).")


def _figures(full: Pixels, view: Pixels, reference: Reference) -> tuple[float, ...]:
    """By the names in ``FIGURES``."""
    score = reference.compare(view).score
    return y_psnr(full, view), score, _niqe(view), *(of(view) / max(of(full), 1e-9) for of in (sharpness, pattern))


def _niqe(pixels: Pixels) -> float:
    found = niqe(pixels)
    return float("nan") if found is None else found


def coded(full: Pixels, shrinker: Network, level: int, scale: int) -> Samples:
    """The small picture as a store's blob gives it back."""
    packed = shrinking.pack(full, shrinking.reduced(full, scale), scale, shrinking.alike(level))
    return decode(code(shrinker(packed[None])[0], level))


def _middle(full: Pixels, side: int, scale: int) -> Pixels:
    height, width = (min(side or length, length) // scale * scale for length in full.shape[:2])
    top, left = (full.shape[0] - height) // 2, (full.shape[1] - width) // 2
    return np.ascontiguousarray(full[top : top + height, left : left + width])


def _place(text: str) -> tuple[str, int, int]:
    name, _, place = text.rpartition("@")
    left, _, top = place.partition(",")
    return name, int(left), int(top)


if __name__ == "__main__":
    main()
