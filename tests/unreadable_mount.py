"""``esrfs`` over a disk on which files called ``unreadable…`` can't be told from blobs:
``python -m tests.unreadable_mount mount …``.
"""

from __future__ import annotations

import errno
import os

from esrfs.cli.main import main
from esrfs.store.examine import BlobInfo, examine
from esrfs.store.layout import Store
from esrfs.vfs import attributes


def examine_on_bad_disk(store: Store, fd: int, st: os.stat_result) -> BlobInfo | None:
    if "/unreadable" in os.readlink(f"/proc/self/fd/{fd}"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return examine(store, fd, st)


if __name__ == "__main__":
    attributes.examine = examine_on_bad_disk  # type: ignore[attr-defined]
    main()
