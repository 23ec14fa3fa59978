"""``make demo``: the whole way of some photographs through a store, with the commands that a person would type.

Everything lies in a temporary directory that is removed at the end; only the picture that is asked for stays.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageStat

from esrfs.cli import show
from esrfs.store import mountpoint

_SHIPPED = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
"""The photographs among the images that come with scikit-image."""
_PANEL = 560
_DETAIL = 140
"""Pixels of the original, in both directions, that the lower row shows enlarged."""
_LABEL = 44


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder of photographs; those of scikit-image if left out")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the picture goes")
    arguments = parser.parse_args()
    if arguments.photos is not None and not arguments.photos.is_dir():
        show.note(f"{arguments.photos} is not a folder; give one with photographs: make demo PHOTOS=folder")
        return 2
    # `kill` ends the demo like Ctrl-C: nothing stays mounted.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        with _workplace() as place:
            return _run(place, arguments.photos or _shipped(place / "photographs"), arguments.out)
    except subprocess.CalledProcessError as error:
        show.note(f"`{shlex.join(error.cmd[-4:])}` ended with exit code {error.returncode}; the demo stops here")
        return 1
    except KeyboardInterrupt:
        return 130


def _run(place: Path, photographs: Path, out: Path) -> int:
    store, view = place / "store", place / "photos"
    view.mkdir()
    _esrfs("init", store)
    _esrfs("mount", store, view)
    try:
        _say(f"cp -a {photographs}/. {view}")
        subprocess.run(["cp", "-a", "--", f"{photographs}/.", str(view)], check=True)
        _esrfs("compact", "--now", "--wait", view)
        _esrfs("cache", "clear", view)
        _say("read everything back")
        wrong = _compare(photographs, view)
        rows = [_explain(view / path.relative_to(photographs)) for path in _files(photographs)]
        _table(rows, photographs)
        _esrfs("status", view)
        compacted = [row for row in rows if row["state"] == "blob"]
        if compacted:
            best = max(compacted, key=lambda row: (row["scale"] > 1, row["ratio"]))["path"]
            out.mkdir(parents=True, exist_ok=True)
            _draw(photographs / best, store / best, view / best).save(out / "side-by-side.png")
            show.line(f"\n{best} as original, blob and view: {out / 'side-by-side.png'}")
        for problem in wrong:
            show.note(problem)
        return 1 if wrong else 0
    finally:
        _esrfs("umount", view)


# ---- where it happens


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """A directory for the store, its mount, and all that esrfs keeps elsewhere; removed, but never while it is
    mounted."""
    place = Path(tempfile.mkdtemp(prefix="esrfs-demo-"))
    for kind in ("STATE_HOME", "CACHE_HOME", "RUNTIME_DIR"):
        directory = place / "xdg" / kind.lower()
        directory.mkdir(parents=True, mode=0o700)
        os.environ[f"XDG_{kind}"] = str(directory)
    try:
        yield place
    finally:
        view = place / "photos"
        if os.path.ismount(view):
            _esrfs("umount", "--force", view, check=False)
        if os.path.ismount(view):
            show.note(f"{view} is still mounted, so {place} stays; `esrfs umount --force {view}`, then remove it")
        else:
            if view.exists():
                descriptor = mountpoint.open_mountpoint(str(view))
                mountpoint.unprotect_mountpoint(descriptor)  # left so by a mount that was killed
                os.close(descriptor)
            shutil.rmtree(place, ignore_errors=True)


def _shipped(folder: Path) -> Path:
    """A folder with the photographs of scikit-image (not imported: that would take seconds)."""
    folder.mkdir()
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        show.note(
            "scikit-image is not installed, and with it the photographs of the demo; give some: make demo PHOTOS=folder"
        )
        sys.exit(2)
    for name in _SHIPPED:
        shutil.copy2(Path(found.submodule_search_locations[0]) / "data" / name, folder)
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# ---- what it does


def _say(command: str) -> None:
    show.line(f"\n$ {command}")
    sys.stdout.flush()


def _esrfs(*arguments: str | Path, check: bool = True) -> None:
    _say(shlex.join(["esrfs", *map(str, arguments)]))
    subprocess.run([sys.executable, "-m", "esrfs.cli.main", *map(str, arguments)], check=check)


def _explain(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "esrfs.cli.main", "explain", "--json", str(path)]
    explanation: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return explanation


def _compare(photographs: Path, view: Path) -> list[str]:
    """What does not hold of the views: same size, same mtime, readable, same bytes at a second look."""
    wrong = []
    started = time.monotonic()
    read = 0
    for path in _files(photographs):
        seen = view / path.relative_to(photographs)
        before, after = path.stat(), seen.stat()
        data = seen.read_bytes()
        read += len(data)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(data) != before.st_size:
            wrong.append(f"{seen.name}: size or time of its view differ from the original's")
        elif hashlib.sha256(seen.read_bytes()).digest() != hashlib.sha256(data).digest():
            wrong.append(f"{seen.name}: two reads differ")
    show.line(f"{show.size(read)} in {time.monotonic() - started:.1f} s, rebuilt on the way; sizes and times as copied")
    return wrong


def _table(rows: list[dict[str, Any]], photographs: Path) -> None:
    def score(row: dict[str, Any]) -> str:
        if row["state"] == "blob":
            return f"{row['quality']['ssimulacra2']:.1f}"
        return " ".join(filter(None, (row["state"].replace("_", " "), f"({row['reason']})" if row["reason"] else "")))

    bytes_in = sum(row["original_bytes"] for row in rows)
    stored = sum(row["stored_bytes"] for row in rows)
    lines = [
        [row["path"], f"{row['original_bytes']:,}", f"{row['stored_bytes']:,}", show.ratio(row["ratio"]), score(row)]
        for row in rows
    ]
    total = [
        f"{len(rows)} files",
        f"{bytes_in:,}",
        f"{stored:,}",
        show.ratio(bytes_in / stored if stored else None),
        "",
    ]
    show.line(f"\nPhotographs of {photographs}")
    show.table(["file", "bytes in", "bytes stored", "ratio", "score (SSIMULACRA2)"], [*lines, total], right=(1, 2, 3))


# ---- the picture


def _draw(original: Path, blob: Path, view: Path) -> Image.Image:
    """Three panels side by side, and below them the same detail of each, enlarged."""
    from esrfs.formats import pixels  # noqa: PLC0415 (numpy)

    named = [("original", original), ("blob, as it is stored", blob), ("view, as the mount shows it", view)]
    with Image.open(original) as opened:
        orientation = opened.getexif().get(0x0112, 1)
    sheet = Image.new("RGB", (3 * _PANEL, 2 * _PANEL + _LABEL), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    full_width, corner = 0, (0.0, 0.0)
    for column, (name, path) in enumerate(named):
        with Image.open(path) as opened:
            image = pixels.upright_image(opened.convert("RGB"), orientation)  # the blob has no EXIF of its own
        if not full_width:
            full_width, corner = image.width, _liveliest(image)
        # The blob's panel is smaller as its picture is: that is what is stored.
        scale = min(1.0, (_PANEL - 10) / max(image.size) * (image.width / full_width))
        panel = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        sheet.paste(panel, (column * _PANEL + 5, _LABEL))
        detail = round(_DETAIL * image.width / full_width)
        left, top = round(corner[0] * image.width), round(corner[1] * image.height)
        crop = image.crop((left, top, left + detail, top + detail))
        sheet.paste(
            crop.resize((_PANEL - 10, _PANEL - 10), Image.Resampling.NEAREST), (column * _PANEL + 5, _LABEL + _PANEL)
        )
        text = f"{name}\n{path.stat().st_size:,} bytes, {image.width} x {image.height} pixels"
        pen.multiline_text((column * _PANEL + 8, 4), text, "black", font=font)
    return sheet


def _liveliest(image: Image.Image) -> tuple[float, float]:
    """Left and top, as shares of width and height, of the detail with the most contrast."""
    gray = image.convert("L")
    places = [
        (left, top)
        for left in range(0, max(1, image.width - _DETAIL), _DETAIL // 2)
        for top in range(0, max(1, image.height - _DETAIL), _DETAIL // 2)
    ]

    def contrast(place: tuple[int, int]) -> float:
        left, top = place
        return ImageStat.Stat(gray.crop((left, top, left + _DETAIL, top + _DETAIL))).var[0]

    left, top = max(places, key=contrast)
    return left / image.width, top / image.height


if __name__ == "__main__":
    sys.exit(main())
