"""The last step for a file: its copy is verified and recorded, so its source may become what was asked for."""

from __future__ import annotations

import errno
import functools
import os

from esrfs.blob import container
from esrfs.store.beneath import beneath
from esrfs_daemon import copying, sources
from esrfs_daemon.batch import Route, Work
from esrfs_daemon.copying import Identity
from esrfs_daemon.journal import INTERRUPTED
from esrfs_daemon.report import NO_FOLDER, Note, Report, in_words

_ITSELF = "it is the destination's file itself, by another path: source and destination are one folder"
_A_BLOB = (
    "it is what a store of esrfs keeps in the place of a photograph; the photograph is seen where that store is mounted"
)


def touch(work: Work, route: Route, report: Report) -> None:
    """What was asked for is done to the source, or the reason noted why not."""
    found, row = work.found, work.row
    lacks = f"its copy {row.dest} lacks {work.lacks}" if work.lacks else ""
    if lacks:
        report.incomplete.append(Note(path=found.path, reason=lacks))
    if row.wanted == "keep":
        row.state = "done"
        return
    parent, _, name = found.path.rpartition("/")
    try:
        if work.reason or lacks:
            raise sources.Left(work.reason or lacks)
        if work.source >= 0 and container.read_footer(work.source, found.st.st_size) is not None:
            raise sources.Left(_A_BLOB)
        _still_there(work)
        directory = beneath(route.source_fd, parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            expected = _expected_now(work)
            fd = work.source if work.source >= 0 else None
            ask = functools.partial(_not_gone_with_it, work)
            if row.wanted == "delete":
                sources.delete(directory, name, expected, row.token, fd, ask=ask)
            elif row.wanted == "trash":
                sources.trash(directory, name, expected, os.path.join(route.source, found.path), fd, ask=ask)
            elif fd is not None:
                target = os.path.join(route.to.path, row.dest)
                sources.replace_by_symlink(directory, name, expected, row.token, fd=fd, target=target, ask=ask)
        finally:
            os.close(directory)
    except sources.ChangedSince as error:
        row.state, row.note = "left", f"{INTERRUPTED}: {error}"
        report.later.append(Note(path=found.path, reason=str(error)))
    except (sources.Left, OSError) as error:
        reason = in_words(error) if isinstance(error, OSError) else str(error)
        row.state, row.note = "left", reason
        report.left.append(Note(path=found.path, reason=reason))
    else:
        row.state = "done"
        report.touched += 1


def _expected_now(work: Work) -> Identity:
    """The identity that the source must have. The change time of a file with several names moves when we touch another
    of them; all else must be as it was."""
    expected = Identity.of(work.found.st)
    if work.source < 0 or work.found.st.st_nlink == 1:
        return expected
    now = Identity.of(os.fstat(work.source))
    if not now.is_same_content(expected):
        raise sources.ChangedSince("it changed after it was copied")
    return now


def _not_gone_with_it(work: Work) -> None:
    """The source has left its name. A copy that lay there before, and is gone by that, was the source itself, reached
    by another path: a bind mount, a share. Raises Left, OSError."""
    if work.state == "copied":
        return  # we made it ourselves
    name = work.row.dest.rpartition("/")[2]
    try:
        if work.copy >= 0:
            fd = copying.open_source(work.folder.fd, name)  # to open it asks the mount, whatever the kernel remembers
            try:
                is_there = os.path.samestat(os.fstat(fd), os.fstat(work.copy))
            finally:
                os.close(fd)
        else:
            is_there = os.readlink(name, dir_fd=work.folder.fd) == os.fsdecode(work.row.sha256)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE, errno.EINVAL, *NO_FOLDER):
            raise
        is_there = False
    if not is_there:
        raise sources.Left(_ITSELF)


def _looks_the_same(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two files on different devices are one, as far as a server passes on what it knows."""
    return (one.st_ino, one.st_ctime_ns, one.st_size) == (other.st_ino, other.st_ctime_ns, other.st_size)


def _still_there(work: Work) -> None:
    """The copy must still lie under its name: somebody may have removed it in the mount meanwhile."""
    name = work.row.dest.rpartition("/")[2]
    try:
        st = os.stat(name, dir_fd=work.folder.fd, follow_symlinks=False)
    except FileNotFoundError:
        raise sources.Left("its copy was removed from the destination meanwhile") from None
    if work.copy >= 0:
        if not os.path.samestat(st, os.fstat(work.copy)):
            raise sources.Left("its copy was replaced in the destination meanwhile")
        if work.state != "copied" and _looks_the_same(st, work.found.st):
            raise sources.Left(_ITSELF)
    elif os.readlink(name, dir_fd=work.folder.fd) != os.fsdecode(work.row.sha256):
        raise sources.Left("its copy was replaced in the destination meanwhile")
