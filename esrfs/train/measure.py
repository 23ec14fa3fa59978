"""``python -m esrfs.train.measure NETWORK FOLDER``: what a network gains over bicubic, and how many bytes over plain
AVIF, by the planner's level of quality.

Pictures are shrunk and coded as the store does it (nothing is cropped but what the scale doesn't divide), and enlarged
whole; borders count. Comparing bytes (``--plain``) needs the extra ``report``: MS-SSIM, and Bjøntegaard's rates. What
counts is SSIMULACRA2, as in the gate; the others stand beside it, since a network may please one measure only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from esrfs import formats
from esrfs.cli import show
from esrfs.compaction import planner, refine, shrinking
from esrfs.compaction.encoder import encode_8_bits
from esrfs.evaluate import requirements
from esrfs.formats.samples import as_bytes
from esrfs.formats.view import Pixels, Samples
from esrfs.metrics.fidelity import y_psnr
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks import loading, registry
from esrfs.train.photographs import find, read_rgb
from esrfs.train.store_degradation import code, decode

_BANDS = ((30, 60), (40, 50), (50, 60), (60, 70))
"""Scores over which bytes are compared."""
_LEAST_SHARED = 2.0
"""Points of score that two curves must share to be compared."""
_LEVELS = (60, 53, 46, 39, 32, 25)
_PLAIN_LEVELS = tuple(range(8, 47, 3))
"""Levels of full-size AVIF, between which the bytes for a score are found."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """What a picture that was coded is worth, against the original."""

    psnr: float
    """Of luma, dB."""
    score: float
    """SSIMULACRA2."""
    ms_ssim: float | None
    """dB; None: not asked for, or the picture is too small for it."""
    bytes: int
    """0: not coded."""


class Gain(Version, frozen=True, kw_only=True):
    """What the network makes of a small picture."""

    bicubic: float
    """What bicubic makes of it, as ``psnr``."""


_RATES = {"SSIMULACRA2": "score", "Y-PSNR": "psnr", "MS-SSIM": "ms_ssim"}
"""What bytes are compared at equal values of, the first before all."""

Structure = Callable[[Pixels], float | None]


def measure(
    network: loading.Network,
    full: Pixels,
    level: int | None,
    reference: Reference | None = None,
    *,
    refined: bool = False,
    shrinker: loading.Network | None = None,
    structure: Structure | None = None,
) -> Gain:
    """Shrink ``full`` (H×W×3), send it through AVIF at one of the planner's levels (None: clean), enlarge it by bicubic
    and by the network. ``reference`` is of ``full``, if the scale divides its sides and it is at hand already;
    ``refined``: the small picture is refined before it is coded; ``shrinker``: changes it before that; ``structure``:
    see ``structure_of``."""
    full = _divisible(full, network.scale)
    height, width = full.shape[:2]
    shrunk = shrinking.reduced(full, network.scale)
    small: Samples = shrunk
    size = 0
    if level is not None:
        if shrinker is not None:
            shrunk = shrinker(shrinking.pack(full, shrunk, network.scale, shrinking.alike(level))[None])[0]
        avif = code(shrunk, level)
        if refined:
            avif = code(_refined(network, full, shrunk, decode(avif)), level)
        small, size = decode(avif), len(avif)
    bicubic = np.asarray(Image.fromarray(as_bytes(small)).resize((width, height), Image.Resampling.BICUBIC))
    view = network(small[None])[0]
    return Gain(
        bicubic=y_psnr(full, bicubic),
        psnr=y_psnr(full, view),
        score=(reference or Reference(full)).compare(view).score,
        ms_ssim=structure(view) if structure is not None else None,
        bytes=size,
    )


def _refined(network: loading.Network, full: Pixels, small: Pixels, decoded: Samples) -> Pixels:
    noise = refine.codec_noise(small, decoded)
    done = refine.refine(
        full, small, network.differentiable, scale=network.scale, margin=network.margin, noise=noise
    )  # fmt: skip
    return done.small


def structure_of(full: Pixels) -> Structure:
    """What tells MS-SSIM of versions of ``full``, as -10·log10(1 - MS-SSIM): values near 1 are far apart in dB, and a
    curve bends less. Needs the extra ``report``."""
    from esrfs.evaluate.measures import Original  # noqa: PLC0415 (an optional dependency)

    original = Original(full)

    def structure(version: Pixels) -> float | None:
        found = original.measure(version, ["ms_ssim"])["ms_ssim"]
        return None if found is None else -10 * math.log10(max(1 - found, 1e-6))

    return structure


def plain_avif(full: Pixels, reference: Reference, structure: Structure) -> list[Version]:
    """Full-size AVIF of 8 bits, as Pillow makes it with compaction's tuning, by rising level."""

    def version(level: int) -> Version:
        avif = encode_8_bits(Image.fromarray(full), planner.quality(level))
        view = formats.decode(avif, full.shape[0] * full.shape[1] / 1e6)
        return Version(
            psnr=y_psnr(full, view), score=reference.compare(view).score, ms_ssim=structure(view), bytes=len(avif)
        )

    return [version(level) for level in _PLAIN_LEVELS]


def bd_rate(anchor: Iterable[Version], test: Iterable[Version], measure: str) -> float | None:
    """Bjøntegaard's, over all that both curves reach (``evaluate.curves``), percent; None where that is too little.
    ``measure``: a field of ``Version``. Needs the extra ``report``."""
    from esrfs.evaluate import curves  # noqa: PLC0415 (an optional dependency)

    def curve(versions: Iterable[Version]) -> curves.Curve:
        points = ((each.bytes, getattr(each, measure)) for each in versions)
        return curves.rising((size, value) for size, value in points if value is not None)

    return curves.bd_rate(curve(anchor), curve(test))


def bytes_at(curve: Sequence[tuple[float, int]], score: float) -> float | None:
    """Bytes for ``score`` on a curve of (score, bytes), straight lines in log bytes between; None beyond its ends."""
    scores = [point[0] for point in curve]
    if not scores[0] <= score <= scores[-1]:
        return None
    return float(np.exp(np.interp(score, scores, [np.log(point[1]) for point in curve])))


def bytes_between(
    test: Sequence[tuple[float, int]], anchor: Sequence[tuple[float, int]], low: float, high: float
) -> tuple[float, float] | None:
    """log(bytes / the anchor's bytes), the mean over scores from ``low`` to ``high`` as far as both curves go (as
    Bjøntegaard's, with straight lines in log bytes); and the same where the smaller of both is taken at each score.
    None where they share less than two points of score."""
    low, high = max(low, test[0][0], anchor[0][0]), min(high, test[-1][0], anchor[-1][0])
    if high - low < _LEAST_SHARED:
        return None
    scores = np.linspace(low, high, 30)
    pairs = [(bytes_at(test, score), bytes_at(anchor, score)) for score in scores]
    ratios = [float(np.log(ours / theirs)) for ours, theirs in pairs if ours and theirs]
    return float(np.mean(ratios)), float(np.mean(np.minimum(ratios, 0)))


def _divisible(full: Pixels, scale: int) -> Pixels:
    height, width = (size // scale * scale for size in full.shape[:2])
    return np.ascontiguousarray(full[:height, :width])


def _load(network: str) -> loading.Network:
    path = registry.file_or_name(network)
    return loading.load(path.read_bytes(), name=path.stem)


def main(  # noqa: PLR0917 (typer calls it by name)
    weights: Annotated[str, typer.Argument(metavar="NETWORK", help="A network, by name or file.")],
    folder: Path,
    level: Annotated[
        list[int] | None, typer.Option(min=0, max=63, help="The planner's levels, beside clean; 60 to 25.")
    ] = None,
    plain: Annotated[bool, typer.Option(help="Compare bytes with plain AVIF, too (slow).")] = False,
    crop: Annotated[int, typer.Option(min=0, help="Only the middle, so many pixels wide and high; 0: all of it.")] = 0,
    refined: Annotated[
        bool, typer.Option("--refine", help="Refine small pictures before they are coded (slow).")
    ] = False,
    shrinker: Annotated[str | None, typer.Option(help="A shrinker to use, by name or file.")] = None,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    if plain:
        requirements.check()
    network = _load(weights)
    if network.spec.architecture == "Shrinker":
        raise ValueError(f"{weights} makes pictures small; name the network that enlarges them, and it by --shrinker")
    shrinks = _load(shrinker) if shrinker is not None else None
    if shrinks is not None and shrinks.channels != 3 * network.scale**2 + 4:
        raise ValueError(f"{shrinker} does not make pictures {network.scale} times smaller")
    pictures = find(folder)
    levels: list[int | None] = [None, *(level or _LEVELS)]
    gains: dict[int | None, list[Gain]] = {step: [] for step in levels}
    ratios: dict[int | None, list[float]] = {step: [] for step in levels}
    bands: dict[tuple[int, int], list[tuple[float, float]]] = {band: [] for band in _BANDS}
    rates: dict[str, list[float | None]] = {label: [] for label in _RATES}
    for path in track(pictures, "measuring", transient=True):
        full = read_rgb(path)
        if crop:
            top, left = (max(0, (size - crop) // 2) for size in full.shape[:2])
            full = full[top : top + crop, left : left + crop]
        full = _divisible(full, network.scale)
        reference = Reference(full)
        structure = structure_of(full) if plain else None
        for step in levels:
            gains[step].append(
                measure(network, full, step, reference, refined=refined, shrinker=shrinks, structure=structure)
            )
        if structure is None:
            continue
        others = plain_avif(full, reference, structure)
        curve = sorted((each.score, each.bytes) for each in others)
        coded = [gains[step][-1] for step in levels if step is not None]
        for step in levels:
            gain = gains[step][-1]
            if gain.bytes and (other := bytes_at(curve, gain.score)):
                ratios[step].append(gain.bytes / other)
        ours = sorted((gain.score, gain.bytes) for gain in coded)
        for band, found in bands.items():
            if (between := bytes_between(ours, curve, *band)) is not None:
                found.append(between)
        for label, field in _RATES.items():
            rates[label].append(bd_rate(others, coded, field))
    table = Table(
        *("level", "bicubic", "network", "gain", "SSIMULACRA2"),
        *(("MS-SSIM",) if plain else ()),
        "bytes",
        *(("bytes against AVIF",) if plain else ()),
        title=f"{network.spec.name}, {len(pictures)} pictures; Y-PSNR, dB",
    )
    for step in levels:
        bicubic, enlarged, score, size = (
            float(np.mean([getattr(gain, name) for gain in gains[step]]))
            for name in ("bicubic", "psnr", "score", "bytes")
        )
        row = [
            "clean" if step is None else str(step),
            f"{bicubic:.2f}",
            f"{enlarged:.2f}",
            f"{enlarged - bicubic:+.2f}",
            f"{score:.2f}",
        ]
        if plain:
            structures = [gain.ms_ssim for gain in gains[step] if gain.ms_ssim is not None]
            row.append(f"{np.mean(structures):.2f}" if structures else "")
        row.append(f"{size:,.0f}" if size else "")
        if plain and ratios[step]:
            row.append(f"{100 * (np.exp(np.mean(np.log(ratios[step]))) - 1):+.1f} % ({len(ratios[step])} pictures)")
        table.add_row(*row)
    Console().print(table)
    if plain:
        table = Table("scores", "bytes against AVIF", "the better of both", "pictures smaller")
        for (low, high), found in bands.items():
            if found:
                means = (f"{100 * (np.exp(mean) - 1):+.1f} %" for mean in np.mean(found, axis=0))
                table.add_row(f"{low} to {high}", *means, f"{sum(one < 0 for one, _ in found)} of {len(found)}")
        Console().print(table)
        table = Table("at equal", "bytes against AVIF", "pictures smaller", title="BD-rate, over all that both reach")
        for label, every in rates.items():
            known = [rate for rate in every if rate is not None]
            if known:
                smaller = f"{sum(rate < 0 for rate in known)} of {len(known)}"
                table.add_row(label, f"{np.mean(known):+.1f} %", smaller)
        Console().print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (requirements.MissingError, registry.WeightsError, ValueError) as error:
        sys.exit(f"measure: {error}")
    except OSError as error:
        sys.exit(f"measure: {show.failure(error)}")
