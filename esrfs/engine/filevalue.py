"""A value that lies in a file rather than in memory: an original on its way to the engine, a view on its way back.

The mount's process passes on pictures of any size and must stay small. Nothing but the bytes goes over the socket.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

CHUNK = 1 << 20


class FileValue:
    """The bytes of a file from its beginning. Any number of threads may read it; the descriptor is closed when nobody
    refers to this object any more."""

    __slots__ = ("descriptor", "size")

    def __init__(self, descriptor: int, size: int) -> None:
        """``descriptor`` is this object's from now on."""
        self.descriptor = descriptor
        self.size = size

    def __del__(self) -> None:
        os.close(self.descriptor)

    def __len__(self) -> int:
        return self.size

    def chunks(self) -> Iterator[bytes]:
        """All of its bytes. Of a file that has become shorter, zeros for what is missing. Raises OSError."""
        offset = 0
        while offset < self.size:
            count = min(CHUNK, self.size - offset)
            chunk = os.pread(self.descriptor, count, offset) or bytes(count)
            yield chunk
            offset += len(chunk)

    def read(self) -> bytes:
        return b"".join(self.chunks())


def unnamed(size: int) -> FileValue:
    """A new file of ``size`` bytes, in memory (which may be swapped out), that has no name. Raises OSError."""
    value = FileValue(os.memfd_create("esrfs-value", os.MFD_CLOEXEC), size)
    os.truncate(value.descriptor, size)
    return value


def of_bytes(data: bytes) -> FileValue:
    value = unnamed(len(data))
    with open(value.descriptor, "wb", closefd=False) as file:
        file.write(data)
    return value


def of_descriptor(descriptor: int, size: int) -> FileValue:
    """The first ``size`` bytes of a file that is open as ``descriptor``, which stays the caller's. Raises OSError."""
    return FileValue(os.dup(descriptor), size)
