"""Steps that nobody has ended yet, this machine's and others': a process died in the middle, or is at it right now.

Recovery ends those of its own machine. It never touches another machine's: that one may be alive, and on many
filesystems no lock tells (an NFS client's flock does not reach the server's own processes). When such a machine is
gone for good, or has got another name, what its step held is still in its staging directory: from here it is read, to
bring an original back (``plain.restore``) or to tell where it lies (``check``). Nothing here changes anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from esrfs.store import ledger
from esrfs.store.beneath import beneath
from esrfs.store.layout import RESERVED, STAGING, Store
from esrfs.store.ledger import Intent, ToPlain


@dataclass(frozen=True)
class Unfinished:
    host: str
    step: Intent | ToPlain

    @property
    def held(self) -> str:
        """Path in the store of what the step holds; it need not be there (any more)."""
        return f"{RESERVED}/{STAGING}/{self.host}/{self.step.staging}"


def holding(store: Store) -> Iterator[Unfinished]:
    """Those that hold something in staging, but for this process's own. Raises OSError.

    A ledger is read only if its process left something there: mostly there is nothing, and ledgers are long.
    """
    staged: dict[str, set[str]] = {}
    for name in sorted(os.listdir(store.ledger_fd)):
        host, session = name.partition("-")[0], name.rpartition("-")[2]
        if name in (ledger.SETTLED, ledger.DAYS) or session == store.session:
            continue
        if host not in staged:
            staged[host] = _staged_by(store, host)
        if not any(held.startswith(f"{session}.") for held in staged[host]):
            continue
        with contextlib.suppress(FileNotFoundError):  # its process has just ended
            descriptor = beneath(store.ledger_fd, name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                reading = ledger.read_fd(descriptor)
            finally:
                os.close(descriptor)
            for step in ledger.pending(reading.records):
                if step.staging in staged[host]:
                    yield Unfinished(host, step)


def _staged_by(store: Store, host: str) -> set[str]:
    try:
        directory = beneath(store.root_fd, f"{RESERVED}/{STAGING}/{host}", os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return set()
    try:
        return set(os.listdir(directory))
    finally:
        os.close(directory)


def holding_original(store: Store, sha256: bytes) -> list[Unfinished]:
    """Steps that had taken, or were about to take, an original with this content out of the way. Raises OSError."""
    wanted = sha256.hex()
    return [one for one in holding(store) if isinstance(one.step, Intent) and one.step.sha256_original == wanted]


def open_held(store: Store, one: Unfinished) -> int:
    """A descriptor (O_RDONLY) of what the step holds. Raises OSError."""
    return beneath(store.root_fd, one.held, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
