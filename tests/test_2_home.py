"""Views that come home, without an engine: for any envelope around the same scan the new recipe gives the file back to
the last byte; for any other scan or table there is none; and no bytes make the parser fail or take long."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import tempfile
import time
import zlib
from types import SimpleNamespace
from typing import cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from esrfs import formats
from esrfs.blob import carried, container
from esrfs.blob import recipe as recipe_format
from esrfs.blob.carried import Carried
from esrfs.blob.container import Blob
from esrfs.blob.recipe import Recipe, Run, Scores
from esrfs.blob.reference import key_of, reference
from esrfs.compaction import homecoming
from esrfs.compaction.outcome import Outcome, Policy, Verdict
from esrfs.engine.client import Rebuilt
from esrfs.engine.filevalue import of_bytes
from esrfs.engine.protocol import Lane
from esrfs.formats import jpeg_parse, scan
from esrfs.upkeep.claims import Claim
from esrfs.upkeep.compact import Workshop, _rebuilds

KEY = key_of(b"k" * 32)


def picture(seed: int = 1) -> Image.Image:
    y, x = np.mgrid[0:96, 0:128]
    pixels = np.stack([x * 2, y * 2, (x + y) % 256], axis=2) + np.random.default_rng(seed).normal(0, 20, (96, 128, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.cache
def stored(kind: str) -> tuple[bytes, Blob]:
    """A view and the blob that it is the view of."""
    out = io.BytesIO()
    camera = {"quality": 97, "exif": b"Exif\0\0" + bytes(40_000)}
    options = {"JPEG": camera, "progressive": {**camera, "progressive": True}, "WEBP": camera}
    picture().save(out, "JPEG" if kind == "progressive" else kind, **options.get(kind, {}))
    original = out.getvalue()
    split = formats.split(original, 10)
    soft = np.asarray(picture().filter(ImageFilter.GaussianBlur(1.2)))
    fitted = formats.fit_view(split, soft, lambda coding, data: reference(KEY, data))
    view = fitted.expand()
    recipe = Recipe(
        width=split.width,
        height=split.height,
        original_size=len(original),
        sha256_original=hashlib.sha256(original).digest(),
        sha256_view=hashlib.sha256(view).digest(),
        preset="high",
        scale=1,
        network="",
        network_sha256=b"",
        quality=50,
        coding=fitted.coding,
        prefix=fitted.prefix,
        scan_length=len(fitted.scan),
        suffix=fitted.suffix,
        encoder=fitted.encoder,
        scores=Scores(80.0, 70.0, 40.0),
        created_by="esrfs",
        reference=reference(KEY, fitted.scan),
    )
    encoded = recipe_format.encode(recipe)
    return view, Blob(b"the AVIF", recipe, encoded, bytes(16))


def took_over(data: bytes, blob: Blob) -> Recipe | None:
    found = scan.find(data)
    outcome = None if found is None else homecoming.take_over(data, found, blob)
    if outcome is None:
        return None
    assert outcome.avif == blob.avif
    recipe = recipe_format.decode(outcome.recipe)
    assert recipe.reference == blob.recipe.reference == reference(KEY, data[found.start : found.end])
    pinned = data[recipe_format.length(recipe.prefix) :][: recipe.scan_length]
    assert recipe_format.expand(recipe.prefix) + pinned + recipe_format.expand(recipe.suffix) == data
    assert recipe.sha256_view == recipe.sha256_original == hashlib.sha256(data).digest()
    assert recipe.original_size == len(data)
    kept = ("coding", "scale", "network_sha256", "quality", "width", "height", "preset", "scores")
    assert all(getattr(recipe, name) == getattr(blob.recipe, name) for name in kept)
    return recipe


HEADS = [
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBP", b"BM0000" + bytes(4)),
    *(b"II*\0\x08\0\0\0", b""),
]
KINDS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "progressive"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_refers_to_its_scan(kind: str) -> None:
    view, blob = stored(kind)
    found = scan.find(view)
    assert found is not None
    assert any(said.startswith(blob.recipe.reference) for said in found.said) == (kind not in ("BMP", "TIFF"))
    assert found.start == recipe_format.length(blob.recipe.prefix)
    assert found.end <= found.start + blob.recipe.scan_length <= found.fill_end
    assert len(found.tables) >= {"JPEG": 5, "progressive": 5, "WEBP": 0}.get(kind, 1)
    if kind == "JPEG":
        structure = jpeg_parse.parse(view)
        assert (found.start, found.end) == (structure.scan_start, structure.scan_end)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


bodies = st.one_of(st.binary(max_size=300), st.builds(bytes, st.integers(0, 3000)))


@settings(deadline=None, max_examples=150)
@given(
    before=st.lists(st.tuples(st.sampled_from([0xE1, 0xE2, 0xED, 0xFE]), bodies), max_size=4),
    drop=st.sets(st.sampled_from([0xE0, 0xE1, 0xED])),
    fill=st.integers(0, 10_000),
    after=st.binary(max_size=3000),
)
def test_any_envelope_of_a_jpeg(before: list[tuple[int, bytes]], drop: set[int], fill: int, after: bytes) -> None:
    view, blob = stored("JPEG")
    structure = jpeg_parse.parse(view)
    parts = [b"\xff\xd8", *(segment(marker, body) for marker, body in before)]
    parts += [each.raw for each in structure.segments if each.marker not in drop]
    parts += [structure.sos, view[structure.scan_start : structure.scan_end], b"\xff" * fill, b"\xff\xd9", after]
    data = b"".join(parts)
    recipe = took_over(data, blob)
    assert recipe is not None
    assert recipe.scan_length <= blob.recipe.scan_length
    again = took_over(
        data.replace(b"\xff\xd8", b"\xff\xd8" + segment(0xFE, b"once more"), 1), Blob(b"x", recipe, b"", b"")
    )
    assert again is not None


@settings(deadline=None, max_examples=100)
@given(
    before=st.lists(st.tuples(st.sampled_from([b"tEXt", b"eXIf", b"esRF"]), bodies), max_size=3),
    keeps_fill=st.booleans(),
    after=st.binary(max_size=100),
)
def test_any_envelope_of_a_png(before: list[tuple[bytes, bytes]], keeps_fill: bool, after: bytes) -> None:
    view, blob = stored("PNG")
    found = scan.find(view)
    assert found is not None
    parts = [view[:33], *(chunk(kind, body) for kind, body in before)]
    parts += [view[found.start - 8 : found.end]]
    parts += [view[found.end :] if keeps_fill else chunk(b"IEND", b""), after]
    assert took_over(b"".join(parts), blob) is not None


@settings(deadline=None, max_examples=100)
@given(
    before=st.lists(st.tuples(st.sampled_from([b"ICCP", b"esRF"]), bodies), max_size=3),
    after=st.lists(st.tuples(st.sampled_from([b"EXIF", b"XMP ", b"esRF"]), bodies), max_size=3),
    trailing=st.binary(max_size=100),
)
def test_any_envelope_of_a_webp(
    before: list[tuple[bytes, bytes]], after: list[tuple[bytes, bytes]], trailing: bytes
) -> None:
    view, blob = stored("WEBP")
    found = scan.find(view)
    assert found is not None
    parts = [b"VP8X" + struct.pack("<I", 10) + bytes(10), *(riff_chunk(kind, body) for kind, body in before)]
    parts += [view[found.start - 8 : found.end], *(riff_chunk(kind, body) for kind, body in after)]
    body = b"WEBP" + b"".join(parts)
    assert took_over(b"RIFF" + struct.pack("<I", len(body)) + body + trailing, blob) is not None


@settings(deadline=None, max_examples=200)
@given(kind=st.sampled_from(KINDS), place=st.floats(0, 1), change=st.integers(1, 255))
def test_any_other_scan_or_table_is_not_taken_for_it(kind: str, place: float, change: int) -> None:
    view, blob = stored(kind)
    found = scan.find(view)
    assert found is not None
    offset = int(place * (found.fill_end - 1))
    data = bytearray(view)
    data[offset] ^= change
    recipe = took_over(bytes(data), blob)
    if recipe is not None:  # what was changed is neither
        where = scan.find(bytes(data))
        assert where is not None
        assert data[where.start : where.end] == view[found.start : found.end]
        assert where.tables == found.tables


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=3000))
def test_spans_are_exact(data: bytes) -> None:
    data += bytes(len(data)) + b"\xff" * (len(data) // 2)
    assert recipe_format.expand(homecoming.spans(data)) == data


def test_fill_takes_no_room_in_a_recipe() -> None:
    data = b"ab" + bytes(100_000) + b"\xff" * 5000 + b"c"
    assert [type(span) for span in homecoming.spans(data)].count(Run) == 2
    assert len(recipe_format.encode(stored("PNG")[1].recipe)) < len(stored("PNG")[0])


@settings(deadline=None, max_examples=300)
@given(head=st.sampled_from(HEADS), rest=st.binary(max_size=400))
def test_no_bytes_make_it_fail(head: bytes, rest: bytes) -> None:
    found = scan.find(head + rest)
    assert found is None or found.start <= found.end <= found.fill_end <= len(head + rest)


@settings(deadline=None, max_examples=100)
@given(kind=st.sampled_from(KINDS), length=st.floats(0, 1))
def test_cut_files(kind: str, length: float) -> None:
    view, blob = stored(kind)
    found = scan.find(view)
    assert found is not None
    cut = int(length * len(view))
    whole = len(view) if kind == "TIFF" else found.fill_end + (2 if found.kind == "jpeg" else 0)
    assert (took_over(view[:cut], blob) is not None) == (cut >= whole)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + segment(0xDA, b"") + b"\xff" * 3_000_000 + b"\x00",
        b"\xff\xd8" + segment(0xDA, b"") + b"\xff\xda" * 1_000_000,
        b"\xff\xd8" + segment(0xFE, b"") * 1_000_000,
        b"\x89PNG\r\n\x1a\n" + chunk(b"esRF", b"") * 300_000,
        b"RIFFabcdWEBP" + riff_chunk(b"esRF", b"") * 300_000,
        b"RIFF0000WEBP" + b"esRF" * 1_000_000,
        b"RIFF0000WEBP" + bytes(3_000_000),
    ],
)
def test_crafted_files_take_no_long_time(data: bytes) -> None:
    begin = time.process_time()
    assert scan.find(data) is None
    assert time.process_time() - begin < 1.0


# The whole blob in the fill.


@functools.cache
def carrying(avif: bytes) -> tuple[bytes, Carried]:
    """A JPEG view with much room, that carries its blob."""
    out = io.BytesIO()
    noisy = np.random.default_rng(5).normal(128, 25, (600, 800, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(out, "JPEG", quality=95, subsampling="4:4:4")
    split = formats.split(out.getvalue(), 10)
    made = []

    def note(coding: recipe_format.Coding, data: bytes) -> bytes:
        assert isinstance(coding, recipe_format.JpegCoding)
        made[:] = [
            Carried(
                width=800,
                height=600,
                preset="high",
                scale=2,
                network="n",
                network_sha256=b"n" * 32,
                quality=50,
                subsampling="4:4:4",
                coding=coding,
                avif=avif,
            )
        ]
        return reference(KEY, data) + carried.encode(made[0])

    soft = np.asarray(picture().resize((800, 600)).filter(ImageFilter.GaussianBlur(4)))
    return formats.fit_view(split, soft, note).expand(), made[0]


@pytest.mark.parametrize("length", [100, 5000, 65_000, 66_000, 90_000])
def test_a_view_carries_its_blob_and_its_recipe_does_not(length: int) -> None:
    avif = np.random.default_rng(length).bytes(length)
    view, was = carrying(avif)
    found = scan.find(view)
    assert found is not None
    assert carried.find(found.said) == was
    outcome = homecoming.carried_by(view, found, b"r" * 32)
    assert outcome is not None
    assert outcome.avif == avif
    assert len(outcome.recipe) < len(view) - (found.end - found.start) - len(avif) * 0.9, "folded"
    recipe = recipe_format.decode(outcome.recipe)
    whole = recipe_format.unfolded(recipe, avif)
    scan_bytes = view[found.start :][: recipe.scan_length]
    assert recipe_format.expand(whole.prefix) + scan_bytes + recipe_format.expand(whole.suffix) == view
    packed = container.pack(avif, outcome.recipe, bytes(16), bytes(32))
    assert container.unpack(packed).recipe == whole
    with tempfile.TemporaryFile() as file:
        file.write(packed)
        file.flush()
        assert container.read_recipe(file.fileno(), len(packed)) == whole


def test_what_is_carried_names_no_file() -> None:
    """Nothing of the envelope, of the store, of a person."""
    assert set(Carried.__struct_fields__) == {
        *("version", "width", "height", "preset", "scale", "network", "network_sha256", "quality", "subsampling"),
        *("coding", "avif"),
    }


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_folding_is_undone(data: st.DataObject) -> None:
    avif = data.draw(st.binary(max_size=400))
    parts = data.draw(st.lists(st.one_of(st.binary(max_size=100), st.tuples(st.integers(0, 400), st.integers(0, 400)))))
    spans: list[recipe_format.Span] = []
    for part in parts:
        spans.append(
            Run(0, len(part)) if isinstance(part, bytes) and len(part) % 3 == 0 else recipe_format.Literal(b"x")
        )
        spans.append(recipe_format.Literal(avif[part[0] : part[0] + part[1]] if isinstance(part, tuple) else part))
    recipe = msgspec.structs.replace(stored("JPEG")[1].recipe, prefix=spans)
    folded = recipe_format.folded(recipe, avif)
    assert recipe_format.length(folded.prefix) == recipe_format.length(spans)
    whole = recipe_format.unfolded(folded, avif)
    assert recipe_format.expand(whole.prefix) == recipe_format.expand(spans)
    if folded.own:
        with pytest.raises(ValueError, match="fit together"):
            recipe_format.unfolded(folded, b"")


@settings(deadline=None, max_examples=100)
@given(body=st.binary(max_size=200), cut=st.integers(0, 60))
def test_crafted_notes_carry_nothing(body: bytes, cut: int) -> None:
    assert carried.find([bytes(32) + b"esrfblob" + len(body).to_bytes(4, "big") + body]) is None
    view, _ = carrying(b"x" * 300)
    found = scan.find(view)
    assert found is not None
    assert carried.find([found.said[0][: cut * 10]]) is None


def test_the_last_note_counts() -> None:
    """A file made of an edited view may hold the fill of that one, too."""
    views = [carrying(name * 300)[0] for name in (b"1", b"2")]
    said = [part for view in views if (found := scan.find(view)) is not None for part in found.said]
    last = carried.find(said)
    assert last is not None
    assert last.avif == b"2" * 300


def test_a_carried_blob_is_rebuilt_with_the_time_that_its_size_takes() -> None:
    """The client takes a worker for hung by that. Here its view is another file than the one that came."""
    recipe = msgspec.structs.replace(stored("JPEG")[1].recipe, width=16000, height=12000)
    asked: list[object] = []

    class Asked:
        done = True

        def rebuild(self, key: bytes, load: object, lane: Lane, *, megapixels: float) -> Asked:
            asked.extend((lane, megapixels))
            return self

        def wait(self, seconds: float) -> Rebuilt:
            return Rebuilt(of_bytes(b"view"), b"w" * 32, True)

        def release(self) -> None:
            asked.append("released")

    workshop = cast(Workshop, SimpleNamespace(engine=Asked(), store=None))
    outcome = Outcome(verdict=Verdict.COMPACTED, recipe=recipe_format.encode(recipe), avif=b"avif")
    assert not _rebuilds(workshop, outcome, cast(Claim, SimpleNamespace(interrupted=False)), Policy())
    assert asked == [Lane.COMPACTION, 192.0, "released"]
