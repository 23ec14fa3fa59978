"""A view that comes home: a file whose compressed pixels are those of a view that a blob stands for.

A program has written another envelope around the same pixels (captions, ratings, dates), or has copied the file. Then
the blob's picture is taken over bit for bit, and the recipe gets the new envelope. The new view is the file as the
program wrote it, to the last byte: nothing is lost a second time, and no network runs.

A pure function, as compaction is, and light: it runs in the mount's process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import msgspec

from esrfs import __version__
from esrfs.blob import carried as carried_format
from esrfs.blob import recipe as recipe_format
from esrfs.blob.container import Blob
from esrfs.blob.recipe import Literal, Recipe, Run, Scores, Span
from esrfs.compaction.outcome import Outcome, Verdict
from esrfs.formats import scan as scans
from esrfs.formats.scan import Scan

_LEAST_RUN = 256
"""Bytes of fill; shorter runs are not worth a span."""
_RUNS = {value: re.compile(b"%c+" % value, re.DOTALL) for value in (0, 0xFF)}
_UNCHANGED = Scores(100.0, 100.0, 99.0)
"""The view is the file as it was written. What it lost before is between it and another store."""


def carried_by(data: bytes, found: Scan, reference: bytes) -> Outcome | None:
    """A blob for the file ``data``, whose scan is ``found``, out of what its fill carries; ``reference`` is the scan's.
    None if it carries nothing.

    It is not to be trusted: whether the file is the view of this blob, to the bit, only its reconstruction tells.
    """
    carried = carried_format.find(found.said)
    if carried is None:
        return None
    # The pinned length leaves room for other hardware, as at compaction, as far as there is fill.
    scan = found.end - found.start
    length = min(scan + scan // 64 + 64, found.fill_end - found.start)
    digest = hashlib.sha256(data).digest()
    recipe = Recipe(
        width=carried.width,
        height=carried.height,
        original_size=len(data),
        sha256_original=digest,
        sha256_view=digest,
        preset=carried.preset,
        scale=carried.scale,
        network=carried.network,
        network_sha256=carried.network_sha256,
        quality=carried.quality,
        subsampling=carried.subsampling,
        coding=carried.coding,
        prefix=spans(data[: found.start]),
        scan_length=length,
        suffix=spans(data[found.start + length :]),
        encoder="another store's",
        scores=_UNCHANGED,
        created_by=f"esrfs {__version__}",
        reference=reference,
    )
    return _outcome(recipe, carried.avif, found.kind, "the view carried its blob, which was taken over as it is")


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
    return _outcome(recipe, blob.avif, found.kind, "its pixels are those of a view: the blob was taken over as it is")


def _outcome(recipe: Recipe, avif: bytes, kind: str, message: str) -> Outcome:
    return Outcome(
        verdict=Verdict.COMPACTED,
        message=message,
        recipe=recipe_format.encode(recipe_format.folded(recipe, avif)),
        avif=avif,
        kind=kind,
        width=recipe.width,
        height=recipe.height,
        score=recipe.scores.ssimulacra2,
    )


def spans(data: bytes) -> list[Span]:
    """``data`` as literal bytes and runs."""
    result: list[Span] = []
    offset = 0
    for start, end in _runs(data):
        if start > offset:
            result.append(Literal(data[offset:start]))
        result.append(Run(data[start], end - start))
        offset = end
    if offset < len(data):
        result.append(Literal(data[offset:]))
    return result


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    """Where runs begin and end. By ``find``, which takes time in proportion to the bytes whatever they are: an
    expression that counts to 256 begins anew at each byte of a run that is a little shorter."""
    next_of = dict.fromkeys(_RUNS, 0)
    at = 0
    while True:
        for value, found in next_of.items():
            if 0 <= found <= at:
                next_of[value] = data.find(bytes([value]) * _LEAST_RUN, at)
        start = min((found for found in next_of.values() if found >= 0), default=-1)
        if start < 0:
            return
        run = _RUNS[data[start]].match(data, start)
        assert run is not None
        yield run.span()
        at = run.end()


def _is_its_scan(data: bytes, found: Scan, old: Recipe) -> bool:
    """The recipe pins its whole view by sha256: with this scan in it, it must be that view."""
    fill = old.scan_length - (found.end - found.start)
    if fill < 0:
        return False
    scan = memoryview(data)[found.start : found.end]
    view = b"".join((recipe_format.expand(old.prefix), scan, b"\xff" * fill, recipe_format.expand(old.suffix)))
    was = scans.find(view) if hashlib.sha256(view).digest() == old.sha256_view else None
    return was is not None and (was.kind, was.tables) == (found.kind, found.tables)


def _sha256(recipe: Recipe, scan: memoryview) -> bytes:
    """Of the recipe's view, if this is its scan."""
    state = hashlib.sha256(recipe_format.expand(recipe.prefix))
    state.update(scan)
    state.update(recipe_format.expand(recipe.suffix))
    return state.digest()
