"""A family of networks, loaded into this process: for benchmarks that compact without an engine."""

from __future__ import annotations

import hashlib

from esrfs.compaction import compactor
from esrfs.compaction.compactor import NetworkRef
from esrfs.engine import tiles
from esrfs.networks import loading, registry
from esrfs.reconstruction import Infer, Pixels


def load(name: str) -> tuple[list[NetworkRef], dict[bytes, loading.Network]]:
    """What compaction is told of them, and the networks by the sha256 of their files."""
    networks: dict[bytes, loading.Network] = {}
    specs = {}
    for member, path in registry.family(name).items():
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).digest()
        networks[sha256] = loading.load(data)
        specs[member] = (sha256, networks[sha256].spec)
    return compactor.references(specs), networks


def ready(name: str) -> tuple[list[NetworkRef], Infer]:
    """What compaction takes."""
    references, networks = load(name)

    def infer(sha256: bytes, pixels: Pixels) -> Pixels:
        return tiles.enlarge(networks[sha256], pixels)

    return references, infer
