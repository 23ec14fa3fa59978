"""What a mount tells Prometheus. Names keep their meaning; docs/operations.md lists them.

A scrape reads counters and does not touch the store. What is in the store takes a walk to know: that happens in a
thread of its own, when figures are asked for and the last ones are old; walks take a hundredth of the time at most.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import esrfs
from esrfs.engine.client import LATENCY_BOUNDS, Engine
from esrfs.journal import printable
from esrfs.store.catalog import Catalog
from esrfs.store.layout import Store
from esrfs.upkeep import status
from esrfs.upkeep.scheduler import Scheduler
from esrfs.vfs.filesystem import Filesystem

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger("esrfs.mount")

_COUNT_SECONDS = 600.0
_SHARE_OF_TIME = 0.01


class Contents:
    """What is in the store, counted now and then."""

    def __init__(self, count: Callable[[], status.StatusCounts]) -> None:
        self._count = count
        self._lock = threading.Lock()  # protects:
        self._counting = False
        self._due = 0.0
        self._last: tuple[status.StatusCounts, float] | None = None

    def latest(self) -> tuple[status.StatusCounts, float] | None:
        """The last count and when it was made (seconds since the epoch); None before the first. Does not wait."""
        with self._lock:
            if not self._counting and time.monotonic() >= self._due:
                with contextlib.suppress(RuntimeError):  # no thread just now: the next scrape tries again
                    threading.Thread(target=self._renew, name="esrfs-figures", daemon=True).start()
                    self._counting = True
            return self._last

    def _renew(self) -> None:
        begun = time.monotonic()
        found = None
        try:
            found = self._count()
        except OSError as error:  # the mount ends, or the disk fails: a later scrape tries again
            log.info("the store could not be counted: %s", error)
        finally:
            took = time.monotonic() - begun
            with self._lock:
                self._counting = False
                self._due = time.monotonic() + max(_COUNT_SECONDS, took / _SHARE_OF_TIME)
                if found is not None:
                    self._last = found, time.time()


def collector(
    store: Store,
    catalog: Catalog,
    engine: Engine,
    filesystem: Filesystem,
    scheduler: Scheduler,
    *,
    compaction_state: Callable[[], str],
    mountpoint: str,
) -> Callable[[], Iterator[Metric]]:
    """What :func:`esrfs.prometheus.serve` asks at each scrape."""
    from prometheus_client.core import (  # noqa: PLC0415 (see esrfs.prometheus)
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )

    contents = Contents(lambda: status.count(store, catalog))

    def collect() -> Iterator[Metric]:
        about = {
            "store": printable(store.path),
            "mountpoint": printable(mountpoint),
            "id": store.config.id,
            "version": esrfs.__version__,
        }
        yield InfoMetricFamily("esrfs_mount", "The mount that answers.", value=about)
        yield from of_mount()
        yield from of_engine()
        yield from of_store()

    def of_mount() -> Iterator[Metric]:
        cache = filesystem.cache
        measured = cache.measure()
        yield GaugeMetricFamily("esrfs_open_handles", "Open files.", len(filesystem.handles))
        yield GaugeMetricFamily("esrfs_waiting_reads", "Reads that wait for the engine.", filesystem.waits.count)
        yield GaugeMetricFamily("esrfs_waiting_reads_limit", "How many may.", filesystem.waits.most)
        yield GaugeMetricFamily("esrfs_cache_bytes", "What the cache of rebuilt views takes.", measured["bytes"])
        yield GaugeMetricFamily("esrfs_cache_limit_bytes", "What it may take.", measured["limit"])
        yield GaugeMetricFamily("esrfs_cache_views", "Rebuilt views in the cache.", measured["views"])
        yield CounterMetricFamily("esrfs_cache_hits", "Views found in the cache.", cache.hits)
        yield CounterMetricFamily("esrfs_cache_misses", "Views not found there.", cache.misses)
        running = compaction_state() == "running"
        yield GaugeMetricFamily("esrfs_compaction_running", "1 if files are stored small here, else 0.", int(running))
        yield GaugeMetricFamily("esrfs_queued_files", "Files that wait for their turn.", scheduler.pending)
        outcomes = CounterMetricFamily("esrfs_compactions", "Files looked at, by what became of them.", labels=["to"])
        for outcome, number in sorted(scheduler.counts.copy().items()):
            outcomes.add_metric([str(outcome)], number)
        yield outcomes

    def of_engine() -> Iterator[Metric]:
        counters = engine.counters
        yield GaugeMetricFamily("esrfs_engine_running", "1 if there is an engine, else 0.", engine.state != "stopped")
        yield CounterMetricFamily("esrfs_engine_restarts", "Engines that died.", counters.restarts)
        yield CounterMetricFamily("esrfs_engine_failures", "Jobs that the engine failed at.", counters.failures)
        yield CounterMetricFamily(
            "esrfs_inexact_views", "Views that differ from the one that was verified.", counters.inexact
        )
        begun = counters.reconstructions
        yield CounterMetricFamily("esrfs_reconstructions", "Views that were begun to be rebuilt.", begun)
        buckets, total = [], 0
        for bound, number in zip([*LATENCY_BOUNDS, float("inf")], counters.latencies, strict=True):
            total += number
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        yield HistogramMetricFamily(
            "esrfs_reconstruction_seconds",
            "From the first request for a view to its being rebuilt.",
            buckets=buckets,
            sum_value=counters.latency_seconds,
        )

    def of_store() -> Iterator[Metric]:
        room = os.fstatvfs(store.root_fd)
        yield GaugeMetricFamily(
            "esrfs_store_free_bytes", "Free on the store's filesystem.", room.f_bavail * room.f_frsize
        )
        latest = contents.latest()
        if latest is None:
            return
        counts, when = latest
        yield GaugeMetricFamily("esrfs_store_counted_timestamp_seconds", "When the store was counted.", when)
        files = GaugeMetricFamily("esrfs_store_files", "Files in the store, by state.", labels=["state"])
        untried = counts.originals - counts.refused - counts.passed_through - counts.pending
        for state, number in (
            ("blob", counts.blobs),
            ("refused", counts.refused),
            ("passed_through", counts.passed_through),
            ("pending", counts.pending),
            ("original", untried),
        ):
            files.add_metric([state], number)
        yield files
        yield GaugeMetricFamily("esrfs_store_view_bytes", "What the view shows.", counts.logical_bytes)
        yield GaugeMetricFamily("esrfs_store_stored_bytes", "What takes its place.", counts.stored_bytes)
        yield GaugeMetricFamily("esrfs_undo_files", "Originals in the undo window.", counts.undo_files)
        yield GaugeMetricFamily("esrfs_undo_bytes", "What they take.", counts.undo_bytes)

    return collect
