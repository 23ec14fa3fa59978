"""Files that were deleted, or replaced by a rename, while programs have them open.

Such a file lives on in its descriptors, with every operation that takes one. But libfuse's high-level API asks by path
for most of them (fstat, fchmod, fgetxattr, ...), and has a path for such a file only if it may rename it to
``.fuse_hidden…`` beside its old name. So the adapter lets libfuse believe that it does. In truth the name is gone from
the directory at once, as the program wished, and a handle of ours stands for the file as long as it lives.

libfuse hides the target of a rename before it renames: if that second step fails, the target must have its name again.
So what is hidden goes to staging first, and from there for good a second later (a file with other names keeps those,
and a descriptor of ours). A crash within that second leaves it in staging, and recovery puts it aside.

Lock: ``_changed`` protects ``_queue`` and ``_thread``; nothing is waited for under it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass

from esrfs.store import linux, staging
from esrfs.store.layout import Store

log = logging.getLogger("esrfs.vfs")

_LIFE_SECONDS = 1.0
"""libfuse's second step follows the first within the same request, which may have to wait for a slow disk."""


@dataclass(eq=False)
class Hidden:
    """A file whose name was taken away."""

    path: str
    """The name it had, relative to the store."""
    handle: int
    """Stands for the file until the last program closed it; 0 if it was closed already, and libfuse did not know."""
    staged: str | None
    """Its name in staging, while it has one; that is one link more than programs shall see."""
    kept: int | None
    """O_PATH descriptor of a file that is not in staging, while it can be given back its name."""
    since: float


class Removed:
    """Names on their way out."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[Hidden] = deque()
        self._thread: threading.Thread | None = None
        self._ending = False

    def take(self, path: str, directory: int, name: str, handle: int, links: int) -> Hidden:
        """Take the name, one of ``links``, away from the file, which ``handle`` stands for. Raises OSError."""
        staged = kept = None
        if links == 1:  # else its other names keep it, and would show one link too many
            with contextlib.suppress(OSError):  # another filesystem below the store, or a full disk
                staged = staging.take_in(self._store, directory, name)
        if staged is None:
            kept = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                os.unlink(name, dir_fd=directory)
            except BaseException:
                os.close(kept)
                raise
        hidden = Hidden(path, handle, staged, kept, time.monotonic())
        with self._changed:
            self._queue.append(hidden)
            if self._thread is None:
                self._thread = self._started()
            self._changed.notify()
        return hidden

    def _started(self) -> threading.Thread | None:
        """The thread; None if the system allows no more, and the next name, or the end, sees to what is queued."""
        thread = threading.Thread(target=self._run, name="esrfs-removed", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the name is gone already, so that is no failure of the deletion
            log.warning("deleted files take up room in staging until the next is deleted (%s)", error)
            return None
        return thread

    def give_back(self, hidden: Hidden, directory: int, name: str) -> None:
        """What was to replace it did not: it gets its name again, unless somebody has that by now."""
        staged, kept = self._claim(hidden)
        try:
            if staged is not None:
                linux.renameat2(self._store.staging_fd, staged, directory, name, linux.RENAME_NOREPLACE)
            elif kept is not None:
                os.link(f"/proc/self/fd/{kept}", name, dst_dir_fd=directory, follow_symlinks=True)
        except OSError as error:
            log.error("%s could not be given back its name (%s)", hidden.path, error)
            self._forget(staged, kept)
        else:
            self._forget(None, kept)

    def close(self) -> None:
        """Let go of all names at once."""
        with self._changed:
            self._ending = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()
        else:
            self._run()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._ending:
                    self._changed.wait()
                if not self._queue:
                    return
                left = 0.0 if self._ending else self._queue[0].since + _LIFE_SECONDS - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                hidden = self._queue.popleft()
            self._forget(*self._claim(hidden))

    def _claim(self, hidden: Hidden) -> tuple[str | None, int | None]:
        """What holds the file, for the one who asks first."""
        with self._changed:
            held = hidden.staged, hidden.kept
            hidden.staged = hidden.kept = None
        return held

    def _forget(self, staged: str | None, kept: int | None) -> None:
        if kept is not None:
            os.close(kept)
        if staged is None:
            return
        try:
            staging.remove(self._store, staged)
        except OSError as error:
            log.error("a deleted file could not be removed from staging (%s): %s", staged, error)
