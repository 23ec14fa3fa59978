"""The page of ``esrfs report``: what a store saves, how good what it shows is, and how long readers wait."""

from __future__ import annotations

import bisect
import datetime
import itertools
from collections.abc import Sequence
from typing import Any

from esrfs.evaluate import plots
from esrfs.evaluate.page import Block, Figure, Page, Section, Table, Text
from esrfs.upkeep.history import Day, History

_SCORE_EDGES = (50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 100)
_RATIO_EDGES = (1.25, 1.5, 2, 3, 4, 6, 8, 10, 15, 25)
_STATES = {
    "blob": "stored small",
    "refused": "refused",
    "passed_through": "passed through",
    "original": "not tried",
    "pending": "waiting",
}


def make(history: History, status: dict[str, Any]) -> Page:
    """``status``: what ``esrfs status --json`` prints; without a mount its counters are missing or 0."""
    mounted = bool(status.get("mounted"))
    facts = [
        ("Store", f"{status['store']}{'' if mounted else ' (not mounted)'}"),
        ("Preset", str(status["preset"])),
        ("Files", f"{status['files']:,}, of which {status['blobs']:,} stored small"),
        ("Size", f"{_bytes(status['logical_bytes'])} shown, {_bytes(status['stored_bytes'])} stored"),
        ("Ratio", f"{status['ratio']:.2f} : 1"),
        ("Undo window", f"{status['undo_files']:,} originals, {_bytes(status['undo_bytes'])}"),
        ("Freed now", _freed_now(status["freed_now_bytes"])),
    ]
    if status.get("freed_by"):
        facts.append((f"Freed by {status['freed_by']}", _bytes(status["freed_later_bytes"])))
    sections = [
        Section("Savings over time", _savings(history.days)),
        Section("Verdicts", _verdicts(history)),
        Section("Quality", _quality(history)),
        Section("Reading", _reading(status)),
    ]
    return Page(
        title="esrfs report",
        lead="What this store saves, how good the pictures are that it shows, and how long programs wait for them.",
        facts=facts,
        sections=sections,
    )


def _freed_now(freed: int) -> str:
    return f"nothing yet; {_bytes(-freed)} more in use, by originals in the undo window" if freed < 0 else _bytes(freed)


def _savings(days: Sequence[Day]) -> list[Block]:
    if not days:
        return [Text("Nothing was compacted yet.")]
    saved = list(itertools.accumulate(day.original_bytes - day.blob_bytes - day.brought_back_bytes for day in days))
    rows = [
        [
            day.date or "before the first counted day",
            f"{day.compacted:,}",
            _bytes(day.original_bytes),
            _bytes(day.blob_bytes),
            f"{day.brought_back:,}",
            _bytes(total),
        ]
        for day, total in zip(days, saved, strict=True)
    ]
    header = ["", "compacted", "their originals", "stored as", "brought back", "saved in all"]
    table = Table(header, rows, "By day, from the ledger")
    dated = [(day, total) for day, total in zip(days, saved, strict=True) if day.date]
    if len(dated) < 2:
        return [table]
    unit, divisor = ("GB", 1e9) if max(saved) >= 1e9 else ("MB", 1e6)
    points = [(float(datetime.date.fromisoformat(day.date).toordinal()), total / divisor) for day, total in dated]
    caption = (
        f"Bytes saved since the beginning, from {dated[0][0].date} to {dated[-1][0].date}: {_bytes(saved[-1])}. "
        "The undo window is not subtracted; files that were deleted since still count."
    )
    svg = plots.lines("savings", [plots.Line("saved", points)], "", f"saved, {unit}", dates=True)
    return [Figure(svg, caption, table)]


def _verdicts(history: History) -> list[Block]:
    if not history.groups:
        return [Text("The store is empty.")]
    names = [_STATES[group.state] + (f": {_words(group.reason)}" if group.reason else "") for group in history.groups]
    rows = [[name, f"{g.files:,}", _bytes(g.bytes)] for name, g in zip(names, history.groups, strict=True)]
    caption = f"Files by verdict and reason; most are {names[0]} ({history.groups[0].files:,})."
    svg = plots.bars("verdicts", names, [group.files for group in history.groups], "files")
    return [Figure(svg, caption), Table(["", "files", "shown"], rows, "Files by verdict and reason")]


def _quality(history: History) -> list[Block]:
    blobs = history.blobs
    if not blobs.count:
        return [Text("No picture is stored small yet.")]
    lossy = [(score, count) for score, count in blobs.scores if score < 100]
    blocks: list[Block] = []
    told = f"{blobs.count - sum(count for _, count in lossy):,} of {blobs.count:,} are stored without loss."
    if lossy:
        labels, counts = _classes(_SCORE_EDGES, lossy)
        caption = (
            f"SSIMULACRA2 of the views against their originals, as the gate measured it: median "
            f"{_median(lossy):.1f}, least {lossy[0][0]:.1f}. {told}"
        )
        table = Table(["", "pictures"], [[name, f"{count:,}"] for name, count in zip(labels, counts, strict=True)])
        blocks.append(Figure(plots.bars("scores", labels, counts, "pictures", upright=True), caption, table))
    else:
        blocks.append(Text(told))
    labels, counts = _classes(_RATIO_EDGES, blobs.ratios)
    caption = (
        f"Original : stored of each blob: median {_median(blobs.ratios):.1f}, least {blobs.ratios[0][0]:.1f}, "
        f"most {blobs.ratios[-1][0]:.1f}."
    )
    table = Table(["", "pictures"], [[name, f"{count:,}"] for name, count in zip(labels, counts, strict=True)])
    blocks.append(Figure(plots.bars("ratios", labels, counts, "pictures", upright=True), caption, table))
    rows = [[f"1/{scale}" if scale > 1 else "full", f"{count:,}"] for scale, count in blobs.scales]
    blocks.append(Table(["", "pictures"], rows, "Resolution of the stored pictures"))
    return blocks


def _reading(status: dict[str, Any]) -> list[Block]:
    if not status.get("mounted"):
        return [
            Text(
                "The store is not mounted. Cache hits and waiting times are counted by a mount, from its start: give "
                "this command while the store is mounted."
            )
        ]
    asked = status["cache_hits"] + status["cache_misses"]
    hits = f"{100 * status['cache_hits'] / asked:.0f} %" if asked else "nothing asked yet"
    rows = [
        ["cache hit rate", hits],
        ["cache hits", f"{status['cache_hits']:,}"],
        ["cache misses", f"{status['cache_misses']:,}"],
        ["cache size", _bytes(status["cache_bytes"])],
        ["pictures rebuilt for readers", f"{status['engine_calls']:,}"],
        ["rebuilt, but not bit for bit", f"{status['engine_inexact']:,}"],
        ["failed", f"{status['engine_failures']:,}"],
        ["engine restarts", f"{status['engine_restarts']:,}"],
    ]
    blocks: list[Block] = [Table(["", "since this mount began"], rows, "Cache and engine")]
    latency = status["engine_latency"]
    total = sum(latency["counts"])
    if total:
        bounds = latency["bounds"]
        labels = [f"≤ {bound:g} s" for bound in bounds] + [f"> {bounds[-1]:g} s"]
        table = Table(["", "pictures"], [[a, f"{n:,}"] for a, n in zip(labels, latency["counts"], strict=True)])
        caption = (
            f"From the first request for a picture to its last byte: {latency['seconds'] / total:.2f} s in the mean of "
            f"{total:,}, queue and the engine's start included."
        )
        svg = plots.bars("latency", labels, latency["counts"], "pictures", upright=True)
        blocks.insert(0, Figure(svg, caption, table))
    return blocks


def _median(values: Sequence[tuple[float, int]]) -> float:
    """Of (value, how often), ascending: the lower one of an even number."""
    ends = list(itertools.accumulate(count for _, count in values))
    return values[bisect.bisect_left(ends, (ends[-1] + 1) // 2)][0]


def _classes(edges: Sequence[float], values: Sequence[tuple[float, int]]) -> tuple[list[str], list[int]]:
    """Names and counts of the classes below, between and above ``edges``, of (value, how often); empty ones at both
    ends are left out."""
    counts = [0] * (len(edges) + 1)
    for value, count in values:
        counts[bisect.bisect_right(edges, value)] += count
    names = [f"< {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)), f"≥ {edges[-1]:g}"]
    used = [index for index, count in enumerate(counts) if count]
    kept = slice(used[0], used[-1] + 1)
    return names[kept], counts[kept]


def _words(reason: str) -> str:
    return reason.replace("_", " ")


def _bytes(count: float) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} TB"
