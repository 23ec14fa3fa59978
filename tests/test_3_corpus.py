"""Views of other people's files: camera files, and odd and damaged ones of every kind, from ../shared.

A view is made of each (its pixels slightly softened stand in for a rebuilt picture), or a reason is given; programs
that know each format must find the views valid, and exiftool must print the same of them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from esrfs import formats
from esrfs.formats import kinds

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
FOLDERS = ("photos", "odd", "eval/kodak24")
LIMIT = 50.0
VALIDATORS = {
    "jpeg": ["jpeginfo", "-c"],
    "png": ["pngcheck", "-q"],
    "webp": ["webpinfo", "-quiet"],
    "tiff": ["tiffinfo", "-D"],
}

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")


def files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (SHARED / folder).rglob("*") if path.is_file())


def softer(pixels: formats.Pixels) -> formats.Pixels:
    colours = pixels[:, :, :1] if pixels.shape[2] < 3 else pixels[:, :, :3]
    image = Image.fromarray(np.ascontiguousarray(colours.squeeze(2) if colours.shape[2] == 1 else colours))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)))


@pytest.fixture(scope="module")
def views() -> Iterator[tuple[Path, Path, dict[str, list[str]]]]:
    """Folders with originals and with their views, by the same names; and the names by kind."""
    with tempfile.TemporaryDirectory() as folder:
        originals, made = Path(folder, "originals"), Path(folder, "views")
        originals.mkdir()
        made.mkdir()
        names: dict[str, list[str]] = {kind: [] for kind in kinds.COMPACTED}
        for number, path in enumerate(files()):
            data = path.read_bytes()
            try:
                split = formats.split(data, LIMIT)
                pixels = split.pixels()
                view = formats.fit_view(split, softer(pixels))
            except formats.Unsupported as error:
                assert error.message
                continue
            except formats.DoesNotFit:
                continue
            result = view.expand()
            assert len(result) == len(data), path
            again = formats.split(result, LIMIT).pixels()
            assert again.shape == pixels.shape, path
            if pixels.shape[2] in (2, 4):
                assert np.array_equal(again[:, :, -1], pixels[:, :, -1]), path
            assert formats.encode_scan(
                view.coding, split.width, split.height, softer(pixels), len(view.scan)
            ) == view.scan, path  # fmt: skip
            name = f"{number:04}{path.suffix.lower()}"
            (originals / name).write_bytes(data)
            (made / name).write_bytes(result)
            names[split.kind].append(name)
        yield originals, made, names


@pytest.mark.slow
def test_most_photographs_have_views(views: tuple[Path, Path, dict[str, list[str]]]) -> None:
    counts = {kind: len(names) for kind, names in views[2].items()}
    assert counts["jpeg"] > 90
    assert counts["png"] > 40
    assert min(counts.values()) > 0, counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALIDATORS)
def test_programs_find_them_as_valid_as_the_originals(
    views: tuple[Path, Path, dict[str, list[str]]], kind: str
) -> None:
    """No program may complain of a view that does not complain of its original."""
    originals, made, names = views
    program = VALIDATORS[kind]
    if shutil.which(program[0]) is None:
        pytest.skip(f"{program[0]} is not installed")
    for name in names[kind]:
        before, after = (
            subprocess.run([*program, name], cwd=folder, capture_output=True, check=False, text=True, errors="replace")
            for folder in (originals, made)
        )
        assert after.returncode == 0 or before.returncode != 0, (name, after.stdout, after.stderr)
        if kind in ("tiff", "jpeg"):
            assert ("rror" in after.stderr + after.stdout) <= ("rror" in before.stderr + before.stdout), after


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_exiftool_prints_the_same(views: tuple[Path, Path, dict[str, list[str]]]) -> None:
    before, after = (_printed(folder) for folder in views[:2])
    assert before.keys() == after.keys()
    for name, metadata in before.items():
        assert after[name] == metadata, name


def _printed(folder: Path) -> dict[str, Any]:
    command = ["exiftool", "-j", "-G", "-struct", "-a", "-r", "-x", "System:all", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return {each["SourceFile"]: each for each in json.loads(done.stdout)}
