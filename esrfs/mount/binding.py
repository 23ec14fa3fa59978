"""mfusepy on libfuse3.

mfusepy takes libfuse2 when both are installed, and its option handling and struct layouts follow the library that it
found at import, so the choice has to be made before. This module is the place where it is imported.
"""

from __future__ import annotations

import ctypes
import os


class FuseMissing(Exception):  # noqa: N818 (it reads better where it is raised)
    """libfuse3 is not installed, or mfusepy can't use it."""


def _choose_library() -> None:
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        os.environ["FUSE_LIBRARY_PATH"] = name
        return
    raise FuseMissing("libfuse3 is not installed; on Debian and Ubuntu: apt install fuse3")


if "FUSE_LIBRARY_PATH" not in os.environ:
    _choose_library()

import mfusepy as mfusepy  # noqa: E402, PLC0414 (the name is this module's export)

if mfusepy.fuse_version_major != 3:
    raise FuseMissing(f"esrfs needs libfuse 3, but {os.environ['FUSE_LIBRARY_PATH']} is another version")


# It only hands out a pointer: with ctypes' usual way, Python's lock would go to another thread meanwhile.
context = ctypes.PyDLL(os.environ["FUSE_LIBRARY_PATH"]).fuse_get_context
"""libfuse's ``fuse_get_context``: a pointer to the context of the request that this thread works on."""
context.argtypes = ()
context.restype = ctypes.POINTER(mfusepy.fuse_context)
