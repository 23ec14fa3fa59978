"""A blob's bytes: an AVIF picture (or a JPEG XL, where nothing was lost) and, after it, one ISO-BMFF ``uuid`` box with
the recipe. Both formats are such boxes one after the other, and their readers skip boxes that they don't know.

This docstring is the format's reference::

    picture     any length       AVIF or JPEG XL, as the encoder wrote it
    uuid box    last in the file
      u32       size             of the box, this field included
      4 bytes   'uuid'
      16 bytes  BOX_UUID
      u32       CRC-32           of the picture: one that rotted on its disk is never shown
      payload   payload_length   the encoded recipe (recipe.py), compressed as the flags say
      zeros     0 to 63          padding, so that the file's size is 13 mod 64
      footer    64 bytes         the last thing in the box, and so in the file

    footer, big-endian (ISO-BMFF's order)
      0   5     magic            'esrfs'
      5   u8    format           FORMAT (1)
      6   u8    recipe version   the recipe's ``version``: a reader that is too old must know at stat already
      7   u8    flags            0: the payload is the recipe as encoded; 1: zlib-compressed, in the first blobs
                                 of format 1; 2: raw deflate with a preset dictionary (dictionary.py)
      8   16    store id
      24  u64   view size        what stat shows: the recipe's ``original_size``
      32  u32   box length       size of the uuid box; no absolute offsets, so that the box may be moved
      36  u32   payload length
      40  u32   CRC-32           of the payload as stored
      44  16    MAC              BLAKE2s of bytes 0 to 43 with the store's 32-byte key, person 'esrfblob'
      60  u32   CRC-32           of bytes 0 to 59

A stat thus costs at most one read of 64 bytes, and none for sizes that are not 13 mod 64. The MAC makes sure that no
file which a program writes is taken for a blob: who does not know the key can't make one. (It protects against
misreading, not against somebody who can read and write the store itself: a copy of a genuine blob is that blob.)

Programs that rewrite the AVIF's metadata move the box or change the size; ``find_by_walk`` and ``unpack`` still find
it. A footer of a newer format or recipe version, or with unknown flags, is not ours to read: the blob is then shown as
the AVIF that it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from esrfs.blob import dictionary
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Recipe

FORMAT = 1
BOX_UUID = bytes.fromhex("6c0d3b0e5f2e4d1f9a57e5f2b10b5e51")
FOOTER_BYTES = 64
STORE_ID_BYTES = 16
KEY_BYTES = 32

_MAGIC = b"esrfs"
_PLAIN, _ZLIB, _DICTIONARY_1 = 0, 1, 2
"""All flags that there are; the second is only read."""
_SIGNED = struct.Struct(">5sBBB16sQIII")
_MAC_BYTES = 16
_CRC = struct.Struct(">I")
_BOX_HEADER = struct.Struct(">I4s")
_BEFORE_PAYLOAD = _BOX_HEADER.size + len(BOX_UUID) + _CRC.size
SMALLEST_BOX = _BEFORE_PAYLOAD + FOOTER_BYTES
_BOXES_TO_WALK = 64
_WRONG_BYTES = 2
"""Of magic and store id, 21 bytes, that may differ in a footer that is taken for a damaged one."""
_RECIPE_LIMIT = 1 << 30
"""A payload may not inflate beyond this many bytes; a recipe holds all that follows the picture, even a video."""

assert _SIGNED.size + _MAC_BYTES + _CRC.size == FOOTER_BYTES


class NotABlob(ValueError):  # noqa: N818
    """These bytes don't bear a footer that this version of esrfs reads."""


class BlobDamaged(ValueError):  # noqa: N818
    """These bytes bear a footer of a blob, but the rest does not agree with it."""


@dataclass(frozen=True)
class Footer:
    store_id: bytes
    view_size: int
    """Bytes of the view."""
    box_length: int
    """Bytes of the uuid box; where the box is last in a file, the AVIF is what comes before it."""
    payload_length: int
    payload_crc: int
    flags: int
    mac: bytes
    raw: bytes
    """The 64 bytes themselves."""

    def genuine(self, store_id: bytes, key: bytes) -> bool:
        """Whether the store with this id and key wrote the footer."""
        return self.store_id == store_id and hmac.compare_digest(self.mac, _mac(self.raw[: _SIGNED.size], key))


@dataclass(frozen=True)
class Blob:
    avif: bytes
    """The picture; the box is still in it if it was not last (to cut it out would break the offsets inside)."""
    recipe: Recipe
    recipe_bytes: bytes
    """The recipe as encoded, uncompressed."""
    store_id: bytes


def pack(avif: bytes, recipe: bytes, store_id: bytes, key: bytes) -> bytes:
    """A blob from its picture and its encoded recipe, for the store with this id (16 bytes) and key (32 bytes).

    Raises ValueError if ``recipe`` is no valid recipe, or id or key have the wrong length.
    """
    if len(store_id) != STORE_ID_BYTES or len(key) != KEY_BYTES:
        raise ValueError(
            f"a store id has {STORE_ID_BYTES} bytes and a key {KEY_BYTES}; got {len(store_id)} and {len(key)}"
        )
    decoded = recipe_format.decode(recipe)
    smaller = dictionary.compressed(recipe)
    payload, flags = (smaller, _DICTIONARY_1) if len(smaller) < len(recipe) else (recipe, _PLAIN)
    length = SMALLEST_BOX + len(payload)
    fill = padding(len(avif) + length)
    length += fill
    signed = _SIGNED.pack(
        _MAGIC,
        FORMAT,
        decoded.version,
        flags,
        store_id,
        decoded.original_size,
        length,
        len(payload),
        zlib.crc32(payload),
    )
    footer = signed + _mac(signed, key)
    footer += _CRC.pack(zlib.crc32(footer))
    box_start = _BOX_HEADER.pack(length, b"uuid") + BOX_UUID + _CRC.pack(zlib.crc32(avif))
    return b"".join((avif, box_start, payload, bytes(fill), footer))


def padding(size: int) -> int:
    """The bytes that a file of ``size`` bytes lacks to be of a blob's size."""
    return (13 - size) % 64


def may_be_blob(size: int) -> bool:
    """Whether a file of ``size`` bytes can be a blob as ``pack`` makes them: most other files need no look."""
    return size % 64 == 13 and size > SMALLEST_BOX


def read_footer(fd: int, size: int, store_id: bytes | None = None, key: bytes | None = None) -> Footer | None:
    """The footer at the end of the file ``fd`` of ``size`` bytes: one read of 64 bytes, none if the size tells.

    With ``store_id`` and ``key``: None unless that very store wrote it, which is how a mount must ask. Without: any
    store's (for ``check``). None: not a blob. Raises OSError if reading fails.
    """
    if not may_be_blob(size):
        return None
    footer = _parse(os.pread(fd, FOOTER_BYTES, size - FOOTER_BYTES))
    if footer is None or footer.box_length > size:
        return None
    if store_id is not None and key is not None and not footer.genuine(store_id, key):
        return None
    return footer


def footer_is_damaged(fd: int, size: int, store_id: bytes) -> bool:
    """Whether the file ``fd``, which has no footer that can be read, ends in what was one of this store until a few
    bytes of it rotted.

    Such a file must not be shown as the small AVIF that is left of it: a mirror would take it over. Raises OSError.
    """
    if not may_be_blob(size):
        return False
    raw = os.pread(fd, FOOTER_BYTES, size - FOOTER_BYTES)
    if len(raw) != FOOTER_BYTES or _CRC.unpack(raw[-_CRC.size :])[0] == zlib.crc32(raw[: -_CRC.size]):
        return False
    wrong = sum(found != due for found, due in zip(raw[:5] + raw[8:24], _MAGIC + store_id, strict=True))
    return wrong <= _WRONG_BYTES


def read_recipe(fd: int, size: int, footer: Footer | None = None) -> Recipe | None:
    """The recipe of the file ``fd`` of ``size`` bytes, without reading its picture; None when the file has no footer.

    Pass the ``footer`` that ``read_footer`` gave, so that the recipe is the one of that footer, checked by its MAC.
    Raises BlobDamaged if the box doesn't agree with its footer, OSError if reading fails.
    """
    footer = footer or read_footer(fd, size)
    if footer is None:
        return None
    start = size - footer.box_length
    payload = _payload(_read_exactly(fd, start, footer.box_length), footer)
    return _decode(payload, lambda: _read_exactly(fd, 0, start))


def unpack(data: bytes) -> Blob:
    """Take a whole blob apart, wherever its box lies.

    Raises NotABlob if there is no box of ours, BlobDamaged if there is one that doesn't agree with its footer or with
    the picture. A picture whose box was moved was rewritten, so it can't be checked.
    """
    footer = _parse(data[-FOOTER_BYTES:])
    if footer is not None and footer.box_length <= len(data):
        start = len(data) - footer.box_length
        avif = data[:start]
        if data[start + _BEFORE_PAYLOAD - _CRC.size : start + _BEFORE_PAYLOAD] != _CRC.pack(zlib.crc32(avif)):
            raise BlobDamaged("the blob's picture is damaged: its checksum differs")
    else:
        found = _walk(lambda offset, count: data[offset : offset + count], len(data))
        if found is None:
            raise NotABlob("no esrfs box in these bytes")
        start, footer = found
        avif = data
    recipe_bytes = _payload(data[start : start + footer.box_length], footer)
    return Blob(avif, _decode(recipe_bytes, lambda: avif), recipe_bytes, footer.store_id)


def find_by_walk(fd: int, size: int) -> Footer | None:
    """The footer of a blob that lost its shape (a program rewrote the AVIF's metadata), else None.

    Its box may lie anywhere, its size may be any. Reads the headers of the top-level boxes only. Such a file is not
    shown as a view: this is for ``check``.
    """
    found = _walk(lambda offset, count: os.pread(fd, count, offset), size)
    return found[1] if found else None


def _mac(signed: bytes, key: bytes) -> bytes:
    return hashlib.blake2s(signed, key=key, digest_size=_MAC_BYTES, person=b"esrfblob").digest()


def _parse(raw: bytes) -> Footer | None:
    if len(raw) != FOOTER_BYTES or not raw.startswith(_MAGIC):
        return None
    if _CRC.unpack(raw[-_CRC.size :])[0] != zlib.crc32(raw[: -_CRC.size]):
        return None
    _, version, recipe_version, flags, store_id, view_size, box_length, payload_length, crc = _SIGNED.unpack_from(raw)
    if version != FORMAT or recipe_version > recipe_format.RECIPE_VERSION or flags > _DICTIONARY_1:
        return None
    if box_length < SMALLEST_BOX or payload_length > box_length - SMALLEST_BOX:
        return None
    mac = raw[_SIGNED.size : _SIGNED.size + _MAC_BYTES]
    return Footer(store_id, view_size, box_length, payload_length, crc, flags, mac, raw)


def _payload(box: bytes, footer: Footer) -> bytes:
    """The encoded recipe out of the whole ``box``, checked."""
    header = _BOX_HEADER.pack(footer.box_length, b"uuid") + BOX_UUID
    if len(box) != footer.box_length or not box.startswith(header) or not box.endswith(footer.raw):
        raise BlobDamaged("the blob's footer names a recipe box that isn't there; the file was cut or overwritten")
    stored = box[_BEFORE_PAYLOAD : _BEFORE_PAYLOAD + footer.payload_length]
    if zlib.crc32(stored) != footer.payload_crc:
        raise BlobDamaged("the blob's recipe is damaged: its checksum differs")
    if footer.flags == _PLAIN:
        return stored
    inflater = zlib.decompressobj() if footer.flags == _ZLIB else dictionary.inflater()
    with contextlib.suppress(zlib.error):
        inflated = inflater.decompress(stored, _RECIPE_LIMIT)
        if inflater.eof:
            return inflated
    raise BlobDamaged("the blob's recipe can't be decompressed")


def _decode(recipe_bytes: bytes, picture: Callable[[], bytes]) -> Recipe:
    try:
        recipe = recipe_format.decode(recipe_bytes)
        return recipe_format.unfolded(recipe, picture()) if recipe.own else recipe
    except ValueError as error:
        raise BlobDamaged(f"the blob's recipe can't be read: {error}") from error


def _read_exactly(fd: int, offset: int, count: int) -> bytes:
    """``count`` bytes, or fewer at the file's end."""
    parts = []
    while count > 0:
        part = os.pread(fd, count, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return b"".join(parts)


def _walk(read: Callable[[int, int], bytes], size: int) -> tuple[int, Footer] | None:
    """Offset and footer of our box among the top-level boxes; the last such box counts."""
    result = None
    for offset, length in _uuid_boxes(read, size):
        if length < SMALLEST_BOX or read(offset + _BOX_HEADER.size, len(BOX_UUID)) != BOX_UUID:
            continue
        footer = _parse(read(offset + length - FOOTER_BYTES, FOOTER_BYTES))
        if footer is not None and footer.box_length == length:
            result = offset, footer
    return result


def _uuid_boxes(read: Callable[[int, int], bytes], size: int) -> Iterator[tuple[int, int]]:
    offset = 0
    for _ in range(_BOXES_TO_WALK):
        header = read(offset, 16)
        if len(header) < _BOX_HEADER.size:
            return
        length, kind = _BOX_HEADER.unpack_from(header)
        if length == 1 and len(header) == 16:
            length = int.from_bytes(header[8:], "big")
        elif length == 0:
            length = size - offset
        if length < _BOX_HEADER.size or offset + length > size:
            return
        if kind == b"uuid":
            yield offset, length
        offset += length
