"""The engine's client and worker process, with a handler that does as told (``fake_engine_handler``): no network runs
here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esrfs.compaction.outcome import Policy, Verdict
from esrfs.engine import client, protocol
from esrfs.engine.client import LATENCY_BOUNDS, Engine, EngineError, EngineSettings, Rebuilt, Ticket
from esrfs.engine.protocol import Lane

WEIGHTS = b"weights" * 1000
SHA256 = hashlib.sha256(WEIGHTS).digest()

MakeEngine = Callable[..., Engine]


def network_bytes(sha256: bytes) -> bytes:
    if sha256 != SHA256:
        raise FileNotFoundError("no such network in this store")
    return WEIGHTS


def descriptors() -> set[tuple[str, str]]:
    """(number, what it stands for) of each: a pipe's or socket's number is its own, so a reused descriptor is a new
    one."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    """Engines with the fake handler; afterwards no process, thread or descriptor of theirs is left (as gocryptfs
    checks)."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    before, threads_before = descriptors(), set(threading.enumerate())
    engines: list[Engine] = []

    def make(**settings: object) -> Engine:
        engine = Engine(EngineSettings(handler="fake_engine_handler", **settings), network_bytes)  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        begun = time.monotonic()
        engine.close()
        assert time.monotonic() - begun < 1.5
    # The reader of a worker that ended by itself may be at its last line.
    wait_until(lambda: set(threading.enumerate()) <= threads_before, 2)
    assert descriptors() - before == set()  # what others left may well be closed meanwhile
    assert not zombies_or_workers()


def zombies_or_workers() -> list[str]:
    found = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # a thread may end while we look
            found += Path(f"/proc/self/task/{thread}/children").read_text().split()
    return found


def order(
    engine: Engine, words: str, *, key: bytes | None = None, lane: Lane = Lane.INTERACTIVE, payload: bytes = b""
) -> Ticket[Rebuilt]:
    return engine.rebuild(key or os.urandom(8), lambda: (words.encode(), payload), lane)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_values_in_values_out(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert engine.state == "stopped"
    payload = os.urandom(5_000_001)
    rebuilt = order(engine, "echo", payload=payload).wait()
    assert rebuilt.file.read() == payload
    assert rebuilt.sha256 == hashlib.sha256(payload).digest()
    assert rebuilt.exact
    wait_until(lambda: engine.state == "idle")
    assert engine.counters.reconstructions == 1


def test_reconstructions_are_counted_by_how_long_was_waited_for_them(make_engine: MakeEngine) -> None:
    engine = make_engine()
    order(engine, "hang 0.6").wait()
    with pytest.raises(EngineError):
        order(engine, "fail for good").wait()
    counters = engine.counters
    assert len(counters.latencies) == len(LATENCY_BOUNDS) + 1
    assert sum(counters.latencies) == sum(counters.latencies[LATENCY_BOUNDS.index(1.0) :]) == 1
    assert 0.6 <= counters.latency_seconds < 30


def test_compaction_and_upscale_and_networks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    outcome = engine.compact(b"echo", Policy(), {"lite-x2": SHA256})
    assert outcome.verdict == Verdict.COMPACTED
    assert engine.upscale(b"image", SHA256) == WEIGHTS + b"image"
    assert order(engine, f"network {SHA256.hex()}").wait().file.read() == WEIGHTS
    with pytest.raises(EngineError, match="no such network in this store"):
        order(engine, "network " + "00" * 32).wait()
    assert engine.counters.compactions == 1


def test_failures_are_told_once_and_not_retried(make_engine: MakeEngine, expect_log: Callable[[str], None]) -> None:
    expect_log("job .* failed|Traceback|File|KeyError|engine:")
    engine = make_engine()
    with pytest.raises(EngineError, match="broken picture"):
        order(engine, "fail broken picture").wait()
    with pytest.raises(EngineError, match="KeyError"):
        order(engine, "crash oops").wait()

    def load() -> tuple[bytes, bytes]:
        raise OSError("the blob is gone")

    with pytest.raises(EngineError, match="the blob is gone"):
        engine.rebuild(b"k", load).wait()
    assert engine.counters.failures == 3
    assert engine.counters.restarts == 0


def test_killed_worker_is_restarted_and_the_job_retried(
    make_engine: MakeEngine, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("engine ended")
    engine = make_engine()
    first = order(engine, "pid").wait().file.read()
    assert order(engine, f"die-once {tmp_path}/flag", payload=b"x").wait().file.read() == b"x"
    assert order(engine, "pid").wait().file.read() != first
    ticket = order(engine, "hang .5", payload=b"y")
    wait_until(lambda: engine.state == "busy")
    os.kill(int(order(engine, "pid").wait().file.read()), signal.SIGKILL)
    assert ticket.wait().file.read() == b"y"
    assert engine.counters.restarts == 2
    assert engine.counters.failures == 0


def test_a_job_that_kills_the_worker_twice_fails_alone(
    make_engine: MakeEngine, expect_log: Callable[[str], None]
) -> None:
    expect_log("engine ended")
    engine = make_engine()
    innocent = order(engine, "hang .3", payload=b"fine")
    poison = order(engine, "die")
    with pytest.raises(EngineError, match="ended twice"):
        poison.wait()
    assert innocent.wait().file.read() == b"fine"
    assert order(engine, "echo", payload=b"z").wait().file.read() == b"z"
    assert engine.counters.restarts == 2


def test_what_the_engine_ended_with_is_told(
    make_engine: MakeEngine, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    """Neither a job that others were beside, nor one that came to an engine which can't even start, is suspect."""
    expect_log("engine ended|the engine can't start|engine: |accelerator failed")
    engine = make_engine()
    with pytest.raises(EngineError) as alone:
        engine.compact(b"die", Policy(), {})
    assert alone.value.ends == 2

    compaction = engine.compact_ticket(f"work {tmp_path}/notes 60".encode(), Policy(), {})
    wait_until((tmp_path / "notes").exists)
    with pytest.raises(EngineError):
        order(engine, "die").wait()
    wait_until(lambda: (tmp_path / "notes").read_text().count("begin") == 2)
    os.kill(int(order(engine, "pid").wait().file.read()), signal.SIGKILL)
    with pytest.raises(EngineError, match="ended twice") as beside:
        compaction.wait(20)
    assert beside.value.ends == 1

    broken = Engine(EngineSettings(handler="no_such_handler"), network_bytes)
    with contextlib.closing(broken), pytest.raises(EngineError) as unready:
        broken.compact(b"echo", Policy(), {})
    assert unready.value.ends == 0

    with_accelerator = make_engine(device="cuda")
    with pytest.raises(EngineError) as failed:
        with_accelerator.compact(b"die-on cpu", Policy(), {})
    assert failed.value.ends == 1


def test_an_idle_worker_that_is_killed_is_no_failure(
    make_engine: MakeEngine, expect_log: Callable[[str], None]
) -> None:
    expect_log("engine ended")
    engine = make_engine()
    os.kill(int(order(engine, "pid").wait().file.read()), signal.SIGKILL)
    assert order(engine, "echo", payload=b"z").wait().file.read() == b"z"
    assert engine.counters.failures == 0


def test_accelerator_failure_is_retried_on_the_cpu(make_engine: MakeEngine, expect_log: Callable[[str], None]) -> None:
    expect_log("engine ended|accelerator failed")
    engine = make_engine(device="cuda")
    assert order(engine, "device").wait().file.read() == b"cpu"


def test_a_stopped_worker_is_killed_when_the_time_limit_passes(
    make_engine: MakeEngine, expect_log: Callable[[str], None]
) -> None:
    expect_log("engine ended|reported nothing")
    engine = make_engine(time_limit=0.5)
    order(engine, "echo").wait()
    with pytest.raises(EngineError, match="ended twice"):
        order(engine, "stop").wait(20)
    assert order(engine, "echo", payload=b"z").wait(20).file.read() == b"z"


@pytest.mark.parametrize("goes_on", [False, True], ids=["given up", "goes on as read-ahead"])
def test_a_stopped_worker_is_killed_soon_when_its_readers_gave_up(
    make_engine: MakeEngine, expect_log: Callable[[str], None], goes_on: bool
) -> None:
    """Not only after the hour that a compaction may take: each photograph read until then would fail."""
    expect_log("engine ended|reported nothing")
    engine = make_engine(time_limit=0.5)
    order(engine, "echo").wait()
    ticket = order(engine, "stop", key=b"k")
    with pytest.raises(TimeoutError):
        ticket.wait()
    if goes_on:
        order(engine, "stop", key=b"k", lane=Lane.READ_AHEAD)
    ticket.release()
    wait_until(lambda: engine.counters.restarts >= 1, 5)
    if not goes_on:
        assert order(engine, "echo", payload=b"z").wait(20).file.read() == b"z"


def test_a_worker_that_is_busy_with_a_large_picture_is_not_killed_for_a_small_one_beside_it(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(time_limit=0.5)
    order(engine, "echo").wait()
    large = engine.rebuild(b"large", lambda: (b"hang 2", b"l"), megapixels=2.0)
    small = engine.rebuild(b"small", lambda: (b"hang 2.1", b"s"), megapixels=0.01)
    assert large.wait(20).file.read() == b"l"
    assert small.wait(20).file.read() == b"s"
    assert engine.counters.restarts == 0


@pytest.mark.parametrize("lane", [Lane.INTERACTIVE, Lane.READ_AHEAD])
def test_a_job_that_is_stuck_is_noticed_while_the_worker_does_others(
    make_engine: MakeEngine, expect_log: Callable[[str], None], lane: Lane
) -> None:
    """It took one of the places for readers until the next mount. It is known, so nobody waits while it is tried
    again."""
    expect_log("is stuck on one job|engine ended")
    engine = make_engine(time_limit=1.0)
    order(engine, "echo").wait(20)
    stuck = order(engine, "hang 60", lane=lane)
    deadline = time.monotonic() + 15
    while not stuck.done:
        assert time.monotonic() < deadline
        assert order(engine, "echo", payload=b"z").wait(20).file.read() == b"z"
        time.sleep(0.05)
    with pytest.raises(EngineError, match="was stuck on this") as stuck_on_it:
        stuck.wait()
    assert stuck_on_it.value.ends == 1
    assert engine.counters.restarts == 1
    assert order(engine, "echo", payload=b"y").wait(20).file.read() == b"y"


def test_a_job_that_gives_way_to_readers_for_long_is_not_stuck(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(time_limit=1.0)
    order(engine, "echo").wait(20)
    notes = tmp_path / "notes"
    first, second = (order(engine, "hang .4") for _ in range(2))
    ahead = order(engine, f"work {notes} .1", lane=Lane.READ_AHEAD)
    for _ in range(12):
        first.wait(20)
        first, second = second, order(engine, "hang .4")
    ahead.wait(20)
    assert engine.counters.restarts == 0


@pytest.mark.parametrize("name", ["engine-dispatcher", "engine-reader", "engine-stderr"])
def test_a_thread_that_can_not_be_started_costs_one_job(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None], name: str
) -> None:
    """A limit on processes that is met once was the end of all reconstruction, until the next mount."""
    expect_log("could not be started")
    start, refused = threading.Thread.start, []

    def refuse_once(thread: threading.Thread) -> None:
        if thread.name == name and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    engine = make_engine()
    with pytest.raises(EngineError, match="could not be started"):
        order(engine, "echo", key=b"k").wait(20)
    assert engine.state == "stopped"
    assert not zombies_or_workers()
    assert order(engine, "echo", key=b"k", payload=b"z").wait(20).file.read() == b"z"


def test_an_engine_that_can_not_start_its_thread_is_closed_all_the_same(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    engine = make_engine()
    engine.start()  # for the first reader, of whom there is none yet
    with pytest.raises(EngineError, match="could not be started"):
        order(engine, "echo")
    engine.close()


def test_an_error_in_the_dispatcher_costs_one_job(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("the engine's dispatcher")
    engine = make_engine()
    spawn, failed = client._spawn, []

    def fail_once(device: client.Device, settings: EngineSettings) -> object:
        if not failed:
            failed.append(1)
            raise MemoryError
        return spawn(device, settings)

    monkeypatch.setattr(client, "_spawn", fail_once)
    with pytest.raises(EngineError, match="MemoryError"):
        order(engine, "echo").wait(5)
    assert order(engine, "echo", payload=b"z").wait(20).file.read() == b"z"


def test_wait_times_out_and_release_cancels(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    notes = tmp_path / "notes"
    ticket = order(engine, f"work {notes} 60")
    with pytest.raises(TimeoutError):
        ticket.wait(0.2)
    queued = [order(engine, f"work {notes} 60") for _ in range(3)]
    wait_until(lambda: notes.exists() and len(notes.read_text().split("\n")) == 3)  # two are in flight
    for each in [ticket, *queued]:
        each.release()
        each.release()
        with pytest.raises(EngineError, match="cancelled"):
            each.wait()
    assert order(engine, "echo", payload=b"z").wait(5).file.read() == b"z"
    wait_until(lambda: engine.state == "idle", 2)
    assert "end" not in notes.read_text()
    assert engine.counters.failures == 0


def test_lanes(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Interactive before read-ahead before compaction, in the queue and while running."""
    engine = make_engine()
    notes = tmp_path / "notes"
    compaction = engine.compact_ticket(f"work {notes} .3".encode(), Policy(), {})
    wait_until(notes.exists)
    ahead = [order(engine, f"work {notes} .1", lane=Lane.READ_AHEAD) for _ in range(3)]
    wait_until(lambda: "begin 2" in notes.read_text())
    now = order(engine, f"work {notes} .1")
    compaction.wait()
    for ticket in ahead:
        ticket.wait()
    now.wait()
    lines = notes.read_text().split("\n")
    assert lines.index("begin 5") < lines.index("end 5") < lines.index("end 2") < lines.index("begin 4")
    assert lines.index("end 4") < lines.index("end 1")


def test_demote_and_promote(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    notes = tmp_path / "notes"
    blocker = [order(engine, f"work {notes} .3") for _ in range(2)]
    key = b"shared"
    first = order(engine, f"work {notes} .3", key=key)
    other = order(engine, f"work {notes} .05")
    first.demote()
    for ticket in [*blocker, other, first]:
        ticket.wait()
    lines = notes.read_text().split("\n")
    assert lines.index("end 4") < lines.index("end 3")
    ticket = order(engine, "echo", lane=Lane.READ_AHEAD)
    ticket.wait()
    ticket.demote()  # when done: no effect


def sent(monkeypatch: pytest.MonkeyPatch) -> list[protocol.Request]:
    """What is sent to workers from now on."""
    messages: list[protocol.Request] = []
    send = client._Worker.send

    def note(worker: client._Worker, message: protocol.Request, payload: protocol.Payload = b"") -> None:
        messages.append(message)
        send(worker, message, payload)

    monkeypatch.setattr(client._Worker, "send", note)
    return messages


def test_a_lane_that_changes_while_the_job_is_loaded_is_told(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = sent(monkeypatch)
    engine = make_engine()
    tickets: list[Ticket[Rebuilt]] = []

    def load() -> tuple[bytes, bytes]:
        wait_until(lambda: bool(tickets))
        tickets[0].demote()
        return b"hang .2", b"view"

    tickets.append(engine.rebuild(b"key", load))
    assert tickets[0].wait(20).file.read() == b"view"
    assert [type(message) for message in messages] == [protocol.Rebuild, protocol.SetLane]
    tickets.clear()  # which ``load`` refers to, and the result to that
    assert [message.lane for message in messages] == [Lane.INTERACTIVE, Lane.READ_AHEAD]  # type: ignore[union-attr]


def test_a_note_to_a_worker_that_ended_costs_no_other_note(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Its successor would go on with what nobody waits for, in the first readers' way."""
    engine = make_engine()
    notes = tmp_path / "notes"
    ticket = order(engine, f"work {notes} 60")
    wait_until(notes.exists)
    worker = engine._worker
    assert worker is not None
    ended, other = socket.socketpair()
    for each in (ended, other):
        each.close()
    with engine._lock:
        engine._notes.append((client._Worker(worker.process, ended), protocol.Cancel(job=99)))
        engine._notes.append((worker, protocol.Cancel(job=1)))
        engine._changed.notify_all()
    with pytest.raises(EngineError, match="cancelled"):
        ticket.wait(5)


def test_single_flight(make_engine: MakeEngine) -> None:
    engine = make_engine()
    loads = []

    def load() -> tuple[bytes, bytes]:
        loads.append(1)
        return b"hang .2", b"view"

    tickets = [engine.rebuild(b"key", load) for _ in range(10)]
    for ticket in tickets[:5]:
        ticket.release()
    assert tickets[7].wait().file.read() == b"view"
    assert len(loads) == 1
    assert engine.counters.reconstructions == 1
    late = engine.rebuild(b"key", load)  # finished, but those who waited may not have put the result away yet
    assert late.wait(0).file.read() == b"view"
    for ticket in [*tickets, late]:
        ticket.release()
    assert len(loads) == 1
    assert engine.rebuild(b"key", load).wait().file.read() == b"view"  # all have: a new job
    assert len(loads) == 2


def test_300_waiters_hold_no_lock(make_engine: MakeEngine) -> None:
    """Cold readers of 300 files; whoever asks for anything else isn't held up (DESIGN 6)."""
    engine = make_engine()
    order(engine, "echo").wait()
    slow = [order(engine, "hang .7"), order(engine, "hang .7")]
    results: list[bytes] = []

    def read(number: int) -> None:
        ticket = order(engine, "echo", payload=str(number).encode())
        results.append(ticket.wait().file.read())
        ticket.release()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(300)]
    for thread in threads:
        thread.start()
    worst = 0.0
    for _ in range(20):
        begun = time.monotonic()
        assert engine.state == "busy"
        order(engine, "echo", lane=Lane.READ_AHEAD).release()
        worst = max(worst, time.monotonic() - begun)
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    for ticket in slow:
        ticket.wait()
    assert sorted(map(int, results)) == list(range(300))
    assert worst < 0.05


def test_close_fails_waiters_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    errors: list[str] = []

    def read() -> None:
        try:
            order(engine, "hang 60").wait()
        except EngineError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_until(lambda: engine.state == "busy")
    begun = time.monotonic()
    engine.close()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun < 1
    assert len(errors) == 20
    assert "shutting down" in errors[0]
    with pytest.raises(EngineError, match="shutting down"):
        order(engine, "echo")
    engine.close()


def test_close_while_starting(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.start()
    engine.close()
    make_engine().close()


def test_idle_worker_gives_its_memory_back(make_engine: MakeEngine) -> None:
    engine = make_engine(idle_seconds=0.3)
    pid = int(order(engine, "pid").wait().file.read())
    wait_until(lambda: engine.state == "stopped", 3)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 3)  # reaped, too
    assert int(order(engine, "pid").wait().file.read()) != pid
    assert engine.counters.restarts == 0
    wait_until(lambda: engine.state == "stopped", 3)
    engine.start()
    wait_until(lambda: engine.state == "idle")


def test_worker_ends_with_the_mount(make_engine: MakeEngine, tmp_path: Path) -> None:
    """kill -9 of the client: nothing is left behind, even of a worker that is stuck."""
    program = f"""
import sys, time
from esrfs.engine.client import *
engine = Engine(EngineSettings(handler="fake_engine_handler"), lambda sha: b"")
print(engine.rebuild(b"a", lambda: (b"pid", b"")).wait().file.read().decode(), flush=True)
engine.rebuild(b"b", lambda: (b"work {tmp_path}/begun 60", b""))
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_until((tmp_path / "begun").exists)
        process.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 3)


def test_client_imports_neither_torch_nor_numpy() -> None:
    program = "import sys, esrfs.engine.client; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"[]\n"


def test_stderr_goes_to_logging(
    make_engine: MakeEngine, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("engine:")
    engine = make_engine()
    order(engine, "warn mind the step").wait()
    wait_until(lambda: "engine: a library says hello" in caplog.messages)
    assert any("mind the step" in message for message in caplog.messages)


@pytest.mark.parametrize("faults", ["engine.rebuild=sleep:.4"])
def test_fault_points(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, faults: str) -> None:
    monkeypatch.setenv("ESRFS_FAULTS", faults)
    engine = make_engine()
    engine.start()
    wait_until(lambda: engine.state == "idle")
    begun = time.monotonic()
    order(engine, "echo").wait()
    assert time.monotonic() - begun > 0.4
