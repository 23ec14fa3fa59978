"""The compactor's lease: one process compacts a store at a time. A courtesy, not a lock: losing it harms nothing.

``.esrfs/compactor`` holds one line, ``CRC HOST BOOT SESSION COUNTER``, 64 bytes, written in place (which works on a
full disk) and fsynced. The holder counts up every :data:`RENEW_SECONDS`. Another machine takes over when the line has
not changed for :data:`DEAD_SECONDS` of its own monotonic clock, so no two clocks are ever compared. On the holder's
own machine nobody has to wait: whether the holder lives shows in the flock on its ledger. Two that take over at once
both write; the one whose line is overwritten notices when it renews. Until then both may compact, which costs work
twice and nothing else, as each swap is a compare-and-swap.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from esrfs.store import ledger
from esrfs.store.layout import Store

NAME = "compactor"
RENEW_SECONDS = 30.0
DEAD_SECONDS = 180.0
HOLD_SECONDS = 120.0
"""The holder gives up by itself when it could not renew for so long, well before another machine takes over."""
_LINE_BYTES = 64
_NOBODY = "- - -"


class CompactorLease:
    """This process's view of the lease. Thread-safe. Call :meth:`acquire` until it says True, then :meth:`renew`."""

    def __init__(self, store: Store) -> None:
        """Raises OSError, or StoreError in a read-only store."""
        self._store = store
        self._name = f"{store.host} {store.boot} {store.session}" if store.ledger is not None else ""
        self._fd = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=store.meta_fd)
        self._lock = threading.Lock()  # protects what follows
        self._counter = 0
        self._renewed = float("-inf")
        self._holding = False
        self._seen: tuple[bytes, float] | None = None

    @property
    def held(self) -> bool:
        """Whether this process may compact now. Costs a clock reading; no file is touched."""
        return self._holding and _boottime() - self._renewed < HOLD_SECONDS

    @property
    def holder(self) -> str:
        """Host, boot and session of who has the lease, as the file says; empty for nobody."""
        name = _parse(os.pread(self._fd, _LINE_BYTES, 0))[0]
        return "" if name == _NOBODY else name

    def acquire(self) -> bool:
        """Take the lease if nobody alive has it. Does not wait: call again every :data:`RENEW_SECONDS`. Raises
        OSError."""
        with self._lock, self._exclusively():
            line = os.pread(self._fd, _LINE_BYTES, 0)
            name, counter = _parse(line)
            if name != self._name and not self._is_free(line, name):
                self._holding = False
                return False
            self._counter = counter
            self._write(self._name)
            self._holding = True
            return True

    def renew(self) -> bool:
        """Say "still alive"; False when another process has taken the lease meanwhile. Raises OSError."""
        with self._lock, self._exclusively():
            if not self._holding or _parse(os.pread(self._fd, _LINE_BYTES, 0))[0] != self._name:
                self._holding = False
                return False
            self._write(self._name)
            return True

    def release(self) -> None:
        """Let others have it at once. Raises OSError."""
        with self._lock, self._exclusively():
            if self._holding and _parse(os.pread(self._fd, _LINE_BYTES, 0))[0] == self._name:
                self._write(_NOBODY)
            self._holding = False

    def close(self) -> None:
        """Release, and let go of the file; no harm when done already."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            self.release()
        os.close(self._fd)
        self._fd = -1

    def _is_free(self, line: bytes, name: str) -> bool:
        if name == _NOBODY:
            return True
        host, boot, session = name.split(" ") if name.count(" ") == 2 else ("", "", "")
        if host == self._store.host and _is_dead(self._store, host, boot, session):
            return True
        now = time.monotonic()
        if self._seen is None or self._seen[0] != line:
            self._seen = (line, now)
            return False
        return now - self._seen[1] >= DEAD_SECONDS

    def _write(self, name: str) -> None:
        self._counter += 1
        text = f"{name} {self._counter}".encode()
        line = b"%08x %s" % (zlib.crc32(text), text)
        os.pwrite(self._fd, line.ljust(_LINE_BYTES - 1) + b"\n", 0)
        os.fsync(self._fd)
        self._renewed = _boottime()

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Between the processes of one machine (and of a cluster, where flock reaches so far) read and write are one
        step."""
        locked = False
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            locked = True
        try:
            yield
        finally:
            if locked:
                fcntl.flock(self._fd, fcntl.LOCK_UN)


def _parse(line: bytes) -> tuple[str, int]:
    """``(holder, counter)``. A new file, and only that, is nobody's; a torn line is somebody's of no known name."""
    if not line:
        return _NOBODY, 0
    crc, _, text = line.rstrip().partition(b" ")
    try:
        if int(crc, 16) == zlib.crc32(text):
            name, _, counter = text.decode("ascii").rpartition(" ")
            return name, int(counter)
    except ValueError:
        pass
    return "", 0


def _is_dead(store: Store, host: str, boot: str, session: str) -> bool:
    """Has the process of this machine ended? Its ledger is locked while it lives, and moved away when it ends well."""
    if boot != store.boot:
        return True
    try:
        fd = os.open(f"{host}-{boot}-{session}", os.O_RDWR | os.O_CLOEXEC, dir_fd=store.ledger_fd)
    except FileNotFoundError:
        return True
    try:
        return ledger.lock(fd)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _boottime() -> float:
    """Seconds since boot, suspend included: after a night asleep the lease is another machine's."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
