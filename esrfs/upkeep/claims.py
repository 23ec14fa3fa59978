"""Claims: how compaction and the programs that use a mount stay out of each other's way.

Compaction claims a file by (device, inode) while it works on it. The vfs says which files it is about to use:

- before the exchange of names, using the file interrupts the claim, and the work is dropped;
- during the exchange, which takes milliseconds, using the file waits for its end. The name may mean another inode
  then, so the vfs looks again.

Order that makes it airtight: the vfs enters its handle in the table *before* it calls :meth:`Claims.enter`, and
:meth:`Claims.barrier` looks at the table *after* it has marked the claim as swapping. One of the two sees the other.

Lock: ``_changed`` protects ``_claims`` and each claim's fields. It is taken alone, and never held while waiting for a
disk.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Key = tuple[int, int]
"""(st_dev, st_ino)"""


@dataclass(eq=False)
class Claim:
    key: Key
    interrupted: bool = False
    swapping: bool = False


class Claims:
    def __init__(self, is_open: Callable[[Key], bool] = lambda key: False) -> None:
        """``is_open``: whether a handle of the file exists in this mount; must not call back into this object."""
        self.is_open = is_open
        self._changed = threading.Condition(threading.Lock())
        self._claims: dict[Key, Claim] = {}

    def take(self, key: Key) -> Claim | None:
        """Claim a file for compaction; None if it is claimed or open."""
        if self.is_open(key):
            return None
        with self._changed:
            if key in self._claims:
                return None
            claim = self._claims[key] = Claim(key)
            return claim

    @contextlib.contextmanager
    def barrier(self, claim: Claim) -> Iterator[None]:
        """Hold off who wants to use the file; inside, ``claim.interrupted`` is the last word on whether anybody
        does."""
        with self._changed:
            claim.swapping = True
        if self.is_open(claim.key):
            claim.interrupted = True
        try:
            yield
        finally:
            with self._changed:
                claim.swapping = False
                self._changed.notify_all()

    def end(self, claim: Claim) -> None:
        with self._changed:
            self._claims.pop(claim.key, None)

    def enter(self, key: Key) -> bool:
        """The vfs is about to use this file. True when a claim was on it, so that the name must be looked up again."""
        if key not in self._claims:  # without the lock, for speed: a claim that is taken later finds the handle open
            return False
        with self._changed:
            claim = self._claims.get(key)
            if claim is None:
                return True
            while claim.swapping:
                self._changed.wait()
            claim.interrupted = True
            return True

    def interrupt_all(self) -> None:
        """Have all work in progress dropped."""
        with self._changed:
            for claim in self._claims.values():
                claim.interrupted = True
