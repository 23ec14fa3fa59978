"""``esrfs migrate`` into a real mount: what arrives, what is touched, what a crash leaves, and the way back."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from esrfs_daemon import config, copying, destination, durable, once, recovery, sources, undo, walk
from esrfs_daemon.journal import Busy, Journal, JournalError
from esrfs_daemon.migration import FAULT_POINTS, Migration
from esrfs_daemon.nested import STORE, VIEW
from esrfs_daemon.report import DestinationLost, NoRoom, Report
from esrfs_daemon.settle import Settling
from esrfs_daemon.suitable import Refused
from esrfs_daemon.throttle import Stopped, Throttle
from esrfs_daemon.walk import Filters

from esrfs.cli import migrating as migrating_command
from esrfs.cli.show import CommandError
from esrfs.exit_codes import ExitCode
from esrfs.store import linux
from esrfs.store.initialise import init
from tests.asking import Asking
from tests.mounting import Mounted
from tests.small_disk import small_disk
from tests.witness import QuickMounted, paused_at, photo, wait_until

pytestmark = pytest.mark.mount

ODD_NAMES = [
    "plain.jpg", "two\nlines.jpg", "tab\tand space .jpg", "bytes-\udcff\udcfe.jpg", "Grüße 🌄📷.jpg",
    "é" * 125 + ".jpg", "x" * 255, " leading", "-rf", "*?[a].jpg", "back\\slash", "quote'\".jpg", ".hidden",
]  # fmt: skip


class Migrating:
    """Calls the engine between ``source`` and a folder of a mount, in this process."""

    def __init__(self, source: Path, mount: Mounted, folder: str = "in") -> None:
        self.source = source
        self.mount = mount
        self.to = mount.path / folder
        self.stop = threading.Event()

    @contextlib.contextmanager
    def prepared(self, filters: Filters | None = None, limits: config.Throttle | None = None) -> Iterator[once.Once]:
        limits = limits or config.Throttle(min_free=0, on_battery=True)
        with (
            contextlib.closing(Journal()) as journal,
            once.prepared(
                str(self.source), str(self.to), journal, Throttle(limits, self.stop), filters or Filters()
            ) as work,
        ):
            yield work

    def migrate(self, then: config.Then = "keep", quiet: float = 0.0, **options: Any) -> Report:
        filters, limits = options.pop("filters", None), options.pop("limits", None)
        with self.prepared(filters, limits) as work:
            return work.migrate(then, quiet=quiet, **options)

    def undo(self) -> Any:
        with self.prepared() as work:
            return work.undo()

    def command(self, *options: str, faults: str = "") -> subprocess.CompletedProcess[str]:
        """As a process of its own, which may be killed."""
        return subprocess.run(
            self.arguments(*options),
            env={**os.environ, "ESRFS_FAULTS": faults},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=120,
            check=False,
        )

    def arguments(self, *options: str) -> list[str]:
        program = [sys.executable, "-m", "esrfs.cli.main", "migrate"]
        return [*program, str(self.source), str(self.to), "--min-free", "0", *options]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def migrating(source: Path, mounted: Mounted) -> Migrating:
    return Migrating(source, mounted)


def write(path: Path, content: bytes = b"content", mtime: int = 1_400_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(mtime * 10**9 + 123_456_789, mtime * 10**9 + 123_456_789))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Path → bytes of every regular file, and → target of every symlink."""
    found = {}
    for top, folders, names in os.walk(folder):
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(top, name)))]:
            path = os.path.join(top, name)
            relative = os.path.relpath(path, folder)
            with contextlib.suppress(FileNotFoundError):  # a daemon may be at work
                if os.path.islink(path):
                    found[relative] = b"-> " + os.fsencode(os.readlink(path))
                elif stat.S_ISREG(os.lstat(path).st_mode):
                    found[relative] = Path(path).read_bytes()
    return found


def full_look(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything that a copy should keep, by path; folders too."""
    found: dict[str, tuple[object, ...]] = {}
    for top, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            path = os.path.join(top, name)
            st = os.lstat(path)
            kind = stat.S_IFMT(st.st_mode)
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            body = b""
            if stat.S_ISREG(st.st_mode):
                body = Path(path).read_bytes()
            elif stat.S_ISLNK(st.st_mode):
                body = os.fsencode(os.readlink(path))
            size = st.st_size if kind == stat.S_IFREG else 0
            times = st.st_mtime_ns
            found[os.path.relpath(path, folder)] = (
                st.st_mode, st.st_uid, st.st_gid, size, times, tuple(sorted(xattrs.items())), body,
            )  # fmt: skip
    return found


def odd_tree(root: Path, files: int = 60) -> None:
    """Odd names, links of both kinds, holes, attributes, an ACL, empty folders and files."""
    generator = random.Random(5)
    for number, name in enumerate(ODD_NAMES):
        write(root / name, generator.randbytes(100 + number))
    for number in range(files):
        write(root / f"roll {number % 7}" / "deep" / f"{number}.jpg", generator.randbytes(generator.randrange(5000)))
    write(root / "empty file", b"")
    (root / "empty folder" / "in it \udcfe").mkdir(parents=True)
    os.link(root / "plain.jpg", root / "roll 1" / "same as plain.jpg")
    os.link(root / "plain.jpg", root / "zz.jpg")
    os.symlink("roll 1/deep", root / "a link to a folder")
    os.symlink("/nowhere/\udcff\n", root / "a dangling link")
    with open(root / "holes.raw", "wb") as file:
        file.seek(3 << 20)
        file.write(b"data")
        file.truncate(5 << 20)
    os.setxattr(root / "plain.jpg", "user.note", b"mine")
    os.setxattr(root / "roll 2", "user.folder", b"mine, too")
    (root / "-rf").chmod(0o604)
    if os.geteuid() == 0:
        os.chown(root / " leading", 1234, 5678)
        os.chown(root / "roll 3", 1234, 5678)
    if shutil.which("setfacl"):
        subprocess.run(["setfacl", "-m", "u:4321:r", str(root / ".hidden")], check=True)
    (root / "roll 4").chmod(0o750)
    for folder in (root / "roll 4", root / "empty folder"):
        os.utime(folder, ns=(10**18, 10**18 + 5))


# ---- what arrives


def test_a_tree_of_odd_files_arrives_with_everything_about_it(migrating: Migrating) -> None:
    odd_tree(migrating.source)
    before = full_look(migrating.source)
    report = migrating.migrate()
    assert not report.failed + report.later + report.left + report.incomplete + report.beside
    assert full_look(migrating.to) == before
    assert full_look(migrating.source) == before
    assert (migrating.to / "holes.raw").stat().st_blocks * 512 < 1 << 20
    names = ["plain.jpg", "zz.jpg", "roll 1/same as plain.jpg"]
    assert len({(migrating.to / name).stat().st_ino for name in names}) == 1
    assert (migrating.to / "zz.jpg").stat().st_nlink == 3
    assert report.links == 2
    assert [path.name for path in migrating.mount.store.rglob(".esrfs-*")] == []


@pytest.mark.slow
def test_a_tree_of_2000_files(migrating: Migrating, shared_data: Path) -> None:
    """Real ones and odd ones, there and back."""
    odd_tree(migrating.source, files=1700)
    real = [path for path in sorted(shared_data.rglob("*")) if path.is_file() and path.stat().st_size < 300_000][:300]
    for number, path in enumerate(real):
        (migrating.source / "real").mkdir(exist_ok=True)
        shutil.copy2(path, migrating.source / "real" / f"{number} {path.name}")
    os.mkfifo(migrating.source / "roll 1" / "pipe")
    before = full_look(migrating.source)
    assert len(before) > 2000
    pipe = before.pop("roll 1/pipe")
    report = migrating.migrate("delete")
    assert [note.path for note in report.failed] == ["roll 1/pipe"]
    assert not report.later + report.left + report.incomplete + report.beside
    assert full_look(migrating.to) == before
    assert contents(migrating.source) == {}
    undone = migrating.undo()
    assert not undone.failed + undone.kept
    assert full_look(migrating.source) == {**before, "roll 1/pipe": pipe}


def test_a_second_run_does_nothing(migrating: Migrating) -> None:
    odd_tree(migrating.source)
    first = migrating.migrate()
    before = full_look(migrating.to)
    again = migrating.migrate()
    assert again.copied == again.existing == again.links == again.folders == 0
    assert again.unchanged == first.copied + first.links + first.symlinks
    assert full_look(migrating.to) == before


def test_what_cannot_be_moved_is_named_with_a_reason(migrating: Migrating) -> None:
    write(migrating.source / "good.jpg")
    os.mkfifo(migrating.source / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(migrating.source / "socket"))
    write(migrating.source / "download.crdownload")
    report = migrating.migrate("delete")
    assert {note.path: note.reason for note in report.failed} == {
        "pipe": "a named pipe: it holds no bytes",
        "socket": "a socket: it holds no bytes",
    }
    assert [note.path for note in report.later] == ["download.crdownload"]
    assert sorted(os.listdir(migrating.source)) == ["download.crdownload", "pipe", "socket"]
    assert os.listdir(migrating.to) == ["good.jpg"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_unreadable_files_are_named_and_the_others_go(unmounted: Mounted, source: Path, tmp_path: Path) -> None:
    unmounted.start("allow_other")
    write(source / "mine.jpg")
    write(source / "theirs.jpg").chmod(0o000)
    write(source / "not to be deleted" / "a.jpg")
    (source / "closed").mkdir(mode=0o000)
    Journal().close()
    for path in (source, source / "mine.jpg", Journal().path.parent, *Journal().path.parent.iterdir()):
        os.chown(path, 65534, 65534)
    unmounted.path.chmod(0o777)
    for above in [tmp_path, *tmp_path.parents][:4]:
        above.chmod(above.stat().st_mode | 0o111)
    "".encode("ascii")  # codecs and modules are loaded when first used: nobody may be unable to read this Python
    os.setegid(65534)
    os.seteuid(65534)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: else /proc/self is root's after the change
    try:
        report = Migrating(source, unmounted).migrate("delete")
    finally:
        os.seteuid(0)
        os.setegid(0)
    assert sorted(note.path for note in report.failed) == ["closed", "theirs.jpg"]
    assert all("Permission denied" in note.reason for note in report.failed)
    assert report.copied == 2
    # Its owner could not be carried over, and nobody but root may delete there.
    assert [note.path for note in report.left] == ["not to be deleted/a.jpg"]
    assert not (source / "mine.jpg").exists()


def test_names_that_are_taken(migrating: Migrating) -> None:
    write(migrating.source / "same.jpg", b"same")
    write(migrating.source / "other.jpg", b"new")
    write(migrating.source / ("n" * 251 + ".jpg"), b"new")
    write(migrating.source / "folder.jpg", b"new")
    os.symlink("new", migrating.source / "link")
    write(migrating.to / "same.jpg", b"same", mtime=5)
    write(migrating.to / "other.jpg", b"old")
    write(migrating.to / "other (2).jpg", b"older")
    write(migrating.to / ("n" * 251 + ".jpg"), b"old")
    (migrating.to / "folder.jpg").mkdir()
    os.symlink("old", migrating.to / "link")
    report = migrating.migrate("delete")
    found = contents(migrating.to)
    assert found["other.jpg"] == b"old"
    assert found["other (2).jpg"] == b"older"
    assert found["other (3).jpg"] == b"new"
    assert found["n" * 247 + " (2).jpg"] == b"new"
    assert found["folder (2).jpg"] == b"new"
    assert (found["link"], found["link (2)"]) == (b"-> old", b"-> new")
    assert (report.existing, report.copied, len(report.beside)) == (1, 3, 4)
    assert int((migrating.to / "same.jpg").stat().st_mtime) == 5
    assert os.listdir(migrating.source) == []


def test_a_name_that_is_taken_is_found_again_without_the_journal(migrating: Migrating) -> None:
    write(migrating.source / "a.jpg", b"new")
    write(migrating.to / "a.jpg", b"old")
    migrating.migrate()
    Journal().path.unlink()
    report = migrating.migrate()
    assert (report.existing, report.copied) == (1, 0)
    assert sorted(os.listdir(migrating.to)) == ["a (2).jpg", "a.jpg"]


def test_a_folder_whose_name_a_file_has_taken_is_reported(migrating: Migrating) -> None:
    write(migrating.source / "2024" / "a.jpg")
    write(migrating.to / "2024", b"a file")
    report = migrating.migrate("delete")
    assert {note.path for note in report.failed} == {"2024", "2024/a.jpg"}
    assert (migrating.source / "2024" / "a.jpg").exists()


def test_a_folder_that_is_renamed_after_it_was_found_comes_later(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(migrating.source / "card" / "raw" / "a.jpg")
    (migrating.source / "card" / "empty").mkdir()
    walked = walk.walk

    def renaming(*arguments: Any, **options: Any) -> Iterator[walk.Found]:
        found = list(walked(*arguments, **options))
        (migrating.source / "card").rename(migrating.source / "holidays")
        return iter(found)

    with monkeypatch.context() as patched:
        patched.setattr(walk, "walk", renaming)
        report = migrating.migrate("delete")
    assert report.failed == []
    assert {note.path for note in report.later} == {"card", "card/raw", "card/empty", "card/raw/a.jpg"}
    assert os.listdir(migrating.to) == []
    report = migrating.migrate("delete")
    assert (report.copied, report.failed, report.later) == (1, [], [])
    assert contents(migrating.to) == {"holidays/raw/a.jpg": b"content"}


def test_a_file_that_changes_after_its_migration_is_kept_beside(migrating: Migrating) -> None:
    write(migrating.source / "a.jpg", b"first")
    migrating.migrate()
    write(migrating.source / "a.jpg", b"second", mtime=1_500_000_000)
    migrating.migrate()
    assert contents(migrating.to) == {"a.jpg": b"first", "a (2).jpg": b"second"}
    assert migrating.migrate().unchanged == 1


def test_what_was_deleted_in_the_mount_does_not_come_again(migrating: Migrating) -> None:
    write(migrating.source / "blurred.jpg")
    migrating.migrate()
    (migrating.to / "blurred.jpg").unlink()
    assert migrating.migrate().unchanged == 1
    assert os.listdir(migrating.to) == []


def test_a_card_is_known_again_though_its_inodes_have_other_numbers(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT numbers files anew at each mount."""
    monkeypatch.setattr("esrfs_daemon.migration.filesystem_type", lambda fd: "vfat")
    write(migrating.source / "a.jpg")
    migrating.migrate()
    shutil.copy2(migrating.source / "a.jpg", migrating.source / "b")
    os.rename(migrating.source / "b", migrating.source / "a.jpg")
    assert migrating.migrate().unchanged == 1


def test_include_and_exclude(migrating: Migrating) -> None:
    for name in ("a.JPG", "b.txt", "sub/c.jpg", "cache/d.jpg", "sub/raw/e.jpg"):
        write(migrating.source / name)
    (migrating.source / "empty").mkdir()
    migrating.migrate(filters=Filters(["*.jpg"], ["cache", "sub/raw/*"]))
    assert sorted(contents(migrating.to)) == ["a.JPG", "sub/c.jpg"]
    assert not (migrating.to / "empty").exists()


# ---- what becomes of the source


def test_sources_are_touched_only_as_asked(migrating: Migrating) -> None:
    odd_tree(migrating.source, files=20)
    before = contents(migrating.source)
    migrating.migrate("delete")
    assert contents(migrating.source) == {}
    assert (migrating.source / "empty folder").is_dir(), "folders stay"
    assert contents(migrating.to) == before


def test_symlinks_in_the_place_of_files(migrating: Migrating) -> None:
    odd_tree(migrating.source, files=20)
    before = contents(migrating.source)
    report = migrating.migrate("symlink")
    assert report.touched == sum(not content.startswith(b"-> ") for content in before.values())
    for name, content in before.items():
        path = migrating.source / name
        if content.startswith(b"-> "):
            assert os.fsencode(os.readlink(path)) == content[3:]
        else:
            assert os.readlink(path) == str(migrating.to / name)
            assert path.read_bytes() == content
    again = migrating.migrate("symlink")
    assert (again.copied, again.symlinks, again.existing) == (0, 0, 0)
    assert [path.name for path in migrating.source.rglob(".esrfs-*")] == []


def test_the_trash_is_that_of_the_desktop(migrating: Migrating) -> None:
    name = "two\nlines \udcff%.jpg"
    write(migrating.source / "sub" / name, b"first")
    os.symlink("x", migrating.source / "link")
    migrating.migrate("trash")
    write(migrating.source / "sub" / name, b"second")
    migrating.migrate("trash")
    assert contents(migrating.source) == {}
    trash = Path(os.environ["XDG_DATA_HOME"]) / "Trash"
    assert sorted(contents(trash / "files").values()) == [b"-> x", b"first", b"second"]
    for info in (trash / "info").iterdir():
        assert info.suffix == ".trashinfo"
        assert os.path.lexists(trash / "files" / info.name.removesuffix(".trashinfo"))
        header, path, date = info.read_text().splitlines()
        assert (header, date[:13]) == ("[Trash Info]", "DeletionDate=")
        assert path.startswith("Path=/")
        assert path.endswith(("/source/sub/two%0Alines%20%FF%25.jpg", "/source/link"))
    assert (trash / "info").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_mirrored_is_only_copied_from(migrating: Migrating) -> None:
    write(migrating.source / "phone" / ".stfolder" / "marker")
    write(migrating.source / "phone" / "a.jpg")
    write(migrating.source / "mine" / "b.jpg")
    migrating.migrate("delete")
    assert sorted(contents(migrating.source)) == ["phone/.stfolder/marker", "phone/a.jpg"]
    assert sorted(contents(migrating.to)) == ["mine/b.jpg", "phone/.stfolder/marker", "phone/a.jpg"]
    assert migrating.migrate("delete").unchanged == 2
    migrating.migrate("delete", even_if_mirrored=True)
    assert contents(migrating.source) == {}


def test_a_source_below_a_mirrored_folder_is_only_copied_from(migrating: Migrating) -> None:
    write(migrating.source / "DCIM" / "a.jpg")
    write(migrating.source / ".nextcloudsync.log")
    inside = Migrating(migrating.source / "DCIM", migrating.mount)
    inside.migrate("symlink")
    assert not (migrating.source / "DCIM" / "a.jpg").is_symlink()


def test_hard_links_are_deleted_name_by_name(migrating: Migrating) -> None:
    write(migrating.source / "a.jpg")
    os.link(migrating.source / "a.jpg", migrating.source / "b.jpg")
    migrating.migrate("delete")
    assert os.listdir(migrating.source) == []
    assert (migrating.to / "a.jpg").stat().st_ino == (migrating.to / "b.jpg").stat().st_ino


@pytest.fixture
def poor(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Called with True, the destination takes no extended attributes."""
    real = os.setxattr

    def refuse(path: Any, *arguments: Any) -> None:
        if isinstance(path, int):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        real(path, *arguments)

    return lambda is_poor: monkeypatch.setattr(os, "setxattr", refuse if is_poor else real)


def test_a_source_whose_copy_lacks_something_stays_in_later_runs_too(
    migrating: Migrating, poor: Callable[[bool], None]
) -> None:
    path = write(migrating.source / "a.jpg")
    os.setxattr(path, "user.xdg.tags", b"family")
    os.link(path, migrating.source / "b.jpg")
    poor(True)
    for then in ("keep", "delete", "trash", "symlink"):
        report = migrating.migrate(then)
        assert sorted(note.path for note in report.incomplete) == ["a.jpg", "b.jpg"], then
        assert sorted(note.path for note in report.left) == (["a.jpg", "b.jpg"] if then != "keep" else [])
        assert all("user.xdg.tags" in note.reason for note in report.left)
        assert os.getxattr(path, "user.xdg.tags") == b"family"
        assert sorted(contents(migrating.source)) == ["a.jpg", "b.jpg"]
    path.unlink()
    assert [note.path for note in migrating.migrate("delete").left] == ["b.jpg"], "the last name, too"
    Journal().path.unlink()
    assert [note.path for note in migrating.migrate("delete").left] == ["b.jpg"], "though nobody knows who made it"
    poor(False)
    (migrating.to / "a.jpg").unlink()
    (migrating.to / "b.jpg").unlink()
    report = migrating.migrate("delete")
    assert (report.copied, report.touched, report.left) == (1, 1, [])
    assert os.getxattr(migrating.to / "b.jpg", "user.xdg.tags") == b"family"


def test_a_file_that_lies_there_must_have_the_sources_owner_and_attributes_but_not_its_times(
    migrating: Migrating,
) -> None:
    def differ(name: str, change: Callable[[Path], object]) -> None:
        shutil.copy2(write(migrating.source / name), migrating.to / name)
        change(migrating.source / name)

    os.makedirs(migrating.to)
    differ("time.jpg", lambda path: os.utime(path, (5, 5)))
    differ("mode.jpg", lambda path: path.chmod(0o600))
    differ("more there.jpg", lambda path: os.setxattr(migrating.to / path.name, "user.xdg.tags", b"family"))
    differ("tags.jpg", lambda path: os.setxattr(path, "user.xdg.tags", b"family"))
    stay = ["tags.jpg"]
    if shutil.which("setfacl"):
        differ("acl.jpg", lambda path: subprocess.run(["setfacl", "-m", "u:4321:r", str(path)], check=True))
        stay += ["acl.jpg"]
    if os.geteuid() == 0:
        differ("owner.jpg", lambda path: os.chown(path, 1234, 0))
        stay += ["owner.jpg"]
    report = migrating.migrate("delete")
    assert sorted(note.path for note in report.left) == sorted(contents(migrating.source)) == sorted(stay)
    assert report.existing == 3 + len(stay)
    assert os.getxattr(migrating.to / "more there.jpg", "user.xdg.tags") == b"family"


def test_what_people_change_of_a_copy_is_not_taken_for_the_source(migrating: Migrating) -> None:
    """Copied first and deleted later: what was set in the source or in the mount meanwhile is no reason to lose any."""
    for name in ("same.jpg", "tagged there.jpg", "mode there.jpg", "new here.jpg"):
        write(migrating.source / name)
    migrating.migrate()
    os.setxattr(migrating.to / "tagged there.jpg", "user.xdg.tags", b"family")
    (migrating.to / "mode there.jpg").chmod(0o600)
    os.utime(migrating.source / "new here.jpg", (5, 5))  # as one that was downloaded again
    report = migrating.migrate("delete")
    assert [(note.path, "mode 0600" in note.reason) for note in report.left] == [("mode there.jpg", True)]
    assert sorted(contents(migrating.source)) == ["mode there.jpg"]
    assert os.getxattr(migrating.to / "tagged there.jpg", "user.xdg.tags") == b"family"


def test_a_file_that_is_open_for_writing_is_not_taken(migrating: Migrating) -> None:
    path = write(migrating.source / "video.mov")
    with open(path, "ab"):
        report = migrating.migrate("delete")
    assert [note.path for note in report.later] == ["video.mov"]
    assert path.exists()
    assert migrating.migrate("delete").touched == 1


def test_a_newer_version_saved_in_the_last_moment_stays(
    migrating: Migrating, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the unlink a program replaces the file: nothing of it may be lost."""
    path = write(migrating.source / "a.jpg", b"copied")
    for then, point in (("delete", "migrate.recorded"), ("trash", "migrate.recorded"), ("symlink", "migrate.aside")):
        flag = tmp_path / "flag"
        run = Asking(functools.partial(migrating.command, "--then", then, faults=f"{point}=pause:{flag}"))
        with paused_at(flag):
            newer = write(migrating.source / "newer", then.encode())
            os.rename(newer, path)
        assert run.result().returncode == 1
        assert path.read_bytes() == then.encode()
        assert sorted(os.listdir(migrating.source)) == ["a.jpg"]


def test_a_copy_that_is_removed_meanwhile_keeps_the_source(migrating: Migrating, tmp_path: Path) -> None:
    path = write(migrating.source / "a.jpg")
    flag = tmp_path / "flag"
    run = Asking(lambda: migrating.command("--then", "delete", faults=f"migrate.recorded=pause:{flag}"))
    with paused_at(flag):
        (migrating.to / "a.jpg").unlink()
    assert "removed from the destination" in run.result().stderr
    assert path.exists()


def test_a_source_that_changes_while_it_is_copied_is_taken_later(migrating: Migrating, tmp_path: Path) -> None:
    path = write(migrating.source / "a.jpg", b"old")
    flag = tmp_path / "flag"
    run = Asking(lambda: migrating.command("--then", "delete", faults=f"migrate.copied=pause:{flag}"))
    with paused_at(flag):
        write(path, b"new and longer")
    assert "changed while it was copied" in run.result().stderr
    assert path.read_bytes() == b"new and longer"
    assert os.listdir(migrating.to) == []


@pytest.mark.parametrize("size", [4000, 3 << 20], ids=["small", "large"])
def test_bytes_that_are_read_back_otherwise_are_not_believed(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None], size: int
) -> None:
    """A disk that forgets: the copy is spoilt in the store, below the mount, after it was written."""
    expect_log("read back with other bytes")
    content = b"true" * (size // 4)
    write(migrating.source / "a.jpg", content)

    def spoils(original: Callable[[int], None]) -> Callable[[int], None]:
        def spoil(fd: int) -> None:
            original(fd)
            for part in migrating.mount.store.rglob(".esrfs-*.part"):
                part.write_bytes(b"fals" * (size // 4))

        return spoil

    monkeypatch.setattr(os, "fsync", spoils(os.fsync))
    monkeypatch.setattr(linux, "syncfs", spoils(linux.syncfs))
    report = migrating.migrate("delete")
    assert "other bytes" in report.failed[0].reason
    assert contents(migrating.source) == {"a.jpg": content}
    assert os.listdir(migrating.to) == []


def test_the_copy_is_read_from_the_disk_and_not_from_the_cache(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the copy, and of the store's file below it, no page is left in the cache when reading back begins."""
    write(migrating.source / "a.jpg", os.urandom(2 << 20))
    dropped = []
    original = copying.drop_pages
    monkeypatch.setattr(copying, "drop_pages", lambda fd: (dropped.append(os.fstat(fd).st_dev), original(fd)))
    migrating.migrate()
    assert set(dropped) == {migrating.to.stat().st_dev, migrating.mount.store.stat().st_dev}


# ---- many small files at a time


def parts(migrating: Migrating) -> list[str]:
    return [path.name for top in (migrating.source, migrating.mount.store) for path in top.rglob(".esrfs-*")]


@pytest.fixture
def fsynced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes of files that were fsynced one by one."""
    found: list[int] = []
    original = copying.make_durable

    def each(fd: int) -> None:
        original(fd)
        found.append(os.fstat(fd).st_ino)

    monkeypatch.setattr(copying, "make_durable", each)
    return found


def small_files(migrating: Migrating, count: int) -> dict[str, bytes]:
    for number in range(count):
        write(migrating.source / f"{number:03}.jpg", b"%d" % number * 100)
    return contents(migrating.source)


def test_an_error_at_the_common_step_is_found_out_file_by_file(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, fsynced: list[int]
) -> None:
    """Only what was durable counts: of the others the source stays, and the file is named."""
    before = small_files(migrating, 70)
    each = copying.make_durable

    def fails(fd: int) -> None:
        each(fd)
        if os.pread(fd, 300, 0) == before["007.jpg"]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def syncfs(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as failing:
        failing.setattr(linux, "syncfs", syncfs)
        failing.setattr(copying, "make_durable", fails)
        report = migrating.migrate("delete")
    assert {note.path: note.reason for note in report.failed} == {"007.jpg": "Input/output error"}
    assert contents(migrating.source) == {"007.jpg": before["007.jpg"]}
    assert contents(migrating.to) == {name: content for name, content in before.items() if name != "007.jpg"}
    assert parts(migrating) == []
    assert len(set(fsynced)) == 70
    assert migrating.migrate("delete").touched == 1
    assert contents(migrating.to) == before


def test_one_common_step_stands_for_an_fsync_of_each(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, fsynced: list[int]
) -> None:
    """And every batch has a barrier of its own, opened before its first file is: errors are told once for each."""
    before = small_files(migrating, 70)
    events: list[str] = []
    synced: list[int] = []

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            events.append(name)
            return original(*arguments)

        return call

    monkeypatch.setattr(durable, "open_barrier", noted("open", durable.open_barrier))
    monkeypatch.setattr(copying, "copy", noted("copy", copying.copy))
    original = linux.syncfs
    monkeypatch.setattr(linux, "syncfs", lambda fd: (synced.append(os.fstat(fd).st_dev), original(fd)))
    report = migrating.migrate("delete")
    assert (report.copied, report.touched) == (70, 70)
    assert contents(migrating.to) == before
    if filesystem_type_of(migrating.mount.store) not in ("btrfs", "ext4", "f2fs", "tmpfs", "xfs"):
        assert synced == []
        return
    assert synced == [migrating.mount.store.stat().st_dev] * 2
    assert fsynced == []
    opens = [number for number, name in enumerate(events) if name == "open"]
    assert (opens[0], events.count("open")) == (0, 2)
    assert events[: opens[1]].count("copy") <= 64


def filesystem_type_of(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return destination.filesystem_type(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("case", ["an old kernel", "another filesystem", "elsewhere", "unreadable"])
def test_where_the_common_step_can_not_be_trusted_each_file_is_fsynced(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, fsynced: list[int], tmp_path: Path, case: str
) -> None:
    before = small_files(migrating, 5)
    if case == "an old kernel":
        monkeypatch.setattr("platform.release", lambda: "5.16.9")
    elif case == "another filesystem":
        monkeypatch.setattr(durable, "filesystem_type", lambda fd: "nfs4")
    elif case == "elsewhere":  # something else has come to lie at the store's path
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.setattr(
            destination, "_backing", lambda store, relative: os.open(tmp_path / "elsewhere", os.O_RDONLY)
        )
    else:
        monkeypatch.setattr(destination, "_backing", lambda store, relative: -1)
    assert migrating.migrate("delete").touched == 5
    assert contents(migrating.to) == before
    assert len(set(fsynced)) == 5


def test_a_batch_is_brought_to_its_end_before_a_pause(migrating: Migrating, monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(migrating, 70)
    left: list[int] = []
    with migrating.prepared() as work:
        throttle = work._throttle
        asked = 0

        def blocked() -> str:
            nonlocal asked
            if threading.current_thread() is not threading.main_thread():
                return ""  # what is being copied is
            asked += 1
            return "battery" if 2 <= asked <= 3 else ""

        monkeypatch.setattr(throttle, "blocked", blocked)
        throttle.on_pause = lambda reason: left.append(len(os.listdir(migrating.source)))
        assert work.migrate("delete", quiet=0.0).touched == 70
    assert left[0] == 70 - 64


def test_what_was_begun_is_finished_when_there_is_no_more_room(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small_files(migrating, 150)
    asked = 0

    def no_room(self: Migration, size: int) -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise NoRoom("full")

    monkeypatch.setattr(Migration, "_check_room", no_room)
    with pytest.raises(NoRoom):
        migrating.migrate("delete")
    left = contents(migrating.source)
    assert len(left) == 150 - 128
    assert {**contents(migrating.to), **left} == before
    assert parts(migrating) == []


def test_an_error_nobody_expects_leaves_no_part_behind(migrating: Migrating, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small_files(migrating, 150)

    def record(self: Migration, batch: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched, pytest.raises(sqlite3.OperationalError):
        patched.setattr(Migration, "_record", record)
        migrating.migrate("delete")
    assert contents(migrating.source) == before
    assert parts(migrating) == []
    report = migrating.migrate("delete")
    assert (report.touched, report.beside, report.failed) == (150, [], [])
    assert contents(migrating.to) == before


@contextlib.contextmanager
def read_only_after(good: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """The journal takes so many writes, and then none, as on a disk that was made read-only; whether each was taken."""
    write_rows: Callable[..., None] = Journal.write
    written: list[bool] = []

    def write(self: Journal, rows: Any, forget: Any = ()) -> None:
        written.extend([len(written) < good] if rows else [])
        with self._using() as connection:
            connection.execute(f"PRAGMA query_only = {not all(written)}")
        write_rows(self, rows, forget)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", write)
        yield written


@pytest.mark.parametrize("good", range(8))
def test_no_source_is_touched_that_the_journal_can_not_note(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    before = small_files(migrating, 150)
    (migrating.source / "empty").mkdir()
    with read_only_after(good, monkeypatch) as written, migrating.prepared() as work:
        if good < 7:
            with pytest.raises(JournalError, match=r"migration\.db.*readonly"):
                work.migrate("delete", quiet=0.0)
        else:
            work.migrate("delete", quiet=0.0)
        report = work.report
    assert (len(written) > good) == (good < 7)
    left, there = contents(migrating.source), contents(migrating.to)
    with contextlib.closing(Journal()) as journal:
        noted = {row.source for row in journal.to_undo(str(migrating.source), str(migrating.to))}
    assert noted >= before.keys() - left.keys()
    assert {**there, **left} == before
    assert report.touched == len(before) - len(left)
    assert report.copied == len([name for name in noted if name in before]), "what is not recorded is not told"
    assert parts(migrating) == []

    report = migrating.migrate("delete")
    assert not report.failed + report.left + report.later + report.beside
    assert contents(migrating.to) == before
    assert contents(migrating.source) == {}
    assert not migrating.undo().failed
    assert contents(migrating.source) == before


@pytest.mark.parametrize("good", range(7))
def test_an_undo_that_the_journal_can_not_note_is_found_done_by_the_next(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    before = small_files(migrating, 3)
    migrating.migrate("delete")
    with read_only_after(good, monkeypatch), migrating.prepared() as work:
        with contextlib.nullcontext() if good == 6 else pytest.raises(JournalError, match="readonly"):
            work.undo()  # two writes for each: that its copy is about to leave, and that it has left
        assert work.undo_report.restored == min(good // 2 + 1, 3)
        assert work.undo_report.removed == (good + 1) // 2
    assert {**contents(migrating.source), **contents(migrating.to)} == before
    report = migrating.undo()
    assert not report.failed + report.kept
    assert contents(migrating.source) == before
    assert contents(migrating.to) == {}


def test_the_command_tells_what_it_did_until_the_journal_failed(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_files(migrating, 150)
    time.sleep(2.1)  # at rest when they are walked, so that there are batches of 64
    command = functools.partial(
        migrating_command.migrate, str(migrating.source), str(migrating.to), min_free="0", as_json=True
    )
    for good, options, told in (
        (3, {"then": migrating_command.Then.DELETE}, {"copied": 64, "touched": 64, "complete": False}),
        (4, {"undo": True}, {"restored": 2, "removed": 2}),  # what was interrupted is put right first
    ):
        with read_only_after(good, monkeypatch), pytest.raises(CommandError) as caught:
            command(**options)
        assert caught.value.exit_code == ExitCode.FAILED
        assert re.search(r"migration\.db.*readonly.*; give the command again$", str(caught.value))
        assert told.items() <= json.loads(capsys.readouterr().out).items()


def test_the_command_says_that_there_is_no_room_for_the_journal(
    migrating: Migrating, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "state") as disk:
        monkeypatch.setenv("XDG_STATE_HOME", str(disk.path))
        first = write(migrating.source / "first.jpg")
        assert migrating.command("--then", "delete").returncode == 0
        before = small_files(migrating, 150)
        disk.fill()
        for options in (["--then", "delete"], ["--undo"], ["--then", "delete", "--json"]):
            done = migrating.command(*options)
            assert done.returncode == 1, done.stderr
            said = done.stderr.splitlines()
            assert len(said) == 1, done.stderr
            assert contents(migrating.source) == before
            assert "migration.db" in said[0]
            assert "its disk is full" in said[0]
            assert said[0].endswith("Make room there; give the command again")
            assert {**contents(migrating.to), **contents(migrating.source)} == {**before, "first.jpg": b"content"}
        disk.free()
        done = migrating.command("--then", "delete")
        assert done.returncode == 0, done.stderr
        assert contents(migrating.source) == {}
        assert contents(migrating.to) == {**before, first.name: b"content"}


@pytest.mark.parametrize("point", ["migrate.copied", "migrate.synced", "migrate.recorded"])
def test_a_kill_while_one_batch_is_verified_and_the_next_is_copied(migrating: Migrating, point: str) -> None:
    before = small_files(migrating, 100)
    assert migrating.command("--then", "delete", faults=f"{point}=kill").returncode == -9
    left, there = contents(migrating.source), contents(migrating.to)
    assert set(before.values()) <= set(left.values()) | set(there.values())
    assert left == before
    report = migrating.migrate("delete")
    assert not report.failed + report.left + report.later + report.beside
    assert contents(migrating.to) == before
    assert contents(migrating.source) == {}
    assert parts(migrating) == []
    assert not migrating.undo().failed
    assert contents(migrating.source) == before


# ---- what is refused


def test_an_unmounted_mountpoint_is_never_filled(migrating: Migrating, source: Path, tmp_path: Path) -> None:
    write(source / "a.jpg")
    migrating.mount.stop()
    result = migrating.command()
    assert result.returncode == 4, result.stderr
    assert "not in a mounted esrfs" in result.stderr
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(destination.NotMounted), destination.opened(str(plain / "deeper")):
        pass
    assert os.listdir(plain) == os.listdir(migrating.mount.path) == []


def test_a_dead_mount_is_refused(migrating: Migrating, source: Path) -> None:
    write(source / "a.jpg")
    migrating.mount.kill()
    result = migrating.command()
    assert result.returncode == 4, result.stderr
    assert "does not answer" in result.stderr


def test_a_mount_that_dies_in_the_middle_loses_nothing(migrating: Migrating, source: Path, tmp_path: Path) -> None:
    for number in range(20):
        write(source / f"{number}.jpg", b"%d" % number)
    flag = tmp_path / "flag"
    run = Asking(lambda: migrating.command("--then", "delete", faults=f"migrate.synced=pause:{flag}"))
    with paused_at(flag):
        migrating.mount.kill()
    assert run.result().returncode == 4, run.result().stderr
    assert len(os.listdir(source)) == 20
    migrating.mount.expected.append("a dead mount of esrfs is there")
    migrating.mount.start()
    assert migrating.migrate("delete").touched == 20
    assert contents(migrating.to) == {f"{number}.jpg": b"%d" % number for number in range(20)}


def test_one_within_the_other_is_refused(mounted: Mounted, tmp_path: Path) -> None:
    write(mounted.path / "in" / "a.jpg")
    write(tmp_path / "plain" / "a.jpg")
    for source in (mounted.path / "in", mounted.path, mounted.store, mounted.store / "in", tmp_path):
        with pytest.raises(Refused):
            Migrating(source, mounted, "to").migrate("delete")
    os.symlink(mounted.store / "in", tmp_path / "by a symlink")
    with pytest.raises(Refused):
        Migrating(tmp_path / "by a symlink", mounted, "to").migrate("delete")
    assert contents(mounted.path) == {"in/a.jpg": b"content"}


@pytest.mark.parametrize("quiet", [0.0, 2.0])
def test_what_becomes_a_store_or_a_view_after_it_was_walked_stays(
    migrating: Migrating, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: float
) -> None:
    """While the migration waits to be allowed, and (``quiet``) while the files settle."""
    for name in ("a.jpg", "b/p.jpg", "b/q.jpg", "c/p.jpg"):
        write(migrating.source / name)
    (tmp_path / "family").mkdir()
    family = Mounted(tmp_path / "family")
    family.path = migrating.source / "c"
    write(family.store / "p.jpg", b"in the view")
    whose, step = (Settling, "take") if quiet else (Migration, "_check_room")
    as_ever = getattr(whose, step)

    def meanwhile(*arguments: Any) -> Any:
        if not destination.views_below(str(migrating.source)):
            init(str(migrating.source / "b"))
            os.rename(family.path, tmp_path / "away")
            family.path.mkdir()
            family.start()
        return as_ever(*arguments)

    monkeypatch.setattr(whose, step, meanwhile)
    try:
        report = migrating.migrate("delete", quiet=quiet)
        assert contents(migrating.to) == {"a.jpg": b"content"}
        assert contents(migrating.source / "b").keys() >= {"p.jpg", "q.jpg"}
        assert contents(family.store)["p.jpg"] == b"in the view"
        assert {note.path: note.reason for note in report.failed} == {"b": STORE, "c": VIEW}
        assert len(report.failed) == 2, "each is named once"
    finally:
        family.clean_up()


@contextlib.contextmanager
def alias(of: Path, at: Path) -> Iterator[None]:
    """A folder under a second path, as network shares and containers give it, too."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", of, at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a folder a second time")
@pytest.mark.parametrize("then", ["delete", "trash", "symlink"])
@pytest.mark.parametrize("seen_alike", [True, False])
def test_a_source_that_is_its_own_copy_stays(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, then: config.Then, seen_alike: bool
) -> None:
    """A folder of the store, by another path: each file lies in the destination already, since it is that.
    ``seen_alike``: the two show the same inode and times, which network filesystems need not."""
    below = migrating.mount.store / "in"
    write(below / "a.jpg")
    write(below / "b.jpg")
    os.link(below / "b.jpg", below / "c.jpg")
    os.symlink("a.jpg", below / "link")
    if not seen_alike:
        monkeypatch.setattr("esrfs_daemon.touching._looks_the_same", lambda one, other: False)
    with alias(below, migrating.source):
        report = migrating.migrate(then)
        assert {note.path for note in report.left} == {"a.jpg", "b.jpg", "c.jpg"} | (
            {"link"} if then != "symlink" else set()
        )
        if then != "trash":  # whose folder is beyond a mount here, so that nothing could get there
            assert all("another path" in note.reason for note in report.left)
        assert report.touched == 0
    assert contents(below) == {"a.jpg": b"content", "b.jpg": b"content", "c.jpg": b"content", "link": b"-> a.jpg"}
    assert parts(migrating) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a folder a second time")
def test_a_blob_is_no_original_wherever_it_lies(quick: QuickMounted, tmp_path: Path) -> None:
    """A store's folder by a path that doesn't tell that it is one: a share, a bind mount, a backup."""
    quick.start()
    (quick.path / "old").mkdir()
    (quick.path / "old" / "a.jpg").write_bytes(photo())
    assert quick.compact()["compacted"] == 1
    before = contents(quick.store / "old")
    (tmp_path / "source").mkdir()
    migrating = Migrating(tmp_path / "source", quick)
    with alias(quick.store / "old", migrating.source):
        report = migrating.migrate("delete")
        assert [note.path for note in report.left] == ["a.jpg"]
        assert "in the place of a photograph" in report.left[0].reason
    assert contents(quick.store / "old") == before


def test_one_source_is_migrated_by_one_process(migrating: Migrating) -> None:
    with migrating.prepared(), pytest.raises(Busy):
        migrating.migrate()


# ---- gently


def test_a_rate_is_kept(migrating: Migrating) -> None:
    write(migrating.source / "a.jpg", os.urandom(3 << 20))
    began = time.monotonic()
    migrating.migrate(limits=config.Throttle(bytes_per_second="2M", min_free=0, on_battery=True))
    assert 1.0 < time.monotonic() - began < 10


def test_the_floor_of_free_space_is_kept(migrating: Migrating) -> None:
    write(migrating.source / "a.jpg")
    with pytest.raises(NoRoom, match="stay free"):
        migrating.migrate("delete", limits=config.Throttle(min_free="900T", on_battery=True))
    assert contents(migrating.source) == {"a.jpg": b"content"}


def test_a_full_disk_in_the_middle_is_no_loss(migrating: Migrating) -> None:
    for name in "abc":
        write(migrating.source / name)
    result = migrating.command("--then", "delete", faults="migrate.synced=errno:ENOSPC")
    assert result.returncode == 1
    assert "No space left" in result.stderr
    assert sorted(os.listdir(migrating.source)) == ["a", "b", "c"]
    assert os.listdir(migrating.to) == []
    assert migrating.migrate("delete").touched == 3


def test_ctrl_c_ends_between_files(migrating: Migrating) -> None:
    for number in range(200):
        write(migrating.source / f"{number:03}.jpg", os.urandom(20_000))
    before = contents(migrating.source)
    process = subprocess.Popen(
        migrating.arguments("--then", "delete", "--rate", "1M"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: len(os.listdir(migrating.source)) < 200)
    process.send_signal(2)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert b"again to go on" in err
    left = contents(migrating.source)
    assert 0 < len(left) < 200
    assert {**contents(migrating.to), **left} == before
    assert migrating.migrate("delete").touched == len(left)
    assert contents(migrating.to) == before


# ---- crashes


_OF_SOURCES = ("migrate.recorded", "migrate.aside", "migrate.looked", "migrate.touched")


@pytest.mark.parametrize(
    ("then", "points"),
    [
        ("delete", FAULT_POINTS),
        pytest.param("trash", _OF_SOURCES, marks=pytest.mark.slow),
        pytest.param("symlink", _OF_SOURCES, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_each_step_loses_nothing_and_the_next_run_finishes(
    migrating: Migrating, then: config.Then, points: tuple[str, ...]
) -> None:
    for point in points:
        base = migrating.source / point
        expected = {}
        for number in range(3):
            write(base / f"{number}.jpg", f"{then} {point} {number}".encode())
            expected[f"{number}.jpg"] = (base / f"{number}.jpg").read_bytes()
        result = migrating.command("--then", then, faults=f"{point}=kill")
        assert result.returncode == -9, (point, result.stderr)
        held = set(contents(base).values()) | set(contents(migrating.to).values())
        assert set(expected.values()) <= held, point
        report = migrating.migrate(then)
        assert not report.failed + report.left + report.later + report.beside, point
        assert contents(migrating.to / point) == expected, point
        if then == "symlink":
            assert {os.readlink(base / name) for name in expected} == {
                str(migrating.to / point / name) for name in expected
            }
        else:
            assert contents(base) == {}, point
        assert [path.name for path in migrating.source.rglob(".esrfs-*")] == []
        assert [path.name for path in migrating.mount.store.rglob(".esrfs-*")] == []
        undone = migrating.undo()
        assert not undone.failed + undone.kept, (point, undone)
        assert contents(base) == expected
        assert contents(migrating.to) == {}, point
        shutil.rmtree(base)


def replaced(folder: Path, by: str) -> Callable[[], None]:
    """Put something else in the place of a folder; what puts it back."""
    away = folder.parent.parent / f"{folder.name} (moved)"
    os.rename(folder, away)
    if by == "symlink":
        folder.symlink_to(away)
    elif by == "file":
        folder.write_bytes(b"a file")

    def back() -> None:
        with contextlib.suppress(FileNotFoundError):
            folder.unlink()
        os.rename(away, folder)

    return back


@pytest.mark.parametrize("by", ["symlink", "file"])
def test_a_part_that_a_crash_left_where_no_folder_is_any_more_holds_nothing_up(migrating: Migrating, by: str) -> None:
    write(migrating.source / "2024" / "a.jpg")
    assert migrating.command("--then", "delete", faults="migrate.copied=kill").returncode == -9
    (part,) = parts(migrating)
    back = replaced(migrating.to / "2024", by)
    write(migrating.source / "other.jpg")
    result = migrating.command("--then", "delete")
    assert result.returncode == 1
    assert (migrating.to / "other.jpg").exists(), "the others go"
    assert part in result.stderr, "what people may delete"
    assert contents(migrating.source) == {"2024/a.jpg": b"content"}
    assert part not in migrating.command("--then", "delete").stderr, "told once"
    undone = migrating.undo()
    assert [(note.path, part in note.reason) for note in undone.failed] == [("2024/a.jpg", True)]
    back()
    assert not migrating.migrate("delete").failed
    assert parts(migrating) == []
    assert contents(migrating.to) == {"2024/a.jpg": b"content", "other.jpg": b"content"}


@pytest.mark.parametrize("then", ["delete", "symlink"])
@pytest.mark.parametrize("by", ["symlink", "file"])
def test_a_source_that_a_crash_left_aside_where_no_folder_is_any_more_holds_nothing_up(
    migrating: Migrating, then: config.Then, by: str
) -> None:
    write(migrating.source / "2024" / "a.jpg")
    assert migrating.command("--then", then, faults="migrate.looked=kill").returncode == -9
    (aside,) = (migrating.source / "2024").glob(".esrfs-*.taken")
    back = replaced(migrating.source / "2024", by)
    write(migrating.source / "other.jpg")
    result = migrating.command("--then", then)
    assert result.returncode == 1
    assert contents(migrating.to)["other.jpg"] == b"content", "the others go"
    assert aside.name in result.stderr, "people are told where the file is"
    assert str(migrating.to / "2024" / "a.jpg") in result.stderr, "and its copy"
    assert aside.name not in migrating.command("--then", then).stderr, "told once"
    undone = migrating.undo()
    assert any(note.path == "2024/a.jpg" and "put the folder back" in note.reason.lower() for note in undone.failed)
    assert contents(migrating.to) == {"2024/a.jpg": b"content"}
    back()
    assert not migrating.migrate(then).failed
    assert parts(migrating) == []
    assert (migrating.source / "2024" / "a.jpg").is_symlink() == (then == "symlink")
    assert not migrating.undo().failed
    assert contents(migrating.source) == {"2024/a.jpg": b"content", "other.jpg": b"content"}
    assert contents(migrating.to) == {}


def test_a_source_that_a_crash_left_aside_in_a_folder_that_was_renamed_is_named(migrating: Migrating) -> None:
    write(migrating.source / "2024" / "a.jpg")
    assert migrating.command("--then", "delete", faults="migrate.looked=kill").returncode == -9
    os.rename(migrating.source / "2024", migrating.source / "Italy")
    (aside,) = (migrating.source / "Italy").glob(".esrfs-*.taken")
    for _ in range(2):
        report = migrating.migrate("delete")
        assert [note.path for note in report.failed] == [f"Italy/{aside.name}"]
        assert "rename it" in report.failed[0].reason
    os.rename(aside, aside.with_name("a.jpg"))
    assert not migrating.migrate("delete").failed
    assert contents(migrating.to) == {"2024/a.jpg": b"content", "Italy/a.jpg": b"content"}


def test_a_source_that_a_crash_left_aside_on_a_card_is_put_back_when_that_comes_again(migrating: Migrating) -> None:
    write(migrating.source / "card" / "a.jpg")
    assert migrating.command("--then", "delete", faults="migrate.looked=kill").returncode == -9
    back = replaced(migrating.source / "card", "nothing")
    write(migrating.source / "other.jpg")
    assert migrating.command("--then", "delete").returncode == 0
    back()
    assert not migrating.migrate("keep").failed
    assert contents(migrating.source) == {"card/a.jpg": b"content"}
    assert contents(migrating.to) == {"card/a.jpg": b"content", "other.jpg": b"content"}


@pytest.mark.parametrize("state", ["begun", "verified"])
def test_what_cannot_be_put_right_after_a_crash_is_tried_again(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """A disk that fails, say: others are migrated, and --undo leaves it alone."""
    write(migrating.source / "2024" / "a.jpg")
    point = "migrate.copied" if state == "begun" else "migrate.looked"
    assert migrating.command("--then", "delete", faults=f"{point}=kill").returncode == -9
    write(migrating.source / "other.jpg")
    as_ever = recovery.beneath

    def fails(root: int, path: str, flags: int) -> int:
        if path == "2024":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return as_ever(root, path, flags)

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "beneath", fails)
        for _ in range(2):
            report = migrating.migrate("keep")
            assert any(note.path == "2024/a.jpg" and "tries again" in note.reason for note in report.failed)
            assert contents(migrating.to).keys() >= {"other.jpg"}
        undone = migrating.undo()
        assert [(note.path, "tries again" in note.reason) for note in undone.failed] == [("2024/a.jpg", True)]
        assert contents(migrating.source)["other.jpg"] == b"content"
    report = migrating.migrate("delete")
    assert not report.failed + report.left + report.later
    assert contents(migrating.source) == {}
    assert contents(migrating.to) == {"2024/a.jpg": b"content", "other.jpg": b"content"}
    assert [path.name for path in migrating.mount.store.rglob(".esrfs-*")] == []


def test_a_part_in_another_destination_waits_for_that(migrating: Migrating, source: Path) -> None:
    write(migrating.source / "a.jpg")
    assert migrating.command(faults="migrate.copied=kill").returncode == -9
    elsewhere = Migrating(source, migrating.mount, "elsewhere")
    assert not elsewhere.migrate().failed
    assert len(parts(migrating)) == 1
    migrating.migrate()
    assert parts(migrating) == []


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_kills_at_random_while_sources_are_deleted(migrating: Migrating, kills: int) -> None:
    """At every moment each file's bytes exist in the source, the destination, or both."""
    generator = random.Random(kills)
    originals: dict[str, str] = {}

    def refill() -> None:
        for _ in range(40):
            name = f"{len(originals):05}.jpg"
            content = name.encode() + generator.randbytes(generator.randrange(200_000))
            write(migrating.source / str(len(originals) % 5) / name, content)
            originals[name] = hashlib.sha256(content).hexdigest()

    def check() -> None:
        held = set()
        for folder in (migrating.source, migrating.to):
            held |= {hashlib.sha256(content).hexdigest() for content in contents(folder).values()}
        lost = [name for name, digest in originals.items() if digest not in held]
        assert not lost

    for _ in range(kills):
        if len(contents(migrating.source)) < 20:
            refill()
        process = subprocess.Popen(
            migrating.arguments("--then", "delete"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(0.3 + generator.random() * 1.2)
        process.kill()
        process.communicate()
        check()
    report = migrating.migrate("delete")
    check()
    assert not report.failed + report.left + report.later
    assert contents(migrating.source) == {}
    assert {hashlib.sha256(content).hexdigest() for content in contents(migrating.to).values()} == set(
        originals.values()
    )
    assert len(contents(migrating.to)) == len(originals), "nothing is there twice"


def test_a_damaged_journal_is_put_aside(migrating: Migrating, expect_log: Callable[[str], None]) -> None:
    expect_log("is damaged")
    for name in "abcdef":
        write(migrating.source / name, name.encode())
    migrating.migrate()
    path = Journal().path
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    report = migrating.migrate("delete")
    assert (report.existing, report.copied, report.touched) == (6, 0, 6)
    assert len(list(path.parent.glob("*.damaged-*"))) >= 1
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    assert migrating.migrate().unchanged == 0


# ---- the way back


@pytest.mark.parametrize("then", ["keep", "trash", "delete", "symlink"])
def test_undo_puts_everything_back(migrating: Migrating, then: config.Then) -> None:
    odd_tree(migrating.source, files=20)
    write(migrating.to / "there before.jpg", b"there before")
    write(migrating.source / "there before.jpg", b"there before")
    write(migrating.to / "plain.jpg", b"other")
    before = full_look(migrating.source)
    there = full_look(migrating.to)
    migrating.migrate(then)
    report = migrating.undo()
    assert not report.failed + report.kept
    assert full_look(migrating.source) == before
    assert full_look(migrating.to) == there
    assert (migrating.source / "plain.jpg").stat().st_ino == (migrating.source / "zz.jpg").stat().st_ino
    again = migrating.undo()
    assert (again.restored, again.removed) == (0, 0)
    assert migrating.migrate(then).failed == []


def test_undo_leaves_what_people_changed(migrating: Migrating) -> None:
    for name in "abc":
        write(migrating.source / name, b"original " + name.encode())
    migrating.migrate("delete")
    write(migrating.to / "a", b"edited in the mount")
    write(migrating.source / "b", b"something new")
    report = migrating.undo()
    assert {note.path for note in report.failed} == {"a", "b"}
    assert contents(migrating.source) == {"b": b"something new", "c": b"original c"}
    assert contents(migrating.to) == {"a": b"edited in the mount", "b": b"original b"}


@pytest.mark.parametrize("how", ["saved anew", "written in place", "open for writing"])
def test_undo_leaves_what_is_saved_in_the_last_moment(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """After its copy was proved to hold the old bytes, and before its name goes."""
    write(migrating.source / "a.jpg", b"before!")
    os.symlink("before", migrating.source / "link")
    migrating.migrate()
    copy = migrating.to / "a.jpg"
    real = undo.prove
    with contextlib.ExitStack() as editor:

        def prove_and_save(fd: int, sha256: bytes) -> str:
            proof = real(fd, sha256)
            if how == "saved anew":
                write(migrating.to / ".new", b"edited!")
                os.rename(migrating.to / ".new", copy)
            elif how == "written in place":
                before = os.fstat(fd).st_mtime_ns
                with open(copy, "r+b") as file:
                    file.write(b"edited!")
                os.utime(copy, ns=(before, before))
            else:
                editor.enter_context(open(copy, "r+b"))
            return proof

        monkeypatch.setattr(undo, "prove", prove_and_save)
        report = migrating.undo()
    assert [note.path for note in report.kept] == ["a.jpg"]
    assert str(copy) in report.kept[0].reason
    assert not report.failed
    assert contents(migrating.source) == {"a.jpg": b"before!", "link": b"-> before"}
    assert contents(migrating.to) == {"a.jpg": b"before!" if how == "open for writing" else b"edited!"}
    monkeypatch.setattr(undo, "prove", real)
    again = migrating.undo()
    assert (again.removed, len(again.kept)) == ((1, 0) if how == "open for writing" else (0, 1))


def test_undo_leaves_a_symlink_that_is_changed_in_the_last_moment(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.symlink("before", migrating.source / "link")
    migrating.migrate()
    real = sources.delete

    def save_and_delete(*arguments: Any) -> None:
        os.symlink("edited", migrating.to / "new")
        os.rename(migrating.to / "new", migrating.to / "link")
        real(*arguments)

    monkeypatch.setattr(sources, "delete", save_and_delete)
    report = migrating.undo()
    assert [note.path for note in report.kept] == ["link"]
    assert contents(migrating.to) == {"link": b"-> edited"}
    assert contents(migrating.source) == {"link": b"-> before"}


def test_undo_leaves_a_file_that_takes_the_place_of_our_symlink_in_the_last_moment(
    migrating: Migrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(migrating.source / "a.jpg", b"before")
    migrating.migrate("symlink")
    real = os.readlink

    def read_and_save(path: Any, **named: Any) -> str:
        target = real(path, **named)
        if sys._getframe(1).f_code.co_name == "_give_name":
            write(migrating.source / ".new", b"edited")
            os.rename(migrating.source / ".new", migrating.source / "a.jpg")
        return target

    monkeypatch.setattr(os, "readlink", read_and_save)
    report = migrating.undo()
    assert [note.path for note in report.failed] == ["a.jpg"]
    assert contents(migrating.source) == {"a.jpg": b"edited"}
    assert contents(migrating.to) == {"a.jpg": b"before"}


def test_a_kill_while_undo_removes_a_copy_hides_nothing(migrating: Migrating) -> None:
    write(migrating.source / "sub" / "a.jpg", b"mine")
    migrating.migrate()
    killed = migrating.command("--undo", faults="migrate.aside=kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.suffix for path in (migrating.to / "sub").iterdir()] == [".taken"]
    (migrating.source / "sub" / "a.jpg").unlink()
    report = migrating.undo()
    assert not report.failed + report.kept
    assert contents(migrating.source) == {"sub/a.jpg": b"mine"}
    assert list(migrating.to.iterdir()) == []


def test_undo_brings_compacted_originals_back(quick: QuickMounted, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "a.jpg", photo(0))
    write(source / "b.jpg", photo(1))
    quick.start()
    migrating = Migrating(source, quick, "deep/in")
    migrating.migrate("delete")
    quick.compact("deep/in/a.jpg")
    assert quick.explain("deep/in/a.jpg")["state"] == "blob"
    assert (migrating.to / "a.jpg").read_bytes() != photo(0)
    report = migrating.undo()
    assert not report.failed + report.kept, report
    assert contents(source) == {"a.jpg": photo(0), "b.jpg": photo(1)}
    assert contents(migrating.to) == {}


def test_undo_says_what_can_not_be_brought_back(quick: QuickMounted, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "a.jpg", photo(0))
    quick.start()
    migrating = Migrating(source, quick)
    migrating.migrate("delete")
    quick.compact("in/a.jpg")
    for kept in quick.reserved("originals").iterdir():
        kept.unlink()
    report = migrating.undo()
    assert "not in the store's undo window any more" in report.failed[0].reason
    assert os.listdir(source) == []
    assert (migrating.to / "a.jpg").exists()


def test_a_photograph_that_is_there_compacted_counts_as_there_while_its_original_is(
    quick: QuickMounted, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    quick.start()
    write(quick.path / "in" / "a.jpg", photo(0))
    quick.compact("in/a.jpg")
    write(source / "a.jpg", photo(0))
    migrating = Migrating(source, quick)
    report = migrating.migrate("delete")
    assert (report.existing, report.touched) == (1, 1)
    write(source / "a.jpg", photo(0), mtime=1_300_000_000)
    for kept in quick.reserved("originals").iterdir():
        kept.unlink()
    report = migrating.migrate("delete")
    assert (report.existing, report.touched) == (1, 0)
    assert "not in the undo window" in report.left[0].reason
    assert (source / "a.jpg").read_bytes() == photo(0)


# ---- the command


def test_the_command_tells_what_it_did(migrating: Migrating) -> None:
    write(migrating.source / "a.jpg")
    write(migrating.source / "b.jpg")
    dry = migrating.command("--dry-run", "--json")
    assert json.loads(dry.stdout)["files"] == 2
    assert not migrating.to.exists()
    done = migrating.command("--json", "--then", "delete")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["copied"], report["touched"], report["failed"], report["complete"]) == (2, 2, [], True)
    text = migrating.command("--then", "delete").stdout
    assert "migrated" in text
    undone = json.loads(migrating.command("--undo", "--json").stdout)
    assert undone["restored"] == undone["removed"] == 2
    assert migrating.command("--rate", "fast").returncode == 2
    os.rmdir(migrating.to) if migrating.to.exists() else None
    missing = Migrating(migrating.source / "nowhere", migrating.mount).command()
    assert (missing.returncode, "No such file" in missing.stderr) == (1, True)


def test_stop_is_heard_before_anything_is_done(migrating: Migrating) -> None:
    write(migrating.source / "a.jpg")
    migrating.stop.set()
    with pytest.raises(Stopped):
        migrating.migrate("delete")
    assert contents(migrating.source) == {"a.jpg": b"content"}


def test_a_mount_that_ends_is_an_error_of_its_own(migrating: Migrating) -> None:
    """Not one of each file: a thousand lines would hide what is wrong."""
    for number in range(10):
        write(migrating.source / f"{number}.jpg")
    with migrating.prepared() as work:
        migrating.mount.kill()
        with pytest.raises((DestinationLost, OSError)) as caught:
            work.migrate("delete")
        assert isinstance(caught.value, DestinationLost) or caught.value.errno == errno.ENOTCONN
    assert len(os.listdir(migrating.source)) == 10
