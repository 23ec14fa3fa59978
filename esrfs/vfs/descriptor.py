"""File descriptors that are closed when nobody refers to them any more.

A thread may be inside a system call on a descriptor while another decides that it is no longer needed; closing the
number then would let the first one read whatever file gets it next.
"""

from __future__ import annotations

import os


class Descriptor:
    """An open file or directory. Keep this object alive as long as ``number`` is in use."""

    __slots__ = ("_owned", "number")

    def __init__(self, number: int, owned: bool = True) -> None:
        self.number = number
        self._owned = owned

    def __del__(self) -> None:
        if self._owned:
            os.close(self.number)
