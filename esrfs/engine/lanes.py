"""The order of jobs: a person who waits comes before a guess of what is read next, and both before compaction.

``next_job`` decides for the client what to send to the worker. ``Crossing`` lets jobs that run in the worker give way
to each other between two steps. The lane of a job may change while it waits or runs, so it is read anew at each
decision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

from esrfs.engine.protocol import Lane

IN_FLIGHT: dict[Lane, int] = {
    # Jobs of each lane that the worker holds at once. A second interactive one is decoded while the first is enlarged,
    # and enlarged while the first is encoded. The sum bounds the worker's memory.
    Lane.INTERACTIVE: 2,
    Lane.READ_AHEAD: 1,
    Lane.COMPACTION: 1,
}


class Job(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def lane(self) -> Lane: ...
    @property
    def tries(self) -> int:
        """How often it was sent to a worker."""


AnyJob = TypeVar("AnyJob", bound=Job)


def next_job(waiting: Collection[AnyJob], in_flight: Collection[Job]) -> AnyJob | None:
    """Which of ``waiting`` to send to the worker that has ``in_flight``; None while it should have no more.

    A job that was in flight when a worker died may be what killed it. So that no other job dies with it twice, such
    jobs are tried again alone; only a compaction, which takes long, lets readers in beside it.
    """
    if any(job.tries > 1 and job.lane != Lane.COMPACTION for job in in_flight):
        return None
    order = sorted(waiting, key=lambda job: (job.lane, job.number))
    suspects = [job for job in order if job.tries]
    if suspects:
        return None if in_flight else suspects[0]
    for job in order:
        if sum(other.lane == job.lane for other in in_flight) < IN_FLIGHT[job.lane]:
            return job
    return None


class Cancelled(Exception):  # noqa: N818 (not an error)
    """Nobody waits for this job any more."""


class Running:
    """A job that runs in the worker, as seen by the code that works on it."""

    def __init__(self, number: int, lane: Lane, crossing: Crossing) -> None:
        self.number = number
        self.lane = lane
        self.cancelled = False
        self.on_lane: Callable[[], None] = lambda: None
        """Called after each change of ``lane``, for who sleeps until there is work of a lane."""
        self._crossing = crossing

    def checkpoint(self) -> None:
        """Call between steps: waits while a job of a higher lane runs. Raises Cancelled."""
        self._crossing.give_way(self)

    def leave(self) -> None:
        """The job has ended: nobody waits for it at a checkpoint any more. May be called twice."""
        self._crossing.leave(self)


class Crossing:
    """All jobs that run in this process. A job passes a checkpoint only while none of a higher lane is about."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # protects the jobs' lane and cancelled, and:
        self._jobs: dict[int, Running] = {}

    def enter(self, number: int, lane: Lane) -> Running:
        """A job begins; it must leave."""
        job = Running(number, lane, self)
        with self._changed:
            self._jobs[number] = job
        return job

    def leave(self, job: Running) -> None:
        with self._changed:
            self._jobs.pop(job.number, None)
            self._changed.notify_all()

    def set_lane(self, number: int, lane: Lane) -> None:
        """Nothing happens if the job has ended."""
        with self._changed:
            job = self._jobs.get(number)
            if job is None:
                return
            job.lane = lane
            self._changed.notify_all()
        job.on_lane()

    def cancel(self, number: int) -> None:
        """The job ends at its next checkpoint. Nothing happens if it has ended."""
        with self._changed:
            if number in self._jobs:
                self._jobs[number].cancelled = True
                self._changed.notify_all()

    def give_way(self, job: Running) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: job.cancelled or all(other.lane >= job.lane for other in self._jobs.values())
            )
            if job.cancelled:
                raise Cancelled
