"""One compactor at a time: between machines by a watched line, on one machine by who lives."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from esrfs.mount import lifecycle
from esrfs.mount.options import parse
from esrfs.store import lease as lease_module
from esrfs.store import recovery
from esrfs.store.errors import StoreError
from esrfs.store.initialise import init
from esrfs.store.layout import RESERVED, open_store
from esrfs.store.lease import DEAD_SECONDS, HOLD_SECONDS, CompactorLease
from tests.witness import wait_until


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "store"
    init(str(path))
    return path


@pytest.fixture
def machine(root):
    """``machine("name")`` opens the store as another machine would."""
    opened = []

    def boot(name=""):
        store = open_store(str(root))
        if name:
            store.host = name.ljust(12, "0")
        one = CompactorLease(store)
        opened.append((one, store))
        return one

    yield boot
    for one, store in opened:
        one.close()
        store.close()


class Clocks:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def clock_gettime(self, _):
        return self.now

    CLOCK_BOOTTIME = 7


@pytest.fixture
def clocks(monkeypatch):
    fake = Clocks()
    monkeypatch.setattr(lease_module, "time", fake)
    return fake


def test_the_first_gets_it_and_gives_it_back(machine):
    one, two = machine("a"), machine("b")
    assert one.acquire()
    assert one.held
    assert one.acquire(), "asking again is no harm"
    assert not two.acquire()
    assert not two.held
    assert one.holder.startswith("a0")
    one.release()
    assert not one.held
    assert two.holder == ""
    assert two.acquire()


def test_another_machine_waits_until_nothing_changes_any_more(machine, clocks):
    one, two = machine("a"), machine("b")
    assert one.acquire()
    for _ in range(20):
        clocks.now += DEAD_SECONDS / 2
        assert one.renew()
        assert not two.acquire()
    clocks.now += DEAD_SECONDS - 1
    assert not two.acquire()
    clocks.now += 2
    assert two.acquire()
    assert not one.renew(), "the first notices"
    assert not one.held
    assert two.renew()


def test_an_observer_counts_from_its_own_first_look(machine, clocks):
    one, two = machine("a"), machine("b")
    one.acquire()
    clocks.now += 100 * DEAD_SECONDS
    assert not two.acquire()
    clocks.now += DEAD_SECONDS
    assert two.acquire()


def test_a_holder_that_can_not_renew_stops_before_another_takes_over(machine, clocks):
    one = machine("a")
    one.acquire()
    clocks.now += HOLD_SECONDS + 1
    assert not one.held
    assert HOLD_SECONDS < DEAD_SECONDS
    assert one.renew(), "nobody took it meanwhile"
    assert one.held


def test_on_one_machine_the_living_keep_it_and_the_dead_are_followed_at_once(machine, root):
    script = """
import sys, time
from esrfs.store.layout import open_store
from esrfs.store.lease import CompactorLease
one = CompactorLease(open_store(sys.argv[1]))
print(one.acquire(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        mine = machine()
        assert not mine.acquire()
        child.kill()
        child.wait()
        assert mine.acquire()


def test_two_in_one_process_are_two(machine):
    one, two = machine(), machine()
    assert one.acquire()
    assert not two.acquire()
    one.close()
    assert two.acquire()


@pytest.mark.parametrize("line", [b"\0" * 64, b"x" * 64, b"00000000 a b c 1" + b" " * 47 + b"\n", b"short"])
def test_a_torn_line_is_somebodys_until_it_has_not_changed_for_long(machine, root, clocks, line):
    one = machine("a")
    (root / RESERVED / "compactor").write_bytes(line)
    assert not one.acquire()
    clocks.now += DEAD_SECONDS
    assert one.acquire()
    assert one.renew()


def test_the_line_is_rewritten_in_place(machine, root):
    """So that it can be renewed on a full disk."""
    one = machine()
    one.acquire()
    before = os.stat(root / RESERVED / "compactor")
    for _ in range(3):
        one.renew()
    after = os.stat(root / RESERVED / "compactor")
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size) == (after.st_ino, 64)


def test_a_read_only_store_has_no_compactor(root):
    with open_store(str(root), readonly=True) as store, pytest.raises(StoreError, match="read-only"):
        CompactorLease(store)


# ---- a mount that takes over


@pytest.fixture
def elsewhere(machine):
    """The lease of another machine, which has it."""
    one = machine("one")
    assert one.acquire()
    return one


@pytest.fixture
def mount(root, tmp_path, elsewhere, monkeypatch):
    """A mount of that store, as far as it goes without FUSE; its thread looks after the lease all the time."""
    monkeypatch.setattr(lifecycle, "RENEW_SECONDS", 0.01)
    (tmp_path / "mount").mkdir()
    with open_store(str(root)) as store, lifecycle.Mount(store, str(tmp_path / "mount"), parse([])) as mount:
        thread = threading.Thread(target=mount._keep_lease)
        mount.start_looking = thread.start
        yield mount
        mount._ending.set()
        thread.join()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")])
def test_a_takeover_is_one_when_what_was_left_is_ended(elsewhere, mount, monkeypatch, expect_log, error):
    """A mount must not compact over what the one before left in the middle, nor give up on it."""
    expect_log("the ledger can't be written" if isinstance(error, OSError) else "tried again")
    assert not mount._is_compactor()
    real, seen = recovery.recover, []

    def recover(store):
        seen.append(mount._is_compactor())
        if len(seen) <= 3:
            raise error
        return real(store)

    monkeypatch.setattr(recovery, "recover", recover)
    mount.start_looking()
    time.sleep(0.05)
    assert seen == []
    elsewhere.release()
    wait_until(mount._is_compactor)
    assert seen == [False] * 4
    assert mount._compaction_state() == mount._scheduler.state
    time.sleep(0.05)
    assert len(seen) == 4, "once it is done it is done"


def test_a_name_in_staging_that_is_no_text_stops_no_mount_and_is_told_once(root, tmp_path, caplog, expect_log):
    expect_log("not put there by esrfs")
    (tmp_path / "mount").mkdir()
    with open_store(str(root)) as store:
        strange = os.path.join(os.fsencode(root), b".esrfs/staging", store.host.encode(), b"IMG_\xff.jpg")
        Path(os.fsdecode(strange)).touch()
        with lifecycle.Mount(store, str(tmp_path / "mount"), parse([])) as mount:
            mount._take_charge()
            assert mount._recovered
    assert len([message for message in caplog.messages if "IMG_" in message]) == 1
    assert os.path.exists(strange)
