"""Architectures and loading: official weights fit by name and shape, and bytes in give the bytes of a plain forward."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from esrfs.networks import architectures, loading, registry
from esrfs.networks import spec as specs

PICTURE = np.random.default_rng(7).integers(0, 256, (1, 29, 43, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other: with anything else running, two are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _plain(model: torch.nn.Module, picture: np.ndarray) -> np.ndarray:
    """The whole picture at once, as a paper's script does it."""
    with torch.inference_mode():
        x = torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255
        y = model(x.contiguous(memory_format=torch.channels_last))
        return (y * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _random(architecture: str, **arguments: int | str) -> architectures.Model:
    torch.manual_seed(1)
    model = architectures.build(architecture, arguments)
    loading.channels_last(model)
    return model


def _official_file(model: architectures.Model, key: str) -> bytes:
    buffer = io.BytesIO()
    torch.save({key: model.state_dict()}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "convolutions"), [("realesr-general-x4v3", 32), ("realesr-animevideov3", 16)])
def test_official_compact_weights(name: str, convolutions: int, shared_weights: Path) -> None:
    path = shared_weights / f"{name}.fp16w.pth"
    data = path.read_bytes()
    network = loading.load(data, name=name)
    assert network.spec.architecture == "SRVGGNetCompact"
    assert network.spec.arguments == {"num_feat": 64, "num_conv": convolutions, "upscale": 4, "act_type": "prelu"}
    assert (network.scale, network.margin, network.multiple) == (4, convolutions + 2, 1)

    state = torch.load(path, weights_only=True)["params"]
    model = architectures.SRVGGNetCompact(num_conv=convolutions)
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    model.load_state_dict(state)
    loading.channels_last(model)
    assert np.array_equal(network(PICTURE), _plain(model, PICTURE))
    # The network restores, it doesn't invent: enlarged and shrunk again, a smooth picture is about what it was.
    smooth = np.tile(np.linspace(40, 200, 48, dtype=np.uint8)[None, None, :, None], (1, 32, 1, 3))
    back = network(smooth)[0].reshape(32, 4, 48, 4, 3).mean((1, 3))
    assert np.abs(back - smooth[0]).mean() < 4


def test_rrdbnet_has_the_official_names() -> None:
    """As in RealESRGAN_x4plus.pth: 702 tensors, 16,697,987 numbers (67 MB, the published size)."""
    state = architectures.RRDBNet().state_dict()
    assert len(state) == 702
    assert sum(value.numel() for value in state.values()) == 16_697_987
    assert state["conv_first.weight"].shape == (64, 3, 3, 3)
    assert state["body.22.rdb3.conv5.weight"].shape == (64, 192, 3, 3)
    assert state["body.0.rdb1.conv1.bias"].shape == (32,)
    assert {key.split(".")[0] for key in state} == {
        *("conv_first", "body", "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last")
    }
    # RealESRGAN_x2plus sees its input unshuffled.
    assert architectures.RRDBNet(num_block=1, scale=2).state_dict()["conv_first.weight"].shape == (64, 12, 3, 3)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("key", ["params", "params_ema"])
def test_rrdbnet_at_every_scale(scale: int, key: str) -> None:
    arguments = {"num_feat": 8, "num_block": 2, "num_grow_ch": 4, "scale": scale}
    model = _random("RRDBNet", **arguments)
    network = loading.load(_official_file(model, key), name="some")
    assert network.spec.arguments == arguments
    assert network.scale == scale
    assert network.margin % network.multiple == 0
    whole = PICTURE[:, :28, :40]  # a multiple of 4
    assert np.array_equal(network(whole), _plain(model, whole))
    # Odd sizes are padded for networks that unshuffle, and cut again.
    assert network(PICTURE).shape == (1, 29 * scale, 43 * scale, 3)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", ["prelu", "relu", "leakyrelu"])
def test_compact_round_trip_through_safetensors(scale: int, activation: str) -> None:
    arguments: dict[str, int | str] = {"num_feat": 8, "num_conv": 3, "upscale": scale, "act_type": activation}
    model = _random("SRVGGNetCompact", **arguments)
    description = specs.NetworkSpec(
        name="some", architecture="SRVGGNetCompact", arguments=arguments, scale=scale, margin=5, licence="Apache-2.0"
    )
    data = loading.save(description, model.state_dict())
    assert data == loading.save(description, dict(reversed(model.state_dict().items()))), (
        "the same network, the same sha256"
    )
    network = loading.load(data)
    assert network.spec == description
    assert np.array_equal(network(PICTURE), _plain(model, PICTURE))


def test_a_header_whose_length_looks_like_a_pickle() -> None:
    """0x…80 is how a pickle begins; one in 32 files has such a length."""
    model = _random("SRVGGNetCompact", num_feat=8, num_conv=1, upscale=2, act_type="relu")
    seen = set()
    for length in range(0, 256, 4):
        description = specs.NetworkSpec(
            name="x" * length, architecture="SRVGGNetCompact", scale=2, margin=3,
            arguments={"num_feat": 8, "num_conv": 1, "upscale": 2, "act_type": "relu"},
        )  # fmt: skip
        data = loading.save(description, model.state_dict())
        seen.add(data[0])
        assert loading.read(data)[0] == description
    assert 0x80 in seen


def test_tiles_with_the_margin_join_without_a_trace() -> None:
    network = loading.load(registry.find("lite-x2").read_bytes())
    m = network.margin
    picture = np.random.default_rng(3).integers(0, 256, (1, 40, 90, 3), dtype=np.uint8)
    whole = network(picture)
    left, right = network(picture[:, :, : 45 + m]), network(picture[:, :, 45 - m :])
    joined = np.concatenate((left[:, :, :90], right[:, :, 2 * m :]), axis=2)
    assert np.array_equal(joined, whole)
    both = np.concatenate((picture[:, :, :45], picture[:, :, 45:]))
    assert np.array_equal(network(both), np.concatenate((network(both[:1]), network(both[1:])))), (
        "a batch is no different"
    )


def test_lite_is_lite() -> None:
    """At most 11,000 multiplications for each output pixel: a second for 12 MP on two cores."""
    spec = registry.read_spec(registry.find("lite-x2"))
    assert spec is not None
    model = architectures.build(spec.architecture, spec.arguments)
    weights = sum(value.numel() for value in model.parameters() if value.ndim == 4)
    assert (spec.name, spec.scale, spec.margin) == ("lite-x2", 2, 6)
    assert weights / spec.scale**2 <= 11_000


def test_what_a_network_refuses() -> None:
    network = loading.load(registry.find("lite-x2").read_bytes())
    with pytest.raises(ValueError, match="N×H×W×3"):
        network(PICTURE[..., :1])
    read_only = PICTURE.copy()
    read_only.flags.writeable = False
    assert np.array_equal(network(read_only), network(PICTURE))


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise AssertionError('a pickle was executed')",))


def _broken() -> dict[str, bytes]:
    good = registry.find("lite-x2").read_bytes()
    harmful, strange = io.BytesIO(), io.BytesIO()
    torch.save({"params": _Harmful()}, harmful)
    torch.save({"params": {"fc.weight": torch.zeros(3, 3)}}, strange)
    whole = _official_file(_random("RRDBNet", num_feat=8, num_block=1, num_grow_ch=4, scale=4), "params")
    header = int.from_bytes(good[:8], "little")
    return {
        "empty": b"",
        "text": b"not weights at all, but long enough to be taken for a header",
        "cut": good[:-100],
        "cut in the header": good[:50],
        "pickle": harmful.getvalue(),
        "strange": strange.getvalue(),
        "cut zip": whole[: len(whole) // 2],
        "other scale": good.replace(b'\\"scale\\":2', b'\\"scale\\":3'),
        "other architecture": good.replace(b"SRVGGNetCompact", b"SRVGGNetCompacT"),
        "other width": good[: 8 + header].replace(b'\\"num_feat\\":32', b'\\"num_feat\\":31') + good[8 + header :],
    }


@pytest.mark.parametrize("kind", list(_broken()))
def test_broken_files_are_refused_in_words(kind: str) -> None:
    data = _broken()[kind]
    assert data != registry.find("lite-x2").read_bytes()
    with pytest.raises(ValueError, match=r".{10}"):
        loading.load(data)


def test_registry_and_spec_do_not_import_torch() -> None:
    """The mount names networks and must stay small."""
    code = (
        "import sys, esrfs.networks.registry as r; r.find('lite-x2'); r.listing(); "
        "print({'torch', 'numpy', 'safetensors', 'urllib.request'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
