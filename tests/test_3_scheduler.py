"""The scheduler's walk of a store: what it finds, and how the catalog follows files that were moved or deleted behind
the mount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from esrfs.engine.client import Engine
from esrfs.store.catalog import Catalog, Entry
from esrfs.store.identity import Identity
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import Workshop
from esrfs.upkeep.scheduler import Scheduler


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(str(tmp_path / "store"))
    with open_store(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(str(tmp_path / "catalog"))
    yield opened
    opened.close()


def walked(store: Store, catalog: Catalog) -> set[str]:
    """Let a scheduler walk the store, and take all files as not pictures, once; the paths that the catalog knows."""
    workshop = Workshop(store, cast(Engine, None), catalog, Claims(), lambda: True)
    scheduler = Scheduler(workshop, quiet_seconds=0.0)
    for _ in range(10):
        scheduler._step()
    assert scheduler.pending == 0
    scheduler.stop()
    return {entry.path for _, entry in catalog.entries()}


def test_the_catalog_follows_what_is_moved_and_forgets_what_is_gone(store: Store, catalog: Catalog) -> None:
    root = Path(store.path)
    (root / "folder").mkdir()
    for name in ("kept", "moved", "deleted", "folder/below"):
        (root / name).write_text("no picture")
    (root / "empty").touch()
    assert walked(store, catalog) == {"kept", "moved", "deleted", "folder/below"}
    os.rename(root / "moved", root / "folder" / "elsewhere")
    os.rename(root / "folder", root / "renamed")
    os.unlink(root / "deleted")
    assert walked(store, catalog) == {"kept", "renamed/elsewhere", "renamed/below"}
    assert catalog.get(Identity.from_stat(os.lstat(root / "kept"))) is not None


def test_what_was_brought_back_is_remembered_whatever_becomes_of_its_name(store: Store, catalog: Catalog) -> None:
    path = Path(store.path) / "picture"
    path.write_text("content")
    identity = Identity.from_stat(os.lstat(path))
    catalog.put(identity, Entry(state="original", view_size=7, stored_bytes=512, path="picture"))
    os.unlink(path)
    assert walked(store, catalog) == {"picture"}
