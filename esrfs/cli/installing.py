"""``install-units``: systemd units that name this very installation.

The units lie in the wheel (``esrfs/systemd``) or, in a checkout, in ``systemd/`` beside the package. Installed ones
begin with a line that holds a digest of the rest: so one that somebody has edited since is known, and not overwritten.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

import esrfs
from esrfs import whole
from esrfs.cli import show
from esrfs.cli.show import CommandError
from esrfs.exit_codes import ExitCode

_MARK = "# Installed by `esrfs install-units`; "
_PROGRAM = re.compile(r"^(Exec\w+=[-@:+!]*)(esrfs(?:-\w+)?)(?=\s)", re.MULTILINE)


def add_to(app: typer.Typer) -> None:
    app.command("install-units")(install_units)


def install_units(
    user: Annotated[
        bool, typer.Option("--user", help="For your own services, in place of the system's (which only root may).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; print what would be written.")] = False,
) -> None:
    """Install systemd units: esrfs@.service for mounts, esrfs-daemon.service for the migration daemon.

    They name the esrfs that this command is of. Starts nothing. A unit that was edited stays as it is.
    """
    directory = _directory(user)
    units = {
        directory / source.name: _signed(
            _PROGRAM.sub(lambda found: found[1] + _word(_program(found[2])), source.read_text())
        )
        for source in sorted((_shipped() / ("user" if user else "system")).iterdir())
    }
    edited, changed = [], False
    for path, text in units.items():
        there = path.read_text(errors="replace") if path.exists() else None
        if there == text:
            show.line(f"{path} is up to date")
        elif there is not None and not _is_ours(there):
            edited.append(path)
        elif dry_run:
            show.line(f"would write {path}:\n\n{text}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole.write(path, text.encode(), 0o644)
            show.line(f"{path} is written")
            changed = True
    for path in edited:
        show.note(
            f"{path} was edited, or is not of esrfs; it stays as it is. Keep your changes beside it "
            f"({_systemctl(user)} edit {path.name}), delete it, and run this again"
        )
    if changed:
        where = "~/.config/esrfs" if user else "/etc/esrfs"
        show.line(
            f"now:  {_systemctl(user)} daemon-reload\n"
            f"then, with STORE= and DIR= in {where}/NAME.conf:  {_systemctl(user)} enable --now esrfs@NAME"
        )
    if edited:
        raise typer.Exit(ExitCode.REFUSED)


def _shipped() -> Path:
    package = Path(esrfs.__file__).parent
    inside = package / "systemd"
    return inside if inside.is_dir() else package.parent / "systemd"


def _directory(user: bool) -> Path:
    return platformdirs.user_config_path("systemd") / "user" if user else Path("/etc/systemd/system")


def _systemctl(user: bool) -> str:
    return "systemctl --user" if user else "systemctl"


def _program(name: str) -> str:
    """Where the program lies that belongs to the esrfs which runs. Raises CommandError."""
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), name)
    for path in (beside, os.path.join(os.path.dirname(sys.executable), name), shutil.which(name)):
        if path and os.access(path, os.X_OK):
            return path
    raise CommandError(f"{name} is not installed beside this esrfs; nothing was written", ExitCode.FAILED)


def _word(path: str) -> str:
    """A path as systemd.syntax(7) wants it; a ``%`` or ``$`` would mean something else. Raises CommandError."""
    if not path.isprintable():
        raise CommandError(f"{path!r} can't stand in a systemd unit; install esrfs elsewhere", ExitCode.REFUSED)
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != path or re.search(r"[\s';]", path) else path


def _signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{_MARK}{digest}\n{text}"


def _is_ours(text: str) -> bool:
    first, _, rest = text.partition("\n")
    return first.startswith(_MARK) and _signed(rest) == text
