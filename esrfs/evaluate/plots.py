"""Plots as SVG for a page: text stays text, and colours are the page's own (CSS variables), so that they follow light
and dark."""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = 8
"""Lines that can be told apart by colour; further ones repeat them with another stroke."""

_INK = "#010203"
"""Stands for the page's text colour until the SVG is written; line colours are #0102f0 to #0102f7."""
_LINES = [f"#0102f{number}" for number in range(COLOURS)]
_MARKERS = "osD^vP*X"
_STROKES = ["-", "--", ":", "-."]
_SIZE = (6.0, 4.2)
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]
    dots_only: bool = False


def lines(name: str, series: Sequence[Line], x: str, y: str, *, log_x: bool = False, dates: bool = False) -> str:
    """SVG of curves; ``name`` makes the ids in it unlike those of other plots. ``dates``: x is a day's ordinal."""
    with _styled(name):
        figure, axes = _figure()
        for number, line in enumerate(series):
            xs, ys = zip(*line.points, strict=True)
            axes.plot(
                xs,
                ys,
                label=line.label,
                color=_LINES[number % COLOURS],
                linestyle="" if line.dots_only else _STROKES[number // COLOURS % len(_STROKES)],
                marker=_MARKERS[number % len(_MARKERS)] if len(xs) < 40 else "",
                markersize=8 if line.dots_only else 5,
                linewidth=1.8,
            )
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(FuncFormatter(_few_minor))
        if dates:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(_date))
        _label(axes, x, y)
        if len(series) > 1:
            axes.legend(loc="best")
        return _svg(figure, name)


def bars(name: str, labels: Sequence[str], values: Sequence[float], x: str, *, upright: bool = False) -> str:
    """SVG of bars, one for each label: lying, the first on top; upright for classes of a histogram."""
    with _styled(name, **{"axes.grid.axis": "y" if upright else "x"}):
        figure, axes = _figure(height=_SIZE[1] if upright else 0.9 + 0.38 * max(len(labels), 2))
        positions = range(len(labels))
        if upright:
            axes.bar(positions, values, color=_LINES[0])
            axes.set_xticks(positions, labels, rotation=40, ha="right")
            axes.set_ylabel(x)
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        else:
            axes.barh(positions, values, color=_LINES[0])
            axes.set_yticks(positions, labels)
            axes.invert_yaxis()
            axes.set_xlabel(x)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_axisbelow(True)
        return _svg(figure, name)


def _styled(name: str, **more: str) -> AbstractContextManager[None]:
    style: Any = {**_STYLE, "svg.hashsalt": name, **more}
    return mpl.rc_context(style)


def _figure(height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _few_minor(value: float, _: object) -> str:
    """Of a logarithmic axis's minor ticks only those at 2 and 5 get a number."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _date(value: float, _: object) -> str:
    return datetime.date.fromordinal(round(value)).isoformat() if value >= 1 else ""


def _svg(figure: Figure, name: str) -> str:
    FigureCanvasSVG(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids are unique within one SVG; a page holds several.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for number, colour in enumerate(_LINES):
        text = text.replace(colour, f"var(--line-{number})")
    return text.replace(_INK, "currentColor").replace("<svg", '<svg aria-hidden="true"', 1)
