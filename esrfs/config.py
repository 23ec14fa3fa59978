"""Where esrfs keeps what is not part of a store: catalog, view cache, control socket (XDG directories, by store id).

These are never under the mount: SQLite or a child process given a path inside its own mount would wait for itself.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import platformdirs


def _private(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _private_if_possible(directory: Path) -> Path:
    """On a disk that is full or read-only it is not there: all that lies in it can be done without, and who wants it
    says so."""
    with contextlib.suppress(OSError):
        _private(directory)
    return directory


def state_directory(store_id: str) -> Path:
    """The catalog and logs of the store with this id (hex): ``$XDG_STATE_HOME/esrfs/ID``, made 0700 if missing and
    possible."""
    return _private_if_possible(platformdirs.user_state_path("esrfs") / store_id)


def cache_directory(store_id: str) -> Path:
    """Rebuilt views of the store with this id (hex): ``$XDG_CACHE_HOME/esrfs/ID``, made 0700 if missing and
    possible."""
    return _private_if_possible(platformdirs.user_cache_path("esrfs") / store_id)


def runtime_directory() -> Path:
    """Control sockets, one for each store: ``$XDG_RUNTIME_DIR/esrfs`` or, where that is unset, ``/run/user/UID/esrfs``,
    ``/run/esrfs`` for root, else a directory in the temporary folder that only this user owns; made 0700 if missing.

    Raises PermissionError if the directory exists and belongs to somebody else.
    """
    uid = os.getuid()
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        directory = Path(base) / "esrfs"
    elif os.access(f"/run/user/{uid}", os.W_OK):
        directory = Path(f"/run/user/{uid}/esrfs")
    elif uid == 0:
        directory = Path("/run/esrfs")
    else:
        directory = Path(os.environ.get("TMPDIR", "/tmp")) / f"esrfs-{uid}"
    _private(directory)
    if directory.stat().st_uid != uid:
        raise PermissionError(f"{directory} belongs to another user; set XDG_RUNTIME_DIR to a directory of your own")
    return directory
