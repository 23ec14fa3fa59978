"""Events of a source folder: which files to look at, without walking.

Events are hints only. They get lost (queues overflow, watches run out, a network's other machines send none), so a walk
of the whole source at the start and from time to time finds the rest; a lost event delays a file, it never loses one.

Threads: watchdog's threads call :class:`_Handler`; ``_lock`` protects what it has collected.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable

import watchdog.observers
from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.utils import BaseThread

from esrfs_daemon.asking import answers
from esrfs_daemon.destination import filesystem_type, views_below

log = logging.getLogger("esrfs.daemon")

_MOST = 20_000
"""Paths that are remembered; beyond that the source is walked instead."""
_WANTED: list[type[FileSystemEvent]] = [
    FileCreatedEvent, FileModifiedEvent, FileClosedEvent, FileMovedEvent, FileAttribEvent, DirCreatedEvent,
    DirMovedEvent,
]  # fmt: skip
_NO_EVENTS = ("nfs", "cifs", "smb", "9p", "ceph", "afs", "lustre", "fuse", "vboxsf", "virtiofs", "prl_fs", "vmhgfs")
"""Filesystems (beginnings of their names) whose other users' changes the kernel does not hear of."""


class EventsUnavailable(Exception):  # noqa: N818 (a state, not an error)
    """There are no events of this folder; for people: why, and what to raise."""


class Watch:
    """Events below one folder, collected until they are asked for; ``close`` it."""

    def __init__(self, source: str, source_fd: int, wake: Callable[[], None]) -> None:
        """``source``: real path; ``wake`` is called when there is news. Raises EventsUnavailable."""
        kind = filesystem_type(source_fd)
        if kind.startswith(_NO_EVENTS):
            raise EventsUnavailable(f"{source} lies on {kind}, where not all changes make events")
        for view in sorted(views_below(source)):  # to watch the source is to walk it, with no end in a mount that hangs
            if not answers(os.path.join(source, view)):
                raise EventsUnavailable(f"{source} can't be watched: {view} in it, a mounted esrfs, does not answer")
        self._handler = _Handler(source, wake)
        self._hearing = _Hearing(self._handler)
        self._observer = watchdog.observers.Observer()
        try:
            self._observer.schedule(self._handler, source, recursive=True, event_filter=_WANTED)
            self._observer.start()
        except OSError as error:
            raise EventsUnavailable(_in_words(source, error)) from error
        logging.getLogger("watchdog").addHandler(self._hearing)

    def drain(self) -> tuple[set[str], set[str], bool]:
        """``(files, folders, lost)`` since the last time: paths relative to the source that changed or came, and
        whether events were lost, so that the source has to be walked."""
        return self._handler.drain()

    @property
    def is_alive(self) -> bool:
        """False when a thread of it has ended: then no more events come."""
        threads = [self._observer, *self._observer.emitters, *self._reader()]
        return all(thread.is_alive() for thread in threads)

    def close(self) -> None:
        logging.getLogger("watchdog").removeHandler(self._hearing)
        try:
            self._observer.stop()
        except KeyError:
            # Its books are wrong when two folders have exchanged their names, as by ``init --in-place``, so that it
            # stops in the middle of stopping. What sent it there is left behind, waiting for events that don't come.
            log.debug("watchdog did not end by itself", exc_info=True)
            self._observer.emitters.clear()
            self._observer.stop()
        self._observer.join()

    def _reader(self) -> list[BaseThread]:
        """The thread that reads events from the kernel, in versions of watchdog that have one for that."""
        reader = getattr(self._observer, "_inotify_fd", None)
        return [reader] if isinstance(reader, BaseThread) else []


class _Handler(FileSystemEventHandler):
    def __init__(self, source: str, wake: Callable[[], None]) -> None:
        self._prefix = source.rstrip("/") + "/"
        self._wake = wake
        self._lock = threading.Lock()
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._lost = False

    def on_any_event(self, event: FileSystemEvent) -> None:
        path = os.fsdecode(event.dest_path or event.src_path)
        if not path.startswith(self._prefix):
            return
        relative = path[len(self._prefix) :]
        with self._lock:
            if len(self._files) + len(self._folders) >= _MOST:
                self._lost = True
                self._files.clear()
                self._folders.clear()
            elif not self._lost:
                (self._folders if event.is_directory else self._files).add(relative)
        self._wake()

    def lose(self) -> None:
        with self._lock:
            self._lost = True
        self._wake()

    def drain(self) -> tuple[set[str], set[str], bool]:
        with self._lock:
            found = (self._files, self._folders, self._lost)
            self._files, self._folders, self._lost = set(), set(), False
        return found


class _Hearing(logging.Handler):
    """watchdog tells of an overflow, or of a folder that it can't watch, in its log only."""

    def __init__(self, handler: _Handler) -> None:
        super().__init__(logging.WARNING)
        self._handler = handler

    def emit(self, record: logging.LogRecord) -> None:
        self._handler.lose()


def _in_words(source: str, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return (
            f"{source} has more folders than this user may watch (fs.inotify.max_user_watches is "
            f"{_limit('max_user_watches')}). Raise it, e.g. by fs.inotify.max_user_watches=1048576 in "
            "/etc/sysctl.d/90-inotify.conf, then: sysctl --system"
        )
    if error.errno == errno.EMFILE:
        return (
            f"{source} can't be watched: this user has all inotify instances in use (fs.inotify.max_user_instances is "
            f"{_limit('max_user_instances')}). Raise it, e.g. by fs.inotify.max_user_instances=1024 in "
            "/etc/sysctl.d/90-inotify.conf, then: sysctl --system"
        )
    return f"{source} can't be watched ({error.strerror})"


def _limit(name: str) -> str:
    try:
        with open(f"/proc/sys/fs/inotify/{name}", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return "unknown"
