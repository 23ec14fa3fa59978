"""``init``: make a directory a store."""

from __future__ import annotations

import enum
import hashlib
import os
from shlex import quote
from typing import Annotated

import msgspec
import typer

from esrfs.cli import show
from esrfs.cli.show import CommandError
from esrfs.compaction.outcome import CARRIES, CHOICES, LOSSLESS, PATIENCES, PRESETS, REFINEMENTS, Outcome, Policy
from esrfs.engine.client import Engine, EngineSettings
from esrfs.exit_codes import ExitCode
from esrfs.networks import registry
from esrfs.networks.registry import WeightsError
from esrfs.store import initialise, layout

Preset = enum.StrEnum("Preset", {name: name for name in CHOICES})  # type: ignore[misc]  # its members are CHOICES
Patience = enum.StrEnum("Patience", {name: name for name in PATIENCES})  # type: ignore[misc]  # likewise

_DEFAULT = Policy()
_PATIENCE = Patience(_DEFAULT.patience)
_PRESET = Preset(_DEFAULT.preset)
Refinement = enum.StrEnum("Refinement", {name: name for name in REFINEMENTS})  # type: ignore[misc]  # likewise
_REFINEMENT = Refinement(_DEFAULT.refinement)
Carry = enum.StrEnum("Carry", {name: name for name in CARRIES})  # type: ignore[misc]
_CARRY = Carry(_DEFAULT.carry)
_SCORES = ", ".join(f"{name} {score:g}" for name, (score, _) in PRESETS.items()) + f", {LOSSLESS} 100"


def add_to(app: typer.Typer) -> None:
    app.command()(init)


def init(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="An empty directory, or one with photographs.")],
    *,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Rename DIR to .DIR.esrfs, and leave a mountpoint for the view at DIR.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; predict from a sample what would be saved.")
    ] = False,
    exclusive: Annotated[
        bool,
        typer.Option(
            "--exclusive",
            help="Promise that only esrfs writes into the store; for filesystems without exchange or leases.",
        ),
    ] = False,
    preset: Annotated[
        Preset,
        typer.Option(help=f"What a picture must score (SSIMULACRA2): {_SCORES}."),
    ] = _PRESET,
    network: Annotated[
        str,
        typer.Option(
            help="The family of networks that rebuilds (lite: lite-x2 …), or one network; see `esrfs weights list`."
        ),
    ] = _DEFAULT.network,
    patience: Annotated[
        Patience, typer.Option(help="Time that compaction spends on each picture for fewer bytes.")
    ] = _PATIENCE,
    refinement: Annotated[
        Refinement,
        typer.Option(
            help="Fit each small picture to the network, for fewer bytes. It takes a minute or more for each. idle: "
            "where a GPU runs networks, or nothing else keeps the machine busy."
        ),
    ] = _REFINEMENT,
    carry: Annotated[
        Carry,
        typer.Option(
            help="full: a photograph carries what it is stored as, where there is room, so that another store need not "
            "make it again. A program that keeps what it does not know ships that, too, even when it crops."
        ),
    ] = _CARRY,
    undo_days: Annotated[int, typer.Option(min=0, help="Days that originals can be brought back.")] = 30,
) -> None:
    """Make a directory a store. No photograph is touched: that begins when the store is mounted.

    With --exclusive on a store that exists: note the promise in it.
    """
    if exclusive and layout.is_store(directory) and not dry_run:
        _make_exclusive(directory)
        return
    policy = Policy(
        preset=preset.value,
        network=network,
        patience=patience.value,
        refinement=refinement.value,
        carry=carry.value,
    )
    try:
        weights = {name: path.read_bytes() for name, path in registry.family(network).items()}
    except WeightsError as error:
        raise CommandError(str(error), ExitCode.NETWORK) from error
    if dry_run:
        _predict(directory, policy, weights)
        return
    made = initialise.init(directory, in_place=in_place, exclusive=exclusive, policy=policy, undo_days=undo_days)
    for warning in made.warnings:
        show.note(warning)
    if (made.config.policy, made.config.undo_days) != (policy, undo_days):
        show.note(
            f"{made.store} was a store before, and keeps its settings; they are in "
            f"{os.path.join(made.store, layout.RESERVED, layout.CONFIG)}"
        )
    show.line(
        f"{made.store} is a store (preset {made.config.policy.preset}, originals kept {made.config.undo_days} days)"
    )
    where = quote(made.mountpoint) if made.mountpoint else "DIRECTORY"
    show.line(f"show it full size with: esrfs mount {quote(made.store)} {where}")


def _make_exclusive(directory: str) -> None:
    with layout.open_store(directory) as store:
        if store.readonly:
            raise CommandError(f"{directory} is of a newer format; nothing was changed", ExitCode.REFUSED)
        config = msgspec.structs.replace(store.config, exclusive=True)
        layout.write_durably(store.meta_fd, layout.CONFIG, layout.format_config(config).encode(), 0o600)
    show.line(f"{directory} is a store that only esrfs writes into; a mount knows it from its next start on")


def _predict(directory: str, policy: Policy, weights: dict[str, bytes]) -> None:
    if not os.path.isdir(directory):
        raise CommandError(f"{directory} is not a directory; there is nothing to predict", ExitCode.FAILED)
    networks = {name: hashlib.sha256(data).digest() for name, data in weights.items()}
    engine = Engine(EngineSettings(), {networks[name]: data for name, data in weights.items()}.__getitem__)

    def compact(original: bytes, preset: str) -> Outcome:
        # Refinement would take minutes for each file of the sample.
        return engine.compact(original, msgspec.structs.replace(policy, preset=preset, refinement="off"), networks)

    try:
        with show.progress("Trying a sample") as advance:
            found = initialise.predict(
                directory, compact, CHOICES, progress=lambda done, total: advance(done, total, "")
            )
    finally:
        engine.close()
    show.fields(
        [
            ("files", f"{found.files}, {show.size(found.bytes)}"),
            ("of them pictures", f"{found.candidates}, {show.size(found.candidate_bytes)}; {found.sampled} were tried"),
        ]
    )
    rows = []
    for preset, predicted in found.presets.items():
        saved = found.bytes - predicted.bytes
        share = f"{saved / found.bytes:.0%}" if found.bytes else ""
        mark = " (this one)" if preset == policy.preset else ""
        rows.append([preset + mark, show.size(predicted.bytes), show.size(saved), share, str(predicted.compacted)])
    show.table(["preset", "would take", "would save", "", "of those tried, shrink"], rows, right=(1, 2, 3, 4))
    if policy.refinement != "off":
        show.line("Refinement, which saves some more, is not reckoned with.")
    show.line("Space is saved after the undo window. Nothing was changed.")
