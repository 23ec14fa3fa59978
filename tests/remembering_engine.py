"""An engine's handler that remembers: what the real one answered once in this test session is answered again at once.

Compaction and reconstruction are pure functions, so a test that kills a mount a hundred times need not compute the
same blob a hundred times. Everything around it is real: the worker's process, the protocol, the fault points.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec

from esrfs.compaction.outcome import Outcome
from esrfs.engine import protocol
from esrfs.engine.lanes import Running
from esrfs.engine.worker import Handler

MEMORY = "ESRFS_TEST_ENGINE_MEMORY"
"""Environment variable: the folder in which answers are kept."""


class RememberingHandler:
    device = "cpu"
    threads = 1

    def __init__(self, fetch: Callable[[bytes], bytes]) -> None:
        self._folder = Path(os.environ[MEMORY])
        self._fetch = fetch

    @functools.cached_property
    def _real(self) -> Handler:
        from esrfs.engine import handler  # noqa: PLC0415 (it takes seconds: only when something new is asked)

        return handler.open_handler("cpu", self._fetch)

    def _recall(self, what: str, key: bytes, compute: Callable[[], bytes]) -> bytes:
        path = self._folder / f"{what}-{hashlib.sha256(key).hexdigest()}"
        if not path.exists():
            data = compute()
            partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
            partial.write_bytes(data)
            partial.rename(path)
        return path.read_bytes()

    def rebuild(self, request: protocol.Rebuild, avif: bytes, job: Running) -> tuple[protocol.Rebuilt, bytes]:
        view = self._recall("view", request.recipe + avif, lambda: self._real.rebuild(request, avif, job)[1])
        job.checkpoint()
        return protocol.Rebuilt(job=request.job, sha256=hashlib.sha256(view).digest(), exact=True), view

    def compact(self, request: protocol.Compact, original: bytes, job: Running) -> Outcome:
        key = msgspec.msgpack.encode((request.policy, request.networks)) + original
        answer = self._recall(
            "outcome", key, lambda: msgspec.msgpack.encode(self._real.compact(request, original, job))
        )
        job.checkpoint()
        return msgspec.msgpack.decode(answer, type=Outcome)

    def upscale(self, request: protocol.Upscale, image: bytes, job: Running) -> bytes:
        return self._real.upscale(request, image, job)


def open_handler(device: str, fetch: Callable[[bytes], bytes]) -> RememberingHandler:
    return RememberingHandler(fetch)
