"""Doing something that may take long, beside the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Asking(threading.Thread, Generic[T]):
    """Begins at once; ``result()`` waits for the end and gives what came of it."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._result: T | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    def result(self, seconds: float = 60.0) -> T:
        self.join(seconds)
        assert not self.is_alive(), f"no answer within {seconds} s"
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # T may be None
