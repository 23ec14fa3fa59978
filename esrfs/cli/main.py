"""Entry point of ``esrfs``: picks the command, and turns every error into a message and an exit code.

Called as ``mount.fuse.esrfs STORE DIR -o …`` (by mount(8), for fstab) or as ``esrfs STORE DIR -o …`` (by mount.fuse3)
it mounts."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import esrfs
from esrfs.cli import mounting, show
from esrfs.cli.show import CommandError, note
from esrfs.control import ControlError
from esrfs.engine.client import EngineError
from esrfs.exit_codes import ExitCode
from esrfs.store.errors import Problem, StoreError

COMMANDS = {
    "init": "initialising",
    "policy": "policy",
    "mount": "mounting",
    "umount": "mounting",
    "status": "inspecting",
    "explain": "inspecting",
    "compact": "compacting",
    "pause": "compacting",
    "resume": "compacting",
    "migrate": "migrating",
    "check": "repairing",
    "restore": "repairing",
    "cache": "caching",
    "weights": "weights",
    "upscale": "weights",
    "install-units": "installing",
    "train": "training",
    "evaluate": "evaluating",
    "report": "evaluating",
}
"""Each command's module: only the one that is asked for is imported, which halves the time that it takes to mount."""

_LIBRARIES = ("mfusepy", "torch", "pillow", "imagecodecs")
"""What mounts and pictures depend on most; an error report should name them."""

_STORE_PROBLEMS = {
    Problem.NOT_A_STORE: ExitCode.NOT_A_STORE,
    Problem.REFUSED: ExitCode.REFUSED,
    Problem.UNSUPPORTED: ExitCode.REFUSED,
    Problem.PERMISSION: ExitCode.PERMISSION,
    Problem.BUSY: ExitCode.BUSY,
    Problem.DAMAGED: ExitCode.DAMAGE,
    Problem.NOT_FOUND: ExitCode.FAILED,
}


def make_app(command: str = "") -> typer.Typer:
    """The command line; with all commands, or only those that share a module with ``command``, if that is one."""
    app = typer.Typer(
        name="esrfs",
        help="Stores photographs small and shows them full size.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options_of_all)
    for module in dict.fromkeys([COMMANDS[command]] if command in COMMANDS else COMMANDS.values()):
        importlib.import_module(f"esrfs.cli.{module}").add_to(app)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        show.line(f"esrfs {esrfs.__version__}")
        show.line(", ".join(f"{name} {_installed(name)}" for name in _LIBRARIES))
        show.line(f"Python {platform.python_version()}, Linux {platform.release()}")
        raise typer.Exit


def _options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show which esrfs this is, and which libraries it runs on.",
            is_eager=True,
            callback=_show_version,
        ),
    ] = False,
) -> None:
    """Without a callback typer would take the name away from a command that is the only one."""


def _installed(name: str) -> str:
    """A package's version, without an import of it: that of torch alone takes a second."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is missing"


def main() -> None:
    show.names_as_they_are()
    sys.exit(run(sys.argv))


def run(argv: Sequence[str]) -> int:
    """What ``main`` does with these arguments (the program's name first); returns the exit code."""
    program, *arguments = argv
    try:
        if mounting.is_mount_helper(program, arguments, COMMANDS):
            return mounting.mount_helper(arguments, os.path.basename(program))
        app = make_app(arguments[0] if arguments else "")
        typer.main.get_command(app)(args=arguments, prog_name="esrfs")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.OK
    except (CommandError, ControlError) as error:
        note(str(error))
        return int(error.exit_code)
    except StoreError as error:
        note(str(error))
        return _STORE_PROBLEMS[error.problem]
    except (EngineError, TimeoutError) as error:
        note(f"the engine failed: {error}")
        return ExitCode.ENGINE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # `esrfs explain … | head`: nobody reads on. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except PermissionError as error:
        note(show.failure(error))
        return ExitCode.PERMISSION
    except OSError as error:
        note(show.failure(error))
        return ExitCode.FAILED
    except Exception as error:
        return show.bug(error)
    return ExitCode.OK


if __name__ == "__main__":
    main()
