"""The engine's process: takes jobs from a socket, answers, and ends when the socket closes. ``python -m`` entry point.

    python -m esrfs.engine.worker SOCKET_FD DEVICE HANDLER

What the jobs mean is the handler module's business (``handler.py``; another in tests): its ``open_handler(device,
fetch)`` gives an object with the methods of :class:`Handler`. It is imported while the first job is already on its
way.

Threads: the main thread reads the socket and never works, so that a job can be cancelled or overtaken at any time;
each job has a thread. The process holds nothing that must be kept: it may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Protocol

from esrfs import faults
from esrfs.compaction.outcome import Outcome
from esrfs.engine import protocol
from esrfs.engine.errors import DeviceFailedError, JobFailedError
from esrfs.engine.lanes import Cancelled, Crossing, Running
from esrfs.engine.protocol import ConnectionLostError, Lane

log = logging.getLogger("esrfs.engine.worker")

_NICENESS = 15
_LARGE_RESIDENT = 700 << 20
"""Bytes. Below that the allocator may keep what it has: the next job is faster with it."""
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


class Handler(Protocol):
    """What a handler does. Each method may raise JobFailedError, DeviceFailedError, and Cancelled from a checkpoint."""

    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def rebuild(self, request: protocol.Rebuild, avif: bytes, job: Running) -> tuple[protocol.Rebuilt, bytes]: ...
    def compact(self, request: protocol.Compact, original: bytes, job: Running) -> Outcome: ...
    def upscale(self, request: protocol.Upscale, image: bytes, job: Running) -> bytes: ...


class Connection:
    """The socket to the mount: whole frames out, and networks on request."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._sending = threading.Lock()
        self._arrived = threading.Condition()  # protects:
        self._asked: set[bytes] = set()
        self._weights: dict[bytes, tuple[bytes, str]] = {}

    def send(self, report: protocol.Report, payload: bytes = b"") -> None:
        with self._sending:
            protocol.send(self.stream, report, payload)

    def fetch(self, sha256: bytes) -> bytes:
        """Ask the mount for the network with this sha256; waits. Raises JobFailedError if it has none, or a wrong
        one."""
        with self._arrived:
            if sha256 in self._weights and self._weights[sha256][1]:  # It failed before: it may be there by now.
                del self._weights[sha256]
                self._asked.discard(sha256)
            ask = sha256 not in self._asked
            self._asked.add(sha256)
        if ask:
            self.send(protocol.NeedWeights(sha256=sha256))
        with self._arrived:
            self._arrived.wait_for(lambda: sha256 in self._weights)
            weights, error = self._weights[sha256]
        if error:
            raise JobFailedError(error)
        return weights

    def take(self, answer: protocol.Weights, weights: bytes) -> None:
        error = answer.error
        if not error and hashlib.sha256(weights).digest() != answer.sha256:
            error = f"the file of network {answer.sha256.hex()[:16]} has changed; restore it from a backup of the store"
        with self._arrived:
            self._weights[answer.sha256] = (weights, error)
            self._arrived.notify_all()


def serve(connection: Connection, open_handler: Callable[[], Handler]) -> None:
    """Work until the connection ends."""
    crossing = Crossing()
    opening = _Opening(connection, open_handler)
    threading.Thread(target=_open, args=(opening,), name="opening", daemon=True).start()
    while True:
        try:
            request, payload = protocol.receive(connection.stream)
        except ConnectionLostError as lost:
            log.debug("connection: %s", lost)
            return
        match request:
            case protocol.Rebuild() | protocol.Compact() | protocol.Upscale():
                # Entered here, not in its thread: a note about it may be the next message.
                lane = _lane(request)
                running = crossing.enter(request.job, lane)
                work = _Work(connection, opening, running, request, payload)
                try:
                    threading.Thread(target=work, name=f"job-{request.job}", daemon=True).start()
                except RuntimeError as error:  # a limit on processes: other jobs go on
                    work.fail(f"the engine could not start a thread for it: {error}")
            case protocol.SetLane(job=job, lane=lane):
                crossing.set_lane(job, lane)
            case protocol.Cancel(job=job):
                crossing.cancel(job)
            case protocol.Weights():
                connection.take(request, payload)
            case _:
                log.error("the mount doesn't send %s", type(request).__name__)
                return
        del payload  # An original would stay in memory until the next message.


def _lane(request: protocol.Rebuild | protocol.Compact | protocol.Upscale) -> Lane:
    if isinstance(request, protocol.Rebuild):
        return request.lane
    return Lane.COMPACTION if isinstance(request, protocol.Compact) else Lane.READ_AHEAD


class _Opening:
    """The handler, once it is there: opened in one thread, awaited by all. The mount is told before any job begins: so
    it knows of a worker that ends whether a job or the worker itself was the matter."""

    def __init__(self, connection: Connection, open_handler: Callable[[], Handler]) -> None:
        self._connection = connection
        self._open_handler = open_handler
        self._lock = threading.Lock()
        self._handler: Handler | None = None

    def get(self) -> Handler:
        with self._lock:
            if self._handler is None:
                handler = self._open_handler()
                with contextlib.suppress(ConnectionLostError):  # The main thread sees it too, and ends the process.
                    self._connection.send(protocol.Ready(device=handler.device, threads=handler.threads))
                self._handler = handler
            return self._handler


def _open(opening: _Opening) -> None:
    try:
        opening.get()
    except BaseException:
        log.exception("the engine can't start")
        _leave(1)


class _Work:
    """One job in its thread."""

    def __init__(
        self,
        connection: Connection,
        opening: _Opening,
        running: Running,
        request: protocol.Rebuild | protocol.Compact | protocol.Upscale,
        payload: bytes,
    ) -> None:
        self.connection = connection
        self.opening = opening
        self.running = running
        self.request = request
        self.payload = payload

    def __call__(self) -> None:
        try:
            self._answer(*self._work())
        except Cancelled:
            self._answer(protocol.Failed(job=self.request.job, message="cancelled"))
        except JobFailedError as error:
            self._answer(protocol.Failed(job=self.request.job, message=str(error)))
        except DeviceFailedError as error:
            log.warning("the accelerator failed, the CPU takes over: %s", error)
            _leave(protocol.DEVICE_FAILED)
        except MemoryError:
            self._answer(
                protocol.Failed(job=self.request.job, message="the machine has too little memory for this picture")
            )
        except Exception as error:
            log.exception("job %d failed", self.request.job)
            summary = traceback.format_exception_only(error)[-1].strip()
            self._answer(protocol.Failed(job=self.request.job, message=f"an error in esrfs: {summary}"))
        self.payload = b""
        _give_memory_back()

    def fail(self, message: str) -> None:
        """Instead of being called."""
        self._answer(protocol.Failed(job=self.request.job, message=message))
        self.payload = b""

    def _work(self) -> tuple[protocol.Report, bytes]:
        handler = self.opening.get()
        self.running.checkpoint()
        match self.request:
            case protocol.Rebuild():
                faults.reach("engine.rebuild")
                return handler.rebuild(self.request, self.payload, self.running)
            case protocol.Compact():
                # Linux has a priority for each thread. It can't be raised again, so this thread ends with its job.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
                faults.reach("engine.compact")
                outcome = handler.compact(self.request, self.payload, self.running)
                return protocol.Compacted(job=self.request.job, outcome=outcome), b""
            case protocol.Upscale():
                return protocol.Upscaled(job=self.request.job), handler.upscale(
                    self.request, self.payload, self.running
                )

    def _answer(self, report: protocol.Report, payload: bytes = b"") -> None:
        self.running.leave()  # Others needn't wait until the answer is sent.
        with contextlib.suppress(ConnectionLostError):  # The main thread sees it too, and ends the process.
            self.connection.send(report, payload)


def _give_memory_back() -> None:
    """What a large picture left in the allocator's hands goes back to the system, unless it is so little that the next
    job is better off with it."""
    with open("/proc/self/statm", "rb") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    if resident > _LARGE_RESIDENT:
        ctypes.CDLL(None).malloc_trim(0)


def _leave(status: int) -> None:
    """End at once, from any thread, without waiting for jobs."""
    logging.shutdown()
    os._exit(status)


def _prepare_process() -> None:
    """Set limits and manners of this process; what the system doesn't allow is left."""
    libc = ctypes.CDLL(None, use_errno=True)
    # The mount may be killed without closing anything down. Sent when the thread that spawned us ends: the dispatcher.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # Foreign pictures are decoded here.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A service manager signals all processes of a unit. The mount decides when readers have been served.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Short of memory, the kernel is to end the engine, which is started anew, and not the mount.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("500")


def main(arguments: list[str]) -> None:
    descriptor, device, handler_name = arguments
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.captureWarnings(True)
    _prepare_process()
    connection = Connection(socket.socket(fileno=int(descriptor)))
    connection.stream.set_inheritable(False)

    def open_handler() -> Handler:
        handler: Handler = importlib.import_module(handler_name).open_handler(device, connection.fetch)
        return handler

    serve(connection, open_handler)
    _leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
