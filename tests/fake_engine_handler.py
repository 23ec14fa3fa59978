"""What the engine's worker does in tests: the "recipe" of a rebuild says what shall happen, in words."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from esrfs.compaction.outcome import Outcome, Reason, Verdict
from esrfs.engine import protocol
from esrfs.engine.errors import DeviceFailedError, JobFailedError
from esrfs.engine.lanes import Running


class FakeHandler:
    threads = 1

    def __init__(self, device: str, fetch: Callable[[bytes], bytes]) -> None:
        self.device = device
        self.fetch = fetch

    def rebuild(self, request: protocol.Rebuild, avif: bytes, job: Running) -> tuple[protocol.Rebuilt, bytes]:
        view = self.obey(request.recipe.decode(), avif, job)
        return protocol.Rebuilt(job=request.job, sha256=hashlib.sha256(view).digest(), exact=True), view

    def compact(self, request: protocol.Compact, original: bytes, job: Running) -> Outcome:
        order = original.decode().rpartition("\0")[2]  # what comes before lets a file look like a picture
        said = self.obey(order, b"", job)
        if not order.startswith("echo"):
            return Outcome(verdict=Verdict.REFUSED, reason=Reason.QUALITY, message="no picture, but an order")
        return Outcome(verdict=Verdict.COMPACTED, message=said.decode())

    def upscale(self, request: protocol.Upscale, image: bytes, job: Running) -> bytes:
        return self.fetch(request.network_sha256) + image

    def obey(self, order: str, payload: bytes, job: Running) -> bytes:
        verb, _, argument = order.partition(" ")
        match verb:
            case "echo":
                return payload
            case "pid":
                return str(os.getpid()).encode()
            case "device":
                if self.device != "cpu":
                    raise DeviceFailedError("made up")
                return self.device.encode()
            case "fail":
                raise JobFailedError(argument)
            case "crash":
                raise KeyError(argument)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die-on":  # this device; the accelerator fails
                if self.device != argument:
                    raise DeviceFailedError("made up")
                os.kill(os.getpid(), signal.SIGKILL)
            case "die-once":
                if not Path(argument).exists():
                    Path(argument).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(60)
            case "hang":
                time.sleep(float(argument))
            case "work":  # with checkpoints; writes when it begins and ends
                name, seconds = argument.rsplit(" ", 1)
                _note(name, f"begin {job.number}")
                end = time.monotonic() + float(seconds)
                while time.monotonic() < end:
                    time.sleep(0.005)
                    job.checkpoint()
                _note(name, f"end {job.number}")
            case "warn":
                warnings.warn(argument, stacklevel=1)
                sys.stderr.write("a library says hello\n")
            case "network":
                return self.fetch(bytes.fromhex(argument))
        return payload


def _note(name: str, line: str) -> None:
    with open(name, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def open_handler(device: str, fetch: Callable[[bytes], bytes]) -> FakeHandler:
    return FakeHandler(device, fetch)
