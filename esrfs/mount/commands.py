"""What a running mount answers on its control socket (``esrfs/control.py`` says how)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from esrfs.blob.recipe import Recipe
from esrfs.control import ControlError, Emit, Handler
from esrfs.engine.client import LATENCY_BOUNDS, Engine
from esrfs.exit_codes import ExitCode
from esrfs.store.beneath import beneath
from esrfs.store.catalog import Catalog
from esrfs.store.examine import examine, recipe_of
from esrfs.store.layout import Store
from esrfs.upkeep import explain, restore, status, walk
from esrfs.upkeep.compact import CompactionUnavailable, Done
from esrfs.upkeep.scheduler import Scheduler
from esrfs.vfs.filesystem import Filesystem

_POLL_SECONDS = 0.2


def handlers(
    store: Store,
    catalog: Catalog,
    engine: Engine,
    filesystem: Filesystem,
    scheduler: Scheduler,
    *,
    compaction_state: Callable[[], str],
    mountpoint: str,
) -> dict[str, Handler]:
    """The operations by name. ``compaction_state`` says for people what compaction does or why it does nothing."""

    def ping(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        return {"pid": os.getpid(), "mountpoint": mountpoint, "store": store.path}

    def tell_status(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        counts: dict[str, Any] = msgspec.to_builtins(status.count(store, catalog))
        counters = engine.counters
        return {
            **counts,
            "mounted": True,
            "cache_bytes": filesystem.cache.measure()["bytes"],
            "cache_hits": filesystem.cache.hits,
            "cache_misses": filesystem.cache.misses,
            "engine_calls": counters.reconstructions,
            "engine_compactions": counters.compactions,
            "engine_restarts": counters.restarts,
            "engine_failures": counters.failures,
            "engine_inexact": counters.inexact,
            "engine_latency": {
                "bounds": list(LATENCY_BOUNDS),
                "counts": list(counters.latencies),
                "seconds": counters.latency_seconds,
            },
            "engine_state": engine.state,
            "compaction": compaction_state(),
            "queued": scheduler.pending,
            "open_handles": len(filesystem.handles),
        }

    def compact(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        paths = _paths(arguments)
        now, wait = bool(arguments.get("now")), bool(arguments.get("wait"))

        def tell(done: Done, number: int, total: int) -> bool:
            return emit({"path": done.path, "state": done.state, "done": number, "total": total})

        try:
            if now and wait:
                return dict(scheduler.compact_now(paths, emit=tell))
            asked = scheduler.ask(paths, now=now)
            while wait and (left := scheduler.still_waiting(asked)):
                if not emit({"path": "", "done": len(asked) - left, "total": len(asked)}):
                    break
                time.sleep(_POLL_SECONDS)
        except CompactionUnavailable as error:
            raise ControlError(str(error), ExitCode.REFUSED) from error
        except OSError as error:
            raise ControlError(f"{error.filename or paths}: {error.strerror}") from error
        return {"queued": len(asked)}

    def bring_back(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        def advance(done: int, total: int, path: str) -> None:
            emit({"path": path, "done": done, "total": total})

        try:
            results = restore.restore(
                store,
                _paths(arguments),
                advance,
                catalog=catalog,
                claims=filesystem.claims,
                first=bool(arguments.get("first")),
            )
        except OSError as error:
            raise ControlError(f"{error.filename}: {error.strerror}") from error
        return {"files": msgspec.to_builtins(results)}

    def explain_file(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        try:
            found: dict[str, Any] = msgspec.to_builtins(explain.explain(store, catalog, str(arguments["path"])))
        except OSError as error:
            raise ControlError(f"{arguments['path']}: {error.strerror}") from error
        return found

    def cache_show(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        return {**filesystem.cache.measure(), "hits": filesystem.cache.hits, "misses": filesystem.cache.misses}

    def cache_clear(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        return {"cleared": filesystem.clear_cache()}

    def cache_warm(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        paths = [found.path for found in walk.files(store, _paths(arguments))]
        warmed = failed = 0
        for number, path in enumerate(paths, 1):
            if _recipe(store, path) is not None:
                try:
                    filesystem.warm(path)
                    warmed += 1
                except OSError:
                    failed += 1
            if not emit({"path": path, "done": number, "total": len(paths)}):
                break
        return {"warmed": warmed, "failed": failed}

    def pause(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        scheduler.pause()
        return {}

    def resume(arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        scheduler.resume()
        return {}

    return {
        "ping": ping,
        "status": tell_status,
        "compact": compact,
        "restore": bring_back,
        "explain": explain_file,
        "cache-show": cache_show,
        "cache-clear": cache_clear,
        "cache-warm": cache_warm,
        "pause": pause,
        "resume": resume,
    }


def _paths(arguments: dict[str, Any]) -> list[str]:
    paths = arguments.get("paths")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ControlError("this request needs a list of paths", ExitCode.USAGE)
    return paths


def _recipe(store: Store, path: str) -> Recipe | None:
    """The recipe of the blob at ``path``; None for anything else."""
    try:
        descriptor = beneath(store.root_fd, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        st = os.fstat(descriptor)
        blob = examine(store, descriptor, st)
        return None if blob is None else recipe_of(descriptor, st, blob)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
