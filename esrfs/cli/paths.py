"""Which store a person means: PATH is a store, a mountpoint of one, or a path in either."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from esrfs.cli.show import CommandError
from esrfs.exit_codes import ExitCode

_MARK = os.path.join(".esrfs", "store.toml")


@dataclass(frozen=True)
class Mount:
    """A mounted esrfs, from this process's mount table."""

    store: str
    mountpoint: str
    root: str
    """Path in the view that is seen at ``mountpoint``: empty, but for bind mounts of a folder."""
    user_id: int
    """Who runs it."""


@dataclass(frozen=True)
class Place:
    store: str
    """Absolute path of the store's root."""
    relative: str
    """Path in the store and in its view alike; empty for the root."""
    mountpoint: str | None
    """Where the store is mounted: at the path's own mountpoint, else at any; None if it is not."""


def mounts(table: str = "/proc/self/mountinfo") -> list[Mount]:
    """Every esrfs in the mount table, oldest first; also those whose process has died."""
    found = []
    with open(table, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            kind, source, options = after.split()[:3]
            if kind == "fuse.esrfs":
                user = re.search(r"(?:^|,)user_id=(\d+)", options)
                root, mountpoint = map(_unescape, before.split()[3:5])
                found.append(Mount(_unescape(source), mountpoint, root.strip("/"), int(user[1]) if user else 0))
    return found


def mounted_at(directory: str) -> Mount | None:
    """The esrfs that is mounted at ``directory``, the topmost if there are several; None if none is."""
    table = mounts()
    for resolved in (str, _real_parent, os.path.realpath):  # as given first: see resolve()
        found = [mount for mount in table if mount.mountpoint == resolved(os.path.abspath(directory))]
        if found:
            return found[-1]
    return None


def resolve(path: str) -> Place:
    """The store that ``path`` belongs to. Touches nothing below a mountpoint, so a mount that hangs can't hang it.

    Raises CommandError NOT_A_STORE; PERMISSION for what its owner lets nobody look into.
    """
    absolute = os.path.abspath(path)
    table = mounts()
    # As given first: resolving symlinks may ask a mount that hangs.
    for resolved in (str, _real_parent, os.path.realpath):
        candidate = resolved(absolute)
        over = [mount for mount in table if _is_beneath(candidate, mount.mountpoint)]
        if over:
            # Of mounts on one mountpoint the last is on top.
            mount = max(enumerate(over), key=lambda item: (len(item[1].mountpoint), item[0]))[1]
            relative = os.path.join(mount.root, _relative(candidate, mount.mountpoint)).rstrip("/")
            return Place(mount.store, relative, mount.mountpoint)
        root = _store_above(candidate)
        if root is not None:
            served = [mount for mount in table if os.path.realpath(mount.store) == os.path.realpath(root)]
            return Place(root, _relative(candidate, root), served[-1].mountpoint if served else None)
    if closed := _closed_above(absolute):
        raise CommandError(
            f"{path} may be a store or lie in one, but you may not look into {closed}; its owner may, and root",
            ExitCode.PERMISSION,
        )
    hint = "" if os.path.lexists(absolute) else " (and it does not exist)"
    raise CommandError(
        f"{path} is neither an esrfs store nor a mount of one, nor in either{hint}. "
        "Make a store with: esrfs init DIRECTORY",
        ExitCode.NOT_A_STORE,
    )


def _store_above(path: str) -> str | None:
    at = path
    while True:
        if os.path.isfile(os.path.join(at, _MARK)):
            return at
        above, name = os.path.split(at)
        if at == path:
            # `init --in-place DIR` leaves an empty mountpoint at DIR, and the store beside it.
            beside = os.path.join(above, f".{name}.esrfs")
            if os.path.isfile(os.path.join(beside, _MARK)):
                return beside
        if above == at:
            return None
        at = above


def _closed_above(path: str) -> str | None:
    """Where looking for a store was not permitted, at ``path`` or above it; None if it was everywhere."""
    at = path
    while True:
        try:
            os.stat(os.path.join(at, _MARK))
        except PermissionError:
            inside = os.path.dirname(os.path.join(at, _MARK))
            return inside if os.path.lexists(inside) else at
        except OSError:
            pass
        if (above := os.path.dirname(at)) == at:
            return None
        at = above


def _real_parent(path: str) -> str:
    """``path`` with the symlinks of its folders resolved; itself may be a symlink in the store."""
    above, name = os.path.split(path)
    return os.path.join(os.path.realpath(above), name)


def _is_beneath(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _relative(path: str, root: str) -> str:
    return path[len(root) :].strip("/")


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal, like ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
