"""What the daemon tells about itself: the numbers behind ``esrfs-daemon --status``, and for monitoring.

:class:`Status` is counted up by the daemon's threads; :func:`serve` answers it on a Unix socket in the runtime
directory, :func:`ask` is the client. Keys keep their meaning.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from esrfs import config, control

State = Literal["starting", "idle", "working", "paused", "waiting", "stopping"]


class RuleStatus(msgspec.Struct, kw_only=True):
    """One rule. Counts are since the daemon's start."""

    name: str
    source: str
    destination: str
    then: str
    state: State = "starting"
    """``waiting``: source or destination is not there or does not answer, or the journal can't be written (see
    ``reason``); ``paused``: throttled by a condition."""
    reason: str = ""
    """Why it is ``paused`` or ``waiting``; a sentence for people."""
    watch: Literal["events", "polling"] = "events"
    waiting_files: int = 0
    """Files seen that are not yet at rest, or wait for their turn."""
    migrated_files: int = 0
    """Copied and verified, or found there already with the same content."""
    migrated_bytes: int = 0
    touched_files: int = 0
    """Source files trashed, deleted or replaced by a link."""
    failed_files: int = 0
    """Files that could not be moved; the log names each with its reason."""
    reconciles: int = 0
    """Full walks of the source that came to their end."""
    last_reconcile: float | None = None
    """Seconds since the epoch at the end of the last full walk."""
    last_migrated: float | None = None
    """Seconds since the epoch."""


class DaemonStatus(msgspec.Struct, kw_only=True):
    """The whole daemon; :func:`ask` returns it as plain values."""

    pid: int
    started: float
    """Seconds since the epoch."""
    rules: list[RuleStatus]


class Status:
    """Counters that several threads count up. ``_lock`` protects the whole of them."""

    def __init__(self, rules: list[RuleStatus]) -> None:
        self._lock = threading.Lock()
        self._status = DaemonStatus(pid=os.getpid(), started=time.time(), rules=rules)

    def update(self, rule: int, /, **values: Any) -> None:
        """Set fields of a rule, by its number."""
        with self._lock:
            for name, value in values.items():
                setattr(self._status.rules[rule], name, value)

    def add(self, rule: int, /, **values: int) -> None:
        """Count up fields of a rule."""
        with self._lock:
            one = self._status.rules[rule]
            for name, value in values.items():
                setattr(one, name, getattr(one, name) + value)

    def snapshot(self) -> DaemonStatus:
        """A copy that nobody else changes."""
        with self._lock:
            return msgspec.convert(msgspec.to_builtins(self._status), DaemonStatus)


def socket_path() -> Path:
    """Where the daemon of this user listens: ``daemon.sock`` in the runtime directory."""
    return config.runtime_directory() / "daemon.sock"


def serve(status: Status, reconcile: Callable[[], None]) -> control.ControlServer:
    """Answer ``status`` and ``reconcile`` (walk all sources now) at :func:`socket_path`; started, the caller stops it.

    Raises OSError.
    """

    def tell(_arguments: dict[str, Any], _emit: control.Emit) -> dict[str, Any]:
        values: dict[str, Any] = msgspec.to_builtins(status.snapshot())
        return values

    def walk_now(_arguments: dict[str, Any], _emit: control.Emit) -> dict[str, Any]:
        reconcile()
        return {}

    server = control.ControlServer(socket_path(), {"status": tell, "reconcile": walk_now})
    server.start()
    return server


def ask(timeout: float = 2.0) -> dict[str, Any] | None:
    """What this user's running daemon says of itself (keys of :class:`DaemonStatus`); None if none answers."""
    try:
        return control.call(socket_path(), "status", timeout=timeout)
    except (control.ControlError, OSError):
        return None
