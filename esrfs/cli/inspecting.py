"""``status`` and ``explain``: what esrfs knows of a store, of what comes into it, and of a file."""

from __future__ import annotations

import os
from typing import Annotated, Any

import msgspec
import typer
from esrfs_daemon import config as daemon_config
from esrfs_daemon import status as daemon_status

from esrfs import config, control
from esrfs.cache import ViewCache
from esrfs.cli import mounted, show, stores
from esrfs.cli.paths import Place
from esrfs.cli.show import CommandError
from esrfs.exit_codes import ExitCode
from esrfs.store.layout import Store
from esrfs.upkeep import explain as upkeep_explain
from esrfs.upkeep import status as upkeep_status

Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def add_to(app: typer.Typer) -> None:
    app.command()(status)
    app.command()(explain)


def status(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A store, a mountpoint, or a path in one.")],
    as_json: Json = False,
) -> None:
    """What is in a store, what it saves, and what the migration daemon brings into it."""
    with stores.at(path) as (store, place):
        values = status_of(store, place)
    values["daemon"] = daemon_status.ask()
    if as_json:
        show.as_json(values)
    else:
        _show_status(values)


def status_of(store: Store, place: Place) -> dict[str, Any]:
    """What ``esrfs status --json`` prints of a store: a mount's answer, where there is one."""
    socket = mounted.ask(place, store.config.id)
    counts = control.call(socket, "status") if socket is not None else _status_unmounted(store)
    return {"store": place.store, "mountpoint": place.mountpoint, "preset": store.config.policy.preset, **counts}


_IDLE = {
    "cache_hits": 0,
    "cache_misses": 0,
    "engine_calls": 0,
    "engine_compactions": 0,
    "engine_restarts": 0,
    "engine_failures": 0,
    "engine_inexact": 0,
    "engine_latency": None,
    "engine_state": "stopped",
    "compaction": "",
    "queued": 0,
    "open_handles": 0,
}


def _status_unmounted(store: Store) -> dict[str, Any]:
    """The keys that a mount answers; its counters are 0, for they count from its start."""
    with stores.catalog_of(store) as catalog:
        counts: dict[str, Any] = msgspec.to_builtins(upkeep_status.count(store, catalog))
    cache = ViewCache(config.cache_directory(store.config.id))
    try:
        cache_bytes = cache.measure()["bytes"]
    finally:
        cache.close()
    return {**counts, "cache_bytes": cache_bytes, **_IDLE, "mounted": False}


def _show_status(values: dict[str, Any]) -> None:
    blobs, saved = values["blobs"], values["freed_later_bytes"]
    left = [f"{values[key]} {word}" for key, word in _LEFT if values[key]]
    where = values["mountpoint"] or "not mounted"
    rows = [
        ("store", f"{values['store']} ({where}; preset {values['preset']})"),
        ("files", f"{values['files']}: {blobs} stored small" + (f", {', '.join(left)}" if left else "")),
        (
            "size",
            f"{show.size(values['logical_bytes'])} shown, {show.size(values['stored_bytes'])} stored "
            f"({show.ratio(values['ratio'])})",
        ),
        ("undo window", f"{show.number_of(values['undo_files'], 'original')}, {show.size(values['undo_bytes'])}"),
        _freed_now(values["freed_now_bytes"]),
    ]
    if values["freed_by"]:
        rows.append((f"freed by {values['freed_by']}", show.size(saved)))
    rows += [
        ("cache", f"{show.size(values['cache_bytes'])}, {values['cache_hits']} hits, {values['cache_misses']} misses"),
        ("engine", f"{values['engine_state']}, {values['engine_calls']} pictures rebuilt for readers"),
        ("compaction", str(values.get("compaction") or "")),
        *_daemon_rows(values["daemon"], values["mountpoint"]),
    ]
    show.fields(rows)


def _freed_now(freed: int) -> tuple[str, str]:
    """Until the undo window lets originals go, a store takes more than its files alone would."""
    if freed < 0:
        return "freed now", f"nothing yet; {show.size(-freed)} more in use, by originals in the undo window"
    return "freed now", show.size(freed)


def _daemon_rows(daemon: dict[str, Any] | None, mountpoint: str | None) -> list[tuple[str, str]]:
    """A row for each rule whose files come to this mount."""
    if daemon is None:
        is_wanted = daemon_config.default_path().exists()
        return [("daemon", "not running, though it has a configuration: esrfs-daemon")] if is_wanted else []
    rows = []
    for rule in daemon["rules"]:
        to = os.path.realpath(rule["destination"])
        if mountpoint is not None and not f"{to}/".startswith(f"{mountpoint.rstrip('/')}/"):
            continue
        said = [
            rule["state"] + (f" ({rule['reason']})" if rule["reason"] else ""),
            f"{rule['waiting_files']} waiting",
            f"{show.number_of(rule['migrated_files'], 'file')} moved ({show.size(rule['migrated_bytes'])})",
            f"{rule['failed_files']} failed, see its log" if rule["failed_files"] else "",
        ]
        rows.append(("daemon", f"{rule['source']}: {', '.join(filter(None, said))}"))
    return rows


_LEFT = [("pending", "waiting"), ("refused", "refused by the gate"), ("passed_through", "passed through")]


def explain(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file in a store or in its mount.")],
    as_json: Json = False,
) -> None:
    """Why a file is as it is: its state, the reason, the figures."""
    with stores.at(file) as (store, place), stores.catalog_of(store) as catalog:
        mounted.ask(place, store.config.id)  # verdicts are in the catalog of who runs the mount
        try:
            explanation = upkeep_explain.explain(store, catalog, place.relative)
        except FileNotFoundError as error:
            raise CommandError(f"{file}: no such file", ExitCode.FAILED) from error
        except OSError as error:
            raise CommandError(f"{file}: {error.strerror}; esrfs explains regular files", ExitCode.FAILED) from error
    if as_json:
        show.as_json(msgspec.to_builtins(explanation))
        return
    quality = explanation.quality
    scores = [
        f"SSIMULACRA2 {quality.ssimulacra2:.1f}" if quality and quality.ssimulacra2 is not None else "",
        f"worst tile {quality.worst_tile:.1f}" if quality and quality.worst_tile is not None else "",
        f"PSNR {quality.psnr:.1f} dB" if quality and quality.psnr is not None else "",
        f"colours off by {quality.colour:.1f} (CIEDE2000)" if quality and quality.colour else "",
    ]
    sizes = show.size(explanation.original_bytes)
    if explanation.state == "blob":
        sizes += f", stored as {show.size(explanation.stored_bytes)} ({show.ratio(explanation.ratio)})"
    made = [
        f"scale {explanation.scale}" if explanation.scale else "",
        f"network {explanation.network}" if explanation.network else "",
        f"AVIF quality {explanation.codec_quality}" if explanation.codec_quality is not None else "",
        f"preset {explanation.preset}" if explanation.preset else "",
    ]
    pixels = f"{explanation.width} × {explanation.height}" if explanation.width else ""
    show.fields(
        [
            ("file", os.path.join(place.mountpoint or place.store, explanation.path)),
            ("state", explanation.state.replace("_", " ")),
            ("reason", ": ".join(filter(None, (explanation.reason, explanation.message)))),
            ("format", " ".join(filter(None, (explanation.format, pixels)))),
            ("size", sizes),
            ("made with", ", ".join(filter(None, made))),
            ("quality", ", ".join(filter(None, scores))),
            ("sha256 of original", explanation.sha256_original or ""),
            ("sha256 of view", explanation.sha256_view or ""),
            ("undo until", explanation.undo_until or ""),
        ]
    )
