"""The view cache on a real disk: hits are descriptors, limits hold, failures cost a warning and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from esrfs import cache as cache_module
from esrfs import faults
from esrfs.cache import ViewCache
from esrfs.engine import filevalue


def view(seed: int, size: int = 100_000) -> tuple[str, bytes]:
    data = hashlib.blake2b(bytes([seed]), digest_size=64).digest() * (size // 64)
    return hashlib.sha256(data).hexdigest(), data


def read(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 1 << 24, 0)
    finally:
        os.close(descriptor)


@pytest.fixture
def cache(tmp_path: Path):
    made = ViewCache(tmp_path / "views", size_limit=4_000_000, free_floor=0)
    yield made
    made.close()


@contextlib.contextmanager
def no_room_for_a_view() -> Iterator[None]:
    """Files may grow to 64 KiB only, which stands for a full disk, or a quota, that is met in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def values(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.val"))


def holds(cache: ViewCache, key: str) -> bool:
    hit = cache.get(key)
    if hit is not None:
        os.close(hit.descriptor)
    return hit is not None


def test_a_hit_is_a_descriptor_that_survives_eviction(cache: ViewCache) -> None:
    key, data = view(1)
    assert cache.get(key) is None
    os.close(cache.put(key, data).descriptor)
    hit = cache.get(key)
    assert hit is not None
    cache.drop(key)
    assert cache.get(key) is None
    assert read(hit.descriptor) == data
    assert hit.sha256 == key
    assert (cache.hits, cache.misses) == (1, 2)


def test_the_size_limit_holds_and_the_oldest_go_first(cache: ViewCache) -> None:
    keys = []
    for seed in range(20):
        key, data = view(seed)
        keys.append(key)
        os.close(cache.put(key, data).descriptor)
    assert cache.measure()["bytes"] <= 4_000_000
    assert holds(cache, keys[-1])
    assert not holds(cache, keys[0])


def test_a_scan_does_not_flush_what_was_read_twice(cache: ViewCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PROMOTE_AFTER_SECONDS", -1.0)
    wanted, data = view(200)
    os.close(cache.put(wanted, data).descriptor)
    second = cache.get(wanted)
    assert second is not None
    os.close(second.descriptor)
    for seed in range(40):
        os.close(cache.put(*view(seed)).descriptor)
    assert holds(cache, wanted)


def test_what_the_cache_remembers_of_its_views_does_not_grow_for_ever(
    cache: ViewCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount lives for months, and reads more views than its cache holds."""
    monkeypatch.setattr(cache_module, "PROMOTE_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(cache_module, "_MOST_VERIFIED", 5)
    for seed in range(12):
        os.close(cache.put(*view(seed)).descriptor)
        assert len(cache._stored_at) <= 2
        assert len(cache._verified) <= 5
    assert all(holds(cache, view(seed)[0]) for seed in range(9, 12)), "what is forgotten is checked again, and found"


def test_a_view_larger_than_the_cache_is_served_from_memory(cache: ViewCache) -> None:
    key, data = view(3, 3_000_000)
    assert read(cache.put(key, data).descriptor) == data
    assert not holds(cache, key)


def test_the_floor_of_free_space_is_kept(tmp_path: Path) -> None:
    full = ViewCache(tmp_path / "views", size_limit=4_000_000, free_floor=1 << 60)
    key, data = view(4)
    assert read(full.put(key, data).descriptor) == data
    assert not holds(full, key)
    full.close()


@contextlib.contextmanager
def disk_of(size: int, directory: Path) -> Iterator[None]:
    """A disk of so many bytes, on which there are the cached views and nothing else."""

    def statvfs(_: object) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=size - sum(path.stat().st_size for path in values(directory)), f_frsize=1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "statvfs", statvfs)
        yield


def test_where_the_cache_fills_the_disk_the_oldest_of_those_kept_longer_go_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing new was cached until the owner emptied it."""
    monkeypatch.setattr(cache_module, "PROMOTE_AFTER_SECONDS", -1.0)
    cache = ViewCache(tmp_path / "views", size_limit=4_000_000, free_floor=4_000_000)
    keys = []
    for seed in range(25):
        key, data = view(seed)
        keys.append(key)
        os.close(cache.put(key, data).descriptor)
        assert holds(cache, key), "and is moved to those that are kept longer"
    monkeypatch.setattr(cache_module, "PROMOTE_AFTER_SECONDS", 30.0)
    key, data = view(100)
    with disk_of(2_500_000, tmp_path / "views"):  # others took all that was free
        os.close(cache.put(key, data).descriptor)
        assert not holds(cache, key), "the cache could not make so much room"
        assert all(holds(cache, each) for each in keys), "so nothing is given up for it"
    with disk_of(6_550_000, tmp_path / "views"):
        os.close(cache.put(key, data).descriptor)
        assert holds(cache, key)
    assert holds(cache, keys[-1])
    assert not holds(cache, keys[0])
    assert len(values(tmp_path / "views" / "kept")) == 15, "diskcache evicts ten at a time"
    cache.close()


def test_a_full_disk_means_no_cache_and_one_warning(
    cache: ViewCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("expect_log")("reads go on")
    monkeypatch.setattr(faults, "_actions", {"cache.put": "errno:ENOSPC"})
    for seed in range(3):
        key, data = view(seed)
        assert read(cache.put(key, data).descriptor) == data
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # diskcache lets go of a file unclosed
def test_a_view_that_can_not_be_promoted_is_served_all_the_same(
    cache: ViewCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """With a quota that is used up, every open of it met this: nothing may pile up, nor be rebuilt."""
    request.getfixturevalue("expect_log")("reads go on")
    key, data = view(8)
    os.close(cache.put(key, data).descriptor)
    monkeypatch.setattr(cache_module, "PROMOTE_AFTER_SECONDS", -1.0)
    before = len(os.listdir("/proc/self/fd"))
    with no_room_for_a_view():
        for _ in range(5):
            hit = cache.get(key)
            assert hit is not None
            assert read(hit.descriptor) == data
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(values(tmp_path / "views")) == 1
    assert holds(cache, key)
    assert [path.parts[-4] for path in values(tmp_path / "views")] == ["kept"], "tried again, when there is room"


def test_a_promotion_that_failed_is_not_tried_at_each_open(
    cache: ViewCache, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Each try copies what there is room for."""
    request.getfixturevalue("expect_log")("reads go on")
    key, data = view(9)
    os.close(cache.put(key, data).descriptor)
    cache._stored_at.clear()  # as if it had been stored long ago
    tries = []

    def fail(*_: object) -> None:
        tries.append(1)
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(cache, "_promote", fail)
    assert holds(cache, key)
    assert holds(cache, key)
    assert len(tries) == 1


@pytest.mark.parametrize("at", ["while its file is written", "when its row is written"])
def test_a_write_that_fails_leaves_no_file(
    cache: ViewCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    at: str,
) -> None:
    request.getfixturevalue("expect_log")("reads go on")
    key, data = view(10)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    if at == "when its row is written":
        monkeypatch.setattr(cache._new, "_row_insert", fail)
    value = filevalue.of_bytes(data)
    with no_room_for_a_view() if at == "while its file is written" else contextlib.nullcontext():
        assert read(cache.put(key, value).descriptor) == data
    assert values(tmp_path / "views") == []


def test_what_a_killed_mount_was_writing_is_removed_at_the_next_start(tmp_path: Path) -> None:
    """It counts for no limit. Another mount may be writing just now."""
    first = ViewCache(tmp_path / "views", free_floor=0)
    key, data = view(11)
    os.close(first.put(key, data).descriptor)
    first.close()
    [known] = values(tmp_path / "views")
    left, young = known.with_name("left.val"), known.with_name("young.val")
    for path in (left, young):
        path.write_bytes(data[:1000])
    for path in (left, known):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    again = ViewCache(tmp_path / "views", free_floor=0)
    assert holds(again, key)
    again.close()
    assert young in values(tmp_path / "views")
    assert not left.exists()


def test_a_damaged_copy_is_dropped_not_served(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("expect_log")("was damaged")
    first = ViewCache(tmp_path / "views", free_floor=0)
    key, data = view(5)
    os.close(first.put(key, data).descriptor)
    first.close()
    stored = next(path for path in (tmp_path / "views").rglob("*.val"))
    stored.write_bytes(data[: len(data) // 2])
    again = ViewCache(tmp_path / "views", free_floor=0)
    assert again.get(key) is None
    again.close()


def test_a_copy_that_the_disk_does_not_give_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Also from among those that are kept longer: else it hides the new copy."""
    request.getfixturevalue("expect_log")("can't be read")
    monkeypatch.setattr(cache_module, "PROMOTE_AFTER_SECONDS", -1.0)
    first = ViewCache(tmp_path / "views", free_floor=0)
    key, data = view(5)
    os.close(first.put(key, data).descriptor)
    assert holds(first, key)
    first.close()
    [stored] = values(tmp_path / "views" / "kept")
    stored.unlink()
    stored.symlink_to("/proc/self/mem")
    again = ViewCache(tmp_path / "views", free_floor=0)
    assert again.get(key) is None
    os.close(again.put(key, data).descriptor)
    hit = again.get(key)
    assert hit is not None
    assert read(hit.descriptor) == data
    again.close()


def test_a_damaged_database_is_started_anew(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("expect_log")("is damaged")
    directory = tmp_path / "views"
    (directory / "new").mkdir(parents=True)
    (directory / "new" / "cache.db").write_bytes(b"this is no database, but it is long enough to look at" * 100)
    cache = ViewCache(directory, free_floor=0)
    key, data = view(6)
    assert read(cache.put(key, data).descriptor) == data
    assert holds(cache, key)
    cache.close()


def test_only_raw_files_are_stored_and_the_directory_is_private(cache: ViewCache, tmp_path: Path) -> None:
    os.close(cache.put(*view(7)).descriptor)
    assert (tmp_path / "views").stat().st_mode & 0o777 == 0o700
    with sqlite3.connect(tmp_path / "views" / "new" / "cache.db") as database:
        modes = {row[0] for row in database.execute("SELECT mode FROM Cache")}
    database.close()
    assert modes == {2}, "2 is diskcache's MODE_BINARY; 4 would be a pickle"
