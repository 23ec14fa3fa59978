"""Asking a filesystem that may not answer: a dead server's, a mount whose process stands still.

The kernel lets nobody out of such a call, so each is made by a thread of its own, which is left behind when it takes
too long. While one waits for a path, nobody asks that path again: else a server that is away for days would cost a
thread for every try.

Lock: ``_lock`` protects ``_left``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

_ANSWER_SECONDS = 30.0

T = TypeVar("T")


class NoAnswer(OSError):  # noqa: N818 (a state, not an error)
    """For people: what has not answered, and for how long."""


_lock = threading.Lock()
_left: dict[str, threading.Thread] = {}
"""Those that were left behind, by the path that they ask."""


def within_time(path: str, ask: Callable[[], T], late: Callable[[T], None] = lambda answer: None) -> T:
    """``ask()``, which is about ``path``; ``late`` gets an answer that nobody waits for any more.

    Raises NoAnswer, and what ``ask`` raises.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            found = ask()
        except BaseException as error:
            with contextlib.suppress(InvalidStateError):
                answer.set_exception(error)
            return
        try:
            answer.set_result(found)
        except InvalidStateError:
            late(found)

    with _lock:
        earlier = _left.get(path)
    if earlier is not None and earlier.is_alive():
        raise NoAnswer(f"{path}: what is mounted there has not answered for more than {_ANSWER_SECONDS:g} s")
    thread = threading.Thread(target=run, daemon=True, name="asking")
    thread.start()
    try:
        return answer.result(_ANSWER_SECONDS)
    except TimeoutError:
        if not answer.cancel():
            return answer.result()  # it came in this moment, or the error is the answer
    with _lock:
        _left[path] = thread
    raise NoAnswer(f"{path}: what is mounted there has not answered for {_ANSWER_SECONDS:g} s")


def answers(path: str) -> bool:
    """Whether the filesystem at ``path`` says something, be it an error, within a while."""
    try:
        within_time(path, lambda: os.statvfs(path))  # not stat: for a while the kernel knows the answer without asking
    except NoAnswer:
        return False
    except OSError:
        pass
    return True


def real_path(path: str) -> str:
    """``os.path.realpath``. Raises NoAnswer."""
    return within_time(path, lambda: os.path.realpath(path))


@contextlib.contextmanager
def opened_folder(path: str) -> Iterator[int]:
    """A descriptor (O_RDONLY) of a folder that could be read just now. Raises OSError."""
    fd = within_time(path, lambda: open_folder(path), os.close)
    try:
        yield fd
    finally:
        os.close(fd)


def open_folder(path: str) -> int:
    """A descriptor, the caller's. What hangs or is dead shows here, not in the middle of the work. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(fd) as listing:
            next(listing, None)
    except BaseException:
        os.close(fd)
        raise
    return fd
