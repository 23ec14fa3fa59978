"""How a store stands: what is in it, what it saves, what the undo window holds. Needs no mount."""

from __future__ import annotations

import os

import msgspec

from esrfs.store.beneath import beneath
from esrfs.store.catalog import Catalog
from esrfs.store.examine import examine, may_be_blob
from esrfs.store.identity import Identity
from esrfs.store.layout import Store
from esrfs.upkeep import undo, walk


class StatusCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of ``esrfs status --json`` that need no mount; a key's meaning never changes. Bytes are st_size."""

    files: int
    """Regular files: ``blobs`` + ``originals``."""
    blobs: int
    originals: int
    """Files that are as they were written; ``refused``, ``passed_through`` and ``pending`` are among them."""
    refused: int
    passed_through: int
    pending: int
    """Compaction has yet to look at them."""
    logical_bytes: int
    """What the view shows; a file with several names counts once."""
    stored_bytes: int
    """What takes the files' place in the store; the undo window comes on top."""
    ratio: float
    """logical_bytes / stored_bytes; 1 for an empty store."""
    undo_files: int
    """Originals of compacted files in the undo window."""
    undo_bytes: int
    freed_now_bytes: int
    """What the store saves at present: logical_bytes - stored_bytes - undo_bytes. Negative while the window fills."""
    freed_later_bytes: int
    """What it will have saved when the originals now in the window are gone: logical_bytes - stored_bytes."""
    freed_by: str | None
    """ISO date of that; None if the window is empty."""


def count(store: Store, catalog: Catalog) -> StatusCounts:
    """Walk the store. Opens only files that may be blobs and that the catalog does not know."""
    states = {"blob": 0, "original": 0, "refused": 0, "passed_through": 0, "pending": 0}
    logical = stored = 0
    counted: set[tuple[int, int]] = set()
    for found in walk.files(store):
        state, view_size = _look(store, catalog, found)
        states[state] += 1
        if found.st.st_nlink > 1:
            key = (found.st.st_dev, found.st.st_ino)
            if key in counted:
                continue
            counted.add(key)
        logical += view_size
        stored += found.st.st_size
    window = undo.window(store)
    return StatusCounts(
        files=sum(states.values()),
        blobs=states["blob"],
        originals=sum(states.values()) - states["blob"],
        refused=states["refused"],
        passed_through=states["passed_through"],
        pending=states["pending"],
        logical_bytes=logical,
        stored_bytes=stored,
        ratio=round(logical / stored, 3) if stored else 1.0,
        undo_files=window.files,
        undo_bytes=window.bytes,
        freed_now_bytes=logical - stored - window.bytes,
        freed_later_bytes=logical - stored,
        freed_by=window.last_until,
    )


def _look(store: Store, catalog: Catalog, found: walk.Found) -> tuple[str, int]:
    """State of a file, and the size of its view."""
    entry = catalog.get(Identity.from_stat(found.st))
    if may_be_blob(found.st):
        if entry is not None and entry.state == "blob":
            return "blob", entry.view_size
        try:
            descriptor = beneath(found.directory, found.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return "pending", found.st.st_size  # gone, or not ours to read
        try:
            info = examine(store, descriptor, os.fstat(descriptor))
        except OSError:
            return "pending", found.st.st_size  # `esrfs check` tells that it can't be read
        finally:
            os.close(descriptor)
        if info is not None:
            return "blob", info.view_size
    if entry is not None and entry.state in ("original", "refused", "passed_through"):
        return entry.state, found.st.st_size
    return "pending", found.st.st_size
