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
from esrfs_daemon.report import NO_FOLDER, in_words

log = logging.getLogger("esrfs.daemon")


def recover_file(row: Row, route: Route) -> bool:
    """The part file goes, or the source comes back if it was being touched, and the row says what is the case now;
    False while there is nothing to say. Raises OSError: the row is as it was, and can be tried again."""
    if row.state == "begun":  # its source was not touched yet
        _remove_part(row, route.to.fd)
        row.state, row.note = "undone", INTERRUPTED
    elif row.wanted == "keep":
        row.state = "done"
    elif not _put_taken_back(row, route.source_fd):
        return False  # its folder is gone, and may come again: a card, say
    elif not _is_there(row.source, route.source_fd):
        row.state, row.note = "done", ""
    else:
        row.state, row.note = "left", INTERRUPTED
    return True


def why_not(row: Row, error: OSError) -> str:
    """For people: why the row could not be recovered, where its bytes are, and what they can do."""
    if error.errno not in NO_FOLDER:
        return (
            f"its migration was interrupted, and could not be put right ({in_words(error)}); the next run tries again"
        )
    if row.state == "begun":
        folder = os.path.join(row.dest_root, row.dest.rpartition("/")[0])
        return (
            f"its migration was interrupted, and {folder} is no folder any more. What was copied of it may lie where "
            f"that folder is now, as {part_name(row.token)}: delete that, or put the folder back: the next run does"
        )
    folder = os.path.join(row.source_root, row.source.rpartition("/")[0])
    return (
        f"its migration was interrupted, and {folder} is no folder any more. If the file is missing where that folder "
        f"is now, it is called {sources.taken_name(row.token)} there: rename it, or put the folder back, and the "
        f"next run puts it right. Its copy is {os.path.join(row.dest_root, row.dest)}"
    )


def _remove_part(row: Row, destination_fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        directory = beneath(destination_fd, row.dest.rpartition("/")[0], os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.unlink(part_name(row.token), dir_fd=directory)
        finally:
            os.close(directory)


def _put_taken_back(row: Row, source_fd: int) -> bool:
    """False where the source's folder is gone."""
    above, _, name = row.source.rpartition("/")
    taken = sources.taken_name(row.token)
    try:
        directory = beneath(source_fd, above, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        try:
            st = os.stat(taken, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return True
        if row.wanted == "symlink":
            ours = os.path.join(row.dest_root, row.dest)
            if stat.S_ISREG(st.st_mode) and sources.read_link(source_fd, row.source) == ours:
                linux.renameat2(directory, taken, directory, name, linux.RENAME_EXCHANGE)
                st = os.stat(taken, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISLNK(st.st_mode) and os.readlink(taken, dir_fd=directory) == ours:
                os.unlink(taken, dir_fd=directory)
                return True
        back = sources.put_back(directory, taken, directory, name)
        if back != name:
            log.warning("%s: put back as %s, since its name has been taken meanwhile", row.source, back)
        return True
    finally:
        os.close(directory)


def _is_there(path: str, source_fd: int) -> bool:
    above, _, name = path.rpartition("/")
    try:
        directory = beneath(source_fd, above, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    finally:
        os.close(directory)
    return True
