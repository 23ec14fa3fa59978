"""Which optional packages reports need, and how to get them."""

from __future__ import annotations

import importlib.util

REPORT = ("bjontegaard", "jinja2", "matplotlib", "pytorch_msssim", "scipy")
"""Modules of the extra ``report``."""
INSTALL = "pip install 'esrfs[report]'"


class MissingError(Exception):
    """For people: what is missing, and the command that installs it."""


def check() -> None:
    """Raises MissingError."""
    missing = [name for name in REPORT if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"reports need packages that are not installed ({', '.join(missing)}): {INSTALL}")
