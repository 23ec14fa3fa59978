"""Every operation of a normal filesystem, on a real mount, as it is on the filesystem of the store."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import photograph
from tests.mounting import Mounted
from tests.twin import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    UTIME_NOW,
    UTIME_OMIT,
    Shared,
    Twin,
    attempt,
    check_nothing_leaked,
    descriptors,
    fallocate,
    getxattr_into,
    listed,
    listxattr_into,
    opened,
    renameat2,
    same,
    shared_mount,
    tree,
    utimensat,
)

pytestmark = pytest.mark.mount

RW = os.O_RDWR | os.O_CREAT
NOBODY = 65534
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_COLLAPSE, FALLOC_ZERO = 1, 2, 8, 16


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None:
        pytest.skip("FUSE can't be used here")
    with shared_mount(tmp_path_factory.mktemp("shared")) as started:
        yield started


@pytest.fixture
def mount(shared: Shared, monkeypatch: pytest.MonkeyPatch, _own_directories: None) -> Mounted:
    """The module's mount; use names of your own."""
    return shared.adopt(monkeypatch)


@pytest.fixture
def twin(mount: Mounted, request: pytest.FixtureRequest) -> Twin:
    name = request.node.name.replace("/", "_")[:100]
    native = mount.store.parent / "native" / name
    native.mkdir(parents=True)
    (mount.path / name).mkdir()
    return Twin(native, mount.path / name, mount.store / name)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def as_nobody(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a child process with the ids of nobody; what it returns, or a text that says how it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(writer, json.dumps(work()).encode())
        except BaseException as error:
            os.write(writer, json.dumps(f"failed: {error!r}").encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = json.load(pipe)
    os.waitpid(child, 0)
    return found


# ---- files and their content


def test_create(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        seen = []
        for umask in (0o000, 0o022, 0o077):
            before = os.umask(umask)
            try:
                with opened(root / f"file {umask:o}", RW | os.O_EXCL, 0o7777):
                    pass
                os.mkdir(root / f"directory {umask:o}", 0o3777)
                os.mkfifo(root / f"fifo {umask:o}", 0o666)
            finally:
                os.umask(before)
        seen.append(attempt(os.open, root / "file 0", RW | os.O_EXCL))
        seen.append(attempt(os.open, root / "absent", os.O_RDWR))
        seen.append(attempt(os.open, root / "absent" / "file", RW))
        seen.append(attempt(os.open, root / "file 0" / "file", RW))
        seen.append(attempt(os.open, root, os.O_RDWR))
        seen.append(attempt(os.open, root / "file 0", os.O_RDONLY | os.O_DIRECTORY))
        with opened(root / "file 0", os.O_WRONLY | os.O_TRUNC) as file:
            seen.append(attempt(os.read, file, 1))
            os.write(file, b"some content")
        with opened(root / "file 0", os.O_RDONLY) as file:
            seen.append(attempt(os.write, file, b"x"))
            seen.append(attempt(os.ftruncate, file, 0))
        with opened(root / "file 22", RW, 0o000) as file:
            seen.append(os.fstat(file).st_mode)
        return seen

    same(twin, scenario)


def test_a_file_created_without_rights_is_written_all_the_same(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        with opened(root / "file", RW | os.O_EXCL, 0o000) as file:
            os.write(file, b"content")
            return os.fstat(file).st_mode, os.pread(file, 10, 0)

    same(twin, scenario)


def test_truncating_at_open_also_when_only_read(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(b"content")
        with opened(root / "file", os.O_RDONLY | os.O_TRUNC) as file:
            return os.fstat(file).st_size, os.read(file, 10)

    same(twin, scenario)


def test_write_read_append(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        block = bytes(range(256)) * 1024
        with opened(root / "file", RW) as file, opened(root / "file", os.O_WRONLY | os.O_APPEND) as end:
            os.write(file, block)
            os.pwrite(file, b"behind the end", len(block) + 5000)
            os.write(end, b"appended")
            os.pwrite(end, b"appended too, says Linux", 3)
            os.pwrite(file, b"in the middle", 77_777)
            os.pwritev(file, [b"one", b"two", b"three"], 5)
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
            os.write(file, b"now at the end")
            fcntl.fcntl(file, fcntl.F_SETFL, 0)
            os.pwrite(file, b"not at the end", 9)
            seen = [os.fstat(file).st_size, os.lseek(file, 0, os.SEEK_END), os.pread(file, 99, 10**9)]
        return seen, hashlib.sha256((root / "file").read_bytes()).hexdigest()

    same(twin, scenario)


def test_append_of_two_processes_loses_nothing(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        script = "import os,sys\nfd=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND|os.O_CREAT)\n"
        script += "for i in range(200): os.write(fd, (sys.argv[2]*31+'\\n').encode())\n"
        children = [subprocess.Popen([sys.executable, "-c", script, str(root / "log"), name]) for name in "ab"]
        assert [child.wait() for child in children] == [0, 0]
        return sorted((root / "log").read_text().split())

    expected = scenario(twin.native)
    assert scenario(twin.mounted) == expected


def test_append_goes_to_the_end_that_the_store_knows(twin: Twin) -> None:
    # By another name of a hard link, or from another machine, the file may have grown since the kernel looked.
    (twin.mounted / "one").write_bytes(b"first ")
    os.link(twin.mounted / "one", twin.mounted / "two")
    with (
        opened(twin.mounted / "one", os.O_WRONLY | os.O_APPEND) as one,
        opened(twin.mounted / "two", os.O_WRONLY | os.O_APPEND) as two,
    ):
        os.write(one, b"second ")
        os.write(two, b"third ")
        os.write(one, b"fourth")
    assert (twin.stored / "one").read_bytes() == b"first second third fourth"


def test_shared_mapping_beside_an_appending_handle(twin: Twin) -> None:
    # The kernel writes dirty pages through any writable handle: one that appends must not move them to the end.
    (twin.mounted / "file").write_bytes(bytes(10_000))
    with (
        opened(twin.mounted / "file", os.O_WRONLY | os.O_APPEND) as end,
        opened(twin.mounted / "file", os.O_RDWR) as file,
        opened(twin.mounted / "file", os.O_WRONLY | os.O_APPEND) as end_too,
    ):
        with mmap.mmap(file, 10_000) as pages:
            pages[100:105] = b"pages"
            pages.flush()
        os.write(end, b"end")
        os.write(end_too, b"end")
    content = (twin.stored / "file").read_bytes()
    assert content == bytes(100) + b"pages" + bytes(9_895) + b"endend"


def test_truncate_and_fallocate(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(bytes(range(256)) * 256)
        seen: list[Any] = []
        os.truncate(root / "file", 50_000)
        with opened(root / "file", os.O_RDWR) as file:
            for action in (
                lambda: os.ftruncate(file, 45_000),
                lambda: os.ftruncate(file, 60_000),
                lambda: os.truncate(root / "file", 59_000),
                lambda: fallocate(file, 0, 0, 70_000),
                lambda: fallocate(file, FALLOC_KEEP_SIZE, 0, 90_000),
                lambda: fallocate(file, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, 8192, 8192),
                lambda: fallocate(file, FALLOC_ZERO, 20_000, 3_000),
                lambda: fallocate(file, FALLOC_ZERO, 69_000, 3_000),
                lambda: fallocate(file, 0, 0, 0),
                lambda: fallocate(file, 0, -1, 5),
                lambda: os.posix_fallocate(file, 0, 100_000),
                lambda: os.ftruncate(file, -1),
            ):
                seen += [attempt(action), os.fstat(file).st_size, hashlib.sha256(os.pread(file, 10**6, 0)).hexdigest()]
        with opened(root / "file", os.O_RDONLY) as file:
            seen.append(attempt(fallocate, file, 0, 0, 10))
        seen.append(attempt(os.truncate, root / "absent", 5))
        seen.append(attempt(os.truncate, root, 5))
        return seen

    same(twin, scenario)


def test_a_mode_of_fallocate_that_fuse_lacks_is_refused_and_changes_nothing(twin: Twin) -> None:
    (twin.mounted / "file").write_bytes(b"x" * 20_000)
    with opened(twin.mounted / "file", os.O_RDWR) as file:
        assert attempt(fallocate, file, FALLOC_COLLAPSE, 0, 4096) == "ENOTSUP"
    assert (twin.stored / "file").read_bytes() == b"x" * 20_000


def test_holes(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        with opened(root / "file", RW) as file:
            os.pwrite(file, b"x" * 65536, 1 << 20)
            os.pwrite(file, b"x" * 65536, 3 << 20)
            os.ftruncate(file, 5 << 20)
            os.fsync(file)
            seen = []
            for offset in (0, 1 << 20, (1 << 20) + 70_000, 3 << 20, 4 << 20, 5 << 20, 6 << 20, -1):
                for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                    seen.append(attempt(os.lseek, file, offset, whence))
            return seen, os.fstat(file).st_blocks, os.stat(root / "file").st_blocks

    same(twin, scenario)


def test_mapped_writes_are_in_the_store(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(bytes(200_000))
        with opened(root / "file", os.O_RDWR) as file:
            with mmap.mmap(file, 0) as pages:
                pages[0:5] = b"first"
                pages[150_000:150_006] = b"second"
                pages.flush()
                seen = [os.pread(file, 6, 150_000)]
                os.pwrite(file, b"written", 70_000)
                seen.append(pages[70_000:70_007])
            os.fsync(file)
        with (
            opened(root / "file", os.O_RDONLY) as file,
            mmap.mmap(file, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as pages,
        ):
            pages[0:5] = b"mine!"
        return seen, hashlib.sha256((root / "file").read_bytes()).hexdigest()

    same(twin, scenario)
    before = (twin.native / "file").stat().st_mtime_ns
    assert abs((twin.mounted / "file").stat().st_mtime_ns - before) < 60 * 10**9


def test_direct_io(twin: Twin) -> None:
    # The mount's own open strips O_DIRECT, which would ask for aligned memory.
    def scenario(root: Path) -> Any:
        with mmap.mmap(-1, 8192) as aligned:
            aligned[:] = b"direct! " * 1024
            with opened(root / "file", RW | os.O_DIRECT) as file:
                seen = [os.writev(file, [aligned]), os.preadv(file, [aligned], 4096), os.fstat(file).st_size]
        return seen, (root / "file").read_bytes()

    same(twin, scenario)


def test_open_flags(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(b"content")
        os.symlink("file", root / "link")
        os.symlink("nowhere", root / "dangling")
        os.mkdir(root / "directory")
        seen: list[Any] = []
        for name in ("file", "link", "dangling", "directory"):
            for flags in (
                os.O_RDONLY,
                os.O_RDONLY | os.O_NOFOLLOW,
                os.O_PATH | os.O_NOFOLLOW,
                os.O_RDONLY | os.O_NOATIME,
            ):
                descriptor = attempt(os.open, root / name, flags)
                if isinstance(descriptor, int):
                    seen.append(stat.S_IFMT(os.fstat(descriptor).st_mode))
                    os.close(descriptor)
                else:
                    seen.append(descriptor)
        seen.append(attempt(os.open, root / "dangling", RW | os.O_EXCL))
        os.close(os.open(root / "dangling", RW, 0o640))
        seen.append(sorted(os.listdir(root)))
        with opened(root / "file", os.O_WRONLY | os.O_SYNC) as file:
            os.write(file, b"synchronous")
        return seen

    same(twin, scenario)


def test_sync(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        with opened(root / "file", RW) as file:
            os.write(file, b"content")
            seen = [attempt(os.fsync, file), attempt(os.fdatasync, file)]
        with opened(root, os.O_RDONLY | os.O_DIRECTORY) as directory:
            seen += [attempt(os.fsync, directory), attempt(os.fdatasync, directory)]
        return seen

    same(twin, scenario)


def test_copies_inside_the_kernel(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        content = os.urandom(16) * 20_000
        (root / "source").write_bytes(content)
        with opened(root / "source", os.O_RDONLY) as source, opened(root / "target", RW) as target:
            copied = 0
            while copied < len(content):
                copied += os.copy_file_range(source, target, len(content) - copied)
            with opened(root / "sent", RW) as sent:
                offset = 0
                while offset < len(content):
                    offset += os.sendfile(sent, source, offset, len(content) - offset)
        return (root / "target").read_bytes() == content == (root / "sent").read_bytes()

    assert scenario(twin.native)
    assert scenario(twin.mounted)


def test_what_was_closed_is_there_at_once(twin: Twin) -> None:
    # `release` is asynchronous to `close`.
    for number in range(300):
        content = f"{number} ".encode() * 1000
        (twin.mounted / "file").write_bytes(content)
        assert (twin.mounted / "file").stat().st_size == len(content)
        assert (twin.mounted / "file").read_bytes() == content
        assert (twin.stored / "file").read_bytes() == content


def test_times_set_after_close_stay(twin: Twin) -> None:
    # A release that comes late must not count as a change of content (Finder and rsync set times after close).
    for number in range(50):
        path = twin.mounted / f"file {number}"
        path.write_bytes(b"x" * 5000)
        os.utime(path, ns=(1_000_000_001, 2_000_000_002))
        assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    time.sleep(1.2)
    assert all(path.stat().st_mtime_ns == 2_000_000_002 for path in twin.mounted.iterdir())


# ---- names


def test_rename(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        for name in ("a", "b", "c", "d/inner", "e/inner", "f/x", "full/x"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(name.encode())
        os.mkdir(root / "empty")
        seen: list[Any] = []
        for old, new, flags in (
            ("a", "b", 0),
            ("absent", "x", 0),
            ("b", "c", RENAME_NOREPLACE),
            ("b", "new", RENAME_NOREPLACE),
            ("new", "c", RENAME_EXCHANGE),
            ("c", "absent", RENAME_EXCHANGE),
            ("c", "d", RENAME_EXCHANGE),
            ("d", "c", 0),
            ("e", "f", RENAME_EXCHANGE),
            ("e", "e/below", 0),
            ("e", "full", 0),
            ("e", "empty", 0),
            ("full", "full", 0),
            ("new", "full", 0),
            ("full", "new", 0),
            ("new", "new2", RENAME_EXCHANGE | RENAME_NOREPLACE),
            ("new", "x" * 256, 0),
        ):
            seen.append(attempt(renameat2, root / old, root / new, flags))
            seen.append(tree(root))
        return seen

    same(twin, scenario)


def test_exchange_leaves_each_its_own_content(twin: Twin) -> None:
    # mfusepy drops rename flags: an exchange would return success and destroy the target (DESIGN 10).
    (twin.mounted / "a").write_bytes(b"content of a")
    (twin.mounted / "b").write_bytes(b"another content, of b")
    with opened(twin.mounted / "a", os.O_RDWR) as a, opened(twin.mounted / "b", os.O_RDWR) as b:
        assert os.read(a, 100) + os.read(b, 100)
        renameat2(twin.mounted / "a", twin.mounted / "b", RENAME_EXCHANGE)
        assert os.pread(a, 100, 0) == b"content of a"
        os.pwrite(a, b"CONTENT", 0)
        os.pwrite(b, b"ANOTHER", 0)
    for root in (twin.mounted, twin.stored):
        assert (root / "b").read_bytes() == b"CONTENT of a"
        assert (root / "a").read_bytes() == b"ANOTHER content, of b"
    assert (twin.mounted / "a").stat().st_size == 21


def test_handles_follow_the_file_not_the_name(twin: Twin) -> None:
    # Editors rename files that are still open.
    def scenario(root: Path) -> Any:
        (root / "one" / "two").mkdir(parents=True)
        seen: list[Any] = []
        with opened(root / "one" / "two" / "file", RW) as file:
            os.write(file, b"first")
            os.rename(root / "one" / "two" / "file", root / "one" / "two" / "file~")
            (root / "one" / "two" / "file").write_bytes(b"saved anew")
            os.write(file, b" second")
            os.rename(root / "one", root / "uno")
            os.write(file, b" third")
            os.ftruncate(file, 17)
            os.fchmod(file, 0o640)
            utimensat(file, (1, 5), (2, 6))
            os.setxattr(file, "user.key", b"value")
            seen += [os.fstat(file).st_size, os.fstat(file).st_mtime_ns, os.getxattr(file, "user.key")]
            (root / "other").write_bytes(b"other")
            os.rename(root / "other", root / "uno" / "two" / "file~")
            seen += [os.pread(file, 100, 0), os.fstat(file).st_nlink, attempt(os.write, file, b"!")]
        return seen

    same(twin, scenario)


def test_links(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(b"content")
        os.link(root / "file", root / "hard")
        os.symlink(b"\xff not UTF-8 " + b"x" * 3000, os.fsencode(root / "soft"))
        os.link(root / "soft", root / "hard link of a symlink", follow_symlinks=False)
        with opened(root / "hard", os.O_WRONLY | os.O_APPEND) as file:
            os.write(file, b" and more")
        os.mknod(root / "special", stat.S_IFIFO | 0o600)
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(root)
            server.bind("socket")
        os.chdir("/")
        return [
            (root / "file").stat().st_nlink,
            os.path.samefile(root / "file", root / "hard"),
            attempt(os.link, root / "file", root / "hard"),
            attempt(os.link, root / "absent", root / "new"),
            attempt(os.link, root, root / "new"),
            attempt(os.symlink, "x", root / "soft"),
            attempt(os.readlink, root / "file"),
            os.lstat(root / "soft").st_size,
            attempt(os.stat, root / "soft"),
        ]

    same(twin, scenario)


def test_a_fifo_connects_two_programs(twin: Twin) -> None:
    os.mkfifo(twin.mounted / "fifo")
    reader = threading.Thread(target=lambda: got.append((twin.mounted / "fifo").read_bytes()))
    got: list[bytes] = []
    reader.start()
    (twin.mounted / "fifo").write_bytes(b"through the fifo")
    reader.join(10)
    assert got == [b"through the fifo"]


@pytest.mark.parametrize("delay", [0.0, 1.1], ids=["at once", "after the kernel's attributes expired"])
def test_a_deleted_file_that_is_open_is_a_file(twin: Twin, delay: float) -> None:
    # libfuse's high-level API leaves .fuse_hidden* behind, or with hard_remove fails fstat with ESTALE.
    def scenario(root: Path) -> Any:
        seen: list[Any] = []
        with opened(root / "file", RW) as file:
            os.write(file, b"content")
            os.link(root / "file", root / "other name")
            os.unlink(root / "file")
            time.sleep(delay)
            seen += [os.fstat(file).st_nlink, os.listdir(root)]
            os.unlink(root / "other name")
            time.sleep(1.1)  # each name of a hard link has attributes of its own in the kernel, for a second
            seen += [os.fstat(file).st_size, os.fstat(file).st_nlink, os.listdir(root)]
            os.write(file, b" and more")
            time.sleep(delay)
            seen += [os.fstat(file).st_size, os.pread(file, 100, 0)]
            os.ftruncate(file, 4)
            os.fchmod(file, 0o600)
            os.fchown(file, os.geteuid(), os.getegid())
            utimensat(file, (5, 5), (6, 6))
            os.setxattr(file, "user.key", b"value")
            os.fsync(file)
            with opened(f"/proc/self/fd/{file}", os.O_RDWR) as again:
                seen += [os.fstat(again).st_mtime, os.pread(again, 100, 0), os.pwrite(again, b"CONT", 0)]
            os.close(os.open(root / "file", RW | os.O_EXCL))
            seen += [oct(os.fstat(file).st_mode), os.getxattr(file, "user.key"), listed(file)]
            seen += [os.pread(file, 100, 0), sorted(os.listdir(root)), (root / "file").read_bytes()]
        return seen

    same(twin, scenario)


def test_a_replaced_file_that_is_open_is_a_file(twin: Twin) -> None:
    # An editor saves atomically while another program has the file open.
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(b"old content")
        (root / "new").write_bytes(b"new")
        with opened(root / "file", os.O_RDWR) as file:
            os.rename(root / "new", root / "file")
            seen = [os.fstat(file).st_size, os.fstat(file).st_nlink, os.pread(file, 100, 0), os.listdir(root)]
            os.write(file, b"OLD")
            seen += [os.fstat(file).st_size, os.pread(file, 100, 0), (root / "file").read_bytes()]
        return seen

    same(twin, scenario)


def test_a_rename_that_fails_leaves_the_open_target(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(b"content")
        os.mkdir(root / "directory")
        with opened(root / "file", os.O_RDWR) as file:
            seen = [
                attempt(os.rename, root / "directory", root / "file"),
                attempt(os.rename, root / "absent", root / "file"),
                attempt(renameat2, root / "directory", root / "file", RENAME_NOREPLACE),
            ]
            return seen, os.fstat(file).st_nlink, (root / "file").read_bytes()

    same(twin, scenario)


def test_names_that_libfuse_uses_are_ordinary_names(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        names = [".fuse_hidden0000000500000001", ".fuse_hidden", ".fuse_hiddenxxxxxxxxxxxxxxxx"]
        for name in names:
            (root / "temporary").write_bytes(name.encode())
            os.rename(root / "temporary", root / name)
        with opened(root / names[0], os.O_RDWR) as file:
            os.rename(root / names[0], root / ".fuse_hidden00000005ffffffff")
            os.write(file, b"!")
            return [os.fstat(file).st_nlink, sorted(os.listdir(root))]

    same(twin, scenario)


def test_a_program_may_give_an_open_file_the_name_that_libfuse_would_give_next(twin: Twin) -> None:
    """It is no deletion, though it looks like libfuse's: same folder, an open file, a number that may be next."""
    with opened(twin.mounted / "file", RW) as file:
        os.write(file, b"content")
        name = "file"
        for number in range(1, 40):
            new = f".fuse_hidden{number:08x}{number:08x}"
            os.rename(twin.mounted / name, twin.mounted / new)
            name = new
    os.rename(twin.mounted / name, twin.mounted / f"{name[:-8]}{40:08x}")  # closed just now
    time.sleep(1.2)
    assert os.listdir(twin.mounted) == os.listdir(twin.stored) == [f"{name[:-8]}{40:08x}"]
    assert (twin.mounted / os.listdir(twin.mounted)[0]).read_bytes() == b"content"


def test_what_was_closed_just_now_is_deleted_at_once(twin: Twin) -> None:
    # libfuse still counts a file as open for a moment after its release, and then hides what is deleted.
    directory = twin.mounted / "directory"
    for turn in range(300):
        os.mkdir(directory)
        (directory / "file").write_bytes(b"content")
        if turn % 2:
            (directory / "new").touch()
            os.rename(directory / "new", directory / "file")
        os.unlink(directory / "file")
        assert os.listdir(twin.stored / "directory") == []
        os.rmdir(directory)


def test_temporary_files_of_python(twin: Twin) -> None:
    with tempfile.TemporaryFile(dir=twin.mounted) as file:
        file.write(b"content")
        file.flush()
        assert os.fstat(file.fileno()).st_size == 7
        file.seek(0)
        assert file.read() == b"content"
    assert tree(twin.stored) == {}


def test_deleted_directories(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        os.mkdir(root / "directory")
        (root / "directory" / "file").touch()
        seen = [attempt(os.rmdir, root / "directory"), attempt(os.rmdir, root / "absent")]
        seen.append(attempt(os.unlink, root / "directory"))
        seen.append(attempt(os.rmdir, root / "directory" / "file"))
        with opened(root / "directory", os.O_RDONLY | os.O_DIRECTORY) as directory:
            os.unlink(root / "directory" / "file")
            os.rmdir(root / "directory")
            # Of what was a directory, libfuse's high-level API has no path: it answers ESTALE instead of ENOENT.
            assert attempt(os.open, "new", RW, dir_fd=directory) in ("ENOENT", "ESTALE")
        os.mkdir(root / "directory")
        (root / "directory" / "new").touch()
        return [*seen, os.listdir(root / "directory")]

    same(twin, scenario)


def test_strange_names(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        top = os.fsencode(root)
        names = [b"\xff\xfe not UTF-8", b"line\nbreak", b" ", b"...", b"\\", "日本語/".encode().strip(b"/"), b"x" * 255]
        names += [b"-rf", b"*", "é".encode(), "e\u0301".encode(), ("ü" * 127).encode()]
        for name in names:
            with opened(os.path.join(top, name), RW | os.O_EXCL) as file:
                os.write(file, name)
            os.setxattr(os.path.join(top, name), "user.name", name)
            os.rename(os.path.join(top, name), os.path.join(top, b"moved"))
            os.rename(os.path.join(top, b"moved"), os.path.join(top, name))
        too_long = os.path.join(top, b"x" * 256)
        return [
            sorted(os.listdir(top)),
            attempt(os.mkdir, too_long),
            attempt(os.stat, too_long),
            attempt(os.open, too_long, RW),
            attempt(os.symlink, b"x", too_long),
        ]

    same(twin, scenario)


def test_paths_longer_than_the_kernel_takes(twin: Twin) -> None:
    # Through directory descriptors a tree may be deeper than PATH_MAX; FUSE's high-level API has whole paths.
    def scenario(root: Path) -> Any:
        name = "d" * 200
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(opened(root, os.O_RDONLY | os.O_DIRECTORY))
            levels = [directory]
            for _ in range(30):
                os.mkdir(name, dir_fd=directory)
                directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
                stack.callback(os.close, directory)
                levels.append(directory)
            file = os.open("file", RW, dir_fd=directory)
            os.write(file, b"deep")
            os.close(file)
            os.rename("file", "moved", src_dir_fd=directory, dst_dir_fd=directory)
            os.link("moved", "linked", src_dir_fd=directory, dst_dir_fd=levels[20])
            with open(os.open("moved", os.O_RDONLY, dir_fd=directory), "rb") as again:
                seen = [again.read(), sorted(os.listdir(directory)), os.stat("linked", dir_fd=levels[20]).st_nlink]
            seen.append(attempt(os.stat, str(root) + f"/{name}" * 30))
            os.unlink("moved", dir_fd=directory)
            os.unlink("linked", dir_fd=levels[20])
            for level in reversed(levels[:-1]):
                os.rmdir(name, dir_fd=level)
        return seen

    same(twin, scenario)


def test_large_directory(twin: Twin) -> None:
    names = {f"entry {number:05}" for number in range(5000)}
    for name in names:
        (twin.stored / name).touch()
    assert set(os.listdir(twin.mounted)) == names
    with os.scandir(twin.mounted) as entries:
        found = [(entry.name, entry.inode(), entry.stat().st_ino) for entry in entries]
    assert {name for name, _, _ in found} == names
    assert all(listed_inode == stat_inode for _, listed_inode, stat_inode in found)
    assert len(found) == len(names)


def test_listing_a_directory_that_changes(twin: Twin) -> None:
    stays = {f"stays {number}" for number in range(2000)}
    for name in stays:
        (twin.mounted / name).touch()
    seen: list[str] = []
    with os.scandir(twin.mounted) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 10 == 0:
                (twin.mounted / f"new {number}").touch()
                os.rename(twin.mounted / f"new {number}", twin.mounted / f"newer {number}")
                if number % 20 == 0:
                    os.unlink(twin.mounted / f"newer {number}")
    assert sorted(name for name in seen if name.startswith("stays")) == sorted(stays), "each once"
    with opened(twin.mounted, os.O_RDONLY | os.O_DIRECTORY) as directory:
        before = set(os.listdir(directory))
        (twin.mounted / "after").touch()
        assert set(os.listdir(directory)) == before | {"after"}, "rewinddir looks anew"


def test_removing_while_listing(twin: Twin) -> None:
    for number in range(1500):
        (twin.mounted / f"file {number}").touch()
    with os.scandir(twin.mounted) as entries:
        for entry in entries:
            os.unlink(entry.path)
    os.rmdir(twin.mounted)
    assert not twin.stored.exists()


def test_one_file_that_can_not_be_read_does_not_hide_the_others(unmounted: Mounted) -> None:
    names = {"a.jpg", "unreadable.jpg", "z.jpg", "folder"}
    for name in names - {"folder"}:
        (unmounted.store / name).write_bytes(bytes(128 + 13))  # as long as a blob may be
    (unmounted.store / "folder").mkdir()
    unmounted.program = "tests.unreadable_mount"
    unmounted.start()
    with os.scandir(unmounted.path) as entries:
        kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    assert kinds == {name: name == "folder" for name in names}
    ls = subprocess.run(["ls", "-l", unmounted.path], capture_output=True, text=True, check=False)
    assert sum(" 141 " in line and ".jpg" in line for line in ls.stdout.splitlines()) == 2
    assert ls.returncode == 1
    assert "unreadable.jpg': Input/output error" in ls.stderr
    with pytest.raises(OSError, match="Input/output error"):
        (unmounted.path / "unreadable.jpg").stat()


def test_the_reserved_directory_is_not_there(mount: Mounted) -> None:
    root = mount.path
    inside = root / ".esrfs" / "store.toml"
    (root / "ordinary").touch()
    assert ".esrfs" not in os.listdir(root)
    with os.scandir(root) as entries:
        assert ".esrfs" not in {entry.name for entry in entries}
    for path in (root / ".esrfs", inside):
        for action in (os.stat, os.lstat, os.listdir, os.unlink, os.rmdir, os.readlink, os.listxattr):
            assert attempt(action, path) == "ENOENT", (action, path)
        assert attempt(os.open, path, os.O_RDONLY) == "ENOENT"
        assert attempt(os.rename, path, root / "elsewhere") == "ENOENT"
        assert attempt(os.chmod, path, 0o777) == "ENOENT"
    assert attempt(os.mkdir, root / ".esrfs") == "EPERM"
    assert attempt(os.mkfifo, root / ".esrfs") == "EPERM"
    assert attempt(os.symlink, "x", root / ".esrfs") == "EPERM"
    assert attempt(os.link, root / "ordinary", root / ".esrfs") == "EPERM"
    assert attempt(os.open, root / ".esrfs", RW) == "EPERM"
    assert attempt(os.rename, root / "ordinary", root / ".esrfs") == "EPERM"
    assert attempt(renameat2, root / "ordinary", root / ".esrfs", RENAME_EXCHANGE) in ("EPERM", "ENOENT")
    assert (mount.store / ".esrfs" / "store.toml").exists()
    assert (root / "ordinary").exists()
    # Only the store's own directory, and only at the root.
    (root / ".esrfs-notes").touch()
    (root / "below").mkdir()
    (root / "below" / ".esrfs").mkdir()
    assert {".esrfs-notes", "below"} <= set(os.listdir(root))
    assert os.listdir(root / "below") == [".esrfs"]


def test_symlinks_lead_nowhere_but_where_the_reader_stands(twin: Twin, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    os.symlink(outside, twin.mounted / "link")
    assert (twin.mounted / "link" / "secret").read_text() == "secret", "the reader's own kernel follows it"
    # A directory that turns into a symlink behind the mount does not lead the mount's process out of the store.
    (twin.mounted / "directory").mkdir()
    (twin.mounted / "directory" / "secret").write_text("ours")
    os.rename(twin.stored / "directory", twin.stored / "away")
    os.symlink(outside, twin.stored / "directory")
    with contextlib.suppress(OSError):
        assert (twin.mounted / "directory" / "secret").read_text() == "ours"


# ---- attributes


def test_modes_owners_times(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(b"content")
        os.mkdir(root / "directory")
        os.symlink("file", root / "link")
        seen: list[Any] = []
        for mode in (0o4755, 0o2640, 0o1777, 0o000, 0o644):
            for name in ("file", "directory"):
                os.chmod(root / name, mode)
                seen.append((root / name).stat().st_mode)
        if os.geteuid() == 0:
            for name in ("file", "directory", "link"):
                os.chmod(root / name, 0o6755)
                os.chown(root / name, 1234, -1, follow_symlinks=False)
                os.chown(root / name, -1, 4321, follow_symlinks=False)
                st = os.lstat(root / name)
                seen.append((st.st_uid, st.st_gid, st.st_mode))
        os.utime(root / "link", ns=(123, 456_789_012_345), follow_symlinks=False)
        seen.append(os.lstat(root / "link").st_mtime_ns)
        with opened(root / "file", os.O_RDONLY) as file:
            for target in (root / "file", root / "directory", file):
                for access, modification in (
                    ((1_234_567_890, 123_456_789), (987_654_321, 999_999_999)),
                    ((0, UTIME_OMIT), (5, 1)),
                    ((7, 2), (0, UTIME_OMIT)),
                    ((0, UTIME_OMIT), (0, UTIME_OMIT)),
                    ((-5, 3), (-77, 4)),
                    ((1, 1), (2**33, 5)),
                    ((1, 1_000_000_000), (2, 2)),
                ):
                    seen.append(attempt(utimensat, target, access, modification))
                    st = os.stat(target)
                    seen.append((st.st_atime_ns, st.st_mtime_ns))
                for access, modification in (((0, UTIME_NOW), (9, 9)), ((9, 9), (0, UTIME_NOW))):
                    before = time.time_ns() - 2 * 10**9
                    utimensat(target, access, modification)
                    st = os.stat(target)
                    seen.append((st.st_atime_ns >= before, st.st_mtime_ns >= before, 9_000_000_009))
            seen.append(attempt(os.fchmod, file, 0o604))
            seen.append(attempt(os.fchown, file, -1, os.getegid()))
            seen.append((os.fstat(file).st_mode, os.fstat(file).st_gid))
        seen.append(attempt(os.chmod, root / "absent", 0o644))
        seen.append(attempt(os.utime, root / "absent"))
        return seen

    same(twin, scenario)


def test_stat_tells_what_the_store_does(twin: Twin) -> None:
    (twin.mounted / "file").write_bytes(b"x" * 123_456)
    os.mkdir(twin.mounted / "directory")
    os.symlink("file", twin.mounted / "link")
    time.sleep(1.1)
    for name in ("file", "directory", "link", "."):
        ours, theirs = os.lstat(twin.mounted / name), os.lstat(twin.stored / name)
        for field in ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize"):
            assert getattr(ours, field) == getattr(theirs, field), (name, field)
        for field in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            assert getattr(ours, field) == getattr(theirs, field), (name, field)


def test_statfs(twin: Twin) -> None:
    ours, theirs = os.statvfs(twin.mounted), os.statvfs(twin.stored)
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert abs(ours.f_bavail - theirs.f_bavail) * ours.f_frsize < 2**30


def test_extended_attributes(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        (root / "file").write_bytes(b"content")
        os.mkdir(root / "directory")
        os.symlink("file", root / "link")
        seen: list[Any] = []
        for name in ("file", "directory"):
            path = root / name
            os.setxattr(path, "user.empty", b"")
            os.setxattr(path, "user.\udcff\udcfe", bytes(range(256)))
            os.setxattr(path, "user.large", b"x" * 3000)
            seen += [
                attempt(os.setxattr, path, "user.empty", b"1", os.XATTR_CREATE),
                attempt(os.setxattr, path, "user.absent", b"1", os.XATTR_REPLACE),
                attempt(os.setxattr, path, "user.empty", b"2", os.XATTR_REPLACE),
                attempt(os.setxattr, path, "user.too large", b"x" * 65536),
                attempt(os.setxattr, path, "user.much too large", b"x" * 65537),
                attempt(os.setxattr, path, "user." + "n" * 251, b"x"),
                attempt(os.setxattr, path, "nonsense.name", b"x"),
                attempt(os.getxattr, path, "user.absent"),
                attempt(os.removexattr, path, "user.absent"),
                attempt(getxattr_into, path, "user.large", 0),
                attempt(getxattr_into, path, "user.large", 2999),
                attempt(getxattr_into, path, "user.large", 3000),
                attempt(listxattr_into, path, 0),
                attempt(listxattr_into, path, 10),
                attempt(listxattr_into, path, 4096),
                listed(path),
                attempt(os.getxattr, path, "security.capability"),
            ]
            os.removexattr(path, "user.empty")
        seen.append(attempt(os.setxattr, root / "link", "user.x", b"1", follow_symlinks=False))
        seen.append(attempt(os.setxattr, root / "link", "trusted.x", b"1", follow_symlinks=False))
        seen.append(attempt(os.getxattr, root / "link", "trusted.x", follow_symlinks=False))
        seen.append(attempt(os.getxattr, root / "link", "trusted.x"))
        with opened(root / "file", os.O_RDONLY) as file:
            os.setxattr(file, "user.by handle", b"1")
            seen += [os.getxattr(file, "user.by handle"), listed(file)]
            os.removexattr(file, "user.by handle")
        return seen

    same(twin, scenario)


@pytest.mark.parametrize("prefix", ["", "d"], ids=["file", "directory"])
def test_access_control_lists(twin: Twin, needs: Callable[[str], str], prefix: str) -> None:
    def scenario(root: Path) -> Any:
        def run(*command: str) -> str:
            return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

        (root / "file").touch(0o640)
        (root / "directory").mkdir(mode=0o750)
        run(needs("setfacl"), "-m", "u:1234:rw,g:4321:r", "file")
        run("setfacl", "-m", "u:1234:rwx", "directory")
        run("setfacl", "-d", "-m", "u:1234:rwx,g::rx,o::-,m::rwx", "directory")
        before = os.umask(0o077)
        try:
            (root / "directory" / "inherits").touch()
            (root / "directory" / "below").mkdir()
            (root / "directory" / "below" / "inherits").touch(0o600)
            os.mkfifo(root / "directory" / "fifo")
            (root / "no default").touch()
        finally:
            os.umask(before)
        os.chmod(root / "file", 0o600)
        paths = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        seen = [run(needs("getfacl"), "-n", "-p", *paths), [oct((root / path).lstat().st_mode) for path in paths]]
        run("setfacl", "-b", "file")
        run("setfacl", "-k", "directory")
        (root / "directory" / "no more").touch()
        return [*seen, run("getfacl", "-n", "-p", "file", "directory", "directory/no more")]

    same(twin, scenario)


@as_root
def test_access_control_lists_are_enforced(twin: Twin, needs: Callable[[str], str]) -> None:
    # Stored but not enforced would be worse than refused (DESIGN 6).
    with _traversable(twin):
        for name in ("granted", "denied"):
            (twin.mounted / name).write_text(name)
            os.chmod(twin.mounted / name, 0o640)
        subprocess.run([needs("setfacl"), "-m", f"u:{NOBODY}:rw", twin.mounted / "granted"], check=True)
        subprocess.run(["setfacl", "-m", f"u:{NOBODY}:-", twin.mounted / "denied"], check=True)
        os.chmod(twin.mounted / "denied", 0o644)
        assert as_nobody((twin.mounted / "granted").read_text) == "granted"
        assert "PermissionError" in as_nobody((twin.mounted / "denied").read_text)


@contextlib.contextmanager
def _traversable(twin: Twin) -> Iterator[None]:
    """Let other users reach the mount: pytest's directories are closed to them."""
    closed = [path for path in twin.mounted.parents if path.stat().st_mode & 0o005 != 0o005 and path != Path("/")]
    closed += [path for path in twin.native.parents if path.stat().st_mode & 0o005 != 0o005 and path not in closed]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in closed}
    for path, mode in modes.items():
        path.chmod(mode | 0o055)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@as_root
def test_a_mount_of_root_creates_in_the_callers_name(twin: Twin) -> None:
    def scenario(root: Path) -> Any:
        os.chmod(root, 0o777)
        (root / "of root").write_text("x")
        (root / "group").mkdir()
        os.chown(root / "group", 0, 4321)
        os.chmod(root / "group", 0o2777)

        def work() -> Any:
            os.umask(0o027)
            seen: list[Any] = []
            for directory in (root, root / "group"):
                (directory / "file").write_text("mine")
                (directory / "directory").mkdir()
                os.symlink("x", directory / "link")
                os.mkfifo(directory / "fifo")
                os.close(os.open(directory / "set-id", RW, 0o6755))
                for name in ("file", "directory", "link", "fifo", "set-id"):
                    st = os.lstat(directory / name)
                    seen.append((st.st_uid, st.st_gid, oct(st.st_mode)))
            os.chmod(root / "file", 0o4755)
            with opened(root / "file", os.O_WRONLY) as file:
                os.write(file, b"clears set-id")
            seen.append(oct((root / "file").stat().st_mode))
            seen.append(attempt(os.unlink, root / "of root"))
            seen.append(attempt(os.chmod, root / "of root", 0o777))
            seen.append(attempt(os.open, root / "of root", os.O_RDWR))
            seen.append(attempt(os.chown, root / "file", 0, 0))
            return seen

        return as_nobody(work)

    with _traversable(twin):
        found = same(twin, scenario)
    assert isinstance(found, list), found


@as_root
def test_a_mount_of_an_ordinary_user(needs: Callable[[str], str]) -> None:
    base = Path(tempfile.mkdtemp(prefix="esrfs-nobody-"))
    try:
        os.chown(base, NOBODY, NOBODY)
        (base / "home").mkdir()
        os.chown(base / "home", NOBODY, NOBODY)
        person = [needs("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
        environment = {"PATH": os.environ["PATH"], "HOME": str(base / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {f"XDG_{kind}_HOME": str(base / kind.lower()) for kind in ("STATE", "CACHE", "DATA", "CONFIG")}
        environment["XDG_RUNTIME_DIR"] = str(base / "home")

        def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*person, *command], env=environment, cwd=base, capture_output=True, text=True, timeout=60, check=check
            )

        # The tests' own interpreter may lie where only root may look.
        needed = "import subprocess, sys, esrfs.mount.lifecycle, mfusepy\n"
        needed += "subprocess.run([sys.executable, '-c', ''], check=True)"
        pythons = [name for name in (sys.executable, "/usr/bin/python3") if Path(name).exists()]
        python = next((name for name in pythons if run(name, "-c", needed, check=False).returncode == 0), None)
        if python is None:
            pytest.skip("an ordinary user can't read this checkout, or its interpreter")
        esrfs = [python, "-m", "esrfs.cli.main"]
        run(*esrfs, "init", "store")
        run("mkdir", "mount")
        mounted = run(*esrfs, "mount", str(base / "store"), str(base / "mount"), check=False)
        if mounted.returncode:
            pytest.skip(f"an ordinary user can't mount here: {mounted.stderr.strip()}")
        try:
            script = (
                "umask 027; echo text > mount/file; mkdir mount/dir; mv mount/file mount/dir/moved\n"
                "ln -s x mount/link; chmod 4711 mount/dir/moved; touch -d @1000.5 mount/dir/moved\n"
                "stat -c '%u %g %a %Y %s' mount/dir/moved\n"
                "cat mount/dir/moved; ls -A mount"
            )
            seen = run("sh", "-e", "-c", script).stdout
            assert seen == f"{NOBODY} {NOBODY} 4711 1000 5\ntext\ndir\nlink\n"
            assert attempt(os.listdir, base / "mount") == "EACCES", "nobody else sees it, not even root"
        finally:
            run(*esrfs, "umount", str(base / "mount"))
        assert (base / "store" / "dir" / "moved").read_text() == "text\n"
        # fusermount3 refuses directories that the user can't write to, as init leaves this one.
        run("sh", "-e", "-c", "mkdir photos; echo text > photos/file")
        run(*esrfs, "init", "--in-place", "photos")
        assert (base / "photos").stat().st_mode & 0o777 == 0o555
        for _ in range(2):
            run(*esrfs, "mount", str(base / ".photos.esrfs"), str(base / "photos"))
            assert run("cat", "photos/file").stdout == "text\n"
            run(*esrfs, "umount", str(base / "photos"))
            assert (base / "photos").stat().st_mode & 0o777 == 0o555
    finally:
        for mountpoint in (base / "mount", base / "photos"):
            subprocess.run(["umount", "-l", mountpoint], capture_output=True, check=False)
            subprocess.run(["chattr", "-i", mountpoint], capture_output=True, check=False)
        shutil.rmtree(base)


# ---- locks


def test_locks_hold_between_programs_of_one_mount(twin: Twin) -> None:
    (twin.mounted / "file").write_bytes(b"content")
    script = (
        "import fcntl,sys,struct\nf=open(sys.argv[1],'r+b')\n"
        "def t(g):\n  try: g(); return 'free'\n  except OSError: return 'locked'\n"
        "print(t(lambda: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)))\n"
        "print(t(lambda: fcntl.lockf(f, fcntl.LOCK_EX|fcntl.LOCK_NB, 10, 0)))\n"
        "print(t(lambda: fcntl.lockf(f, fcntl.LOCK_EX|fcntl.LOCK_NB, 10, 100)))\n"
    )

    def other() -> list[str]:
        command = [sys.executable, "-c", script, str(twin.mounted / "file")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    with open(twin.mounted / "file", "r+b") as file:
        assert other() == ["free", "free", "free"]
        fcntl.flock(file, fcntl.LOCK_EX)
        assert other() == ["locked", "free", "free"]
        fcntl.flock(file, fcntl.LOCK_SH)
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)
        assert other() == ["locked", "locked", "free"]
        fcntl.flock(file, fcntl.LOCK_UN)
    assert other() == ["free", "free", "free"]


# ---- photographs


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small JPEG that compacts in a second."""
    path = tmp_path_factory.mktemp("picture") / "picture.jpg"
    photograph("coffee").resize((400, 266), Image.Resampling.LANCZOS).save(path, quality=95, comment=b"a comment")
    return path.read_bytes()


@pytest.fixture(scope="module")
def first_blob(shared: Shared, picture: bytes) -> tuple[bytes, bytes]:
    """(the bytes of a blob of this store, the bytes of its view)"""
    with pytest.MonkeyPatch.context() as patch:
        mount = shared.adopt(patch)
        path = mount.path / "first.jpg"
        path.write_bytes(picture)
        mount.compact("first.jpg")
        stored = (mount.store / "first.jpg").read_bytes()
        assert len(stored) < len(picture), mount.log()
        return stored, path.read_bytes()


@pytest.fixture
def blob(mount: Mounted, first_blob: tuple[bytes, bytes], request: pytest.FixtureRequest) -> tuple[Path, Path, bytes]:
    """A blob of its own for this test: (in the mount, in the store, the view's bytes). A genuine blob that is copied
    into the store behind the mount is a blob."""
    name = f"{request.node.name[:60]}.jpg".replace("/", "_")
    (mount.store / name).write_bytes(first_blob[0])
    os.utime(mount.store / name, ns=(10**18, 10**18 + 5))
    return mount.path / name, mount.store / name, first_blob[1]


def is_blob(mount: Mounted, path: Path) -> bool:
    return bool(mount.explain(str(path.relative_to(mount.path)))["state"] == "blob")


def test_a_view_is_a_file_of_the_originals_size(mount: Mounted, blob: tuple[Path, Path, bytes], picture: bytes) -> None:
    path, stored, view = blob
    assert path.stat().st_size == len(picture) == len(view)
    assert 0 < path.stat().st_blocks * 512 < len(picture), "du tells what the store uses; never 0, or tar -S drops it"
    assert path.stat().st_blocks == stored.stat().st_blocks
    assert path.stat().st_mtime_ns == 10**18 + 5
    with opened(path, os.O_RDONLY) as file:
        assert os.fstat(file).st_size == len(picture)
        assert os.lseek(file, 0, os.SEEK_DATA) == 0
        assert os.lseek(file, 0, os.SEEK_HOLE) == len(picture)
        assert attempt(os.lseek, file, len(picture), os.SEEK_DATA) == "ENXIO"
        assert os.pread(file, 10, len(picture)) == b""
        assert os.pread(file, 100, len(picture) - 7) == view[-7:]
        with mmap.mmap(file, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as pages:
            assert pages[:] == view


@pytest.mark.parametrize("cold", [False, True], ids=["cached", "cold"])
def test_all_handles_of_a_view_turn_together(mount: Mounted, blob: tuple[Path, Path, bytes], cold: bool) -> None:
    path, stored, view = blob
    if cold:
        mount.call("cache-clear")
    with opened(path, os.O_RDONLY) as reader, opened(path, os.O_RDWR) as writer, opened(path, os.O_RDONLY) as late:
        head = os.pread(reader, 20, 0)
        assert is_blob(mount, path), "opening changes nothing"
        assert os.pwrite(writer, b"changed", 1000) == 7
        expected = view[:1000] + b"changed" + view[1007:]
        assert head == expected[:20]
        for descriptor in (reader, writer, late):
            assert os.pread(descriptor, len(view) + 1, 0) == expected
            assert os.fstat(descriptor).st_size == len(view)
        os.pwrite(writer, b"again", 2000)
        assert os.pread(reader, 5, 2000) == b"again"
        os.fsync(writer)
    expected = expected[:2000] + b"again" + expected[2005:]
    assert stored.read_bytes() == path.read_bytes() == expected
    assert not is_blob(mount, path)


def test_append_to_a_view(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, stored, view = blob
    with opened(path, os.O_WRONLY | os.O_APPEND) as file:
        os.write(file, b"more")
        os.write(file, b" and more")
    assert path.read_bytes() == stored.read_bytes() == view + b"more and more"


@pytest.mark.parametrize("length", [0, 1000, 10**6])
@pytest.mark.parametrize("by", ["path", "handle"])
def test_truncate_a_view(mount: Mounted, blob: tuple[Path, Path, bytes], length: int, by: str) -> None:
    path, stored, view = blob
    if by == "path":
        os.truncate(path, length)
    else:
        with opened(path, os.O_RDWR) as file:
            os.ftruncate(file, length)
            assert os.fstat(file).st_size == length
    expected = view[:length].ljust(length, b"\0")
    assert path.stat().st_size == length
    assert path.read_bytes() == stored.read_bytes() == expected


def test_truncating_a_view_at_open_needs_no_reconstruction(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, stored, _ = blob
    mount.call("cache-clear")
    before = mount.status()["engine_calls"]
    with opened(path, os.O_RDONLY) as reader:
        with opened(path, os.O_WRONLY | os.O_TRUNC) as file:
            assert os.fstat(reader).st_size == 0
            os.write(file, b"new")
        assert os.pread(reader, 10, 0) == b"new"
    assert path.read_bytes() == stored.read_bytes() == b"new"
    assert mount.status()["engine_calls"] == before


def test_fallocate_on_a_view(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, stored, view = blob
    with opened(path, os.O_RDWR) as file:
        fallocate(file, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, 4096, 4096)
    assert path.read_bytes() == stored.read_bytes() == view[:4096] + bytes(4096) + view[8192:]


def test_mapping_a_view_for_writing(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, stored, view = blob
    assert path.read_bytes() == view  # cached now, so that it is no DIRECT_IO open
    with opened(path, os.O_RDWR) as file, mmap.mmap(file, 0) as pages:
        assert pages[:] == view
        pages[5000:5006] = b"mapped"
        pages.flush()
    assert path.read_bytes() == stored.read_bytes() == view[:5000] + b"mapped" + view[5006:]


def test_opening_for_writing_without_writing_keeps_the_blob(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, stored, view = blob
    before = stored.stat()
    with opened(path, os.O_RDWR) as file:
        assert os.pread(file, len(view), 0) == view
    with open(path, "ab"):
        pass
    assert is_blob(mount, path)
    assert (stored.stat().st_ino, stored.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_writing_to_a_hard_link_of_a_blob(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, stored, view = blob
    other = path.with_name("other " + path.name)
    os.link(path, other)
    assert other.stat().st_nlink == 2
    assert other.read_bytes() == view
    with opened(path, os.O_RDWR) as file:
        os.pwrite(file, b"changed", 3000)
    time.sleep(1.1)  # the kernel keeps attributes of the other name for a second
    expected = view[:3000] + b"changed" + view[3007:]
    assert path.read_bytes() == other.read_bytes() == stored.read_bytes() == expected
    assert stored.stat().st_ino == (mount.store / other.name).stat().st_ino
    os.unlink(other)


def test_a_deleted_view_is_read_and_written(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, stored, view = blob
    mount.call("cache-clear")
    with opened(path, os.O_RDWR) as file, opened(path, os.O_RDONLY) as reader:
        os.unlink(path)
        assert not stored.exists()
        assert os.fstat(file).st_size == len(view)
        assert os.pread(reader, len(view), 0) == view
        os.pwrite(file, b"changed", 10)
        assert os.pread(reader, 7, 10) == b"changed"
        assert os.fstat(reader).st_size == len(view)
        assert os.fstat(reader).st_nlink == 0
    assert not path.exists()
    assert not stored.exists()


def test_a_view_that_is_renamed_while_open(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, _, view = blob
    directory = mount.path / "directory of a view"
    directory.mkdir()
    with opened(path, os.O_RDWR) as file:
        os.rename(path, directory / "renamed.jpg")
        os.rename(directory, mount.path / "renamed directory")
        path.write_bytes(b"somebody else")
        os.pwrite(file, b"changed", 500)
    assert path.read_bytes() == b"somebody else"
    expected = view[:500] + b"changed" + view[507:]
    assert (mount.path / "renamed directory" / "renamed.jpg").read_bytes() == expected
    assert (mount.store / "renamed directory" / "renamed.jpg").read_bytes() == expected


def test_what_is_no_content_leaves_a_blob_a_blob(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, stored, view = blob
    os.chmod(path, 0o604)
    with opened(path, os.O_RDONLY) as file:
        os.fchmod(file, 0o640)
        utimensat(file, (0, UTIME_OMIT), (77, 77))
        os.setxattr(file, "user.key", b"value")
    if os.geteuid() == 0:
        os.chown(path, 1234, 4321)
    moved = path.with_name("moved " + path.name)
    os.rename(path, moved)
    os.link(moved, path)
    os.unlink(moved)
    (mount.path / "exchanged").write_bytes(b"plain")
    renameat2(path, mount.path / "exchanged", RENAME_EXCHANGE)
    assert path.read_bytes() == b"plain"
    assert (mount.path / "exchanged").read_bytes() == view
    renameat2(path, mount.path / "exchanged", RENAME_EXCHANGE)
    assert (mount.path / "exchanged").read_bytes() == b"plain"
    assert is_blob(mount, path)
    assert path.read_bytes() == view
    assert path.stat().st_size == len(view)
    assert (path.stat().st_mtime_ns, stat.S_IMODE(path.stat().st_mode)) == (77_000_000_077, 0o640)
    assert os.getxattr(path, "user.key") == b"value"
    assert listed(path) == ["user.key"]
    assert os.getxattr(stored, "user.key") == b"value"
    os.unlink(mount.path / "exchanged")


def test_what_esrfs_knows_is_answered_not_listed(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, _, view = blob
    assert os.getxattr(path, "user.esrfs.state") == b"blob"
    assert os.getxattr(path, "user.esrfs.original_bytes") == str(len(view)).encode()
    assert os.getxattr(path, "user.esrfs.verdict").startswith(b"blob")
    assert listed(path) == [], "a copy would carry it along"
    assert attempt(os.setxattr, path, "user.esrfs.state", b"x") == "EPERM"
    assert attempt(os.removexattr, path, "user.esrfs.state") == "EPERM"
    assert attempt(os.getxattr, path, "user.esrfs.nonsense") == "ENODATA"
    assert attempt(getxattr_into, path, "user.esrfs.state", 1) == "ERANGE"
    (mount.path / "plain.txt").write_text("text")
    os.symlink("plain.txt", mount.path / "soft")
    assert isinstance(os.getxattr(mount.path / "plain.txt", "user.esrfs.state"), bytes)
    for other in (mount.path, mount.path / "soft"):
        answer = attempt(os.getxattr, other, "user.esrfs.state", follow_symlinks=False)
        assert answer == "ENODATA" or isinstance(answer, bytes)
        assert attempt(os.setxattr, other, "user.esrfs.state", b"x", follow_symlinks=False) == "EPERM"


def test_a_blob_that_a_program_writes_comes_back_byte_for_byte(mount: Mounted, first_blob: tuple[bytes, bytes]) -> None:
    """Copied from the store into the mount, it is the user's file, and not the photograph that it stands for."""
    written, _ = first_blob
    path = mount.path / "copied.avif"
    shutil.copyfile(mount.store / "first.jpg", path)
    os.utime(path, ns=(5, 6))
    for _ in range(3):
        assert path.stat().st_size == len(written)
        assert path.read_bytes() == written
        time.sleep(0.6)
    assert path.stat().st_mtime_ns == 6
    assert (mount.path / "first.jpg").stat().st_size != len(written)
    # It may be copied again, changed, and replaced as any file.
    shutil.copyfile(path, mount.path / "copied again.avif")
    assert (mount.path / "copied again.avif").read_bytes() == written
    with opened(path, os.O_RDWR) as file:
        os.pwrite(file, b"changed", 100)
    assert path.read_bytes() == written[:100] + b"changed" + written[107:]


def test_a_temporary_blob_that_is_renamed_comes_back_byte_for_byte(
    mount: Mounted, first_blob: tuple[bytes, bytes]
) -> None:
    # As rsync and editors write: another name, closed, renamed at once.
    written, _ = first_blob
    for number in range(5):
        path = mount.path / f"renamed {number}.avif"
        temporary = path.with_name(f".{path.name}.a1B2c3")
        temporary.write_bytes(written)
        os.rename(temporary, path)
        assert path.read_bytes() == written
        time.sleep(0.3)
        assert path.read_bytes() == written, number
        assert path.stat().st_size == len(written)


def test_reading_a_view_in_pieces_from_many_programs(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    path, _, view = blob
    mount.call("cache-clear")
    before = mount.status()["engine_calls"]
    results: list[bool] = []

    def read(step: int) -> None:
        with opened(path, os.O_RDONLY) as file:
            parts = [os.pread(file, step, offset) for offset in range(0, len(view), step)]
            results.append(b"".join(parts) == view)

    threads = [threading.Thread(target=read, args=(step,)) for step in (1000, 4096, 10_007, 65536, 10**6) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 15
    assert mount.status()["engine_calls"] == before + 1, "one reconstruction for all readers"


def test_a_killed_program_leaves_nothing_open(mount: Mounted, blob: tuple[Path, Path, bytes]) -> None:
    before = descriptors(mount)
    script = "import os,sys,time\nfds=[os.open(sys.argv[1],os.O_RDWR) for _ in range(20)]\n"
    script += "print('ready',flush=True)\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script, str(blob[0])], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    assert mount.status()["open_handles"] == 20
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    check_nothing_leaked(mount, before)


def test_errors_of_the_store_reach_the_program(twin: Twin) -> None:
    # A file that grows beyond the limit of the store's filesystem: the errno is the store's, the file is whole.
    (twin.mounted / "file").write_bytes(b"content")
    with opened(twin.mounted / "file", os.O_RDWR) as file:
        for action in (lambda: os.ftruncate(file, 2**62), lambda: fallocate(file, 0, 0, 2**62)):
            assert attempt(action) in ("EFBIG", "EINVAL", "ENOSPC")
    assert (twin.stored / "file").read_bytes() == b"content"
