"""What the daemon tells Prometheus. Names keep their meaning; docs/operations.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from esrfs.journal import printable
from esrfs_daemon.status import Status

if TYPE_CHECKING:
    from prometheus_client import Metric

_LABELS = ("rule", "source")


def collector(status: Status) -> Callable[[], Iterator[Metric]]:
    """What :func:`esrfs.prometheus.serve` asks at each scrape."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415 (see esrfs.prometheus)

    def collect() -> Iterator[Metric]:
        working = GaugeMetricFamily("esrfs_daemon_working", "1 unless paused or waiting, else 0.", labels=_LABELS)
        waiting = GaugeMetricFamily("esrfs_daemon_waiting_files", "Files whose turn is to come.", labels=_LABELS)
        files = CounterMetricFamily("esrfs_daemon_migrated_files", "Files copied and verified.", labels=_LABELS)
        moved = CounterMetricFamily("esrfs_daemon_migrated_bytes", "What is in them.", labels=_LABELS)
        touched = CounterMetricFamily("esrfs_daemon_touched_files", "Trashed, deleted or linked.", labels=_LABELS)
        failed = CounterMetricFamily("esrfs_daemon_failed_files", "Files that could not be moved.", labels=_LABELS)
        walked = GaugeMetricFamily(
            "esrfs_daemon_reconciled_timestamp_seconds", "When the source was last walked in full.", labels=_LABELS
        )
        for rule in status.snapshot().rules:
            label = [printable(rule.name), printable(rule.source)]
            working.add_metric(label, int(rule.state not in ("paused", "waiting")))
            waiting.add_metric(label, rule.waiting_files)
            files.add_metric(label, rule.migrated_files)
            moved.add_metric(label, rule.migrated_bytes)
            touched.add_metric(label, rule.touched_files)
            failed.add_metric(label, rule.failed_files)
            if rule.last_reconcile is not None:
                walked.add_metric(label, rule.last_reconcile)
        yield from (working, waiting, files, moved, touched, failed, walked)

    return collect
