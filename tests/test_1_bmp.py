"""BMP: what is refused and why, and that only pixels change."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageFilter

from esrfs import formats
from esrfs.compaction.outcome import Reason
from tests.test_1_png import picture

LIMIT = 50.0


def bmp_bytes(image: Image.Image | None = None) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, "BMP")
    return out.getvalue()


def of_32_bits(image: Image.Image) -> bytes:
    """With fourth bytes that mean something to some programs."""
    blue_first = np.asarray(image.convert("RGBA"))[::-1, :, [2, 1, 0, 3]].copy()
    blue_first[:, :, 3] = np.arange(image.width) % 256
    header = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 32, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + blue_first.size, 0, 0, 54) + header + blue_first.tobytes()


def top_down(data: bytes, row: int) -> bytes:
    height = struct.unpack_from("<i", data, 22)[0]
    start = struct.unpack_from("<I", data, 10)[0]
    rows = [data[start + index * row : start + (index + 1) * row] for index in range(height)]
    return data[:22] + struct.pack("<i", -height) + data[26:start] + b"".join(rows[::-1]) + data[start + row * height :]


CASES = {
    "24 bits": bmp_bytes(),
    "24 bits, odd width": bmp_bytes(picture(width=131, height=77)),
    "24 bits, top-down": top_down(bmp_bytes(picture(width=131, height=77)), 396),
    "32 bits": of_32_bits(picture()),
    "gray": bmp_bytes(picture("L", width=131)),
    "palette": bmp_bytes(picture().quantize(200)),
    "with a profile after it": bmp_bytes() + b"profile",
}


@pytest.mark.parametrize("name", CASES)
def test_only_pixels_change(name: str) -> None:
    original = CASES[name]
    split = formats.split(original, LIMIT)
    pixels = split.pixels()
    with Image.open(io.BytesIO(original)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.broadcast_to(pixels, expected.shape), expected)
    view = formats.fit_view(split, np.ascontiguousarray(pixels))
    if split.lossless:
        assert view.expand() == original
    rebuilt = np.asarray(Image.fromarray(pixels.squeeze()).filter(ImageFilter.GaussianBlur(1)))
    view = formats.fit_view(split, rebuilt)
    data = view.expand()
    start = struct.unpack_from("<I", original, 10)[0]
    assert len(data) == len(original)
    assert data[:start] == original[:start]
    assert data.endswith(b"profile") == original.endswith(b"profile")
    after = formats.split(data, LIMIT).pixels().squeeze()
    if split.lossless:
        assert np.array_equal(after, rebuilt)
    else:
        assert np.abs(after.astype(int) - rebuilt).mean() < 10
    if name == "32 bits":
        assert data[start + 3 :: 4] == original[start + 3 :: 4]
    assert formats.encode_scan(view.coding, split.width, split.height, rebuilt, len(view.scan)) == view.scan


def refused_files() -> Iterator[tuple[str, bytes, Reason]]:
    good = bmp_bytes()
    few = bmp_bytes(picture().quantize(8))
    yield "is compressed", good[:30] + b"\1" + good[31:], Reason.UNSUPPORTED_KIND
    yield "16 bits", good[:28] + b"\x10" + good[29:], Reason.UNSUPPORTED_KIND
    yield "unusual layout", good[:28] + b"\x20\0\3" + good[31:], Reason.UNSUPPORTED_KIND
    yield "does not exist", good[:30] + b"\x09" + good[31:], Reason.BROKEN
    yield "outside", good[:-100], Reason.BROKEN
    yield "planes", good[:26] + b"\2" + good[27:], Reason.BROKEN
    yield "too short", good[:14] + b"\x10" + good[15:], Reason.BROKEN
    yield "cut", good[:30], Reason.BROKEN
    yield "does not have", few[:46] + b"\2" + few[47:], Reason.BROKEN
    yield "limit", good[:18] + struct.pack("<ii", 60000, 60000) + good[26:], Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("word", "data", "reason"), [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in refused_files()]
)
def test_refusals_say_why(word: str, data: bytes, reason: Reason) -> None:
    with pytest.raises(formats.Unsupported) as caught:
        formats.split(data, LIMIT).pixels()
    assert caught.value.reason is reason
    assert word in caught.value.message
    assert caught.value.kind == "bmp"
