"""What there is to migrate in a source: a walk by descriptors, which no symlink leads out of the source.

Names are text with surrogateescape. A folder that changes while it is walked is no error: what was missed, the next
walk finds.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from esrfs.store import layout
from esrfs.store.beneath import beneath
from esrfs.store.initialise import what_marks
from esrfs.upkeep.compact import is_temporary
from esrfs_daemon import nested, sources
from esrfs_daemon.destination import lies_in_view
from esrfs_daemon.nested import Nested

_PART = re.compile(r"\.esrfs-[0-9a-f]{16}\.part")
_TAKEN = re.compile(r"\.esrfs-[0-9a-f]{16}\.taken")
_KINDS = {
    stat.S_IFSOCK: "a socket: it holds no bytes",
    stat.S_IFIFO: "a named pipe: it holds no bytes",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

Kind = Literal["file", "symlink", "directory"]


@dataclass(frozen=True, slots=True)
class Found:
    path: str
    """Relative to the source; ``""`` is the source itself."""
    kind: Kind
    st: os.stat_result
    mirrored: str = ""
    """Why it is only copied from: another program mirrors the folder. The end of "X is …"."""


@dataclass(frozen=True, slots=True)
class Unmovable:
    path: str
    reason: str
    passing: bool = False
    """It is so by its name alone, and likely not for long: a download that runs."""


class Filters:
    """Which files a rule means. Folders are walked whatever their name, but for those that ``exclude`` names."""

    def __init__(
        self, include: Sequence[str] = (), exclude: Sequence[str] = (), *, takes_unfinished: bool = False
    ) -> None:
        """``takes_unfinished``: also files with names that programs give to what they have not finished."""
        self.takes_unfinished = takes_unfinished
        self._include = [_compiled(pattern) for pattern in include]
        self._exclude = [_compiled(pattern) for pattern in exclude]
        self.takes_all = not include
        """No ``include``: then empty folders are migrated, too."""

    def takes(self, path: str) -> bool:
        return not self.leaves_out(path) and (self.takes_all or _matches(self._include, path))

    def leaves_out(self, path: str) -> bool:
        """By ``exclude``; for a folder: all of it."""
        return _matches(self._exclude, path)


def _compiled(pattern: str) -> tuple[re.Pattern[str], bool]:
    return re.compile(fnmatch.translate(pattern.strip("/").lower())), "/" in pattern.strip("/")


def _matches(patterns: list[tuple[re.Pattern[str], bool]], path: str) -> bool:
    lower = path.lower()
    name = lower.rpartition("/")[2]
    return any(pattern.match(lower if whole else name) for pattern, whole in patterns)


def markers_above(path: str) -> str:
    """Why a folder at or above ``path`` (absolute) says that its files are mirrored elsewhere; empty if none does."""
    at = path
    while True:
        try:
            reason = what_marks(at, set(os.listdir(at)))
        except OSError:
            reason = None
        if reason:
            return f"{at} is {reason}"
        above = os.path.dirname(at)
        if above == at:
            return ""
        at = above


def walk(
    root_fd: int,
    root: str,
    filters: Filters,
    unmovable: Callable[[Unmovable], None],
    inside: Nested,
    *,
    below: str = "",
    mirrored: str = "",
) -> Iterator[Found]:
    """Everything at and below the folder ``below``: each folder before what is in it, names in order; not what is in a
    trash: that was deleted, perhaps by us. Raises OSError.

    ``root``: the path of ``root_fd``, to look for markers. ``inside``: the stores and views in it; ``below`` lies in
    none. ``mirrored``: the reason that holds from above.
    """
    device = os.fstat(root_fd).st_dev
    pending = [(below, mirrored)]
    while pending:
        path, reason = pending.pop()
        try:
            fd = beneath(root_fd, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError as error:
            unmovable(Unmovable(path, f"the folder can't be read ({error.strerror})"))
            continue
        try:
            st = os.fstat(fd)
            if st.st_dev != device and lies_in_view(fd) is not None:
                unmovable(Unmovable(path, nested.VIEW))
                continue
            names = sorted(os.listdir(fd))
            if layout.RESERVED in names and layout.is_store(".", fd):
                unmovable(Unmovable(path, nested.STORE))
                continue
            views = inside.views()
            marked = what_marks(os.path.join(root, path), set(names)) if path else None
            if marked:
                reason = f"{os.path.join(root, path)} is {marked}"
            yield Found(path, "directory", st, reason)
            folders = []
            for name in names:
                full = f"{path}/{name}" if path else name
                if full in views:  # to look at it might take for ever
                    if not filters.leaves_out(full):
                        unmovable(Unmovable(full, nested.VIEW))
                    continue
                found = look(fd, name, full, filters, unmovable, mirrored=reason)
                if found is None:
                    continue
                if found.kind == "directory":
                    if not sources.is_trash(os.path.join(root, full)):
                        folders.append((full, reason))
                else:
                    yield found
        except FileNotFoundError:
            continue  # deleted while it was open
        except OSError as error:
            unmovable(Unmovable(path, f"the folder can't be read ({error.strerror})"))
            continue
        finally:
            os.close(fd)
        pending.extend(reversed(folders))


def look(
    directory: int,
    name: str,
    path: str,
    filters: Filters,
    unmovable: Callable[[Unmovable], None],
    *,
    mirrored: str = "",
) -> Found | None:
    """What ``name`` is; None if it is gone, not meant, or can't be moved (then ``unmovable`` is told)."""
    try:
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        unmovable(Unmovable(path, f"it can't be looked at ({error.strerror})"))
        return None
    if stat.S_ISDIR(st.st_mode):
        return None if filters.leaves_out(path) else Found(path, "directory", st, mirrored)
    if _TAKEN.fullmatch(name) and not filters.leaves_out(path):
        # What was interrupted is put right before anything is looked for: this one's folder had another name then.
        reason = "a file that an interrupted migration took aside, and that can't be put back: rename it, or delete it"
        unmovable(Unmovable(path, reason))
        return None
    if not filters.takes(path) or _PART.fullmatch(name):
        return None
    if not filters.takes_unfinished and is_temporary(name):
        unmovable(Unmovable(path, "its name says that a program has not finished it", passing=True))
        return None
    if stat.S_ISREG(st.st_mode):
        return Found(path, "file", st, mirrored)
    if stat.S_ISLNK(st.st_mode):
        return Found(path, "symlink", st, mirrored)
    unmovable(Unmovable(path, _KINDS.get(stat.S_IFMT(st.st_mode), "no file of a known kind")))
    return None
