"""Memory: what passes through a process is not held there; what a large picture takes is bounded by its pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

from esrfs import formats, reconstruction
from esrfs.blob.recipe import Recipe
from esrfs.compaction import compactor, lossless
from esrfs.compaction.outcome import LOSSLESS, Outcome, Policy, Reason, Verdict
from esrfs.engine import filevalue, handler, protocol, room
from esrfs.engine.client import Engine, EngineError, EngineSettings
from esrfs.engine.errors import JobFailedError
from esrfs.engine.filevalue import FileValue
from esrfs.engine.lanes import Cancelled, Crossing, Running
from esrfs.engine.protocol import ConnectionLostError, Lane
from esrfs.networks import registry
from esrfs.reconstruction import Pixels
from esrfs.store.catalog import Catalog
from esrfs.store.initialise import init
from esrfs.store.layout import open_store
from esrfs.upkeep import compact
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import Done, Workshop
from tests import peaks

MEBIBYTE = 1 << 20


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def _send(connection: socket.socket, message: protocol.Message, payload: protocol.Payload) -> threading.Thread:
    thread = threading.Thread(target=protocol.send, args=(connection, message, payload))
    thread.start()
    return thread


def test_a_view_is_received_into_a_file(pair: tuple[socket.socket, socket.socket]) -> None:
    data = os.urandom(3 * filevalue.CHUNK + 17)
    message = protocol.Rebuilt(job=1, sha256=b"x" * 32, exact=True)
    thread = _send(pair[0], message, data)
    received, value = protocol.receive_small(pair[1])
    thread.join()
    assert received == message
    assert isinstance(value, filevalue.FileValue)
    assert value.read() == data
    thread = _send(pair[1], message, value)  # and from a file
    assert protocol.receive(pair[0]) == (message, data)
    thread.join()


def test_a_value_is_sent_as_long_as_was_said(pair: tuple[socket.socket, socket.socket]) -> None:
    """A file that becomes shorter while it is sent: the other end must not wait for ever for the rest."""
    value = filevalue.of_bytes(b"a" * 3000)
    os.truncate(value.descriptor, 1000)
    message = protocol.Cancel(job=1)
    thread = _send(pair[0], message, value)
    assert protocol.receive(pair[1]) == (message, b"a" * 1000 + bytes(2000))
    thread.join()


def test_the_end_of_a_stream_in_the_middle_of_a_view(pair: tuple[socket.socket, socket.socket]) -> None:
    message = protocol.Rebuilt(job=1, sha256=b"x" * 32, exact=True)
    head = protocol._encoder.encode(message)
    pair[0].sendall(protocol._HEAD.pack(len(head), 5000) + head + b"z" * 4000)
    pair[0].close()
    with pytest.raises(ConnectionLostError, match="closed"):
        protocol.receive_small(pair[1])


def test_a_value_closes_its_file() -> None:
    before = set(os.listdir("/proc/self/fd"))
    value = filevalue.of_bytes(b"abc")
    copy = filevalue.of_descriptor(value.descriptor, 3)
    del value
    assert copy.read() == b"abc"
    del copy
    assert set(os.listdir("/proc/self/fd")) == before


# What the work on a picture takes.


@pytest.mark.parametrize(
    ("work", "most"),
    [
        ("rebuild2", 190),
        pytest.param("rebuild1", 250, marks=pytest.mark.slow),
        pytest.param("metric", 155, marks=pytest.mark.slow),
    ],
)
def test_peaks_of_24_megapixels(work: str, most: int) -> None:
    """MiB. Another copy of the picture would be 69 more, or 92. ``rebuild2`` doubles an AVIF of one piece, ``rebuild1``
    decodes one of cells."""
    assert _peak(work, 6000, 4000, "--threads", 1)[0] / MEBIBYTE < most


def _peak(*arguments: object) -> list[int]:
    """What ``tests.peaks`` prints."""
    command = [sys.executable, "-m", "tests.peaks", *map(str, arguments)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_a_compaction_takes_no_more_than_it_asks_for() -> None:
    peak, asked = _peak("compact", 2000, 1500)
    assert 0 < peak < asked


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", [(4600, 3450), (6000, 4000)])
@pytest.mark.parametrize("kind", peaks.ORIGINALS)
def test_no_kind_takes_more_than_compaction_asks_for(kind: str, size: tuple[int, int]) -> None:
    """The largest that is coded in one piece, and one that is coded in cells."""
    peak, asked = _peak("compact", *size, kind)
    assert peak < asked


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_with_many_threads_no_more_than_compaction_asks_for() -> None:
    peak, asked = _peak("compact", 4000, 3000, "jpeg", "--threads", 12)
    assert peak < asked


@pytest.mark.slow
@pytest.mark.parametrize("kind", peaks.ORIGINALS)
def test_no_reconstruction_takes_more_than_is_thought(kind: str) -> None:
    """Of 24 megapixels; ``handler._REBUILDING`` is bytes for each."""
    (peak,) = _peak("rebuild2", 6000, 4000, kind)
    assert peak < handler._REBUILDING * 24e6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpeg", "jpeg-progressive"])
def test_without_loss_no_more_than_is_asked_for(kind: str) -> None:
    peak, asked = _peak("lossless", 6000, 4000, kind)
    assert peak < asked


# When there is not enough.


def _photograph(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width // 8, height // 8), 40).convert("RGB").resize((width, height)).save(out, "JPEG")
    return out.getvalue()


def test_a_machine_with_too_little_memory() -> None:
    """The job fails and says so; the engine lives, and does the next one."""
    weights = registry.find("lite-x2").read_bytes()
    sha256 = hashlib.sha256(weights).digest()
    engine = Engine(EngineSettings(device="cpu"), lambda _: weights)
    try:
        small = _photograph(160, 120)
        assert engine.upscale(small, sha256)[:4] == b"\x89PNG"
        worker = engine._worker
        assert worker is not None
        pid = worker.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 100 * MEBIBYTE
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        large = _photograph(7200, 5400)
        with pytest.raises(EngineError, match="too little memory"):
            engine.upscale(large, sha256)
        outcome = engine.compact(large, Policy(), {"lite-x2": sha256})
        assert (outcome.verdict, outcome.reason) == (Verdict.REFUSED, Reason.NO_MEMORY)
        assert "too little memory" in outcome.message
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert engine.upscale(small, sha256)[:4] == b"\x89PNG"
        assert engine._worker is worker, "the engine lived"
        assert engine.counters.restarts == 0
    finally:
        engine.close()


def test_compaction_waits_for_memory() -> None:
    """It knows what it takes, and doesn't begin: the kernel would end the engine, or another program."""
    original = _photograph(640, 480)
    outcome = compactor.compact(original, Policy(), [], _no_network, room=400e6)
    assert (outcome.verdict, outcome.reason) == (Verdict.REFUSED, Reason.NO_MEMORY)
    assert " GB of memory, and 0.4 GB are free" in outcome.message
    assert outcome.width == 640


def test_compaction_without_loss_waits_for_memory() -> None:
    original = _photograph(640, 480)
    policy = Policy(preset=LOSSLESS)
    assert compactor.compact(original, policy, [], _no_network).verdict is Verdict.COMPACTED
    outcome = compactor.compact(original, policy, [], _no_network, room=200e6)
    assert (outcome.verdict, outcome.reason) == (Verdict.REFUSED, Reason.NO_MEMORY)
    refused = Outcome(verdict=Verdict.REFUSED, reason=Reason.QUALITY)
    better = lossless.where_better(original, policy, refused, 200e6)
    assert better.reason is Reason.NO_MEMORY, "it is tried again"
    made = Outcome(verdict=Verdict.COMPACTED, avif=bytes(len(original)))
    assert lossless.where_better(original, policy, made, 200e6) is made


@pytest.mark.parametrize("kind", peaks.ORIGINALS)
def test_each_kind_says_what_it_takes(kind: str) -> None:
    original = peaks.ORIGINALS[kind](peaks._picture(160, 96))
    split = formats.split(original, 1)
    needed = compactor.memory(split, len(original), 2)
    assert needed - compactor.memory(split, 0, 2) == 5 * len(original)
    assert needed < compactor.memory(split, len(original), 3)
    outcome = compactor.compact(original, Policy(), [], _no_network, room=needed - 1, threads=2)
    assert (outcome.verdict, outcome.reason) == (Verdict.REFUSED, Reason.NO_MEMORY)
    assert "GB are free now" in outcome.message


class _Engine:
    """Answers every compaction alike, after ``meanwhile``."""

    def __init__(self, outcome: Outcome, meanwhile: Callable[[], object]) -> None:
        self.outcome = outcome
        self.meanwhile = meanwhile
        self.asked = 0
        self.done = True

    def compact_ticket(self, original: FileValue, *_: object) -> _Engine:
        self.asked += 1
        self.meanwhile()
        assert original.read()[:3] == b"\xff\xd8\xff"
        return self

    def wait(self, _: float) -> Outcome:
        return self.outcome

    def release(self) -> None:
        pass


def _left(tmp_path: Path, outcome: Outcome, meanwhile: Callable[[Path], object]) -> tuple[Done, Done]:
    """What becomes of a photograph in a store, twice."""
    init(str(tmp_path / "store"))
    photograph = tmp_path / "store" / "a.jpg"
    photograph.write_bytes(_photograph(640, 480))
    engine = _Engine(outcome, lambda: meanwhile(photograph))
    catalog = Catalog(str(tmp_path / "catalog"))
    with contextlib.closing(catalog), open_store(str(tmp_path / "store")) as store:
        workshop = Workshop(store, cast(Engine, engine), catalog, Claims(), lambda: True)
        done = compact.compact(workshop, "a.jpg"), compact.compact(workshop, "a.jpg")
    assert engine.asked == 2, "no verdict is remembered"
    return done


def test_a_file_without_memory_for_it_is_left(tmp_path: Path) -> None:
    outcome = Outcome(verdict=Verdict.REFUSED, reason=Reason.NO_MEMORY, message="too little")
    for done in _left(tmp_path, outcome, lambda _: None):
        assert (done.state, done.message) == ("left", "too little")


def test_a_file_that_changes_while_the_engine_has_it_gets_no_verdict(tmp_path: Path) -> None:
    """It is sent to the engine after it was hashed and looked at."""
    outcome = Outcome(verdict=Verdict.PASSED_THROUGH, reason=Reason.BROKEN, message="damaged")

    def change(photograph: Path) -> None:
        with open(photograph, "ab") as file:
            file.write(b"more")

    for done in _left(tmp_path, outcome, change):
        assert (done.state, done.message) == ("left", "it changed while it was compacted")


def _no_network(sha256: bytes, pixels: Pixels) -> Pixels:
    raise AssertionError("nothing is enlarged")


def test_room_is_that_of_the_system_and_of_the_unit(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    assert room.available(proc, cgroups) == float("inf")
    assert 0 < room.available() < float("inf")
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\nSwapFree: 1000 kB\n")
    assert room.available(proc, cgroups) == 6000 * 1024
    unit = cgroups / "system.slice" / "esrfs.service"
    unit.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/system.slice/esrfs.service\n")
    assert room.available(proc, cgroups) == 6000 * 1024
    (unit / "memory.max").write_text("max\n")
    (unit.parent / "memory.max").write_text("3000000\n")
    (unit.parent / "memory.current").write_text("2000000\n")
    (unit.parent / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    assert room.available(proc, cgroups) == 1_500_000


def test_room_is_that_of_the_container(tmp_path: Path) -> None:
    """Docker and Podman give each its own view of the groups, of which its own is the root."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/\n")
    cgroups.mkdir()
    assert room.available(proc, cgroups) == float("inf")
    (cgroups / "memory.max").write_text("3000000\n")
    (cgroups / "memory.current").write_text("2000000\n")
    (cgroups / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    assert room.available(proc, cgroups) == 1_500_000


def test_a_container_with_many_processors_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer threads, for each holds a tile: else nothing would ever be compacted there."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for free, threads in ((1.5e9, 3), (0.1e9, 2), (400e9, 64), (float("inf"), 64)):
        monkeypatch.setattr(room, "available", lambda free=free: free)
        monkeypatch.setattr(handler, "Crew", lambda threads: threads)
        assert handler.NetworkHandler("cpu", lambda _: b"").threads == threads


def test_upscaling_takes_no_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = registry.enlarger("lite-x2").read_bytes()
    work = handler.NetworkHandler("cpu", lambda _: weights)
    request = protocol.Upscale(job=1, network_sha256=hashlib.sha256(weights).digest())
    picture = io.BytesIO()
    Image.new("RGB", (300, 200)).save(picture, "PNG")
    job = Crossing().enter(1, Lane.READ_AHEAD)
    assert work.upscale(request, picture.getvalue(), job)
    monkeypatch.setattr(room, "available", lambda: 2e6)
    with pytest.raises(JobFailedError, match="of memory"):
        work.upscale(request, picture.getvalue(), job)


class _Reading(threading.Thread):
    """A reconstruction that takes ``needed`` bytes, and ends when it is told."""

    def __init__(self, turns: room.Turns, needed: float, job: Running) -> None:
        super().__init__(daemon=True)
        self.turns = turns
        self.needed = needed
        self.job = job
        self.begun, self.end, self.given_up = threading.Event(), threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with self.turns.taking(self.needed, self.job):
                self.begun.set()
                assert self.end.wait(60)
        except Cancelled:
            self.given_up.set()


def test_large_reads_take_turns_where_memory_is_short() -> None:
    free = [5e9]
    turns, crossing = room.Turns(lambda: free[0]), Crossing()
    numbers = itertools.count(1)

    def read(needed: float, lane: Lane = Lane.INTERACTIVE) -> _Reading:
        return _Reading(turns, needed, crossing.enter(next(numbers), lane))

    first = read(9e9)
    assert first.begun.wait(30), "who is alone goes ahead, whatever there is"
    second, third = read(1e9), read(1e9)
    assert not second.begun.wait(1.5)
    assert not third.begun.is_set()
    crossing.cancel(third.job.number)
    assert third.given_up.wait(30), "nobody waits for it any more: it is not to hold up a thread"
    first.end.set()
    assert second.begun.wait(30)
    free[0] = 20e9
    fourth = read(9e9)
    assert fourth.begun.wait(30), "there is room for both"
    for each in (second, fourth):
        each.end.set()
    for each in (first, second, third, fourth):
        each.join(30)
    assert turns._taken == {}


def test_beside_a_large_compaction_readers_take_turns_where_memory_is_short() -> None:
    """It waits for them and not they for it (``test_1_tiles`` shows why), but they wait for each other."""
    turns, crossing = room.Turns(lambda: 5e9), Crossing()
    compaction = _Reading(turns, 9e9, crossing.enter(1, Lane.COMPACTION))
    assert compaction.begun.wait(30)
    ahead = _Reading(turns, 9e9, crossing.enter(2, Lane.READ_AHEAD))
    assert ahead.begun.wait(30)
    reader = _Reading(turns, 9e9, crossing.enter(3, Lane.INTERACTIVE))
    other = _Reading(turns, 9e9, crossing.enter(4, Lane.COMPACTION))
    assert not reader.begun.wait(1.5)
    ahead.end.set()
    assert reader.begun.wait(30)
    reader.end.set()
    reader.join(30)
    assert not other.begun.wait(1), "the other compaction has its turn still"
    compaction.end.set()
    assert other.begun.wait(30)
    other.end.set()
    for each in (compaction, ahead, other):
        each.join(30)


def test_two_large_reads_at_once_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, and both are served; small ones wait for nobody."""
    monkeypatch.setattr(room, "available", lambda: 1e6)
    going: list[int] = []
    most: dict[int, int] = {}

    def rebuild(recipe: Recipe, *_: object) -> bytes:
        going.append(recipe.width)
        most[recipe.width] = max(most.get(recipe.width, 0), going.count(recipe.width))
        time.sleep(0.3)
        going.remove(recipe.width)
        return b"view"

    monkeypatch.setattr(reconstruction, "rebuild", rebuild)
    monkeypatch.setattr(handler.recipe_format, "decode", lambda width: _Recipe(int(width), 4000))
    work = handler.NetworkHandler("cpu", lambda _: b"")
    crossing = Crossing()

    def read(number: int, width: int) -> None:
        request = protocol.Rebuild(job=number, lane=Lane.INTERACTIVE, recipe=str(width).encode())
        assert work.rebuild(request, b"", crossing.enter(number, Lane.INTERACTIVE))[1] == b"view"

    threads = [threading.Thread(target=read, args=(n, width)) for n, width in enumerate([9000, 9000, 300, 300, 9000])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == {9000: 1, 300: 2}


class _Recipe:
    """As much of a recipe as the handler looks at."""

    sha256_view = hashlib.sha256(b"view").digest()

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.megapixels = width * height / 1e6


# Pictures that claim to be large.


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(50_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _jpeg(width: int, height: int) -> bytes:
    data = bytearray(_photograph(64, 64))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_png(60_000, 60_000), Reason.TOO_LARGE),
        (_png(14_000, 14_000), Reason.BROKEN),  # within the limit, but most of it is missing
        (_png(100, 100), Reason.BROKEN),  # a hundred times as many pixels as it says
        (_jpeg(65_500, 65_500), Reason.TOO_LARGE),
    ],
)
def test_bombs_are_refused_and_take_no_memory(data: bytes, reason: Reason) -> None:
    resource_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = compactor.compact(data, Policy(), [], _no_network)
    assert (outcome.verdict, outcome.reason) == (Verdict.PASSED_THROUGH, reason)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resource_before < 100_000  # kB


def test_shared_bombs() -> None:
    files = sorted((Path(__file__).parent.parent.parent / "shared/data/odd/bombs").glob("*/*"))
    if not files:
        pytest.skip("no ../shared/data")
    for file in files:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = compactor.compact(file.read_bytes(), Policy(), [], _no_network)
        assert outcome.verdict is not Verdict.COMPACTED, file
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, file
