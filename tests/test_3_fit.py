"""Views of pictures sharper than their originals: networks of texture > 0 make them, and they may not fit.

What the shipped network of texture makes mostly fits (docs/formats.md). So one is made whose pictures don't: the
default network with other slopes, which is noisier.
"""

from __future__ import annotations

import functools
import hashlib
import math

import msgspec
import numpy as np
import pytest
from PIL import Image

from esrfs import formats
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import JpegCoding
from esrfs.compaction import compactor, gate
from esrfs.compaction.compactor import NetworkRef
from esrfs.compaction.outcome import Outcome, Policy, Reason, Verdict
from esrfs.engine import tiles
from esrfs.formats import jpeg, jpeg_parse
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks import loading
from esrfs.upkeep import explain
from tests import test_3_compaction
from tests.test_3_compaction import encoded, skimage_photo, weights

Pixels = formats.Pixels
LIMIT = 10.0


@functools.cache
def sharper(much: float) -> tuple[NetworkRef, loading.Network]:
    """The default network, but what its last layer is given is ``much`` times as large where it is negative."""
    description, tensors = loading.read(weights())
    last = max((name for name in tensors if tensors[name].ndim == 1 and name.endswith("weight")), key=_layer)
    file = loading.save(
        msgspec.structs.replace(description, name=f"sharper {much:g}"), {**tensors, last: tensors[last] * much}
    )
    network = loading.load(file)
    return NetworkRef("sharper", hashlib.sha256(file).digest(), network.scale), network


def _layer(name: str) -> int:
    return int(name.split(".")[1])


@functools.cache
def rebuilt(photo: str, much: float) -> Pixels:
    """By that network, from a picture of half the size that lost nothing else."""
    image = skimage_photo(photo, (384, 288))
    return tiles.enlarge(sharper(much)[1], np.asarray(image.reduce(2)))


def fitted(original: bytes, pixels: Pixels) -> tuple[JpegCoding, float]:
    """How a view of ``pixels`` is coded, and what it scores."""
    split = formats.split(original, LIMIT)
    view = formats.fit_view(split, pixels)
    data = view.expand()
    assert len(data) == len(original)
    assert formats.encode_scan(view.coding, split.width, split.height, pixels, len(view.scan)) == view.scan
    assert isinstance(view.coding, JpegCoding)
    before, after = jpeg_parse.parse(original), jpeg_parse.parse(data)
    assert after.quantisation == view.coding.quantisation
    assert after.frame == before.frame
    return view.coding, Reference(split.pixels()).compare(formats.decode(data, LIMIT)).score


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("quality", "progressive"),
    [
        (75, False),
        pytest.param(30, False, marks=SLOW),
        pytest.param(92, False, marks=SLOW),
        pytest.param(30, True, marks=SLOW),
        pytest.param(75, True, marks=SLOW),
        pytest.param(92, True, marks=SLOW),
    ],
)
def test_the_sharper_the_more_is_done_to_make_it_fit(quality: int, progressive: bool) -> None:
    original = encoded(
        skimage_photo("astronaut", (384, 288)), "JPEG", quality=quality, optimize=True, progressive=progressive
    )
    effort: list[float] = []
    for much in (1.0, 4.0, 7.0):
        try:
            coding, _ = fitted(original, rebuilt("astronaut", much))
        except formats.DoesNotFit as error:
            assert "bytes too long, even softened" in str(error)
            effort.append(math.inf)
            continue
        assert not (coding.softened and coding.coarser > 1)
        tables = jpeg_parse.parse(original).quantisation
        assert (coding.quantisation == tables) == (coding.coarser == 1)
        effort.append(list(jpeg._settings(tables[0])).index((coding.coarser, coding.softened)))
    assert effort == sorted(effort)
    assert effort[0] < effort[-1]


@pytest.mark.parametrize(
    ("quality", "much"), [(40, 3.0), pytest.param(30, 4.0, marks=SLOW), pytest.param(75, 4.0, marks=SLOW)]
)
def test_slightly_softer_costs_less_than_coarser(quality: int, much: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a coarse original were quantised by these very steps; with others they fall apart."""
    original = encoded(skimage_photo("astronaut", (384, 288)), "JPEG", quality=quality, optimize=True)
    pixels = rebuilt("astronaut", much)
    coding, score = fitted(original, pixels)
    assert coding.softened
    monkeypatch.setattr(jpeg, "_settings", lambda _: ((factor, 0.0) for factor in (1.0, *jpeg.COARSER)))
    try:
        coding, coarser = fitted(original, pixels)
    except formats.DoesNotFit:
        return
    assert coding.coarser > 1
    assert score > coarser + 0.5


def compacted(original: bytes, much: float, preset: str, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """With that network and no other way."""
    reference, network = sharper(much)

    def infer(sha256: bytes, pixels: Pixels) -> Pixels:
        assert sha256 == reference.sha256
        return tiles.enlarge(network, pixels)

    monkeypatch.setattr(test_3_compaction, "infer", infer)
    monkeypatch.setattr(compactor, "_ways", lambda *_: [compactor._Way(2, "4:4:4", reference)])
    return compactor.compact(original, Policy(preset=preset, min_saving_lossless=1.0), [reference], infer)


def test_the_gate_measures_what_the_fit_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = skimage_photo("coffee", (160, 120)).resize((320, 240), Image.Resampling.BICUBIC)
    original = encoded(soft, "JPEG", quality=75, optimize=True)
    outcome = compacted(original, 4.0, "small", monkeypatch)
    assert outcome.verdict == Verdict.COMPACTED, outcome.message
    recipe = test_3_compaction.check_blob(original, outcome, "small")  # the promise is kept by the view as it is
    assert isinstance(recipe.coding, JpegCoding)
    assert recipe.coding.softened
    assert "softened" in explain._how_it_fits(recipe.coding)
    coarser = msgspec.structs.replace(recipe.coding, softened=0.0, coarser=1.17)
    assert "1.17 times more coarsely" in explain._how_it_fits(coarser)
    plain = msgspec.structs.replace(recipe.coding, softened=0.0)
    assert explain._how_it_fits(plain) == ""


@SLOW
@pytest.mark.parametrize("quality", [5, 10, 20])
@pytest.mark.parametrize("much", [1.0, 5.0])
def test_coarse_originals_of_less_than_a_bit_a_pixel(
    quality: int, much: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = skimage_photo("coffee", (384, 288))
    original = encoded(image, "JPEG", quality=quality, optimize=True)
    assert len(original) * 8 < image.width * image.height
    outcome = compacted(original, much, "small", monkeypatch)
    if outcome.verdict == Verdict.COMPACTED:
        test_3_compaction.check_blob(original, outcome, "small")
    else:
        assert outcome.reason in (Reason.QUALITY, Reason.DOES_NOT_FIT, Reason.NOT_WORTH_IT)
        assert outcome.message
        assert (outcome.score is None) or outcome.score < gate.thresholds("small").whole + 20


def test_a_recipe_without_these_fields_is_read() -> None:
    """Blobs made before."""
    coding = {"type": "jpeg", "mode": "L", "subsampling": "4:4:4", "quantisation": [[1] * 64]}
    read = msgspec.convert(coding, recipe_format.PictureCoding)
    assert isinstance(read, JpegCoding)
    assert (read.softened, read.coarser) == (0.0, 1.0)
