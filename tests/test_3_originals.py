"""The undo window: what stays, for how long, and that no clock, full disk or late writer shortens it wrongly."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess

import pytest
from msgspec import structs

from esrfs import faults
from esrfs.store import ledger, originals
from esrfs.store.initialise import init
from esrfs.store.layout import RESERVED, open_store
from esrfs.store.originals import FLOOR_DAYS
from esrfs.upkeep import check


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "store"
    init(str(root), undo_days=10)
    with open_store(str(root)) as one:
        yield one


def keep(store, content, day=None):
    """Put an original into the window as the swap does; its path."""
    day = ledger.days_seen(store.ledger_fd) if day is None else day
    name = originals.name_for(hashlib.sha256(content).digest(), ledger.new_job(), len(content), 5, day)
    path = f"{store.path}/{RESERVED}/originals/{name}"
    with open(path, "wb") as file:
        file.write(content)
    os.utime(path, ns=(5, 5))
    return path


def live(store, days, start=0):
    for number in range(start, start + days):
        ledger.mark_day(store.ledger_fd, date=f"day {number}", boot=f"boot {number}", uptime=0)


def test_names_tell_everything():
    digest = hashlib.sha256(b"x").digest()
    for size, mtime, day in ((0, 0, 0), (1 << 40, -5, 7), (5, 1_700_000_000_000_000_000, 40000)):
        name = originals.name_for(digest, "0123456789abcdef", size, mtime, day)
        assert len(name) < 200
        assert originals.parse(name) == originals.Kept(name, digest, "0123456789abcdef", size, mtime, day)
    for other in ("found-x", "", "0" * 64, name + ".jpg", "../" + name):
        assert originals.parse(other) is None


def test_originals_stay_for_their_days_and_then_go(store):
    live(store, 1)
    path = keep(store, b"one")
    (kept,) = originals.entries(store)
    assert (originals.age(store, kept), originals.days_left(store, kept)) == (0, 10)
    live(store, 9, start=1)
    assert originals.days_left(store, kept) == 1
    assert originals.purge(store).names == []
    assert os.path.exists(path)
    live(store, 1, start=10)
    done = originals.purge(store)
    assert done.names == [kept.name]
    assert done.freed_bytes > 0
    assert not os.path.exists(path)
    with open(f"{store.path}/{RESERVED}/ledger/{store.ledger.name}", "rb") as file:
        records = ledger.decode(file.read()).records
    assert [record.name for record in records if isinstance(record, ledger.Purged)] == [kept.name]


def test_a_wrong_clock_purges_nothing(store):
    """The clock jumps by years, back and forth, at every start of the machine and in between."""
    live(store, 1)
    path = keep(store, b"one")
    for hours in range(0, 60, 1):
        ledger.mark_day(store.ledger_fd, date=f"{1970 + hours}-01-01", boot="one boot", uptime=hours * 3600.0)
        originals.purge(store)
    assert os.path.exists(path)
    (kept,) = originals.entries(store)
    assert originals.age(store, kept) <= 4


def test_days_without_esrfs_do_not_count(store):
    live(store, 1)
    path = keep(store, b"one")
    ledger.mark_day(store.ledger_fd, date="ten years later", boot="b", uptime=0)
    originals.purge(store)
    assert os.path.exists(path)


def test_an_original_from_the_future_is_young(store):
    """Its ledger was lost, or it came from a store with another count."""
    path = keep(store, b"one", day=1000)
    originals.purge(store)
    assert os.path.exists(path)


def test_low_space_takes_the_oldest_first_and_stops_when_it_is_enough(store):
    for day in range(1, 8):
        live(store, 1, start=day)
        keep(store, bytes([day]) * 5000)
    done = originals.purge(store, need_bytes=8192)
    assert [originals.parse(name).day for name in done.names] == [1]
    assert done.freed_bytes >= 8192
    done = originals.purge(store, need_bytes=1)
    assert [originals.parse(name).day for name in done.names] == [2]


def test_low_space_stops_at_the_floor(store):
    for day in range(1, 8):
        live(store, 1, start=day)
        keep(store, bytes([day]) * 5000)
    originals.purge(store, need_bytes=1 << 60)
    left = sorted(kept.day for kept in originals.entries(store))
    assert left == [day for day in range(1, 8) if 7 - day < FLOOR_DAYS]


def test_an_original_that_changed_is_never_purged(store):
    """A program that had it open may have written to it after it came here: that is then the only copy."""
    live(store, 1)
    path = keep(store, b"one")
    (kept,) = originals.entries(store)
    with open(path, "ab") as file:
        file.write(b"more")
    live(store, 50, start=1)
    done = originals.purge(store, need_bytes=1 << 60)
    assert (done.names, done.changed) == ([], [kept.name])
    assert os.path.exists(path)
    with pytest.raises(ValueError, match="not what it was"):
        originals.open_verified(store, kept)


def test_an_original_that_is_open_for_writing_waits(store):
    live(store, 1)
    path = keep(store, b"one")
    live(store, 50, start=1)
    with open(path, "r+b"):
        if store.config.probe.leases:
            assert originals.purge(store).names == []
    assert len(originals.purge(store).names) == 1


@pytest.mark.parametrize("call", ["open", "stat"])
def test_an_original_that_the_disk_does_not_give_keeps_no_other_from_going(store, monkeypatch, call):
    live(store, 1)
    paths = [keep(store, content) for content in (b"one", b"two", b"three")]
    live(store, 11, start=1)
    lost = sorted(os.path.basename(path) for path in paths)[0]
    really = getattr(os, call)

    def fail(name, *args, **more):
        if name == lost and more.get("dir_fd") == store.originals_fd:
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN), name)
        return really(name, *args, **more)

    monkeypatch.setattr(os, call, fail)
    findings = [(one.severity, one.path, one.problem) for one in check.check(store, lambda *_: None).findings]
    assert findings == [("damage", f"{RESERVED}/originals/{lost}", "unreadable")]
    assert len(originals.purge(store).names) == 2
    assert [os.path.basename(path) for path in paths if os.path.lexists(path)] == [lost]


def test_what_is_still_a_file_of_the_view_is_not_purged(store):
    """An exclusive store links the original into the window first; a crash may leave both names."""
    live(store, 1)
    path = keep(store, b"one")
    os.link(path, f"{store.path}/photo.jpg")
    live(store, 50, start=1)
    assert originals.purge(store).names == []


def test_what_recovery_put_aside_is_never_purged(store):
    path = f"{store.path}/{RESERVED}/originals/found-x"
    with open(path, "wb") as file:
        file.write(b"?")
    live(store, 100)
    originals.purge(store, need_bytes=1 << 60)
    assert originals.found(store) == ["found-x"]


def test_nothing_is_purged_that_the_ledger_does_not_take(store, monkeypatch):
    live(store, 1)
    path = keep(store, b"one")
    live(store, 50, start=1)
    store.ledger  # noqa: B018

    def fail(point):
        if point == "ledger.append":
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(faults, "reach", fail)
    with pytest.raises(OSError, match="full"):
        originals.purge(store)
    assert os.path.exists(path)


def test_originals_are_found_by_content_newest_first(store):
    keep(store, b"one", day=1)
    keep(store, b"one", day=3)
    keep(store, b"two", day=2)
    found = originals.find(store, hashlib.sha256(b"one").digest())
    assert [kept.day for kept in found] == [3, 1]
    fd = originals.open_verified(store, found[0])
    assert os.read(fd, 9) == b"one"
    os.close(fd)


def test_no_undo_window_means_purge_at_once(store):
    store.config = structs.replace(store.config, undo_days=0)
    keep(store, b"one")
    assert len(originals.purge(store).names) == 1


def test_a_disk_without_any_room_is_helped_by_a_purge(tmp_path):
    """The purge has to be in the ledger first, so the ledger holds room of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user can't mount a tmpfs")
    try:
        init(str(disk / "store"), undo_days=10)
        with open_store(str(disk / "store")) as store:
            live(store, 1)
            path = keep(store, b"old" * 100_000)
            live(store, FLOOR_DAYS, start=1)
            while os.fstat(store.ledger._fd).st_size % 4096 < 4000:  # so that the next record needs another page
                store.ledger.append(ledger.Done(job="0" * 16))
            with open(disk / "store" / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
            assert originals.purge(store, need_bytes=1).freed_bytes >= 300_000
            assert not os.path.exists(path)
            assert os.statvfs(disk).f_bavail > 0
        settled = list((disk / "store" / RESERVED / "ledger" / "settled").iterdir())
        assert sum(one.stat().st_blocks * 512 for one in settled) < ledger.RESERVED_BYTES
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
