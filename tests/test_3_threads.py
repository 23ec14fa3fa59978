"""Threads that Python did not start: what Python keeps for each of them while it lives, and gives back when it ends."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest

from esrfs.mount import threads

_libc = ctypes.CDLL(None)
_Routine = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_Last = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.fixture(autouse=True)
def this_process_ends_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its foreign threads are joined."""
    monkeypatch.setattr(threads, "_kept", threading.Event())


def run_in_foreign_threads(count: int, work: Callable[[], None]) -> None:
    """All at once; this returns when they have ended."""
    errors: list[BaseException] = []

    def guarded(_: object) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    routine = _Routine(guarded)
    started = [ctypes.c_ulong() for _ in range(count)]
    for each in started:
        assert _libc.pthread_create(ctypes.byref(each), None, routine, None) == 0
    for each in started:
        assert _libc.pthread_join(each, None) == 0
    if errors:
        raise errors[0]


def states() -> int:
    """How many threads Python has a state of."""
    api = ctypes.pythonapi
    for function in (api.PyInterpreterState_Get, api.PyInterpreterState_ThreadHead, api.PyThreadState_Next):
        function.restype = ctypes.c_void_p
    state, count = api.PyInterpreterState_ThreadHead(ctypes.c_void_p(api.PyInterpreterState_Get())), 0
    while state:
        state, count = api.PyThreadState_Next(ctypes.c_void_p(state)), count + 1
    return count


def test_a_thread_keeps_its_state_from_call_to_call_until_it_ends() -> None:
    local = threading.local()
    seen: list[tuple[str, bool]] = []

    def look(when: str) -> Callable[[object], None]:
        return lambda _: seen.append((when, hasattr(local, "mark")))

    calls = [_Last(look(when)) for when in ("after it gave back", "second call")]

    def at_end(call: object) -> None:
        """The last that is registered is called first."""
        _libc.__cxa_thread_atexit_impl(call, None, ctypes.cast(_libc.pthread_create, ctypes.c_void_p))

    def first_call() -> None:
        at_end(calls[0])
        threads.keep_state()
        threads.keep_state()
        local.mark = True
        at_end(calls[1])

    before = states()
    run_in_foreign_threads(1, first_call)
    assert seen == [("second call", True), ("after it gave back", False)]
    assert states() == before


def test_many_threads_leave_nothing() -> None:
    before = states()
    for _ in range(20):
        barrier = threading.Barrier(32)

        def work(barrier: threading.Barrier = barrier) -> None:
            threads.keep_state()
            barrier.wait(10)

        run_in_foreign_threads(32, work)
    assert states() == before


def test_where_the_end_of_a_thread_can_not_be_told_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """musl has no such function."""
    monkeypatch.setattr(threads, "_at_thread_end", None)
    before = states()
    run_in_foreign_threads(4, threads.keep_state)
    assert states() == before


def test_python_keeps_its_own_first_thread() -> None:
    """The C library would call what is to be called at that thread's end after Python's own."""
    registered = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_at_thread_end", lambda *arguments: registered.append(arguments))
        threads.keep_state()
    assert registered == []
