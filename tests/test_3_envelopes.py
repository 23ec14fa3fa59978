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

import numpy as np
import pytest
from PIL import Image, ImageCms

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
        extracted = [
            subprocess.run(["exiftool", "-b", "-MPImage2", "-"], input=data, capture_output=True, check=True).stdout
            for data in (original, view)
        ]
        assert extracted[0] == extracted[1] != b""


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
