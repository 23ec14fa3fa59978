"""Files that are there whole, or as they were before."""

from __future__ import annotations

import contextlib
import errno
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from esrfs import whole


@contextlib.contextmanager
def _no_large_files() -> Iterator[None]:
    """As a disk that is full after 4 KiB. Not as a fixture: what pytest prints between two tests may go to a file, too,
    and one that is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    for content in (b"first", b"second"):
        whole.write(path, content, 0o640)
        assert path.read_bytes() == content
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_is_full_leaves_what_was_there_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "out" / "network.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"the one before")
    with pytest.raises(OSError, match=r"network\.safetensors") as error, _no_large_files():
        whole.write(path, bytes(10_000))
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == b"the one before"
    assert list(path.parent.iterdir()) == [path]


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "no" / "such" / "folder.png"
    with pytest.raises(FileNotFoundError) as error:
        whole.write(path, b"")
    assert error.value.filename == str(path)
