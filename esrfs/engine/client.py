"""The engine as the mount sees it: values in, values out; a worker process that is there when needed and gone when
idle.

Who uses it: the vfs (rebuild), upkeep (compact), the command line (upscale). It imports neither torch nor numpy.

Threads. Callers may be any number of threads of any making; they only queue a job and wait on its own event, holding
no lock. One dispatcher thread, started with the first job, picks the next job (see ``lanes``), loads its values,
starts the worker where there is none and sends. It alone spawns workers, because the kernel ends a worker when the
*thread* that spawned it ends. One reader thread for each worker takes its reports, and reaps it. One more passes its
stderr to logging.

Locks: ``Engine._lock`` protects everything that says ``[lock]`` below and is never held while sending, loading,
spawning or waiting. ``_Worker.sending`` keeps frames whole. Neither is taken while the other is held.
"""

from __future__ import annotations

import bisect
import logging
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar, cast

import esrfs
from esrfs.compaction.outcome import Outcome, Policy
from esrfs.engine import lanes, protocol
from esrfs.engine.errors import EngineError
from esrfs.engine.filevalue import FileValue
from esrfs.engine.protocol import ConnectionLostError, Lane

__all__ = [
    "LATENCY_BOUNDS",
    "Counters",
    "Device",
    "Engine",
    "EngineError",
    "EngineSettings",
    "Rebuilt",
    "State",
    "Ticket",
]

log = logging.getLogger("esrfs.engine")

Device = Literal["auto", "cpu", "cuda"]
State = Literal["stopped", "starting", "idle", "busy"]

_TRIES = 2
_SLOWEST = 4.0
"""Seconds for each megapixel of a view: a small computer takes no more. Killed sooner, a slow engine could never finish
a large picture, and what it does beside it would be lost each time."""
_BREATH = 1.0
"""Seconds between two errors of the dispatcher that no job is to blame for."""
_EXIT_SECONDS = 2.0
"""How long a worker whose connection closed may take to exit by itself; then it is killed."""


@dataclass(frozen=True)
class EngineSettings:
    device: Device = "auto"
    idle_seconds: float = 60.0
    """After so long without a job the worker ends and gives its memory (and the GPU) back."""
    time_limit: float = 120.0
    """Seconds a reader waits before TimeoutError. A worker that has worked on a reader's job for twice as long, and
    ``_SLOWEST`` for its size, is killed, also when the readers have given up by then. What counts is the job's own
    time, in which it did not have to wait for others."""
    compaction_time_limit: float = 3600.0
    """For compaction: both."""
    handler: str = "esrfs.engine.handler"
    """The module that does the work, in the worker; another one in tests."""


LATENCY_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds: upper ends (inclusive) of the classes in which reconstructions are counted; the last class has none."""


@dataclass(frozen=True)
class Counters:
    reconstructions: int = 0
    """Rebuilds begun for readers."""
    compactions: int = 0
    upscales: int = 0
    restarts: int = 0
    """Workers that died and were not meant to."""
    failures: int = 0
    """Jobs that ended in EngineError."""
    inexact: int = 0
    """Views that differ from the one that their recipe pins (other hardware or libraries)."""
    latencies: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS) + 1)
    """Views that were rebuilt, by the time from the first request to the answer: one number for each class of
    LATENCY_BOUNDS, not cumulative."""
    latency_seconds: float = 0.0
    """The sum of those times."""


@dataclass(frozen=True)
class Rebuilt:
    file: FileValue
    """The whole view, of exactly the original's size."""
    sha256: bytes
    """Of the view."""
    exact: bool
    """The view is byte for byte what the recipe pins."""


_T = TypeVar("_T")
_Values = tuple[protocol.Rebuild | protocol.Compact | protocol.Upscale, bytes | FileValue]


class _Job:
    """One piece of work, shared by all tickets for it. All fields are [lock], but ``done``, and the result once
    ``done`` is set."""

    def __init__(
        self, number: int, prepare: Callable[[int, Lane], _Values], counter: str, key: bytes | None, megapixels: float
    ) -> None:
        self.number = number
        self.megapixels = megapixels
        self.prepare = prepare
        self.counter = counter
        self.key = key
        self.lanes: list[Lane] = []  # one for each ticket
        self.is_read = False  # by a reader, or by a guess of what is read next; still so when the last has given up
        self.tries = 0
        self.ends = 0  # of workers that worked on nothing else
        self.worker: _Worker | None = None
        self.told = Lane.COMPACTION  # the lane that the worker knows of
        self.asked_at = time.monotonic()
        self.own_seconds = 0.0  # in the worker, while nothing there came before it
        self.beside = 0.0  # the megapixels that it may have had to wait for all the same, for their memory
        self.stuck = False  # the worker did others meanwhile, so trying it again would end the same
        self.done = threading.Event()
        self.result: object = None
        self.error: str | None = None

    @property
    def lane(self) -> Lane:
        return min(self.lanes, default=Lane.COMPACTION)


class _Worker:
    """A worker process and the connection to it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.connection = connection
        self.sending = threading.Lock()
        self.ready = False  # [lock]
        self.ending = False  # [lock] we asked it to
        self.hung = False  # [lock] and was killed for it
        self.heard_at = time.monotonic()  # [lock]
        self.threads: list[threading.Thread] = []

    def send(self, message: protocol.Request, payload: protocol.Payload = b"") -> None:
        with self.sending:
            protocol.send(self.connection, message, payload)

    def hang_up(self) -> None:
        """Ask the worker to end; its reader thread sees to it that it does. Doesn't wait."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("the connection to the engine was closed before", exc_info=True)


class Ticket(Generic[_T]):
    """One caller's share in a job. Release it when the result has been taken or isn't wanted any more."""

    def __init__(self, engine: Engine, job: _Job, lane: Lane, limit: float) -> None:
        self._engine = engine
        self._job = job
        self._lane: Lane | None = lane  # [lock] None: released
        self._limit = limit

    def wait(self, timeout: float | None = None) -> _T:
        """The result; waits ``timeout`` seconds for it, without one as long as the settings allow. Any number of
        threads may wait.

        Raises EngineError when the job failed, was cancelled or the engine was closed; TimeoutError when time is up
        (the job goes on until the ticket is released).
        """
        limit = self._limit if timeout is None else timeout
        if not self._job.done.wait(limit):
            raise TimeoutError(f"the engine gave no answer in {limit:.0f} s; esrfs gave up waiting")
        if self._job.error is not None:
            raise EngineError(self._job.error, self._job.ends)
        return cast(_T, self._job.result)

    @property
    def done(self) -> bool:
        """``wait`` would return or raise at once."""
        return self._job.done.is_set()

    def demote(self) -> None:
        """Nobody waits for it just now: the job becomes read-ahead, unless somebody else waits for the same."""
        self._engine._move(self, Lane.READ_AHEAD)

    def release(self) -> None:
        """Give up this share; may be called twice. When the last one is given up, an unfinished job is cancelled."""
        self._engine._move(self, None)


class Engine:
    """Runs jobs in a worker process. Safe to use from any thread; one for each mount or command."""

    def __init__(self, settings: EngineSettings, network_bytes: Callable[[bytes], bytes]) -> None:
        """``network_bytes(sha256)`` gives the file of a network; what it raises fails the jobs that need it. Starts
        nothing yet."""
        self._settings = settings
        self._network_bytes = network_bytes
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._dispatcher: threading.Thread | None = None  # [lock]
        self._worker: _Worker | None = None  # [lock]
        self._retired: list[_Worker] = []  # [lock] on their way out
        self._waiting: dict[int, _Job] = {}  # [lock] by number
        self._in_flight: dict[
            int, _Job
        ] = {}  # [lock] sent, or about to be; a cancelled job stays until the worker let go of it
        self._by_key: dict[bytes, _Job] = {}  # [lock] rebuilds that a new ticket may join
        self._notes: deque[tuple[_Worker, protocol.Request]] = deque()  # [lock] for the dispatcher to send
        self._counted_at = time.monotonic()  # [lock] the jobs' own time until then is counted
        self._counters = Counters()  # [lock]
        self._last_number = 0  # [lock]
        self._idle_since = time.monotonic()  # [lock]
        self._warm_up = False  # [lock]
        self._on_cpu = False  # [lock] the accelerator failed: the next worker does without
        self._closed = False  # [lock]

    # What callers ask for.

    def rebuild(
        self,
        key: bytes,
        load: Callable[[], tuple[bytes, bytes]],
        lane: Lane = Lane.INTERACTIVE,
        *,
        megapixels: float = 0.0,
    ) -> Ticket[Rebuilt]:
        """Reconstruct a view, of so many ``megapixels``. All callers with the same ``key`` (the view's sha256) share
        one job until its last ticket is released.

        ``load()`` gives (encoded recipe, AVIF); it is called when the job starts, and again for a retry, in the
        dispatcher's thread. What it raises becomes the message of an EngineError. Raises EngineError when the engine
        is closed.
        """

        def prepare(number: int, lane: Lane) -> _Values:
            recipe, avif = load()
            return protocol.Rebuild(job=number, lane=lane, recipe=recipe), avif

        job = self._submit(prepare, "reconstructions", lane, key, megapixels)
        return Ticket[Rebuilt](self, job, lane, self._settings.time_limit)

    def compact_ticket(
        self,
        original: bytes | FileValue,
        policy: Policy,
        networks: Mapping[str, bytes],
        reference_key: bytes = b"",
    ) -> Ticket[Outcome]:
        """Begin a compaction; see :meth:`compact`. ``reference_key``: the store's (``blob/reference.py``)."""

        def prepare(number: int, lane: Lane) -> _Values:
            request = protocol.Compact(
                job=number,
                policy=policy,
                networks=dict(networks),
                reference_key=reference_key,
            )
            return request, original

        job = self._submit(prepare, "compactions", Lane.COMPACTION, None)
        return Ticket[Outcome](self, job, Lane.COMPACTION, self._settings.compaction_time_limit)

    def compact(self, original: bytes, policy: Policy, networks: Mapping[str, bytes]) -> Outcome:
        """Turn an original into a blob's parts, or a verdict why not. Bad input is a verdict, never an exception.
        ``networks`` may enlarge it: name → sha256.

        Waits. Raises EngineError and TimeoutError as :meth:`Ticket.wait`.
        """
        ticket = self.compact_ticket(original, policy, networks)
        try:
            return ticket.wait()
        finally:
            ticket.release()

    def upscale(self, image: bytes, network_sha256: bytes) -> bytes:
        """Enlarge an image file with a network, to a PNG. Waits. Raises EngineError (also for bad images) and
        TimeoutError."""

        def prepare(number: int, lane: Lane) -> _Values:
            return protocol.Upscale(job=number, network_sha256=network_sha256), image

        job = self._submit(prepare, "upscales", Lane.READ_AHEAD, None)
        ticket = Ticket[bytes](self, job, Lane.READ_AHEAD, self._settings.compaction_time_limit)
        try:
            return ticket.wait()
        finally:
            ticket.release()

    def start(self) -> None:
        """Start the worker in the background, so that the first reader needn't wait for it (about a second). What
        fails is told to that reader."""
        with self._lock:
            if self._closed:
                return
            self._warm_up = True
            self._idle_since = time.monotonic()
            try:
                self._need_dispatcher()
            except EngineError as error:
                log.debug("%s", error)
            self._changed.notify_all()

    def close(self) -> None:
        """End the worker at once; who waits gets EngineError. May be called twice."""
        with self._lock:
            self._closed = True
            for job in [*self._waiting.values(), *self._in_flight.values()]:
                self._settle(job, error="esrfs is shutting down")
            self._in_flight.clear()
            self._by_key.clear()
            dispatcher = self._dispatcher
            self._changed.notify_all()
        workers = self._kill_all()
        if dispatcher is not None:
            dispatcher.join(_EXIT_SECONDS)  # It may be loading from a store that hangs.
        for worker in {*workers, *self._kill_all()}:  # The dispatcher may just have started another.
            for thread in worker.threads:
                thread.join(_EXIT_SECONDS)

    def _kill_all(self) -> list[_Worker]:
        with self._lock:
            self._retire()
            workers = list(self._retired)
        for worker in workers:
            worker.process.kill()  # It holds nothing worth a clean end.
        return workers

    @property
    def state(self) -> State:
        with self._lock:
            if self._worker is None:
                return "starting" if self._waiting or self._in_flight else "stopped"
            if not self._worker.ready:
                return "starting"
            return "busy" if self._waiting or self._in_flight else "idle"

    @property
    def counters(self) -> Counters:
        with self._lock:
            return self._counters

    # Jobs.

    def _submit(
        self,
        prepare: Callable[[int, Lane], _Values],
        counter: str,
        lane: Lane,
        key: bytes | None,
        megapixels: float = 0.0,
    ) -> _Job:
        with self._lock:
            if self._closed:
                raise EngineError("esrfs is shutting down")
            self._need_dispatcher()  # first, so that nothing queues for nobody
            job = self._by_key.get(key) if key is not None else None
            if job is None:
                self._last_number += 1
                job = _Job(self._last_number, prepare, counter, key, megapixels)
                self._waiting[job.number] = job
                if key is not None:
                    self._by_key[key] = job
            job.lanes.append(lane)
            job.megapixels = max(job.megapixels, megapixels)  # who asked first may not have known
            if job.done.is_set():
                return job
            self._lane_changed(job)
            return job

    def _move(self, ticket: Ticket[_T], lane: Lane | None) -> None:
        """Put a ticket into another lane; None releases it."""
        with self._lock:
            job = ticket._job
            if ticket._lane is None or ticket._lane == lane:
                return
            job.lanes.remove(ticket._lane)
            ticket._lane = lane
            if lane is not None:
                job.lanes.append(lane)
            if job.done.is_set():
                if not job.lanes:
                    self._forget_key(job)
                return
            if job.lanes:
                self._lane_changed(job)
                return
            self._settle(job, error="cancelled: nobody waited for it any more")
            if job.worker is not None:
                self._notes.append((job.worker, protocol.Cancel(job=job.number)))
            self._changed.notify_all()

    def _lane_changed(self, job: _Job) -> None:
        """[lock] Tell the worker, if it has the job, which somebody still wants."""
        job.is_read = job.key is not None and job.lane != Lane.COMPACTION
        if job.worker is not None and job.lane != job.told:
            self._count_time()
            job.told = job.lane
            self._notes.append((job.worker, protocol.SetLane(job=job.number, lane=job.lane)))
        self._changed.notify_all()

    def _settle(self, job: _Job, *, result: object = None, error: str | None = None) -> None:
        """[lock] The job has its result, or its error; wake who waits. It no longer queues; in flight it may still
        be."""
        self._waiting.pop(job.number, None)
        if not job.done.is_set():
            job.result, job.error = result, error
            job.done.set()
        if job.error is not None or not job.lanes:  # else it can be had until the last caller has put it away
            self._forget_key(job)
        if not (self._waiting or self._in_flight):
            self._idle_since = time.monotonic()

    def _forget_key(self, job: _Job) -> None:
        """[lock] Nobody joins this job any more."""
        if job.key is not None and self._by_key.get(job.key) is job:
            del self._by_key[job.key]

    def _answered(self, number: int, *, result: object = None, error: str | None = None) -> None:
        with self._lock:
            self._count_time()
            job = self._in_flight.pop(number, None)
            if job is None:
                return
            if error is not None and not job.done.is_set():
                self._count("failures")
            if isinstance(result, Rebuilt):
                if not job.done.is_set():  # else nobody waits for it any more
                    self._count_latency(time.monotonic() - job.asked_at)
                if not result.exact:
                    self._count("inexact")
            self._settle(job, result=result, error=error)
            self._changed.notify_all()

    def _count(self, counter: str) -> None:
        """[lock]"""
        self._counters = replace(self._counters, **{counter: getattr(self._counters, counter) + 1})

    def _count_latency(self, seconds: float) -> None:
        """[lock]"""
        latencies = list(self._counters.latencies)
        latencies[bisect.bisect_left(LATENCY_BOUNDS, seconds)] += 1
        total = self._counters.latency_seconds + seconds
        self._counters = replace(self._counters, latencies=tuple(latencies), latency_seconds=total)

    # The dispatcher's thread.

    def _need_dispatcher(self) -> None:
        """[lock] Raises EngineError if it can't be started; the next job tries again."""
        if self._dispatcher is None:
            thread = threading.Thread(target=self._dispatch, name="engine-dispatcher", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # a limit on processes
                raise EngineError(f"the engine's dispatcher could not be started: {error}") from error
            self._dispatcher = thread

    def _dispatch(self) -> None:
        """The dispatcher's life: an error costs the job that met it, and no other."""
        while True:
            job: _Job | None = None
            try:
                job, notes = self._next()
                if job is None and self._closed:
                    return
                self._tell(notes)
                if job is not None:
                    self._send_job(job)
                elif not notes:
                    self._running_worker()
            except Exception as error:
                log.exception("the engine's dispatcher met an error; it goes on")
                if job is not None:
                    self._answered(job.number, error=f"an error in esrfs: {type(error).__name__}: {error}")
                else:
                    time.sleep(_BREATH)

    def _next(self) -> tuple[_Job | None, list[tuple[_Worker, protocol.Request]]]:
        """Wait for something to do: a job, notes, or, if neither, to start the worker. Nothing when the engine is
        closed."""
        with self._lock:
            while not self._closed:
                self._kill_if_hung()
                notes = list(self._notes)
                self._notes.clear()
                job = lanes.next_job(self._waiting.values(), self._in_flight.values())
                if job is not None:
                    del self._waiting[job.number]
                    self._in_flight[job.number] = job
                if job is not None or notes or (self._warm_up and self._worker is None):
                    self._warm_up = False
                    return job, notes
                if self._idle_for() >= self._settings.idle_seconds:
                    self._retire()
                self._changed.wait(self._pause())
            return None, []

    def _tell(self, notes: list[tuple[_Worker, protocol.Request]]) -> None:
        for worker, note in notes:
            try:
                worker.send(note)
            except ConnectionLostError:
                log.debug("the engine ended before it could be told", exc_info=True)

    def _send_job(self, job: _Job) -> None:
        lane = job.lane
        try:
            request, payload = job.prepare(job.number, lane)
        except Exception as error:
            log.debug("a job could not be loaded", exc_info=True)
            self._answered(job.number, error=f"what the engine needs could not be read: {error}")
            return
        worker = self._running_worker()
        if worker is None:
            self._answered(job.number, error="the engine could not be started; the log says why")
            return
        with self._lock:
            if job.done.is_set() or self._closed:  # cancelled meanwhile
                self._in_flight.pop(job.number, None)
                self._settle(job)
                return
            if not job.tries:
                self._count(job.counter)
            self._count_time()
            job.tries += 1
            job.worker = worker
            job.own_seconds = job.beside = 0.0
            if self._worker is not worker:  # It died this very moment.
                self._take_back([job], "it ended before it got the job")
                return
            job.told = lane
            self._lane_changed(job)  # it may have changed while the job was loaded
        try:
            worker.send(request, payload)
        except ConnectionLostError:
            worker.process.kill()  # The reader thread takes the job back.

    def _count_time(self) -> None:
        """[lock] To be called before anything changes about what the worker has.

        The time since the last call was that of the job which comes first there: all others may have waited for it.
        """
        now = time.monotonic()
        passed, self._counted_at = now - self._counted_at, now
        jobs = [job for job in self._in_flight.values() if job.worker is not None]
        if jobs:
            first = min(jobs, key=lambda job: (job.told, job.number))
            first.own_seconds += passed
            first.beside = max(first.beside, sum(other.megapixels for other in jobs if other is not first))

    def _kill_if_hung(self) -> None:
        """[lock]"""
        self._count_time()
        worker = self._worker
        if worker is None or worker.ending or worker.hung:
            return
        for job in self._in_flight.values():
            if job.worker is worker and job.own_seconds > self._limit(job):
                seconds = time.monotonic() - worker.heard_at
                job.stuck = seconds < self._settings.time_limit
                if job.stuck:
                    log.warning("the engine is stuck on one job, while it does others; it is ended and started anew")
                else:
                    log.warning("the engine reported nothing for %.0f s; it is ended and started anew", seconds)
                worker.hung = True
                worker.process.kill()
                return

    def _limit(self, job: _Job) -> float:
        """[lock] Seconds of its own time after which the worker that has the job counts as hung.

        What a job is decides, not whether somebody still waits for it: on a hung worker all readers give up.
        """
        limit = 2 * self._settings.time_limit if job.is_read else self._settings.compaction_time_limit
        return limit + _SLOWEST * (job.megapixels + job.beside)

    def _idle_for(self) -> float:
        """[lock] Seconds that the worker has had nothing to do; 0 when there is none, it is needed or just starting."""
        if self._waiting or self._in_flight or self._worker is None or not self._worker.ready:
            return 0.0
        return time.monotonic() - self._idle_since

    def _pause(self) -> float | None:
        """[lock] How long the dispatcher may sleep if nothing changes."""
        if self._worker is None:
            return None
        if self._in_flight:
            return max(0.1, min(self._limit(job) for job in self._in_flight.values()) / 4)
        return max(0.01, self._settings.idle_seconds - self._idle_for())

    # Workers.

    def _running_worker(self) -> _Worker | None:
        """The worker, started if there is none; None if that fails. For the dispatcher only."""
        with self._lock:
            if self._worker is not None or self._closed:
                return self._worker
            device: Device = "cpu" if self._on_cpu else self._settings.device
            self._on_cpu = False
        try:
            worker = _spawn(device, self._settings)
        except OSError as error:
            log.error("the engine could not be started: %s", error)
            return None
        log.debug("engine started, process %d", worker.process.pid)
        stderr = threading.Thread(target=_pass_on_stderr, args=(worker.process,), name="engine-stderr", daemon=True)
        reader = threading.Thread(target=self._listen, args=(worker,), name="engine-reader", daemon=True)
        try:
            stderr.start()
            worker.threads.append(stderr)
            with self._lock:  # so that the worker isn't known before all its threads are, nor after it ended
                reader.start()
                worker.threads.append(reader)
                self._worker = worker
        except RuntimeError as error:  # a limit on processes
            log.error("the engine could not be started: %s", error)
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
            if not worker.threads and worker.process.stderr is not None:
                worker.process.stderr.close()
            return None
        return worker

    def _retire(self) -> None:
        """[lock] Ask the worker to end; the next job starts another."""
        if self._worker is not None:
            self._worker.ending = True
            self._worker.hang_up()
            self._retired.append(self._worker)
            self._worker = None

    def _listen(self, worker: _Worker) -> None:
        """The reader thread of one worker: takes reports until the connection ends, then reaps the process."""
        try:
            while True:
                # Not kept in a variable here: a view would stay in memory until the next report.
                self._take_report(worker, *protocol.receive_small(worker.connection))
        except ConnectionLostError as lost:
            log.debug("engine connection: %s", lost)
        except Exception:
            log.exception("the engine's reports could not be handled; it is ended and started anew")
        try:
            status = worker.process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            status = worker.process.wait()
        with worker.sending:  # Nobody may be sending on a descriptor that is closed and at once somebody else's.
            worker.connection.close()
        self._ended(worker, status)

    def _take_report(self, worker: _Worker, report: protocol.Message, payload: bytes | FileValue) -> None:
        with self._lock:
            worker.heard_at = time.monotonic()
        match report:
            case protocol.Ready(device=device, threads=threads):
                log.info("engine ready: %s, %d threads", device, threads)
                with self._lock:
                    worker.ready = True
                    self._count_time()
                    for each in self._in_flight.values():
                        each.own_seconds = 0.0  # it was the worker's start
                    self._idle_since = time.monotonic()
                    self._changed.notify_all()
            case protocol.NeedWeights(sha256=sha256):
                try:
                    weights = self._network_bytes(sha256)
                except Exception as error:
                    log.debug("network %s", sha256.hex(), exc_info=True)
                    message = f"network {sha256.hex()[:16]} is missing: {error}"
                    worker.send(protocol.Weights(sha256=sha256, error=message))
                else:
                    worker.send(protocol.Weights(sha256=sha256), weights)
            case protocol.Rebuilt(job=job, sha256=sha256, exact=exact) if isinstance(payload, FileValue):
                self._answered(job, result=Rebuilt(file=payload, sha256=sha256, exact=exact))
            case protocol.Compacted(job=job, outcome=outcome):
                self._answered(job, result=outcome)
            case protocol.Upscaled(job=job):
                self._answered(job, result=payload)
            case protocol.Failed(job=job, message=message):
                self._answered(job, error=message)
            case _:
                raise ConnectionLostError(f"a worker doesn't send {type(report).__name__}")

    def _ended(self, worker: _Worker, status: int) -> None:
        """A worker is gone and reaped: its jobs are tried once more, or fail."""
        with self._lock:
            if self._worker is worker:
                self._worker = None
            if worker in self._retired:
                self._retired.remove(worker)
            jobs = [job for job in self._in_flight.values() if job.worker is worker]
            if not worker.ending:
                self._count("restarts")
                if status == protocol.DEVICE_FAILED:
                    self._on_cpu = True
                elif worker.ready:  # else it may be the engine itself
                    suspects = [job for job in jobs if job.stuck] or jobs
                    if len(suspects) == 1:
                        suspects[0].ends += 1
            why = f"it {_cause(status)}"
            self._take_back(jobs, why)
            self._changed.notify_all()
        if not worker.ending:
            log.warning("the engine ended (%s) with %d jobs; they are tried again or fail", why, len(jobs))

    def _take_back(self, jobs: list[_Job], why: str) -> None:
        """[lock] A worker ended with these jobs."""
        self._count_time()
        for job in jobs:
            self._in_flight.pop(job.number, None)
            job.worker = None
            if job.done.is_set():
                continue
            if job.stuck:
                self._count("failures")
                self._settle(job, error="the engine was stuck on this job for too long, and is started anew")
            elif job.tries >= _TRIES:
                self._count("failures")
                self._settle(job, error=f"the engine ended twice on this job ({why}); the log may say more")
            else:
                self._waiting[job.number] = job


def _spawn(device: Device, settings: EngineSettings) -> _Worker:
    """Start a worker process. Raises OSError."""
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            # -P: nothing is imported from the directory that the mount happened to be started in.
            [sys.executable, "-P", "-m", "esrfs.engine.worker", str(theirs.fileno()), device, settings.handler],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",  # so that no filesystem, least of all our own, is kept busy
            env=_environment(),
            process_group=0,  # Ctrl-C in the mount's terminal is the mount's business.
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    # A worker that is stopped, or stuck, must not hold the dispatcher for ever.
    seconds = max(1, round(settings.time_limit))
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds.to_bytes(8, sys.byteorder) + bytes(8))
    return _Worker(process, ours)


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    root = str(Path(esrfs.__file__).parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):  # run from a checkout
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment |= {
        # The worker runs tiles in threads of its own, one OpenMP thread each: measured to lose least when others
        # compute.
        "OMP_NUM_THREADS": "1",
        # A tile's activations are some 10 MB. By default each is mapped and returned anew, and page faults cost a
        # fifth of the time; the worker's memory goes back as a whole when it ends.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
        "MALLOC_TOP_PAD_": str(16 << 20),
        "PYTHONUNBUFFERED": "1",
    }
    return environment


def _cause(status: int) -> str:
    if status == protocol.DEVICE_FAILED:
        return "gave up its accelerator"
    if status < 0:
        return f"was ended by signal {-status}"
    return f"exited with status {status}"


_LEVELS = {name: logging.getLevelName(name) for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}


def _pass_on_stderr(process: subprocess.Popen[bytes]) -> None:
    """The worker's log lines begin with a level; anything else (a traceback, a library's complaint) is worth a
    warning."""
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            level, _, rest = text.partition(" ")
            if level in _LEVELS:
                log.log(_LEVELS[level], "engine: %s", rest)
            elif text:
                log.warning("engine: %s", text)
