"""What training is made of: settings, damage, losses, discriminators, interpolation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from ssimulacra2 import compute_ssimulacra2

from esrfs.cli.main import run
from esrfs.metrics import colour, differentiable
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks import architectures, loading, registry
from esrfs.networks import spec as specs
from esrfs.networks.interpolation import interpolate
from esrfs.train import colour as colour_loss
from esrfs.train import discriminators, features, growth, real_esrgan, settings
from esrfs.train.settings import TrainingError
from tests.conftest import photograph


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other: with anything else running, two are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def _blurred(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width // 2, picture.height // 2)).resize(picture.size)


# ---- settings

TEXT = """
architecture = "SRVGGNetCompact"
arguments = { num_feat = 8, num_conv = 1, upscale = 2, act_type = "prelu" }
degradation = { type = "store" }
[[stages]]
name = "tiny"
steps = 10
"""


def test_settings_are_read() -> None:
    training = settings.parse(TEXT)
    assert training.scale == 2
    assert training.stages[0].l1 == 1
    assert training.degradation == settings.StoreDegradation()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning = 3", "unknown field"),
        ("steps = 0", "positive"),
        ("patch = 20\nssimulacra2 = 0.1", "64 pixels"),
        ('adversarial = 0.1\ndiscriminator = "vgg"', "128 pixels"),
        ("patch = 50\nadversarial = 0.1", "multiple of 8"),
        ("l1 = 0.0", "no loss that ties"),
        ("average = 1.0", "never learn"),
        ("rate = 0.5", "only a shrinker"),
        ("patch = 15\nfeatures = 1.0", "32 pixels"),
        ("patch = 7\ncolour = 0.1", "16 pixels"),
        ("warm_up = -1", "warm_up can't be negative"),
        ("discriminator_width = 0", "width below 1"),
        ("steps = ", "line"),
    ],
)
def test_settings_that_contradict_themselves_are_refused_in_words(change: str, message: str) -> None:
    text = TEXT.replace("steps = 10", change if "steps" in change else f"steps = 10\n{change}")
    with pytest.raises(TrainingError, match=message):
        settings.parse(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tiny"', '"../tiny"', "can't name a network"),
        ("upscale = 2", 'upscale = "two"', "can't be built"),
        ("num_conv = 1", "depth = 1", "can't be built"),
    ],
)
def test_networks_that_can_not_be_built_or_named(old: str, new: str, message: str) -> None:
    with pytest.raises(TrainingError, match=f"the settings: .*{message}"):
        settings.parse(TEXT.replace(old, new))


def test_photographs_are_not_enlarged_without_end() -> None:
    for factor in (0.5, 9.0):
        with pytest.raises(TrainingError, match="enlarged by 1 to 4"):
            settings.parse(TEXT.replace('type = "store"', f'type = "store", enlarged = {factor}'))


def test_settings_by_name(tmp_path: Path) -> None:
    assert settings.read(settings.file_or_name("lite-x2")).stages
    with pytest.raises(TrainingError, match=r"no settings called 'lite-x7'.*lite-x2"):
        settings.file_or_name("lite-x7")
    wrong = tmp_path / "wrong.toml"
    with pytest.raises(TrainingError, match=r"wrong\.toml can't be read: No such file"):
        settings.read(settings.file_or_name(str(wrong)))
    wrong.write_bytes(b"\xff\xfe")
    with pytest.raises(TrainingError, match=r"wrong\.toml is no TOML file"):
        settings.read(wrong)


@pytest.mark.parametrize("change", ["validation = -1", "validate_every = 0", "save_every = 0", "log_every = 0"])
def test_what_a_training_can_not_do_every_0_steps_is_refused(change: str) -> None:
    with pytest.raises(TrainingError, match="must be positive"):
        settings.parse(change + TEXT)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('enlarger = "lite-x2"', "", "say which"),
        ("versions = 2", "versions = 0", "one coded version"),
        ("rate = 0.55", "", "nothing else"),
        ("l1 = 0", "l1 = 1", "nothing else"),
        ("l1 = 0", "l1 = 0\ncolour = 0.1", "nothing else"),
        ("patch = 64", "patch = 60", "multiple of 8"),
        ('"Shrinker"', '"RRDBNet"', "RRDBNet can't be built"),
    ],
)
def test_settings_of_shrinkers(old: str, new: str, message: str) -> None:
    text = (registry.shipped_directory() / "training" / "shrink-lite-x2.toml").read_text()
    assert settings.parse(text).scale == 2
    with pytest.raises(TrainingError, match=message):
        settings.parse(text.replace(old, new, 1))


def test_all_shipped_settings_can_be_read() -> None:
    found = sorted((registry.shipped_directory() / "training").glob("*.toml"))
    assert found
    for path in found:
        training = settings.read(path)
        architectures.build(training.architecture, training.arguments)
        assert all(stage.name for stage in training.stages)


# ---- SSIMULACRA2


def test_differentiable_ssimulacra2_agrees_with_the_reference() -> None:
    """Within .01 of the package ``ssimulacra2``, and of what the gate measures."""
    picture = photograph("chelsea")  # 451×300: odd sizes on the way down
    original, view = np.asarray(picture), np.asarray(_blurred(picture))
    score = differentiable.ssimulacra2(_tensor(original), _tensor(view)).item()
    assert score == pytest.approx(Reference(original).compare(view).score, abs=0.01)


def test_differentiable_ssimulacra2_agrees_on_kodak(kodak: list[Path], tmp_path: Path) -> None:
    for path in kodak[::20]:
        picture = Image.open(path).convert("RGB")
        _blurred(picture).save(tmp_path / "view.png")
        expected = compute_ssimulacra2(str(path), str(tmp_path / "view.png"))
        score = differentiable.ssimulacra2(_tensor(np.asarray(picture)), _tensor(np.asarray(_blurred(picture))))
        assert score.item() == pytest.approx(expected, abs=0.01)


def test_differentiable_ssimulacra2_leads_uphill() -> None:
    picture = photograph("astronaut").crop((100, 0, 228, 128))
    original, view = _tensor(np.asarray(picture)), _tensor(np.asarray(_blurred(picture)))
    start = differentiable.ssimulacra2(original, view).item()
    for _ in range(5):
        view.requires_grad_()
        (gradient,) = torch.autograd.grad(differentiable.ssimulacra2(original, view).sum(), view)
        assert gradient.isfinite().all()
        view = (view + 0.3 * gradient / gradient.norm()).detach()
    assert differentiable.ssimulacra2(original, view).item() > start + 1


def test_differentiable_ssimulacra2_of_a_batch_and_of_extremes() -> None:
    rng = torch.Generator().manual_seed(1)
    originals = torch.rand(2, 3, 64, 72, generator=rng)
    views = originals + 0.1 * torch.randn(2, 3, 64, 72, generator=rng)
    both = differentiable.ssimulacra2(originals, views)
    each = [differentiable.ssimulacra2(originals[i : i + 1], views[i : i + 1]).item() for i in range(2)]
    assert both.tolist() == pytest.approx(each, abs=1e-3)
    same = originals.clone().requires_grad_()
    score = differentiable.ssimulacra2(originals, same)
    score.sum().backward()
    assert score.min() > 99.9
    assert same.grad is not None and same.grad.isfinite().all()
    black = torch.zeros(1, 3, 64, 64, requires_grad=True)
    differentiable.ssimulacra2(originals[:1, :, :, :64], black).sum().backward()
    assert black.grad is not None and black.grad.isfinite().all()
    with pytest.raises(ValueError, match="compared"):
        differentiable.ssimulacra2(originals, views[:1])
    with pytest.raises(ValueError, match="too small"):
        differentiable.ssimulacra2(originals[:, :, :7], views[:, :, :7])


# ---- damage


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("second_order", [True, False])
def test_real_esrgan_damage(scale: int, second_order: bool) -> None:
    full = np.asarray(photograph("coffee").crop((200, 100, 200 + 48 * scale, 100 + 36 * scale)))
    differences = []
    for seed in range(12):
        small = real_esrgan.degrade(full, scale, second_order, np.random.default_rng(seed))
        assert small.shape == (36, 48, 3) and small.dtype == np.uint8
        clean = np.asarray(Image.fromarray(full).resize((48, 36), Image.Resampling.BICUBIC)).astype(int)
        differences.append(np.abs(small - clean).mean())
    assert min(differences) > 0.5, "it damages"
    assert np.median(differences) < 40, "it is still the picture"
    assert np.ptp(differences) > 2, "each time another"
    again = real_esrgan.degrade(full, scale, second_order, np.random.default_rng(0))
    assert np.array_equal(again, real_esrgan.degrade(full, scale, second_order, np.random.default_rng(0)))


@pytest.mark.parametrize(("shape", "beta"), [("gaussian", 1), ("generalised", 0.6), ("generalised", 3), ("plateau", 2)])
def test_blur_kernels(shape: str, beta: float) -> None:
    kernel = real_esrgan.blur_kernel(21, 3.0, 1.2, 0.0, shape=shape, beta=beta)
    assert kernel.shape == (21, 21)
    assert kernel.sum() == pytest.approx(1)
    assert kernel.min() >= 0 and kernel.max() == kernel[10, 10]
    assert np.allclose(kernel, kernel[::-1, ::-1])
    assert kernel[10, 13] > kernel[13, 10], "wider than high"
    turned = real_esrgan.blur_kernel(21, 3.0, 1.2, math.pi / 2, shape=shape, beta=beta)
    assert np.allclose(turned, kernel.T)


def test_the_gaussian_is_one_and_shapes_differ() -> None:
    round_ = real_esrgan.blur_kernel(21, 2.0, 2.0, 0.0)
    x = np.arange(-10, 11)
    assert (round_.sum(0) * x**2).sum() == pytest.approx(4, rel=0.01)  # its variance
    flat = real_esrgan.blur_kernel(21, 2.0, 2.0, 0.0, shape="generalised", beta=4)
    assert flat[10, 11] / flat[10, 10] > round_[10, 11] / round_[10, 10]


def test_the_sinc_filter_keeps_what_is_slow_and_rings_at_edges() -> None:
    kernel = real_esrgan.sinc_kernel(21, math.pi / 3)
    assert kernel.sum() == pytest.approx(1)
    x = np.arange(120, dtype=np.float32)
    waves = {speed: np.tile(0.5 + 0.4 * np.cos(speed * x), (60, 1))[..., None].repeat(3, 2) for speed in (0.3, 2.0)}
    kept = {speed: np.ptp(real_esrgan.filtered(wave, kernel)[20:40, 30:90]) for speed, wave in waves.items()}
    assert kept[0.3] > 0.7 and kept[2.0] < 0.05
    step = np.where(x < 60, 0.25, 0.75).astype(np.float32)
    edge = real_esrgan.filtered(np.tile(step, (60, 1))[..., None].repeat(3, 2), kernel)
    assert edge.max() > 0.77 and edge.min() < 0.23


# ---- the other losses


def test_built_in_features_tell_blur_from_texture() -> None:
    loss = features.BuiltInFeatures()
    picture = photograph("coffee").crop((150, 50, 278, 178))
    original = _tensor(np.asarray(picture))
    assert loss(original, original).item() == 0
    blurred = _tensor(np.asarray(_blurred(picture)))
    brighter = original + (blurred - original).abs().mean()  # by the same L1
    assert loss(blurred, original) > 2 * loss(brighter.clamp(0, 1), original)
    blurred.requires_grad_()
    loss(blurred, original).backward()
    assert blurred.grad is not None and blurred.grad.abs().sum() > 0
    assert torch.equal(features.BuiltInFeatures().second, loss.second), "always the same"
    assert "built-in" in features.build(None).description


def test_vgg19_features_are_taken_before_the_activation(tmp_path: Path) -> None:
    torch.manual_seed(3)
    channels = [c for c in features._VGG19 if c]
    places = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
    state = {"classifier.0.bias": torch.zeros(1)}
    for place, inputs, outputs in zip(places, [3, *channels], channels, strict=False):
        state[f"features.{place}.weight"] = torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5)
        state[f"features.{place}.bias"] = torch.zeros(outputs)
    path = tmp_path / "vgg19.pth"
    torch.save(state, path)
    loss = features.build(path)
    assert "VGG19" in loss.description
    assert isinstance(loss, features.VGGFeatures)
    found = loss._features(torch.rand(1, 3, 32, 32))
    assert [value.shape[1] for value in found.values()] == [64, 128, 256, 512, 512]
    assert all((value < 0).any() for value in found.values()), "activations are never negative"
    del state["features.34.weight"]
    torch.save(state, path)
    with pytest.raises(TrainingError, match="VGG19"):
        features.build(path)
    path.write_text("no weights")
    with pytest.raises(TrainingError, match="can't be read"):
        features.build(path)


def test_the_unet_judges_each_pixel_and_is_normalised() -> None:
    torch.manual_seed(0)
    critic = discriminators.build("unet", 8)
    assert critic(torch.rand(2, 3, 40, 48)).shape == (2, 1, 40, 48)
    for _ in range(30):
        critic(torch.rand(1, 3, 16, 16))
    assert isinstance(critic, discriminators.UNetDiscriminator)
    normalised = [*critic.down, *critic.up, *critic.after]
    assert len(normalised) == 8
    for layer in normalised:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_the_vgg_discriminator_judges_patches() -> None:
    assert discriminators.build("vgg", 4)(torch.rand(2, 3, 128, 128)).shape == (2, 1)


def test_the_relativistic_loss() -> None:
    """Written out for one picture each: softplus of the difference, with the sign that each side wishes."""
    a, b = torch.tensor([[1.5]]), torch.tensor([[0.2]])
    expected = math.log1p(math.exp(-1.3))
    assert discriminators.relativistic(a, b).item() == pytest.approx(expected)
    assert discriminators.relativistic(b, a).item() == pytest.approx(math.log1p(math.exp(1.3)))
    # Only differences count.
    assert discriminators.relativistic(a + 7, b + 7).item() == pytest.approx(expected)
    assert discriminators.relativistic(a, a).item() == pytest.approx(math.log(2))


# ---- colour


def test_colour_as_a_loss_is_near_what_the_gate_measures() -> None:
    """Within a third, for shifts in all directions, and in the same order as the gate's for shifts of one kind."""
    original = np.asarray(photograph("coffee").resize((256, 192)))
    for direction in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, -1, 0), (-1, 0, 2)):
        found = []
        for size in (2, 5):
            view = np.clip(original.astype(int) + size * np.array(direction), 0, 255).astype(np.uint8)
            measured = colour.compare(original, view).mean
            found.append(float(colour_loss.error(_tensor(original), _tensor(view))))
            assert found[-1] == pytest.approx(measured, rel=0.34), (direction, size)
        assert found[0] < found[1]


def test_colour_as_a_loss_does_not_see_texture_and_has_slopes_everywhere() -> None:
    original = np.full((64, 64, 3), 120, np.uint8)
    noise = np.random.default_rng(0).integers(-20, 21, (64, 64, 1))
    noisy = np.clip(original + noise, 0, 255).astype(np.uint8)
    assert float(colour_loss.error(_tensor(original), _tensor(noisy))) < 0.6  # of 7 for each pixel by itself
    for picture in (original, np.zeros_like(original), np.full_like(original, 255), noisy):
        view = _tensor(picture).requires_grad_()
        error = colour_loss.error(_tensor(picture), view)
        assert error.item() < 0.02
        error.backward()  # type: ignore[no-untyped-call]
        assert view.grad is not None and bool(view.grad.isfinite().all())
    drifted = (_tensor(original) + torch.tensor([0.03, 0.0, -0.02]).view(1, 3, 1, 1)).requires_grad_()
    colour_loss.error(_tensor(original), drifted).backward()  # type: ignore[no-untyped-call]
    assert drifted.grad is not None
    means = drifted.grad.mean((0, 2, 3))
    assert means[0] > 0 > means[2], "downhill is back to the original's colour"


# ---- growth


def _compact(width: int, depth: int, scale: int = 2, activation: str = "prelu") -> torch.nn.Module:
    arguments: dict[str, int | str] = {
        "num_feat": width,
        "num_conv": depth,
        "upscale": scale,
        "act_type": activation,
    }
    return architectures.build("SRVGGNetCompact", arguments)


@pytest.mark.parametrize(("width", "depth"), [(6, 2), (9, 2), (6, 5), (11, 4)])
def test_a_network_grows_and_gives_the_same_pictures_at_first(width: int, depth: int) -> None:
    torch.manual_seed(0)
    small, large = _compact(6, 2), _compact(width, depth)
    large.load_state_dict(growth.grown(small.state_dict(), large))
    picture = torch.rand(2, 3, 17, 12)
    expected = small(picture)
    assert torch.allclose(large(picture), expected, atol=1e-6)
    # And then it can learn with all that is new.
    large(picture).sub(torch.rand_like(expected)).abs().mean().backward()
    before = [parameter.detach().clone() for parameter in large.parameters()]
    torch.optim.SGD(large.parameters(), lr=1.0).step()
    large.zero_grad()
    large(picture).sub(torch.rand_like(expected)).abs().mean().backward()
    assert all(bool((value.grad != 0).any()) for value in large.parameters() if value.grad is not None)
    assert len(before) == len(list(large.parameters()))


def test_a_network_that_enlarges_more_begins_with_the_pixels_of_the_other() -> None:
    torch.manual_seed(0)
    small, large = _compact(6, 2), _compact(8, 3, scale=4)
    large.load_state_dict(growth.grown(small.state_dict(), large))
    picture = torch.rand(1, 3, 9, 7)
    repeated = small(picture).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(large(picture), repeated, atol=1e-6)
    thrice = _compact(6, 2, scale=3)
    thrice.load_state_dict(growth.grown(small.state_dict(), thrice))
    nearest = [0, 1, 1]
    places = [2 * pixel + place for pixel in range(7) for place in nearest]
    assert torch.allclose(thrice(picture)[..., 0, :], small(picture)[..., 0, places], atol=1e-6)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (_compact(8, 2), "wider"),
        (_compact(6, 4), "deeper"),
        (_compact(6, 3, scale=4), "enlarges more"),
        (_compact(6, 2, activation="relu"), "prelu"),
        (architectures.build("RRDBNet", {"num_feat": 4, "num_block": 1, "num_grow_ch": 2, "scale": 2}), "can grow"),
    ],
)
def test_what_can_not_grow(start: torch.nn.Module, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        growth.grown(start.state_dict(), _compact(6, 3))


# ---- interpolation


def _network(seed: int, name: str, width: int = 8) -> bytes:
    torch.manual_seed(seed)
    arguments: dict[str, int | str] = {"num_feat": width, "num_conv": 1, "upscale": 2, "act_type": "prelu"}
    model = architectures.build("SRVGGNetCompact", arguments)
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] = -0.0  # must come back with its sign
    description = specs.NetworkSpec(
        name=name, architecture="SRVGGNetCompact", arguments=arguments, scale=2, margin=3, licence="Apache-2.0"
    )
    return loading.save(description, model.state_dict())


def test_interpolation_goes_from_one_network_to_the_other() -> None:
    a, b = _network(1, "a"), _network(2, "b")
    for texture, end in ((0, a), (1, b)):
        tensors, expected = loading.read(interpolate(a, b, texture, "c"))[1], loading.read(end)[1]
        assert {k: v.numpy().tobytes() for k, v in tensors.items()} == {
            k: v.numpy().tobytes() for k, v in expected.items()
        }
        picture = np.random.default_rng(0).integers(0, 256, (1, 9, 11, 3), dtype=np.uint8)
        assert np.array_equal(loading.load(interpolate(a, b, texture, "c"))(picture), loading.load(end)(picture))
    description, between = loading.read(interpolate(a, b, 0.25, "c"))
    assert (description.name, description.scale, description.licence) == ("c", 2, "Apache-2.0")
    assert description.training == {"texture": 0.25, "fidelity": "a", "adversarial": "b"}
    assert description.texture == 0, "of two networks for fidelity"
    spec, tensors = loading.read(b)
    sharp = loading.save(msgspec.structs.replace(spec, texture=1.0), tensors)
    assert loading.read(interpolate(a, sharp, 0.25, "c"))[0].texture == 0.25
    first, second = loading.read(a)[1], loading.read(b)[1]
    for key, value in between.items():
        assert torch.allclose(value, 0.75 * first[key] + 0.25 * second[key], atol=1e-7)


def test_what_interpolation_refuses() -> None:
    with pytest.raises(ValueError, match="one architecture"):
        interpolate(_network(1, "a"), _network(1, "b", width=4), 0.5, "c")
    with pytest.raises(ValueError, match="goes from 0"):
        interpolate(_network(1, "a"), _network(2, "b"), 1.5, "c")


def test_the_interpolate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.safetensors").write_bytes(_network(number, name))
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--texture", "0.5"]
    out = tmp_path / "soft.safetensors"
    assert run(["esrfs", "weights", "interpolate", *arguments, "-o", str(out)]) == 0
    assert "esrfs weights add" in capsys.readouterr().out
    spec = registry.read_spec(out)
    assert spec is not None and spec.name == "soft"
    assert registry.add(out).name == "soft.safetensors"
    assert run(["esrfs", "weights", "interpolate", *arguments, "-o", str(tmp_path / "soft.pth")]) == 2
    assert run(["esrfs", "weights", "interpolate", "lite-x2", arguments[0], "-o", str(out)]) == 11
    assert "one architecture" in capsys.readouterr().err


def test_settings_survive_a_round_trip() -> None:
    """A checkpoint holds them as JSON, and compares them with those of the next run."""
    training = settings.parse(TEXT)
    assert msgspec.json.decode(msgspec.json.encode(training), type=settings.Training) == training
