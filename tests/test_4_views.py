"""Views on a real mount: what programs see of photographs that are stored small."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image, ImageChops, ImageCms, ImageStat, PngImagePlugin

from esrfs import formats, reconstruction
from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Recipe, Scores
from esrfs.compaction import encoder
from esrfs.formats import jpeg_parse
from esrfs.networks import registry
from tests import gallery as making
from tests.conftest import _exif, photograph
from tests.gallery import Gallery, GalleryMount, Picture, camera, vary
from tests.mounting import Mounted
from tests.test_1_png import interlaced

pytestmark = pytest.mark.mount

HEAD, TAIL = 65536, 8192
"""Bytes that programs read of a file's beginning and end, and that shall cost no network."""


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Compacted pictures of different sizes: the larger a file, the more of its beginning is known without pixels."""
    base = tmp_path_factory.mktemp("gallery")
    coffee = photograph("coffee")
    coffee.resize((160, 112)).save(base / "small.jpg", quality=95, exif=_exif())
    coffee.save(base / "middle.jpg", quality=97, subsampling="4:4:4", exif=_exif(6))
    coffee.save(base / "large.jpg", quality=100, subsampling="4:4:4", exif=_exif())
    if shutil.which("exiftool"):
        making.with_thumbnail(base / "large.jpg", coffee)
    coffee.resize((300, 200)).save(base / "large.png", compress_level=0)
    return making.make_gallery(base, sorted(path for path in base.iterdir() if path.is_file()))


@pytest.fixture
def mount(tmp_path: Path, gallery: Gallery, can_mount: None) -> Iterator[GalleryMount]:
    """Not started yet."""
    made = GalleryMount(tmp_path, gallery)
    try:
        yield made
    finally:
        made.clean_up()


def put(mount: GalleryMount, gallery: Gallery, name: str, counts: range, folder: str) -> list[Path]:
    """Put variations of the picture ``name`` into the store; their paths in the mount."""
    (mount.store / folder).mkdir(exist_ok=True)
    names = [f"{folder}/{number}{Path(name).suffix}" for number in counts]
    for number, path in zip(counts, names, strict=True):
        (mount.store / path).write_bytes(vary(gallery, name, number).blob)
    return [mount.path / path for path in names]


def until_released(mount: Mounted) -> None:
    """The kernel tells the mount a little later that a file was closed; until then its view is at hand."""
    deadline = time.monotonic() + 5
    while mount.status()["open_handles"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- header and tail reads


def scan_start(gallery: Gallery, name: str) -> int:
    return recipe_format.length(gallery.pictures[name].recipe.prefix)


def has_tail(gallery: Gallery, name: str) -> bool:
    """Whether the last 8 KiB are known without the pixels."""
    return recipe_format.length(gallery.pictures[name].recipe.suffix) >= TAIL


@pytest.mark.slow
def test_heads_and_tails_of_500_files_cost_no_network(
    mount: GalleryMount, gallery: Gallery, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = {"large.jpg": 300, "large.png": 50, "middle.jpg": 100, "small.jpg": 50}
    roomy: list[Path] = []
    tight: list[Path] = []
    tails: list[Path] = []
    for name, count in shares.items():
        paths = put(mount, gallery, name, range(count), Path(name).stem + Path(name).suffix[1:])
        (roomy if scan_start(gallery, name) >= HEAD else tight).extend(paths)
        tails += paths if has_tail(gallery, name) else []
    assert len(roomy) == 350
    mount.start()

    def heads(paths: Sequence[Path]) -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                assert len(file.read(HEAD)) == min(HEAD, path.stat().st_size)

    def last_bytes(paths: Sequence[Path]) -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                file.seek(-TAIL, os.SEEK_END)
                assert len(file.read()) == TAIL

    def pillow(paths: Sequence[Path]) -> None:
        for path in paths:
            with Image.open(path) as image:
                assert min(image.size) >= 112
                if path.suffix == ".jpg":
                    assert image.getexif()[0x0110] == camera(int(path.stem)), "the EXIF of this very file"
                    assert image.info["exif"]

    def program(*command: str) -> Callable[[Sequence[Path]], None]:
        def run(paths: Sequence[Path]) -> None:
            done = subprocess.run([*command, *map(str, paths)], capture_output=True, check=False, timeout=200)
            assert done.returncode == 0, done.stderr.decode()[-2000:]

        return run

    def thumbnails(paths: Sequence[Path]) -> None:
        done = subprocess.run(
            ["exiftool", "-q", "-b", "-ThumbnailImage", *map(str, paths)], capture_output=True, check=True, timeout=200
        )
        large = sum(path.parent.name == "largejpg" for path in paths)
        assert done.stdout.count(b"\xff\xd8\xff") == large, "one for each"

    jpegs = ("jhead", "exiv2")
    tools: dict[str, Callable[[Sequence[Path]], None]] = {
        "head -c 65536": heads,
        "Pillow: size and EXIF": pillow,
        "exiftool": program("exiftool", "-j", "-q"),
        "exiftool -ThumbnailImage": thumbnails,
        "jhead": program("jhead"),
        "exiv2": program("exiv2", "-q", "pr"),
        "identify -ping": program("identify", "-ping"),  # reads by mmap, for which the kernel reads ahead
    }
    tools = {
        name: tool
        for name, tool in tools.items()
        if shutil.which(name.split()[0]) or name in ("head -c 65536", "Pillow: size and EXIF")
    }
    table = {}
    for group, paths in (("roomy", roomy), ("tight", tight)):
        for name, tool in tools.items():
            before = mount.status()["engine_calls"]
            chosen = [path for path in paths if path.suffix == ".jpg"] if name.split()[0] in jpegs else paths
            start = time.monotonic()
            tool(chosen)
            calls = mount.status()["engine_calls"] - before
            table[group, name] = (len(chosen), calls, time.monotonic() - start)
            mount.call("cache-clear")
        if group == "roomy":
            before = mount.status()["engine_calls"]
            last_bytes(tails)
            table[group, "tail -c 8192"] = (len(tails), mount.status()["engine_calls"] - before, 0.0)
            assert mount.call("cache-show")["views"] == 0, "what the recipe tells does not fill the cache"
    starts = {name: scan_start(gallery, name) for name in shares}
    with capsys.disabled():
        print(f"\n{len(tight)} of {len(roomy) + len(tight)} files are too small for a head of {HEAD} bytes: {starts}")
        for (group, name), (count, calls, seconds) in table.items():
            print(f"  {group}: {name}: {count} files, {calls} engine calls, {seconds:.1f} s")
    costly = [tool for (group, tool), (_, calls, _) in table.items() if group == "roomy" and calls]
    assert set(costly) <= {"identify -ping"}
    assert mount.status()["open_handles"] == 0
    path = roomy[0]
    assert sha256(path.read_bytes()) == sha256(vary(gallery, "large.jpg", 0).view)


FREE_READS = {
    # file: whether its first 64 KiB, its last 8 KiB, and what exiftool reads are known without pixels
    "a.jpg": (True, True, True),
    "a.png": (True, True, True),
    "extended.webp": (True, True, None),  # exiftool and other readers look at some bytes of the picture's chunk
    "simple.webp": (False, True, None),  # begins with its pixels
    "a.tiff": (False, False, False),  # ends with its pixels; its directory lies before them
    "deflate.tiff": (False, False, False),  # ends with its directory, which takes less than 8 KiB
    "jpeg.tiff": (False, False, False),
    "a.bmp": (False, False, False),
}


def test_which_heads_and_tails_of_each_kind_cost_no_network(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kind whose pixels lie at a file's ends costs a reconstruction there, and nowhere else."""
    image = photograph("coffee")
    options: dict[str, dict[str, Any]] = {
        "a.jpg": {"quality": 100, "subsampling": "4:4:4"},
        "a.png": {"compress_level": 0},
        "extended.webp": {"lossless": True, "exif": _exif()},
        "simple.webp": {"lossless": True},
        "a.tiff": {"compression": "raw"},
        "deflate.tiff": {"compression": "tiff_adobe_deflate"},
        "jpeg.tiff": {"compression": "jpeg", "quality": 96},
        "a.bmp": {},
    }
    for name, free in FREE_READS.items():
        made = io.BytesIO()
        suffix = Path(name).suffix[1:]
        image.save(made, {"jpg": "JPEG"}.get(suffix, suffix), **options[name])
        recipe = _put_ungated(mounted, name, made.getvalue())
        before, behind = (recipe_format.length(spans) for spans in (recipe.prefix, recipe.suffix))
        reads = {"known head": (0, before), "known tail": (recipe.original_size - behind, behind)}
        reads |= {"head": (0, HEAD), "tail": (recipe.original_size - TAIL, TAIL)}
        path = mounted.path / name
        calls = {what: _calls(mounted, partial(_read_part, path, *part)) for what, part in reads.items()}
        if shutil.which("exiftool"):
            calls["exiftool"] = _calls(mounted, partial(_run_exiftool, path))
        with capsys.disabled():
            print(f"\n  {name}: {before} bytes before the pixels, {behind} behind; engine calls: {calls}", end="")
        assert calls["known head"] == calls["known tail"] == 0
        assert (calls["head"] == 0, calls["tail"] == 0) == free[:2]
        assert free[2] is None or "exiftool" not in calls or (calls["exiftool"] == 0) == free[2]


def _put_ungated(mounted: Mounted, name: str, original: bytes) -> Recipe:
    """A blob of its picture at full size, however good: only where the bytes lie counts here."""
    split = formats.split(original, 50)
    avif = encoder.encode_avif(Image.fromarray(split.pixels()), 45, speed=10)
    plan = reconstruction.Plan(split.width, split.height, 1, b"", False)
    pixels = reconstruction.decode_small(plan, avif)
    fitted = formats.fit_view(split, pixels)
    recipe = Recipe(
        width=split.width,
        height=split.height,
        original_size=len(original),
        sha256_original=hashlib.sha256(original).digest(),
        sha256_view=hashlib.sha256(fitted.expand()).digest(),
        preset="small",
        scale=1,
        network="",
        network_sha256=b"",
        quality=45,
        coding=fitted.coding,
        prefix=fitted.prefix,
        scan_length=len(fitted.scan),
        suffix=fitted.suffix,
        encoder=fitted.encoder,
        scores=Scores(60.0, 50.0, 30.0),
        created_by="tests",
    )
    config = mounted.config
    blob = container.pack(avif, recipe_format.encode(recipe), config.id_bytes, config.key_bytes)
    (mounted.store / name).write_bytes(blob)
    return recipe


def _calls(mount: Mounted, work: Callable[[], object]) -> int:
    """Of the engine, for ``work`` on views that are not at hand."""
    mount.call("cache-clear")
    before = int(mount.status()["engine_calls"])
    work()
    until_released(mount)
    return int(mount.status()["engine_calls"]) - before


def _read_part(path: Path, start: int, count: int) -> None:
    with open(path, "rb", buffering=0) as file:
        assert len(os.pread(file.fileno(), count, start)) == count


def _run_exiftool(path: Path) -> None:
    subprocess.run(["exiftool", "-j", "-q", path], capture_output=True, check=True, timeout=100)


def test_every_read_of_a_cold_view_gives_the_views_bytes(mount: GalleryMount, gallery: Gallery) -> None:
    """Around the borders between what the recipe tells and what the network makes."""
    names = list(gallery.pictures)
    for number, name in enumerate(names):
        picture = vary(gallery, name, number)
        (mount.store / name).write_bytes(picture.blob)
    mount.start()
    for number, name in enumerate(names):
        picture = vary(gallery, name, number)
        recipe = picture.recipe
        start, size = recipe_format.length(recipe.prefix), len(picture.view)
        end = start + recipe.scan_length
        offsets = {0, 1, 100, start - 1, start, start + 1, end - 1, end, end + 1, size - 1, size, size + 10}
        with open(mount.path / name, "rb", buffering=0) as file:
            for offset in sorted(offsets):
                for length in (1, 2, 4096, 131072):
                    assert os.pread(file.fileno(), length, offset) == picture.view[offset : offset + length], name


# ---- layouts of files


def save(image: Image.Image, path: Path, **options: Any) -> None:
    settings: dict[str, Any] = {"quality": 96, "exif": _exif()} if path.suffix == ".jpg" else {}
    image.save(path, **settings | options)


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """APPn and COM segments, without our fill."""
    found = [(segment.marker, segment.raw) for segment in jpeg_parse.parse(data).segments if segment.is_envelope]
    return [(marker, raw) for marker, raw in found if not raw[4:].startswith(b"esrfs\0")]


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """PNG chunks without pixels and our fill, then what follows IEND."""
    found, offset = [], 8
    while offset < len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        if kind not in (b"IDAT", b"esRF"):
            found.append((kind, data[offset : offset + 12 + length]))
        offset += 12 + length
        if kind == b"IEND":
            break
    return [*found, (b"rest", data[offset:])]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def insert_before(path: Path, kind: bytes, inserted: bytes) -> None:
    """Put chunks before the first ``kind`` of a PNG."""
    data = path.read_bytes()
    offset = data.index(kind) - 4
    path.write_bytes(data[:offset] + inserted + data[offset:])


def insert_after_soi(path: Path, inserted: bytes) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:2] + inserted + data[2:])


_MP4_HEAD = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom"


def compactable(folder: Path) -> None:
    """Files of many layouts that compaction takes."""
    image = photograph("coffee").resize((300, 200))
    astronaut = photograph("astronaut").resize((208, 208))
    for sampling in ("4:4:4", "4:2:2", "4:2:0"):
        save(image, folder / f"sampling {sampling.replace(':', '')}.jpg", subsampling=sampling)
    for width, height in ((65, 300), (301, 67), (127, 129), (299, 199)):
        save(image.resize((width, height)), folder / f"odd {width}x{height}.jpg")
    save(image.resize((211, 133)), folder / "odd.png", compress_level=0)
    for orientation in (3, 6, 8):
        save(image, folder / f"orientation {orientation}.jpg", exif=_exif(orientation))
    save(image.convert("L"), folder / "gray.jpg")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(image, folder / "icc.jpg", icc_profile=profile, comment=b"a comment", dpi=(300, 300))
    save(image, folder / "long icc.jpg", icc_profile=profile + bytes(150_000))
    save(image, folder / "xmp.jpg", xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'></x:xmpmeta>")
    save(image, folder / "optimised.jpg", optimize=True)
    save(image, folder / "restarts.jpg", restart_marker_blocks=5)
    save(image, folder / "no exif.jpg", exif=b"")
    save(image, folder / "no end of name", format="JPEG", quality=96)
    save(image, folder / "wrong name.png.jpg", format="PNG", quality=None, exif=None)
    save(image, folder / "fill bytes.jpg")
    insert_after_soi(folder / "fill bytes.jpg", b"\xff\xff\xff")
    save(image, folder / "many segments.jpg")
    own = b"".join(b"\xff\xed" + struct.pack(">H", 2 + 5) + b"mine" + bytes([number]) for number in range(40))
    insert_after_soi(folder / "many segments.jpg", own)
    save(image, folder / "motion.jpg")
    with open(folder / "motion.jpg", "ab") as file:  # what phones append, markers and thumbnails within
        file.write(_MP4_HEAD + b"\xff\xd8\xff\xd9\xff\xda" + os.urandom(50_000))
    save(image, folder / "gain map.jpg", format="MPO", save_all=True, append_images=[image.convert("L").reduce(4)])
    save(astronaut, folder / "rgb.png")
    save(astronaut.convert("L"), folder / "gray.png")
    alpha = Image.radial_gradient("L").resize(astronaut.size)
    translucent = astronaut.copy()
    translucent.putalpha(alpha)
    save(translucent, folder / "rgba.png")
    save(translucent.convert("LA"), folder / "gray alpha.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "text")
    info.add_text("Long", "z" * 1000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta xmlns:x='adobe:ns:meta/'></x:xmpmeta>")
    info.add(b"prIv", b"private, before the pixels")
    info.add(b"enDs", b"private, after the pixels", after_idat=True)
    save(astronaut, folder / "chunks.png", pnginfo=info, icc_profile=profile, dpi=(300, 300), exif=_exif(6))
    others = [(b"gAMA", struct.pack(">I", 45455)), (b"sBIT", b"\x08\x08\x08"), (b"bKGD", bytes(6))]
    others += [(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))]
    insert_before(folder / "chunks.png", b"IDAT", b"".join(chunk(*each) for each in others[2:3]))
    save(astronaut, folder / "colour chunks.png")
    insert_before(folder / "colour chunks.png", b"IDAT", b"".join(chunk(*each) for each in others))
    insert_before(folder / "colour chunks.png", b"IEND", chunk(b"tIME", struct.pack(">HBBBBB", 2024, 5, 6, 7, 8, 9)))
    save(image, folder / "progressive.jpg", progressive=True)
    save(image.convert("L"), folder / "progressive gray.jpg", progressive=True)
    save(photograph("coffee").quantize(256), folder / "palette.png", format="PNG", compress_level=1)
    save(astronaut, folder / "one transparent colour.png", transparency=(0, 0, 0))
    (folder / "interlaced.png").write_bytes(interlaced((folder / "rgb.png").read_bytes()))
    for name, options in {"lossy": {"quality": 95}, "lossless": {"lossless": True}}.items():
        image.save(folder / f"{name}.webp", **options)
        image.save(folder / f"{name}, exif.webp", exif=_exif(6), icc_profile=profile, **options)
        translucent.save(folder / f"{name}, alpha.webp", exact=True, **options)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate"):
        image.save(folder / f"{compression}.tiff", compression=compression, tiffinfo={274: 6}, icc_profile=profile)
    image.save(folder / "jpeg within.tiff", compression="jpeg", quality=96)
    translucent.save(folder / "alpha.tiff")
    image.save(folder / "picture.bmp")
    image.convert("L").resize((201, 133)).save(folder / "gray.bmp")
    save(astronaut, folder / "after the end.png")
    with open(folder / "after the end.png", "ab") as file:
        file.write(b"what somebody appended" * 100)


def left_alone(folder: Path) -> dict[str, str]:
    """Files that stay bit for bit; the reasons by name."""
    image = photograph("coffee").resize((300, 200))
    save(image.convert("CMYK"), folder / "cmyk.jpg")
    save(image, folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[:-2000])
    (folder / "no eoi.jpg").write_bytes(data[:-2])
    middle = len(data) // 2
    (folder / "broken.jpg").write_bytes(data[:middle] + b"\xff\x01" + data[middle + 2 :])
    save(image, folder / "signed.jpg")
    insert_after_soi(folder / "signed.jpg", b"\xff\xeb\x00\x20JP" + bytes(28))
    save(image, folder / "coded as rgb.jpg", keep_rgb=True)
    (folder / "header only.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    for width, height in ((1, 300), (300, 1), (63, 300)):
        save(image.resize((width, height)), folder / f"tiny {width}x{height}.jpg")
    save(image, folder / "low quality.jpg", quality=8)
    image.convert("1").save(folder / "bits.png")
    image.convert("I").point(lambda value: value * 257).convert("I;16").save(folder / "16 bit.png")
    save(image, folder / "signed.png")
    insert_before(folder / "signed.png", b"IDAT", chunk(b"caBX", b"signature"))
    save(image, folder / "animated.png", save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)])
    save(image, folder / "broken.png")
    flipped = bytearray((folder / "broken.png").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (folder / "broken.png").write_bytes(flipped)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    for kind in ("gif", "avif"):
        image.save(folder / f"picture.{kind}")
    image.save(folder / "animated.webp", save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)])
    image.save(folder / "packbits.tiff", compression="packbits")
    image.convert("1").save(folder / "fax.tiff", compression="group4")
    image.quantize(8).save(folder / "few colours.tiff")
    image.convert("1").save(folder / "bits.bmp")
    (folder / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(1000))
    (folder / "video.mp4").write_bytes(_MP4_HEAD + bytes(1000))
    (folder / "text.jpg").write_text("not a photograph, whatever its name says")
    (folder / "script").write_text("#!/bin/sh\n")
    save(image, folder / "download.jpg.part", format="JPEG")
    save(image, folder / "linked.jpg")
    os.link(folder / "linked.jpg", folder / "linked too.jpg")
    broken = {"broken.jpg", "broken.png", "header only.jpg"}
    reasons = {path.name: "unsupported_kind" for path in folder.iterdir()}
    reasons |= dict.fromkeys(broken, "broken")
    reasons |= dict.fromkeys(("signed.jpg", "signed.png"), "signed")
    reasons |= {name: "too_small" for name in reasons if name.startswith("tiny")}
    reasons |= dict.fromkeys(("text.jpg", "script"), "not_a_picture")
    reasons |= dict.fromkeys(("linked.jpg", "linked too.jpg"), "hard_links")
    return reasons | {
        "bomb.png": "too_large",
        "download.jpg.part": "temporary_name",
        "low quality.jpg": "None quality does_not_fit not_worth_it",
    }


def decorate(folder: Path) -> None:
    """Modes, times and extended attributes that are unlike the defaults."""
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        with contextlib.suppress(OSError):
            os.setxattr(path, "user.comment", f"number {number}".encode())
        path.chmod((0o644, 0o600, 0o440, 0o755)[number % 4])
        os.utime(path, ns=(1_600_000_000_123_456_789 + number, 1_500_000_000_987_654_321 + number))


_OF_THE_FILE_SYSTEM = {
    *("SourceFile", "File:Directory", "File:FileName", "File:FileModifyDate", "File:FileAccessDate"),
    *("File:FileInodeChangeDate", "File:FilePermissions"),
}


def told_by_exiftool(folder: Path) -> dict[str, Any]:
    """By path relative to ``folder``: what exiftool says of each file, in one run."""
    command = ["exiftool", "-j", "-G", "-struct", "-a", "-r", "-q", "-ee", "-if", "1", "."]
    done = subprocess.run(command, capture_output=True, check=False, cwd=folder)
    values: list[dict[str, Any]] = json.loads(done.stdout)
    return {
        os.path.normpath(each["SourceFile"]): {k: v for k, v in each.items() if k not in _OF_THE_FILE_SYSTEM}
        for each in values
    }


def attributes(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


def check_same_file(view: Path, source: Path) -> None:
    """What stat tells, but inode, links and ctime."""
    ours, theirs = view.stat(), source.stat()
    for field in ("st_size", "st_mtime_ns", "st_mode", "st_uid", "st_gid"):
        assert getattr(ours, field) == getattr(theirs, field), (view.name, field)
    assert attributes(view) == attributes(source), view.name
    assert ours.st_blocks > 0 or not ours.st_size, view.name


def check_picture(view: bytes, source: bytes, name: str, least_db: float = 18.0) -> None:
    """The same envelope around similar pixels."""
    with Image.open(io.BytesIO(source)) as theirs, Image.open(io.BytesIO(view)) as ours:
        assert (ours.format, ours.mode, ours.size) == (theirs.format, theirs.mode, theirs.size), name
        assert ours.getexif().tobytes() == theirs.getexif().tobytes(), name
        for key in ("icc_profile", "comment", "dpi", "xmp"):
            assert ours.info.get(key) == theirs.info.get(key), (name, key)
        if theirs.format in ("JPEG", "MPO"):
            assert segments(view) == segments(source), name
            eoi = jpeg_parse.parse(source).eoi
            assert jpeg_parse.parse(view).eoi == eoi, name
            assert view[eoi:] == source[eoi:], name
        elif theirs.format == "PNG":
            assert chunks(view) == chunks(source), name
        if ours.has_transparency_data:
            alphas = [each.convert("RGBA").getchannel("A").tobytes() for each in (ours, theirs)]
            assert alphas[0] == alphas[1], name
        mode = "L" if ours.mode in ("L", "LA") else "RGB"
        difference = ImageStat.Stat(ImageChops.difference(ours.convert(mode), theirs.convert(mode)))
        error = sum(difference.rms) / len(difference.rms)
        assert 20 * math.log10(255 / max(error, 0.01)) > least_db, f"{name}: these pixels are another picture's"


def compare(mount: Mounted, sources: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """Check every file of ``sources``, which was copied to the mount and compacted; what explain says of each."""
    known = {}
    table: Counter[tuple[str, str]] = Counter()
    bytes_in: Counter[tuple[str, str]] = Counter()
    digests = {}
    blobs = []
    for source in sorted(path for path in sources.rglob("*") if path.is_file()):
        name = str(source.relative_to(sources))
        view = mount.path / name
        check_same_file(view, source)
        known[name] = mount.explain(name)
        kind = known[name]["state"], known[name]["reason"] or ""
        table[kind] += 1
        bytes_in[kind] += source.stat().st_size
        assert not any(each.startswith("user.esrfs") for each in os.listxattr(view))
        assert os.getxattr(view, "user.esrfs.state").decode() == kind[0]
        data = view.read_bytes()
        digests[name] = sha256(data)
        if kind[0] == "blob":
            blobs.append(view)
            if known[name]["preset"] == "lossless":
                assert data == source.read_bytes(), name
            else:
                check_picture(data, source.read_bytes(), name)
            assert known[name]["sha256_view"] == digests[name]
            assert known[name]["sha256_original"] == sha256(source.read_bytes())
        else:
            assert kind[0] in ("refused", "passed_through"), (name, known[name])
            assert data == source.read_bytes(), name
    with capsys.disabled():
        print(f"\n{len(known)} files:")
        for (state, reason), count in sorted(table.items()):
            print(f"  {count:4} {state} {reason} ({bytes_in[state, reason]:,} bytes)")
        total, stored = (sum(each[key] for each in known.values()) for key in ("original_bytes", "stored_bytes"))
        print(f"  {total:,} bytes take {stored:,}")
    if shutil.which("identify"):
        done = subprocess.run(["identify", *map(str, blobs)], capture_output=True, check=False, timeout=250)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
    if shutil.which("exiftool"):
        ours, theirs = told_by_exiftool(mount.path), told_by_exiftool(sources)
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            assert ours[name] == values, name
    if shutil.which("pngcheck"):
        pngs = [str(view) for view in blobs if view.suffix == ".png" and "after the end" not in view.name]
        if pngs:
            done = subprocess.run(["pngcheck", "-q", *pngs], capture_output=True, check=False, timeout=100)
            assert done.returncode == 0, done.stdout.decode()[-2000:]
    assert mount.call("cache-clear")["cleared"] > 0
    calls = mount.status()["engine_calls"]
    check_digests(mount.path, digests)
    assert mount.status()["engine_calls"] == calls + len({digests[str(v.relative_to(mount.path))] for v in blobs})
    assert mount.stop() == 0
    mount.start()
    check_digests(mount.path, digests)
    return known


def check_digests(folder: Path, digests: dict[str, str]) -> None:
    assert {name: sha256((folder / name).read_bytes()) for name in digests} == digests


def test_files_of_every_layout(mounted: Mounted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = tmp_path / "sources"
    for folder in ("compacted", "left"):
        (sources / folder).mkdir(parents=True)
    compactable(sources / "compacted")
    reasons = left_alone(sources / "left")
    (sources / "empty.jpg").touch()
    decorate(sources)
    (sources / "empty.jpg").unlink()
    subprocess.run(["cp", "-a", f"{sources}/.", str(mounted.path)], check=True)
    result = mounted.compact()
    assert "failed" not in result, mounted.log()
    known = compare(mounted, sources, capsys)
    states = {name: (each["state"], each["reason"], each["message"]) for name, each in known.items()}
    not_compacted = {k: v for k, v in states.items() if k.startswith("compacted/") and v[0] != "blob"}
    assert not_compacted == {}
    lossless = {name for name, each in known.items() if each["preset"] == "lossless"}
    left = {name: states[f"left/{name}"] for name in reasons if f"left/{name}" not in lossless}
    wrong = {name: state for name, state in left.items() if str(state[1]) not in reasons[name]}
    assert wrong == {}
    refused = ("too_small", "quality", "does_not_fit", "not_worth_it", "hard_links", "temporary_name")
    for name, (state, reason, message) in states.items():
        if name == "left/low quality.jpg" and state == "blob":
            continue  # a matter of the network: it may fit, softened
        if name.startswith("left/"):
            assert message, name
        if name.startswith("left/") and name not in lossless:
            assert state == ("refused" if reason in refused else "passed_through"), (name, reason)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_camera_file(
    mounted: Mounted, camera_files: list[Path], shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = tmp_path / "photos"
    shutil.copytree(shared_data / "photos", sources)
    decorate(sources)
    subprocess.run(["cp", "-a", f"{sources}/.", str(mounted.path)], check=True)
    assert "failed" not in mounted.compact(), mounted.log()
    known = compare(mounted, sources, capsys)
    assert len(known) == len(camera_files)
    assert sum(each["state"] == "blob" for each in known.values()) > len(known) / 4
    assert {each["reason"] for each in known.values()} & {"error"} == set()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kodak_picture(
    mounted: Mounted, kodak: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = tmp_path / "kodak"
    sources.mkdir()
    for path in kodak:
        shutil.copy(path, sources)
    decorate(sources)
    subprocess.run(["cp", "-a", f"{sources}/.", str(mounted.path)], check=True)
    assert mounted.compact() == {"compacted": 24}, mounted.log()
    compare(mounted, sources, capsys)


# ---- damage


def test_a_damaged_blob_gives_an_error_and_never_garbage(mount: GalleryMount, gallery: Gallery) -> None:
    """A flipped byte, wherever it is, leads to EIO with a line in the log that names the file; or it does no harm."""
    picture = gallery.pictures["middle.jpg"]
    size = len(picture.blob)
    inner = len(container.unpack(picture.blob).avif)
    positions = {0, 5, 40, 200, inner // 2, inner - 1, inner, inner + 4, inner + 10, inner + 24, inner + 30}
    positions |= {(inner + size) // 2, size - 65, *range(size - 64, size, 9), size - 1}
    names = {position: f"flipped {position}.jpg" for position in sorted(positions)}
    for position, name in names.items():
        flipped = bytearray(picture.blob)
        flipped[position] ^= 0x55
        (mount.store / name).write_bytes(flipped)
    (mount.store / "cut.jpg").write_bytes(vary(gallery, "middle.jpg", 1).blob[64 * 20 :])
    mount.expected += [r"flipped \d+\.jpg", r"cut\.jpg"]
    mount.start()
    harmless = []
    for position, name in names.items():
        try:
            data = (mount.path / name).read_bytes()
        except OSError as error:
            assert error.errno == errno.EIO, name
            assert name in mount.log()
        else:
            assert data == picture.view, f"{name}: garbage"
            harmless.append(position)
    assert set(harmless) <= {size - 65}, "padding only"
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mount.path / "cut.jpg").read_bytes()
    assert mount.call("cache-show")["views"] <= 1
    for name in names.values():
        (mount.path / name).unlink()  # a damaged file can be deleted


def a_network_of_ones_own(gallery: Gallery) -> tuple[bytes, Picture]:
    """A network's file that only its owner has, and a picture that needs it. (It is a shipped one, but for spaces.)"""
    pictures = [picture for picture in gallery.pictures.values() if picture.recipe.network_sha256]
    if not pictures:
        pytest.skip("none of the pictures uses a network at this preset")
    shipped = registry.with_sha256(pictures[0].recipe.network_sha256)
    assert shipped is not None
    length = int.from_bytes(shipped[1][:8], "little")
    content = shipped[1]
    network = (length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :]
    recipe = msgspec.structs.replace(pictures[0].recipe, network_sha256=hashlib.sha256(network).digest())
    avif = container.unpack(pictures[0].blob).avif
    blob = container.pack(avif, recipe_format.encode(recipe), gallery.config.id_bytes, gallery.config.key_bytes)
    return network, Picture(blob, pictures[0].view, pictures[0].source)


def test_a_missing_network_is_told(mount: GalleryMount, gallery: Gallery) -> None:
    """And the photograph can be read as soon as it is there again: in the store, or as a network of the user's."""
    network, picture = a_network_of_ones_own(gallery)
    name = hashlib.sha256(network).hexdigest()
    kept = mount.store / ".esrfs" / "networks" / name
    (mount.store / "photo.jpg").write_bytes(picture.blob)
    mount.expected += ["photo.jpg: could not be rebuilt", "photo.jpg: its network .* can't be used", name]
    mount.start()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mount.path / "photo.jpg").read_bytes()
    assert name[:16] in mount.log()
    kept.write_bytes(network)
    assert (mount.path / "photo.jpg").read_bytes() == picture.view
    mount.stop()

    kept.unlink()
    mount.start()
    mount.call("cache-clear")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mount.path / "photo.jpg").read_bytes()
    own = registry.user_directory() / "mine-x2.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(network)
    assert (mount.path / "photo.jpg").read_bytes() == picture.view
    assert kept.read_bytes() == network


def test_networks_that_a_backup_left_out_are_put_back(mount: GalleryMount, gallery: Gallery) -> None:
    names = [name for name, picture in gallery.pictures.items() if picture.recipe.network_sha256]
    for name in names:
        (mount.store / name).write_bytes(gallery.pictures[name].blob)
    shutil.rmtree(mount.store / ".esrfs" / "networks")
    mount.expected.append("was lost and is put back")
    mount.start()
    for name in names:
        assert (mount.path / name).read_bytes() == gallery.pictures[name].view
        network = gallery.pictures[name].recipe.network_sha256
        (kept,) = (mount.store / ".esrfs" / "networks").glob(f"{network.hex()}*")
        assert hashlib.sha256(kept.read_bytes()).digest() == network


# ---- the cache


def test_the_cache_counts_evicts_and_is_commanded(mount: GalleryMount, gallery: Gallery) -> None:
    paths = put(mount, gallery, "middle.jpg", range(6), "photos")
    views = [vary(gallery, "middle.jpg", number).view for number in range(6)]
    mount.start("cache_size=2M", "cache_floor=0")
    command = [sys.executable, "-m", "esrfs.cli.main", "cache"]

    def esrfs(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    assert paths[0].read_bytes() == views[0]
    assert [mount.status()[key] for key in ("engine_calls", "cache_hits", "cache_misses")] == [1, 0, 1]
    until_released(mount)
    assert paths[0].read_bytes() == views[0]
    assert [mount.status()[key] for key in ("engine_calls", "cache_hits", "cache_misses")] == [1, 1, 1]
    assert mount.status()["cache_bytes"] >= len(views[0])
    shown = json.loads(esrfs("show", "--json", str(mount.path)))
    assert (shown["views"], shown["hits"], shown["misses"], shown["limit"]) == (1, 1, 1, 2 << 20)
    esrfs("clear", str(mount.path))
    assert mount.call("cache-show")["views"] == 0
    esrfs("warm", str(mount.path / "photos" / "1.jpg"))
    calls = mount.status()["engine_calls"]
    assert paths[1].read_bytes() == views[1]
    assert mount.status()["engine_calls"] == calls, "it was warm"

    # An eighth of the views fits: others drive an open one out, and its reader does not notice.
    with open(paths[2], "rb", buffering=0) as file:
        first = file.read(200_000)
        assert first == views[2][: len(first)]
        for path, view in zip(paths[3:], views[3:], strict=True):
            assert path.read_bytes() == view
        assert mount.call("cache-show")["bytes"] <= 2 << 20
        assert mount.call("cache-clear")["cleared"] >= 1
        calls = mount.status()["engine_calls"]
        assert first + file.read() == views[2]
        assert mount.status()["engine_calls"] == calls
    until_released(mount)
    assert paths[2].read_bytes() == views[2]
    assert mount.status()["engine_calls"] == calls + 1


def test_the_cache_is_no_more_than_a_cache(mount: GalleryMount, gallery: Gallery) -> None:
    """Its directory is removed while the mount runs, and damaged while it does not."""
    paths = put(mount, gallery, "middle.jpg", range(4), "photos")
    views = [vary(gallery, "middle.jpg", number).view for number in range(4)]
    mount.expected.append("view cache")
    mount.start()
    assert paths[0].read_bytes() == views[0]
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    for _ in range(2):
        for path, view in zip(paths, views, strict=True):
            assert path.read_bytes() == view
    assert mount.log().count("WARNING") <= 2, "said once, not for each read"
    mount.stop()
    mount.start()
    assert paths[1].read_bytes() == views[1]
    mount.stop()
    for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*"):
        if path.is_file():
            path.write_bytes(b"nonsense" * 100)
    mount.start()
    for path, view in zip(paths, views, strict=True):
        assert path.read_bytes() == view


def test_the_cache_of_a_deleted_photograph_is_dropped(mount: GalleryMount, gallery: Gallery) -> None:
    paths = put(mount, gallery, "middle.jpg", range(3), "photos")
    mount.start()
    for path in paths:
        path.read_bytes()
    assert mount.call("cache-show")["views"] == 3
    paths[0].unlink()
    paths[1].replace(paths[2])
    assert mount.call("cache-show")["views"] == 1
    directory = Path(os.environ["XDG_CACHE_HOME"]) / "esrfs" / mount.config.id
    assert directory.stat().st_mode & 0o777 == 0o700


# ---- the process


def rss(pid: int) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


def test_memory_after_1000_files_and_the_time_to_mount(
    mount: GalleryMount, gallery: Gallery, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = put(mount, gallery, "large.jpg", range(997), "photos")
    paths += put(mount, gallery, "middle.jpg", range(3), "photos")
    for number in range(1000):
        (mount.store / "photos" / f"plain {number}").write_bytes(b"x" * 5000)
    times = []
    for _ in range(3):
        times.append(_time_to_usable(mount))
    with capsys.disabled():
        shown = ", ".join(f"{seconds:.2f}" for seconds in times)
        print(f"\nmount to usable, of 2,000 files: {shown} s with a load of {os.getloadavg()[0]:.1f}")
    # Half a second is the promise, on an idle machine of our day. On another one, it may be twice what Python takes
    # there for the mount's modules alone.
    assert min(times) <= max(0.5, 2 * min(_time_to_import() for _ in range(3)))
    mount.start()
    assert mount.process is not None
    fresh = rss(mount.process.pid)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            file.read(HEAD)
    for path in (mount.path / "photos").iterdir():
        path.stat()
        if path.name.startswith("plain"):
            path.read_bytes()
    assert sha256(paths[-1].read_bytes()) == sha256(vary(gallery, "middle.jpg", 2).view)
    used = rss(mount.process.pid)
    with capsys.disabled():
        print(f"resident: {fresh / 1e6:.0f} MB at the start, {used / 1e6:.0f} MB after 1,000 views and 1,000 files")
    assert used <= 80e6
    maps = Path(f"/proc/{mount.process.pid}/maps").read_text()
    for name in ("torch", "numpy", "PIL"):
        assert name not in maps


def _time_to_import() -> float:
    """Seconds that Python takes for the serving process's modules, and for nothing else."""
    command = [sys.executable, "-P", "-c", "import esrfs.mount.__main__"]
    start = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}, cwd="/")
    return time.monotonic() - start


def _time_to_usable(mount: GalleryMount) -> float:
    """Seconds from the start of the serving process until a file can be stat'ed through the mount."""
    reader, writer = os.pipe()
    command = [sys.executable, "-P", "-m", "esrfs.mount", str(mount.store), str(mount.path), "quiet=3600"]
    environment = {**os.environ, "ESRFS_READY_FD": str(writer), "PYTHONPATH": str(Path(__file__).parent.parent)}
    start = time.monotonic()
    process = subprocess.Popen(command, pass_fds=[writer], env=environment, cwd="/")
    os.close(writer)
    probe = mount.path / "photos" / "1.jpg"
    while not probe.exists():
        assert process.poll() is None
        assert time.monotonic() < start + 30
        time.sleep(0.002)
    took = time.monotonic() - start
    with open(reader, "rb") as pipe:
        assert json.loads(pipe.read())["ready"]
    process.terminate()
    assert process.wait(30) == 0
    return took


# ---- a browser


@pytest.mark.slow
def test_a_browser_shows_views(
    mounted: Mounted, photographs: Path, needs: Callable[[str], str], tmp_path: Path
) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromium = chromium or needs("chromium")
    names = ["coffee.jpg", "camera.jpg", "coffee.png"]
    for name in names:
        shutil.copy(photographs / name, mounted.path)
    assert mounted.compact() == {"compacted": len(names)}
    for name in names:
        shots = []
        for folder in (mounted.path, photographs):
            shot = tmp_path / "shot.png"
            command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}"]
            command += ["--window-size=800,700", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'browser'}"]
            subprocess.run([*command, (folder / name).as_uri()], check=True, capture_output=True, timeout=120)
            with Image.open(shot) as image:
                shots.append(image.convert("RGB"))
        difference = ImageStat.Stat(ImageChops.difference(*shots))
        assert max(difference.rms) < 25, name
        assert max(ImageStat.Stat(shots[0]).stddev) > 20, f"{name}: a picture, and no empty page"
