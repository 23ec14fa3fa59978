"""Making pictures small: by reduction, and by a shrinker; which bytes it sees, and that bands leave no trace."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from esrfs.compaction import compactor, shrinking
from esrfs.compaction.compactor import NetworkRef
from esrfs.compaction.shrinking import Pixels, ShrinkerRef
from esrfs.engine import tiles
from esrfs.networks import architectures, loading, registry
from esrfs.networks.spec import NetworkSpec


def shrinker(seed: int | None = None, reduction: int = 2) -> loading.Network:
    """A new one, or one with random weights, through its file."""
    torch.manual_seed(seed or 0)
    model = architectures.Shrinker(num_feat=8, num_conv=2, reduction=reduction)
    if seed is not None:
        for parameter in model.tail.parameters():
            torch.nn.init.normal_(parameter)
    spec = NetworkSpec(
        name="shrink-it",
        architecture="Shrinker",
        arguments={"num_feat": 8, "num_conv": 2, "reduction": reduction},
        scale=1,
        margin=model.margin,
    )
    return loading.load(loading.save(spec, model.state_dict()))


def picture(height: int, width: int, colours: int = 3) -> Pixels:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, colours), dtype=np.uint8)


def run(network: loading.Network, sha256: bytes, pixels: Pixels) -> Pixels:
    return tiles.enlarge(network, pixels, size=32)


@given(st.integers(1, 21), st.integers(1, 21), st.sampled_from([1, 3]), st.sampled_from([2, 3]))
def test_what_is_packed(height: int, width: int, colours: int, scale: int) -> None:
    pixels = picture(height, width, colours)
    small = shrinking.reduced(pixels, scale)
    assert small.shape == (-(-height // scale), -(-width // scale), colours)
    packed = shrinking.pack(pixels, small, scale, 44)
    whole = torch.from_numpy(np.repeat(shrinking.continued(pixels, scale), 3 // colours, axis=2))
    unshuffled = F.pixel_unshuffle(whole.permute(2, 0, 1)[None], scale)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(packed[:, :, :-4], unshuffled)
    assert np.array_equal(packed[:, :, -4:-1], np.repeat(small, 3 // colours, axis=2))
    assert (packed[:, :, -1] == 44).all()


@pytest.mark.parametrize("colours", [1, 3])
def test_a_new_shrinker_changes_nothing(colours: int) -> None:
    network = shrinker()
    pixels = picture(50, 70, colours)
    small = shrinking.reduced(pixels, 2)
    reference = ShrinkerRef(b"", network.margin, 2)
    assert np.array_equal(shrinking.suited(pixels, small, 40, reference, partial(run, network)), small)


@pytest.mark.parametrize("colours", [1, 3])
def test_bands_leave_no_trace(colours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = shrinker(seed=1)
    pixels = picture(301, 97, colours)
    small = shrinking.reduced(pixels, 2)
    reference = ShrinkerRef(b"", network.margin, 2)
    whole = shrinking.suited(pixels, small, 40, reference, partial(run, network))
    assert not np.array_equal(whole, small)
    monkeypatch.setattr(shrinking, "_BAND_BYTES", 1)
    assert np.array_equal(shrinking.suited(pixels, small, 40, reference, partial(run, network)), whole)


def test_the_level_counts() -> None:
    network = shrinker(seed=1)
    pixels = picture(64, 64)
    small = shrinking.reduced(pixels, 2)
    reference = ShrinkerRef(b"", network.margin, 2)
    low, high = (shrinking.suited(pixels, small, level, reference, partial(run, network)) for level in (20, 60))
    assert not np.array_equal(low, high)
    assert shrinking.alike(41) == shrinking.alike(40)


def test_a_network_comes_with_its_shrinker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "user_directory", lambda: tmp_path)
    for name in ("own-x2", "own-x4", "shrink-own-x2", "shrink-other-x2"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    assert list(registry.family("own")) == ["own-x2", "own-x4", "shrink-own-x2"]
    assert list(registry.family("own-x2")) == ["own-x2", "shrink-own-x2"]
    with pytest.raises(registry.WeightsError, match="enlarges them, own-x2"):
        registry.family("shrink-own-x2")


def test_references_pair_them() -> None:
    enlarges = NetworkSpec(
        name="a", architecture="SRVGGNetCompact", arguments={"upscale": 2}, scale=2, margin=6
    )  # fmt: skip
    shrinks = shrinker().spec
    given_ones = {"a": (b"1", enlarges), "b": (b"2", enlarges), "shrink-b": (b"3", shrinks)}
    assert compactor.references(given_ones) == [
        NetworkRef("a", b"1", 2),
        NetworkRef("b", b"2", 2, ShrinkerRef(b"3", shrinks.margin, 2)),
    ]


def test_a_shrinker_of_another_scale_is_refused() -> None:
    enlarges = NetworkSpec(name="b", architecture="SRVGGNetCompact", arguments={"upscale": 4}, scale=4, margin=6)
    with pytest.raises(ValueError, match="2 times smaller, but b enlarges 4 times"):
        compactor.references({"b": (b"2", enlarges), "shrink-b": (b"3", shrinker().spec)})


def test_names_tell_shrinkers_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "user_directory", lambda: tmp_path / "here")
    path = tmp_path / "it.safetensors"
    model = architectures.Shrinker(num_feat=8, num_conv=2)
    path.write_bytes(loading.save(shrinker().spec, model.state_dict()))
    with pytest.raises(registry.WeightsError, match="name it shrink-NETWORK"):
        registry.add(path, "own-x2")
    assert registry.add(path, "shrink-own-x2").exists()
    with pytest.raises(registry.WeightsError, match="is none; use another name"):
        registry.add(registry.find("lite-x2"), "shrink-lite-x3")


def test_without_patience_it_is_not_left_out() -> None:
    reference = NetworkRef("b", b"2", 2, ShrinkerRef(b"3", 4, 2))
    sample = compactor._Picture(picture(64, 64))
    for patience, expected in (("low", [reference.shrinker]), ("normal", [reference.shrinker, None])):
        ways = compactor._ways(sample, [reference], compactor.planner.PATIENCE[patience])
        assert [way.shrinker for way in ways if way.scale == 2] == expected


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="N×H×W×16 samples"):
        shrinker()(np.zeros((1, 8, 8, 3), np.uint8))
