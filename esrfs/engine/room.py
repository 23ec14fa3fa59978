"""How much memory the engine may take: what the system has free, within the limits of the unit that it runs in; and
taking turns where that is too little for several reconstructions at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from esrfs.engine.lanes import Cancelled, Running
from esrfs.engine.protocol import Lane

_CGROUPS = Path("/sys/fs/cgroup")
_LOOK_SECONDS = 0.5
"""Between two looks at how much there is, and whether somebody still waits."""


def available(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> float:
    """Bytes, swap included; infinite where the system doesn't tell."""
    return min([_of_system(proc), *_of_cgroups(proc, cgroups)])


def _of_system(proc: Path) -> float:
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        figures = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
        return figures["MemAvailable"] + figures["SwapFree"]
    except (OSError, ValueError, KeyError):
        return float("inf")


def _of_cgroups(proc: Path, cgroups: Path) -> list[float]:
    """What the limits of this process's cgroup (version 2) and of those around it leave."""
    try:
        path = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()[-1].partition("::")[2]
    except (OSError, IndexError):
        return []
    left = []
    own = cgroups / path.lstrip("/")
    for group in (own, *own.parents):
        # The topmost too: within a container it is the container's own, and has limits.
        if group != cgroups and cgroups not in group.parents:
            break
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            if limit != "max":
                used = int((group / "memory.current").read_text(encoding="ascii"))
                left.append(float(max(0, int(limit) - used + _reclaimable(group))))
        except (OSError, ValueError):
            pass  # a controller that is off here, or the root of all groups
    return left


def _reclaimable(group: Path) -> int:
    """Bytes of cached files, which the kernel drops when memory is wanted."""
    for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


class Turns:
    """Reconstructions of large pictures, one after the other where memory is too short for two. Who is alone goes ahead
    whatever there is: no read fails for this, and each waits for other reads only.

    A reader waits for no compaction: that one waits for the reader, between two tiles, also while it has its turn. So
    where memory is short there may be one reader and one compaction, and no more.
    """

    def __init__(self, free: Callable[[], float]) -> None:
        """``free()``: the bytes that there are."""
        self._free = free
        self._changed = threading.Condition()  # protects:
        self._taken: dict[Running, float] = {}
        """Bytes, of those that go on now."""

    @contextmanager
    def taking(self, needed: float, job: Running) -> Iterator[None]:
        """Waits until there is room for ``needed`` bytes, or nobody takes any whom the job may wait for. Raises
        Cancelled."""
        with self._changed:
            # What the others take is counted as if they had none of it yet. Lanes change meanwhile.
            while (
                not job.cancelled
                and any(other.lane != Lane.COMPACTION or job.lane == Lane.COMPACTION for other in self._taken)
                and self._free() < needed + sum(self._taken.values())
            ):
                self._changed.wait(_LOOK_SECONDS)
            if job.cancelled:
                raise Cancelled
            self._taken[job] = needed
        try:
            yield
        finally:
            with self._changed:
                del self._taken[job]
                self._changed.notify_all()
