"""Other programs at work while a file is compacted, through the mount and behind it: the newer truth wins, nothing
comes back from the dead, nobody waits for long, and nobody reads bytes of two identities.

Compaction is held at a fault point (``pause:FLAG``), the program does its thing, and compaction goes on.
"""

from __future__ import annotations

import mmap
import os
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from esrfs.store import swap
from tests.asking import Asking
from tests.witness import MTIME, QuickMounted, digest, paused_at, photo, put, wait_until

pytestmark = pytest.mark.mount

POINTS = ("engine.compact", "compact.read", "compact.packed", *swap.FAULT_POINTS)
SLOW = {"compact.read", "swap.begin", "swap.written", "swap.synced", "swap.verified", "swap.kept_synced", "swap.done"}
"""Points between which nothing changes for others, as far as we know; `make test-slow` tries them."""
HAS_THE_NAME = frozenset(swap.FAULT_POINTS[swap.FAULT_POINTS.index("swap.exchanged") :])
"""The blob has the name."""
AT_THE_BARRIER = frozenset(("swap.leased", "swap.checked", "swap.exchanged", "swap.looked"))
"""An open through the mount waits for the end of the swap, which takes milliseconds."""
LEASED = AT_THE_BARRIER | {"swap.directories_synced", "swap.kept", "swap.kept_synced"}
"""An open for writing behind the mount waits, in the kernel, until the lease is given up."""
WAITING = 0.2
SOON = 5.0
"""Seconds that an operation may take while compaction is held, and after it went on."""
NEWER = b"newer than any photograph\n"


@dataclass
class Case:
    """One file, of which a program gets hold in the middle of its compaction."""

    mount: QuickMounted
    root: Path
    """Where the program acts: the mountpoint or the store."""
    name: str
    """Of the file, below it: ``ACT/d/photo.jpg``."""
    compacted: bool
    """Compaction is so far that the program meets the blob."""
    gone: list[str] = field(default_factory=list)
    """Names that must not exist at the end."""
    finish: Callable[[], None] = lambda: None
    """What the program does when compaction is over."""
    check: Callable[[], None] = lambda: None
    """What must be the case at the end."""

    @property
    def path(self) -> Path:
        return self.root / self.name

    @property
    def behind(self) -> bool:
        return self.root != self.mount.path

    @property
    def original_or_view(self) -> list[bytes]:
        return [photo(), self.mount.views[digest(photo())]]

    def look(self, *written: bytes) -> None:
        self.mount.look(self.name, *written)

    def expect(self, *written: bytes) -> None:
        self.check = lambda: self.look(*written)

    def expect_changed(self, change: Callable[[bytes], bytes]) -> None:
        """The program changed the bytes of the original, or of its view if it met that.

        Who writes to a blob behind the mount writes to an AVIF picture: the original lies in the undo window then.
        """
        if self.behind and self.compacted:
            self.check = lambda: _is_in(photo(), self.mount.kept())
        else:
            self.expect(*[change(base) for base in self.original_or_view])

    def expect_sound(self, also: Callable[[os.stat_result], object] = lambda st: True) -> None:
        def check() -> None:
            self.look(photo())
            assert also((self.mount.path / self.name).stat())

        self.check = check


def _is_in(what: bytes, where: list[bytes]) -> None:
    assert what in where


def replace(case: Case) -> None:
    new = case.path.with_name("new")
    new.write_bytes(NEWER)
    new.rename(case.path)
    case.expect(NEWER)


def replace_alike(case: Case) -> None:
    """By another photograph with the same size and mtime."""
    new = case.path.with_name("new.jpg")
    put(new, photo(1))
    new.rename(case.path)
    case.expect(photo(1))


def delete(case: Case) -> None:
    case.path.unlink()
    case.gone.append(case.name)


def delete_and_create(case: Case) -> None:
    case.path.unlink()
    case.path.write_bytes(NEWER)
    case.expect(NEWER)


def truncate_and_write(case: Case) -> None:
    case.path.write_bytes(NEWER)
    case.expect(NEWER)


def overwrite(case: Case) -> None:
    with open(case.path, "r+b", buffering=0) as file:
        file.seek(100)
        file.write(b"overwritten")
    case.expect_changed(lambda base: base[:100] + b"overwritten" + base[111:])


def append(case: Case) -> None:
    with open(case.path, "ab", buffering=0) as file:
        file.write(b"appended")
    case.expect_changed(lambda base: base + b"appended")


def shorten(case: Case) -> None:
    os.truncate(case.path, 1000)
    case.expect_changed(lambda base: base[:1000])


def chmod(case: Case) -> None:
    case.path.chmod(0o604)
    case.expect_sound(lambda st: stat.S_IMODE(st.st_mode) == 0o604)


def chown(case: Case) -> None:
    os.chown(case.path, 1234, 4321)
    case.expect_sound(lambda st: (st.st_uid, st.st_gid) == (1234, 4321))


def utimes(case: Case) -> None:
    os.utime(case.path, ns=(5, MTIME + 7))
    case.expect_sound(lambda st: st.st_mtime_ns == MTIME + 7)


def set_xattr(case: Case) -> None:
    os.setxattr(case.path, "user.later", b"note")
    case.expect_sound(lambda st: os.getxattr(case.mount.path / case.name, "user.later") == b"note")


def rename(case: Case) -> None:
    case.path.rename(case.path.with_name("renamed.jpg"))
    case.gone.append(case.name)
    case.name = case.name.replace("photo", "renamed")
    case.expect_sound()


def rename_parent(case: Case) -> None:
    parent = case.path.parent
    parent.rename(parent.with_name("e"))
    case.gone.append(os.path.dirname(case.name))
    case.name = case.name.replace("/d/", "/e/")
    case.expect_sound()


def hard_link(case: Case) -> None:
    linked = case.path.with_name("linked.jpg")
    os.link(case.path, linked)
    case.expect_sound(lambda st: case.mount.look(str(linked.relative_to(case.root)), photo()))


def read_and_hold(case: Case) -> None:
    file = open(case.path, "rb", buffering=0)  # noqa: SIM115 (held until the end)
    first = file.read()

    def finish() -> None:
        assert os.pread(file.fileno(), 1 << 20, 0) == first, "what a handle reads stays the same"
        file.close()
        assert case.behind or first in case.original_or_view

    case.finish = finish
    case.expect_sound()


def map_and_hold(case: Case) -> None:
    with open(case.path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    half = mapped[: len(mapped) // 2]

    def finish() -> None:
        whole = mapped[:]
        mapped.close()
        assert whole.startswith(half)
        assert case.behind or whole in case.original_or_view

    case.finish = finish
    case.expect_sound()


def open_for_writing_and_hold(case: Case) -> None:
    file = open(case.path, "r+b", buffering=0)  # noqa: SIM115 (held until the end)

    def finish() -> None:
        file.write(b"written late")
        file.close()

    case.finish = finish
    case.expect_changed(lambda base: b"written late" + base[12:])


ACTS = (
    replace,
    replace_alike,
    delete,
    delete_and_create,
    truncate_and_write,
    overwrite,
    append,
    shorten,
    chmod,
    chown,
    utimes,
    set_xattr,
    rename,
    rename_parent,
    hard_link,
    read_and_hold,
    map_and_hold,
    open_for_writing_and_hold,
)


def learn_views(mount: QuickMounted) -> None:
    """A view is a pure function of its photograph, so what it looks like is asked once."""
    if mount.views:
        return
    mount.start()
    for number in range(3):
        put(mount.path / "learn.jpg", photo(number))
        assert mount.compact("learn.jpg") == {"compacted": 1}
        mount.views[digest(photo(number))] = (mount.path / "learn.jpg").read_bytes()
        (mount.path / "learn.jpg").unlink()
        wait_until(lambda: mount.status()["open_handles"] == 0)
    mount.stop()


@pytest.mark.parametrize("behind", [False, True], ids=["through the mount", "behind the mount"])
@pytest.mark.parametrize("point", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in POINTS])
def test_whoever_acts_in_the_middle_of_a_compaction_wins(
    quick: QuickMounted, tmp_path: Path, point: str, behind: bool
) -> None:
    flag = tmp_path / "flag"
    learn_views(quick)
    quick.start(faults=f"{point}=pause:{flag}")
    cases = {}
    for act in ACTS:
        case = Case(quick, quick.store if behind else quick.path, f"{act.__name__}/d/photo.jpg", point in HAS_THE_NAME)
        race(case, flag, act, may_wait=point in (LEASED if behind else AT_THE_BARRIER))
        cases[act.__name__] = case
    for case in cases.values():
        case.finish()
    if behind:
        time.sleep(1.1)  # so long the kernel remembers attributes and names
    for name, case in cases.items():
        try:
            case.check()
            back = [gone for gone in case.gone if os.path.lexists(quick.store / gone)]
            assert not back, "back from the dead"
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error
    assert quick.found() == []
    quick.assert_recovered()


def race(case: Case, flag: Path, act: Callable[[Case], None], *, may_wait: bool) -> None:
    mount = case.mount
    (mount.path / case.name).parent.mkdir(parents=True)
    put(mount.path / case.name, photo())
    wait_until(lambda: not mount.is_open(case.name))  # a close is told later
    compacting = Asking(lambda: mount.compact(case.name))
    with paused_at(flag):
        acting = Asking(lambda: act(case))
        acting.join(WAITING if may_wait else SOON)
        assert may_wait or not acting.is_alive(), f"{act.__name__} has to wait"
        begun = time.monotonic()
        os.listdir(mount.path)
        (mount.path / case.name).parent.parent.stat()
        assert time.monotonic() - begun < SOON, "others are held up"
    acting.result(SOON)
    compacting.result(SOON)


# ---- readers


class Reader:
    """A program that reads a file bit by bit, by read and by mmap."""

    def __init__(self, path: Path, wanted: bytes, *, cold: bool) -> None:
        self.wanted = wanted
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (held)
        self.mapped: mmap.mmap | None = None
        assert os.pread(self.file.fileno(), 1000, 0) == wanted[:1000]
        if not cold:
            self._map()

    def _map(self) -> mmap.mmap:
        if self.mapped is None:
            self.mapped = mmap.mmap(self.file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            assert self.mapped[: 5 << 12] == self.wanted[: 5 << 12]
        return self.mapped

    def read(self, *, by_mmap: bool = True) -> None:
        """All of it, once more.

        ``by_mmap``: False for a file whose name was removed, or given to one of another size, behind the mount:
        the kernel asks attributes by name, and has one size for both, for mmap too.
        """
        shown = os.pread(self.file.fileno(), 1 << 20, 0)
        assert shown == self.wanted, f"read: {len(shown)} bytes, {_differs(shown, self.wanted)}"
        if not by_mmap:
            return
        assert os.fstat(self.file.fileno()).st_size == len(self.wanted), "size of the handle"
        shown = self._map()[:]
        assert shown == self.wanted, f"mmap: {_differs(shown, self.wanted)}"

    def close(self) -> None:
        if self.mapped is not None:
            self.mapped.close()
        self.file.close()


def _differs(one: bytes, other: bytes) -> str:
    return f"different from byte {next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), '-')}"


def by_newer(path: Path, mount: QuickMounted) -> bytes | None:
    new = path.with_name("new")
    new.write_bytes(NEWER)
    new.rename(path)
    return NEWER


def by_alike(path: Path, mount: QuickMounted) -> bytes | None:
    new = path.with_name("new.jpg")
    put(new, photo(1))
    new.rename(path)
    return photo(1)


def by_another_view(path: Path, mount: QuickMounted) -> bytes | None:
    """One with the same size and mtime."""
    path.with_name("other.jpg").rename(path)
    return mount.views[digest(photo(2))]


def by_nothing(path: Path, mount: QuickMounted) -> bytes | None:
    path.unlink()
    return None


def by_moving(path: Path, mount: QuickMounted) -> bytes | None:
    path.rename(path.with_name("moved.jpg"))
    return None


def by_moving_its_folder(path: Path, mount: QuickMounted) -> bytes | None:
    path.parent.rename(path.parent.with_name(path.parent.name + " moved"))
    return None


def by_compaction(path: Path, mount: QuickMounted) -> bytes | None:
    """It is not compacted while it is open, and a blob stays as it is."""
    before = (mount.store / path.parent.name / path.name).stat().st_ino
    counts = mount.compact(f"{path.parent.name}/{path.name}")
    assert counts in ({"left": 1}, {"blob": 1})
    assert (mount.store / path.parent.name / path.name).stat().st_ino == before
    return (mount.path / path.parent.name / path.name).read_bytes()


def change_keeps_size(now: bytes | None) -> bool:
    return now is not None and len(now) == len(photo())


CHANGES = (by_newer, by_alike, by_another_view, by_nothing, by_moving, by_moving_its_folder, by_compaction)


@pytest.mark.parametrize("behind", [False, True], ids=["through the mount", "behind the mount"])
@pytest.mark.parametrize("state", ["original", "cold", "warm"])
def test_a_reader_never_sees_bytes_of_two_identities(quick: QuickMounted, state: str, behind: bool) -> None:
    learn_views(quick)
    quick.start()
    wanted = photo() if state == "original" else quick.views[digest(photo())]
    readers: dict[str, Reader] = {}
    now: dict[str, bytes | None] = {}
    for change in CHANGES:
        folder = quick.path / change.__name__
        folder.mkdir()
        put(folder / "other.jpg", photo(2))
        quick.compact(f"{folder.name}/other.jpg")
        put(folder / "photo.jpg", photo())
        if state != "original":
            wait_until(lambda: not quick.is_open(f"{folder.name}/photo.jpg"))  # noqa: B023 (called at once)
            assert quick.compact(f"{folder.name}/photo.jpg") == {"compacted": 1}
        if state == "warm":
            assert (folder / "photo.jpg").read_bytes() == wanted
        else:
            quick.call("cache-clear")
        reader = readers[change.__name__] = Reader(folder / "photo.jpg", wanted, cold=state == "cold")
        now[change.__name__] = change((quick.store if behind else quick.path) / folder.name / "photo.jpg", quick)
    for round_of in ("at once", "when the kernel has forgotten", "while the new file is open"):
        for name, reader in readers.items():
            try:
                reader.read(by_mmap=not behind or change_keeps_size(now[name]))
            except AssertionError as error:
                raise AssertionError(f"{name}, {round_of}: {error}") from error
        if round_of == "at once":
            time.sleep(1.1 if behind else 0)
        elif round_of == "when the kernel has forgotten":
            for name, content in now.items():
                path = quick.path / name / "photo.jpg"
                if content is None:
                    assert not path.exists(), name
                    continue
                new = Reader(path, content, cold=True)
                new.read(by_mmap=not behind)
                if not behind or (change_keeps_size(content) and state != "cold"):  # else see the next test
                    readers[name].read()
                new.read(by_mmap=not behind)
                new.close()
        if behind:
            break  # for once a file was open twice, see the next test
    for reader in readers.values():
        reader.close()


@pytest.mark.parametrize("state", ["original", "warm", "cold"])
@pytest.mark.parametrize("maps", ["the old file", "the new file"])
def test_who_opens_a_name_that_was_replaced_behind_the_mount_reads_what_is_open(
    quick: QuickMounted, state: str, maps: str
) -> None:
    """For the kernel one name is one file, with one set of pages: DIRECT_IO alone would not keep a private mapping of
    the new file out of the old one's pages."""
    learn_views(quick)
    quick.start()
    (quick.path / "d").mkdir()
    put(quick.path / "d/photo.jpg", photo())
    wanted = photo()
    if state != "original":
        wait_until(lambda: not quick.is_open("d/photo.jpg"))
        assert quick.compact() == {"compacted": 1}
        wanted = quick.views[digest(photo())]
    if state == "warm":
        (quick.path / "d/photo.jpg").read_bytes()
    elif state == "cold":
        quick.call("cache-clear")
    old = Reader(quick.path / "d/photo.jpg", wanted, cold=state == "cold")
    try:
        old.read(by_mmap=maps == "the old file")
        content = by_alike(quick.store / "d/photo.jpg", quick)
        assert content is not None
        time.sleep(1.1)
        new = Reader(quick.path / "d/photo.jpg", wanted, cold=False)
        new.read(by_mmap=maps == "the new file")
        old.read(by_mmap=maps == "the old file")
        new.close()
    finally:
        old.close()
    # The old file's release may come after the new one's, and till then an open joins what is open.
    wait_until(lambda: (quick.path / "d/photo.jpg").read_bytes() == content)


@pytest.mark.parametrize("mapped", [False, True])
def test_pages_of_a_file_that_was_replaced_behind_the_mount_are_never_served(quick: QuickMounted, mapped: bool) -> None:
    """By another with the same size and mtime, plain files and views alike: keep_cache is the trap."""
    learn_views(quick)
    quick.start()
    contents = {"plain a": photo(0), "plain b": photo(1), "view a": photo(0), "view b": photo(2)}
    for name, content in contents.items():
        put(quick.path / name, content)
    assert quick.compact("view a", "view b") == {"compacted": 2}
    shown = {name: quick.views[digest(one)] if "view" in name else one for name, one in contents.items()}

    def read(path: Path) -> bytes:
        with open(path, "rb", buffering=0) as file:
            if mapped:
                with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as pages:
                    return pages[:]
            return b"".join(iter(lambda: file.read(1 << 14), b""))

    target = quick.path / "target.jpg"
    for before in shown:
        for after in shown:
            for name in (before, after):
                # The kernel tells of the last reader's end when it likes, and an open joins what is open till then.
                wait_until(lambda: quick.status()["open_handles"] == 0)
                # A copy of a blob behind the mount is a blob, with an inode of its own.
                subprocess.run(["cp", "-a", quick.store / name, quick.store / "new"], check=True)
                (quick.store / "new").rename(quick.store / "target.jpg")
                for _ in range(3):
                    assert read(target) == shown[name], f"{after} instead of {before}"
