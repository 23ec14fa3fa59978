"""What one trial gave, and the file that keeps all of them so that a later run goes on where one stopped.

``results.jsonl`` is JSON lines, one :class:`Result` each, only ever appended to, by one process. A line that can't be
read (a crash cut it short) is as if it were not there: its trial is done again. Of two results of one trial the last
holds.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

FILE = "results.jsonl"


class BusyError(Exception):
    """Another run writes to this folder."""


class Way(msgspec.Struct, frozen=True, order=True):
    """One way to store a picture and get it back."""

    codec: str
    """As in ``codecs``, or ``esrfs``: compaction as the store does it."""
    scale: int = 1
    """By how much the picture is shrunk before it is encoded, in both directions; 0 for esrfs, which chooses."""
    shrink: str = ""
    """``bicubic``, ``bilinear``, ``area``; empty where nothing is shrunk."""
    grow: str = ""
    """``bicubic``, ``lanczos`` or a network's name; empty where nothing is done after decoding."""


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Fields may be added with a default; a field's meaning never changes."""

    picture: str
    """Path below the folder that was evaluated."""
    sha256: str
    """Of the picture's file."""
    way: Way
    setting: str
    """A quality of 1 to 100 for codecs, a preset for esrfs."""
    made_by: str
    """Versions and settings that the bytes depend on, and hashes of networks."""
    width: int
    height: int
    original_bytes: int
    kind: str
    """Of the original: ``jpeg``, ``png`` …"""
    bytes: int | None = None
    """What it takes; None if esrfs refused the picture."""
    measures: dict[str, float | None] = {}
    """None: the picture is too small for that measure."""
    store_seconds: float = 0.0
    """Shrinking and encoding; for esrfs the whole search, gate included."""
    restore_seconds: float = 0.0
    """Decoding and growing; for esrfs until the view's last byte."""
    note: str = ""
    """For esrfs: how it was stored, or why not."""

    @property
    def key(self) -> tuple[str, Way, str, str]:
        return (self.sha256, self.way, self.setting, self.made_by)

    @property
    def bits_per_pixel(self) -> float | None:
        return None if self.bytes is None else 8 * self.bytes / (self.width * self.height)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Result)


class Kept:
    """The results file of a folder, for reading what is there and adding to it; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises BusyError, OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not buffered: what a full disk refuses would be written again, and fail again, when it is closed.
        self._file = (folder / FILE).open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise BusyError(f"another run writes to {folder}; wait for it, or name another folder") from error

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self) -> dict[tuple[str, Way, str, str], Result]:
        self._file.seek(0)
        lines = self._file.readall()
        found: dict[tuple[str, Way, str, str], Result] = {}
        for line in lines.splitlines():
            try:
                result = _decoder.decode(line)
            except msgspec.DecodeError:
                continue
            if before := found.get(result.key):  # done again for more measures
                result = msgspec.structs.replace(result, measures={**before.measures, **result.measures})
            found[result.key] = result
        return found

    def add(self, results: Iterable[Result]) -> None:
        """Raises OSError, which names the file."""
        lines = b"".join(_encoder.encode(result) + b"\n" for result in results)
        end = self._file.seek(0, os.SEEK_END)
        if end and os.pread(self._file.fileno(), 1, end - 1) != b"\n":
            lines = b"\n" + lines
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error


COLUMNS = (
    "picture", "sha256", "width", "height", "kind", "original_bytes", "codec", "scale", "shrink", "grow", "setting",
    "bytes", "bits_per_pixel", "ratio",
)  # fmt: skip
"""Of the CSV and JSON files, before the measures; ``store_seconds``, ``restore_seconds``, ``note``, ``made_by``
follow."""


def rows(results: Sequence[Result], measures: Sequence[str]) -> list[dict[str, object]]:
    """For CSV and JSON, in the order of ``results``."""
    return [
        {
            "picture": result.picture,
            "sha256": result.sha256,
            "width": result.width,
            "height": result.height,
            "kind": result.kind,
            "original_bytes": result.original_bytes,
            "codec": result.way.codec,
            "scale": result.way.scale,
            "shrink": result.way.shrink,
            "grow": result.way.grow,
            "setting": result.setting,
            "bytes": result.bytes,
            "bits_per_pixel": None if result.bits_per_pixel is None else round(result.bits_per_pixel, 5),
            "ratio": None if not result.bytes else round(result.original_bytes / result.bytes, 4),
            **{name: result.measures.get(name) for name in measures},
            "store_seconds": round(result.store_seconds, 4),
            "restore_seconds": round(result.restore_seconds, 4),
            "note": result.note,
            "made_by": result.made_by,
        }
        for result in results
    ]


def as_csv(table: Sequence[dict[str, object]], measures: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*COLUMNS, *measures, "store_seconds", "restore_seconds", "note", "made_by"])
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()
