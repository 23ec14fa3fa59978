"""The reference in a view's fill: 32 bytes by which a store knows its own pixels again (DESIGN 3.6).

A reference is a MAC (keyed BLAKE2s) of a view's scan. So it is the same wherever that scan lies, it tells nothing to
who has not the store's key, nobody else can make one, and it needs no list: whether a file's reference and its scan
belong together shows a single hash, and for a file that lost its reference (a program dropped all metadata) it can be
computed again from the scan.
"""

from __future__ import annotations

import hashlib

REFERENCE_BYTES = 32
_BLOCK = 4096
_FILL = b"\xff" * _BLOCK


def key_of(store_key: bytes) -> bytes:
    """The key (32 bytes) for the references of the store with this key. It goes to the engine, which need not know the
    store's own."""
    return hashlib.blake2s(key=store_key, person=b"esrfrefk").digest()


def reference(key: bytes, scan: bytes | memoryview) -> bytes:
    """The reference (32 bytes) of a view with this ``scan``; FF at its end, which is fill in a JPEG, counts for
    nothing."""
    scan = memoryview(scan)
    return hashlib.blake2s(scan[: without_fill(scan)], key=key, person=b"esrfhome").digest()


def without_fill(data: memoryview) -> int:
    """The length of ``data`` without FF at its end."""
    end = len(data)
    while end and data[end - 1] == 0xFF:
        end -= _BLOCK if end >= _BLOCK and data[end - _BLOCK : end] == _FILL else 1
    return end
