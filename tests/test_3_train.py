"""Training is repeatable: the same seed gives the same network, stopped and resumed or not."""

from __future__ import annotations

import importlib.resources
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from esrfs.networks import loading
from esrfs.train import measure
from esrfs.train.degradation import Degradation, Pair, find_photographs, make_pairs, shrink
from esrfs.train.fidelity import Plan, learning_rate, train

PLAN = Plan(
    name="tiny-x2",
    architecture="SRVGGNetCompact",
    arguments={"num_feat": 8, "num_conv": 1, "upscale": 2, "act_type": "prelu"},
    degradation=Degradation(2, 1, 50, 90),
    steps=20,
    batch=2,
    patch=16,
    warm_up=5,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other: with anything else running, two are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small photographs, one with odd sides, and a file that is none."""
    folder = tmp_path_factory.mktemp("photographs")
    data = importlib.resources.files("skimage") / "data"
    with (data / "chelsea.png").open("rb") as file, Image.open(file) as image:
        image.convert("RGB").resize((151, 101)).save(folder / "b.png")
    with (data / "camera.png").open("rb") as file, Image.open(file) as image:
        image.resize((128, 128)).save(folder / "a.jpg", quality=95)
    (folder / "notes.txt").write_text("Not a photograph.\n")
    return folder


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[Pair]:
    return make_pairs(find_photographs(folder), PLAN.degradation, PLAN.seed)


def test_pairs_are_the_stores_own_degradation(pairs: list[Pair], folder: Path) -> None:
    assert [path.name for path in find_photographs(folder)] == ["a.jpg", "b.png"]
    odd = pairs[1]
    assert odd.full.shape == (100, 150, 3)
    clean, coded = odd.small
    assert np.array_equal(clean, shrink(odd.full, 2))
    assert coded.shape == clean.shape == (50, 75, 3)
    assert 0 < np.abs(coded.astype(int) - clean).mean() < 10
    again = make_pairs(find_photographs(folder), PLAN.degradation, PLAN.seed)
    assert all(
        np.array_equal(x, y) for a, b in zip(pairs, again, strict=True) for x, y in zip(a.small, b.small, strict=True)
    )


def test_the_same_seed_gives_the_same_network(pairs: list[Pair], tmp_path: Path) -> None:
    first = train(PLAN, pairs, tmp_path / "first.safetensors")
    second = train(PLAN, pairs, tmp_path / "second.safetensors")
    other = train(msgspec.structs.replace(PLAN, seed=1), pairs, tmp_path / "other.safetensors")
    assert len(first) == 20
    assert first == second != other
    data = (tmp_path / "first.safetensors").read_bytes()
    assert data == (tmp_path / "second.safetensors").read_bytes()
    assert data != (tmp_path / "other.safetensors").read_bytes()
    network = loading.load(data)
    assert (network.spec.name, network.scale, network.spec.training["steps"]) == ("tiny-x2", 2, 20)
    assert "AVIF" in network.spec.degradation


def test_resumed_is_the_same_as_uninterrupted(pairs: list[Pair], tmp_path: Path) -> None:
    straight = train(PLAN, pairs, tmp_path / "straight.safetensors", save_every=20)
    out = tmp_path / "resumed.safetensors"
    seen: list[int] = []
    losses = [
        loss
        for until in (7, 8, None, None)  # the last finds nothing left to do
        for loss in train(PLAN, pairs, out, until=until, progress=lambda step, loss: seen.append(step))
    ]
    assert losses == straight
    assert seen == list(range(1, 21))
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


def test_a_checkpoint_of_another_plan_is_refused(pairs: list[Pair], tmp_path: Path) -> None:
    out = tmp_path / "some.safetensors"
    train(PLAN, pairs, out, until=1)
    with pytest.raises(ValueError, match="other settings"):
        train(msgspec.structs.replace(PLAN, batch=3), pairs, out)


def test_it_learns(pairs: list[Pair], tmp_path: Path) -> None:
    plan = msgspec.structs.replace(PLAN, steps=150, learning_rate=3e-3)
    losses = train(plan, pairs, tmp_path / "some.safetensors")
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])
    assert learning_rate(plan, 0) == pytest.approx(plan.learning_rate / plan.warm_up)
    assert learning_rate(plan, plan.warm_up) == pytest.approx(plan.learning_rate)
    assert learning_rate(plan, plan.steps - 1) < 0.01 * plan.learning_rate


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pictures"):
        find_photographs(tmp_path)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    command = [sys.executable, "-m", "esrfs.train", "--data", str(folder), "--out", str(out), "--steps", "3"]
    command += [
        "--channels",
        "8",
        "--convolutions",
        "1",
        "--batch",
        "2",
        "--patch",
        "16",
        "--threads",
        "1",
        "--coded",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
    assert str(out) in done.stdout
    assert loading.load(out.read_bytes()).spec.name == "tiny"


def test_the_shipped_lite_network_beats_bicubic(kodak: list[Path]) -> None:
    """By at least 1 dB on clean pictures, and not only there."""
    network = loading.load((Path(__file__).resolve().parents[1] / "weights" / "lite-x2.safetensors").read_bytes())
    gains: dict[int | None, list[float]] = {None: [], 80: []}
    for path in kodak[::4]:
        full = np.asarray(Image.open(path).convert("RGB"))
        for quality, values in gains.items():
            gain = measure.measure(network, full, quality)
            values.append(gain.network - gain.bicubic)
    assert np.mean(gains[None]) > 1.0
    assert np.mean(gains[80]) > 1.0
