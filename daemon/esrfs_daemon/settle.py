"""Files at rest: those that have not changed for a while, by the monotonic clock.

A wrong or jumping clock of the machine, or of the server that a folder lies on, decides nothing. Whether a program
still has a file open for writing is asked when it is copied (a read lease must be granted).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from esrfs.store.beneath import beneath
from esrfs_daemon.copying import Identity
from esrfs_daemon.nested import Nested
from esrfs_daemon.walk import Found


@dataclass
class _Seen:
    found: Found
    identity: Identity
    since: float


class Settling:
    """Files that were seen, until they have been the same for ``quiet`` seconds. Not thread-safe."""

    def __init__(self, quiet: float) -> None:
        self.quiet = quiet
        """Seconds."""
        self._seen: dict[str, _Seen] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def see(self, found: Found) -> None:
        """Its time begins now, unless it was seen before and is the same."""
        identity = Identity.of(found.st)
        known = self._seen.get(found.path)
        if known is None or known.identity != identity:
            self._seen[found.path] = _Seen(found, identity, time.monotonic())

    def next_due(self) -> float | None:
        """Seconds until the next file may be at rest; None if none is waited for."""
        if not self._seen:
            return None
        return max(0.0, min(seen.since for seen in self._seen.values()) + self.quiet - time.monotonic())

    def take(self, source_fd: int, nested: Nested) -> Iterator[Found]:
        """Those that are at rest, looked at anew; what is gone or changed is not among them. What lies in a store or a
        view by now comes as it was seen: whoever takes it is told why it can't be moved. Raises OSError."""
        now = time.monotonic()
        due = [path for path, seen in self._seen.items() if now - seen.since >= self.quiet]
        for path in sorted(due):
            seen = self._seen.pop(path)
            if nested.around(path.rpartition("/")[0]) is not None:
                yield seen.found
                continue
            st = _look(source_fd, path)
            if st is None:
                continue
            if Identity.of(st) == seen.identity:
                yield replace(seen.found, st=st)
            else:
                self.see(replace(seen.found, st=st))


def _look(source_fd: int, path: str) -> os.stat_result | None:
    above, _, name = path.rpartition("/")
    try:
        directory = beneath(source_fd, above, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return None
    finally:
        os.close(directory)
