"""Running trials on all cores, keeping each result at once, and leaving out what an earlier run has done."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from esrfs.evaluate import trial as trials_module
from esrfs.evaluate.results import Kept, Result, Way
from esrfs.evaluate.trial import ESRFS, Picture, Trial

Progress = Callable[[int, int, str], None]
"""(done, total, what is being worked on)"""

_AHEAD = 2
"""Trials that are handed out for each worker: enough to keep it busy, few enough to keep their order."""


P = ParamSpec("P")
T = TypeVar("T")


class WorkerLostError(Exception):
    """A worker process was killed, or had not enough memory."""


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C reaches this process afterwards, and a process that is started meanwhile never: while it still imports it
    could only answer with a traceback."""
    resource_tracker.ensure_running()  # else it is started with the first process, and lets Ctrl-C through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """A process that is spawned meanwhile does not import the program that this one runs, as it otherwise would: it
    needs none of it, and a program that does not look at ``__name__`` would run again."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), main.__spec__
    main.__file__, main.__spec__ = None, None
    try:
        yield
    finally:
        main.__file__, main.__spec__ = file, spec


class Crew:
    """Worker processes; a context manager that ends them."""

    def __init__(self, processes: int) -> None:
        # spawn: torch's threads don't survive a fork.
        context = multiprocessing.get_context("spawn")
        self._processes = processes
        self._pool = ProcessPoolExecutor(processes, context, initializer=trials_module.prepare_process)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is not None:  # nobody waits for what they still do
            for process in multiprocessing.active_children():
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Future[T]:
        with _ctrl_c_later(), _main_hidden():
            return self._pool.submit(function, *arguments, **named)

    def examine(self, paths: Sequence[tuple[Path, str]], progress: Progress) -> tuple[list[Picture], dict[str, str]]:
        """(pictures that can be evaluated, in order; why others can't be, by name). Raises WorkerLostError."""
        pictures, refused = [], {}
        try:
            found = [self._submit(trials_module.examine, path, name) for path, name in paths]
            for number, (future, (_, name)) in enumerate(zip(found, paths, strict=True), 1):
                answer = future.result()
                if isinstance(answer, Picture):
                    pictures.append(answer)
                else:
                    refused[name] = answer
                progress(number, len(paths), name)
        except (BrokenProcessPool, MemoryError) as error:
            raise WorkerLostError from error
        return pictures, refused

    def run(self, trials: Sequence[Trial], kept: Kept, progress: Progress) -> tuple[list[Result], list[str]]:
        """(the results of all trials, in their order; what no codec could write, for people). Those that ``kept`` lacks
        are made, and kept as they come.

        Raises WorkerLostError, OSError (a picture or network is gone, the disk is full). What was done until then is
        kept.
        """
        failed: dict[str, None] = {}
        known = kept.read()
        lacking = (left for each in trials if (left := _without_known(each, known)) is not None)
        waiting: list[Trial] = list(lacking)
        total, done = len(waiting), 0
        queue = iter(waiting)
        running: dict[Future[list[Result]], Trial] = {}
        try:
            while True:
                for each in islice(queue, self._processes * _AHEAD - len(running)):
                    running[self._submit(trials_module.run, each)] = each
                if not running:
                    break
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    ended = running.pop(future)
                    try:
                        kept.add(future.result())
                    except trials_module.CodecFailedError as error:
                        failed[str(error)] = None
                    done += 1
                    progress(done, total, f"{ended.picture.name} {ended.codec} {ended.setting}")
        except (BrokenProcessPool, MemoryError) as error:
            raise WorkerLostError from error
        known = kept.read()
        # A picture that is there twice is tried once; each gets its own name.
        return [
            msgspec.structs.replace(known[key], picture=each.picture.name)
            for each in trials
            for key in _keys(each)
            if key in known
        ], list(failed)


def _keys(trial: Trial) -> list[tuple[str, Way, str, str]]:
    return [(trial.picture.sha256, _way(trial, grow), trial.setting, made_by) for grow, made_by in trial.grows]


def _way(trial: Trial, grow: str) -> Way:
    return Way(trial.codec, 0 if trial.codec == ESRFS else trial.scale, trial.shrink, grow)


def _without_known(trial: Trial, known: dict[tuple[str, Way, str, str], Result]) -> Trial | None:
    """The part of a trial whose results, with all measures, are not there yet; None if all are."""
    missing = []
    for grow, key in zip(trial.grows, _keys(trial), strict=True):
        result = known.get(key)
        if result is None or (result.bytes is not None and set(trial.measures) - set(result.measures)):
            missing.append(grow)
    return replace(trial, grows=tuple(missing)) if missing else None
