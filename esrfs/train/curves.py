"""A training's course as a picture. Needs matplotlib (the extra ``train``)."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

from esrfs import whole
from esrfs.train import log

FILE = "curves.png"


def draw(folder: Path) -> Path | None:
    """``curves.png`` in a training's folder, from its log: losses, then what was measured on photographs set aside,
    over steps. None where matplotlib isn't installed, or nothing is logged yet."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        return None
    entries = log.read(folder / log.FILE)
    names = list(dict.fromkeys(name for entry in entries for name in entry.losses))
    figures = list(dict.fromkeys(name for entry in entries for name in entry.validation))
    if not names:
        return None
    panels = [(name, False) for name in names] + [(name, True) for name in figures]
    figure = Figure(figsize=(6 * min(3, len(panels)), 3.2 * -(-len(panels) // 3)), layout="constrained")
    begins = [b.step for a, b in itertools.pairwise(entries) if a.stage != b.stage]
    for number, (name, measured) in enumerate(panels, 1):
        axes = figure.add_subplot(-(-len(panels) // 3), min(3, len(panels)), number)
        lines = [(entry.step, (entry.validation if measured else entry.losses).get(name)) for entry in entries]
        points = [(step, value) for step, value in lines if value is not None]
        axes.plot(*zip(*points, strict=True), marker="." if measured else None, linewidth=1)
        for step in begins:
            axes.axvline(step, color="gray", linewidth=0.5)
        axes.set_title(f"{name}, set aside" if measured else f"loss: {name}")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    path = folder / FILE
    whole.write(path, drawn.getvalue())
    return path
