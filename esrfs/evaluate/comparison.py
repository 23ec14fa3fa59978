"""The page of ``esrfs evaluate``: curves, tables and crops made of a run's results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esrfs.evaluate import codecs, crops, plots
from esrfs.evaluate.curves import Comparison, Mean
from esrfs.evaluate.measures import MEASURES
from esrfs.evaluate.page import Block, Code, Figure, Page, Row, Section, Table, Text
from esrfs.evaluate.results import Way
from esrfs.evaluate.trial import ESRFS, Picture

Pixels = npt.NDArray[np.uint8]

MAIN = "ssimulacra2"
SCORES = (30, 40, 50, 60, 70, 80, 85, 90)
"""SSIMULACRA2 at which sizes are compared; the store's presets promise 50, 60, 70 and 85."""
RATIOS = (9, 10)
"""Original : stored, as claimed by the report that began this project."""
_LOSSLESS = frozenset({"png", "tiff", "bmp", "ppm", "qoi", "tga"})
_MOST_LINES = 8
_MEASURES_OF_SHRUNK = (MAIN, "psnr", "niqe")
"""That are drawn for each scale and kernel; tables and CSV hold all."""
_MOST_PICTURES_LISTED = 60


@dataclass(frozen=True)
class Run:
    """What a page tells of a run beside its results."""

    command: str
    pictures: Sequence[Picture]
    refused: dict[str, str]
    """Files that are no pictures, by name, and why."""
    left_out: Sequence[str]
    measures: Sequence[str]
    anchor: str
    """The codec that others are compared with; empty: AVIF, or what there is."""
    crop_rows: int


def label(way: Way) -> str:
    if way.codec == ESRFS:
        return "esrfs"
    name = codecs.LABELS[way.codec]
    grow = way.grow.capitalize() if way.grow == "lanczos" else way.grow
    if way.scale == 1:
        return f"{name}, {grow}" if grow else name
    return f"{name} 1/{way.scale} {way.shrink} → {grow}"


def make(comparison: Comparison, run: Run) -> Page:
    anchor = Way(run.anchor or "avif")
    if anchor not in comparison.ways:
        anchor = comparison.ways[0]
    results = comparison.results
    first = {result.picture: result for result in reversed(results)}
    kinds = sorted({result.kind for result in results})
    pixels = sum(result.width * result.height for result in first.values()) / 1e6
    original = sum(result.original_bytes for result in first.values())
    facts = [
        ("Pictures", f"{len(first)}, {pixels:.1f} megapixels, {original / 1e6:.2f} MB as {' and '.join(kinds)}"),
        ("Measured", f"{len(results)} versions"),
        ("Compared with", label(anchor)),
    ]
    sections = [
        Section("Rate and distortion", _codec_curves(comparison, run, anchor)),
        Section("Size at equal quality", _equal_quality(comparison, run, anchor)),
        Section("Shrunk and grown again", _shrunk(comparison, run, anchor)),
        Section("Ratio to the original files", _ratios(comparison, kinds)),
        Section("The store", _store(comparison)),
        Section("Time", _times(comparison)),
        Section("Crops", _crops(comparison, run, anchor)),
        Section("How this was made", _method(comparison, run)),
    ]
    return Page(
        title=f"esrfs evaluate: {len(first)} pictures",
        lead="What each way to store a picture takes in bytes, and what comes back. Means are over pictures; "
        "a smaller n says that only so many pictures reach that quality.",
        facts=facts,
        sections=[section for section in sections if section.blocks],
    )


# Sections.


def _codec_curves(comparison: Comparison, run: Run, anchor: Way) -> list[Block]:
    ways = [way for way in comparison.ways if way.scale in (0, 1)]
    return _curves(comparison, run.measures, ways, "codecs", "codecs at full resolution") if ways else []


def _curves(comparison: Comparison, measures: Sequence[str], ways: Sequence[Way], name: str, what: str) -> list[Block]:
    blocks: list[Block] = []
    for measure in measures:
        drawn = [(way, points) for way in ways if (points := comparison.mean_points(way, measure))][:_MOST_LINES]
        if not drawn:
            continue
        about = MEASURES[measure]
        series = [plots.Line(label(way), points, dots_only=len(points) == 1) for way, points in drawn]
        axis = f"{about.label} ({about.unit})" if about.unit else about.label
        better = "Up and to the left is better." if about.reference else "Down and to the left is better."
        rows = [
            [label(way), f"{size:.3f}", f"{value:.{about.digits}f}"] for way, points in drawn for size, value in points
        ]
        svg = plots.lines(f"{name}-{measure}", series, "bits per pixel", axis, log_x=True)
        caption = f"{about.label} by bits per pixel, {what}: means of all pictures at each quality. {better}"
        blocks.append(Figure(svg, caption, Table(["", "bits per pixel", about.label], rows)))
    return blocks


def _equal_quality(comparison: Comparison, run: Run, anchor: Way) -> list[Block]:
    ways = [way for way in comparison.ways if way.scale in (0, 1)]
    return _comparison_tables(comparison, run, anchor, ways)


def _comparison_tables(comparison: Comparison, run: Run, anchor: Way, ways: Sequence[Way]) -> list[Block]:
    if not any(way != anchor for way in ways):
        return []
    relative: list[list[str]] = []
    for way in ways:
        cells = [comparison.relative_bytes(anchor, way, MAIN, score) for score in SCORES]
        if any(cells):
            relative.append([label(way), *(_percent(cell, len(comparison.pictures)) for cell in cells)])
    blocks: list[Block] = []
    if any(row[0] != label(anchor) for row in relative):
        caption = f"Bytes at equal SSIMULACRA2, compared with {label(anchor)} (geometric mean over pictures)"
        blocks.append(Table(["", *(str(score) for score in SCORES)], relative, caption))
    compared = [measure for measure in run.measures if MEASURES[measure].reference]
    deltas = []
    for way in ways:
        means = [comparison.bd_rate(anchor, way, measure) for measure in compared]
        if way != anchor and any(means):
            deltas.append([label(way), *(_delta(mean, len(comparison.pictures)) for mean in means)])
    if deltas:
        caption = f"BD-rate against {label(anchor)}: mean difference in bytes at equal quality, in percent"
        blocks.append(Table(["", *(MEASURES[measure].label for measure in compared)], deltas, caption))
    return blocks


def _shrunk(comparison: Comparison, run: Run, anchor: Way) -> list[Block]:
    blocks: list[Block] = []
    for codec in dict.fromkeys(way.codec for way in comparison.ways if way.scale > 1):
        whole = Way(codec)
        ways = [way for way in comparison.ways if way.codec == codec and (way.scale > 1 or way.grow)]
        for scale in sorted({way.scale for way in ways}):
            mine = [way for way in ways if way.scale == scale]
            for shrink in dict.fromkeys(way.shrink for way in mine):
                group = [way for way in (whole, *mine) if way.shrink in ("", shrink) and way in comparison.ways]
                what = f"{label(whole)} shrunk {scale} times ({shrink or 'not shrunk'}) and grown again"
                measures = [measure for measure in run.measures if measure in _MEASURES_OF_SHRUNK]
                blocks += _curves(comparison, measures, group, f"{codec}-{scale}-{shrink}", what)
        blocks += _comparison_tables(comparison, run, whole if whole in comparison.ways else anchor, [whole, *ways])
    if blocks:
        text = (
            "The picture is made smaller before it is encoded, and larger again after it was decoded, by an "
            "interpolation or by a network. Bytes are those of the small picture; quality is that of the large one."
        )
        blocks.insert(0, Text(text))
    return blocks


def _ratios(comparison: Comparison, kinds: Sequence[str]) -> list[Block]:
    rows = []
    for way in comparison.ways:
        cells = [comparison.ratio_at(way, MAIN, score) for score in SCORES]
        if any(cells):
            rows.append([label(way), *(_ratio(cell, len(comparison.pictures)) for cell in cells)])
    blocks: list[Block] = []
    if rows:
        caption = "Bytes of the original file : bytes stored, at that SSIMULACRA2 (geometric mean over pictures)"
        blocks.append(Table(["", *(str(score) for score in SCORES)], rows, caption))
    scores = []
    for way in comparison.ways:
        told: list[str] = []
        for ratio in RATIOS:
            values = comparison.values_at_ratio(way, MAIN, ratio)
            told += [f"{statistics.median(values):.1f}", f"{values[0]:.1f}", str(len(values))] if values else [""] * 3
        if any(told):
            scores.append([label(way), *told])
    if scores:
        header = [cell for ratio in RATIOS for cell in (f"at {ratio} : 1, median", "worst", "n")]
        caption = "SSIMULACRA2 where the stored picture takes a ninth or a tenth of the original file"
        blocks.append(Table(["", *header], scores, caption))
    if blocks and set(kinds) & _LOSSLESS:
        text = (
            f"Some originals are {' and '.join(sorted(set(kinds) & _LOSSLESS))}: without loss, and so several times as "
            "large as a camera's JPEG of the same picture. Ratios to such files say little about photographs."
        )
        blocks.insert(0, Text(text))
    return blocks


def _store(comparison: Comparison) -> list[Block]:
    results = [result for result in comparison.results if result.way.codec == ESRFS]
    if not results:
        return []
    presets = list(dict.fromkeys(result.setting for result in results))
    summary = []
    for preset in presets:
        mine = [result for result in results if result.setting == preset]
        kept = [result for result in mine if result.bytes]
        if not kept:
            summary.append([preset, f"0 of {len(mine)}", "", "", ""])
            continue
        ratios = [result.original_bytes / result.bytes for result in kept if result.bytes]
        scores = [value for result in kept if (value := result.measures.get(MAIN)) is not None]
        # What is refused stays as it is, and counts with its own size.
        stored = sum(result.bytes or result.original_bytes for result in mine)
        summary.append(
            [
                preset,
                f"{len(kept)} of {len(mine)}",
                f"{sum(result.original_bytes for result in mine) / stored:.2f}",
                f"{min(ratios):.1f} / {statistics.geometric_mean(ratios):.1f} / {max(ratios):.1f}",
                f"{min(scores):.1f} / {statistics.fmean(scores):.1f}" if scores else "",
            ]
        )
    header = ["", "stored small", "all files together", "ratio: least / mean / most", "SSIMULACRA2: least / mean"]
    blocks: list[Block] = [
        Text(
            "Whole files through compaction, gate included: the blob against the original file, and the view that "
            "programs read against the original's pixels. A picture that the gate refuses stays as it is."
        ),
        Table(header, summary, "By preset"),
    ]
    by_picture = []
    for picture in comparison.pictures[:_MOST_PICTURES_LISTED]:
        by_preset = {result.setting: result for result in results if result.picture == picture}
        if not by_preset:
            continue
        some = next(iter(by_preset.values()))
        cells = [f"{some.width} × {some.height}", f"{some.original_bytes / 1e3:,.0f}"]
        for preset in presets:
            found = by_preset.get(preset)
            if found is None or not found.bytes:
                cells.append("" if found is None else f"refused ({found.note.partition(':')[0]})")
            else:
                score = found.measures.get(MAIN)
                told = " without loss" if found.note == "without loss" else "" if score is None else f" at {score:.1f}"
                cells.append(f"{found.original_bytes / found.bytes:.1f}{told}")
        by_picture.append([picture, *cells])
    blocks.append(
        Table(
            ["", "pixels", "original, kB", *presets], by_picture, "Ratio original : stored, and SSIMULACRA2 of the view"
        )
    )
    return blocks


def _times(comparison: Comparison) -> list[Block]:
    rows = []
    for way in comparison.ways:
        store, restore = comparison.seconds_per_megapixel(way)
        rows.append([label(way), _seconds(store), _seconds(restore)])
    text = (
        "One core for each picture, while other pictures keep the other cores busy; medians. For esrfs, storing is the "
        "search for the smallest version that passes the gate, and restoring ends with the view's last byte."
    )
    return [Text(text), Table(["", "to store", "to restore"], rows, "Seconds per megapixel")]


def _crops(comparison: Comparison, run: Run, anchor: Way) -> list[Block]:
    rows = crops.rows(comparison, run.pictures, anchor, label, run.crop_rows)
    if not rows:
        return []
    text = (
        f"The most detailed part of some pictures, in each way at the quality whose size comes nearest to "
        f"{label(anchor)} at SSIMULACRA2 {crops.SCORE}. Scores are of the whole picture."
    )
    blocks: list[Block] = [Text(text)]
    return blocks + [Row(row.title, row.pictures) for row in rows]


def _method(comparison: Comparison, run: Run) -> list[Block]:
    settings = dict.fromkeys(
        f"{label(Way(result.way.codec))}: {result.made_by}"
        for result in comparison.results
        if not result.way.grow or result.way.codec == ESRFS
    )
    blocks: list[Block] = [
        Code(run.command),
        Text("\n".join(settings)),
        Text(
            "Pixels are compared as stored (no colour management, EXIF orientation not applied; gray as RGB). "
            "PSNR is over RGB samples, SSIM and MS-SSIM are taken on luma with 11×11 Gaussian windows. BD-rate is "
            "Bjøntegaard's over log bytes with piecewise cubic Hermite interpolation (PCHIP), per picture, then "
            "averaged; it needs three points and a fifth of overlap. NIQE uses a model made of our own training "
            "photographs: compare its values here with each other, not with published ones. It likes sharpness "
            "and noise, so a low value is no proof of likeness.\nJPEG is libjpeg-turbo's; encoders that search "
            "longer take fewer bytes."
        ),
    ]
    if comparison.pictures:
        left = [*run.left_out, *(f"{name}: {why}" for name, why in sorted(run.refused.items())[:_MOST_PICTURES_LISTED])]
        if left:
            blocks.append(Text("Left out:\n" + "\n".join(left)))
    return blocks


# Cells.


def _percent(mean: Mean | None, pictures: int) -> str:
    return "" if mean is None else f"{100 * (mean.value - 1):+.1f} %{_count(mean, pictures)}"


def _delta(mean: Mean | None, pictures: int) -> str:
    return "" if mean is None else f"{mean.value:+.1f}{_count(mean, pictures)}"


def _ratio(mean: Mean | None, pictures: int) -> str:
    return "" if mean is None else f"{mean.value:.1f}{_count(mean, pictures)}"


def _count(mean: Mean, pictures: int) -> str:
    return "" if mean.count == pictures else f" (n={mean.count})"


def _seconds(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)) - 1)}f}" if value > 0 else "0"
