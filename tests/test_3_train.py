"""Training is repeatable: the same seed gives the same network, stopped and resumed or not."""

from __future__ import annotations

import importlib.resources
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import PIL
import pytest
import torch
import typer
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from esrfs.compaction import compactor, encoder, planner, shrinking
from esrfs.evaluate.measures import Original
from esrfs.evaluate.niqe import niqe
from esrfs.metrics.fidelity import y_psnr
from esrfs.networks import architectures, loading, registry
from esrfs.networks.interpolation import interpolate
from esrfs.networks.spec import NetworkSpec
from esrfs.train import curves, discriminators, features, log, loop, measure, photographs, store_degradation
from esrfs.train.photographs import Pixels
from esrfs.train.settings import RealEsrganDegradation, Stage, StoreDegradation, Training, TrainingError
from tests.conftest import photograph

FIDELITY = Stage(name="tiny-x2", steps=14, batch=2, patch=16, warm_up=5)
TUNED = Stage(name="tiny-x2", steps=4, batch=1, patch=32, warm_up=2, ssimulacra2=0.1)
ADVERSARIAL = Stage(
    name="tiny-x2-texture", steps=4, batch=1, patch=16, warm_up=2, l1=0.01, features=1, adversarial=0.1,
    discriminator_width=4,
)  # fmt: skip
TRAINING = Training(
    architecture="SRVGGNetCompact",
    arguments={"num_feat": 8, "num_conv": 1, "upscale": 2, "act_type": "prelu"},
    degradation=StoreDegradation(versions=1),
    stages=[FIDELITY, TUNED, ADVERSARIAL],
    validation=1,
    validate_every=10,
    save_every=6,
    log_every=5,
)
SHORT = msgspec.structs.replace(TRAINING, stages=[FIDELITY], validation=0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other: with anything else running, two are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small photographs, one with odd sides, and a file that is none."""
    folder = tmp_path_factory.mktemp("photographs")
    data = importlib.resources.files("skimage") / "data"
    with (data / "chelsea.png").open("rb") as file, Image.open(file) as image:
        image.convert("RGB").resize((151, 101)).save(folder / "b.png")
    with (data / "camera.png").open("rb") as file, Image.open(file) as image:
        image.resize((128, 128)).save(folder / "a.jpg", quality=95)
    with (data / "coffee.png").open("rb") as file, Image.open(file) as image:
        image.resize((120, 90)).save(folder / "c.png")
    (folder / "notes.txt").write_text("Not a photograph.\n")
    return folder


@pytest.fixture(scope="module")
def make_inputs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Training], loop.Inputs]:
    cache = tmp_path_factory.mktemp("coded")

    def make(training: Training) -> loop.Inputs:
        aside, learn = photographs.set_aside(photographs.find(folder), training.validation)
        return loop.Inputs(
            learn=photographs.load(learn, training, cache),
            aside=photographs.load(aside, training, cache),
            perceptual=features.build(None),
        )

    return make


def trained(
    training: Training,
    inputs: loop.Inputs,
    folder: Path,
    *,
    until: int | None = None,
    workers: int = 1,
    progress: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> list[dict[str, float]]:
    """The losses of each step."""
    found: list[dict[str, float]] = []

    def collect(step: int, losses: dict[str, float]) -> None:
        found.append(losses)
        progress(step, losses)

    loop.train(training, inputs, folder, until=until, workers=workers, progress=collect)
    return found


def test_small_versions_are_what_compaction_makes(folder: Path, tmp_path: Path) -> None:
    assert [path.name for path in photographs.find(folder)] == ["a.jpg", "b.png", "c.png"]
    paths = photographs.find(folder)[1:2]

    def infer(sha256: bytes, pixels: Pixels) -> Pixels:
        raise AssertionError("only shrinkers run")

    (odd,) = photographs.load(paths, TRAINING, tmp_path)
    assert odd.full.shape == (100, 150, 3)
    clean, coded = odd.small
    small = compactor._Picture(odd.full).small(compactor._Way(2, "4:4:4"), 0, infer)
    assert np.array_equal(clean, np.asarray(small))
    (kept,) = tmp_path.glob("*/*.avif")
    level = int(kept.stem.split("-")[1])
    assert 24 <= level <= 58
    assert kept.read_bytes() == encoder.encode_avif(small, planner.quality(level))
    assert np.array_equal(coded, store_degradation.decode(kept.read_bytes()))
    before = kept.stat().st_mtime_ns
    (again,) = photographs.load(paths, TRAINING, tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(odd.small, again.small, strict=True))
    assert kept.stat().st_mtime_ns == before, "not made twice"
    (other,) = photographs.load(paths, msgspec.structs.replace(TRAINING, seed=5), tmp_path)
    assert not np.array_equal(odd.small[1], other.small[1])


def test_photographs_can_be_enlarged_first(folder: Path, tmp_path: Path) -> None:
    """As soft as what cameras write; and there is room for patches that the picture itself has no room for."""
    enlarged = StoreDegradation(versions=1, enlarged=1.5)
    wide = msgspec.structs.replace(SHORT, stages=[msgspec.structs.replace(FIDELITY, patch=64)])
    soft = msgspec.structs.replace(wide, degradation=enlarged)
    path = folder / "b.png"  # 151 × 101
    photographs.check([path], [], soft)
    with pytest.raises(TrainingError, match="has only 151 × 101"):
        photographs.check([path], [], wide)
    (picture,) = photographs.load([path], soft, tmp_path)
    with Image.open(path) as image:
        larger = np.asarray(image.resize((226, 152), Image.Resampling.BICUBIC))
    assert np.array_equal(picture.full, larger)
    assert [small.shape for small in picture.small] == [(76, 113, 3)] * 2


@pytest.mark.parametrize("degradation", [StoreDegradation(versions=1), RealEsrganDegradation()])
def test_patches_belong_together(
    make_inputs: Callable[[Training], loop.Inputs], degradation: StoreDegradation | RealEsrganDegradation
) -> None:
    training = msgspec.structs.replace(SHORT, degradation=degradation)
    stage = msgspec.structs.replace(FIDELITY, batch=24, patch=32)
    learn = make_inputs(training).learn
    batch = photographs.draw_batch(learn, training, stage, np.random.default_rng(2))
    assert batch.small.shape == (24, 32, 32, 3) and batch.full.shape == (24, 64, 64, 3)
    shrunk = batch.full.reshape(24, 32, 2, 32, 2, 3).mean((2, 4))
    small = batch.small / 257
    off = np.abs(shrunk - small).mean((1, 2, 3))
    assert off.max() < (25 if isinstance(degradation, StoreDegradation) else 60)
    shuffled = np.abs(shrunk - np.roll(small, 1, axis=0)).mean((1, 2, 3))
    assert off.mean() < 0.7 * shuffled.mean()
    # All eight positions occur: the patches' brightest corner is not always the same.
    corners = {
        int(np.argmax([p[:8, :8].mean(), p[:8, -8:].mean(), p[-8:, :8].mean(), p[-8:, -8:].mean()])) for p in shrunk
    }
    assert len(corners) == 4


def test_photographs_set_aside_stay_aside() -> None:
    paths = [Path(f"{number}.png") for number in range(40)]
    aside, learn = photographs.set_aside(paths, 6)
    assert len(aside) == 6 and sorted(aside + learn) == sorted(paths)
    assert set(photographs.set_aside(paths[::2], 6)[0]) >= {path for path in aside if path in paths[::2]}
    assert photographs.set_aside(paths[:1], 6) == ([], paths[:1])


def test_the_same_seed_gives_the_same_network(make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path) -> None:
    inputs = make_inputs(TRAINING)
    first = trained(TRAINING, inputs, tmp_path / "first")
    second = trained(TRAINING, inputs, tmp_path / "second", workers=3)
    other = trained(msgspec.structs.replace(TRAINING, seed=1), inputs, tmp_path / "other")
    assert len(first) == 22
    assert first == second != other
    assert [set(losses) for losses in (first[0], first[14], first[18])] == [
        {"l1"}, {"l1", "ssimulacra2"}, {"l1", "features", "adversarial", "critic"},
    ]  # fmt: skip
    for name in ("tiny-x2.safetensors", "tiny-x2-texture.safetensors", "tiny-x2.md"):
        data = (tmp_path / "first" / name).read_bytes()
        assert data == (tmp_path / "second" / name).read_bytes()
        assert data != (tmp_path / "other" / name).read_bytes()
    fidelity, texture = (
        loading.load((tmp_path / "first" / f"{name}.safetensors").read_bytes())
        for name in ("tiny-x2", "tiny-x2-texture")
    )
    assert (fidelity.spec.name, fidelity.scale, fidelity.spec.training["steps"]) == ("tiny-x2", 2, 18)
    assert (texture.spec.name, texture.spec.training["steps"]) == ("tiny-x2-texture", 22)
    assert (fidelity.spec.texture, texture.spec.texture) == (0, 1)
    assert "AVIF" in fidelity.spec.degradation
    assert "unet" in str(texture.spec.training["loss"])


def test_a_discriminator_that_sees_gray_asks_for_no_colour(
    make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path
) -> None:
    """What it wants changed, it wants changed alike in red, green and blue."""
    gray = msgspec.structs.replace(ADVERSARIAL, discriminator_sees="gray")
    pictures = torch.rand(2, 3, 16, 16, requires_grad=True)
    critic = discriminators.build("unet", 4)
    critic(loop._seen(gray, pictures)).sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().max() > 0
    assert torch.allclose(pictures.grad, pictures.grad.mean(1, keepdim=True).expand_as(pictures))
    training = msgspec.structs.replace(TRAINING, stages=[gray], validation=0)
    colour = msgspec.structs.replace(training, stages=[ADVERSARIAL])
    losses = [trained(each, make_inputs(each), tmp_path / str(i)) for i, each in enumerate((training, colour))]
    assert losses[0][0]["l1"] == losses[1][0]["l1"] and losses[0] != losses[1]
    assert "unet, gray" in (tmp_path / "0" / "tiny-x2-texture.md").read_text()


def test_resumed_is_the_same_as_uninterrupted(make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path) -> None:
    """Whatever the stage, and also where a stage ends (14, 18)."""
    inputs = make_inputs(TRAINING)
    straight = trained(TRAINING, inputs, tmp_path / "straight")
    seen: list[int] = []
    losses = [
        loss
        for until in (7, 8, 14, 16, 18, 20, None, None)  # the last finds nothing left to do
        for loss in trained(
            TRAINING, inputs, tmp_path / "resumed", until=until, progress=lambda step, _: seen.append(step)
        )
    ]
    assert losses == straight
    assert seen == list(range(1, 23))
    for name in ("tiny-x2.safetensors", "tiny-x2-texture.safetensors"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    steps = [entry.step for entry in log.read(tmp_path / "resumed" / "log.jsonl") if entry.losses]
    assert steps == sorted(set(steps)) and steps[-1] == 22


def test_killed_between_checkpoints(make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path) -> None:
    """What came after the last checkpoint is done again, and logged once."""
    inputs = make_inputs(SHORT)
    straight = trained(SHORT, inputs, tmp_path / "straight")

    def die(step: int, losses: dict[str, float]) -> None:
        if step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(SHORT, inputs, tmp_path / "killed", progress=die)
    with (tmp_path / "killed" / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 11, "sta')
    assert trained(SHORT, inputs, tmp_path / "killed") == straight[6:]
    assert [entry.step for entry in log.read(tmp_path / "killed" / "log.jsonl")] == [5, 10, 14]
    data = [(tmp_path / name / "tiny-x2.safetensors").read_bytes() for name in ("straight", "killed")]
    assert data[0] == data[1]


def test_a_checkpoint_of_another_training_is_refused(
    make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path
) -> None:
    inputs = make_inputs(SHORT)
    trained(SHORT, inputs, tmp_path, until=1)
    with pytest.raises(TrainingError, match="other settings"):
        trained(msgspec.structs.replace(SHORT, seed=7), inputs, tmp_path)
    start = loading.read((tmp_path / "tiny-x2.safetensors").read_bytes())[1]
    for change, message in (
        (msgspec.structs.replace(inputs, learn=inputs.learn[:1]), "other photographs"),
        (msgspec.structs.replace(inputs, shrinker_sha256="1"), "another shrinker"),
        (msgspec.structs.replace(inputs, encoder="2", enlarger_sha256="1"), "another AVIF encoder, another enlarger"),
        (msgspec.structs.replace(inputs, start=start), "other starting weights"),
        (msgspec.structs.replace(inputs, perceptual=None), "another perceptual loss"),
    ):
        with pytest.raises(TrainingError, match=f"was made with {message};"):
            trained(SHORT, change, tmp_path)
    trained(SHORT, inputs, tmp_path, until=2)


def test_a_checkpoint_that_can_not_be_read(make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path) -> None:
    inputs = make_inputs(SHORT)
    trained(SHORT, inputs, tmp_path, until=1)
    checkpoint = tmp_path / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True)
    for content in (whole[:1000], b"", b"no checkpoint"):
        checkpoint.write_bytes(content)
        with pytest.raises(TrainingError, match=r"checkpoint\.pt can't be read \(is damaged"):
            trained(SHORT, inputs, tmp_path)
        assert checkpoint.read_bytes() == content, "it stays as it is"
    torch.save({**state, "inputs": "as esrfs wrote it once"}, checkpoint)
    with pytest.raises(TrainingError, match="another version of esrfs"):
        trained(SHORT, inputs, tmp_path)


def test_a_network_that_was_not_written_any_more_is_written_by_the_next_run(
    make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash, or on a full disk, between the last step and the files."""
    inputs = make_inputs(SHORT)
    trained(SHORT, inputs, tmp_path / "straight")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("esrfs.train.export.write", fail)
        with pytest.raises(OSError, match="No space left"):
            trained(SHORT, inputs, tmp_path / "again")
    assert not (tmp_path / "again" / "tiny-x2.safetensors").exists()
    trained(SHORT, inputs, tmp_path / "again")
    files = [(tmp_path / name / "tiny-x2.safetensors").read_bytes() for name in ("straight", "again")]
    assert files[0] == files[1]


def test_a_full_disk_costs_what_came_after_the_checkpoint(
    make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path
) -> None:
    inputs = make_inputs(SHORT)
    straight = trained(SHORT, inputs, tmp_path / "straight")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "full"
    trained(SHORT, inputs, out, until=7)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    for limit, name in ((len(files["checkpoint.pt"]) - 1, "checkpoint.pt"), (len(files["log.jsonl"]) + 9, "log.jsonl")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match=f"File too large.*{name}"):
                trained(SHORT, inputs, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (out / "checkpoint.pt").read_bytes() == files["checkpoint.pt"]
        assert sorted(path.name for path in out.iterdir()) == sorted(files), "nothing is left beside"
    assert trained(SHORT, inputs, out) == straight[7:]
    assert (out / "tiny-x2.safetensors").read_bytes() == (tmp_path / "straight" / "tiny-x2.safetensors").read_bytes()
    assert [entry.step for entry in log.read(out / "log.jsonl")] == [5, 7, 10, 14]


def test_two_trainings_do_not_write_to_one_folder(
    make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path
) -> None:
    inputs = make_inputs(SHORT)

    def another(step: int, losses: dict[str, float]) -> None:
        with pytest.raises(loop.BusyError, match="another training writes to"):
            trained(SHORT, inputs, tmp_path)

    trained(SHORT, inputs, tmp_path, until=1, progress=another)


def test_what_another_encoder_made_is_not_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = photographs.find(folder)[:1]
    photographs.load(paths, TRAINING, tmp_path)
    (before,) = tmp_path.glob("*/*.avif")
    assert before.parent.name == store_degradation.encoder()
    assert before.parent.name.startswith(f"pillow-{PIL.__version__}-libavif-")
    code = store_degradation.code
    with monkeypatch.context() as patched:
        patched.setattr(store_degradation, "code", lambda small, level: code(small, level // 2))
        store_degradation.encoder.cache_clear()
        photographs.load(paths, TRAINING, tmp_path)
        assert len(list(tmp_path.glob("*/*.avif"))) == 2, "other settings are another encoder, too"
    store_degradation.encoder.cache_clear()


def test_it_learns(make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path) -> None:
    stage = msgspec.structs.replace(FIDELITY, steps=150, learning_rate=3e-3)
    training = msgspec.structs.replace(TRAINING, stages=[stage], validate_every=75)
    inputs = make_inputs(training)
    losses = [step["l1"] for step in trained(training, inputs, tmp_path / "a")]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])
    measured = [entry.validation for entry in log.read(tmp_path / "a" / "log.jsonl") if entry.validation]
    assert len(measured) == 2
    assert measured[1]["psnr"] > measured[0]["psnr"]
    rates = [loop.learning_rate(stage, step) for step in (0, stage.warm_up, stage.steps - 1)]
    assert rates == pytest.approx([stage.learning_rate / stage.warm_up, stage.learning_rate, 0], abs=2e-6)
    # Another training begins where this one ended.
    start = loading.read((tmp_path / "a" / "tiny-x2.safetensors").read_bytes())[1]
    on = trained(SHORT, msgspec.structs.replace(inputs, start=start), tmp_path / "b", until=5)
    assert np.mean([step["l1"] for step in on]) < 0.8 * np.mean(losses[:5])
    # Also one of a larger network, which begins with the very pictures that this one makes.
    arguments = {**training.arguments, "num_feat": 12, "num_conv": 3}
    colourful = msgspec.structs.replace(SHORT.stages[0], colour=0.01)
    large = msgspec.structs.replace(SHORT, arguments=arguments, stages=[colourful])
    grown = trained(large, msgspec.structs.replace(inputs, start=start), tmp_path / "c", until=1)
    assert grown[0]["l1"] == pytest.approx(on[0]["l1"], rel=1e-4)
    assert grown[0]["colour"] > 0
    assert "0.01 colour error" in (tmp_path / "c" / "tiny-x2.md").read_text()
    with pytest.raises(TrainingError, match="wider network"):
        narrow = msgspec.structs.replace(SHORT, arguments={**training.arguments, "num_feat": 2})
        trained(narrow, msgspec.structs.replace(inputs, start=start), tmp_path / "d")


def test_what_can_not_be_learnt_from(
    folder: Path, tmp_path: Path, make_inputs: Callable[[Training], loop.Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="holds no pictures"):
        photographs.find(tmp_path)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(TrainingError, match=r"broken\.jpg can't be read as a picture"):
        photographs.load([broken], TRAINING, tmp_path)
    with pytest.raises(FileNotFoundError):
        photographs.find(tmp_path / "nowhere")
    wide = msgspec.structs.replace(SHORT, stages=[msgspec.structs.replace(FIDELITY, patch=64)])
    paths = photographs.find(folder)
    with pytest.raises(TrainingError, match=r"b\.png has only 151 × 101 pixels, and patches are 128 wide"):
        photographs.check(paths, [], wide)
    photographs.check(paths[:1], paths[1:], wide)
    with pytest.raises(TrainingError, match=r"broken\.jpg can't be read as a picture"):
        photographs.check([broken], [], SHORT)
    with monkeypatch.context() as patched:
        patched.setattr("esrfs.engine.room.available", lambda: 1e5)
        with pytest.raises(TrainingError, match=r"3 photographs of 0 megapixels take 0\.0 GB"):
            photographs.check(paths, [], SHORT)
    exploding = msgspec.structs.replace(SHORT, stages=[msgspec.structs.replace(FIDELITY, learning_rate=1e30)])
    with pytest.raises(TrainingError, match="lower learning rate"):
        trained(exploding, make_inputs(exploding), tmp_path / "out")


SETTINGS = """
architecture = "SRVGGNetCompact"
arguments = { num_feat = 8, num_conv = 1, upscale = 2, act_type = "relu" }
degradation = { type = "real-esrgan" }
data = "three pictures"
validation = 1
validate_every = 2
log_every = 1
[[stages]]
name = "tiny"
steps = STEPS
batch = 1
patch = 16
"""


def _command(folder: Path, settings: Path, out: Path) -> list[str]:
    base = [sys.executable, "-m", "esrfs.cli.main", "train", str(settings), "--data", str(folder), "-o", str(out)]
    return [*base, "--threads", "1", "--cache", str(out / "cache")]


def test_the_command(folder: Path, tmp_path: Path) -> None:
    settings, out = tmp_path / "tiny.toml", tmp_path / "out"
    settings.write_text(SETTINGS.replace("STEPS", "4"))
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(_command(folder, settings, out), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert str(out / "tiny.safetensors") in done.stdout
    assert "2 photographs to learn from, 1 set aside" in done.stdout
    assert "stopped" not in done.stdout
    assert "step 4" in done.stdout and "SSIMULACRA2" in done.stdout
    assert loading.load((out / "tiny.safetensors").read_bytes()).spec.name == "tiny"
    card = (out / "tiny.md").read_text()
    assert "three pictures" in card and "Real-ESRGAN" in card and "4 of 4 steps" in card and "Apache-2.0" in card
    again = subprocess.run(_command(folder, settings, out), capture_output=True, text=True, check=True, env=environment)
    assert "stopped" not in again.stdout, "it is done"
    settings.write_text(SETTINGS.replace("STEPS", "no"))
    wrong = subprocess.run(_command(folder, settings, out), capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "tiny.toml" in wrong.stderr and "Traceback" not in wrong.stderr


def test_half_the_size(make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path) -> None:
    """Exported as fp16; what is learnt is not rounded."""
    half = msgspec.structs.replace(SHORT, stored="fp16")
    assert trained(half, make_inputs(half), tmp_path / "half") == trained(SHORT, make_inputs(SHORT), tmp_path / "whole")
    small, large = ((tmp_path / name / "tiny-x2.safetensors").read_bytes() for name in ("half", "whole"))
    picture = np.random.default_rng(1).integers(0, 256, (1, 20, 20, 3), dtype=np.uint8)
    assert np.abs(loading.load(small)(picture).astype(int) - loading.load(large)(picture)).max() <= 1
    assert {str(value.dtype) for value in loading.read(small)[1].values()} == {"torch.float16"}
    assert "fp16" in (tmp_path / "half" / "tiny-x2.md").read_text()


def test_a_signal_stops_it_between_steps_and_it_goes_on(folder: Path, tmp_path: Path) -> None:
    settings, out = tmp_path / "tiny.toml", tmp_path / "out"
    settings.write_text(SETTINGS.replace("STEPS", "100000"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        _command(folder, settings, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        limit = time.monotonic() + 120
        while len(log.read(out / "log.jsonl")) < 3:
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "goes on from here" in output
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == log.read(out / "log.jsonl")[-1].step


def test_curves(make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `train`)")
    assert curves.draw(tmp_path) is None, "nothing is logged yet"
    trained(TRAINING, make_inputs(TRAINING), tmp_path)
    path = curves.draw(tmp_path)
    assert path is not None
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20, "something is drawn"


SHRINKING = Training(
    architecture="Shrinker",
    arguments={"num_feat": 8, "num_conv": 1, "reduction": 2},
    enlarger="lite-x2",
    degradation=StoreDegradation(versions=2),
    stages=[
        Stage(
            name="shrink-x2",
            steps=30,
            batch=2,
            patch=32,
            warm_up=2,
            learning_rate=3e-3,
            average=0.5,
            l1=0,
            ssimulacra2=1,
            rate=0.3,
        )
    ],
    validation=1,
    validate_every=30,
    log_every=5,
)


def test_a_shrinker_learns(make_inputs: Callable[[Training], loop.Inputs], tmp_path: Path) -> None:
    """It begins by changing nothing, stopped and resumed it learns the same, and its file makes pictures small."""
    lite = loading.load((Path(__file__).resolve().parents[1] / "weights" / "lite-x2.safetensors").read_bytes())
    inputs = msgspec.structs.replace(make_inputs(SHRINKING), enlarger=lite, enlarger_sha256="0")
    straight = trained(SHRINKING, inputs, tmp_path / "straight")
    losses = [loss for until in (13, None) for loss in trained(SHRINKING, inputs, tmp_path / "again", until=until)]
    assert losses == straight
    assert straight[0]["rate"] == pytest.approx(1)
    assert np.mean([loss["rate"] for loss in straight[-8:]]) < 0.999
    (measured,) = (entry.validation for entry in log.read(tmp_path / "straight" / "log.jsonl") if entry.validation)
    assert set(measured) == {"bytes", "points", "equal"}
    assert "at the same score" in (tmp_path / "straight" / "shrink-x2.md").read_text()
    shrinker = loading.load((tmp_path / "straight" / "shrink-x2.safetensors").read_bytes())
    assert (shrinker.spec.architecture, shrinker.channels) == ("Shrinker", 16)
    full = inputs.learn[0].full
    plain, shrunk = (measure.measure(lite, full, 44, shrinker=used) for used in (None, shrinker))
    assert plain != shrunk and shrunk.bytes == pytest.approx(plain.bytes, rel=0.1)
    other = msgspec.structs.replace(inputs, enlarger_sha256="1")
    with pytest.raises(TrainingError, match="another enlarger"):
        trained(SHRINKING, other, tmp_path / "straight")


def test_what_is_coded_went_through_the_shrinker(folder: Path, tmp_path: Path) -> None:
    model = architectures.Shrinker(num_feat=8, num_conv=1)
    for parameter in model.tail.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    spec = NetworkSpec(
        name="s", architecture="Shrinker", arguments={"num_feat": 8, "num_conv": 1, "reduction": 2}, scale=1, margin=3
    )
    shrinker = loading.load(loading.save(spec, model.state_dict()))
    paths = photographs.find(folder)[:1]
    (plain,) = photographs.load(paths, TRAINING, tmp_path)
    (changed,) = photographs.load(paths, TRAINING, tmp_path, shrinker=shrinker)
    assert np.array_equal(plain.small[0], changed.small[0])
    packed = shrinking.pack(plain.full, plain.small[0], 2, shrinking.alike(plain.levels[0]))
    expected = store_degradation.code(shrinker(packed[None])[0], plain.levels[0])
    assert np.array_equal(changed.small[1], store_degradation.decode(expected))
    assert not np.array_equal(changed.small[1], plain.small[1])


def test_measuring_bytes() -> None:
    curve = [(40.0, 100), (60.0, 400)]
    assert measure.bytes_at(curve, 50) == pytest.approx(200)
    assert measure.bytes_at(curve, 39) is None and measure.bytes_at(curve, 61) is None
    ours = [(30.0, 40), (50.0, 160), (70.0, 640)]  # four fifths, at each score
    between = measure.bytes_between(ours, curve, 30, 60)
    assert between is not None
    whole, better = between
    assert whole == pytest.approx(np.log(0.8), abs=0.01)
    assert better == pytest.approx(whole)
    assert measure.bytes_between(curve, ours, 40, 60) == (pytest.approx(-whole), 0)
    assert measure.bytes_between(curve, ours, 59, 80) is None


def test_the_measuring_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    app = typer.Typer()
    app.command()(measure.main)
    weights = Path(__file__).resolve().parents[1] / "weights" / "lite-x2.safetensors"
    result = CliRunner().invoke(
        app, [str(weights), str(folder), "--level=44", "--level=37", "--level=30", "--crop=80", "--plain"]
    )
    assert result.exit_code == 0, result.output
    rows = [line.split()[1] for line in result.output.splitlines() if line.startswith("│")]
    assert rows[:4] == ["clean", "44", "37", "30"]
    assert rows[-2:] == ["SSIMULACRA2", "Y-PSNR"], "80 pixels are too few for MS-SSIM"
    for wrong, message in (
        (["shrink-lite-x2", str(folder)], "makes pictures small"),
        (["lite-x2", str(folder), "--shrinker=lite-x2"], "does not make pictures 2 times smaller"),
    ):
        error = CliRunner().invoke(app, wrong).exception
        assert isinstance(error, ValueError) and message in str(error)


def test_rates_by_other_measures() -> None:
    """Half the bytes at every value, by whichever measure; none where a measure says nothing."""
    points = [(30.0, 28.0, 9.0, 100), (50.0, 31.0, 14.0, 200), (70.0, 36.0, 20.0, 500)]
    anchor, half = (
        [measure.Version(score=a, psnr=b, ms_ssim=c, bytes=size // share) for a, b, c, size in points]
        for share in (1, 2)
    )
    for field in ("score", "psnr", "ms_ssim"):
        assert measure.bd_rate(anchor, half, field) == pytest.approx(-50)
    small = [msgspec.structs.replace(version, ms_ssim=None) for version in half]
    assert measure.bd_rate(anchor, small, "ms_ssim") is None


def test_structure_in_decibels() -> None:
    full = np.asarray(photograph("chelsea"))
    structure = measure.structure_of(full)
    softer = [np.asarray(Image.fromarray(full).filter(ImageFilter.GaussianBlur(radius))) for radius in (0.5, 1)]
    whole, fine, coarse = map(structure, (full, *softer))
    assert whole is not None and fine is not None and coarse is not None
    assert whole == 60 and 60 > fine > coarse > 0
    score = Original(full).measure(softer[1], ["ms_ssim"])["ms_ssim"]
    assert score == pytest.approx(1 - 10 ** (-coarse / 10))
    assert measure.structure_of(full[:100])(full[:100]) is None


def test_measuring_refined_pictures(folder: Path) -> None:
    network = loading.load((Path(__file__).resolve().parents[1] / "weights" / "lite-x2.safetensors").read_bytes())
    full = photographs.read_rgb(folder / "c.png")
    plain, refined = (measure.measure(network, full, 44, refined=refined) for refined in (False, True))
    assert refined.bytes < 1.1 * plain.bytes
    assert refined != plain


def test_the_shipped_lite_network_beats_bicubic(kodak: list[Path]) -> None:
    """By at least 1 dB on clean pictures, and not only there."""
    network = loading.load((Path(__file__).resolve().parents[1] / "weights" / "lite-x2.safetensors").read_bytes())
    gains: dict[int | None, list[float]] = {None: [], 51: []}
    for path in kodak[::6]:
        full = np.asarray(Image.open(path).convert("RGB"))
        for level, values in gains.items():
            gain = measure.measure(network, full, level)
            values.append(gain.psnr - gain.bicubic)
    assert np.mean(gains[None]) > 1.0
    assert np.mean(gains[51]) > 1.0


def test_the_shipped_pair_goes_from_fidelity_to_texture() -> None:
    """On what a store makes of photographs: step by step less PSNR, at the end sharper, and half way more natural (at
    the end it depends on the photographs; docs/training.md)."""
    files = [(registry.shipped_directory() / f"lite-x2{part}.safetensors").read_bytes() for part in ("", "-texture")]
    shrinker = loading.load(registry.find("shrink-lite-x2").read_bytes())
    fulls = [np.asarray(photograph(name).crop((0, 0, 448, 300))) for name in ("astronaut", "chelsea", "coffee")]
    smalls = [
        shrinker(shrinking.pack(full, shrinking.reduced(full, 2), 2, shrinking.alike(44))[None])[0] for full in fulls
    ]
    decoded = [store_degradation.decode(store_degradation.code(small, 44)) for small in smalls]
    psnr, unnatural, sharp = [], [], []
    for texture in (0, 0.25, 0.5, 0.75, 1):
        network = loading.load(interpolate(*files, texture, "between"))
        views = [network(small[None])[0] for small in decoded]
        psnr.append([y_psnr(full, view) for full, view in zip(fulls, views, strict=True)])
        unnatural.append(np.mean([niqe(view) or 0 for view in views]))
        edges = [np.asarray(Image.fromarray(view).convert("L").filter(ImageFilter.FIND_EDGES)) for view in views]
        sharp.append(np.mean([np.square(edge.astype(float)).mean() for edge in edges]))
    assert all(np.diff(np.mean(psnr, axis=1)) < 0), psnr
    assert unnatural[2] < unnatural[0], unnatural
    assert sharp[-1] > sharp[0], sharp
