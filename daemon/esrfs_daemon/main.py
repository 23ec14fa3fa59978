"""The console script ``esrfs-daemon``."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from esrfs import control, journal, prometheus
from esrfs.exit_codes import ExitCode
from esrfs_daemon import config, figures, status, throttle
from esrfs_daemon.config import Config, ConfigError
from esrfs_daemon.service import Service

log = logging.getLogger("esrfs.daemon")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def main(
    *,
    config_path: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="The configuration; ~/.config/esrfs/daemon.toml if not given (root: /etc/esrfs/daemon.toml if there).",
        ),
    ] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Only check the configuration, and tell what it means.")
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="Migrate what is in the sources now, and end. Exit code 1: not all of it.")
    ] = False,
    tell_status: Annotated[
        bool, typer.Option("--status", help="What the running daemon says of itself, as JSON; exit code 4: none runs.")
    ] = False,
    reconcile: Annotated[
        bool, typer.Option("--reconcile", help="Ask the running daemon to walk its sources now; exit code 4: none.")
    ] = False,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="[ADDRESS:]PORT", help="Where Prometheus finds figures; this machine's own if no address is given."
        ),
    ] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Log more.")] = False,
) -> None:
    """Moves photographs from folders into mounts of esrfs, as they come. Logs to standard error."""
    if tell_status or reconcile:
        raise typer.Exit(_ask("status" if tell_status else "reconcile"))
    try:
        address = prometheus.parse_address(metrics) if metrics else None
    except ValueError as error:
        _note(str(error))
        raise typer.Exit(ExitCode.USAGE) from error
    try:
        settings = config.load(config_path or config.default_path())
        if check_config:
            _show(settings)
            return
        journal.log_to_stderr(logging.DEBUG if debug else logging.INFO)
        logging.getLogger("watchdog").setLevel(logging.WARNING)
        if status.ask() is not None:
            _note("a daemon of this user runs already (esrfs-daemon --status)")
            raise typer.Exit(ExitCode.BUSY)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if settings.throttle.idle_io:
            throttle.use_idle_io()
        service = Service(settings)
    except ConfigError as error:
        _note(str(error))
        raise typer.Exit(ExitCode.USAGE) from error
    code = serve(service, once=once, metrics=address)
    if service.left_behind:
        logging.shutdown()
        os._exit(code)  # Python would wait for the threads that copy, and those for a filesystem that does not answer
    raise typer.Exit(code)


def serve(service: Service, *, once: bool = False, metrics: tuple[str, int] | None = None) -> int:
    """Run until SIGTERM or SIGINT (or to the end of ``once``), answering on the control socket, and to Prometheus at
    ``metrics``; the exit code."""

    def end(_number: int, _frame: FrameType | None) -> None:
        service.stop()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
    server = status.serve(service.status, service.reconcile)
    stop_figures = _serve_figures(metrics, service.status) if metrics else None
    try:
        if once:
            return ExitCode.OK if service.run_once() else ExitCode.FAILED
        log.info("started")
        service.run()
        log.info("ended")
        return ExitCode.OK
    finally:
        if stop_figures is not None:
            stop_figures()
        server.stop()


def _serve_figures(address: tuple[str, int], told: status.Status) -> Callable[[], None] | None:
    """The daemon's work is worth more than its figures: without them it goes on."""
    try:
        return prometheus.serve(address, figures.collector(told))
    except OSError as error:
        log.error("metrics can't be served at %s port %d: %s", *address, error)
        return None


def _ask(op: str) -> int:
    try:
        answer = control.call(status.socket_path(), op, timeout=5.0)
    except (control.ControlError, OSError):
        _note("no daemon of this user answers")
        return ExitCode.NOT_MOUNTED
    if answer:
        import json  # noqa: PLC0415

        print(json.dumps(answer, indent=2))
    return ExitCode.OK


def _show(settings: Config) -> None:
    for rule in settings.rules:
        print(f"{config.expanded(rule.source)} → {config.expanded(rule.destination)}, then {rule.then}")
        if not os.path.isdir(config.expanded(rule.source)):
            _note(f"{rule.source}: is not there now; the daemon waits for it")


def _note(text: str) -> None:
    print(f"esrfs-daemon: {text}", file=sys.stderr)


if __name__ == "__main__":
    app()
