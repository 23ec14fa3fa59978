"""What a network is, written into its file: esrfs's own weights are safetensors with this record as metadata.

The safetensors header's ``__metadata__`` holds one key, ``esrfs``: the JSON of a :class:`NetworkSpec`. Fields may be
added with a default; a field's meaning never changes, because stores keep networks for ever.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

METADATA_KEY = "esrfs"

Architecture = Literal["SRVGGNetCompact", "RRDBNet", "Shrinker"]


class NetworkSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    """As in ``esrfs weights list``: ``lite-x2``, ``realesr-general-x4v3``."""
    architecture: Architecture
    arguments: dict[str, int | str]
    """What the architecture's constructor takes."""
    scale: int
    """1 to 4: output pixels for each input pixel, in both directions. A shrinker works on what was made small, so 1."""
    margin: int
    """Input pixels around a tile that its output depends on (receptive-field radius): with so many on each side, tiles
    join without a trace. A multiple of ``multiple``."""
    multiple: int = 1
    """Tiles must begin at multiples of this (a network that unshuffles its input sees blocks, not pixels)."""
    licence: str = ""
    """SPDX identifier; empty if unknown."""
    degradation: str = ""
    """What the network was trained to undo, in words."""
    texture: float = 0.0
    """0: trained for fidelity; 1: against a discriminator, so that what it draws looks natural rather than is true;
    between: mixed of both."""
    training: dict[str, int | float | str] = {}
    """How it was trained: steps, seed, and the like; for people."""


def read_metadata(data: bytes) -> str | None:
    """esrfs's metadata in (the beginning of) a safetensors file: u64 length, JSON header, tensors; None if it has none.

    Raises ValueError when ``data`` doesn't begin like a safetensors file, or ends within the header.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end:
        raise ValueError("not a safetensors file")
    try:
        header = msgspec.json.decode(data[8:end], type=dict[str, dict[str, Any]])
    except msgspec.DecodeError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    return text if isinstance(text, str) else None


def encode(spec: NetworkSpec) -> str:
    return msgspec.json.encode(spec, order="sorted").decode()


def decode(text: str) -> NetworkSpec:
    """Raises ValueError when ``text`` is no NetworkSpec that this esrfs can run."""
    try:
        spec = msgspec.json.decode(text, type=NetworkSpec)
    except msgspec.DecodeError as error:
        raise ValueError(f"the network's description can't be read: {error}") from error
    if not 1 <= spec.scale <= 4 or spec.multiple < 1 or spec.margin < 0 or spec.margin % spec.multiple:
        raise ValueError(f"the network's description contradicts itself: {text}")
    return spec
