"""The ledger's format, and who may append to it."""

from __future__ import annotations

import errno
import os

import pytest

from esrfs import faults
from esrfs.store import ledger
from esrfs.store.ledger import Day, Done, FileMark, Found, Intent, Ledger, Opened, Purged, ToPlain, Undone

MARK = FileMark(ino=5, handle="1:ab", size=7, mtime_ns=-3, metadata="aa")
INTENT = Intent(
    job="0" * 16,
    path=ledger.quote("a/b c.jpg"),
    parent_ino=2,
    staging="s",
    kept="k",
    linked=False,
    original=MARK,
    blob=MARK,
    sha256_original="00",
    sha256_blob="11",
)
PLAIN = ToPlain(
    job="1" * 16,
    path="",
    parent_ino=0,
    staging="s",
    in_place=True,
    purpose="write",
    blob=MARK,
    plain=MARK,
    sha256_plain="22",
)
RECORDS = [
    Opened(host="h", boot="b", session="s", pid=1),
    INTENT,
    PLAIN,
    Done(job="0" * 16),
    Undone(job="1" * 16, why="because"),
    Purged(name="n", why="old"),
    Found(name="n", why="?"),
    Day(number=1, date="2024-01-01", boot="b", uptime=1.5),
]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / ledger.SETTLED).mkdir()
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def reach(monkeypatch):
    """``reach(point, errno)`` makes a fault point fail."""

    def arrange(point: str, number: int) -> None:
        def fail(name: str) -> None:
            if name == point:
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(faults, "reach", fail)

    return arrange


def test_every_record_survives():
    data = b"".join(map(ledger.encode, RECORDS))
    assert data.count(b"\n") == len(RECORDS)
    assert ledger.decode(data) == ledger.Reading(RECORDS, 0, torn=False)


def test_a_line_is_a_crc_and_json():
    """The format is documented: a shell and a person can read it."""
    assert ledger.encode(Done(job="ab")) == b'effb04b0 {"kind":"done","job":"ab"}\n'


@pytest.mark.parametrize("path", ["plain.jpg", "sub dir/\n new\\line", "\udcff\udc80.jpg", "ümläut", "a%20b", ""])
def test_any_name_survives(path):
    quoted = ledger.quote(path)
    assert quoted.isascii()
    assert "\n" not in quoted
    assert ledger.unquote(quoted) == path


def test_pending_is_what_was_begun_and_not_ended():
    assert ledger.pending(RECORDS[:3]) == [INTENT, PLAIN]
    assert ledger.pending(RECORDS[:4]) == [PLAIN]
    assert ledger.pending(RECORDS) == []


def test_a_record_after_a_torn_line_is_read(directory, tmp_path):
    fd = os.open("torn", os.O_RDWR | os.O_CREAT, dir_fd=directory)
    os.write(fd, ledger.encode(RECORDS[0]) + ledger.encode(INTENT)[:-20])
    ledger.append_to(fd, Done(job="x"), fsync=True)
    assert ledger.read_fd(fd) == ledger.Reading([RECORDS[0], Done(job="x")], 1, torn=False)
    os.close(fd)


def test_records_of_a_newer_version_are_damage_not_a_crash():
    line = ledger.encode(Done(job="x")).replace(b"done", b"gone")
    assert ledger.decode(line).damaged == 1


def test_closing_with_nothing_pending_makes_it_history(directory, tmp_path):
    own = Ledger(directory, "host", "boot", "session1")
    own.append(INTENT)
    own.append(Done(job=INTENT.job))
    own.close()
    assert not (tmp_path / own.name).exists()
    assert os.listdir(tmp_path / ledger.SETTLED) == ["host-boot-session1"]


def test_closing_with_a_pending_step_leaves_it_to_recovery(directory, tmp_path):
    own = Ledger(directory, "host", "boot", "session1")
    own.append(INTENT)
    own.close()
    own.close()
    assert (tmp_path / "host-boot-session1").exists()


def test_the_writer_holds_a_lock_as_long_as_it_lives(directory):
    own = Ledger(directory, "host", "boot", "session1")
    fd = os.open(own.name, os.O_RDWR, dir_fd=directory)
    with pytest.raises(BlockingIOError):
        ledger.lock(fd)
    own.append(INTENT)
    own.close()
    assert ledger.lock(fd)
    os.close(fd)


def test_a_full_disk_leaves_no_half_record_and_may_pass(directory, reach, monkeypatch):
    own = Ledger(directory, "host", "boot", "session1")
    reach("ledger.append", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        own.append(INTENT)
    monkeypatch.undo()
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:10], at))
    with pytest.raises(OSError, match="No space"):
        own.append(INTENT)
    monkeypatch.undo()
    own.append(INTENT)
    fd = os.open(own.name, os.O_RDONLY, dir_fd=directory)
    reading = ledger.read_fd(fd)
    os.close(fd)
    assert reading.records[1:] == [INTENT]
    assert not reading.damaged
    own.close()


def test_a_failed_fsync_ends_it(directory, reach, monkeypatch):
    own = Ledger(directory, "host", "boot", "session1")
    reach("ledger.fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        own.append(INTENT)
    monkeypatch.undo()
    with pytest.raises(OSError, match="failed before"):
        own.append(INTENT)
    assert own.failure is not None
    own.close()


def mark(directory: int, date: str, boot: str = "boot", hours: float = 0.0) -> int:
    return ledger.mark_day(directory, date=date, boot=boot, uptime=hours * 3600)


def test_a_day_is_counted_once(directory):
    assert ledger.days_seen(directory) == 0
    assert mark(directory, "2024-01-01") == 1
    assert mark(directory, "2024-01-01", hours=30) == 1
    assert mark(directory, "2024-01-02", hours=31) == 2
    assert mark(directory, "2024-01-03", hours=32) == 2, "not so soon after the last"
    assert mark(directory, "2024-01-03", hours=52) == 3
    assert ledger.days_seen(directory) == 3


def test_a_clock_that_jumps_adds_one_day_at_most(directory):
    mark(directory, "2024-01-01")
    for hours, year in enumerate(range(1970, 2100, 7)):
        mark(directory, f"{year}-06-01", hours=hours / 2)
    assert ledger.days_seen(directory) <= 2


def test_a_clock_without_battery_adds_no_days(directory):
    for boot in range(40):
        mark(directory, "1970-01-01", boot=f"boot{boot}")
    assert ledger.days_seen(directory) == 1


def test_a_clock_that_was_ahead_does_not_stop_the_count(directory):
    mark(directory, "2040-01-01", boot="a")
    assert mark(directory, "2024-01-01", boot="b") == 2
    assert mark(directory, "2024-01-02", boot="c") == 3
