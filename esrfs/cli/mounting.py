"""``mount`` and ``umount``, also as mount(8) and fstab call them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Container, Sequence
from shlex import quote
from typing import Annotated

import typer

from esrfs import config, control
from esrfs.cli import mounted, paths
from esrfs.cli.show import CommandError, note
from esrfs.exit_codes import ExitCode
from esrfs.store import layout
from esrfs.store.errors import StoreError

_END_SECONDS = 60.0
"""How long ``umount`` waits for the mount's process: longer than the mount gives its waiting readers."""

Options = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="OPTION[,OPTION]…", help="Mount options, as in fstab; may be repeated."),
]


def add_to(app: typer.Typer) -> None:
    app.command()(mount)
    app.command()(umount)


def mount(
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store, a directory made by `esrfs init`.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where to show its photographs full size.")],
    options: Options = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay in the foreground, and write the log to the terminal.")
    ] = False,
) -> None:
    """Mount a store.

    In fstab: `STORE DIR fuse.esrfs defaults 0 0`.
    """
    raise typer.Exit(_mount(store, directory, options or [], foreground))


def umount(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The mountpoint.")],
    force: Annotated[
        bool,
        typer.Option("--force", help="Detach it although programs use it; what they wait for is finished or fails."),
    ] = False,
    dead: Annotated[
        bool,
        typer.Option(
            "--dead",
            help="Only clear away a mount whose process was killed; the directory stays unwritable until it is mounted "
            "again. One that lives stays. For service managers.",
        ),
    ] = False,
) -> None:
    """Unmount, and wait until the mount has ended. Also clears away a mount whose process was killed."""
    place = paths.mounted_at(directory)
    if dead:
        while place is not None and _is_dead(place.mountpoint):
            _detach(place.mountpoint, lazily=True)
            note(f"{place.mountpoint}: the mount was dead, and is cleared away")
            place = paths.mounted_at(directory)
        return
    if place is None:
        raise CommandError(f"{directory} is not a mountpoint of esrfs; nothing was done", ExitCode.NOT_MOUNTED)
    if os.getuid() not in (0, place.user_id):
        raise CommandError(
            f"{place.mountpoint} is run by another user ({mounted.name_of(place.user_id)}), who alone may unmount it, "
            "and root",
            ExitCode.PERMISSION,
        )
    process = _process_of(place)
    try:
        if force and process is not None:
            signal.pidfd_send_signal(process, signal.SIGTERM)  # it detaches, and gives waiting readers a last while
        else:
            _detach(place.mountpoint, lazily=force)
        if process is None:
            _unguard(place)
        if process is not None and not _has_ended(process):
            note(
                f"{place.mountpoint} is unmounted, but its process is still busy; "
                "mount the store again when it has ended"
            )
            raise typer.Exit(ExitCode.BUSY)
    finally:
        if process is not None:
            os.close(process)


def _is_dead(mountpoint: str) -> bool:
    """Whether no process serves the mount any more."""
    try:
        os.statvfs(mountpoint)  # not stat: for a second the kernel knows the answer without asking
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def _unguard(mount: paths.Mount) -> None:
    """A mount that was killed left the directory below it unwritable: now it is as it was before."""
    from esrfs.mount.guard import guarded  # noqa: PLC0415
    from esrfs.store import layout  # noqa: PLC0415
    from esrfs.store.errors import StoreError  # noqa: PLC0415

    with (
        contextlib.suppress(StoreError, OSError),
        layout.open_store(mount.store, readonly=True) as store,
        guarded(mount.mountpoint, config.state_directory(store.config.id)) as guard,
    ):
        guard.end()


def is_mount_helper(program: str, arguments: Sequence[str], commands: Container[str]) -> bool:
    """Whether these arguments come from mount(8) or mount.fuse3 (``STORE DIR [-o …]``) and name no command."""
    if os.path.basename(program).startswith("mount."):
        return True
    first = arguments[0] if len(arguments) >= 2 else "-"
    return first not in commands and not first.startswith("-") and ("/" in first or os.path.isdir(first))


def mount_helper(arguments: Sequence[str], program: str) -> int:
    """Mount with the arguments of a mount helper (mount(8), "external helpers"); returns the exit code."""
    called_by_mount = program.startswith("mount.")
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("-o", dest="options", action="append", default=[])
    # For mount(8) -f means "do all but mount", for FUSE programs "stay in the foreground".
    parser.add_argument("-f", dest="f", action="store_true")
    parser.add_argument("-s", "-n", "-v", dest="ignored", action="store_true")
    parser.add_argument("-t", "-N", dest="ignored_value")
    parsed = parser.parse_args(arguments)
    if called_by_mount and parsed.f:
        return ExitCode.OK
    return _mount(parsed.store, parsed.directory, parsed.options, foreground=parsed.f and not called_by_mount)


def split_options(values: Sequence[str]) -> list[str]:
    """The single options in the values of ``-o``: split at commas, save where a backslash stands before."""
    parts = [part for value in values for part in re.split(r"(?<!\\),", value)]
    return [part.replace("\\,", ",") for part in parts if part]


def _mount(store: str, directory: str, options: Sequence[str], foreground: bool) -> int:
    return _serve(os.path.abspath(store), os.path.abspath(directory), split_options(options), foreground)


def _serve(store: str, directory: str, options: list[str], foreground: bool) -> int:
    from esrfs.mount import lifecycle  # noqa: PLC0415 (umount and mount(8)'s questions do without)

    return lifecycle.run(store, directory, options, foreground)


def _process_of(place: paths.Mount) -> int | None:
    """A pidfd of the mount's process; None where it does not answer."""
    try:
        with layout.open_store(place.store, readonly=True) as store:
            socket = control.find(store.config.id, place.mountpoint)
        if socket is not None:
            return os.pidfd_open(control.call(socket, "ping")["pid"])
    except (StoreError, control.ControlError, OSError):
        pass  # unmounting works without; there is just nothing to wait for
    return None


def _has_ended(process: int) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    with contextlib.suppress(InterruptedError):
        return bool(poll.poll(_END_SECONDS * 1000))
    return False


def _detach(mountpoint: str, lazily: bool) -> None:
    fusermount = shutil.which("fusermount3") or shutil.which("fusermount")
    if fusermount:
        command = [fusermount, "-u", *(["-z"] if lazily else []), "--", mountpoint]
    else:
        command = ["umount", *(["-l"] if lazily else []), "--", mountpoint]
    environment = {**os.environ, "LC_ALL": "C"}
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if result.returncode == 0:
        return
    if "busy" in result.stderr:
        raise CommandError(
            f"{mountpoint} is in use. Close what uses it (`fuser -vm {quote(mountpoint)}` tells), or detach it anyway: "
            f"esrfs umount --force {quote(mountpoint)}",
            ExitCode.BUSY,
        )
    raise CommandError(f"{mountpoint} could not be unmounted: {result.stderr.strip()}", ExitCode.MOUNT_FAILED)
