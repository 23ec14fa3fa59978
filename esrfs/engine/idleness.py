"""Whether the machine had nothing else to do for a while: for work that is done only then.

By the kernel's count of each processor's time. What runs at low priority (``nice`` above 0, as compaction itself does)
is no reason to wait; programs of normal priority, the kernel's own work and readers of this engine are.
"""

from __future__ import annotations

from pathlib import Path

_MOST = 0.2
"""Share of all processors' time that others may take."""


class Watch:
    """From when it is made."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._begin = self._read()

    def was_idle(self) -> bool:
        """Until now. False where the system doesn't tell."""
        now = self._read()
        if now is None or self._begin is None:
            return False
        busy, total = (end - begin for end, begin in zip(now, self._begin, strict=True))
        return total > 0 and busy <= _MOST * total

    def _read(self) -> tuple[int, int] | None:
        """(busy with others, in all), in ticks."""
        try:
            words = self._stat.read_text(encoding="ascii").split("\n", 1)[0].split()
            user, nice, system, idle, waiting, irq, soft_irq, stolen = map(int, words[1:9])
        except (OSError, ValueError):
            return None
        busy = user + system + irq + soft_irq + stolen
        return busy, busy + nice + idle + waiting
