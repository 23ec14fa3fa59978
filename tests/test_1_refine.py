"""Refinement: a small picture that suits the network better for its bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.compaction import compactor, encoder, planner, refine
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks import loading, registry
from tests.conftest import photograph


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other: with anything else running, two are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="bicubic")


def _picture(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    image = photograph("coffee").crop((180, 60, 180 + width, 60 + height))
    small = image.resize(((width + 1) // 2, (height + 1) // 2), Image.Resampling.BICUBIC)
    return np.asarray(image), np.asarray(small)


def test_it_takes_fewer_bytes_for_a_better_score() -> None:
    """With the shipped network and the real codec: better than the plain one is with two levels (some 7 %) more."""
    network = loading.load(registry.find("lite-x2").read_bytes())
    original, small = _picture(256, 256)

    def scored(picture: np.ndarray, level: int) -> tuple[float, int, np.ndarray]:
        avif = encoder.encode_avif(Image.fromarray(picture), planner.quality(level))
        decoded = compactor.reconstruction.decode_small(compactor.Plan(256, 256, 2, b"", False), avif)
        return Reference(original).compare(network(decoded[None])[0]).score, len(avif), decoded

    decoded = scored(small, 44)[2]
    done = refine.refine(
        original, small, network.differentiable, scale=2, margin=network.margin,
        noise=refine.codec_noise(small, decoded), steps=12,
    )  # fmt: skip
    assert done.share == 1
    assert np.abs(done.small.astype(int) - small).mean() < 8, "it is still the small picture"
    score, size, _ = scored(done.small, 44)
    plain_score, plain_size, _ = scored(small, 46)
    assert score > plain_score
    assert size < plain_size


def test_tiles_and_odd_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "TILE", 40)
    original, small = _picture(161, 129)
    assert small.shape[:2] == (65, 81)
    before = small.copy()
    one = refine.refine(original, small, _bicubic, scale=2, margin=4, noise=4.0, steps=3)
    assert np.array_equal(small, before), "values in, values out"
    assert one.share == 1 and one.small.shape == small.shape and one.small.dtype == np.uint8
    changed = (one.small != small).any(axis=2)
    assert changed[:40].any() and changed[41:].any() and changed[:, 60:].any(), "every tile"
    again = refine.refine(original, small, _bicubic, scale=2, margin=4, noise=4.0, steps=3)
    assert np.array_equal(one.small, again.small)


def test_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "TILE", 40)
    original, small = _picture(160, 128)
    none = refine.refine(original, small, _bicubic, scale=2, margin=4, noise=4.0, seconds=0)
    assert none.share == 0
    assert np.array_equal(none.small, small)
    times = iter([0.0, *([1.0] * 6), *([9.0] * 100)])
    monkeypatch.setattr(refine.time, "monotonic", lambda: next(times))
    part = refine.refine(original, small, _bicubic, scale=2, margin=4, noise=4.0, seconds=5, steps=3)
    assert part.share == 0.25
    changed = (part.small != small).any(axis=2)
    tiles = [changed[top : top + 32, left : left + 40].any() for top in (0, 32) for left in (0, 40)]
    assert sum(tiles) == 1, "the second was under way: it stays as it was, as does what was not reached"
    detail = [np.abs(np.diff(tile.astype(int), axis=0)).sum() for tile in (small[:32, :40], small[:32, 40:])]
    detail += [np.abs(np.diff(tile.astype(int), axis=0)).sum() for tile in (small[32:, :40], small[32:, 40:])]
    assert tiles.index(True) == detail.index(max(detail)), "the busiest was first"


def test_the_rate_grows_with_detail_and_falls_with_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    flat, busy = torch.full((1, 3, 20, 27), 0.5), torch.rand(1, 3, 20, 27, generator=rng)
    assert refine.rate(flat, 0.02) < 0.1 * refine.rate(busy, 0.02)
    assert refine.rate(busy, 0.04) < refine.rate(busy, 0.02)
    # The transform keeps energy, so that the codec's noise is the same in pixels and coefficients.
    matrix = refine._dct(torch.device("cpu"))
    assert torch.allclose(matrix @ matrix.T, torch.eye(8), atol=1e-6)


def test_what_it_leaves_alone() -> None:
    original, small = _picture(64, 24)
    assert np.array_equal(refine.refine(original, small, _bicubic, scale=2, margin=4, noise=4).small, small)
    with pytest.raises(ValueError, match="stand for"):
        refine.refine(original[:, :, :1], small, _bicubic, scale=2, margin=4, noise=4.0)
    assert refine.codec_noise(small, small) == 0
