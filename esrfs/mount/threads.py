"""libfuse's threads, which are foreign to Python: each callback would make a thread state and drop it again.

One extra reference, taken at the first callback on each thread, keeps its state. libfuse ends threads that are idle:
what a thread kept is given back then, by a function that the C library calls on the thread itself (as it does for
C++'s thread_local), while all that Python needs there still exists.

Such a thread must not meet the end of the interpreter. Most are joined before libfuse's loop returns; one that ended
for being idle was detached, and may be late. So a process with such threads ends without the interpreter's own end:
by :func:`leave`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
from typing import NoReturn

_LOCKED = 0
"""PyGILState_LOCKED: the caller goes on with Python's lock, as ctypes expects of a call within a callback."""

_local = threading.local()
_kept = threading.Event()
_at_thread_end = getattr(ctypes.PyDLL(None), "__cxa_thread_atexit_impl", None)
"""glibc's ``(function, argument, an address in the library that must stay loaded)``. musl has none."""


def _give_back(_: int | None) -> None:
    """The state itself goes with the reference that this very callback holds."""
    ctypes.pythonapi.PyGILState_Release(_LOCKED)


_GIVE_BACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_give_back)
_HERE = ctypes.cast(ctypes.pythonapi.PyGILState_Release, ctypes.c_void_p)


def keep_state() -> None:
    """To be called in each callback."""
    if not hasattr(_local, "known"):
        _local.known = True
        # On the first thread, exit(3) would call the function: after Python's end.
        if _at_thread_end is not None and threading.get_native_id() != os.getpid():
            _kept.set()
            ctypes.pythonapi.PyGILState_Ensure()  # first: what is given back has to be there
            _at_thread_end(_GIVE_BACK, None, _HERE)


def were_kept() -> bool:
    """Whether this process has to end by :func:`leave`."""
    return _kept.is_set()


def leave(code: int) -> NoReturn:
    """End the process at once; all that is to be closed is closed."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
