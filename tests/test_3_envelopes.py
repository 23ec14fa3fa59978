"""What lies around and after a JPEG's picture, read by the programs it is for, before and after."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter

from esrfs import formats
from esrfs.formats import jpeg_parse
from tests.gallery import with_thumbnail
from tests.test_1_jpeg import jpeg_bytes, picture, softer, with_segment

LIMIT = 50.0
needs_exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")


def view_of(original: bytes) -> bytes:
    split = formats.split(original, LIMIT)
    view = formats.fit_view(split, softer(split.pixels())).expand()
    assert len(view) == len(original)
    assert view != original
    return view


def printed(data: bytes) -> dict[str, Any]:
    command = ["exiftool", "-j", "-G", "-struct", "-a", "-ee", "-x", "System:all", "-"]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout)[0]
    return result


def video(size: int = 30_000) -> bytes:
    """The beginning of an MP4, and something for its frames."""
    brand = b"ftypmp42" + bytes(4) + b"mp42isom"
    frames = np.random.default_rng(5).bytes(size)
    return struct.pack(">I", 4 + len(brand)) + brand + struct.pack(">I", 8 + size) + b"mdat" + frames


def motion_photo(progressive: bool) -> bytes:
    """As Google's cameras write it: XMP tells how many bytes from the end the video begins."""
    film = video()
    xmp = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:GCamera="http://ns.google.com/photos/1.0/camera/"
 xmlns:Container="http://ns.google.com/photos/1.0/container/"
 xmlns:Item="http://ns.google.com/photos/1.0/container/item/" GCamera:MotionPhoto="1" GCamera:MotionPhotoVersion="1">
<Container:Directory><rdf:Seq>
<rdf:li rdf:parseType="Resource"><Container:Item Item:Mime="image/jpeg" Item:Semantic="Primary"/></rdf:li>
<rdf:li rdf:parseType="Resource"><Container:Item Item:Mime="video/mp4" Item:Semantic="MotionPhoto"
 Item:Length="{len(film)}"/></rdf:li></rdf:Seq></Container:Directory></rdf:Description></rdf:RDF></x:xmpmeta>"""
    still = jpeg_bytes(progressive=progressive, quality=80)
    return with_segment(still, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp.encode()) + film


@pytest.mark.parametrize("progressive", [False, True])
def test_motion_photo(progressive: bool) -> None:
    original = motion_photo(progressive)
    view = view_of(original)
    length = re.search(rb'Item:Length="(\d+)"', view)
    assert length is not None
    assert view[-int(length[1]) :] == video()
    if shutil.which("exiftool"):
        assert printed(view) == printed(original)


@needs_exiftool
def test_samsung_trailer() -> None:
    """Found from the file's end: a directory of blocks, each by its distance to it."""
    name, value = b"Image_UTC_Data", b"1700000000000"
    block = struct.pack("<HHI", 0, 0x0A01, len(name)) + name + value
    entry = struct.pack("<HHII", 0, 0x0A01, len(block), len(block))
    directory = b"SEFH" + struct.pack("<II", 107, 1) + entry
    trailer = block + directory + struct.pack("<I", len(directory)) + b"SEFT"
    original = jpeg_bytes() + trailer
    view = view_of(original)
    assert view.endswith(b"\xff\xd9" + trailer)
    assert printed(view) == printed(original)
    assert any("Samsung" in str(key) or "MakerNotes" in str(key) for key in printed(view)), printed(view)


@needs_exiftool
def test_samsung_motion_photo() -> None:
    """The video is a block of the trailer; exiftool takes it out."""
    film = video()
    blocks = [(0x0A30, b"MotionPhoto_Data", film), (0x0A01, b"Image_UTC_Data", b"1700000000000")]
    content = [struct.pack("<HHI", 0, kind, len(name)) + name + value for kind, name, value in blocks]
    entries = [
        struct.pack("<HHII", 0, kind, sum(map(len, content[number:])), len(content[number]))
        for number, (kind, _, _) in enumerate(blocks)
    ]
    directory = b"SEFH" + struct.pack("<II", 107, len(entries)) + b"".join(entries)
    trailer = b"".join(content) + directory + struct.pack("<I", len(directory)) + b"SEFT"
    original = jpeg_bytes() + trailer
    view = view_of(original)
    assert view.endswith(trailer)
    assert printed(view) == printed(original)
    assert extracted(view, "EmbeddedVideoFile") == film


@needs_exiftool
def test_olympus_preview_after_the_picture() -> None:
    """Its maker notes tell where, counted from themselves."""
    preview = jpeg_bytes(picture(80, 60))

    def directory(entries: list[tuple[int, int, int, bytes]]) -> bytes:
        return struct.pack("<H", len(entries)) + b"".join(
            struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries
        ) + bytes(4)  # fmt: skip

    def number(value: int) -> bytes:
        return struct.pack("<I", value)

    def whole(start: int) -> tuple[bytes, int]:
        """The file's EXIF, and where in it the maker notes begin."""
        head = b"OLYMPUS\0II\3\0"
        outer = len(head) + 18
        settings = [(0x100, 4, 1, number(1)), (0x101, 4, 1, number(start)), (0x102, 4, 1, number(len(preview)))]
        notes = head + directory([(0x2020, 13, 1, number(outer))]) + directory(settings)
        make = b"OLYMPUS CORPORATION\0"
        first = [(0x10F, 2, len(make), number(8 + 30)), (0x8769, 4, 1, number(8 + 30 + len(make)))]
        place = 8 + 30 + len(make) + 18
        exif = directory([(0x927C, 7, len(notes), number(place))])
        return b"II*\0" + number(8) + directory(first) + make + exif + notes, place

    still = jpeg_bytes()
    exif, place = whole(0)
    in_file = 2 + 4 + 6 + place
    exif, _ = whole(len(still) + 4 + 6 + len(exif) - in_file)
    original = with_segment(still, 0xE1, b"Exif\0\0" + exif) + preview
    assert extracted(original, "PreviewImage") == preview
    view = view_of(original)
    assert extracted(view, "PreviewImage") == preview
    assert printed(view) == printed(original)


def extracted(data: bytes, tag: str) -> bytes:
    return subprocess.run(["exiftool", "-b", f"-{tag}", "-"], input=data, capture_output=True, check=True).stdout


_CONTAINER = "{http://ns.google.com/photos/1.0/container/}"
_ITEM = "{http://ns.google.com/photos/1.0/container/item/}"


def items(data: bytes) -> dict[str, bytes]:
    """What XMP's container lists after the first picture, by what it is: a reader that knows nothing of ours."""
    root = ElementTree.fromstring(extracted(data, "XMP"))
    found = {}
    end = len(data)
    for item in reversed(root.findall(f".//{_CONTAINER}Item")):
        length = int(item.get(f"{_ITEM}Length", "0"))
        if length:
            found[item.get(f"{_ITEM}Semantic", "")] = data[end - length : end]
            end -= length
    return found


@needs_exiftool
@pytest.mark.parametrize("progressive", [False, True])
def test_a_reader_of_its_own_finds_gain_map_and_video(progressive: bool) -> None:
    """Both in one file, as phones write it."""
    parts = {"GainMap": jpeg_bytes(picture(160, 120, "L")), "MotionPhoto": video()}
    listed = "".join(
        f"""<rdf:li rdf:parseType="Resource"><Container:Item Item:Mime="{mime}" Item:Semantic="{what}"
 Item:Length="{len(parts.get(what, b""))}"/></rdf:li>"""
        for what, mime in (("Primary", "image/jpeg"), ("GainMap", "image/jpeg"), ("MotionPhoto", "video/mp4"))
    )
    xmp = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:GCamera="http://ns.google.com/photos/1.0/camera/"
 xmlns:Container="{_CONTAINER[1:-1]}" xmlns:Item="{_ITEM[1:-1]}" GCamera:MotionPhoto="1" GCamera:MicroVideo="1"
 GCamera:MicroVideoOffset="{len(parts["MotionPhoto"])}"><Container:Directory><rdf:Seq>{listed}</rdf:Seq>
</Container:Directory></rdf:Description></rdf:RDF></x:xmpmeta>"""
    still = jpeg_bytes(progressive=progressive, quality=80)
    original = with_segment(still, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp.encode()) + b"".join(parts.values())
    view = view_of(original)
    assert items(original) == items(view) == parts
    offset = int(extracted(view, "MicroVideoOffset"))
    assert view[-offset:] == parts["MotionPhoto"]
    assert printed(view) == printed(original)


def ultra_hdr() -> bytes:
    """As libultrahdr writes it: a sunlit spot, six times brighter than white."""
    y, x = np.mgrid[0:240, 0:320]
    base = (np.asarray(picture(320, 240).filter(ImageFilter.GaussianBlur(5))) / 255.0) ** 2.2
    light = base * (1 + 6 * np.exp(-((x - 160) ** 2 + (y - 120) ** 2) / 3000))[:, :, None]
    return bytes(imagecodecs.ultrahdr_encode(np.dstack((light, np.ones((240, 320)))).astype(np.float16)))


@pytest.mark.skipif(not imagecodecs.ULTRAHDR.available, reason="this imagecodecs has no libultrahdr")
@pytest.mark.parametrize("longer", range(4))
def test_libultrahdr_brightens_the_view_as_the_original(longer: int) -> None:
    """It misses the gain map after an odd number of FF bytes before the first picture's end."""
    plain = ultra_hdr()
    comment = struct.pack(">HH", 0xFFFE, 2 + longer) + bytes(longer)
    original = plain[:2] + comment + plain[2:]  # before MPF, which counts from itself
    view = view_of(original)
    before, after = (imagecodecs.ultrahdr_decode(data).astype(np.float64)[:, :, :3] for data in (original, view))
    dark = imagecodecs.ultrahdr_decode(view, boost=1.0).astype(np.float64)[:, :, :3]
    assert before.max() > 4 and after.max() > 4 > dark.max(), "brighter than white"
    light = [each.reshape(15, 16, 20, 16, 3).mean((1, 3)) for each in (before, after, dark)]
    assert np.abs(light[0] - light[1]).mean() < 0.1 * np.abs(light[0] - light[2]).mean()
    end = jpeg_parse.parse(original).eoi
    assert view[end:] == original[end:]
    if shutil.which("exiftool"):
        assert printed(view) == printed(original)
        assert extracted(view, "MPImage2") == extracted(original, "MPImage2") != b""


def several_pictures(gain_map: Image.Image) -> bytes:
    """A JPEG with a second picture after it, that MPF tells the place of: stereo pairs, previews, gain maps."""
    out = io.BytesIO()
    picture(640, 480).save(out, "MPO", save_all=True, append_images=[gain_map], quality=90)
    return out.getvalue()


def test_a_gain_map_is_where_mpf_says() -> None:
    """Ultra HDR: viewers brighten the picture by a second one, which they find by its offset."""
    gain_map = picture(160, 120, "L")
    original = several_pictures(gain_map)
    view = view_of(original)
    second = []
    for data in (original, view):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "MPO"
            image.seek(1)
            second.append(np.asarray(image))
    assert np.array_equal(second[0], second[1])
    end = jpeg_parse.parse(original).eoi
    assert view[end:] == original[end:]
    if shutil.which("exiftool"):
        assert printed(view) == printed(original)
        assert extracted(original, "MPImage2") == extracted(view, "MPImage2") != b""


@needs_exiftool
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_told_and_not_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    original = jpeg_bytes(exif=exif.tobytes())
    view = view_of(original)
    with Image.open(io.BytesIO(view)) as image:
        assert image.size == (320, 240)
        assert image.getexif()[0x0112] == orientation
    assert printed(view) == printed(original)


@needs_exiftool
def test_thumbnail_photoshop_blocks_and_profile(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(70_000)  # in two segments
    path.write_bytes(jpeg_bytes(icc_profile=profile, exif=Image.Exif().tobytes()))
    with_thumbnail(path, picture())
    resources = b"8BIM\x04\x04\0\0\0\0\0\x09\x1c\x02\x05\0\x04name\0"
    original = with_segment(path.read_bytes(), 0xED, b"Photoshop 3.0\0" + resources)
    view = view_of(original)
    assert printed(view) == printed(original)
    assert printed(view)["IPTC:ObjectName"] == "name"
    with Image.open(io.BytesIO(view)) as image:
        assert image.info["icc_profile"] == profile
    thumbnails = [
        subprocess.run(["exiftool", "-b", "-ThumbnailImage", "-"], input=data, capture_output=True, check=True).stdout
        for data in (original, view)
    ]
    assert thumbnails[0] == thumbnails[1]
    assert len(thumbnails[0]) > 1000
