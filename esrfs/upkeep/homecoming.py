"""Files whose pixels the store knows already: views that a program rewrote, and copies of views.

The blob is looked for by its reference, which is made again from the file's scan: among those that have a name (the
catalog knows where, and goes stale at worst), then among those that lost theirs a while ago (``store/nameless.py``).
Whatever is found is believed only by its content (``compaction/homecoming.py``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from esrfs.blob import container
from esrfs.blob import reference as references
from esrfs.blob.container import Blob
from esrfs.compaction import homecoming
from esrfs.compaction.outcome import Outcome
from esrfs.formats import scan as scans
from esrfs.store import nameless, staging
from esrfs.store.beneath import open_parent
from esrfs.store.catalog import Catalog
from esrfs.store.examine import examine
from esrfs.store.layout import Store

log = logging.getLogger("esrfs.upkeep")

_LARGEST = 1 << 28
"""Bytes of a file that is held in memory here; larger ones are compacted as if they were new."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Recognised:
    """A blob for a file, without a second loss."""

    outcome: Outcome
    trusted: bool
    """False: another store's, to be rebuilt and compared first."""


def recognise(store: Store, catalog: Catalog, descriptor: int, size: int) -> Recognised | None:
    """What the file of ``size`` bytes that is open as ``descriptor`` is known as; None if its pixels are new. (Should
    the file change meanwhile, the outcome is one for other bytes.)

    Raises OSError.
    """
    data = _read(descriptor, size) if size <= _LARGEST else b""
    found = scans.find(data)
    if found is None:
        return None
    key = references.key_of(store.config.key_bytes)
    reference = references.reference(key, memoryview(data)[found.start : found.end])
    for blob in _blobs(store, catalog, reference, len(data)):
        outcome = homecoming.take_over(data, found, blob)
        if outcome is not None:
            return Recognised(outcome, trusted=True)
    carried = homecoming.carried_by(data, found, reference)
    if carried is None or len(carried.avif) >= size:
        return None
    return Recognised(carried, trusted=False)


def _blobs(store: Store, catalog: Catalog, reference: bytes, size: int) -> Iterator[Blob]:
    """Sound blobs of this store with this reference, smaller than ``size`` bytes."""
    for descriptor in _candidates(store, catalog, reference):
        try:
            st = os.fstat(descriptor)
            if st.st_size >= size or examine(store, descriptor, st) is None:
                continue
            blob = container.unpack(_read(descriptor, st.st_size))
        except (OSError, ValueError) as error:
            log.debug("a blob with known pixels can't be used: %s", error)
            continue
        finally:
            os.close(descriptor)
        if blob.recipe.reference == reference:
            yield blob


def _candidates(store: Store, catalog: Catalog, reference: bytes) -> Iterator[int]:
    for identity, path in catalog.blobs_of(reference):
        with contextlib.suppress(OSError):
            yield _open(store, path, identity.ino)
    yield from nameless.find(store, reference)


def _open(store: Store, path: str, inode: int) -> int:
    """The file that was at ``path``. Programs rename a file before they write its successor, and the catalog hears of
    it later: so in its directory it is looked for under any name. Raises OSError."""
    with open_parent(store.root_fd, path) as (directory, name):
        found = name
        st = staging.look(directory, name)
        if st is None or st.st_ino != inode:
            with os.scandir(directory) as listing:
                found = next((entry.name for entry in listing if entry.inode() == inode), name)
        return os.open(found, _READ, dir_fd=directory)


def _read(descriptor: int, size: int) -> bytes:
    parts, offset = [], 0
    while part := os.pread(descriptor, size - offset, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
