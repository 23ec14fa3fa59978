"""What a training tells about itself: a line every few steps. Curves are drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from esrfs import whole

FILE = "log.jsonl"
"""In a training's folder."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line."""

    step: int
    """Steps done, over all stages."""
    stage: int
    seconds: float
    """Of work on this training, over all its runs."""
    losses: dict[str, float] = {}
    """Means over the steps since the line before."""
    rate: float = 0.0
    validation: dict[str, float] = {}
    """See ``validation.measure``; of the averaged weights, on the photographs that were set aside."""


def in_words(figures: dict[str, float]) -> str:
    """An entry's ``validation``."""
    if "points" in figures:
        return (
            f"{figures['bytes']:+.1f} % bytes and {figures['points']:+.2f} points of SSIMULACRA2 at the same level, "
            f"about {figures['equal']:+.1f} % bytes at the same score"
        )
    return (
        f"Y-PSNR {figures['psnr']:.2f} dB ({figures['gain']:+.2f} dB over bicubic), SSIMULACRA2 "
        f"{figures['ssimulacra2']:.2f}"
    )


def read(path: Path) -> list[Entry]:
    """All whole lines; none if the file isn't there."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        try:
            entries.append(msgspec.json.decode(line, type=Entry))
        except msgspec.DecodeError:
            break  # torn by a crash
    return entries


def cut(path: Path, step: int) -> None:
    """Forget what came after ``step``: a training that goes on from there says it again."""
    entries = [entry for entry in read(path) if entry.step <= step]
    whole.write(path, b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))


def append(path: Path, entries: Sequence[Entry]) -> None:
    """Raises OSError, which names the file. What a full disk cuts short is cut off when the training goes on."""
    try:
        with path.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
