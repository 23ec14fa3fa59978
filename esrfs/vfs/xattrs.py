"""``user.esrfs.*``: what esrfs knows of a file, answered but never listed (a copy would carry it along).

The names are the keys of ``esrfs explain --json``, and ``verdict``, one sentence for people.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping

PREFIX = "user.esrfs."
CAPABILITY = "security.capability"
_LIFE_SECONDS = 1.0
_MOST = 4096


class Capabilities:
    """Which files were found to have no ``security.capability``, for a second: the kernel asks at every write."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def is_known_absent(self, path: str) -> bool:
        return time.monotonic() < self._until.get(path, 0.0)

    def note_absent(self, path: str) -> None:
        if len(self._until) >= _MOST:
            self._until.clear()
        self._until[path] = time.monotonic() + _LIFE_SECONDS

    def forget(self) -> None:
        self._until.clear()


def is_ours(name: str) -> bool:
    return name.startswith(PREFIX)


def value(name: str, explanation: Mapping[str, object]) -> bytes:
    """The attribute's value as text. Raises OSError(ENODATA) for an unknown name or a value that this file has not."""
    key = name.removeprefix(PREFIX)
    found = _sentence(explanation) if key == "verdict" else explanation.get(key)
    if found is None:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    return str(found).encode()


def _sentence(explanation: Mapping[str, object]) -> str:
    state = str(explanation.get("state") or "unknown")
    reason, message = explanation.get("reason"), explanation.get("message")
    detail = ": ".join(str(part) for part in (reason, message) if part)
    return f"{state} ({detail})" if detail else state
