"""``policy``: how a file of a store is kept, and which rule says so."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from esrfs.cli import show, stores
from esrfs.compaction.outcome import NEVER, PRESETS
from esrfs.store.layout import RESERVED
from esrfs.store.rules import RULES, Decision, Rules


def add_to(app: typer.Typer) -> None:
    app.command()(policy)


def policy(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file of a store or in its view; it need not exist.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How a file is kept: the store's own policy, or what a rule in STORE/.esrfs/rules says.

    Of a folder: how files in it are kept that no rule for their own names matches.

    A rule is a line with a pattern as in .gitignore and a word: a preset, lossless or never. The last that matches a
    file counts. Changes hold at once, for what is not stored small yet.
    """
    with stores.at(path) as (store, place):
        folder = not place.relative or os.path.isdir(os.path.join(place.store, place.relative))
        asked = os.path.join(place.relative, "*") if folder else place.relative
        decision = Rules(store).decide(asked)
        file = os.path.join(place.store, RESERVED, RULES)
        values = _values(place.relative, decision, file)
    if as_json:
        show.as_json(values)
        return
    rule = decision.rule
    because = f"line {rule.line} of {file}: {rule.pattern} {rule.choice}" if rule else "the store's own policy"
    show.fields(
        [
            ("path", place.relative or place.store),
            ("policy", decision.choice),
            ("promise", _promise(decision.choice)),
            ("because", because),
        ]
    )


def _values(path: str, decision: Decision, file: str) -> dict[str, Any]:
    rule = decision.rule
    whole, depth = PRESETS.get(decision.choice, (None, None))
    return {
        "path": path,
        "policy": decision.choice,
        "least_score": whole,
        "least_score_of_a_part": None if whole is None or depth is None else whole - depth,
        "rule": None if rule is None else {"file": file, "line": rule.line, "pattern": rule.pattern},
    }


def _promise(choice: str) -> str:
    if choice in PRESETS:
        whole, depth = PRESETS[choice]
        return f"SSIMULACRA2 {whole:g} or more, and {whole - depth:g} in each part of it"
    return "stays as it is" if choice == NEVER else "comes back bit for bit"
