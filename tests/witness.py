"""What tests of "nothing is lost" share: photographs, a mount that compacts at once, and looks at what became of files.

"Sound" means: under each name is what was written, byte for byte, or a blob of just that, whose view is the one that
was verified (its sha256 is the recipe's).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from PIL import Image

from esrfs.control import ControlError
from esrfs.store import originals, recovery
from esrfs.store.layout import RESERVED, open_store
from tests.mounting import Mounted

MTIME = 1_500_000_000_123_456_789
MODE = 0o640
_BYTES = 96 << 10
_CROPS = (("coffee", (60, 20, 380, 260)), ("astronaut", (96, 0, 416, 240)), ("chelsea", (144, 92, 304, 212)))


@functools.cache
def photo(number: int = 0) -> bytes:
    """One of three different JPEG files, all of just the same length (filled after the picture's end). The last one is
    soft, so that its blob needs a network."""
    from tests.conftest import photograph  # noqa: PLC0415 (it imports this module)

    name, box = _CROPS[number]
    encoded = io.BytesIO()
    photograph(name).crop(box).resize((320, 240), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=95)
    return encoded.getvalue().ljust(_BYTES, b"\0")


def put(path: Path, content: bytes, mtime_ns: int = MTIME) -> None:
    """Write a file as a camera's owner would have it: with a mode, an xattr and an old mtime."""
    path.write_bytes(content)
    path.chmod(MODE)
    os.setxattr(path, "user.note", b"mine")
    os.utime(path, ns=(mtime_ns, mtime_ns))


class QuickMounted(Mounted):
    """A mount whose engine remembers (see ``remembering_engine``); all else about it is real."""

    program = "tests.remembering_mount"
    views: ClassVar[dict[str, bytes]] = {}
    """What a test has learnt: sha256 (hex) of an original → its view."""

    def compact_until_death(self, *paths: str) -> None:
        """Compact with a fault point that kills the mount."""
        with contextlib.suppress(ControlError):
            self.compact(*paths)
        self.wait_for_death()

    def restart(self, *options: str, faults: str = "") -> None:
        """Mount again after a death."""
        self.expected.append("a dead mount of esrfs is there")
        self.start(*options, faults=faults)

    def reserved(self, *names: str) -> Path:
        return self.store.joinpath(RESERVED, *names)

    def staged(self) -> list[str]:
        return [path.name for path in self.reserved("staging").rglob("*") if not path.is_dir()]

    def kept(self) -> list[bytes]:
        """The contents of the undo window."""
        return [path.read_bytes() for path in self._originals() if originals.parse(path.name)]

    def found(self) -> list[bytes]:
        """The contents of what was put aside."""
        return [path.read_bytes() for path in self._originals() if not originals.parse(path.name)]

    def _originals(self) -> list[Path]:
        return sorted(self.reserved("originals").iterdir())

    def look(self, path: str, *written: bytes) -> str:
        """The state of a sound file that was once written as one of ``written``; AssertionError if it is not sound."""
        shown = (self.path / path).read_bytes()
        assert (self.path / path).stat().st_size == len(shown), path
        known = self.explain(path)
        if known["state"] != "blob":
            assert shown == (self.store / path).read_bytes(), path
            assert shown in written, f"{path} is {len(shown)} bytes of {digest(shown)}, which nobody wrote"
            return "original"
        assert digest(shown) == known["sha256_view"], path
        assert known["sha256_original"] in [digest(one) for one in written], path
        assert len(shown) in [len(one) for one in written], path
        return "blob"

    def is_open(self, path: str) -> bool:
        """Whether the mount's process has the store's file open."""
        assert self.process is not None
        wanted = (self.store / path).stat()
        folder = Path(f"/proc/{self.process.pid}/fd")
        for number in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.path.samestat((folder / number).stat(), wanted):
                    return True
        return False

    def assert_recovered(self) -> None:
        """Nothing lies in staging, and another recovery finds nothing to do."""
        assert self.staged() == []
        before = self.everything_reserved()
        with open_store(str(self.store)) as store:
            report = recovery.recover(store)
        assert report.finished == report.undone == report.found == report.problems == []
        assert (report.discarded, report.damaged_records) == (0, 0)
        assert self.everything_reserved() == before

    def everything_reserved(self) -> dict[str, int]:
        """Names and sizes below ``.esrfs``, but for the compactor's line, which is rewritten all the time."""
        return {
            str(path.relative_to(self.store)): path.stat().st_size
            for path in self.reserved().rglob("*")
            if path.is_file() and path.name != "compactor"
        }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wait_until(what: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@contextlib.contextmanager
def paused_at(flag: Path) -> Iterator[None]:
    """Wait until a fault point with ``pause:FLAG`` is reached; it goes on when this block ends."""
    wait_until(flag.exists)
    try:
        yield
    finally:
        flag.unlink(missing_ok=True)
