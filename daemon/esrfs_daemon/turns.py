"""One rule works at a time: several would keep each other waiting for disks, and have too many files open.

Rules get their turn in the order in which they ask. One that takes very long, as its source or destination hangs, can
be passed over; it then works on beside the others to the end of that turn.

Lock: ``_changed`` protects all of it; nothing is waited for under it but the turn itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

from esrfs_daemon.throttle import Stopped


class Turns:
    """Of rules, by their numbers."""

    def __init__(self) -> None:
        self._ended = False
        self._changed = threading.Condition()
        self._waiting: deque[int] = deque()
        self._at_work: int | None = None
        self._since = 0.0

    @contextlib.contextmanager
    def of(self, rule: int) -> Iterator[None]:
        """Wait for the turn, and have it as long as the block runs, or until one is passed over. Raises Stopped."""
        with self._changed:
            self._waiting.append(rule)
            self._changed.wait_for(lambda: self._ended or (self._at_work is None and self._waiting[0] == rule))
            self._waiting.remove(rule)
            if self._ended:
                raise Stopped
            self._at_work, self._since = rule, time.monotonic()
        try:
            yield
        finally:
            self.pass_over(rule)

    def at_work(self, seconds: float) -> int | None:
        """The rule that has had its turn for so long already, if one has."""
        with self._changed:
            return self._at_work if time.monotonic() - self._since >= seconds else None

    def pass_over(self, rule: int) -> bool:
        """Let others have their turn; False if it was not this one's (any more)."""
        with self._changed:
            if self._at_work != rule:
                return False
            self._at_work = None
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """Nobody gets a turn any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
