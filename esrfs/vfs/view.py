"""One blob, read as its photograph.

Everything before and after the scan comes from the recipe, without the engine (DESIGN 3.5). The rest waits for one
reconstruction, whose result is a descriptor (of the cache's file, or of memory) that stays as it is until the last
handle of the file is released: a program never sees bytes of two reconstructions. If the cache's disk fails to give
what it holds, the view is rebuilt once more; were that to differ, who has the file open gets EIO.

Who has waited too long gets EIO, but the reconstruction goes on, so that a picture which takes this machine longer than
anybody may wait can be read at the next try.

Locks: ``View._lock`` protects ``_content``, ``_lost`` and ``_tickets``; nothing is waited for under it.
``Waits._lock`` protects its numbers: callbacks that wait, and reconstructions that go on.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from esrfs.blob.container import BlobDamaged, NotABlob, unpack
from esrfs.blob.recipe import Literal, Recipe, Span, length
from esrfs.cache import Hit, ViewCache
from esrfs.engine.client import Engine, EngineError, Rebuilt, Ticket
from esrfs.engine.protocol import Lane
from esrfs.vfs import native
from esrfs.vfs.descriptor import Descriptor

log = logging.getLogger("esrfs.vfs")

_LOOK_SECONDS = 0.5
"""How often a read that waits looks whether somebody still wants it."""
_MOST_THAT_GO_ON = 4
"""Reconstructions for which nobody waits any more: a library of large pictures must not pile up here."""
_LONGEST = 3600.0
"""Seconds that one may go on."""


class Waits:
    """A bound on callbacks that wait, so that threads remain for everything else."""

    def __init__(self, most: int, seconds: float) -> None:
        """At most ``most`` callbacks wait at once, none longer than ``seconds``."""
        self._lock = threading.Lock()
        self.count = 0
        self._going_on = 0
        self.most = most
        self.seconds = seconds
        self.ending = False
        self.caller_was_killed: Callable[[], bool] = lambda: False
        """Whether the program that this thread serves was killed: it can't end before its read is answered."""

    @contextlib.contextmanager
    def slot(self, path: str) -> Iterator[None]:
        """Raises OSError(EIO) when too many wait, or the mount ends."""
        with self._lock:
            full = self.count >= self.most
            if not full and not self.ending:
                self.count += 1
        if full or self.ending:
            if full:
                log.error("%s: %d reads wait for reconstructions already; this one fails with EIO", path, self.most)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        try:
            yield
        finally:
            with self._lock:
                self.count -= 1

    def begin_to_go_on(self) -> bool:
        """Whether one more reconstruction may go on without anybody; then say so when it ends."""
        with self._lock:
            if self.ending or self._going_on >= _MOST_THAT_GO_ON:
                return False
            self._going_on += 1
            return True

    def end_going_on(self) -> None:
        with self._lock:
            self._going_on -= 1


class _Spans:
    """Random access to a list of spans."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans
        self._starts = [0]
        for span in spans:
            self._starts.append(self._starts[-1] + length([span]))

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        index = bisect.bisect_right(self._starts, offset) - 1
        while size > 0 and index < len(self._spans):
            span = self._spans[index]
            start = offset - self._starts[index]
            count = min(size, self._starts[index + 1] - offset)
            parts.append(span.data[start : start + count] if isinstance(span, Literal) else bytes([span.value]) * count)
            offset += count
            size -= count
            index += 1
        return b"".join(parts)


@dataclass(frozen=True)
class Content:
    """A whole view as a descriptor, and the sha256 (hex) of just these bytes."""

    descriptor: Descriptor
    sha256: str
    in_memory: bool
    """The cache could not take it."""


class View:
    """A blob that is open; shared by all handles of its file."""

    def __init__(self, blob: Descriptor, recipe: Recipe, engine: Engine, cache: ViewCache, waits: Waits) -> None:
        self.blob = blob
        self.recipe = recipe
        self.size = recipe.original_size
        self.key = recipe.sha256_view.hex()
        self.verbatim_bytes = sum(
            len(span.data) for span in (*recipe.prefix, *recipe.suffix) if isinstance(span, Literal)
        )
        self._engine = engine
        self._cache = cache
        self._waits = waits
        self._head = _Spans(recipe.prefix)
        self._head_end = length(recipe.prefix)
        self._tail = _Spans(recipe.suffix)
        self._tail_start = self._head_end + recipe.scan_length
        self._lock = threading.Lock()
        self._content: Content | None = None
        self._lost: Content | None = None  # what programs have read, and the disk does not give any more
        self._tickets: dict[int, set[Ticket[Rebuilt]]] = {}  # of reads that wait, by handle

    @property
    def content(self) -> Content | None:
        """The rebuilt view, if it is there."""
        return self._content

    @property
    def ends_with_its_handles(self) -> bool:
        """It is not to be kept for the next open: the rebuilt view is in memory, since the cache could not take it, or
        the cache has lost it."""
        return self._lost is not None or (self._content is not None and self._content.in_memory)

    def look_in_cache(self, *, by_the_way: bool = False) -> Content | None:
        """Take the view from the cache, if it is there and was not taken before; or from the recipe that holds it
        all. ``by_the_way``: nobody reads yet."""
        if self._content is None:
            if self.recipe.scan_length == 0:
                self._install(self._cache.put(self.key, self._head.read(0, self.size) + self._tail.read(0, self.size)))
            elif (hit := self._cache.get(self.key, by_the_way=by_the_way)) is not None:
                self._install(hit)
        return self._content

    def _install(self, hit: Hit) -> Content:
        """Raises OSError(EIO) if programs have read other bytes."""
        content = Content(Descriptor(hit.descriptor), hit.sha256, hit.in_memory)
        if self._lost is not None and self._lost.sha256 != content.sha256:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with self._lock:
            if self._content is None:
                self._content = content
            return self._content

    def _load(self) -> tuple[bytes, bytes]:
        size = os.fstat(self.blob.number).st_size
        blob = unpack(os.pread(self.blob.number, size, 0))
        return blob.recipe_bytes, blob.avif

    def rebuild(self, lane: Lane, handle: int, path: str) -> Content:
        """Wait for the reconstruction, on behalf of ``handle``; one runs however many wait. When nobody does any more,
        it is cancelled.

        Raises OSError: EIO if it fails, is out of time, or the mount ends; EINTR if the program was killed.
        """
        goes_on = False
        try:
            with self._waits.slot(path), self._ticket(lane, handle) as ticket:
                if self._content is not None:  # it came between the look and the ticket
                    return self._content
                try:
                    rebuilt = self._result(ticket)
                except TimeoutError:
                    goes_on = self._go_on(path)  # while the ticket is held: without one it would be cancelled
                    raise
                return self._keep(rebuilt, path)  # while the ticket is held, nobody asks for it again
        except TimeoutError:
            log.error(
                "%s: not rebuilt within %.0f s; the read fails with EIO. The blob is untouched. %s",
                path,
                self._waits.seconds,
                "The work goes on, and a later try finds it done." if goes_on else "Try again when less is read.",
            )
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
        except (EngineError, BlobDamaged, NotABlob) as error:
            if not self._waits.ending:
                log.error("%s: could not be rebuilt (%s); the read fails with EIO. The blob is untouched.", path, error)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error

    def _go_on(self, path: str) -> bool:
        """Whether the reconstruction comes to its end, for the cache, though who asked has given up."""
        if not self._waits.begin_to_go_on():
            return False

        def finish() -> None:
            try:
                rebuilt = ticket.wait(_LONGEST)
                if not self._waits.ending:
                    self._keep(rebuilt, path)
            except (EngineError, TimeoutError, OSError) as error:
                if not self._waits.ending:
                    log.error("%s: could not be rebuilt after its reader gave up either (%s)", path, error)
            finally:
                ticket.release()
                self._waits.end_going_on()

        try:
            ticket = self._rebuilding(Lane.READ_AHEAD)
        except EngineError:  # the mount ends
            self._waits.end_going_on()
            return False
        try:
            threading.Thread(target=finish, name="rebuilding-goes-on", daemon=True).start()
        except RuntimeError:  # a limit on processes
            ticket.release()
            self._waits.end_going_on()
            return False
        return True

    def _keep(self, rebuilt: Rebuilt, path: str) -> Content:
        if len(rebuilt.file) != self.size:
            log.error(
                "%s: rebuilt to %d bytes instead of %d; the read fails with EIO", path, len(rebuilt.file), self.size
            )
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        other = self.content  # of another waiter for the same reconstruction
        if other is not None:
            return other
        try:
            return self._install(self._cache.put(self.key, rebuilt.file))
        except OSError:
            if self._lost is not None:
                log.error("%s was rebuilt to other bytes than programs have read; they have to open it again", path)
            raise

    @contextlib.contextmanager
    def _ticket(self, lane: Lane, handle: int) -> Iterator[Ticket[Rebuilt]]:
        ticket = self._rebuilding(lane)
        with self._lock:
            self._tickets.setdefault(handle, set()).add(ticket)
        try:
            yield ticket
        finally:
            with self._lock:
                self._tickets[handle].remove(ticket)
                if not self._tickets[handle]:
                    del self._tickets[handle]
            ticket.release()

    def _rebuilding(self, lane: Lane) -> Ticket[Rebuilt]:
        return self._engine.rebuild(self.recipe.sha256_view, self._load, lane, megapixels=self.recipe.megapixels)

    def _result(self, ticket: Ticket[Rebuilt]) -> Rebuilt:
        deadline = time.monotonic() + self._waits.seconds
        while True:
            left = deadline - time.monotonic()
            try:
                return ticket.wait(max(0.0, min(left, _LOOK_SECONDS)))
            except TimeoutError:
                if left <= _LOOK_SECONDS:
                    raise
            if self._waits.caller_was_killed():
                raise OSError(errno.EINTR, os.strerror(errno.EINTR))

    def give_up(self, content: Content, path: str) -> None:
        """The cache's disk does not give it any more: who needs it next has it rebuilt."""
        if self._content is not content:
            return  # another reader was first
        log.warning("%s: the cache's disk does not give its rebuilt view; it is rebuilt. Is that disk failing?", path)
        self._cache.drop(self.key)
        with self._lock:
            if self._content is content:
                self._content, self._lost = None, content

    def demote(self, handle: int) -> None:
        """A program closed this handle, or died: what only it waits for is no longer urgent."""
        with self._lock:
            tickets = list(self._tickets.get(handle, ()))
        for ticket in tickets:
            ticket.demote()

    def known(self, offset: int, size: int) -> bytes | None:
        """The bytes from ``offset``, if the recipe alone tells them; None if the scan is needed."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        if end <= self._head_end:
            return self._head.read(offset, end - offset)
        if offset >= self._tail_start:
            return self._tail.read(offset - self._tail_start, end - offset)
        return None

    def read_into(self, address: int, size: int, offset: int, path: str) -> int | None:
        """Read to memory at ``address``; the number of bytes, or None if the reconstruction is needed first."""
        content = self._content
        if content is not None:
            try:
                return native.pread_into(content.descriptor.number, address, size, offset)
            except OSError as error:
                if content.in_memory or error.errno != errno.EIO:
                    raise
                self.give_up(content, path)
        data = self.known(offset, size)
        if data is None:
            return None
        ctypes.memmove(address, data, len(data))
        return len(data)
