"""The blob container: what ``pack`` writes is found again, and nothing else is taken for a blob."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from esrfs.blob import container, dictionary, recipe
from esrfs.blob.recipe import (
    BmpCoding,
    JpegCoding,
    JpegXlCoding,
    Literal,
    PngCoding,
    Recipe,
    Run,
    Scores,
    Verbatim,
    WebpCoding,
)

STORE_ID = bytes(range(16))
KEY = bytes(range(32))

FIRST_BLOB = base64.b64decode(
    "cGljdHVyZQAAAgZ1dWlkbA07Dl8uTR+aV+XysQteURbbT4l42s2SO07DQBCGTSgoQUKizgWQkAUUVIaGEsEFrI09sRc2u2ZnHCdUCAQtrwtEih8i"
    "5nEFhNJF6SkQJdeAVRKaUKSgYbaaXzP/zs63H9ZK0QSNXMm5LOE+hU4eAg9CWntUmgdcMuEiP4Hh8tUzhsze2HR/9H7VmhHlpKPJIZldnUcaECgN"
    "zfUZekxApZBAidJHheAEqy37aZK7Y+PZnsVxzExv2y4xriFrRILLIFvfMif3lG+Sy5TaEaSHEQRpQ/nQPdjdmSq2t9YejI8kjozMpu7eLWfpj/E/"
    "LMpIq8BsHXkTXnueakRKgiTsj2DUeev2bLSerNYmwNRnxPqVr7fzkdjVscyaTMRgZZ6KJQ3nP0vDTboCZEDhcLGTY1w3Lje/XRYohCpIvwBpOIDO"
    "Iy6ESnL0lJnnojQjNWLBPM3sgbP/MoLZM+iRXOICBs7eGHAaodQDZ/t0/IU8JVSsBz/4H8YdU2rP08AIfLfWzgB1He/NW0GbSaBvpVIRdLoqkdff"
    "nAvd0gAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABlc3JmcwEBAQABAgMEBQYHCAkKCwwNDg8AAAAAAAATjwAAAgYAAAGF7PfD"
    "yePOBd32zNAQGmw349VNnRrKaX1a"
)
"""As the first esrfs of format 1 wrote it: the recipe is zlib-compressed. Never made anew."""


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
    monkeypatch.setattr(dictionary, "compressed", lambda data: data + b"longer")
    data = packed()
    assert recipe.encode(make_recipe()) in data
    assert container.unpack(data).recipe == make_recipe()


NUMBERS = st.integers(0, 1 << 32)
TABLES = st.lists(st.binary(min_size=64, max_size=64).map(list), max_size=3)
SPANS = st.lists(
    st.builds(Literal, st.binary(max_size=200)) | st.builds(Run, st.integers(0, 255), st.integers(0, 1 << 30)),
    max_size=5,
)
CODINGS = (
    st.builds(
        JpegCoding,
        mode=st.sampled_from(["L", "RGB"]),
        subsampling=st.sampled_from(["4:4:4", "4:2:0"]),
        quantisation=TABLES,
    )
    | st.builds(
        PngCoding, mode=st.sampled_from(["L", "RGBA"]), compress_level=st.integers(1, 9), alpha=st.binary(max_size=500)
    )
    | st.builds(WebpCoding, mode=st.just("RGB"), lossless=st.booleans(), quality=st.integers(0, 100))
    | st.builds(BmpCoding, mode=st.just("RGB"), bits=st.sampled_from([8, 24, 32]), top_down=st.booleans())
    | st.builds(JpegXlCoding, behind=NUMBERS)
    | st.just(Verbatim())
)
SCORES = st.lists(st.integers(0, 10_000), min_size=5, max_size=5).map(
    lambda hundredths: Scores(*(n / 100 for n in hundredths))
)


@settings(max_examples=50)
@given(
    coding=CODINGS,
    prefix=SPANS,
    suffix=SPANS,
    scan_length=NUMBERS,
    names=st.lists(st.text(max_size=30), min_size=5, max_size=5),
    digests=st.lists(st.binary(max_size=32), min_size=4, max_size=4),
    scores=SCORES,
)
def test_round_trip_of_any_recipe(
    *,
    coding: recipe.Coding,
    prefix: list[recipe.Span],
    suffix: list[recipe.Span],
    scan_length: int,
    names: list[str],
    digests: list[bytes],
    scores: Scores,
) -> None:
    written = msgspec.structs.replace(
        make_recipe(),
        original_size=recipe.length(prefix) + scan_length + recipe.length(suffix),
        coding=coding,
        prefix=prefix,
        suffix=suffix,
        scan_length=scan_length,
        scores=scores,
        **dict(zip(("preset", "network", "encoder", "created_by", "note"), names, strict=True)),
        **dict(zip(("sha256_original", "sha256_view", "network_sha256", "reference"), digests, strict=True)),
    )
    data = container.pack(b"picture", recipe.encode(written), STORE_ID, KEY)
    assert container.may_be_blob(len(data))
    assert container.unpack(data).recipe == written


def test_the_dictionary_never_changes() -> None:
    """No byte: blobs that were written with it can't be read with another."""
    found = hashlib.sha256(dictionary.DICTIONARY_1).hexdigest()
    assert found == "b93b4766e7f8e589f90e279bd62df47e84477e4a32ae9f451d448c0e6d6ab626"


def test_a_blob_without_dictionary_is_read(opened: Callable[[bytes], tuple[int, int]]) -> None:
    blob = container.unpack(FIRST_BLOB)
    assert (blob.avif, blob.recipe) == (b"picture", make_recipe(b"the end"))
    fd, size = opened(FIRST_BLOB)
    footer = container.read_footer(fd, size, STORE_ID, KEY)
    assert footer is not None
    assert container.read_recipe(fd, size, footer) == make_recipe(b"the end")


@pytest.mark.parametrize("name", ["astronaut.jpg", "astronaut.png"])
def test_little_is_stored_beside_the_picture(name: str) -> None:
    """The example's recipe, without the profile that is in the PNG, which no dictionary knows."""
    first = container.unpack((Path(__file__).parent / "examples/store-1" / name).read_bytes())
    written = first.recipe
    if name.endswith(".png"):
        prefix = [Literal(span.data[:33]) for span in written.prefix[:1] if isinstance(span, Literal)]
        size = recipe.length(prefix) + written.scan_length + recipe.length(written.suffix)
        written = msgspec.structs.replace(written, prefix=prefix, original_size=size)
    data = container.pack(first.avif, recipe.encode(written), STORE_ID, KEY)
    assert len(data) - len(first.avif) <= 400
    assert container.unpack(data).recipe == written


def test_a_recipe_that_would_inflate_without_end_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=dictionary.DICTIONARY_1)
    bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(64)) + deflater.flush()
    limit = 1 << 20
    assert len(bomb) < limit
    with monkeypatch.context() as writing:
        writing.setattr(dictionary, "compressed", lambda recipe: bomb)
        data = container.pack(b"picture", recipe.encode(make_recipe(bytes(len(bomb)))), STORE_ID, KEY)
    monkeypatch.setattr(container, "_RECIPE_LIMIT", limit)
    tracemalloc.start()
    try:
        with pytest.raises(container.BlobDamaged, match="decompressed"):
            container.unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * limit
    finally:
        tracemalloc.stop()


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


@pytest.mark.parametrize("flags", [3, 4, 5, 6, 8, 128, 255])
def test_footer_with_unknown_flags_is_left_alone(opened: Callable[[bytes], tuple[int, int]], flags: int) -> None:
    """Even if the store itself wrote it: then it was a newer esrfs."""
    data = packed()
    signed = data[-64:-57] + bytes([flags]) + data[-56:-20]
    footer = signed + hashlib.blake2s(signed, key=KEY, digest_size=16, person=b"esrfblob").digest()
    data = data[:-64] + footer + struct.pack(">I", zlib.crc32(footer))
    with pytest.raises(container.NotABlob):
        container.unpack(data)
    fd, size = opened(data)
    assert container.read_footer(fd, size, STORE_ID, KEY) is None
    assert not container.footer_is_damaged(fd, size, STORE_ID)


def test_pack_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="not a recipe"):
        container.pack(b"", b"nonsense", STORE_ID, KEY)
    with pytest.raises(ValueError, match="16 bytes"):
        container.pack(b"", recipe.encode(make_recipe()), b"", KEY)
