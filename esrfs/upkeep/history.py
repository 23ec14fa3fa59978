"""How a store came to be as it is: what compaction saved, day by day, and how its files stand. Needs no mount.

Days and bytes come from the ledger, so they also tell of blobs that are gone since. How files stand comes from the
catalog; blobs that it does not know are asked themselves (one short read), and no picture is decoded.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

import msgspec

from esrfs.store import ledger, originals
from esrfs.store.beneath import beneath
from esrfs.store.catalog import Catalog
from esrfs.store.examine import examine, may_be_blob, recipe_of
from esrfs.store.identity import Identity
from esrfs.store.layout import Store
from esrfs.store.ledger import Done, Intent, Opened, ToPlain
from esrfs.upkeep import walk
from esrfs.upkeep.check import readings


class Day(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger tells of one day on which something changed."""

    date: str
    """ISO, of the local clock; empty for steps before the store's first counted day."""
    compacted: int = 0
    """Files that became blobs."""
    original_bytes: int = 0
    """Of those files, before."""
    blob_bytes: int = 0
    """Of those files, after."""
    brought_back: int = 0
    """Blobs that became plain files again, since a program wrote to them or `esrfs restore` was asked to."""
    brought_back_bytes: int = 0
    """By how much they grew."""


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Files that stand alike."""

    state: str
    """``blob``, ``refused``, ``passed_through``, ``original``; ``pending``: compaction has yet to look at them."""
    reason: str
    files: int
    bytes: int
    """What the view shows of them."""


class Blobs(msgspec.Struct, frozen=True, kw_only=True):
    """How many there are of each kind, ascending: of a million photographs no list is made."""

    count: int
    scores: list[tuple[float, int]]
    """(SSIMULACRA2 of the view to a hundredth, blobs); 100 for what is stored without loss."""
    ratios: list[tuple[float, int]]
    """(bytes of the view / bytes of the blob to three digits, blobs)"""
    scales: list[tuple[int, int]]


class History(msgspec.Struct, frozen=True, kw_only=True):
    days: list[Day]
    """Oldest first."""
    groups: list[Group]
    """Most files first."""
    blobs: Blobs


class _Blob(NamedTuple):
    score: float
    scale: int
    view_bytes: int
    stored_bytes: int


def of(store: Store, catalog: Catalog) -> History:
    """Raises OSError when the store can't be read."""
    files: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    scores: Counter[float] = Counter()
    ratios: Counter[float] = Counter()
    scales: Counter[int] = Counter()
    for found in walk.files(store):
        entry = catalog.get(Identity.from_stat(found.st))
        blob = _blob(store, catalog, found) if may_be_blob(found.st) else None
        if blob is not None:
            scores[round(blob.score, 2)] += 1
            ratios[float(f"{blob.view_bytes / blob.stored_bytes:.3g}")] += 1
            scales[blob.scale] += 1
            key, size = ("blob", ""), blob.view_bytes
        elif entry is not None and entry.state in ("original", "refused", "passed_through"):
            key, size = (entry.state, entry.reason), found.st.st_size
        else:
            key, size = ("pending", ""), found.st.st_size
        files[key] += 1
        sizes[key] += size
    groups = [
        Group(state=state, reason=reason, files=count, bytes=sizes[state, reason])
        for (state, reason), count in sorted(files.items(), key=lambda item: (-item[1], item[0]))
    ]
    blobs = Blobs(
        count=scales.total(),
        scores=sorted(scores.items()),
        ratios=sorted(ratios.items()),
        scales=sorted(scales.items()),
    )
    return History(days=days(store), groups=groups, blobs=blobs)


def _blob(store: Store, catalog: Catalog, found: walk.Found) -> _Blob | None:
    """None for what is no blob of this store, or can't be read."""
    entry = catalog.get(Identity.from_stat(found.st))
    if entry is not None and entry.state == "blob" and entry.score is not None:
        return _Blob(entry.score, entry.scale, entry.view_size, found.st.st_size)
    try:
        descriptor = beneath(found.directory, found.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        st = os.fstat(descriptor)
        info = examine(store, descriptor, st)
        recipe = None if info is None else recipe_of(descriptor, st, info)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
    if info is None or recipe is None:
        return None
    return _Blob(recipe.scores.ssimulacra2, recipe.scale, info.view_size, st.st_size)


def days(store: Store) -> list[Day]:
    """From all ledgers, of this host and others: steps that were carried through. Raises OSError."""
    calendar = ledger.days(store.ledger_fd)
    dates = {day.number: day.date for day in calendar}
    boots: dict[str, int] = {}
    for day in calendar:
        boots.setdefault(day.boot, day.number)
    totals: dict[int, Day] = {}
    for _, reading in readings(store):
        done = {record.job for record in reading.records if isinstance(record, Done)}
        today = 0
        for record in reading.records:
            if isinstance(record, Opened):
                today = boots.get(record.boot, 0)
            elif isinstance(record, Intent):
                kept = originals.parse(record.kept)
                today = today if kept is None else kept.day
                if record.job in done:
                    _add(totals, today, compacted=1, original_bytes=record.original.size, blob_bytes=record.blob.size)
            elif isinstance(record, ToPlain) and record.job in done:
                # This record has no day: it is that of the step before it, or of the boot.
                _add(totals, today, brought_back=1, brought_back_bytes=record.plain.size - record.blob.size)
    return [msgspec.structs.replace(day, date=dates.get(number, "")) for number, day in sorted(totals.items())]


def _add(totals: dict[int, Day], number: int, **more: int) -> None:
    before = totals.get(number, Day(date=""))
    sums = {name: getattr(before, name) + value for name, value in more.items()}
    totals[number] = msgspec.structs.replace(before, **sums)
