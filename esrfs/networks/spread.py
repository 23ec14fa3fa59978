"""How the tiles of a picture are worked on: by whoever is given the list of what is to be done."""

from __future__ import annotations

from collections.abc import Callable

Spread = Callable[[list[Callable[[], None]]], None]
"""Runs all these functions, in any order, in any threads; returns when the last has ended, or raises what one
raised."""


def in_turn(tasks: list[Callable[[], None]]) -> None:
    """The simplest Spread: one after the other, here."""
    for task in tasks:
        task()
