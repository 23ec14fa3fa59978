"""``cache``: the rebuilt views that are kept on disk."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from esrfs import config, control
from esrfs.cache import ViewCache
from esrfs.cli import mounted, show, stores

cache = typer.Typer(no_args_is_help=True, help="The views that are kept on disk after they were rebuilt.")

Path = Annotated[str, typer.Argument(metavar="PATH", help="A store, a mountpoint, or a path in one.")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(cache, name="cache")


@cache.command("show")
def show_(path: Path, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """How many views are kept, how large they are, where they lie."""
    with stores.at(path) as (store, place):
        socket = mounted.ask(place, store.config.id)
        directory = config.cache_directory(store.config.id)
        values: dict[str, Any]
        if socket is not None:
            values = control.call(socket, "cache-show")
        else:
            views = ViewCache(directory)
            try:
                values = {**views.measure(), "hits": 0, "misses": 0}
            finally:
                views.close()
        values = {"directory": str(directory), **values}
    if as_json:
        show.as_json(values)
        return
    show.fields(
        [
            ("directory", str(values["directory"])),
            ("views", str(values["views"])),
            ("size", f"{show.size(values['bytes'])} of at most {show.size(values['limit'])}"),
            ("hits", str(values["hits"])),
            ("misses", str(values["misses"])),
        ]
    )


@cache.command()
def clear(path: Path) -> None:
    """Drop all views that are kept; they are rebuilt when they are read again."""
    with stores.at(path) as (store, place):
        socket = mounted.ask(place, store.config.id)
        if socket is not None:
            dropped = control.call(socket, "cache-clear")["cleared"]
        else:
            views = ViewCache(config.cache_directory(store.config.id))
            try:
                dropped = views.clear()
            finally:
                views.close()
    show.line(f"{show.number_of(dropped, 'view')} dropped")


@cache.command()
def warm(given: Annotated[list[str], typer.Argument(metavar="PATH…", help="Files or folders in a mount.")]) -> None:
    """Rebuild views ahead of their readers."""
    total = 0
    for place, relative in stores.by_store(given).values():
        with stores.at(place.store) as (store, _):
            socket = mounted.require(place, store.config.id)
        with show.progress("Rebuilding") as advance:
            total += mounted.call_with_progress(socket, "cache-warm", advance, paths=relative)["warmed"]
    show.line(f"{show.number_of(total, 'view')} rebuilt and kept")
