"""The scans of a progressive JPEG as libjpeg writes them, but so that the first one's header is known beforehand.

libjpeg's progressive encoder takes one script of scans (``jpeg_simple_progression``: 10 for colour, 6 for gray) and for
each scan the Huffman tables that suit the picture. All of that is the same for the same pixels, but a view's first SOS
and the tables before it are bytes that programs read to know the picture, and must not depend on pixels. So the first
scan (all components' DC, without its last bit) is coded once more, with the standard DC tables (ITU-T T.81, annex K),
which have a code for every category. What follows it stays as libjpeg wrote it, with its tables.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_SOS, _DHT, _EOI = 0xDA, 0xC4, 0xD9
_LONGEST_CODE = 16
_SYMBOLS_AT_ONCE = 1 << 16
FIRST_SCAN = b"\x00\x00\x01"
"""The end of the first scan's header: coefficient 0 only, all bits but the last."""


@dataclass(frozen=True)
class _Table:
    """A Huffman table for DC: by category, a code and its length in bits; by the next 16 bits, a category and the
    length of its code (0: no code)."""

    codes: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.uint8]
    category_of: npt.NDArray[np.uint8]
    length_of: npt.NDArray[np.uint8]


def scans(made: bytes, blocks: list[int], units: int, standard: list[bytes], components: bytes) -> bytes:
    """What follows the first SOS, up to EOI, of ``made``, a progressive JPEG as libjpeg wrote it.

    ``blocks``: for each block of an MCU the number of its DC table; ``units``: MCUs in the picture. ``standard``: the
    DC tables (16 counts and the categories) for the first scan. ``components``: the numbers that its components get.
    """
    tables: dict[int, bytes] = {}
    offset = 2
    while made[offset + 1] != _SOS:
        end = offset + 2 + int.from_bytes(made[offset + 2 : offset + 4], "big")
        if made[offset + 1] == _DHT:
            tables |= huffman_tables(made[offset + 4 : end])
        offset = end
    first = offset + 2 + int.from_bytes(made[offset + 2 : offset + 4], "big")
    last = _next_marker(made, first)
    pattern = np.tile(np.array(blocks, dtype=np.uint8), units)
    used = range(max(blocks) + 1)
    recoded = _recode(
        made[first:last], pattern, [_table(tables[number]) for number in used], [_table(standard[n]) for n in used]
    )
    return recoded + _renumbered(made, last, components)


def huffman_tables(payload: bytes) -> dict[int, bytes]:
    """The tables of a DHT segment, by class and number."""
    tables = {}
    offset = 0
    while offset < len(payload):
        end = offset + 17 + sum(payload[offset + 1 : offset + 17])
        tables[payload[offset]] = payload[offset + 1 : end]
        offset = end
    return tables


def _table(definition: bytes) -> _Table:
    codes, lengths = np.zeros(16, np.uint32), np.zeros(16, np.uint8)
    category_of, length_of = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
    code, index = 0, _LONGEST_CODE
    for length in range(1, _LONGEST_CODE + 1):
        for _ in range(definition[length - 1]):
            category = definition[index]
            codes[category], lengths[category] = code, length
            start, end = (each << _LONGEST_CODE - length for each in (code, code + 1))
            category_of[start:end], length_of[start:end] = category, length
            code, index = code + 1, index + 1
        code <<= 1
    return _Table(codes, lengths, category_of, length_of)


def _recode(data: bytes, pattern: npt.NDArray[np.uint8], old: list[_Table], new: list[_Table]) -> bytes:
    """The scan ``data`` with ``new`` tables instead of ``old``; ``pattern``: for each block the number of its table."""
    plain = np.frombuffer(data.replace(b"\xff\x00", b"\xff") + bytes(4), np.uint8).astype(np.uint32)
    words = plain[:-2] << 16 | plain[1:-1] << 8 | plain[2:]
    del plain
    # the 16 bits from each bit on
    windows = np.stack([(words >> 8 - bit & 0xFFFF).astype(np.uint16) for bit in range(8)], axis=1).ravel()
    del words
    steps = [(table.category_of[windows] + table.length_of[windows]).tobytes() for table in old]
    positions = array("q", bytes(8 * len(pattern)))
    position = 0
    for index, number in enumerate(pattern.tobytes()):
        positions[index] = position
        position += steps[number][position]
    where = np.frombuffer(positions, np.int64)
    bits = [
        _codes(windows, where[start : start + _SYMBOLS_AT_ONCE], pattern[start : start + _SYMBOLS_AT_ONCE], old, new)
        for start in range(0, len(where), _SYMBOLS_AT_ONCE)
    ]
    count = sum(map(len, bits))
    bits.append(np.ones(-count % 8, np.uint8))
    return np.packbits(np.concatenate(bits)).tobytes().replace(b"\xff", b"\xff\x00")


def _codes(
    windows: npt.NDArray[np.uint16],
    where: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.uint8],
    old: list[_Table],
    new: list[_Table],
) -> npt.NDArray[np.uint8]:
    """The symbols that stand at the bits ``where``, in the new codes, one bit (0 or 1) in each element."""
    found = windows[where]
    category = np.choose(numbers, [table.category_of[found] for table in old])
    skipped = np.choose(numbers, [table.length_of[found] for table in old])
    extra = windows[where + skipped].astype(np.uint32) >> (16 - category.astype(np.uint32))
    values = np.choose(numbers, [table.codes[category] for table in new]) << category | extra
    lengths = np.choose(numbers, [table.lengths[category] for table in new]).astype(np.int64) + category
    total = int(lengths.sum())
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(total) - 1
    return (np.repeat(values, lengths) >> left & 1).astype(np.uint8)


def _next_marker(data: bytes, offset: int) -> int:
    while True:
        offset = data.index(b"\xff", offset)
        if data[offset + 1] != 0:
            return offset
        offset += 2


def _renumbered(made: bytes, offset: int, components: bytes) -> bytes:
    """What is from ``offset`` on, up to EOI; libjpeg numbers the components from 1."""
    parts = []
    while made[offset + 1] != _EOI:
        end = offset + 2 + int.from_bytes(made[offset + 2 : offset + 4], "big")
        segment = bytearray(made[offset:end])
        if made[offset + 1] == _SOS:
            for index in range(segment[4]):
                segment[5 + 2 * index] = components[segment[5 + 2 * index] - 1]
            following = _next_marker(made, end)
            segment += made[end:following]
            end = following
        parts.append(bytes(segment))
        offset = end
    return b"".join(parts)


def scan_header(components: bytes) -> bytes:
    """The SOS segment of the first scan."""
    count = len(components)
    body = b"".join(bytes([number, 0x10 if index else 0x00]) for index, number in enumerate(components))
    return struct.pack(">HHB", 0xFF00 | _SOS, 6 + 2 * count, count) + body + FIRST_SCAN
