"""Views that come home, on a real mount: programs rewrite what is around the pixels, and no pixel is lost again."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image, ImageChops

from esrfs.blob import carried, container
from esrfs.blob import recipe as recipe_format
from esrfs.formats import scan
from tests import gallery as making
from tests.conftest import _exif, photograph
from tests.gallery import Gallery, GalleryMount
from tests.mounting import Mounted, exiftool
from tests.witness import wait_until

pytestmark = pytest.mark.mount

Needs = Callable[[str], str]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    base = tmp_path_factory.mktemp("gallery")
    coffee = photograph("coffee").resize((320, 208))
    coffee.save(base / "photo.jpg", quality=96, exif=_exif())
    coffee.crop((0, 0, 200, 160)).save(base / "photo.png", exif=_exif(), compress_level=4)
    return making.make_gallery(base, [base / "photo.jpg", base / "photo.png"])


@pytest.fixture
def mount(tmp_path: Path, gallery: Gallery, can_mount: None) -> Iterator[GalleryMount]:
    """A mounted store with the gallery's pictures, all of them blobs."""
    made = GalleryMount(tmp_path, gallery)
    for name, picture in gallery.pictures.items():
        (made.store / name).write_bytes(picture.blob)
    try:
        made.start()
        assert made.compact()["blob"] == len(gallery.pictures)  # so the catalog knows them
        yield made
    finally:
        made.clean_up()


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()


def pixels(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.copy()


def same_pixels(one: bytes, other: bytes) -> bool:
    return ImageChops.difference(pixels(one), pixels(other)).getbbox() is None


def avif(mount: Mounted, name: str) -> bytes:
    return container.unpack((mount.store / name).read_bytes()).avif


def kept(mount: GalleryMount) -> list[Path]:
    """Blobs without a name."""
    return sorted((mount.store / ".esrfs" / "blobs").iterdir())


def compact(mount: Mounted, name: str) -> dict[str, Any]:
    """Compact one file. The kernel tells the mount a little later that it was closed, so it is waited for."""
    wait_until(lambda: not mount.status()["open_handles"])
    return mount.compact(name)


def compactions(mount: GalleryMount) -> int:
    return int(mount.status()["engine_compactions"])


def come_home(mount: GalleryMount, name: str) -> bytes:
    """Compact the file as a program has just written it, and check that it came home: the blob's picture is taken over,
    and the view is for ever what the program wrote. Its bytes."""
    written = (mount.path / name).read_bytes()
    assert mount.explain(name)["state"] != "blob"
    asked = compactions(mount)
    result = compact(mount, name)
    assert result.get("compacted") == 1, (result, mount.log())
    assert compactions(mount) == asked, "without the engine"
    assert (mount.path / name).stat().st_size == len(written)
    known = mount.explain(name)
    assert known["state"] == "blob"
    assert known["sha256_view"] == known["sha256_original"] == hashlib.sha256(written).hexdigest()
    assert (mount.path / name).read_bytes() == written
    return written


EDITS: dict[str, tuple[str, ...]] = {
    "keywords": ("exiftool", "-overwrite_original", "-Keywords=alp", "-Subject=alp", "FILE"),
    "rating, in place": ("exiftool", "-overwrite_original_in_place", "-Rating=5", "FILE"),
    "GPS": ("exiftool", "-overwrite_original", "-GPSLatitude=47", "-GPSLongitude=8", "FILE"),
    "dates": ("exiftool", "-overwrite_original", "-AllDates+=1", "FILE"),
    "all metadata dropped": ("exiftool", "-overwrite_original", "-all=", "FILE"),
    "a backup is kept": ("exiftool", "-Artist=somebody", "FILE"),
    "exiv2: a tag": ("exiv2", "-M", "set Exif.Image.ImageDescription a lake", "FILE"),
    "exiv2: all dropped": ("exiv2", "delete", "FILE"),
    "jhead: comment": ("jhead", "-cl", "a lake", "FILE"),
    "jhead: dates": ("jhead", "-ta+1:00", "FILE"),
    "jhead: EXIF dropped": ("jhead", "-de", "FILE"),
    "jhead: all dropped": ("jhead", "-purejpg", "FILE"),
}


@pytest.mark.parametrize("kind", ["jpg", pytest.param("png", marks=pytest.mark.slow)])
def test_what_programs_write_around_the_pixels(mount: GalleryMount, gallery: Gallery, needs: Needs, kind: str) -> None:
    """Each program its own copy of the blob, so that none profits from what the one before left."""
    blob = gallery.pictures[f"photo.{kind}"]
    edits = {edit: command for edit, command in EDITS.items() if kind == "jpg" or command[0] != "jhead"}
    for program in {command[0] for command in edits.values()}:
        needs(program)
    picture = container.unpack(blob.blob).avif
    for number, (edit, command) in enumerate(edits.items()):
        (mount.store / f"photo.{kind}").unlink(missing_ok=True)
        for old in kept(mount):
            old.unlink()
        name = f"{number}.{kind}"
        (mount.store / name).write_bytes(blob.blob)
        assert compact(mount, name)["blob"] == 1
        run(*(mount.path / name if each == "FILE" else each for each in command))
        said = exiftool(mount.path / name)
        written = come_home(mount, name)
        assert written != blob.view, edit
        assert same_pixels(written, blob.view), edit
        assert avif(mount, name) == picture, f"{edit}: bit for bit"
        assert exiftool(mount.path / name) == said, edit
        for path in mount.store.glob(f"{number}.*"):
            path.unlink()


@pytest.mark.slow
def test_ten_generations_of_edits(mount: GalleryMount, needs: Needs) -> None:
    path = mount.path / "photo.jpg"
    before, picture = path.read_bytes(), avif(mount, "photo.jpg")
    edits = [EDITS[name] for name in ("keywords", "rating, in place", "GPS", "dates", "exiv2: a tag")]
    for number in range(10):
        program, *arguments = edits[number % len(edits)]
        arguments = [each.replace("a lake", f"lake {number}").replace("alp", f"alp {number}") for each in arguments]
        run(needs(program), *(path if each == "FILE" else each for each in arguments))
        come_home(mount, "photo.jpg")
    assert avif(mount, "photo.jpg") == picture
    assert mount.stop() == 0
    mount.start()
    assert same_pixels(path.read_bytes(), before)
    run(sys.executable, "-m", "esrfs.cli.main", "check", "--deep", mount.store)


def test_a_copy_of_a_view_is_known(mount: GalleryMount) -> None:
    shutil.copy(mount.path / "photo.jpg", mount.path / "copy.jpg")
    come_home(mount, "copy.jpg")
    assert avif(mount, "copy.jpg") == avif(mount, "photo.jpg")
    (mount.path / "copy.jpg").rename(mount.path / "renamed.jpg")
    (mount.store / "photo.jpg").unlink()  # behind the mount: nothing is kept
    shutil.copy(mount.path / "renamed.jpg", mount.path / "copy.jpg")
    come_home(mount, "copy.jpg")
    assert not kept(mount)


def test_a_blob_is_kept_when_its_last_name_goes(mount: GalleryMount, tmp_path: Path) -> None:
    """Deleted; replaced by a rename; overwritten; deleted while it is open. Then the picture comes back from elsewhere,
    after a restart."""
    away = tmp_path / "away.jpg"
    shutil.copy(mount.path / "photo.jpg", away)
    picture = avif(mount, "photo.jpg")
    other = tmp_path / "other"
    other.write_bytes(b"something else")

    def unlink(path: Path) -> None:
        path.unlink()

    def replace(path: Path) -> None:
        shutil.copy(other, path.with_name("new"))
        path.with_name("new").rename(path)

    def overwrite(path: Path) -> None:
        shutil.copyfile(other, path)

    def unlink_open(path: Path) -> None:
        with path.open("rb") as file:
            path.unlink()
            assert file.read() == away.read_bytes()

    for number, lose in enumerate((unlink, replace, overwrite, unlink_open)):
        name = f"{number}.jpg" if number else "photo.jpg"
        path = mount.path / name
        assert mount.explain(name)["state"] == "blob"
        lose(path)
        if path.exists():
            path.unlink()
        (one,) = kept(mount)
        assert container.unpack(one.read_bytes()).avif == picture
        assert one.stat().st_nlink == 1
        if number == 1:
            assert mount.stop() == 0
            mount.start()
        name = f"{number + 1}.jpg"
        shutil.copy(away, mount.path / name)
        come_home(mount, name)
        one.unlink()


def test_edited_pixels_are_a_new_original(mount: GalleryMount, gallery: Gallery, needs: Needs, tmp_path: Path) -> None:
    """The loss is measured against what the program wrote, and no earlier picture."""
    view = (mount.path / "photo.jpg").read_bytes()
    brighter = pixels(view).point(lambda value: min(255, value * 5 // 4))
    brighter.save(mount.path / "brighter.jpg", quality=96)
    run(needs("jpegtran"), "-copy", "all", "-rotate", "90", "-outfile", tmp_path / "r.jpg", mount.path / "photo.jpg")
    shutil.copy(tmp_path / "r.jpg", mount.path / "rotated.jpg")
    asked = compactions(mount)
    for name in ("brighter.jpg", "rotated.jpg"):
        written = (mount.path / name).read_bytes()
        assert compact(mount, name).get("compacted") == 1, mount.log()
        known = mount.explain(name)
        assert known["sha256_original"] == hashlib.sha256(written).hexdigest() != known["sha256_view"]
        now = (mount.path / name).read_bytes()
        assert len(now) == len(written)
        assert avif(mount, name) != avif(mount, "photo.jpg")
        scores = fidelity(pixels(written), pixels(now))
        assert abs(scores - known["quality"]["ssimulacra2"]) < 0.01
        recipe = container.unpack((mount.store / name).read_bytes()).recipe
        assert recipe.reference != gallery.pictures["photo.jpg"].recipe.reference
    assert compactions(mount) == asked + 2
    run("jpegtran", "-copy", "all", "-rotate", "270", "-outfile", tmp_path / "back.jpg", tmp_path / "r.jpg")
    shutil.copy(tmp_path / "back.jpg", mount.path / "back.jpg")
    assert compact(mount, "back.jpg").get("compacted") == 1  # jpegtran writes Huffman tables of its own


def fidelity(before: Image.Image, after: Image.Image) -> float:
    import numpy as np  # noqa: PLC0415

    from esrfs.compaction import gate  # noqa: PLC0415

    one, other = (np.asarray(image.convert("RGB")) for image in (before, after))
    return gate.measure(gate.Reference(one), one, other).ssimulacra2


def test_crafted_files_gain_nothing(mount: GalleryMount, gallery: Gallery) -> None:
    """The right reference around other pixels; right pixels with other tables; another store's view."""
    recipe = gallery.pictures["photo.jpg"].recipe
    view = gallery.pictures["photo.jpg"].view
    assert recipe.reference in view
    start = recipe_format.length(recipe.prefix)
    other_scan = bytearray(view)
    other_scan[start + 2000] ^= 0x10
    other_table = bytearray(view)
    table = view.index(b"\xff\xdb") + 20
    other_table[table] = 99
    for name, data in {"scan.jpg": other_scan, "table.jpg": other_table}.items():
        asked = compactions(mount)
        (mount.path / name).write_bytes(data)
        compact(mount, name)
        assert compactions(mount) == asked + 1, "a file like any other"
        known = mount.explain(name)
        if known["state"] == "blob":
            assert known["sha256_original"] == hashlib.sha256(data).hexdigest()
            assert avif(mount, name) != avif(mount, "photo.jpg")
        else:
            assert (mount.path / name).read_bytes() == data


def test_a_crash_between_link_and_rename_leaves_one_name(tmp_path: Path, gallery: Gallery, can_mount: None) -> None:
    mount = GalleryMount(tmp_path, gallery)
    (mount.store / "photo.jpg").write_bytes(gallery.pictures["photo.jpg"].blob)
    try:
        mount.start(faults="nameless.linked=kill")
        (mount.path / "new").write_bytes(b"new")
        with pytest.raises(OSError, match=r"not connected|abort"):
            (mount.path / "new").rename(mount.path / "photo.jpg")
        mount.wait_for_death()
        assert (mount.store / "photo.jpg").stat().st_nlink == 2
        mount.expected.append("a dead mount of esrfs is there")
        mount.start()
        deadline = time.monotonic() + 30
        while kept(mount):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (mount.path / "photo.jpg").stat().st_nlink == 1
        assert (mount.path / "photo.jpg").read_bytes() == gallery.pictures["photo.jpg"].view
    finally:
        mount.clean_up()


@pytest.fixture
def two_stores(tmp_path: Path, can_mount: None) -> Iterator[tuple[Mounted, Mounted]]:
    """The first one's views carry their blobs."""
    stores = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        stores.append(Mounted(tmp_path / name))
    config = stores[0].store / ".esrfs" / "store.toml"
    config.write_text(config.read_text().replace('carry = "reference"', 'carry = "full"'))
    try:
        yield stores[0].start(), stores[1].start()
    finally:
        for each in stores:
            each.clean_up()


def test_a_view_carries_its_blob_to_another_store(two_stores: tuple[Mounted, Mounted], tmp_path: Path) -> None:
    one, other = two_stores
    photograph("coffee").save(tmp_path / "photo.jpg", quality=98, subsampling="4:4:4", exif=_exif())
    shutil.copy(tmp_path / "photo.jpg", one.path)
    assert compact(one, "photo.jpg").get("compacted") == 1
    view = (one.path / "photo.jpg").read_bytes()
    picture = avif(one, "photo.jpg")
    assert (one.store / "photo.jpg").stat().st_size < 1.2 * len(picture) + 4096, "its recipe does not hold it again"
    found = scan.find(view)
    assert found is not None
    carries = carried.find(found.said)
    assert carries is not None
    assert carries.avif == picture
    note = msgspec.msgpack.encode(carries)
    for private in (b"Test Camera", one.config.id_bytes, one.config.key_bytes, hashlib.sha256(view).digest()):
        assert private not in note
    assert hashlib.sha256((tmp_path / "photo.jpg").read_bytes()).digest() not in view

    (other.path / "photo.jpg").write_bytes(view)
    assert compact(other, "photo.jpg").get("compacted") == 1
    status = other.status()
    assert (status["engine_compactions"], status["engine_calls"]) == (0, 1), "rebuilt once, and compared"
    assert avif(other, "photo.jpg") == picture
    assert (other.path / "photo.jpg").read_bytes() == view
    assert (other.store / "photo.jpg").stat().st_size < 1.2 * len(picture) + 4096

    changed = bytearray(view)
    changed[view.index(picture[1000:1064]) + 10] ^= 1
    turned = bytearray(view)
    turned[found.start + 5000] ^= 0x10
    for number, crafted in enumerate((changed, turned), 1):
        name = f"{number}.jpg"
        (other.store / "photo.jpg").unlink(missing_ok=True)  # behind the mount: its pixels are new again
        (other.path / name).write_bytes(crafted)
        compact(other, name)
        assert other.status()["engine_compactions"] == number, "nobody believes it"
        if other.explain(name)["state"] == "blob":
            assert avif(other, name) != picture
        else:
            assert (other.path / name).read_bytes() == crafted
