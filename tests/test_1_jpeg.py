"""JPEG: what is refused and why, and where the bytes of a view lie."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from esrfs import formats
from esrfs.blob import recipe
from esrfs.blob.recipe import JpegCoding, Run
from esrfs.blob.reference import reference
from esrfs.compaction.outcome import Reason
from esrfs.formats import jpeg, jpeg_parse
from esrfs.formats.view import Pixels
from tests.test_1_png import ELSEWHERE

PHOTOS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "photos"
LIMIT = 50.0


def picture(width: int = 320, height: int = 240, mode: str = "RGB") -> Image.Image:
    """Something with edges, texture and smooth parts."""
    random = np.random.default_rng(7)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=2)
    noisy = smooth + random.normal(0, 25, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).convert(mode)


def jpeg_bytes(image: Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


def softer(pixels: Pixels, radius: float = 1.0) -> Pixels:
    """What stands in for a network's rebuilt picture."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)))


def fitted(data: bytes, radius: float = 1.0) -> tuple[formats.FittedView, bytes]:
    split = formats.split(data, LIMIT)
    view = formats.fit_view(split, softer(split.pixels(), radius))
    return view, view.expand()


def with_segment(data: bytes, marker: int, payload: bytes, before: int = 0xDB) -> bytes:
    """``data`` with one more segment, before the first one with marker ``before``."""
    offset = 2
    while data[offset + 1] != before:
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    segment = bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload
    return data[:offset] + segment + data[offset:]


def refusal(data: bytes) -> formats.Unsupported:
    with pytest.raises(formats.Unsupported) as caught:
        formats.split(data, LIMIT).pixels()
    return caught.value


def test_content_credentials_that_were_in_the_file_and_were_taken_out() -> None:
    xmp = ELSEWHERE.replace(b"https://example.org/manifests/1", b"self#jumbf=c2pa/urn:uuid:1")
    data = with_segment(jpeg_bytes(), 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
    assert formats.split(data, LIMIT).kind == "jpeg"


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_view_has_the_originals_size_tables_and_tail(subsampling: str) -> None:
    original = jpeg_bytes(subsampling=subsampling, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0") + b"trailing video"
    view, data = fitted(original)
    assert len(data) == len(original)
    assert data.endswith(b"\xff\xd9trailing video")
    before, after = jpeg_parse.parse(original), jpeg_parse.parse(data)
    assert after.eoi == before.eoi
    assert after.quantisation == before.quantisation
    assert after.subsampling == subsampling
    kept = [part.raw for part in before.segments if part.marker != 0xC4]
    assert [part.raw for part in after.segments][: len(kept)] == kept
    assert isinstance(view.coding, JpegCoding)
    assert formats.decode(data, LIMIT).shape == (240, 320, 3)


def test_view_of_a_gray_picture() -> None:
    original = jpeg_bytes(picture(mode="L"))
    view, data = fitted(original)
    assert len(data) == len(original)
    assert view.coding.mode == "L"
    assert formats.decode(data, LIMIT).shape == (240, 320, 1)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(320, 240), (33, 17)])
def test_progressive_stays_progressive(mode: str, subsampling: str, size: tuple[int, int]) -> None:
    options: dict[str, Any] = {"progressive": True, "quality": 80}
    if mode == "RGB":
        options["subsampling"] = subsampling
    original = jpeg_bytes(picture(*size, mode), comment=b"words", **options)
    view, data = fitted(original)
    assert len(data) == len(original)
    before, after = jpeg_parse.parse(original), jpeg_parse.parse(data)
    assert after.progressive
    assert after.frame == before.frame
    assert after.quantisation == before.quantisation
    assert isinstance(view.coding, JpegCoding)
    # To code the first scan with other tables changes no pixel of what libjpeg would have written.
    rebuilt = softer(formats.split(original, LIMIT).pixels())
    plain = jpeg_bytes(Image.fromarray(rebuilt), **options)
    assert np.array_equal(formats.split(data, LIMIT).pixels(), formats.split(plain, LIMIT).pixels())


def test_before_a_progressive_pictures_first_scan_nothing_depends_on_pixels() -> None:
    """Other hardware may rebuild other pixels: they must go with the tables and header that the recipe holds."""
    original = jpeg_bytes(progressive=True, quality=80, restart_marker_rows=1)
    split = formats.split(original, LIMIT)
    view = formats.fit_view(split, softer(split.pixels()))
    for radius in (2, 5):
        other = softer(split.pixels(), radius)
        scan = formats.encode_scan(view.coding, 320, 240, other, len(view.scan))
        data = recipe.expand(view.prefix) + scan + recipe.expand(view.suffix)
        expected = fitted(original, radius)[1]
        assert np.array_equal(formats.split(data, LIMIT).pixels(), formats.split(expected, LIMIT).pixels())


def test_numbers_of_components_stay_in_all_scans() -> None:
    original = bytearray(jpeg_bytes(progressive=True, quality=80))
    frame = original.index(b"\xff\xc2")
    for index in range(3):
        original[frame + 10 + 3 * index] = index
    offset = original.index(b"\xff\xda")
    while offset >= 0:
        for index in range(original[offset + 4]):
            original[offset + 5 + 2 * index] -= 1
        offset = original.find(b"\xff\xda", offset + 2)
    _, data = fitted(bytes(original))
    assert [part.id for part in jpeg_parse.parse(data).components] == [0, 1, 2]
    assert formats.split(data, LIMIT).pixels().shape == (240, 320, 3)


def test_a_noisy_progressive_picture_at_the_highest_quality() -> None:
    """Pillow's guess at the room that libjpeg needs is too small for it."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    coding = JpegCoding("RGB", "4:4:4", [[1] * 64] * 3, progressive=True, components=b"\1\2\3")
    assert len(formats.encode_scan(coding, 200, 200, np.asarray(noise), 200_000)) == 200_000


def test_scan_starts_at_a_round_offset_and_the_tail_is_fill() -> None:
    original = jpeg_bytes(picture(800, 600), quality=97)
    view, data = fitted(original, radius=2)
    assert recipe.length(view.prefix) % 65536 == 0
    assert any(isinstance(span, Run) and span.value == 0xFF and span.count >= 8192 for span in view.suffix)
    fill = [part for part in jpeg_parse.parse(data).segments if part.marker == 0xED]
    assert fill
    assert all(re.fullmatch(rb"esrfs\0\0*", part.payload) for part in fill)
    assert jpeg_parse.parse(data).segments[-len(fill) :] == fill


def test_much_fill_stays_within_36_segments() -> None:
    original = jpeg_bytes(picture(2200, 1600), quality=100, subsampling="4:4:4")
    split = formats.split(original, LIMIT)
    view = formats.fit_view(split, np.full((1600, 2200, 3), 100, np.uint8))
    assert len(view.expand()) == len(original)
    segments = jpeg_parse.parse(view.expand()).segments
    assert 30 <= sum(part.marker == 0xED for part in segments) <= 36


@pytest.mark.parametrize("count", [*range(10, 30), 65535, 65536, 65537, *range(65538, 65560), 65537 * 36])
def test_fill_is_exact(count: int) -> None:
    assert set(_said(jpeg._fill(count, b""), count)) <= {0}


@pytest.mark.parametrize("count", [10, 41, 42, 43, 500, 65537, 65538, 200_000])
@pytest.mark.parametrize("length", [32, 33, 458, 65527, 65528, 100_000])
def test_fill_says_all_of_a_note_or_its_reference_or_nothing(count: int, length: int) -> None:
    note = np.random.default_rng(1).bytes(length)
    said = _said(jpeg._fill(count, note), count)
    expected = note if len(note) <= len(said) else note[:32] if len(said) >= 32 else b""
    assert said == expected.ljust(len(said), b"\0")


def _said(spans: list[recipe.Span], count: int) -> bytes:
    """What is in the segments of ``count`` bytes of fill."""
    data = recipe.expand(spans)
    assert len(data) == count
    said, offset = b"", 0
    while offset < count:
        assert data[offset : offset + 2] == b"\xff\xed"
        length = int.from_bytes(data[offset + 2 : offset + 4], "big")
        assert data[offset + 4 : offset + 10] == b"esrfs\0"
        said += data[offset + 10 : offset + 2 + length]
        offset += 2 + length
    assert offset == count
    return said


def test_scan_is_reproduced_from_the_coding() -> None:
    original = jpeg_bytes()
    split = formats.split(original, LIMIT)
    pixels = softer(split.pixels())
    view = formats.fit_view(split, pixels)
    assert formats.encode_scan(view.coding, split.width, split.height, pixels, len(view.scan)) == view.scan


def test_a_reconstruction_that_needs_more_is_softened_into_the_same_length() -> None:
    original = jpeg_bytes()
    split = formats.split(original, LIMIT)
    view = formats.fit_view(split, softer(split.pixels(), 0.6))
    noisy = split.pixels()
    scan = formats.encode_scan(view.coding, split.width, split.height, noisy, len(view.scan))
    assert len(scan) == len(view.scan)
    data = recipe.expand(view.prefix) + scan + recipe.expand(view.suffix)
    assert formats.split(data, LIMIT).pixels().shape == noisy.shape
    with pytest.raises(formats.DoesNotFit):
        formats.encode_scan(view.coding, split.width, split.height, noisy, 100)


def test_quantisation_is_raised_in_place_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "SLIGHTLY_SOFTER", ())  # which would do
    monkeypatch.setattr(jpeg, "SOFTER", ())
    original = jpeg_bytes(optimize=True, quality=60)
    split = formats.split(original, LIMIT)
    view = formats.fit_view(split, softer(split.pixels(), 0.4))
    data = view.expand()
    assert len(data) == len(original)
    before, after = jpeg_parse.parse(original), jpeg_parse.parse(data)
    assert sum(after.quantisation[0]) > sum(before.quantisation[0])
    assert isinstance(view.coding, JpegCoding)
    assert view.coding.quantisation == after.quantisation
    assert max(after.quantisation[0][i] / before.quantisation[0][i] for i in range(64)) < 1.6


def test_noise_does_not_fit_a_smooth_pictures_size() -> None:
    split = formats.split(jpeg_bytes(Image.new("RGB", (320, 240))), LIMIT)
    with pytest.raises(formats.DoesNotFit, match="bytes too long"):
        formats.fit_view(split, np.asarray(picture()))


def test_standard_tables_are_pillows() -> None:
    data = jpeg_bytes()
    tables = b"".join(part.payload for part in jpeg_parse.parse(data).segments if part.marker == 0xC4)
    assert jpeg._huffman("RGB", progressive=False)[4:] == tables


def test_metadata_does_not_move_when_it_follows_the_tables() -> None:
    """exiftool prints absolute offsets, and MPF counts from its own place."""
    restarts = jpeg_bytes(restart_marker_rows=1)
    original = with_segment(
        with_segment(restarts, 0xE2, b"MPF\0" + bytes(60), before=0xDA), 0xFE, b"words", before=0xDD
    )
    _, data = fitted(original)
    assert data.index(b"MPF\0") == original.index(b"MPF\0")
    assert jpeg_parse.parse(data).restart_interval == 0
    assert formats.decode(data, LIMIT).shape == (240, 320, 3)


def test_markers_in_thumbnails_and_after_the_picture_are_not_its_end() -> None:
    thumbnail = jpeg_bytes(picture(32, 24))
    original = with_segment(jpeg_bytes(), 0xE1, b"Exif\0\0" + thumbnail) + thumbnail
    _, data = fitted(original)
    assert data.endswith(thumbnail)
    assert data[:2000].count(thumbnail) == 1


def test_fill_bytes_before_markers_and_the_end_are_understood() -> None:
    original = jpeg_bytes()
    original = original[:-2] + b"\xff" * 5 + original[-2:]
    original = original[:2] + b"\xff\xff" + original[2:]
    _, data = fitted(original)
    assert len(data) == len(original)
    assert data[:6] == original[:6]


def test_component_numbers_stay() -> None:
    original = bytearray(jpeg_bytes())
    frame, scan = original.index(b"\xff\xc0"), original.index(b"\xff\xda")
    for index in range(3):
        original[frame + 10 + 3 * index] = 10 + index
        original[scan + 5 + 2 * index] = 10 + index
    _, data = fitted(bytes(original))
    assert [part.id for part in jpeg_parse.parse(data).components] == [10, 11, 12]
    assert formats.split(data, LIMIT).pixels().shape == (240, 320, 3)


def damaged_files() -> Iterator[tuple[str, bytes, Reason]]:
    good = jpeg_bytes()
    scan = jpeg_parse.parse(good).scan_start
    frame = good.index(b"\xff\xc0")
    progressive = jpeg_bytes(progressive=True, quality=80)
    second = progressive.index(b"\xff\xc4", jpeg_parse.parse(progressive).scan_start)
    yield (
        "between its scans",
        progressive[:second] + b"\xff\xfe\0\x04ab" + progressive[second:],
        Reason.UNSUPPORTED_KIND,
    )
    yield "200 scans", progressive[:second] + progressive[second:-2] * 50 + b"\xff\xd9", Reason.UNSUPPORTED_KIND
    yield "can't be decoded", progressive[:-2] + progressive[second:], Reason.BROKEN
    yield "premature end", progressive[: second - 200] + progressive[second:], Reason.BROKEN
    yield "progressive arithmetic", progressive.replace(b"\xff\xc2", b"\xff\xca", 1), Reason.UNSUPPORTED_KIND
    yield "CMYK", jpeg_bytes(picture().convert("CMYK")), Reason.UNSUPPORTED_KIND
    yield "coded as RGB", jpeg_bytes(keep_rgb=True), Reason.UNSUPPORTED_KIND
    yield "JUMBF", with_segment(good, 0xEB, b"JP\0\1" + bytes(20)), Reason.SIGNED
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + ELSEWHERE
    yield "a server keeps", with_segment(good, 0xE1, xmp), Reason.SIGNED
    yield "end-of-image", good[:-2], Reason.UNSUPPORTED_KIND
    yield "end-of-image", good[: len(good) // 2], Reason.UNSUPPORTED_KIND
    yield "longer than the file", good[:300], Reason.BROKEN
    yield "before its pixels", good[:20], Reason.BROKEN
    yield "premature end", good[: len(good) // 2].rstrip(b"\xff") + b"\xff\xd9", Reason.BROKEN
    yield "extraneous bytes", good[:-2] + b"\x12\x34" * 20 + b"\xff\xd9", Reason.BROKEN
    yield "restart markers", good[: scan + 500] + b"\x11\xff\xd0" + good[scan + 500 :], Reason.BROKEN
    yield "belong to none", good[:20] + b"\0\0" + good[20:], Reason.BROKEN
    yield "12 bits", good[: frame + 4] + b"\x0c" + good[frame + 5 :], Reason.UNSUPPORTED_KIND
    yield "arithmetic", good[:frame] + b"\xff\xc9" + good[frame + 2 :], Reason.UNSUPPORTED_KIND
    yield "lossless", good[:frame] + b"\xff\xc3" + good[frame + 2 :], Reason.UNSUPPORTED_KIND
    yield "4:4:0", good[: frame + 11] + b"\x12" + good[frame + 12 :], Reason.UNSUPPORTED_KIND
    yield "4:1:1", good[: frame + 11] + b"\x41" + good[frame + 12 :], Reason.UNSUPPORTED_KIND
    yield "height after", good[: frame + 5] + b"\0\0" + good[frame + 7 :], Reason.UNSUPPORTED_KIND
    yield "limit", good[: frame + 5] + b"\xff\x00\xff\x00" + good[frame + 9 :], Reason.TOO_LARGE
    yield "65,500", good[: frame + 5] + b"\xff\xff\xff\xff" + good[frame + 9 :], Reason.UNSUPPORTED_KIND


@pytest.mark.parametrize(
    ("word", "data", "reason"), [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in damaged_files()]
)
def test_refusals_say_why(word: str, data: bytes, reason: Reason) -> None:
    error = refusal(data)
    assert error.reason is reason
    assert word in error.message
    assert error.kind == "jpeg"


def test_restart_intervals_that_are_cut_are_noticed() -> None:
    data = jpeg_bytes(restart_marker_rows=1)
    formats.split(data, LIMIT).pixels()
    marker = data.index(b"\xff\xd3", jpeg_parse.parse(data).scan_start)
    assert "premature end" in refusal(data[: marker - 40].rstrip(b"\xff") + data[marker:]).message


def test_restart_intervals_with_too_much_are_noticed() -> None:
    data = jpeg_bytes(restart_marker_rows=1)
    marker = data.index(b"\xff\xd3", jpeg_parse.parse(data).scan_start)
    assert "extraneous bytes" in refusal(data[:marker] + b"\x12\x34" * 20 + data[marker:]).message


@pytest.mark.parametrize("seed", range(8))
def test_an_interval_that_was_overwritten_is_noticed(seed: int) -> None:
    """A sector of zeros in the middle of a file of a failing disk or card."""
    data = jpeg_bytes(picture(640, 480), restart_marker_rows=1)
    start = jpeg_parse.parse(data).scan_start
    offset = int(np.random.default_rng(seed).integers(start, len(data) - 600))
    assert refusal(data[:offset] + bytes(512) + data[offset + 512 :]).reason is Reason.BROKEN


def test_the_last_blocks_may_be_white() -> None:
    """A saturated end hides what its bits say; the picture is intact all the same."""
    image = picture(64, 64)
    image.paste((255, 255, 255), (0, 40, 64, 64))
    for quality in (30, 75, 95, 100):
        assert formats.split(jpeg_bytes(image, quality=quality), LIMIT).pixels().shape == (64, 64, 3)


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no shared photographs beside this checkout")
def test_exiftool_prints_the_same_of_camera_files(tmp_path: Path) -> None:
    names = ["gps/DSCN0010.jpg", "hdr/canon_hdr_YES.jpg", "tests/22-canon_tags.jpg", "Canon_PowerShot_S40.jpg"]
    printed = []
    for folder in ("originals", "views"):
        (tmp_path / folder).mkdir()
        for name in names:
            data = (PHOTOS / "exif-samples" / "jpg" / name).read_bytes()
            if folder == "views":
                data = fitted(data)[1]
            (tmp_path / folder / Path(name).name).write_bytes(data)
        command = ["exiftool", "-j", "-G", "-struct", "-a", "--File:FileModifyDate", "--File:FileAccessDate"]
        command += ["--File:FileInodeChangeDate", "."]
        printed.append(subprocess.run(command, cwd=tmp_path / folder, capture_output=True, check=True).stdout)
    assert printed[0] == printed[1]


def test_the_fill_of_an_earlier_view_makes_room() -> None:
    """Programs that edit pixels and keep all segments keep it; else each edit would add some."""
    key = bytes(32)
    original = jpeg_bytes(picture(1100, 800), quality=100, subsampling="4:4:4")

    def fit(data: bytes) -> bytes:
        split = formats.split(data, LIMIT)
        pixels = softer(split.pixels(), 2.0)
        return formats.fit_view(split, pixels, lambda coding, scan: reference(key, scan)).expand()

    view = fit(original)
    again = fit(view)
    assert len(again) == len(view) == len(original)
    for data in (view, again):
        fill = [part for part in jpeg_parse.parse(data).segments if part.is_fill]
        assert 0 < sum(len(part.raw) for part in fill) < len(original)
        structure = jpeg_parse.parse(data)
        assert fill[0].payload[6:38] == reference(key, data[structure.scan_start : structure.scan_end])
        assert sum(bool(any(part.payload[6:])) for part in fill) == 1, "one reference"
    kept = with_segment(view, 0xE1, b"Exif", before=0xDA)
    assert [part.is_fill for part in jpeg_parse.parse(fit(kept)).segments].count(True) > 1, "nothing before it moves"
    assert jpeg_parse.parse(kept).segments[-1].payload == b"Exif"
    envelope = [part.raw for part in jpeg_parse.parse(fit(kept)).segments if part.is_envelope]
    assert envelope == [part.raw for part in jpeg_parse.parse(kept).segments if part.is_envelope]
