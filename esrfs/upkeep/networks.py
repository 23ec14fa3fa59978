"""The networks that blobs name. The store keeps a copy of each. Where that was lost (a backup left it out), the same
file may still be among the networks that this esrfs has, under whatever name: its sha256 tells.
"""

from __future__ import annotations

import logging

from esrfs.networks import registry
from esrfs.store.errors import Problem, StoreError
from esrfs.store.layout import NETWORKS, RESERVED, Store

log = logging.getLogger("esrfs.upkeep")


def network_bytes(store: Store, sha256: bytes) -> bytes:
    """The network's file. What the store has lost and esrfs has is put back, durably; a store that can't be written is
    served all the same.

    Raises StoreError when it is nowhere, OSError when the store's copy can't be read and there is no other.
    """
    try:
        return store.network_bytes(sha256)
    except (StoreError, OSError) as error:
        found = registry.with_sha256(sha256)
        if found is None and isinstance(error, StoreError):
            raise StoreError(f"{error} {_advice(sha256)}", Problem.DAMAGED) from error
        if found is None:
            raise
    path, data = found
    if store.readonly:
        log.info("%s: %s is used in place of a network that the store has lost", store.path, path)
        return data
    place = f"{RESERVED}/{NETWORKS}/{sha256.hex()}"
    try:
        store.keep_network(data)
    except OSError as error:
        log.warning("%s: %s was lost and can't be put back (%s); %s is used", store.path, place, error, path)
    else:
        log.warning("%s: %s was lost and is put back: %s is the same file", store.path, place, path)
    return data


def _advice(sha256: bytes) -> str:
    for name, entry in registry.official().items():
        if entry.sha256 == sha256.hex():
            return f"Or have it downloaded: esrfs weights pull {name}"
    return "If it lies somewhere else, it is found there after: esrfs weights add FILE"
