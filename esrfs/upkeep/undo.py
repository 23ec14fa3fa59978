"""The undo window as people see it: dates instead of the ledger's days."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from esrfs.store import ledger, originals
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


def _in_days(days: int) -> str:
    return (datetime.date.today() + datetime.timedelta(days=days)).isoformat()
