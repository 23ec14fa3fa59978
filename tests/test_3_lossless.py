"""JPEG files that shrink without loss: the view is the original, bit for bit, or there is no blob."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esrfs import reconstruction
from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import JpegXlCoding
from esrfs.compaction import compactor
from esrfs.compaction.outcome import LOSSLESS, Outcome, Policy, Reason, Verdict
from esrfs.engine.client import Engine, EngineError, EngineSettings
from esrfs.formats import jpegxl
from esrfs.formats.view import Unsupported
from esrfs.reconstruction import Pixels, ReconstructionError
from tests.conftest import photograph

ID, KEY = bytes(16), bytes(32)


def no_network(sha256: bytes, pixels: Pixels) -> Pixels:
    raise AssertionError("no network is needed")


def jpeg(**options: object) -> bytes:
    out = io.BytesIO()
    photograph("astronaut").crop((0, 0, 250, 190)).save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


def exif() -> bytes:
    made = Image.Exif()
    made[0x010F], made[0x0112] = "esrfs", 6
    return made.tobytes()


def with_restarts() -> bytes:
    return jpeg(restart_marker_rows=1)


def with_segments_everywhere() -> bytes:
    """Comments and unknown segments between tables, a thumbnail that is a JPEG, another picture after the end."""
    plain = jpeg(comment=b"with a comment", exif=exif())
    strange = b"\xff\xe7\x00\x10" + b"private bytes!" + b"\xff\xee\x00\x06abcd" + b"\xff\xe2\x02\x02" + bytes(512)
    return plain[:2] + strange + plain[2:] + b"trailing" + jpeg(quality=30)


JPEGS: dict[str, Callable[[], bytes]] = {
    "4:2:0": jpeg,
    "4:4:4 with EXIF": lambda: jpeg(subsampling=0, exif=exif()),
    "progressive": lambda: jpeg(progressive=True),
    "optimised": lambda: jpeg(optimize=True, quality=97),
    "restarts": with_restarts,
    "segments everywhere": with_segments_everywhere,
    "RGB": lambda: jpeg(keep_rgb=True),
}


def compact(original: bytes, preset: str = LOSSLESS, **policy: float) -> Outcome:
    """Small pictures: boxes and padding weigh more than they would on a camera's."""
    policy = {"min_saving_lossless": 0.0, **policy}
    return compactor.compact(original, Policy(preset=preset, **policy), [], no_network)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", JPEGS)
def test_comes_back_bit_for_bit(name: str) -> None:
    original = JPEGS[name]()
    outcome = compact(original)
    assert outcome.verdict is Verdict.COMPACTED, outcome.message
    recipe = recipe_format.decode(outcome.recipe)
    assert isinstance(recipe.coding, JpegXlCoding)
    assert recipe.sha256_view == recipe.sha256_original == hashlib.sha256(original).digest()
    blob = container.pack(outcome.avif, outcome.recipe, ID, KEY)
    assert len(blob) < len(original)
    unpacked = container.unpack(blob)
    assert reconstruction.rebuild(unpacked.recipe, unpacked.avif, no_network) == original
    # All that lies around the scan costs no engine call.
    head, tail = recipe_format.expand(recipe.prefix), recipe_format.expand(recipe.suffix)
    assert original.startswith(head)
    assert original.endswith(tail)
    assert len(head) + recipe.scan_length + len(tail) == len(original)


def test_the_blob_is_a_picture_that_viewers_of_jpeg_xl_show() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    original = jpeg(exif=exif())
    outcome = compact(original)
    pixels = imagecodecs.jpegxl_decode(container.pack(outcome.avif, outcome.recipe, ID, KEY))
    theirs = np.asarray(Image.open(io.BytesIO(original)), dtype=int)
    assert np.abs(pixels.astype(int) - theirs).mean() < 2  # another decoder's rounding and upsampling


def test_head_and_tail_of_large_files_cost_no_work() -> None:
    out = io.BytesIO()
    photograph("astronaut").resize((1800, 1800)).save(out, "JPEG", quality=99, exif=exif())
    original = out.getvalue()
    assert len(original) > 819_200
    outcome = compact(original)
    recipe = recipe_format.decode(outcome.recipe)
    assert recipe_format.length(recipe.prefix) % 4096 == 0
    assert recipe_format.length(recipe.suffix) >= 8192
    assert reconstruction.rebuild(recipe, outcome.avif, no_network) == original


def test_camera_files(camera_files: list[Path]) -> None:
    before = after = 0
    for path in camera_files:
        original = path.read_bytes()
        if not original.startswith(b"\xff\xd8") or len(original) > 400_000:
            continue
        outcome = compact(original)
        if outcome.verdict is not Verdict.COMPACTED:
            assert outcome.message
            continue
        view = reconstruction.rebuild(recipe_format.decode(outcome.recipe), outcome.avif, no_network)
        assert view == original, path.name
        before += len(original)
        after += len(container.pack(outcome.avif, outcome.recipe, ID, KEY))
    assert after < 0.87 * before


def test_what_the_gate_refuses_shrinks_without_loss() -> None:
    """Noise: no lossy blob of it passes, or fits."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.save(out, "JPEG", quality=75)
    outcome = compact(out.getvalue(), "faithful")
    assert outcome.verdict is Verdict.COMPACTED
    recipe = recipe_format.decode(outcome.recipe)
    assert recipe.preset == LOSSLESS
    assert recipe.note == outcome.message != ""
    assert reconstruction.rebuild(recipe, outcome.avif, no_network) == out.getvalue()


def test_kinds_that_are_passed_through_shrink_without_loss() -> None:
    original = jpeg(keep_rgb=True)  # its samples are no YCbCr
    outcome = compact(original, "high")
    assert outcome.verdict is Verdict.COMPACTED
    assert "RGB" in recipe_format.decode(outcome.recipe).note


def test_what_saves_too_little_or_can_not_be_transcoded_stays() -> None:
    assert compact(jpeg(), min_saving_lossless=0.9).reason is Reason.NOT_WORTH_IT
    out = io.BytesIO()
    photograph("astronaut").convert("CMYK").save(out, "JPEG")
    assert compact(out.getvalue()).verdict is Verdict.PASSED_THROUGH
    out = io.BytesIO()
    photograph("camera").save(out, "PNG")
    assert compact(out.getvalue()).reason is Reason.UNSUPPORTED_KIND
    assert compact(b"hello").verdict is Verdict.PASSED_THROUGH


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 20, 160, 300, 5000])
def test_broken_files_are_a_verdict(cut: int) -> None:
    whole = jpeg(progressive=True)
    assert compact(whole[:cut]).verdict is Verdict.PASSED_THROUGH
    assert compact(whole[: len(whole) - cut - 1]).verdict is Verdict.PASSED_THROUGH


def test_too_many_pixels_are_never_decoded() -> None:
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(Unsupported) as caught:
        jpegxl.transcode(bytes(data), 200)
    assert caught.value.reason is Reason.TOO_LARGE


def test_another_jpeg_is_never_served() -> None:
    """A JPEG XL of another picture, or none at all, under a recipe: an error, never wrong bytes."""
    outcome, other = compact(jpeg()), compact(jpeg(quality=92))
    recipe = recipe_format.decode(outcome.recipe)
    for picture in (other.avif, outcome.avif[:-100], b"", b"garbage", outcome.recipe):
        with pytest.raises(ReconstructionError):
            reconstruction.rebuild(recipe, picture, no_network)


def test_through_the_engine() -> None:
    def network_bytes(sha256: bytes) -> bytes:
        raise FileNotFoundError("there is none")

    original = jpeg(exif=exif(), progressive=True)
    engine = Engine(EngineSettings(device="cpu"), network_bytes)
    try:
        outcome = engine.compact(original, Policy(preset=LOSSLESS, min_saving_lossless=0), {})
        assert outcome == compact(original)
        digest = hashlib.sha256(original).digest()
        rebuilt = engine.rebuild(digest, lambda: (outcome.recipe, outcome.avif)).wait()
        assert rebuilt.file.read() == original
        assert rebuilt.exact
        with pytest.raises(EngineError, match="JPEG XL"):
            engine.rebuild(b"other", lambda: (outcome.recipe, outcome.avif[:-9])).wait()
    finally:
        engine.close()
