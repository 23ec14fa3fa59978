"""A view that comes home: a file whose compressed pixels are those of a view that a blob stands for.

A program has written another envelope around the same pixels (captions, ratings, dates), or has copied the file. Then
the blob's picture is taken over bit for bit, and the recipe gets the new envelope. The new view is the file as the
program wrote it, to the last byte: nothing is lost a second time, and no network runs.

A pure function, as compaction is, and light: it runs in the mount's process.
"""

from __future__ import annotations

import hashlib
import re

import msgspec

from esrfs import __version__
from esrfs.blob import recipe as recipe_format
from esrfs.blob.container import Blob
from esrfs.blob.recipe import Literal, Recipe, Run, Span
from esrfs.compaction.outcome import Outcome, Verdict
from esrfs.formats import scan as scans
from esrfs.formats.scan import Scan

_RUN = re.compile(rb"\x00{256,}|\xff{256,}")
"""Fill; shorter runs are not worth a span."""


def take_over(data: bytes, found: Scan, blob: Blob) -> Outcome | None:
    """The blob's picture for the file ``data``, whose scan is ``found``; None unless it is the scan of the blob's own
    view, to the bit, to be decoded with the same tables."""
    old = blob.recipe
    if not _is_its_scan(data, found, old):
        return None
    length = min(old.scan_length, found.fill_end - found.start)
    end = found.start + length
    digest = hashlib.sha256(data).digest()
    recipe = msgspec.structs.replace(
        old,
        original_size=len(data),
        sha256_original=digest,
        sha256_view=digest,
        prefix=spans(data[: found.start]),
        scan_length=length,
        suffix=spans(data[end:]),
        created_by=f"esrfs {__version__}",
    )
    if _sha256(recipe, memoryview(data)[found.start : end]) != digest:
        return None
    return Outcome(
        verdict=Verdict.COMPACTED,
        message="its pixels are those of a view: the blob was taken over as it is",
        recipe=recipe_format.encode(recipe),
        avif=blob.avif,
        kind=found.kind,
        width=recipe.width,
        height=recipe.height,
        score=recipe.scores.ssimulacra2,
    )


def spans(data: bytes) -> list[Span]:
    """``data`` as literal bytes and runs."""
    result: list[Span] = []
    offset = 0
    for match in _RUN.finditer(data):
        if match.start() > offset:
            result.append(Literal(data[offset : match.start()]))
        result.append(Run(match[0][0], len(match[0])))
        offset = match.end()
    if offset < len(data):
        result.append(Literal(data[offset:]))
    return result


def _is_its_scan(data: bytes, found: Scan, old: Recipe) -> bool:
    """The recipe pins its whole view by sha256: with this scan in it, it must be that view."""
    scan = memoryview(data)[found.start : found.end]
    fill = old.scan_length - len(scan)
    return (
        fill >= 0
        and _sha256(old, scan, fill) == old.sha256_view
        and found.tables == scans.tables(found.kind, recipe_format.expand(old.prefix))
    )


def _sha256(recipe: Recipe, scan: memoryview, fill: int = 0) -> bytes:
    """Of the recipe's view, if this, and ``fill`` bytes of FF, is its scan."""
    state = hashlib.sha256(recipe_format.expand(recipe.prefix))
    state.update(scan)
    state.update(b"\xff" * fill)
    state.update(recipe_format.expand(recipe.suffix))
    return state.digest()
