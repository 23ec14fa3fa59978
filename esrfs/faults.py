"""Named points at which tests make esrfs fail, so that each promise of "nothing is lost" can be tested by breaking it.

``ESRFS_FAULTS`` holds a comma-separated list of ``point=action``; a point is the name given to :func:`reach` in the
code. Actions: ``kill`` (SIGKILL to this process), ``sleep:SECONDS``, ``errno:NAME`` (raise OSError, e.g.
``errno:ENOSPC``), ``pause:PATH`` (create PATH, then wait until it is gone: a test acts in between). Without the
variable a point costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

_PAUSE_LIMIT_SECONDS = 120.0


def _parse(spec: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in spec.split(",") if "=" in item)


_actions = _parse(os.environ.get("ESRFS_FAULTS", ""))


def reach(point: str) -> None:
    """Do what ``ESRFS_FAULTS`` asks at ``point``; nothing when it names no such point.

    Raises OSError for ``errno:NAME``, ValueError for an unknown action.
    """
    action = _actions.get(point)
    if action is None:
        return
    verb, _, argument = action.partition(":")
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "sleep":
        time.sleep(float(argument))
    elif verb == "errno":
        number = getattr(errno, argument)
        raise OSError(number, f"{os.strerror(number)} (fault injected at {point})")
    elif verb == "pause":
        flag = Path(argument)
        flag.touch()
        deadline = time.monotonic() + _PAUSE_LIMIT_SECONDS
        while flag.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
    else:
        raise ValueError(f"unknown action {action!r} for fault point {point!r}")
