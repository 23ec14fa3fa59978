"""Making many small copies durable in one step: syncfs(2) of the store's filesystem, in place of an fsync of each.

FUSE passes no syncfs on, so the barrier is a descriptor of the store's own directory; nothing is read or written
through it. A mount of esrfs keeps no written byte back: what write(2) took is in the store's filesystem.

What makes it as good as fsync:

- The filesystem is one whose syncfs writes everything, has the disk empty its cache, and returns what went wrong, and
  the kernel is one that hands that on (5.8 the errors of pages, 5.17 those of the filesystem).
- Each file was found below the store's directory by its random name, and on the barrier's device: so this is the
  directory that the mount writes to, whatever lies at its path by now.
- The barrier is opened before the first byte is written. Errors are told once for each open file; another batch's
  barrier can't take this one's away.

In every other case, and after every error, each file is fsynced through the mount: that says which one it was.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Sequence

from esrfs import faults
from esrfs.store import linux
from esrfs.store.beneath import beneath
from esrfs_daemon.batch import Work
from esrfs_daemon.destination import Destination, filesystem_type

log = logging.getLogger("esrfs.daemon")

_WHERE_SYNCFS_TELLS_ALL = ("btrfs", "ext4", "f2fs", "tmpfs", "xfs")
_SINCE_LINUX = (5, 17)
_FEWEST = 4
"""Fewer files are fsynced: syncfs may have to wait for what other programs wrote."""


def syncs_together(to: Destination) -> bool:
    """Whether a barrier can be had at this destination."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    return (
        to.backing_fd >= 0
        and release is not None
        and (int(release[1]), int(release[2])) >= _SINCE_LINUX
        and filesystem_type(to.backing_fd) in _WHERE_SYNCFS_TELLS_ALL
    )


def open_barrier(to: Destination) -> int:
    """To be opened before anything is written, and closed; -1 if it can't be opened."""
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=to.backing_fd)
    except OSError:
        return -1


def find_below(work: Work, to: Destination) -> None:
    """Open the part file in the store's directory, where that can be done."""
    if to.backing_fd < 0:
        return
    above = work.row.dest.rpartition("/")[0]
    path = f"{above}/{work.part}" if above else work.part
    try:
        work.below = beneath(to.backing_fd, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        work.below = -1


def make_durable(barrier: int, works: Sequence[Work]) -> list[Work]:
    """Have all of ``works`` that lie below the barrier on disk; those of which that can't be said are returned: each
    needs an fsync of its own."""
    if barrier < 0 or len(works) < _FEWEST:
        return list(works)
    try:
        device = os.fstat(barrier).st_dev
        left = [work for work in works if work.below < 0 or os.fstat(work.below).st_dev != device]
        linux.syncfs(barrier)
        faults.reach("migrate.synced")
    except OSError as error:
        log.info("the store's filesystem could not be written as a whole (%s); file by file, then", error.strerror)
        return list(works)
    return left
