"""Memory: what passes through a process is not held there; what a large picture takes is bounded by its pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

from esrfs import formats
from esrfs.compaction import compactor
from esrfs.compaction.outcome import Outcome, Policy, Reason, Verdict
from esrfs.engine import filevalue, protocol, room
from esrfs.engine.client import Engine, EngineError, EngineSettings
from esrfs.engine.filevalue import FileValue
from esrfs.engine.protocol import ConnectionLostError
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


@pytest.mark.parametrize(("work", "most"), [("rebuild2", 190), ("rebuild1", 250), ("metric", 155)])
def test_peaks_of_24_megapixels(work: str, most: int) -> None:
    """MiB. Another copy of the picture would be 69 more, or 92. ``rebuild2`` doubles an AVIF of one piece, ``rebuild1``
    decodes one of cells."""
    command = [sys.executable, "-m", "tests.peaks", work, "6000", "4000"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / MEBIBYTE < most


@pytest.mark.slow
@pytest.mark.parametrize("kind", peaks.ORIGINALS)
def test_no_kind_takes_more_than_compaction_asks_for(kind: str) -> None:
    command = [sys.executable, "-m", "tests.peaks", "compact2", "7200", "5000", kind]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    peak, asked = map(int, done.stdout.split())
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
    assert "0.7 GB of memory" in outcome.message
    assert outcome.width == 640


@pytest.mark.parametrize("kind", peaks.ORIGINALS)
def test_each_kind_says_what_it_takes(kind: str) -> None:
    original = peaks.ORIGINALS[kind](peaks._picture(160, 96))
    split = formats.split(original, 1)
    needed = compactor.memory(split, len(original))
    assert needed - compactor.memory(split, 0) == 5 * len(original)
    outcome = compactor.compact(original, Policy(), [], _no_network, room=needed - 1)
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
