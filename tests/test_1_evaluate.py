"""Measures, curves, the grid and the results file of ``esrfs evaluate``; no process is started here."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.interpolate import PchipInterpolator
from skimage.metrics import structural_similarity

from esrfs.evaluate import (
    codecs,
    comparison,
    crops,
    curves,
    grid,
    measures,
    niqe,
    page,
    plots,
    requirements,
    results,
    trial,
)
from esrfs.evaluate.curves import Comparison
from esrfs.evaluate.results import Kept, Result, Way
from esrfs.formats.samples import as_bytes
from esrfs.networks import loading
from tests.conftest import photograph


@pytest.fixture(scope="module")
def coffee() -> np.ndarray:
    return np.asarray(photograph("coffee"))


def result(picture: str, way: Way, setting: str, size: int | None, **values: float | None) -> Result:
    return Result(
        picture=picture, sha256=picture * 4, way=way, setting=setting, made_by="test", width=100, height=80,
        original_bytes=9000, kind="jpeg", bytes=size, measures=values, store_seconds=0.008, restore_seconds=0.004,
    )  # fmt: skip


# ---- measures


def test_ssim_is_that_of_scikit_image(coffee):
    version = codecs.load("jpeg").decode(codecs.load("jpeg").encode(coffee, 40))
    luma = [np.asarray(Image.fromarray(each).convert("L"), dtype=float) for each in (coffee, version)]
    _, map_ = structural_similarity(
        *luma, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
    )
    expected = map_[5:-5, 5:-5].mean()  # where the window lies inside
    assert measures.Original(coffee).measure(version, ["ssim"])["ssim"] == pytest.approx(expected, abs=2e-5)


def test_measures_fall_with_quality_and_know_the_original(coffee):
    original = measures.Original(coffee)
    codec = codecs.load("jpeg")
    found = [
        original.measure(codec.decode(codec.encode(coffee, quality)), measures.MEASURES) for quality in (10, 30, 80)
    ]
    for name, about in measures.MEASURES.items():
        values = [each[name] for each in found]
        assert values == sorted(values, reverse=not about.reference), name
    same = original.measure(coffee, measures.MEASURES)
    assert (same["ssim"], same["ms_ssim"], same["psnr"]) == (1, 1, 99)
    assert same["ssimulacra2"] == pytest.approx(100, abs=0.02)


def test_ms_ssim_is_the_published_product():
    """Wang, Simoncelli, Bovik 2003, by definition: contrast-structure at five resolutions, luminance at the last."""
    rng = np.random.default_rng(1)
    a = np.asarray(photograph("camera"), dtype=float)
    b = np.clip(np.round(a + rng.normal(0, 12, a.shape)), 0, 255)
    product, first, second = 1.0, a, b
    for index, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mu1, mu2 = _window(first), _window(second)
        variance = [_window(first**2) - mu1**2, _window(second**2) - mu2**2, _window(first * second) - mu1 * mu2]
        structure = (2 * variance[2] + 58.5225) / (variance[0] + variance[1] + 58.5225)
        luminance = (2 * mu1 * mu2 + 6.5025) / (mu1**2 + mu2**2 + 6.5025)
        product *= (structure * (luminance if index == 4 else 1)).mean() ** weight
        first, second = (each.reshape(each.shape[0] // 2, 2, -1, 2).mean(axis=(1, 3)) for each in (first, second))
    pixels = [np.repeat(each.astype(np.uint8)[:, :, None], 3, axis=2) for each in (a, b)]
    assert measures.Original(pixels[0]).measure(pixels[1], ["ms_ssim"])["ms_ssim"] == pytest.approx(product, abs=1e-4)


def _window(plane: np.ndarray) -> np.ndarray:
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights /= weights.sum()
    down = np.apply_along_axis(np.convolve, 0, plane, weights, "valid")
    return np.apply_along_axis(np.convolve, 1, down, weights, "valid")


def test_small_pictures_have_no_ms_ssim_and_no_niqe(coffee):
    small = np.ascontiguousarray(coffee[:80, :100])
    found = measures.Original(small).measure(small, measures.MEASURES)
    assert (found["ms_ssim"], found["niqe"]) == (None, None)
    assert found["ssim"] == 1


def test_niqe_notices_blur_noise_and_blocks(coffee):
    natural = niqe.niqe(coffee)
    blurred = niqe.niqe(np.asarray(Image.fromarray(coffee).filter(ImageFilter.GaussianBlur(2))))
    noisy = coffee + np.random.default_rng(0).normal(0, 25, coffee.shape)
    assert natural + 1 < blurred
    assert natural + 1 < niqe.niqe(np.clip(noisy, 0, 255).astype(np.uint8))
    assert natural < 5


def test_niqe_finds_the_shape_of_noise_that_it_is_given():
    """Gaussian noise has shape 2, Laplacian 1; a lopsided one has different widths."""
    rng = np.random.default_rng(5)
    patches = np.stack([rng.normal(0, 1, (200, 200)), rng.laplace(0, 1, (200, 200))])
    shape, mean, left, right = niqe._asymmetric_gaussian(patches)
    assert shape == pytest.approx([2, 1], abs=0.05)
    assert mean == pytest.approx([0, 0], abs=0.05)
    assert left == pytest.approx(right, rel=0.05)
    assert left[0] == pytest.approx(math.sqrt(2), rel=0.02)  # exp(-(x / width)²): width is √2 σ
    lopsided = np.where(patches[:1] < 0, patches[:1], 3 * patches[:1])
    _, mean, left, right = niqe._asymmetric_gaussian(lopsided)
    assert mean[0] > 0.5
    assert right[0] / left[0] == pytest.approx(3, rel=0.1)


# ---- codecs, shrinking, growing


@pytest.mark.parametrize("name", codecs.NAMES)
def test_codecs_give_more_bytes_and_more_likeness_at_higher_quality(name, coffee):
    codec = codecs.load(name)
    part = np.ascontiguousarray(coffee[:120, :160])
    encoded = [codec.encode(part, quality) for quality in (codec.qualities[0], codec.qualities[-1])]
    assert len(encoded[0]) < len(encoded[1])
    original = measures.Original(part)
    scores = [original.measure(as_bytes(codec.decode(data)), ["psnr"])["psnr"] for data in encoded]
    assert scores[0] < scores[1]
    assert codec.encode(part, 50) == codec.encode(part, 50)
    assert list(codec.qualities) == sorted(set(codec.qualities))
    assert list(codec.small_qualities) == sorted(set(codec.small_qualities))


def test_jxl_distances_are_those_of_libjxl():
    assert [codecs.jxl_distance(quality) for quality in (100, 90, 30)] == pytest.approx([0, 1, 6.4])
    assert codecs.jxl_distance(29.999) == pytest.approx(codecs.jxl_distance(30), abs=0.01)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", trial.SHRINKS)
def test_what_is_shrunk_and_grown_lies_where_it_lay(scale, kernel, coffee):
    part = np.ascontiguousarray(coffee[:149, :203])
    small = trial.shrunk(part, scale, kernel)
    assert small.shape == (-(-149 // scale), -(-203 // scale), 3)
    for how in trial.GROWS:
        large = trial.grown(small, scale, how, 149, 203)
        assert large.shape == part.shape
        shifted = np.roll(large, 1, axis=1)
        assert np.abs(large.astype(int) - part).mean() <= np.abs(shifted.astype(int) - part).mean()


def test_gray_and_transparency():
    assert trial.as_rgb(np.full((4, 5, 1), 7, np.uint8)).shape == (4, 5, 3)
    assert trial.as_rgb(np.full((4, 5, 2), 7, np.uint8)).tolist() == np.full((4, 5, 3), 7).tolist()
    assert trial.as_rgb(np.zeros((4, 5, 4), np.uint8)).shape == (4, 5, 3)


# ---- curves

ANCHOR = [(1358.24, 34.851), (2486.44, 36.845), (4593.60, 38.615), (9487.76, 40.037)]
TEST = [(1356.24, 34.987), (2451.52, 36.970), (4469.00, 38.651), (9787.80, 40.121)]
"""kbit/s and dB of two encoders, the example that implementations of BD-rate are commonly checked with."""


def test_bd_rate_of_the_common_example():
    assert curves.bd_rate(ANCHOR, TEST) == pytest.approx(-4.4, abs=0.3)
    assert curves.bd_rate(TEST, ANCHOR) == pytest.approx(4.6, abs=0.3)


def test_bd_rate_is_the_mean_difference_of_log_bytes():
    """By definition, with a fine sum instead of the spline's integral."""
    low, high = 34.987, 40.037
    values = np.linspace(low, high, 20_001)
    logs = []
    for points in (ANCHOR, TEST):
        sizes, reached = zip(*points, strict=True)
        logs.append(PchipInterpolator(reached, np.log(sizes))(values))
    expected = 100 * (math.exp((logs[1] - logs[0]).mean()) - 1)
    assert curves.bd_rate(ANCHOR, TEST) == pytest.approx(expected, abs=0.01)


def test_bd_rate_of_a_curve_that_takes_half_is_minus_50():
    half = [(size / 2, value) for size, value in ANCHOR]
    assert curves.bd_rate(ANCHOR, half) == pytest.approx(-50)
    assert curves.bd_rate(ANCHOR, ANCHOR) == pytest.approx(0)


def test_no_bd_rate_without_overlap_or_points():
    assert curves.bd_rate(ANCHOR, [(size, value + 20) for size, value in ANCHOR]) is None
    assert curves.bd_rate(ANCHOR, [(size, value + 4.9) for size, value in ANCHOR]) is None
    assert curves.bd_rate(ANCHOR, TEST[:2]) is None


def test_a_curve_has_only_points_worth_their_bytes():
    way = Way("avif")
    points = [(300, 50.0), (100, 20.0), (200, 60.0), (400, 60.0), (500, 70.0), (600, None), (None, 90.0)]
    found = curves.curve([result("a", way, "1", size, psnr=value) for size, value in points], "psnr")
    assert found == [(100, 20.0), (200, 60.0), (500, 70.0)]


def test_bytes_and_values_between_points():
    points = [(100.0, 20.0), (200.0, 40.0), (400.0, 60.0)]  # straight in log bytes
    assert curves.bytes_at(points, 50) == pytest.approx(200 * math.sqrt(2))
    assert curves.value_at(points, 200 * math.sqrt(2)) == pytest.approx(50)
    assert curves.bytes_at(points, 61) is None
    assert curves.value_at(points, 99) is None
    assert curves.bytes_at(points[:1], 20) is None


def _two_codecs() -> list[Result]:
    made = []
    for picture, factor in (("a", 1), ("b", 3)):
        for setting, size, score in (("10", 100, 40.0), ("50", 200, 60.0), ("90", 400, 80.0)):
            made.append(result(picture, Way("avif"), setting, size * factor, ssimulacra2=score))
            if (picture, setting) != ("b", "90"):
                made.append(result(picture, Way("jpeg"), setting, size * factor * 2, ssimulacra2=score))
    return made


def test_comparisons_are_per_picture_and_say_of_how_many():
    compared = Comparison(_two_codecs())
    avif, jpeg = Way("avif"), Way("jpeg")
    assert compared.relative_bytes(avif, jpeg, "ssimulacra2", 50) == curves.Mean(pytest.approx(2), 2)
    assert compared.relative_bytes(avif, jpeg, "ssimulacra2", 70) == curves.Mean(pytest.approx(2), 1)
    assert compared.relative_bytes(avif, jpeg, "ssimulacra2", 85) is None
    assert compared.ratio_at(avif, "ssimulacra2", 60) == curves.Mean(pytest.approx(math.sqrt(45 * 15)), 2)
    assert compared.values_at_ratio(avif, "ssimulacra2", 30) == pytest.approx([40, 20 * math.log2(300 / 100) + 40])
    assert [point[1] for point in compared.mean_points(jpeg, "ssimulacra2")] == [40, 60]  # one picture lacks 90
    assert compared.seconds_per_megapixel(avif) == (1.0, 0.5)


# ---- the grid


def picture(name: str = "a.png", sha256: str = "00") -> trial.Picture:
    return trial.Picture(trial.Path(name), name, sha256)


def test_the_grid_has_every_combination_once():
    choice = grid.Choice(networks=("lite-x2",))
    plan = grid.plan([picture()], choice)
    keys = [(each.codec, each.scale, each.shrink, each.setting) for each in plan.trials]
    assert len(keys) == len(set(keys))
    ways = {(each.scale, grow) for each in plan.trials if each.codec == "webp" for grow, _ in each.grows}
    assert ways == {(1, ""), *((scale, grow) for scale in (2, 3, 4) for grow in trial.GROWS), (2, "lite-x2")}
    assert {each.shrink for each in plan.trials if each.scale > 1} == set(trial.SHRINKS)
    assert [each.setting for each in plan.trials if each.codec == "esrfs"] == ["faithful", "high", "balanced", "small"]
    quick = grid.plan([picture()], grid.Choice(networks=("lite-x2",), quick=True))
    assert len(quick.trials) < len(plan.trials) / 3
    assert {each.shrink for each in quick.trials if each.scale > 1} == {"bicubic"}


def test_results_of_other_code_do_not_count(monkeypatch, tmp_path):
    choice = grid.Choice(codecs=("esrfs",), presets=("high",))
    made_by = {grid.plan([picture()], choice).trials[0].grows[0][1]}
    package = tmp_path / "esrfs"
    for name in ("compaction", "formats", "engine", "evaluate"):
        (package / name).mkdir(parents=True)
    for name in (
        "reconstruction.py", "compaction/planner.py", "formats/jpeg.py", "engine/tiles.py", "evaluate/trial.py"
    ):  # fmt: skip
        (package / name).write_text("one")
    monkeypatch.setattr(grid.esrfs, "__file__", str(package / "__init__.py"))
    for changed in ("compaction/planner.py", "evaluate/trial.py"):
        (package / changed).write_text("two")
        grid.own_version.cache_clear()
        made_by.add(grid.plan([picture()], choice).trials[0].grows[0][1])
    grid.own_version.cache_clear()
    assert len(made_by) == 3


def test_the_networks_that_are_here_are_all_tried_at_their_scale():
    plan = grid.plan([picture()], grid.Choice(codecs=("jpeg",)))
    found = {grow: each.scale for each in plan.trials for grow, _ in each.grows if grow and grow not in trial.GROWS}
    listed = {name: grid._network(name).scale for name in grid.registry.enlargers()}
    assert found == {name: scale for name, scale in listed.items() if name != "lite-x2-texture"}
    assert "lite-x2" in found


def test_networks_for_texture_are_tried_when_they_are_named():
    """What is known of a network decides, not what it is called."""
    weights = grid.registry.file_or_name("lite-x2").read_bytes()
    spec, tensors = loading.read(weights)
    shipped, for_texture = set(grid.registry.enlargers()), set(grid.registry.textured())
    assert "lite-x2" in shipped - for_texture and "lite-x2-texture" in for_texture
    directory = grid.registry.user_directory()
    directory.mkdir(parents=True)
    for name, texture in (("sharp", 0.25), ("plain-texture", 0.0)):
        described = msgspec.structs.replace(spec, name=name, texture=texture)
        (directory / f"{name}.safetensors").write_bytes(loading.save(described, tensors))
    choice = grid.Choice(codecs=("jpeg",), scales=(2,))
    plan = grid.plan([picture()], choice)
    tried = {grow for each in plan.trials for grow, _ in each.grows} - set(trial.GROWS)
    assert tried == (shipped - for_texture) | {"plain-texture"}
    assert {line.partition(" is not tried")[0] for line in plan.left_out} == for_texture | {"sharp"}
    named = grid.plan([picture()], dataclasses.replace(choice, networks=("sharp", "lite-x2-texture")))
    assert {grow for each in named.trials for grow, _ in each.grows} - set(trial.GROWS) == {"sharp", "lite-x2-texture"}
    assert not named.left_out
    assert not grid.plan([picture()], dataclasses.replace(choice, scales=(1,))).left_out


def test_networks_that_nothing_would_use_are_not_told_of():
    assert not grid.plan([picture()], grid.Choice(codecs=("esrfs",))).left_out


def test_a_network_whose_scale_is_not_tried_is_told():
    (told,) = grid.plan([], grid.Choice(codecs=("jpeg",), scales=(1, 3), networks=("lite-x2",))).left_out
    assert told == "lite-x2 is not tried: it enlarges by 2, and the scales are 1, 3"


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (grid.Choice(codecs=("gif",)), "gif.*jpeg"),
        (grid.Choice(scales=(5,)), "5.*1, 2, 3, 4"),
        (grid.Choice(scales=()), "no scale to try"),
        (grid.Choice(shrinks=("nearest",)), "nearest.*area"),
        (grid.Choice(grows=("sinc",)), "sinc.*lanczos"),
        (grid.Choice(presets=("tiny",)), "tiny.*small"),
        (grid.Choice(measures=("vmaf",)), "vmaf.*ssim"),
        (grid.Choice(codecs=("jpeg",), anchor="avif"), "compared with 'avif'.*jpeg"),
        (grid.Choice(codecs=("jpeg",), anchor="jpeg", scales=(2,)), "1 one of the scales"),
        (grid.Choice(codecs=("jpeg", "esrfs"), anchor="esrfs"), "compared with 'esrfs'"),
        (grid.Choice(qualities=(0,)), "1 to 100"),
    ],
)
def test_choices_that_can_not_be_had_are_told(choice, said):
    with pytest.raises(grid.ChoiceError, match=said):
        grid.plan([], choice)


def test_a_network_that_is_not_here_or_damaged_is_told():
    with pytest.raises(grid.registry.WeightsError, match="nobody"):
        grid.plan([], grid.Choice(networks=("nobody",)))
    directory = grid.registry.user_directory()
    directory.mkdir(parents=True)
    (directory / "torn.safetensors").write_bytes(grid.registry.find("lite-x2").read_bytes()[:5000])
    with pytest.raises(grid.registry.WeightsError, match="the network torn can't be used"):
        grid.plan([], grid.Choice(networks=("torn",)))
    plan = grid.plan([picture()], grid.Choice(codecs=("jpeg",)))
    assert any("the network torn can't be used" in line for line in plan.left_out), "the others are tried"
    assert "lite-x2" in {grow for each in plan.trials for grow, _ in each.grows}


# ---- results


def test_results_are_kept_and_a_torn_line_costs_itself_only(tmp_path):
    first, second = _two_codecs()[:2]
    with Kept(tmp_path) as kept:
        kept.add([first])
    path = tmp_path / results.FILE
    path.write_bytes(path.read_bytes() + b'{"picture": "torn')
    with Kept(tmp_path) as kept:
        assert list(kept.read().values()) == [first]
        kept.add([second])
        assert list(kept.read().values()) == [first, second]


def test_a_full_disk_is_told_once_and_costs_what_did_not_fit(tmp_path):
    first, second = _two_codecs()[:2]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Kept(tmp_path) as kept:
        kept.add([first])
        size = (tmp_path / results.FILE).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        try:
            with pytest.raises(OSError, match=rf"File too large.*{results.FILE}"):
                kept.add([second])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with Kept(tmp_path) as kept:
        assert list(kept.read().values()) == [first]
        kept.add([second])
        assert list(kept.read().values()) == [first, second]


def test_measures_that_come_later_join_those_that_were_there(tmp_path):
    with Kept(tmp_path) as kept:
        kept.add([result("a", Way("avif"), "1", 5, psnr=30.0), result("a", Way("avif"), "1", 5, ssim=0.5)])
        (found,) = kept.read().values()
    assert found.measures == {"psnr": 30.0, "ssim": 0.5}


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with Kept(tmp_path), pytest.raises(results.BusyError, match="another run"):
        Kept(tmp_path)


# ---- the page


def test_the_page_is_one_file_with_text_for_everything_that_is_drawn(tmp_path):
    store = Way("esrfs", 0, "", "lite-x2")
    refused = msgspec.structs.replace(result("b", store, "high", None), note="quality: <no>")
    several = [*_two_codecs(), result("a", store, "high", 150, ssimulacra2=70.0), refused]
    run = comparison.Run("esrfs evaluate <x>", [], {"notes.txt": "no picture"}, [], ("ssimulacra2",), "avif", 0)
    (tmp_path / "report.html").write_bytes(page.as_html(comparison.make(Comparison(several), run)))
    text = (tmp_path / "report.html").read_text()
    assert "esrfs evaluate &lt;x&gt;" in text
    assert "notes.txt: no picture" in text
    assert "refused (quality)" in text
    assert "+100.0 %" in text
    assert text.count('role="img" aria-label="') == text.count("<svg") > 0
    assert "prefers-color-scheme: dark" in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text), "something is loaded from elsewhere"
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "#0102" not in text, "a placeholder colour was left"


def test_plots_are_the_same_each_time():
    def draw() -> str:
        return plots.lines(
            "x", [plots.Line("a & b", [(1, 2), (2, 3)]), plots.Line("c", [(1, 1)], True)], "x", "y", log_x=True
        )

    assert draw() == draw()
    assert "var(--line-1)" in draw()
    assert "a &amp; b" in draw()
    assert plots.bars("y", ["one", "two"], [3, 0], "files") == plots.bars("y", ["one", "two"], [3, 0], "files")


def test_crops_show_the_busiest_part():
    pixels = np.full((400, 600, 3), 90, np.uint8)
    pixels[210:390, 390:590] = np.random.default_rng(2).integers(0, 255, (180, 200, 3))
    top, left = crops.busiest(pixels, 192)
    assert (top, left) == (192, 384)


def test_the_csv_has_every_column(tmp_path):
    table = results.rows(_two_codecs(), ["ssimulacra2"])
    (tmp_path / "r.csv").write_bytes(results.as_csv(table, ["ssimulacra2"]))
    header, first, *rest = (tmp_path / "r.csv").read_text().splitlines()
    assert header.split(",") == list(table[0])
    assert len(rest) == len(table) - 1
    assert first.startswith("a,aaaa,100,80,jpeg,9000,avif,1,,,10,100,0.1,90.0,40.0,")
    json.dumps(table)


def test_what_is_missing_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(requirements, "REPORT", ("numpy", "no_such_package"))
    with pytest.raises(requirements.MissingError, match=r"no_such_package.*pip install 'esrfs\[report\]'"):
        requirements.check()
