"""Fixtures that every test may use, and a guard: a test whose log holds an unexpected warning or traceback fails."""

from __future__ import annotations

import importlib.resources
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import remembering_engine
from tests.mounting import Mounted, kill_mounts
from tests.witness import QuickMounted

_REPOSITORY = Path(__file__).resolve().parent.parent
_SHARED = _REPOSITORY.parent / "shared"
"""Images and weights that are not part of the project (see the fixtures below); absent in most places."""

_BEFORE_ITS_LIMIT_SECONDS = 5.0
_EXPECTED = pytest.StashKey[list[str]]()
_TRACEBACK = "Traceback (most recent call last)"

# Tests start some thousand processes. Where bytecode may not be kept, each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# ---- the guard: as in s3ql, warnings that nobody expected are how silent damage shows first


@pytest.fixture
def expect_log(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call with a regular expression: warnings, errors and tracebacks whose text it finds are expected in this test."""
    patterns = request.node.stash.setdefault(_EXPECTED, [])
    return patterns.append


@pytest.fixture(autouse=True)
def _unexpected_log_fails(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    records = [record for phase in ("setup", "call") for record in caplog.get_records(phase)]
    unexpected = [
        f"{record.name}: {record.levelname}: {record.getMessage()}"
        for record in records
        if (record.levelno >= logging.WARNING or record.exc_info) and not _expected(request.node, record.getMessage())
    ]
    if unexpected:
        pytest.fail("unexpected in the log:\n" + "\n".join(unexpected), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Tracebacks that threads and child processes (the mount, the engine) print, whoever started them."""
    report = yield
    # A name that is no text may be in what was printed; reports travel between processes as UTF-8.
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    if report.when == "teardown" and report.passed:
        for title, text in report.sections:
            if title.startswith("Captured std") and _TRACEBACK in text and not _expected(item, text):
                report.outcome = "failed"
                report.longrepr = f"unexpected traceback in {title!r}:\n{text[text.index(_TRACEBACK) :]}"
                break
    return report


def _expected(item: pytest.Item, text: str) -> bool:
    return any(re.search(pattern, text) for pattern in item.stash.get(_EXPECTED, []))


# ---- places


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees or touches the state, cache, weights or sockets of whoever runs it."""
    base = tmp_path / ".xdg"
    for kind in ("STATE", "CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(base / kind.lower()))
    runtime = base / "run"
    runtime.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.delenv("ESRFS_FAULTS", raising=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of images described in ``shared/data/README.md``, beside the checkout; a skip where it is absent."""
    return _present(_SHARED / "data")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """Official weights beside the checkout; a skip where they are absent."""
    return _present(_SHARED / "weights")


@pytest.fixture(scope="session")
def kodak(shared_data: Path) -> list[Path]:
    """Kodak's 24 photographs, 768×512, PNG."""
    return sorted(_present(shared_data / "eval" / "kodak24").glob("*.png"))


@pytest.fixture(scope="session")
def camera_files(shared_data: Path) -> list[Path]:
    """Files as they left cameras and phones, of many kinds; some are broken."""
    return sorted(path for path in _present(shared_data / "photos").rglob("*") if path.is_file())


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.relative_to(_SHARED.parent)} is not beside this checkout")
    return path


@pytest.fixture
def needs() -> Callable[[str], str]:
    """Call with the name of a program: its path, or a skip where it is not installed."""

    def find(program: str) -> str:
        path = shutil.which(program)
        if path is None:
            pytest.skip(f"{program} is not installed")
        return path

    return find


@pytest.fixture
def can_mount() -> None:
    """Skips where FUSE can't be used (in many containers)."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse can't be opened here")
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed (Debian: fuse3)")


# ---- photographs


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image: ``astronaut`` (512×512), ``coffee`` (600×400), ``chelsea`` (451×300), all RGB;
    or ``camera`` (512×512, gray)."""
    with (importlib.resources.files("skimage") / "data" / f"{name}.png").open("rb") as file, Image.open(file) as image:
        return image.convert("L" if image.mode == "L" else "RGB")


def _exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112] = "esrfs", "Test Camera", orientation
    exif[0x0132] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 22.0, 40.8), 3: "E", 4: (8.0, 32.0, 30.0)})
    return exif


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs that compaction is meant for, with EXIF, and files that it must leave alone.

    ``coffee.jpg`` (4:2:0), ``astronaut.jpg`` (4:4:4, orientation 6), ``chelsea.jpg`` (4:2:2), ``camera.jpg`` (gray),
    ``coffee.png``, ``sub/astronaut.png``, ``progressive.jpg``; and ``notes.txt``, ``anim.gif``. Copy it.
    """
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "sub").mkdir()
    astronaut, coffee = photograph("astronaut"), photograph("coffee")
    coffee.save(folder / "coffee.jpg", quality=95, subsampling="4:2:0", exif=_exif())
    astronaut.save(folder / "astronaut.jpg", quality=96, subsampling="4:4:4", exif=_exif(6))
    photograph("chelsea").save(folder / "chelsea.jpg", quality=94, subsampling="4:2:2", exif=_exif())
    photograph("camera").save(folder / "camera.jpg", quality=95, exif=_exif())
    coffee.save(folder / "coffee.png", exif=_exif())
    astronaut.save(folder / "sub" / "astronaut.png")
    (folder / "notes.txt").write_text("Not a photograph.\n")
    astronaut.save(folder / "anim.gif", save_all=True, append_images=[coffee.resize((512, 512))])
    coffee.save(folder / "progressive.jpg", quality=90, progressive=True)
    return folder


@pytest.fixture(scope="session")
def large_photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 12 MP camera-like JPEG (4000×3000, 4:2:0, EXIF), enlarged from a smaller picture."""
    path = tmp_path_factory.mktemp("large") / "large.jpg"
    photograph("coffee").resize((4000, 3000), Image.Resampling.BICUBIC).save(path, quality=95, exif=_exif())
    return path


# ---- a real mount


@pytest.fixture(autouse=True)
def _no_mount_is_waited_for_without_end(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that waits for a mount which does not answer is deaf to the signal of its time limit: the kernel lets it
    go only when the mount has ended."""
    if request.node.get_closest_marker("mount") is None:
        yield
        return
    own = request.node.get_closest_marker("timeout")
    limit = float(own.args[0] if own else request.config.getini("timeout"))
    timer = threading.Timer(limit - _BEFORE_ITS_LIMIT_SECONDS, kill_mounts)
    timer.start()
    yield
    timer.cancel()
    timer.join()


@pytest.fixture
def mounted(tmp_path: Path, can_mount: None, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A store that is mounted; compaction runs when asked (``mounted.compact()``). Its log is checked at the end."""
    patience = "normal" if request.node.get_closest_marker("slow") else "low"
    mount = Mounted(tmp_path, patience=patience)
    try:
        yield mount.start()
    finally:
        mount.clean_up()


@pytest.fixture
def unmounted(tmp_path: Path, can_mount: None) -> Iterator[Mounted]:
    """As ``mounted``, but the test starts it itself (``unmounted.start(...)``), with options and fault points."""
    mount = Mounted(tmp_path)
    try:
        yield mount
    finally:
        mount.clean_up()


@pytest.fixture(scope="session")
def _engine_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a session; a developer may name a folder that outlives it."""
    return Path(os.environ.get(remembering_engine.MEMORY) or tmp_path_factory.mktemp("engine-memory"))


@pytest.fixture
def quick(
    tmp_path: Path, can_mount: None, _engine_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[QuickMounted]:
    """A store, not mounted yet, whose mounts compute nothing twice: for tests that kill and pause at many points."""
    monkeypatch.setenv(remembering_engine.MEMORY, str(_engine_memory))
    mount = QuickMounted(tmp_path)
    try:
        yield mount
    finally:
        mount.clean_up()
