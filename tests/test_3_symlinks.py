"""No operation follows a symlink out of the store, should one take a name behind the kernel's back.

The kernel resolves symlinks itself before it asks, so what comes here as a symlink has come by the name in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from esrfs.cache import ViewCache
from esrfs.engine.client import Engine
from esrfs.store.initialise import init
from esrfs.store.layout import open_store
from esrfs.upkeep.claims import Claims
from esrfs.vfs.creating import Caller
from esrfs.vfs.filesystem import Filesystem

ME = Caller(os.geteuid(), os.getegid(), 0o022)


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (outside / "secret").chmod(0o600)
    init(str(tmp_path / "store"))
    (tmp_path / "store" / "file").symlink_to(outside / "secret")
    (tmp_path / "store" / "folder").symlink_to(outside)
    with open_store(str(tmp_path / "store")) as store:
        cache = ViewCache(tmp_path / "cache", 1 << 20, 0)
        made = Filesystem(store, cast(Engine, None), cache, Claims())
        yield made
        made.close()
        cache.close()
    assert sorted(os.listdir(outside)) == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    assert (outside / "secret").stat().st_mode & 0o777 == 0o600


REFUSED: dict[str, Callable[[Filesystem], object]] = {
    "open": lambda fs: fs.open("file", os.O_RDONLY),
    "open for writing": lambda fs: fs.open("file", os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda fs: fs.truncate("file", 3),
    "chmod": lambda fs: fs.chmod("file", 0o777),
    "stat below": lambda fs: fs.stat("folder/secret"),
    "open below": lambda fs: fs.open("folder/secret", os.O_RDONLY),
    "create below": lambda fs: fs.create("folder/new", os.O_WRONLY, 0o644, ME),
    "mkdir below": lambda fs: fs.mkdir("folder/new", 0o755, ME),
    "unlink below": lambda fs: fs.unlink("folder/secret"),
    "rename into": lambda fs: fs.rename("file", "folder/moved", 0),
    "list": lambda fs: fs.opendir("folder"),
    "attributes below": lambda fs: fs.getxattr("folder/secret", "user.any"),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_what_would_lead_out_is_refused(fs: Filesystem, operation: str) -> None:
    with pytest.raises(OSError):
        REFUSED[operation](fs)
    assert len(fs.handles) == 0


def test_what_is_about_the_link_itself_stays_with_it(fs: Filesystem) -> None:
    fs.utimens("file", None)
    fs.chown("file", -1, -1)
    assert fs.readlink("file").endswith("secret")
    fs.unlink("file")
    fs.unlink("folder")
