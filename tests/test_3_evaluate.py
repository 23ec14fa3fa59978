"""``esrfs evaluate`` as a command: worker processes, going on where a run stopped, what it says."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from esrfs.blob import recipe as recipe_format
from esrfs.cli import evaluating, main
from esrfs.evaluate import grid, requirements, trial
from esrfs.exit_codes import ExitCode
from tests.conftest import photograph


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    photograph("coffee").crop((200, 100, 392, 260)).save(folder / "coffee.png")
    photograph("astronaut").crop((100, 0, 267, 181)).save(folder / "sub" / "astronaut.jpg", quality=95)
    (folder / "notes.txt").write_text("Not a picture.\n")
    (folder / ".hidden.png").write_bytes((folder / "coffee.png").read_bytes())
    return folder


def run(*arguments: str | Path) -> int:
    return main.run(["esrfs", "evaluate", *map(str, arguments)])


QUALITIES = "30,60,90"
SMALL = ["--codecs", "jpeg,webp", "--scales", "1,2", "--shrinks", "area", "--networks", "lite-x2"]
SMALL += ["--qualities", QUALITIES]
SMALL += ["--metrics", "ssimulacra2,psnr", "--crops", "1"]


def test_a_second_run_goes_on_where_the_first_stopped(pictures, tmp_path, capsys):
    out = tmp_path / "report"
    assert run(pictures, "-o", out, *SMALL, "--jobs", "2") == ExitCode.OK
    said = capsys.readouterr()
    assert said.out.split() == [str(out / name) for name in ("report.html", "results.csv", "results.json")]
    assert "notes.txt is left out" in said.err
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    # 2 pictures × 2 codecs × 3 qualities × (whole + bicubic, lanczos, network)
    assert len(rows) == 2 * 2 * 3 * 4
    assert {row["picture"] for row in rows} == {"coffee.png", "sub/astronaut.jpg"}
    assert all(row["ssimulacra2"] and row["psnr"] and float(row["ratio"]) > 0 for row in rows)
    assert json.loads((out / "results.json").read_text())[0]["bytes"] == int(rows[0]["bytes"])
    page = (out / "report.html").read_text()
    assert "WebP 1/2 area → lite-x2" in page
    assert page.count("data:image/webp") == 3
    first = {
        name: (out / name).read_bytes() for name in ("results.jsonl", "results.csv", "results.json", "report.html")
    }
    assert run(pictures, "-o", out, *SMALL, "--jobs", "1") == ExitCode.OK
    for name, content in first.items():
        assert (out / name).read_bytes() == content, name
    more = [*SMALL, "--jobs", "1"]
    more[more.index(QUALITIES)] = "30,60,90,95"
    assert run(pictures / "coffee.png", "-o", out, *more) == ExitCode.OK
    assert (out / "results.jsonl").read_bytes().startswith(first["results.jsonl"])
    assert len((out / "results.jsonl").read_bytes().splitlines()) == len(rows) + 2 * 4
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == 2 * 4 * 4


def test_ctrl_c_ends_it_and_keeps_what_is_done(pictures, tmp_path):
    out = tmp_path / "report"
    arguments = [pictures, "-o", out, "--codecs", "avif,webp,jpeg", "--jobs", "2"]
    # What a shell starts in the background, as CI may be, ignores Ctrl-C, and so would all that it starts.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += "from esrfs.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "evaluate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not ((out / "results.jsonl").exists() and (out / "results.jsonl").stat().st_size):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == ExitCode.INTERRUPTED
    assert errors.replace("esrfs: notes.txt", "") == ""
    done = (out / "results.jsonl").read_bytes()
    assert done.endswith(b"\n")
    assert not (out / "report.html").exists()
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):  # no worker is left
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_the_store_s_own_way_is_that_of_compaction(pictures, monkeypatch):
    packed = []
    pack = trial.container.pack

    def remember(avif: bytes, recipe: bytes, store: bytes, sha256: bytes) -> bytes:
        packed.append(recipe_format.decode(recipe))
        return pack(avif, recipe, store, sha256)

    monkeypatch.setattr(trial.container, "pack", remember)
    picture = trial.examine(pictures / "sub" / "astronaut.jpg", "a")
    assert isinstance(picture, trial.Picture)
    plan = grid.plan(
        [picture], grid.Choice(codecs=("esrfs",), presets=("small", "faithful"), measures=("ssimulacra2",))
    )
    small, faithful = (trial.run(each)[0] for each in plan.trials)
    assert small.bytes is not None
    assert small.bytes < small.original_bytes
    assert small.note.startswith("scale ")
    assert packed[0].reference, "which takes 32 bytes in every store's blobs"
    assert small.measures["ssimulacra2"] >= 50
    assert small.restore_seconds > 0
    assert small.store_seconds > 0
    assert faithful.bytes is None or faithful.note == "without loss" or faithful.measures["ssimulacra2"] >= 85


def test_networks_grow_by_their_own_scale(pictures):
    picture = trial.examine(pictures / "coffee.png", "a")
    assert isinstance(picture, trial.Picture)
    choice = grid.Choice(codecs=("webp",), scales=(2,), shrinks=("bicubic",), qualities=(90,), measures=("psnr",))
    (only,) = grid.plan([picture], choice).trials
    found = {result.way.grow: result for result in trial.run(only)}
    assert found["lite-x2"].measures["psnr"] > found["bicubic"].measures["psnr"]
    shown = trial.version_of(only, "lite-x2")
    assert shown.shape == trial.original_of(picture).shape
    assert np.abs(shown.astype(int) - trial.original_of(picture)).mean() < 12


def test_what_can_not_be_done_is_told(pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "report"
    assert run(pictures, "-o", out, "--codecs", "gif") == ExitCode.USAGE
    assert "there is no codec 'gif'" in capsys.readouterr().err
    assert run(pictures, "-o", out, "--scales", "two") == ExitCode.USAGE
    assert "--scales takes numbers" in capsys.readouterr().err
    assert run(pictures, "-o", out, "--networks", "nobody") == ExitCode.NETWORK
    assert "there is no network called 'nobody'" in capsys.readouterr().err
    assert run(pictures, "-o", out, "--codecs", "jpeg", "--anchor", "gif") == ExitCode.USAGE
    assert "nothing can be compared with 'gif'" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "-o", out) == ExitCode.FAILED
    assert "there is no file to evaluate" in capsys.readouterr().err
    assert not out.exists()
    assert run(tmp_path / "nowhere", "-o", out) == ExitCode.FAILED
    assert "no such file or folder" in capsys.readouterr().err
    assert run(pictures / "notes.txt", "-o", out, "--jobs", "1") == ExitCode.FAILED
    assert "there is no picture to evaluate: notes.txt this is no picture" in capsys.readouterr().err
    monkeypatch.setattr(requirements, "REPORT", ("no_such_package",))
    assert run(pictures, "-o", out) == ExitCode.FAILED
    assert "pip install 'esrfs[report]'" in capsys.readouterr().err


def test_a_codec_that_can_not_write_a_picture_is_left_out_for_it(tmp_path, capsys):
    """WebP's sides end at 16,383 pixels."""
    photograph("coffee").crop((0, 0, 96, 64)).resize((16400, 64)).save(tmp_path / "wide.png")
    photograph("coffee").crop((0, 0, 96, 64)).save(tmp_path / "small.png")
    small = ["--scales", "1", "--qualities", "50", "--networks", "none", "--metrics", "psnr", "--jobs", "1"]
    out = tmp_path / "report"
    assert run(tmp_path, "-o", out, "--codecs", "jpeg,webp", *small) == ExitCode.OK
    assert capsys.readouterr().err.count("wide.png can't be stored as WebP: ") == 1
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert {(row["picture"], row["codec"]) for row in rows} == {
        ("wide.png", "jpeg"), ("small.png", "jpeg"), ("small.png", "webp"),
    }  # fmt: skip
    assert "stored as WebP" in (out / "report.html").read_text()
    assert run(tmp_path / "wide.png", "-o", tmp_path / "other", "--codecs", "webp", *small) == ExitCode.FAILED
    assert "nothing could be measured: wide.png can't be stored as WebP" in capsys.readouterr().err


def test_files_are_found_once_and_what_can_not_be_looked_into_is_told(pictures, tmp_path, capsys, monkeypatch):
    found = evaluating._find([pictures, pictures / "coffee.png", pictures / "sub"])
    assert [name for _, name in found] == ["coffee.png", "notes.txt", "sub/astronaut.jpg"]
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    assert [name for _, name in evaluating._find([pictures / "sub", copy / "sub"])] == [
        "astronaut.jpg", str(copy / "sub" / "astronaut.jpg"),
    ]  # fmt: skip
    look = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [name for _, name in evaluating._find([pictures])] == ["coffee.png", "notes.txt"]
    assert f"{pictures / 'sub'} is left out: Permission denied" in capsys.readouterr().err


def test_names_that_are_no_text(pictures, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9 <b>.png")
    (pictures / "coffee.png").rename(pictures / name)
    out = tmp_path / "report"
    small = ["--codecs", "jpeg", "--scales", "1", "--qualities", "50", "--networks", "none", "--metrics", "psnr"]
    for _ in range(2):
        assert run(pictures / name, "-o", out, *small, "--jobs", "1") == ExitCode.OK, capsys.readouterr().err
        assert json.loads((out / "results.json").read_text())[0]["picture"] == r"caf\xe9 <b>.png"
        assert r"caf\xe9 &lt;b&gt;.png" in (out / "report.html").read_text()
    assert len((out / "results.jsonl").read_bytes().splitlines()) == 1


def test_bad_pictures_are_refused_with_a_reason(tmp_path):
    photograph("coffee").crop((0, 0, 40, 90)).save(tmp_path / "tiny.png")
    assert trial.examine(tmp_path / "tiny.png", "t") == "40 × 90 pixels are too few to measure"
    (tmp_path / "broken.png").write_bytes((tmp_path / "tiny.png").read_bytes()[:-700])
    assert isinstance(trial.examine(tmp_path / "broken.png", "b"), str)
    assert trial.examine(tmp_path / "gone.png", "g") == "can't be read: No such file or directory"
