"""Reaching the mount that serves a store, or saying why it can't be reached."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from shlex import quote
from typing import Any

from esrfs import control
from esrfs.cli import paths
from esrfs.cli.paths import Place
from esrfs.cli.show import Advance, CommandError
from esrfs.exit_codes import ExitCode


def find(place: Place, store_id: str) -> Path | None:
    """The control socket of the place's mount, else of any mount of the store; None where none answers."""
    if place.mountpoint is not None and (socket := control.find(store_id, place.mountpoint)) is not None:
        return socket
    return control.find(store_id)


def ask(place: Place, store_id: str) -> Path | None:
    """Like :func:`find`. Raises CommandError PERMISSION where somebody else runs the mount: only that mount knows what
    is asked for, and what is done behind it would be wrong."""
    socket = find(place, store_id)
    if socket is None:
        _refuse_of_others(place)
    return socket


def require(place: Place, store_id: str) -> Path:
    """Like :func:`find`. Raises CommandError NOT_MOUNTED or PERMISSION, saying what to do."""
    socket = find(place, store_id)
    if socket is not None:
        return socket
    if place.mountpoint is None:
        raise CommandError(
            f"{place.store} is not mounted; mount it first: esrfs mount {quote(place.store)} DIRECTORY",
            ExitCode.NOT_MOUNTED,
        )
    _refuse_of_others(place)
    raise CommandError(
        f"{place.mountpoint} is mounted, but its process does not answer (it was killed, or it is ending). "
        f"To start anew: esrfs umount {quote(place.mountpoint)}, "
        f"then esrfs mount {quote(place.store)} {quote(place.mountpoint)}",
        ExitCode.NOT_MOUNTED,
    )


def _refuse_of_others(place: Place) -> None:
    """Raises CommandError PERMISSION if somebody else runs the place's mount."""
    user = next((mount.user_id for mount in paths.mounts() if mount.mountpoint == place.mountpoint), os.getuid())
    if user == os.getuid():
        return
    name = name_of(user)
    raise CommandError(
        f"{place.mountpoint} is run by {name} and answers nobody else; give this command as {name}: "
        f"sudo {'' if user == 0 else f'-u {name} '}esrfs …",
        ExitCode.PERMISSION,
    )


def name_of(user: int) -> str:
    """The user's name, or #NUMBER (which sudo understands, too)."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"#{user}"


def call_with_progress(socket: Path, op: str, advance: Advance, **arguments: Any) -> dict[str, Any]:
    """``control.call``, with each event ``{"path", "done", "total"}`` shown as progress."""

    def on_event(event: dict[str, Any]) -> None:
        advance(event.get("done", 0), event.get("total", 0), event.get("path", ""))

    return control.call(socket, op, on_event=on_event, **arguments)
