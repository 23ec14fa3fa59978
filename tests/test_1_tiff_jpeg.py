"""JPEG in TIFF: strips and tiles that are JPEGs stay so, each of its length, between the very same tables."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from esrfs import formats
from esrfs.blob.recipe import TiffCoding
from esrfs.compaction.outcome import Reason
from esrfs.formats import scan, tiff_parse
from tests.test_1_png import picture
from tests.test_1_tiff import rebuilt, tiff_bytes, with_value

LIMIT = 50.0
needs_tiffcp = pytest.mark.skipif(shutil.which("tiffcp") is None, reason="tiffcp is not installed")


def jpeg(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **{"quality": 85, **options})
    return out.getvalue()


def of_strips(strips: list[bytes], size: tuple[int, int], rows: int, photometric: int, tables: bytes = b"") -> bytes:
    """A TIFF (little-endian) of strips as they are; 9 bytes lie between them and the directory, which is last."""
    width, height = size
    samples = 1 if photometric == 1 else 3
    offsets, data = [], b"II*\0\0\0\0\0"
    for strip in strips:
        offsets.append(len(data))
        data += strip
    data += b"a comment"

    def outside(content: bytes) -> int:
        nonlocal data
        data += bytes(len(data) % 2) + content
        return len(data) - len(content)

    many = [struct.pack(f"<{len(strips)}I", *each) for each in (offsets, [len(strip) for strip in strips])]
    places = [outside(each) if len(strips) > 1 else struct.unpack("<I", each)[0] for each in many]
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, samples, 8 if samples == 1 else outside(struct.pack("<3H", 8, 8, 8))),
        (259, 3, 1, 7),
        (262, 3, 1, photometric),
        (273, 4, len(strips), places[0]),
        (277, 3, 1, samples),
        (278, 4, 1, rows),
        (279, 4, len(strips), places[1]),
    ]
    if tables:
        entries.append((347, 7, len(tables), outside(tables)))
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *each) for each in entries) + bytes(4)
    start = outside(directory)
    return data[:4] + struct.pack("<I", start) + data[8:]


def whole_jpegs(rows: int = 64, photometric: int = 6, tail: bytes = b"", **options: Any) -> bytes:
    """A TIFF without shared tables."""
    image = picture("L" if photometric == 1 else "RGB")
    parts = [image.crop((0, top, 200, min(top + rows, 150))) for top in range(0, 150, rows)]
    strips = [jpeg(part, keep_rgb=photometric == 2, **options) + tail for part in parts]
    return of_strips(strips, image.size, rows, photometric)


def similar(one: formats.Pixels, other: formats.Pixels) -> bool:
    return float(np.abs(one.astype(int) - other).mean()) < 6


def tags(path: Path) -> object:
    done = subprocess.run(
        ["exiftool", "-j", "-G", "-struct", "-a", "-x", "System:all", "-"],
        input=path.read_bytes(),
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(done.stdout)[0]


def check_view(original: bytes, folder: Path) -> TiffCoding:
    split = formats.split(original, LIMIT)
    pixels = split.pixels()
    assert np.array_equal(pixels, formats.decode(original, LIMIT)), "as libtiff decodes it"
    wanted = rebuilt(pixels)
    view = formats.fit_view(split, wanted)
    data = view.expand()
    assert len(data) == len(original)
    before, after = tiff_parse.parse(original), tiff_parse.parse(data)
    assert before == after
    left = sorted(before.parts)
    ends = [0, *(start + length for start, length in left)]
    for end, start in zip(ends, [*(start for start, _ in left), len(data)], strict=True):
        assert data[end:start] == original[end:start]
    again = formats.split(data, LIMIT).pixels()
    assert np.array_equal(again, formats.decode(data, LIMIT))
    assert similar(again.squeeze(), wanted)
    assert view.scan == formats.encode_scan(view.coding, split.width, split.height, wanted, len(view.scan))
    found = scan.find(original), scan.find(data)
    assert found[0] is not None and found[1] is not None
    assert found[0].tables == found[1].tables
    paths = folder / "original.tiff", folder / "view.tiff"
    for path, content in zip(paths, (original, data), strict=True):
        path.write_bytes(content)
    if shutil.which("tiffinfo"):
        printed = [
            subprocess.run([*program, path.name], cwd=folder, check=False, capture_output=True, text=True)
            for program in (["tiffinfo", "-s", "-j"], ["tiffinfo", "-D"])
            for path in paths
        ]
        for one, other in (printed[:2], printed[2:]):
            assert one.stdout.replace("original", "view") == other.stdout
            assert one.stderr.replace("original", "view") == other.stderr
            assert one.returncode == other.returncode
    if shutil.which("exiftool"):
        assert tags(paths[0]) == tags(paths[1])
    assert isinstance(view.coding, TiffCoding)
    return view.coding


@needs_tiffcp
@pytest.mark.parametrize(
    ("colours", "layout"),
    [
        *itertools.product(("jpeg:85", "jpeg:r:85", "gray"), ("-r 16", "-r 1000", "-t -w 64 -l 48", "-B -r 16")),
        ("jpeg:r:85", "-p separate -r 16"),
    ],
)
def test_strips_tiles_and_colours(colours: str, layout: str, tmp_path: Path) -> None:
    # heights that are no multiple of 16 are refused by tiffcp
    (tmp_path / "in.tiff").write_bytes(tiff_bytes(picture("L" if colours == "gray" else "RGB", 200, 144)))
    method = "jpeg:85" if colours == "gray" else colours
    subprocess.run(["tiffcp", "-c", method, *layout.split(), "in.tiff", "out.tiff"], cwd=tmp_path, check=True)
    coding = check_view((tmp_path / "out.tiff").read_bytes(), tmp_path)
    assert not coding.own_tables
    assert (coding.ycbcr, coding.tiled) == (colours == "jpeg:85", "-t" in layout)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_as_pillow_writes_it(mode: str, tmp_path: Path) -> None:
    check_view(tiff_bytes(picture(mode), "jpeg", quality=80), tmp_path)


@pytest.mark.parametrize(
    ("photometric", "subsampling"), [(1, "4:4:4"), (2, "4:4:4"), (6, "4:4:4"), (6, "4:2:2"), (6, "4:2:0")]
)
def test_strips_that_bring_their_tables(photometric: int, subsampling: str, tmp_path: Path) -> None:
    options = {"restart_marker_blocks": 3, "optimize": True} if subsampling == "4:2:0" else {}
    original = whole_jpegs(photometric=photometric, tail=b"\0", subsampling=subsampling, **options)
    coding = check_view(original, tmp_path)
    assert coding.own_tables
    assert {stream.tail for stream in coding.streams} == {b"\xff\xd9\0"}
    assert {stream.subsampling for stream in coding.streams} == {subsampling}


def test_what_does_not_fit_gets_tables_of_its_own_and_then_is_softened() -> None:
    image = picture("RGB", 200, 144)
    original = tiff_bytes(image, "jpeg", quality=60)
    split = formats.split(original, LIMIT)
    pixels = split.pixels()
    random = np.random.default_rng(3)
    done = []
    for base, noise in ((rebuilt(pixels), 0), (pixels, 2), (pixels, 30)):
        noisy = np.clip(base + random.normal(0, noise, pixels.shape), 0, 255).astype(np.uint8)
        view = formats.fit_view(split, noisy)
        again = formats.split(view.expand(), LIMIT).pixels()
        assert isinstance(view.coding, TiffCoding)
        done.append((view.coding.own_tables, float(np.abs(again.astype(int) - noisy).mean())))
    assert [own for own, _ in done] == [False, True, True]
    assert max(done[0][1], done[1][1]) < 5 < done[2][1]
    tiny = tiff_bytes(Image.new("RGB", (200, 144)), "jpeg", quality=60)
    with pytest.raises(formats.DoesNotFit, match="a strip of the rebuilt picture takes"):
        formats.fit_view(formats.split(tiny, LIMIT), noisy)


def test_the_loss_of_its_coding_is_known_beforehand() -> None:
    """``recoded``: what the planner reckons with."""
    for photometric in (1, 2, 6):
        split = formats.split(whole_jpegs(rows=150, photometric=photometric, quality=40), LIMIT)
        pixels = split.pixels()
        wanted = rebuilt(pixels).reshape(pixels.shape)
        viewed = formats.decode(formats.fit_view(split, wanted).expand(), LIMIT)
        assert np.array_equal(formats.recoded(split, wanted), viewed)


def damaged(data: bytes) -> bytes:
    """Its first strip ends in its middle."""
    offset, length = tiff_parse.parse(data).parts[0]
    middle = offset + length // 2
    return data[:middle] + b"\xff\xd9" + data[middle + 2 :]


def refused_files() -> Iterator[tuple[str, bytes, Reason]]:
    good = whole_jpegs()
    unknown, broken = Reason.UNSUPPORTED_KIND, Reason.BROKEN
    yield "old-style JPEG", with_value(good, 259, 6), unknown
    yield "CMYK", tiff_bytes(picture().convert("CMYK"), "jpeg"), unknown
    yield "another sample", tiff_bytes(picture("RGBA"), "jpeg"), unknown
    yield "12 bits", with_value(whole_jpegs(photometric=1), 258, 12), unknown
    yield "progressive", whole_jpegs(progressive=True), unknown
    yield (
        "RGB, and sampled",
        whole_jpegs(photometric=6, subsampling="4:2:0").replace(
            struct.pack("<HHII", 262, 3, 1, 6), struct.pack("<HHII", 262, 3, 1, 2)
        ),
        unknown,
    )
    yield "4:4:0", good.replace(b"\1\x22\0\2\x11\1\3\x11\1", b"\1\x12\0\2\x11\1\3\x11\1"), unknown
    yield "another size", with_value(good, 256, 199), unknown
    yield "another number", whole_jpegs(photometric=1).replace(
        struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 2)
    ).replace(struct.pack("<HHII", 277, 3, 1, 1), struct.pack("<HHII", 277, 3, 1, 3)), broken  # fmt: skip
    yield "no JPEG", good[:8] + b"xx" + good[10:], broken
    yield "pixels can't be decoded", damaged(good), broken
    image = picture()
    strips = [jpeg(image.crop((0, top, 200, top + 75))) for top in (0, 75)]
    start, end = strips[1].index(b"\xff\xdb"), strips[1].index(b"\xff\xc0")
    huffman, scan_start = strips[1].index(b"\xff\xc4"), strips[1].index(b"\xff\xda")
    tables = b"\xff\xd8" + strips[1][start:end] + strips[1][huffman:scan_start] + b"\xff\xd9"
    bare = strips[1][:start] + strips[1][end:huffman] + strips[1][scan_start:]
    yield "only some", of_strips([strips[0], bare], image.size, 75, 6, tables), unknown
    yield "cut", of_strips([bare, bare], image.size, 75, 6, tables[:-1]), broken
    yield "damaged", of_strips([bare, bare], image.size, 75, 6, tables[:9] + b"\0\0" + tables[-2:]), broken
    more = tables[:-2] + b"\xff\xdd\0\4\0\1\xff\xd9"
    yield "more than tables", of_strips([bare, bare], image.size, 75, 6, more), unknown
    long = b"\xff\xd8" + 300 * tables[2:-2] + b"\xff\xd9"
    yield "large JPEG tables", of_strips([bare, bare], image.size, 75, 6, long), unknown


@pytest.mark.parametrize(
    ("word", "data", "reason"), [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in refused_files()]
)
def test_refusals_say_why(word: str, data: bytes, reason: Reason) -> None:
    with pytest.raises(formats.Unsupported) as caught:
        formats.split(data, LIMIT).pixels()
    assert caught.value.reason is reason
    assert word in caught.value.message
    assert "TIFF" in caught.value.message
    assert caught.value.kind == "tiff"


def test_a_file_of_bare_strips_is_accepted(tmp_path: Path) -> None:
    """What the refused ones above are made of."""
    image = picture()
    strips = [jpeg(image.crop((0, top, 200, top + 75))) for top in (0, 75)]
    parts = []
    for strip in strips:
        start, end = strip.index(b"\xff\xdb"), strip.index(b"\xff\xc0")
        huffman, scan_start = strip.index(b"\xff\xc4"), strip.index(b"\xff\xda")
        parts.append(strip[:start] + strip[end:huffman] + strip[scan_start:])
    tables = b"\xff\xd8" + strip[start:end] + strip[huffman:scan_start] + b"\xff\xd9"
    coding = check_view(of_strips(parts, image.size, 75, 6, tables), tmp_path)
    assert not coding.own_tables


def test_an_entry_with_a_billion_values_takes_no_memory() -> None:
    """A mount's process reads directories of files that it does not know."""
    data = bytearray(of_strips([b"\xff\xd8" + bytes(6_000_000)], (100, 100), 100, 1))
    offset = struct.unpack_from("<I", data, 4)[0]
    for place in range(offset + 2, offset + 2 + 12 * struct.unpack_from("<H", data, offset)[0], 12):
        if struct.unpack_from("<H", data, place)[0] == 273:
            struct.pack_into("<HII", data, place + 2, 1, 5_000_000, 8)
    with pytest.raises(formats.Unsupported, match="very many"):
        formats.split(bytes(data), LIMIT)
