"""A page: one HTML file that holds all it shows, readable on a phone, in light and dark, and by a screen reader.

A page is sections; a section is text, tables, figures and rows of pictures. Every figure has a description and, where
it can be, its figures as a table below it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    svg: str
    caption: str
    """What it shows, and what can be seen in it: it is also the description for those who can't see it."""
    table: Table | None = None
    """The same figures, folded away."""
    kind: str = "figure"


@dataclass(frozen=True)
class Shown:
    """A small picture in a row of several."""

    data: str
    """Of an <img>: a data URL."""
    alt: str
    caption: str


@dataclass(frozen=True)
class Row:
    title: str
    pictures: Sequence[Shown]
    kind: str = "row"


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    text: str
    kind: str = "code"


Block = Table | Figure | Row | Text | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block] = field(default_factory=list)
    folded: bool = False


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def shown(pixels: npt.NDArray[np.uint8], alt: str, caption: str) -> Shown:
    """H×W×3 RGB, embedded without loss."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=True, method=6)
    return Shown("data:image/webp;base64," + base64.b64encode(out.getvalue()).decode(), alt, caption)


def as_html(page: Page) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.jinja").render(page=page)
    return text.encode(errors="replace")  # the command line may hold bytes that are no text
