"""The undo window as people see it: dates instead of the ledger's days."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

from esrfs.blob.recipe import Recipe
from esrfs.store import ledger, nameless, originals
from esrfs.store.examine import examine, recipe_of
from esrfs.store.layout import Store


@dataclass(frozen=True)
class Window:
    files: int
    bytes: int
    """Their st_size, together."""
    last_until: str | None
    """ISO date on which the youngest of them may go; None for an empty window."""


def window(store: Store) -> Window:
    """What the window holds now. Raises OSError."""
    today = ledger.days_seen(store.ledger_fd)
    kept = list(originals.entries(store))
    left = max((originals.days_left(store, one, today) for one in kept), default=None)
    return Window(len(kept), sum(one.size for one in kept), None if left is None else _in_days(left))


def until(store: Store, sha256_original: bytes) -> str | None:
    """ISO date up to which this original can be brought back, if space allows; None if the window has it no more.

    The date holds if esrfs sees every day: days count only while the ledger sees them. Raises OSError.
    """
    kept = originals.find(store, sha256_original)
    return _in_days(originals.days_left(store, kept[0])) if kept else None


def first(store: Store, recipe: Recipe) -> bytes | None:
    """sha256 of what a photograph was before programs rewrote what is around its pixels (captions, ratings), if the
    window has that still; None for any other photograph.

    The blob that was made of it lost its name when the file was rewritten, and has the same reference. Raises OSError.
    """
    if not recipe.reference or recipe.sha256_original != recipe.sha256_view:
        return None  # it was not taken over from another
    if not originals.find(store, recipe.sha256_original):
        return None  # the file as it was rewritten would be lost
    for descriptor in nameless.find(store, recipe.reference):
        try:
            st = os.fstat(descriptor)
            info = examine(store, descriptor, st)
            earlier = None if info is None else recipe_of(descriptor, st, info)
        except (OSError, ValueError):
            continue  # as if it had not been kept
        finally:
            os.close(descriptor)
        if (
            earlier is not None
            and earlier.reference == recipe.reference
            and earlier.sha256_original != earlier.sha256_view
            and originals.find(store, earlier.sha256_original)
        ):
            return earlier.sha256_original
    return None


def _in_days(days: int) -> str:
    try:
        return (datetime.date.today() + datetime.timedelta(days=days)).isoformat()
    except OverflowError:  # "for ever" is what the owner meant
        return datetime.date.max.isoformat()
