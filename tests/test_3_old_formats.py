"""Every format version stays readable for ever (as in gocryptfs: each old format has an example that must mount).

``tests/examples/store-N`` was written by the first esrfs of format version N, and is never made anew;
``store-N.json`` says what its blobs show. To add one: compact a few small pictures, and leave out what git can't carry
(``originals/``, which are recognised by their mtime, ``ledger/settled/``, ``staging/``, ``compactor``).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from esrfs import formats
from esrfs.blob import container
from esrfs.blob.recipe import Recipe
from esrfs.engine.client import Engine, EngineSettings
from esrfs.formats import jpeg, png
from esrfs.store.examine import examine, recipe_of
from esrfs.store.layout import FORMAT_VERSION, Store, open_store
from esrfs.upkeep import check

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("store-*.json"))


@pytest.mark.parametrize("description", EXAMPLES, ids=lambda path: path.stem)
def test_a_store_of_this_version_is_read(description: Path, tmp_path: Path) -> None:
    shutil.copytree(description.with_suffix(""), tmp_path / "store")
    known = json.loads(description.read_text())
    with open_store(str(tmp_path / "store")) as store:
        assert not store.readonly
        assert check.check(store).findings == []
        engine = Engine(EngineSettings(), store.network_bytes)
        try:
            for name, expected in known.items():
                blob = _blob(store, tmp_path / "store" / name)
                assert blob.recipe.original_size == expected["view_size"]
                view = _rebuild(engine, blob)
                assert len(view) == expected["view_size"]
                assert formats.decode(view, 1.0).shape[:2] == (blob.recipe.height, blob.recipe.width)
                if _encodes_as(expected["encoder"]):
                    assert hashlib.sha256(view).hexdigest() == expected["sha256_view"]
        finally:
            engine.close()


def test_there_is_an_example_of_the_present_version() -> None:
    assert f"store-{FORMAT_VERSION}" in [path.stem for path in EXAMPLES]


def _blob(store: Store, path: Path) -> container.Blob:
    with path.open("rb") as file:
        st = path.stat()
        info = examine(store, file.fileno(), st)
        assert info is not None, f"{path.name} is not recognised as a blob"
        assert isinstance(recipe_of(file.fileno(), st, info), Recipe)
    return container.unpack(path.read_bytes())


def _rebuild(engine: Engine, blob: container.Blob) -> bytes:
    ticket = engine.rebuild(blob.recipe.sha256_view, lambda: (blob.recipe_bytes, blob.avif))
    try:
        return ticket.wait().file.read()
    finally:
        ticket.release()


def _encodes_as(encoder: str) -> bool:
    """Whether the libraries here are those that wrote the example; others may write other bytes of the same size."""
    return encoder in (jpeg.encoder(), png.encoder())
