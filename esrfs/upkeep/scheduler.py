"""Which file is compacted when: files at rest, one after the other, by one compactor for each store.

A photograph whose name no blob can get (a write-protected folder, another disk) is tried again ever more seldom, and as
soon as a walk sees that its folder allows it.

A file is at rest when its identity has not changed for the quiet time, by the monotonic clock, and no handle is open.
The vfs tells what changed through this mount; a walk at the start and from time to time finds the rest. ``pause`` is
a file in the store, so it holds for every mount of it.

Compaction stops by itself, and says so, when the engine fails repeatedly, when the store's disk fails, when the gate
refuses everything, and when space is low even after the undo window was shortened. From the last it goes on by itself
once there is room well above the floor; the others wait for somebody who says ``esrfs resume``.

One photograph that ends the engine is left alone (``compact``), and others are compacted. When one after the other
does, it is not the photographs: they are acquitted, and compaction stops.

Locks: ``_changed`` protects the queue and the counters, and is never held while a file is looked at. ``_working`` is
held for the whole of one file, so that a command and the thread never compact at the same time; it is taken first.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esrfs.compaction.outcome import Reason, Verdict
from esrfs.engine.client import EngineError
from esrfs.networks.registry import WeightsError
from esrfs.store import linux, staging, swap
from esrfs.store.beneath import open_parent
from esrfs.store.errors import StoreError
from esrfs.store.identity import Identity
from esrfs.store.layout import Store
from esrfs.store.rules import Stamp
from esrfs.upkeep import compact, walk
from esrfs.upkeep.compact import CompactionUnavailable, Done, Workshop

log = logging.getLogger("esrfs.upkeep")

PAUSED = "paused"
"""Name of the file in ``.esrfs/`` that stops compaction on every mount."""
_WALK_SECONDS = 900.0
_RETRY_SECONDS = 60.0
_LONGEST_WAIT_SECONDS = 86400.0
"""Of a file that is blocked, or that the disk doesn't give: each time that it is tried in vain it waits twice as long,
from ``_RETRY_SECONDS`` up to this."""
_TICK_SECONDS = 0.5
_ENGINE_FAILURES = 3
_REFUSALS_IN_A_ROW = 300
_LEAST_FREE_SHARE = 0.01
_LEAST_FREE_BYTES = 256 * 2**20
_MORE_TO_GO_ON = 2
"""So many times as much as was too little must be free before compaction goes on: it is not to stop again at once."""
_ROOM_SECONDS = 60.0
"""When a full disk is looked at again; each time that it was full again without a file compacted, twice as late …"""
_ROOM_SECONDS_AT_MOST = 3600.0
"""… up to this."""

Emit = Callable[[Done, int, int], bool]
"""Told each file that is done, how many are, and of how many; False to stop."""


def is_paused(store: Store) -> bool:
    try:
        os.stat(PAUSED, dir_fd=store.meta_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def pause(store: Store) -> None:
    """Stop compaction on every mount of the store until :func:`resume`. Raises OSError."""
    os.close(os.open(PAUSED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=store.meta_fd))
    os.fsync(store.meta_fd)


def resume(store: Store) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(PAUSED, dir_fd=store.meta_fd)


@dataclass
class _Waiting:
    identity: Identity | None
    """Since when the quiet time counts; None for what changed through this mount, which is told of each change."""
    due: float
    """On the monotonic clock."""
    wait: float = 0.0
    """How long it waits since it was last tried in vain for a reason that stays; 0 if there is none."""
    obstacle: str = ""
    """That reason, if it is its folder's (``swap.folder_obstacle``)."""


class Scheduler:
    """Compacts what is at rest, in a thread of its own once :meth:`start` was called, or when a command asks."""

    def __init__(self, workshop: Workshop, quiet_seconds: float, make_room: Callable[[], None] = lambda: None) -> None:
        """``make_room`` shortens the undo window when the store's disk is nearly full."""
        self._workshop = workshop
        self._store = workshop.store
        self._quiet = quiet_seconds
        self._make_room = make_room
        self._working = threading.Lock()
        self._changed = threading.Condition(threading.Lock())
        self._queue: dict[str, _Waiting] = {}
        self._thread: threading.Thread | None = None
        self._ending = False
        self._stopped_because = ""
        self._lacks_room = False  # that is why it stopped
        self._room_wait = 0.0
        self._next_look_for_room = 0.0
        self._engine_failures = 0
        self._ended_engine: set[str] = set()  # files with a verdict for that, since the engine last answered
        self._refusals = 0
        self._next_walk = 0.0
        self._left_out: set[str] = set()  # what the last walk could not look at, as it was logged
        self._told: set[tuple[str, str]] = set()  # folders and reasons for which a file of theirs is blocked
        self._rules_stamp: Stamp = ()
        self._rules_problem = ""
        self.counts: Counter[str] = Counter()

    # What others tell and ask.

    def touch(self, path: str) -> None:
        """The file at ``path`` changed, or came by this name. Cheap, since the vfs calls it at each release."""
        due = time.monotonic() + self._quiet
        with self._changed:
            self._queue[path] = _Waiting(None, due)

    @property
    def pending(self) -> int:
        """Files that wait for their quiet time or their turn."""
        with self._changed:
            return len(self._queue)

    @property
    def state(self) -> str:
        """``running``, ``paused``, ``off`` (nothing runs on its own), or ``stopped: REASON``."""
        if self._stopped_because or self._rules_problem:
            return f"stopped: {self._stopped_because or self._rules_problem}"
        if is_paused(self._store):
            return "paused"
        return "off" if self._thread is None else "running"

    def pause(self) -> None:
        pause(self._store)
        self._workshop.claims.interrupt_all()

    def resume(self) -> None:
        """Go on after a pause, or after compaction stopped by itself."""
        resume(self._store)
        with self._changed:
            self._stopped_because, self._lacks_room, self._room_wait = "", False, 0.0
            self._engine_failures = self._refusals = 0
            self._ended_engine.clear()
            self._next_walk = 0.0
            self._changed.notify()

    def start(self) -> None:
        """Nothing happens after :meth:`stop`: a mount may be ended while it starts."""
        with self._changed:
            if self._ending:
                return
            thread = threading.Thread(target=self._run, name="esrfs-compaction", daemon=True)
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """Drop the work in progress, save a swap that has begun; returns when nothing of it runs any more."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._workshop.claims.interrupt_all()
        with self._working:
            pass
        if self._thread is not None:
            self._thread.join()

    # The thread.

    def _run(self) -> None:
        pause = 0.0
        while not self._is_ending(after=pause):
            try:
                pause = self._step()
            except Exception:
                log.exception("compaction met a bug of esrfs; it goes on with other files in a minute")
                pause = _RETRY_SECONDS

    def _is_ending(self, after: float) -> bool:
        """Whether to end, asked ``after`` seconds or when there is news."""
        with self._changed:
            if not self._ending and after > 0:
                self._changed.wait(after)
            return self._ending

    def _step(self) -> float:
        """Compact what is due; the seconds after which to look again."""
        self._look_at_rules()
        if self._rules_problem:
            return _TICK_SECONDS
        now = time.monotonic()
        if now >= self._next_walk:
            self._next_walk = now + _WALK_SECONDS
            self._find_originals()
        if is_paused(self._store) or not self._workshop.lease_held():
            return _TICK_SECONDS
        if self._lacks_room and now >= self._next_look_for_room:
            self._look_for_room()
        if self._stopped_because:
            return _TICK_SECONDS
        with self._changed:
            due = [(path, waiting) for path, waiting in self._queue.items() if waiting.due <= now]
        for path, waiting in sorted(due, key=lambda item: item[1].due):
            if self._ending or self._stopped_because or is_paused(self._store):
                break
            self._take_turn(path, waiting)
        return _TICK_SECONDS

    def _look_at_rules(self) -> None:
        """When the owner's rules have changed, every file is looked at again; what they refused may be wanted now."""
        stamp = self._workshop.rules.stamp
        if stamp == self._rules_stamp:
            return
        self._rules_stamp, self._rules_problem, self._next_walk = stamp, "", 0.0
        try:
            self._workshop.rules.decide("")
        except (StoreError, OSError) as error:
            self._rules_problem = str(error)
            log.error("compaction of %s waits: %s", self._store.path, error)

    def _find_originals(self) -> None:
        """Queue every file that is no blob and has no verdict."""
        found = 0
        left_out: set[str] = set()

        def tell(one: walk.LeftOut) -> None:
            message = f"{os.path.join(self._store.path, one.path)}: {one.said}"
            left_out.add(message)
            if message not in self._left_out:  # each walk would say it again
                log.warning("%s", message)

        for each in walk.files(self._store, tell=tell):
            if self._ending:
                return
            self._follow(each.path, each.st)
            if self._looks_open(each.path, each.st):
                self._enqueue(each.path, each.st)
                self._unblock(each)
                found += 1
        self._left_out = left_out
        log.debug("a walk of the store found %d files to look at", found)
        self._forget_the_gone()

    def _follow(self, path: str, st: os.stat_result) -> None:
        """Keep the catalog's path of a file that was moved."""
        if st.st_nlink > 1:
            return
        identity = Identity.from_stat(st)
        known = self._workshop.catalog.get(identity)
        if known is not None and known.path != path:
            self._workshop.catalog.set_path(identity, path)

    def _forget_the_gone(self) -> None:
        """Drop from the catalog what no name leads to any more. What somebody brought back from the undo window stays:
        a file that is being renamed just now must not be read and hashed again for that (see ``asked_back``)."""
        catalog = self._workshop.catalog
        for identity, entry in catalog.entries():
            if self._ending:
                return
            if entry.state != "original" and self._is_gone(identity, entry.path):
                catalog.forget(identity)

    def _is_gone(self, identity: Identity, path: str) -> bool:
        try:
            with open_parent(self._store.root_fd, path) as (directory, name):
                st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
        return (st.st_dev, st.st_ino) != (identity.dev, identity.ino)

    def _looks_open(self, path: str, st: os.stat_result) -> bool:
        """Whether this file may have to be compacted."""
        try:
            return st.st_size > 0 and self._workshop.may_be_compacted(path, Identity.from_stat(st))
        except (StoreError, OSError):
            return False

    def _enqueue(self, path: str, st: os.stat_result) -> None:
        identity = Identity.from_stat(st)
        with self._changed:
            waiting = self._queue.get(path)
            if waiting is None or waiting.identity != identity:
                self._queue[path] = _Waiting(identity, time.monotonic() + self._quiet)

    def _unblock(self, found: walk.Found) -> None:
        """A file that waits long because of its folder has its turn as soon as the folder allows it."""
        with self._changed:
            waiting = self._queue.get(found.path)
        if waiting is None or not waiting.obstacle:
            return
        with contextlib.suppress(OSError):
            if swap.folder_obstacle(self._store, found.directory) != waiting.obstacle:
                waiting.due = 0.0

    def _take_turn(self, path: str, waiting: _Waiting) -> None:
        """The file's quiet time is over: if nothing changed meanwhile, it is compacted."""
        try:
            with open_parent(self._store.root_fd, path) as (directory, name):
                st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError:
            self._drop(path, waiting)
            return
        if stat.S_ISDIR(st.st_mode):
            self._next_walk = 0.0  # a folder was renamed: all paths below are new
        if not stat.S_ISREG(st.st_mode):
            self._drop(path, waiting)
            return
        if waiting.identity is not None and Identity.from_stat(st) != waiting.identity:
            self._enqueue(path, st)
            return
        done = self._compact(path, again=False)
        if done is not None and done.state not in ("left", "failed"):
            self._drop(path, waiting)
            return
        soon = max(self._quiet, 1.0 if done else _RETRY_SECONDS)
        if done is not None and done.blocked_by:
            waiting.wait = min(max(2 * waiting.wait, self._quiet, _RETRY_SECONDS), _LONGEST_WAIT_SECONDS)
            waiting.obstacle = done.message if done.blocked_by == "folder" else ""
        else:
            waiting.wait, waiting.obstacle = 0.0, ""
        with self._changed:
            if self._queue.get(path) is waiting:
                waiting.due = time.monotonic() + (waiting.wait or soon)

    def _drop(self, path: str, waiting: _Waiting) -> None:
        with self._changed:
            if self._queue.get(path) is waiting:
                del self._queue[path]

    # One file.

    def _compact(self, path: str, again: bool) -> Done | None:
        """Compact one file; None when that failed for a reason that is not the file's."""
        with self._working:
            if self._ending or not self._has_room():
                return None
            try:
                done = compact.compact(self._workshop, path, again=again)
            except (EngineError, TimeoutError) as error:
                if not self._ending:
                    self._engine_failures += 1
                    self._engine_failed(path, error)
                return None
            except OSError as error:
                self._disk_failed(path, error)
                if self._stopped_because:
                    return None
                return Done(path, "failed", message=error.strerror or str(error), blocked_by="file")
            except (StoreError, WeightsError) as error:
                self._stop(str(error))
                return None
        if done.reason == Reason.ENGINE_ENDED and done.tried:
            self._ended_engine.add(path)
            self._engine_failed(path, done.message)
            return None
        if done.tried:
            self._engine_failures = 0
            self._ended_engine.clear()
            self._watch_refusals(done)
        if done.state == Verdict.COMPACTED:
            self._room_wait = 0.0
        with self._changed:
            self.counts[done.state] += 1
        if done.blocked_by:
            self._tell_blocked(done)
        if done.state != "left":
            log.info("%s: %s%s", path, done.state, f" ({done.message})" if done.message else "")
        return done

    def _tell_blocked(self, done: Done) -> None:
        folder = os.path.dirname(done.path)
        if (folder, done.message) not in self._told:
            self._told.add((folder, done.message))
            log.warning(
                "%s: not compacted: %s. It is tried again now and then; others of its folder are not named for that.",
                done.path,
                done.message,
            )

    def _has_room(self) -> bool:
        if _is_free(self._store, 1):
            return True
        self._make_room()
        if _is_free(self._store, 1):
            return True
        self._stop("the store's disk is nearly full, and the undo window is as short as it may be", for_room=True)
        return False

    def _look_for_room(self) -> None:
        """Go on after a full disk, if there is room again. The undo window has aged meanwhile: it may give some."""
        with self._working:
            if not _is_free(self._store, _MORE_TO_GO_ON):
                self._make_room()
            if not (_is_free(self._store, _MORE_TO_GO_ON) and _can_be_written(self._store)):
                self._next_look_for_room = time.monotonic() + self._room_wait
                return
            with self._changed:
                if self._lacks_room:
                    self._stopped_because, self._lacks_room = "", False
                    log.info("compaction of %s goes on: there is room again", self._store.path)

    def _engine_failed(self, path: str, why: object) -> None:
        log.error("%s: not compacted, the engine failed (%s); the original stays", path, why)
        failures = self._engine_failures + len(self._ended_engine)
        if failures >= _ENGINE_FAILURES:
            for each in self._ended_engine:
                compact.acquit(self._workshop, each)
            self._stop(f"the engine failed {failures} times in a row")

    def _disk_failed(self, path: str, error: OSError) -> None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            log.warning("%s: not compacted, no space is left for the blob; the original stays", path)
            self._make_room()
            self._stop("no space is left for blobs", for_room=True)
        else:
            log.error("%s: not compacted (%s); the original stays", path, error)
            if error.errno in (errno.EIO, errno.EROFS):
                self._stop(f"the store's disk failed: {error.strerror}")

    def _watch_refusals(self, done: Done) -> None:
        if done.state == Verdict.REFUSED and done.reason == Reason.QUALITY:
            self._refusals += 1
            if self._refusals >= _REFUSALS_IN_A_ROW:
                self._stop(f"the gate refused {self._refusals} pictures in a row, which is unusual")
        elif done.state == Verdict.COMPACTED:
            self._refusals = 0

    def _stop(self, reason: str, *, for_room: bool = False) -> None:
        with self._changed:
            if self._stopped_because and not (self._lacks_room and not for_room):
                return
            self._stopped_because, self._lacks_room = reason, for_room
            if for_room:
                self._room_wait = min(max(2 * self._room_wait, _ROOM_SECONDS), _ROOM_SECONDS_AT_MOST)
                self._next_look_for_room = time.monotonic() + self._room_wait
        how = "It goes on by itself when there is room again, or" if for_room else "It goes on"
        log.error("compaction of %s stops: %s. %s with `esrfs resume`.", self._store.path, reason, how)

    # A command.

    def ask(self, paths: Sequence[str], *, now: bool) -> list[str]:
        """Have files at and below ``paths`` compacted in their turn, ``now`` without their quiet time; which ones.

        Raises OSError for a path that does not exist, CompactionUnavailable.
        """
        compact.check_available(self._store)
        everything = walk.files(self._store, paths)
        found = [(each.path, each.st) for each in everything if self._looks_open(each.path, each.st)]
        for path, st in found:
            self._enqueue(path, st)
        with self._changed:
            for path, _ in found:
                if now and path in self._queue:
                    self._queue[path].due = self._queue[path].wait = 0.0
            self._changed.notify()
        return [path for path, _ in found]

    def still_waiting(self, paths: Sequence[str]) -> int:
        """How many of ``paths`` wait for their turn; 0 while nothing runs that could come to them. Those that were
        tried in vain, and are not likely to be better off soon, don't count."""
        if self.state != "running":
            return 0
        with self._changed:
            return sum(path in self._queue and not self._queue[path].wait for path in paths)

    def compact_now(self, paths: Sequence[str], emit: Emit) -> Counter[str]:
        """Compact what is at and below ``paths``, without the quiet time; how many files came to each state.

        A path that names a file is tried again even if an earlier verdict was against it. Raises OSError for a path
        that does not exist, CompactionUnavailable also where another mount is the compactor, or compaction is paused.
        """
        compact.check_available(self._store)
        if not self._workshop.lease_held():
            raise CompactionUnavailable(f"{self._store.path}: another mount compacts this store; ask that one")
        if is_paused(self._store):
            raise CompactionUnavailable(f"{self._store.path}: compaction is paused; see esrfs resume")
        if self._lacks_room:
            self._look_for_room()
        if self._stopped_because:
            raise CompactionUnavailable(
                f"{self._store.path}: compaction has stopped: {self._stopped_because}; see esrfs resume"
            )
        found = [each.path for each in walk.files(self._store, paths)]
        totals: Counter[str] = Counter()
        for number, path in enumerate(found, 1):
            if self._ending or is_paused(self._store):
                break
            done = self._compact(path, again=path in paths)
            if done is None:
                done = Done(path, "failed", message=self._stopped_because or "the log tells why")
            totals[done.state] += 1
            if done.state not in ("left", "failed"):
                with self._changed:
                    self._queue.pop(path, None)
            if not emit(done, number, len(found)) or self._stopped_because:
                break
        return totals


def _is_free(store: Store, times: int) -> bool:
    """Whether the store's disk has ``times`` the room that compaction leaves to others. Raises OSError."""
    space = os.fstatvfs(store.root_fd)
    return space.f_bavail * space.f_frsize >= times * _floor(space)


def _floor(space: os.statvfs_result) -> int:
    return min(_LEAST_FREE_BYTES, int(space.f_blocks * space.f_frsize * _LEAST_FREE_SHARE))


def _can_be_written(store: Store) -> bool:
    """Whether room is to be had for us, too: a quota is not seen in what the disk has free."""
    try:
        descriptor = staging.create_unnamed(store)
        try:
            linux.reserve(descriptor, _floor(os.fstatvfs(store.root_fd)))
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True
