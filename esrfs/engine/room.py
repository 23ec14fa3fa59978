"""How much memory the engine may take: what the system has free, within the limits of the unit that it runs in; and
taking turns where that is too little for several reconstructions at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    group = cgroups / path.lstrip("/")
    while group != cgroups and cgroups in group.parents:
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            if limit != "max":
                used = int((group / "memory.current").read_text(encoding="ascii"))
                left.append(float(max(0, int(limit) - used + _reclaimable(group))))
        except (OSError, ValueError):
            pass  # a controller that is off here
        group = group.parent
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
    whatever there is: no read fails for this, and each waits for other reads only."""

    def __init__(self, free: Callable[[], float]) -> None:
        """``free()``: the bytes that there are."""
        self._free = free
        self._changed = threading.Condition()  # protects:
        self._taken: list[float] = []
        """Bytes, of those that go on now."""

    @contextmanager
    def taking(self, needed: float, is_wanted: Callable[[], bool]) -> Iterator[None]:
        """Waits until there is room for ``needed`` bytes, or nobody else takes any, or it is no longer wanted."""
        with self._changed:
            # What the others take is counted as if they had none of it yet.
            while self._taken and is_wanted() and self._free() < needed + sum(self._taken):
                self._changed.wait(_LOOK_SECONDS)
            self._taken.append(needed)
        try:
            yield
        finally:
            with self._changed:
                self._taken.remove(needed)
                self._changed.notify_all()
