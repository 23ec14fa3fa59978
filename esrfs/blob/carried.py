"""The whole blob in its view's fill (``carry = full``): so that another store need not make it again.

This docstring is the format's reference. In the note (``formats/view.py``), after the reference::

    8 bytes  'esrfblob'
    u32      length of what follows, big-endian
    msgpack  ``Carried``

Nothing in it is of the envelope, of the store or of a person: it tells what the pixels tell. Who edits the picture with
a program that keeps segments it does not know ships these pixels, too: that is why it is off unless somebody asks.
Nobody believes it: the store that finds it rebuilds the view from it once, and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from esrfs.blob.recipe import JpegCoding, PngCoding, WebpCoding
from esrfs.blob.reference import REFERENCE_BYTES

_MAGIC = b"esrfblob"
_LENGTH_BYTES = 4
_VERSION = 1
_MOST_TRIES = 4

Coding = JpegCoding | PngCoding | WebpCoding
"""Of the formats that have fill. (None of them has long lists: what strangers' files say is read in little memory.)"""


class Carried(msgspec.Struct, frozen=True, kw_only=True):
    """What another store needs of a recipe (fields as there), and the picture."""

    version: int = _VERSION
    width: Annotated[int, Meta(ge=1)]
    height: Annotated[int, Meta(ge=1)]
    preset: str
    scale: Annotated[int, Meta(ge=1, le=4)]
    network: str
    network_sha256: bytes
    quality: Annotated[int, Meta(ge=0, le=100)]
    subsampling: str
    coding: Coding
    avif: bytes


_decoder = msgspec.msgpack.Decoder(Carried)


def encode(carried: Carried) -> bytes:
    """The note's bytes after the reference."""
    body = msgspec.msgpack.encode(carried)
    return _MAGIC + len(body).to_bytes(_LENGTH_BYTES, "big") + body


def find(said: Sequence[bytes]) -> Carried | None:
    """What a file's fill (the data of each of its segments, in order) carries; None if there is nothing that can be
    read."""
    # The last is that of these pixels: a program may have kept the fill of a view that it edited.
    begun = [index for index, part in enumerate(said) if part.startswith(_MAGIC, REFERENCE_BYTES)]
    for index in reversed(begun[-_MOST_TRIES:]):
        start = REFERENCE_BYTES + len(_MAGIC) + _LENGTH_BYTES
        length = int.from_bytes(said[index][start - _LENGTH_BYTES : start], "big")
        try:
            carried = _decoder.decode(b"".join(said[index:])[start : start + length])
        except msgspec.DecodeError:
            continue
        if carried.version == _VERSION:
            return carried
    return None
