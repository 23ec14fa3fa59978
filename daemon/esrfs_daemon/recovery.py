"""What a crash left in the middle of a migration is put back, or finished."""

from __future__ import annotations

import contextlib
import logging
import os
import stat

from esrfs.store import linux
from esrfs.store.beneath import beneath
from esrfs_daemon import sources
from esrfs_daemon.batch import Route, part_name
from esrfs_daemon.journal import INTERRUPTED, Row

log = logging.getLogger("esrfs.daemon")


def recover_file(row: Row, route: Route) -> None:
    """The part file goes, the source comes back if it was being touched, and the row says what is the case now. Raises
    OSError."""
    if row.dest_root == route.to.path:
        _remove_part(row, route.to.fd)
    _put_taken_back(row, route.source_fd)
    if row.state == "begun":
        row.state, row.note = "undone", INTERRUPTED
    elif row.wanted == "keep" or not _is_there(row.source, route.source_fd):
        row.state = "done"
    else:
        row.state, row.note = "left", INTERRUPTED


def _remove_part(row: Row, destination_fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        directory = beneath(destination_fd, row.dest.rpartition("/")[0], os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.unlink(part_name(row.token), dir_fd=directory)
        finally:
            os.close(directory)


def _put_taken_back(row: Row, source_fd: int) -> None:
    above, _, name = row.source.rpartition("/")
    taken = sources.taken_name(row.token)
    try:
        directory = beneath(source_fd, above, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        try:
            st = os.stat(taken, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if row.wanted == "symlink":
            ours = os.path.join(row.dest_root, row.dest)
            if stat.S_ISREG(st.st_mode) and sources.read_link(source_fd, row.source) == ours:
                linux.renameat2(directory, taken, directory, name, linux.RENAME_EXCHANGE)
                st = os.stat(taken, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISLNK(st.st_mode) and os.readlink(taken, dir_fd=directory) == ours:
                os.unlink(taken, dir_fd=directory)
                return
        back = sources.put_back(directory, taken, directory, name)
        if back != name:
            log.warning("%s: put back as %s, since its name has been taken meanwhile", row.source, back)
    finally:
        os.close(directory)


def _is_there(path: str, source_fd: int) -> bool:
    above, _, name = path.rpartition("/")
    try:
        directory = beneath(source_fd, above, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    finally:
        os.close(directory)
    return True
