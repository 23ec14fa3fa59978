"""Working gently: a rate limit, the idle I/O class, and conditions under which to pause.

Thread-safe: a lock in the bucket protects that, and the last look at the conditions.
"""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from collections.abc import Callable

import psutil

from esrfs_daemon import config

log = logging.getLogger("esrfs.daemon")

_LOOK_SECONDS = 5.0
"""Conditions are looked at no more often."""
_LARGEST_WAIT = 0.5


class Stopped(Exception):  # noqa: N818 (a request, not an error)
    """Work ends here since somebody asked for it; nothing is half done that the journal does not know."""


class Bucket:
    """What several throttles have of one rate."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owed = 0.0
        """Bytes that were taken beyond what time has paid for."""
        self.paid = time.monotonic()


class Throttle:
    """``take`` before each piece of data that is copied; ``blocked`` says why to do nothing now."""

    def __init__(self, limits: config.Throttle, stop: threading.Event, bucket: Bucket | None = None) -> None:
        """``bucket``: shared by throttles that keep the rate together."""
        self._limits = limits
        self._rate = config.size(limits.bytes_per_second)
        self._hours = config.hours(limits.hours)
        self.min_free = config.size(limits.min_free)
        """Bytes that the destination keeps free."""
        self.stop = stop
        self._bucket = bucket or Bucket()
        self._looked = float("-inf")
        self._reason = ""
        self.on_pause: Callable[[str], None] = lambda reason: None
        """Told why work pauses, and the empty string when it goes on."""

    def take(self, count: int) -> None:
        """Wait until ``count`` more bytes may be copied. Raises Stopped."""
        self.wait_until_allowed()
        if not self._rate:
            return
        bucket = self._bucket
        with bucket.lock:
            now = time.monotonic()
            bucket.owed = max(0.0, bucket.owed - (now - bucket.paid) * self._rate) + count
            bucket.paid = now
            until = now + bucket.owed / self._rate
        while (left := until - time.monotonic()) > 0:
            if self.stop.wait(min(left, _LARGEST_WAIT)):
                raise Stopped

    def wait_until_allowed(self) -> None:
        """Wait while a condition forbids work. Raises Stopped."""
        if self.stop.is_set():
            raise Stopped
        waited = False
        while reason := self.blocked():
            if not waited:
                self.on_pause(reason)
            waited = True
            if self.stop.wait(_LARGEST_WAIT):
                raise Stopped
        if waited:
            self.on_pause("")

    def blocked(self) -> str:
        """Why nothing should be done at this time; empty if nothing speaks against it. A sentence for people."""
        with self._bucket.lock:
            now = time.monotonic()
            if now - self._looked >= _LOOK_SECONDS:
                self._looked = now
                self._reason = self._look()
            return self._reason

    def _look(self) -> str:
        if self._hours is not None:
            local = datetime.datetime.now().time()
            if not self._hours.includes(local.hour * 60 + local.minute):
                return f"outside the hours {self._limits.hours}"
        if not self._limits.on_battery and on_battery():
            return "the machine runs on battery"
        if self._limits.max_load:
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            if load > self._limits.max_load:
                return f"the load per core is {load:.1f}, more than {self._limits.max_load:g}"
        return ""


def on_battery() -> bool:
    """Whether a battery feeds this machine (``/sys/class/power_supply``); False where nothing tells."""
    try:
        battery = psutil.sensors_battery()
    except (OSError, ValueError):  # firmware that tells nonsense
        return False
    return battery is not None and battery.power_plugged is False


def use_idle_io() -> None:
    """Let all other programs' reads and writes go first. For this thread, and for those that it starts later."""
    try:
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    except (psutil.Error, OSError) as error:
        log.info("the idle I/O class is not to be had here: %s", error)
