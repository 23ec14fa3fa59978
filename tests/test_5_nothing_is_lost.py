"""Nothing is lost, on real mounts: processes are killed and disks fail or fill at every step, and each file stays sound
(see ``witness``). What other programs do at each step is in ``test_5_races``.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esrfs.store import recovery, swap
from tests.witness import MODE, MTIME, QuickMounted, digest, paused_at, photo, put, wait_until

pytestmark = pytest.mark.mount

COMPACTION_POINTS = ("compact.read", "compact.packed", *swap.FAULT_POINTS)
COMES_AFTER_THE_EXCHANGE = frozenset(swap.FAULT_POINTS[swap.FAULT_POINTS.index("swap.exchanged") :])


def has_its_metadata(path: Path) -> bool:
    st = path.stat()
    found = (stat.S_IMODE(st.st_mode), st.st_mtime_ns, os.getxattr(path, "user.note"))
    return found == (MODE, MTIME, b"mine")


# ---- the mount is killed


@pytest.mark.parametrize("point", COMPACTION_POINTS)
def test_the_mount_is_killed_while_it_compacts(quick: QuickMounted, point: str) -> None:
    quick.start(faults=f"{point}=kill")
    put(quick.path / "photo.jpg", photo())
    (quick.path / "other.jpg").write_bytes(photo(1))
    quick.compact_until_death("photo.jpg")
    quick.restart()
    state = quick.look("photo.jpg", photo())
    assert state == ("blob" if point in COMES_AFTER_THE_EXCHANGE else "original")
    assert (quick.path / "photo.jpg").stat().st_size == len(photo())
    assert has_its_metadata(quick.path / "photo.jpg")
    assert quick.look("other.jpg", photo(1)) == "original"
    assert quick.kept() == ([photo()] if state == "blob" else [])
    assert quick.found() == []
    quick.assert_recovered()
    assert quick.compact()["compacted"] == (1 if state == "blob" else 2), "work goes on after a crash"
    assert quick.look("photo.jpg", photo()) == "blob"
