"""Figures for Prometheus, over HTTP, for those who ask for it: a mount (option ``metrics``) and the migration daemon.

prometheus_client brings an HTTP server and takes a tenth of a second to import, so that happens in :func:`serve` only.
Who can reach the address can read the figures; there is no password. So it is this machine's own unless told otherwise.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Metric

LOOPBACK = "127.0.0.1"


def parse_address(text: str) -> tuple[str, int]:
    """``PORT``, ``ADDRESS:PORT`` or ``[IPV6]:PORT``; an address, no name. Raises ValueError, for people."""
    found = re.fullmatch(r"(?:(\d+\.[\d.]+|\[[0-9a-fA-F:.]+\]):)?(\d{1,5})", text)
    if found and 0 < int(found[2]) < 65536:
        address = (found[1] or LOOPBACK).strip("[]")
        with contextlib.suppress(OSError):
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
            return address, int(found[2])
    raise ValueError(f"{text!r} is no address for metrics; such are 9420, 127.0.0.1:9420, [::1]:9420")


def serve(address: tuple[str, int], collect: Callable[[], Iterable[Metric]]) -> Callable[[], None]:
    """Answer at ``http://ADDRESS:PORT/metrics`` from threads of its own with what ``collect`` gives at that moment, and
    with what this process uses. Returns what ends it. Raises OSError when the address can't be used."""
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server  # noqa: PLC0415
    from prometheus_client.registry import Collector  # noqa: PLC0415

    class Figures(Collector):
        def collect(self) -> Iterable[Metric]:
            return collect()

        def describe(self) -> Iterable[Metric]:
            return []  # else it would be collected once to learn the names

    registry = CollectorRegistry()
    registry.register(Figures())
    ProcessCollector(registry=registry)
    host, port = address
    server, thread = start_http_server(port, host, registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
