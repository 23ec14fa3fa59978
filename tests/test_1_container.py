"""The blob container: what ``pack`` writes is found again, and nothing else is taken for a blob."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from esrfs.blob import container, recipe
from esrfs.blob.recipe import JpegCoding, Literal, Recipe, Run, Scores

STORE_ID = bytes(range(16))
KEY = bytes(range(32))


def make_recipe(suffix: bytes = b"\xff\xd9", version: int = recipe.RECIPE_VERSION) -> Recipe:
    return Recipe(
        version=version,
        width=64,
        height=48,
        original_size=5000 + len(suffix),
        sha256_original=bytes(32),
        sha256_view=bytes(32),
        preset="high",
        scale=2,
        network="lite-x2",
        network_sha256=bytes(32),
        quality=50,
        coding=JpegCoding(mode="RGB", subsampling="4:2:0", quantisation=[[16] * 64] * 3),
        prefix=[Literal(b"\xff\xd8"), Run(0, 998)],
        scan_length=4000,
        suffix=[Literal(suffix)],
        encoder="pillow",
        scores=Scores(ssimulacra2=71.0, worst_tile=62.0, psnr=35.0),
        created_by="esrfs",
    )


def make_avif() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 100, 50)).save(out, "AVIF")
    return out.getvalue()


def packed(avif: bytes = b"picture", suffix: bytes = b"\xff\xd9") -> bytes:
    return container.pack(avif, recipe.encode(make_recipe(suffix)), STORE_ID, KEY)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[bytes], tuple[int, int]]]:
    def open_bytes(data: bytes) -> tuple[int, int]:
        path = tmp_path / "file"
        path.write_bytes(data)
        descriptor = os.open(path, os.O_RDONLY)
        descriptors.append(descriptor)
        return descriptor, len(data)

    descriptors: list[int] = []
    yield open_bytes
    for descriptor in descriptors:
        os.close(descriptor)


@given(avif=st.binary(max_size=300), suffix=st.binary(max_size=3000))
def test_round_trip(avif: bytes, suffix: bytes) -> None:
    data = packed(avif, suffix)
    assert container.may_be_blob(len(data))
    blob = container.unpack(data)
    assert (blob.avif, blob.recipe, blob.store_id) == (avif, make_recipe(suffix), STORE_ID)
    assert recipe.decode(blob.recipe_bytes) == blob.recipe


def test_recipe_that_does_not_compress_is_stored_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlib, "compress", lambda data, level: data + b"longer")
    data = packed()
    assert recipe.encode(make_recipe()) in data
    assert container.unpack(data).recipe == make_recipe()


def test_footer_and_recipe_by_descriptor(opened: Callable[[bytes], tuple[int, int]]) -> None:
    fd, size = opened(packed())
    footer = container.read_footer(fd, size, STORE_ID, KEY)
    assert footer is not None
    assert footer.view_size == 5002
    assert container.read_recipe(fd, size, footer) == make_recipe()
    assert container.read_footer(fd, size) == footer


def test_stat_reads_64_bytes_once(opened: Callable[[bytes], tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    fd, size = opened(packed())
    reads = []
    pread = os.pread

    def counting(descriptor: int, count: int, offset: int) -> bytes:
        reads.append((count, offset))
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counting)
    assert container.read_footer(fd, size, STORE_ID, KEY)
    assert reads == [(64, size - 64)]
    assert container.read_footer(fd, size + 1, STORE_ID, KEY) is None
    assert len(reads) == 1


def test_a_footer_with_a_byte_changed_is_told_from_other_files(opened: Callable[[bytes], tuple[int, int]]) -> None:
    data = packed()
    for position in range(64):
        changed = bytearray(data)
        changed[len(data) - 64 + position] ^= 0x10
        fd, size = opened(bytes(changed))
        assert container.read_footer(fd, size, STORE_ID, KEY) is None
        assert container.footer_is_damaged(fd, size, STORE_ID)
        assert not container.footer_is_damaged(fd, size, b"another store's.")
    for whole in (data, container.pack(b"mine", recipe.encode(make_recipe()), STORE_ID, b"k" * 32), bytes(len(data))):
        assert not container.footer_is_damaged(*opened(whole), STORE_ID)


@pytest.mark.parametrize(("store_id", "key"), [(bytes(16), KEY), (STORE_ID, bytes(32))])
def test_another_stores_blob_is_a_plain_file(
    opened: Callable[[bytes], tuple[int, int]], store_id: bytes, key: bytes
) -> None:
    fd, size = opened(packed())
    assert container.read_footer(fd, size, store_id, key) is None


@given(position=st.integers(0, 63), bit=st.integers(0, 7))
def test_a_footer_with_any_bit_changed_is_no_footer(position: int, bit: int) -> None:
    data = bytearray(packed())
    data[-64 + position] ^= 1 << bit
    with pytest.raises(ValueError, match="esrfs"):
        container.unpack(bytes(data))


def test_forged_footer_with_right_checksum_is_a_plain_file(opened: Callable[[bytes], tuple[int, int]]) -> None:
    """Somebody who knows the format but not the key writes a file that ends like a blob of this store."""
    fd, size = opened(container.pack(b"mine", recipe.encode(make_recipe()), STORE_ID, b"k" * 32))
    assert container.read_footer(fd, size) is not None
    assert container.read_footer(fd, size, STORE_ID, KEY) is None


@given(offset=st.integers(0, 10_000), value=st.integers(1, 255))
def test_damage_to_the_recipe_is_told(offset: int, value: int) -> None:
    data = bytearray(packed(b"picture"))
    box = len(b"picture")
    offset = box + offset % (len(data) - box - 64)
    data[offset] ^= value
    with contextlib.suppress(container.BlobDamaged):
        assert container.unpack(bytes(data)).recipe == make_recipe()  # only padding was hit


@given(offset=st.integers(0, 10_000), value=st.integers(1, 255))
def test_damage_to_the_picture_is_told(offset: int, value: int) -> None:
    picture = bytes(range(200))
    data = bytearray(packed(picture))
    data[offset % len(picture)] ^= value
    with pytest.raises(container.BlobDamaged, match="picture"):
        container.unpack(bytes(data))


def test_cut_blob_is_told(opened: Callable[[bytes], tuple[int, int]]) -> None:
    data = packed(b"x" * 1000)
    fd, size = opened(data[-(64 * 2 + 13) :])
    assert container.read_footer(fd, size) is None
    fd, size = opened(bytes(len(data) - 64) + data[-64:])
    with pytest.raises(container.BlobDamaged, match="footer"):
        container.read_recipe(fd, size)


def test_box_that_is_not_last_is_found_by_walking(opened: Callable[[bytes], tuple[int, int]]) -> None:
    avif = make_avif()
    blob = packed(avif)
    first_box = struct.unpack(">I", avif[:4])[0]
    moved = avif[:first_box] + blob[len(avif) :] + avif[first_box:] + struct.pack(">I4s", 11, b"free") + b"abc"
    assert container.unpack(moved).recipe == make_recipe()
    fd, size = opened(moved)
    assert container.read_footer(fd, size) is None
    footer = container.find_by_walk(fd, size)
    assert footer is not None
    assert footer.genuine(STORE_ID, KEY)


def test_a_blob_is_a_picture() -> None:
    with Image.open(io.BytesIO(packed(make_avif()))) as image:
        assert image.size == (32, 24)
        image.load()


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_blob_that_exiftool_rewrote_is_still_known(tmp_path: Path) -> None:
    path = tmp_path / "blob.avif"
    path.write_bytes(packed(make_avif()))
    subprocess.run(["exiftool", "-q", "-overwrite_original", "-XMP-dc:Title=a title", str(path)], check=True)
    data = path.read_bytes()
    assert data != packed(make_avif())
    assert container.unpack(data).recipe == make_recipe()


@given(data=st.binary(max_size=2000))
def test_garbage_is_no_blob(data: bytes) -> None:
    with pytest.raises(container.NotABlob):
        container.unpack(data)


@given(tail=st.binary(max_size=64), cut=st.integers(1, 500))
def test_cut_or_extended_blobs_never_crash(tail: bytes, cut: int) -> None:
    for data in (packed()[:-cut] + tail, packed()[cut:], tail + packed()):
        with contextlib.suppress(container.NotABlob, container.BlobDamaged):
            container.unpack(data)


def test_footer_of_a_newer_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(recipe, "RECIPE_VERSION", recipe.RECIPE_VERSION + 1)
        data = container.pack(b"", recipe.encode(make_recipe(version=recipe.RECIPE_VERSION)), STORE_ID, KEY)
    with pytest.raises(container.NotABlob):
        container.unpack(data)


def test_pack_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="not a recipe"):
        container.pack(b"", b"nonsense", STORE_ID, KEY)
    with pytest.raises(ValueError, match="16 bytes"):
        container.pack(b"", recipe.encode(make_recipe()), b"", KEY)
