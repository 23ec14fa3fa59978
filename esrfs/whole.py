"""Files that people get whole, or as they were before: written under another name beside it, then put in its place.

For results of commands. What belongs to a store is written beneath its descriptor (``store.layout``).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write(path: Path, data: bytes, mode: int | None = None) -> None:
    """``mode``: of the file; None: as the umask has it. Raises OSError, which names ``path``; then nothing is left of
    the attempt, also where the disk was full."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with partial.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
