"""Opening what a command works on: the store that a path names, its catalog, an engine of the command's own."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence

from esrfs import config
from esrfs.cli import paths
from esrfs.cli.paths import Place
from esrfs.cli.show import CommandError
from esrfs.engine.client import Engine, EngineSettings
from esrfs.exit_codes import ExitCode
from esrfs.store.catalog import Catalog
from esrfs.store.layout import Store, open_store
from esrfs.upkeep import networks

log = logging.getLogger("esrfs.cli")


@contextlib.contextmanager
def at(path: str, readonly: bool = True) -> Iterator[tuple[Store, Place]]:
    """The open store that ``path`` belongs to. Raises CommandError NOT_A_STORE, StoreError."""
    place = paths.resolve(path)
    with open_store(place.store, readonly=readonly) as store:
        yield store, place


@contextlib.contextmanager
def catalog_of(store: Store) -> Iterator[Catalog]:
    catalog = Catalog(os.path.join(config.state_directory(store.config.id), "catalog.db"))
    try:
        yield catalog
    finally:
        catalog.close()


@contextlib.contextmanager
def engine_for(store: Store) -> Iterator[Engine]:
    """An engine that knows the store's networks; it starts with the first job and ends with the block."""
    engine = Engine(EngineSettings(), functools.partial(networks.network_bytes, store))
    try:
        yield engine
    finally:
        engine.close()


def by_store(given: Sequence[str]) -> dict[str, tuple[Place, list[str]]]:
    """The paths grouped by store: for each, a place and the relative paths. Raises CommandError NOT_A_STORE; FAILED
    for a path that does not exist, before anything was done."""
    groups: dict[str, tuple[Place, list[str]]] = {}
    for path in given:
        place = paths.resolve(path)
        if place.relative and not os.path.lexists(os.path.join(place.store, place.relative)):
            raise CommandError(f"{path}: no such file; nothing was done", ExitCode.FAILED)
        groups.setdefault(place.store, (place, []))[1].append(place.relative)
    return groups
