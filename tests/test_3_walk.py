"""A walk of a store in which something can't be looked at: a folder that may be listed and not searched (``chmod -R
644``), an inode that the disk has lost, a folder deeper than anybody goes. All else is found, and who walks is told."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from esrfs.engine.client import Engine
from esrfs.store.catalog import Catalog
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep import check, history, restore, status, walk
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import Workshop
from esrfs.upkeep.scheduler import Scheduler

ExpectLog = Callable[[str], None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(str(tmp_path / "store"))
    with open_store(str(tmp_path / "store")) as opened:
        for name in ("a", "b", "c"):
            (Path(opened.path) / name).mkdir()
            for number in (1, 2):
                (Path(opened.path) / name / f"{number}.txt").write_text("no picture")
        yield opened


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(str(tmp_path / "catalog"))
    yield opened
    opened.close()


@pytest.fixture
def failing(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int], None]:
    """``failing("stat", "b/1.txt", number)``: looking at it by its folder's descriptor fails; "listdir": listing it."""

    def arrange(call: str, path: str, number: int) -> None:
        really = getattr(os, call)
        whole = os.path.join(store.path, path)

        def fail(name: Any, *args: Any, **more: Any) -> Any:
            directory = more.get("dir_fd") if call == "stat" else name
            if isinstance(directory, int):
                place = os.readlink(f"/proc/self/fd/{directory}")
                if (os.path.join(place, name) if call == "stat" else place) == whole:
                    raise OSError(number, os.strerror(number), name)
            return really(name, *args, **more)

        monkeypatch.setattr(os, call, fail)

    return arrange


def found(store: Store) -> list[str]:
    return [each.path for each in walk.files(store)]


EVERYTHING = ["a/1.txt", "a/2.txt", "b/1.txt", "b/2.txt", "c/1.txt", "c/2.txt"]


def test_files_of_a_folder_come_before_its_folders_each_in_order(store: Store) -> None:
    (Path(store.path) / "b" / "0").mkdir()
    (Path(store.path) / "b" / "0" / "x").write_text("")
    (Path(store.path) / "z").write_text("")
    os.symlink("a", Path(store.path) / "link")
    assert found(store) == ["z", *EVERYTHING[:4], "b/0/x", *EVERYTHING[4:]]
    assert [each.path for each in walk.files(store, ["b", "a/2.txt"])] == ["b/1.txt", "b/2.txt", "b/0/x", "a/2.txt"]


@pytest.mark.parametrize("number", [errno.EUCLEAN, errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("where", [("stat", "b/1.txt"), ("listdir", "b")])
def test_what_can_not_be_looked_at_ends_no_walk(  # noqa: PLR0917
    store: Store, catalog: Catalog, failing: Any, expect_log: ExpectLog, where: tuple[str, str], number: int
) -> None:
    expect_log("is left out")
    call, path = where
    failing(call, path, number)
    rest = [each for each in EVERYTHING if not each.startswith(path)]
    assert found(store) == rest
    assert status.count(store, catalog).files == len(rest)
    assert sum(group.files for group in history.of(store, catalog).groups) == len(rest)
    report = check.check(store)
    assert report.files == len(rest)
    assert [(one.path, one.problem) for one in report.findings] == [(path, "unreadable")]
    assert os.strerror(number) in report.findings[0].message
    assert report.is_sound is (number == errno.EACCES)  # that one says what this user may do, and nothing of the disk
    scheduler = Scheduler(Workshop(store, cast(Engine, None), catalog, Claims(), lambda: True), 0.0)
    for _ in range(3):
        scheduler._step()
    assert sorted(entry.path for _, entry in catalog.entries()) == rest
    assert scheduler.pending == 0


def test_a_folder_that_may_not_be_searched_is_told_once_and_not_at_each_walk(
    store: Store, catalog: Catalog, failing: Any, expect_log: ExpectLog, caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("is left out|are left out")
    failing("stat", "b/1.txt", errno.EACCES)
    failing("stat", "b/2.txt", errno.EACCES)
    scheduler = Scheduler(Workshop(store, cast(Engine, None), catalog, Claims(), lambda: True), 0.0)
    for _ in range(3):
        scheduler._next_walk = 0.0
        scheduler._step()
    assert [record.getMessage() for record in caplog.records] == [
        f"{store.path}/b: 2 entries of this folder are left out, they can't be looked at: Permission denied"
    ]


def test_a_given_folder_that_can_not_be_listed_is_an_error(store: Store, failing: Any) -> None:
    failing("listdir", "b", errno.EACCES)
    with pytest.raises(PermissionError):
        list(walk.files(store, ["b"]))


def test_a_tree_deeper_than_python_recurses_is_walked_to_its_end(store: Store) -> None:
    at = os.open(store.path, os.O_RDONLY)
    try:
        for _ in range(1050):  # its paths are longer than PATH_MAX, too
            os.mkdir("ddd", dir_fd=at)
            deeper = os.open("ddd", os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = deeper
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=at))
    finally:
        os.close(at)
    try:
        assert found(store) == [*EVERYTHING, "ddd/" * 1050 + "file"]
    finally:
        subprocess.run(["rm", "-rf", os.path.join(store.path, "ddd")], check=True)


def test_a_blob_that_the_disk_does_not_give_ends_no_count_and_is_named_when_a_folder_is_brought_back(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(store.path) / "b" / "0").write_bytes(bytes(13 + 64 * 3))  # as long as a blob may be
    really = os.pread

    def fail(fd: int, count: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/b/0"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(fd, count, offset)

    monkeypatch.setattr(os, "pread", fail)
    counts = status.count(store, catalog)
    assert (counts.files, counts.pending) == (7, 7)
    answer = restore.restore(store, [""], catalog=catalog)
    assert [(one.path, one.state) for one in answer] == [("b/0", "failed")]
    assert "Input/output error" in answer[0].message
