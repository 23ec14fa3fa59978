"""``check`` a store, ``restore`` originals."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from esrfs.blob.container import Blob
from esrfs.cli import mounted, show, stores
from esrfs.engine.client import Rebuilt
from esrfs.exit_codes import ExitCode
from esrfs.upkeep import check as upkeep_check
from esrfs.upkeep import restore as upkeep_restore

_LONGEST = 3600.0
"""Seconds for one view: no program waits for it, and what hangs is ended by the engine's client, sooner."""


def add_to(app: typer.Typer) -> None:
    app.command()(check)
    app.command()(restore)


def check(
    path: Annotated[str, typer.Argument(metavar="STORE", help="A store, or a mountpoint.")],
    deep: Annotated[bool, typer.Option("--deep", help="Also rebuild every view and compare it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look for damage. Changes nothing; ends with exit code 6 if there is any."""
    with stores.at(path) as (store, _), stores.engine_for(store) as engine, show.progress("Checking") as advance:

        def rebuild(blob: Blob) -> Rebuilt:
            ticket = engine.rebuild(
                blob.recipe.sha256_view, lambda: (blob.recipe_bytes, blob.avif), megapixels=blob.recipe.megapixels
            )
            try:
                return ticket.wait(_LONGEST)
            finally:
                ticket.release()

        report = upkeep_check.check(store, rebuild if deep else None, advance)
    if as_json:
        show.as_json(msgspec.to_builtins(report))
    else:
        for finding in report.findings:
            show.line(f"{finding.severity}: {finding.path}: {finding.message}")
        rebuilt = f", {report.rebuilt} rebuilt" if deep else ""
        verdict = "the store is sound" if report.is_sound else "the store is damaged"
        show.line(f"{show.number_of(report.files, 'file')}, {report.blobs} of them stored small{rebuilt}: {verdict}")
    if not report.is_sound:
        raise typer.Exit(ExitCode.DAMAGE)


def restore(
    given: Annotated[list[str], typer.Argument(metavar="FILE…", help="Files or folders in a store or its mount.")],
    first: Annotated[
        bool,
        typer.Option(
            "--first",
            help="Of photographs into which a program wrote captions, ratings or the like since: what was there first.",
        ),
    ] = False,
) -> None:
    """Bring originals back, bit for bit, while the undo window has them: what was last written to each file."""
    failed = 0
    brought = 0
    for place, relative in stores.by_store(given).values():
        with stores.at(place.store, readonly=False) as (store, _), show.progress("Restoring") as advance:
            socket = mounted.ask(place, store.config.id)
            if socket is not None:
                # The mount knows who reads the file at this moment; nobody else may swap it.
                results = mounted.call_with_progress(socket, "restore", advance, paths=relative, first=first)["files"]
            else:
                with stores.catalog_of(store) as catalog:
                    results = msgspec.to_builtins(
                        upkeep_restore.restore(store, relative, advance, catalog=catalog, first=first)
                    )
        for result in results:
            brought += result["state"] == "restored"
            failed += result["state"] == "failed"
            if result["message"]:
                show.note(result["message"])
    show.line(f"{show.number_of(brought, 'original')} brought back")
    if failed:
        raise typer.Exit(ExitCode.FAILED)
