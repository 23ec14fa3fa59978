"""Nothing is lost: crashes, full disks and other people's changes at every step of replacing a file by a blob and back.

Names of tests say the promise of DESIGN 4 that they hold. A crash is a SIGKILL at a fault point in a process of its
own. What others do is done in the middle of a step, from the fault point, behind the mount's back: the hardest place.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from msgspec import structs

from esrfs import faults
from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.store import layout, ledger, linux, metadata, originals, plain, recovery, staging, swap
from esrfs.store.errors import StoreError
from esrfs.store.identity import Identity
from esrfs.store.initialise import init
from esrfs.store.layout import RESERVED, Store, open_store
from esrfs.store.swap import SwapStatus
from esrfs.upkeep import check

ORIGINAL = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 300
VIEW = b"\xff\xd8\xff\xe1" + bytes(reversed(range(256))) * 300
NEWER = b"something newer"
MTIME = 1_500_000_000_123_456_789


def blob_bytes(store: Store) -> bytes:
    recipe = recipe_format.Recipe(
        width=10,
        height=10,
        original_size=len(VIEW),
        sha256_original=hashlib.sha256(ORIGINAL).digest(),
        sha256_view=hashlib.sha256(VIEW).digest(),
        preset="high",
        scale=2,
        network="",
        network_sha256=b"",
        quality=50,
        coding=recipe_format.JpegCoding("L", "4:4:4", [[1] * 64]),
        prefix=[recipe_format.Literal(VIEW)],
        scan_length=0,
        suffix=[],
        encoder="",
        scores=recipe_format.Scores(90.0, 80.0, 40.0),
        created_by="test",
    )
    avif = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\0\0\1\0mdat" + bytes(248)
    return container.pack(avif, recipe_format.encode(recipe), store.config.id_bytes, store.config.key_bytes)


@dataclass
class Place:
    """A store with one original, ``sub/photo.jpg``."""

    root: Path
    store: Store
    blob: bytes

    @property
    def file(self) -> Path:
        return self.root / "sub" / "photo.jpg"

    def swap(self, **how: object) -> swap.SwapResult:
        fd = os.open(self.file, os.O_RDONLY)
        try:
            return swap.swap_in(
                self.store,
                "sub/photo.jpg",
                fd,
                Identity.from_stat(os.fstat(fd)),
                self.blob,
                hashlib.sha256(ORIGINAL).digest(),
                **{"lease_ok": lambda: True, "interrupted": lambda: False, **how},  # type: ignore[arg-type]
            )
        finally:
            os.close(fd)

    def put_blob(self) -> None:
        """Compact, without a story."""
        assert self.swap().status is SwapStatus.DONE

    def materialise(self, view: bytes = VIEW, path: str | None = "sub/photo.jpg", file: Path | None = None) -> bytes:
        blob_fd = os.open(file or self.file, os.O_RDONLY)
        try:
            fd = plain.materialise(self.store, path, blob_fd, lambda fd: write_all(fd, view))
            try:
                return os.pread(fd, 1 << 24, 0)
            finally:
                os.close(fd)
        finally:
            os.close(blob_fd)

    def kept(self) -> list[bytes]:
        """The contents of the undo window."""
        return [(self.root / RESERVED / "originals" / one.name).read_bytes() for one in originals.entries(self.store)]

    def found(self) -> list[bytes]:
        return [(self.root / RESERVED / "originals" / name).read_bytes() for name in originals.found(self.store)]

    def staged(self) -> list[str]:
        return [path.name for path in (self.root / RESERVED / "staging").rglob("*") if not path.is_dir()]


def write_all(fd: int, data: bytes) -> None:
    offset = 0
    while offset < len(data):
        offset += os.pwrite(fd, data[offset:], offset)


@pytest.fixture(params=["exchange", "link"])
def either_place(request, tmp_path):
    """A store on a filesystem with exchange and leases, and an exclusive one on a filesystem without."""
    yield from make_place(tmp_path, request.param)


@pytest.fixture
def place(tmp_path):
    """In memory where that will do: the tests of what others do in the middle are many, and fsync is slow."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield from make_place(tmp_path, "exchange")
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="esrfs-test-") as directory:
        yield from make_place(Path(directory) if has_xattrs(directory) else tmp_path, "exchange")


def has_xattrs(directory: str) -> bool:
    try:
        os.setxattr(directory, "user.note", b"")
    except OSError:
        return False
    return True


def make_place(tmp_path, mode):
    root = tmp_path / "store"
    done = init(str(root), exclusive=mode == "link")
    if not (done.config.probe.exchange and done.config.probe.leases):
        pytest.skip("the temporary directory's filesystem has no exchange or no leases")
    if mode == "link":
        toml = root / RESERVED / "store.toml"
        toml.write_text(toml.read_text().replace("\nexchange = true", "\nexchange = false"))
    (root / "sub").mkdir()
    file = root / "sub" / "photo.jpg"
    file.write_bytes(ORIGINAL)
    file.chmod(0o640)
    os.setxattr(file, "user.note", b"mine")
    os.utime(file, ns=(MTIME, MTIME))
    with open_store(str(root)) as store:
        yield Place(root, store, blob_bytes(store))


@pytest.fixture
def at_point(monkeypatch):
    """``at_point(point, action)``: do ``action`` when ``point`` is reached for the first time."""

    def arrange(point: str, action: Callable[[], None]) -> list[str]:
        reached: list[str] = []

        def reach(name: str) -> None:
            reached.append(name)
            if name == point and reached.count(name) == 1:
                action()

        monkeypatch.setattr(faults, "reach", reach)
        return reached

    return arrange


# ---- the ordinary way


def test_the_blob_takes_the_name_and_the_original_goes_to_the_window(either_place):
    place = either_place
    before = os.stat(place.file)
    result = place.swap()
    assert result.status is SwapStatus.DONE
    st = os.stat(place.file)
    assert place.file.read_bytes() == place.blob
    assert (st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_gid, MTIME)
    assert os.getxattr(place.file, "user.note") == b"mine"
    assert result.blob == Identity.from_stat(st)
    assert place.kept() == [ORIGINAL]
    assert originals.parse(result.kept) is not None
    assert place.staged() == []


def test_all_fault_points_are_reached_in_their_order(place, at_point):
    reached = at_point("", lambda: None)
    place.put_blob()
    assert [point for point in reached if point.startswith("swap.")] == list(swap.FAULT_POINTS)


def test_restore_brings_the_original_back_with_the_present_metadata(place):
    place.put_blob()
    place.file.chmod(0o600)
    os.utime(place.file, ns=(MTIME + 5, MTIME + 5))
    os.close(plain.restore(place.store, "sub/photo.jpg"))
    st = os.stat(place.file)
    assert place.file.read_bytes() == ORIGINAL
    assert (st.st_mode & 0o777, st.st_mtime_ns) == (0o600, MTIME + 5)
    assert os.getxattr(place.file, "user.note") == b"mine"
    assert place.staged() == []


def test_restore_refuses_what_it_can_not_do(place):
    with pytest.raises(StoreError, match="not compacted"):
        plain.restore(place.store, "sub/photo.jpg")
    with pytest.raises(StoreError, match="no such file"):
        plain.restore(place.store, "sub/other.jpg")
    place.put_blob()
    for name in os.listdir(place.root / RESERVED / "originals"):
        os.unlink(place.root / RESERVED / "originals" / name)
    with pytest.raises(StoreError, match="undo window"):
        plain.restore(place.store, "sub/photo.jpg")
    assert place.file.read_bytes() == place.blob


def test_restore_does_not_bring_back_a_damaged_original(place, expect_log):
    expect_log("is not what it was")
    result = place.swap()
    path = place.root / RESERVED / "originals" / result.kept
    st = os.stat(path)
    path.write_bytes(ORIGINAL[:-1] + b"X")
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    with pytest.raises(StoreError, match="undo window"):
        plain.restore(place.store, "sub/photo.jpg")


# ---- reasons not to


def test_a_file_open_for_writing_is_left_alone(place):
    with open(place.file, "r+b"):
        assert place.swap().status is SwapStatus.BUSY
    assert place.file.read_bytes() == ORIGINAL
    assert place.staged() == []


def test_a_file_with_hard_links_is_left_alone(place):
    os.link(place.file, place.root / "second.jpg")
    assert place.swap().status is SwapStatus.HARD_LINKS


def test_content_that_changed_under_an_unchanged_stat_is_noticed(place):
    """A writable mapping may write without touching mtime again."""
    fd = os.open(place.file, os.O_RDONLY)
    expected = Identity.from_stat(os.fstat(fd))
    result = swap.swap_in(
        place.store, "sub/photo.jpg", fd, expected, place.blob, hashlib.sha256(b"what was read").digest(),
        lease_ok=lambda: True, interrupted=lambda: False,
    )  # fmt: skip
    os.close(fd)
    assert result.status is SwapStatus.CHANGED
    assert place.file.read_bytes() == ORIGINAL


def test_metadata_that_can_not_be_carried_is_a_verdict(place, monkeypatch):
    really = metadata.snapshot
    calls = iter(range(100))
    monkeypatch.setattr(
        metadata, "snapshot", lambda fd: replace(really(fd), uid=4711) if next(calls) == 0 else really(fd)
    )
    monkeypatch.setattr(os, "fchown", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "not permitted")))
    result = place.swap()
    assert result.status is SwapStatus.METADATA
    assert "4711" in result.message
    assert place.file.read_bytes() == ORIGINAL
    assert place.staged() == []


def test_without_exchange_and_leases_nothing_is_replaced_unless_the_store_is_exclusive(place):
    probe = place.store.config.probe
    place.store.config = structs.replace(place.store.config, probe=structs.replace(probe, leases=False))
    result = place.swap()
    assert result.status is SwapStatus.UNAVAILABLE
    assert "exclusive" in result.message


@pytest.mark.parametrize("asked", range(4))
def test_interruption_and_a_lost_lease_stop_it_whenever_they_are_noticed(place, asked):
    for name, status in (("interrupted", SwapStatus.BUSY), ("lease_ok", SwapStatus.LEASE_LOST)):
        answers = iter(range(100))
        result = place.swap(
            **{name: lambda answers=answers, name=name: (next(answers) >= asked) == (name != "lease_ok")}
        )
        if result.status is SwapStatus.DONE:
            assert asked >= 2  # it is not asked so often
            return
        assert result.status is status
        assert place.file.read_bytes() == ORIGINAL
        assert place.staged() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_user_without_privileges_can_compact_own_files_only(place, expect_log):
    """No chown, no CAP_LEASE: enough for files of one's own; a verdict for those of others."""
    root = place.root
    for path in (root.parent, root, *root.rglob("*")):
        os.chown(path, 65534, 65534)
    child = os.fork()
    if child == 0:
        status = 9
        try:
            os.chdir(root)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with open_store(".") as store:
                mine = Place(Path("."), store, place.blob)
                mine.put_blob()
                assert mine.materialise(ORIGINAL) == ORIGINAL
                os.utime(mine.file, ns=(MTIME, MTIME))
                mine.put_blob()
                os.close(plain.restore(store, "sub/photo.jpg"))
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert place.file.read_bytes() == ORIGINAL
    assert os.stat(place.file).st_uid == 65534


# ---- crashes

WORKER = """
import hashlib, os, sys
from esrfs.store import plain, swap
from esrfs.store.identity import Identity
from esrfs.store.layout import open_store
what, root, path, data = sys.argv[1:]
data = open(data, "rb").read()
with open_store(root) as store:
    fd = os.open(os.path.join(root, path), os.O_RDONLY)
    if what == "swap":
        digest = hashlib.sha256(os.pread(fd, 1 << 24, 0)).digest()
        identity = Identity.from_stat(os.fstat(fd))
        result = swap.swap_in(store, path, fd, identity, data, digest, lease_ok=lambda: True, interrupted=lambda: False)
        assert result.status == "done", result
    elif what == "restore":
        plain.restore(store, path)
    else:
        def write_view(view):
            for offset in range(0, len(data), 65536):
                os.pwrite(view, data[offset:offset + 65536], offset)
        plain.materialise(store, path if what == "plain" else None, fd, write_view)
"""


def run_killed(place: Place, what: str, point: str, data: bytes, path: str = "sub/photo.jpg") -> None:
    payload = place.root.parent / "payload"
    payload.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, what, str(place.root), path, str(payload)],
        env={**os.environ, "ESRFS_FAULTS": f"{point}=kill"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, f"{point}: {done.returncode} {done.stderr}"


def recover_twice(place: Place) -> recovery.Report:
    first = recovery.recover(place.store)
    before = place.file.read_bytes() if place.file.exists() else None
    again = recovery.recover(place.store)
    assert (again.finished, again.undone, again.discarded, again.found, again.problems) == ([], [], 0, [], [])
    assert (place.file.read_bytes() if place.file.exists() else None) == before
    assert first.problems == []
    assert place.staged() == []
    left = set(os.listdir(place.root / RESERVED / "ledger")) - {"settled", place.store.ledger.name, "days"}
    assert left == set()
    return first


def metadata_of(path: Path) -> tuple[object, ...]:
    st = os.stat(path)
    return st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, os.getxattr(path, "user.note")


@pytest.mark.parametrize("point", swap.FAULT_POINTS)
def test_a_crash_leaves_the_original_or_the_verified_blob(either_place, point):
    place = either_place
    before = metadata_of(place.file)
    run_killed(place, "swap", point, place.blob)
    assert place.file.read_bytes() in (ORIGINAL, place.blob)  # also before recovery
    report = recover_twice(place)
    assert report.found == []
    assert metadata_of(place.file) == before
    if place.file.read_bytes() == ORIGINAL:
        assert place.kept() == []
        assert os.stat(place.file).st_nlink == 1
        place.put_blob()  # and it can be done again
    assert place.file.read_bytes() == place.blob
    assert place.kept() == [ORIGINAL]


@pytest.mark.parametrize("point", swap.FAULT_POINTS)
@pytest.mark.parametrize("deed", ["delete", "replace", "rename parent", "replace parent", "damage blob"])
def test_what_happens_between_a_crash_and_recovery_wins(place, point, deed):
    run_killed(place, "swap", point, place.blob)
    was = place.file.read_bytes()
    moved = place.root / "moved" / "photo.jpg"
    if deed == "delete":
        place.file.unlink()
    elif deed == "replace":
        (place.root / "new").write_bytes(NEWER)
        (place.root / "new").rename(place.file)
    elif deed == "damage blob":
        if was != place.blob:
            return
        st = os.stat(place.file)
        place.file.write_bytes(b"\0" * len(place.blob))
        os.utime(place.file, ns=(st.st_atime_ns, st.st_mtime_ns))
    else:
        place.file.parent.rename(moved.parent)
        if deed == "replace parent":
            place.file.parent.mkdir()
            place.file.write_bytes(NEWER)
    report = recover_twice(place)
    if deed == "delete":
        assert not place.file.exists()
    elif deed == "replace":
        assert place.file.read_bytes() == NEWER
    elif deed == "damage blob":
        # Before the original is in the window, the blob is still checked.
        if swap.FAULT_POINTS.index(point) < swap.FAULT_POINTS.index("swap.kept"):
            assert place.file.read_bytes() == ORIGINAL
        else:
            assert place.kept() == [ORIGINAL]
        return
    else:
        assert moved.read_bytes() == was
        assert place.file.exists() == (deed == "replace parent")
        if deed == "replace parent":
            assert place.file.read_bytes() == NEWER
    assert report.found == []
    if was == place.blob:
        assert place.kept() == [ORIGINAL]


def test_a_crash_while_taking_back_is_ended_too(place, at_point, expect_log):
    """As if the process died in the middle of abandoning: what came out of the exchange was somebody's newer file."""
    newer = place.root / "newer"
    newer.write_bytes(NEWER)

    def die() -> None:
        newer.rename(place.file)  # between the last check and the exchange

    expect_log("can't be taken back yet")
    real = swap.exchange.take_back

    def cut_short(*_: object) -> None:
        raise OSError(errno.EIO, "cut short")

    swap.exchange.take_back = cut_short
    try:
        at_point("swap.checked", die)
        assert place.swap().status is SwapStatus.CHANGED
    finally:
        swap.exchange.take_back = real
    assert place.file.read_bytes() == place.blob  # the wrong one, for now
    place.store.ledger.close()
    place.store._ledger = None
    place.store.session = "0badcafe"
    place.store.close()
    place.store = open_store(str(place.root))
    try:
        report = recover_twice(place)
        assert place.file.read_bytes() == NEWER
        assert report.undone == ["sub/photo.jpg"]
    finally:
        place.store.close()


def test_recovery_leaves_the_steps_of_living_processes_alone(place, tmp_path):
    flag = tmp_path / "paused"
    payload = tmp_path / "payload"
    payload.write_bytes(place.blob)
    child = subprocess.Popen(
        [sys.executable, "-c", WORKER, "swap", str(place.root), "sub/photo.jpg", str(payload)],
        env={**os.environ, "ESRFS_FAULTS": f"swap.looked=pause:{flag}"},
    )
    while not flag.exists():
        assert child.poll() is None
        time.sleep(0.01)
    report = recovery.recover(place.store)
    assert report.living == 1
    assert (report.finished, report.undone, report.discarded, report.found) == ([], [], 0, [])
    assert len(place.staged()) == 1
    flag.unlink()
    assert child.wait() == 0
    assert place.file.read_bytes() == place.blob
    assert recover_twice(place).found == []


@pytest.mark.parametrize("point", recovery.FAULT_POINTS)
def test_recovery_may_be_cut_short_at_any_point(place, point):
    run_killed(place, "swap", "swap.exchanged", place.blob)
    script = "import sys; from esrfs.store import layout, recovery; recovery.recover(layout.open_store(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(place.root)],
        env={**os.environ, "ESRFS_FAULTS": f"{point}=kill"},
        check=False,
    )
    assert done.returncode == -9
    assert place.file.read_bytes() in (ORIGINAL, place.blob)
    assert recover_twice(place).found == []
    assert place.file.read_bytes() == place.blob
    assert place.kept() == [ORIGINAL]


def test_what_recovery_can_not_explain_is_put_aside_and_never_deleted(place):
    run_killed(place, "swap", "swap.synced", place.blob)
    host = place.root / RESERVED / "staging" / place.store.host
    (name,) = os.listdir(host)
    (host / name).write_bytes(ORIGINAL)  # looks like an original: the disk may have lied about the ledger
    (host / "strange").write_bytes(b"?")
    report = recovery.recover(place.store)
    assert len(report.found) == 2
    assert sorted(place.found()) == sorted([ORIGINAL, b"?"])
    assert place.staged() == []


def test_what_the_ledger_can_not_name_is_left_alone(place):
    host = os.fsencode(place.root / RESERVED / "staging" / place.store.host)
    names = [b"IMG_\xff.jpg", f"{place.store.session}.blob.{'0' * 14}".encode() + b"\xff\xfe", b"x" * 255]
    for name in names:
        Path(os.fsdecode(host + b"/" + name)).write_bytes(b"?")
    for _ in range(2):
        report = recovery.recover(place.store)
        assert sorted(map(os.fsencode, report.left)) == sorted(names)
        assert (report.found, report.problems) == ([], [])
    assert sorted(os.listdir(host)) == sorted(names)
    assert [one.problem for one in check.check(place.store).findings] == ["unknown_file"] * 3


def fails_with(number: int, names: list[str]) -> Callable[..., int]:
    """An os.open that doesn't open these."""
    really = os.open

    def opens(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path in names:
            raise OSError(number, os.strerror(number), path)
        return really(path, flags, mode, dir_fd=dir_fd)

    return opens


PASSING = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE]


@pytest.mark.parametrize("number", PASSING)
def test_a_file_that_can_not_be_opened_just_now_is_not_taken_for_another(place, monkeypatch, number):
    fd, name = staging.create(place.store, "blob")
    known = metadata.mark(fd)
    os.close(fd)
    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "open", fails_with(number, [name]))
        with pytest.raises(OSError, match=os.strerror(number)):
            staging.discard(place.store, name, known)
    assert (place.staged(), place.found()) == ([name], [])
    assert staging.discard(place.store, name, known) is None
    assert place.staged() == place.found() == []


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO])
def test_a_handle_that_is_not_to_be_had_just_now_is_not_taken_for_none(place, monkeypatch, number):
    fd, name = staging.create(place.store, "blob")
    known = metadata.mark(fd)
    os.close(fd)

    def fails(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    with monkeypatch.context() as patch:
        patch.setattr(linux._libc, "name_to_handle_at", fails)
        with pytest.raises(OSError, match=os.strerror(number)):
            staging.discard(place.store, name, known)
    assert (place.staged(), place.found()) == ([name], [])


def test_what_took_the_place_of_a_staging_file_is_put_aside(place):
    fd, name = staging.create(place.store, "blob")
    known = metadata.mark(fd)
    os.close(fd)
    host = place.root / RESERVED / "staging" / place.store.host
    (host / name).unlink()
    (host / name).symlink_to("elsewhere")
    aside = staging.discard(place.store, name, known)
    assert aside is not None
    assert os.readlink(place.root / RESERVED / "originals" / aside) == "elsewhere"


@pytest.mark.parametrize("closed", ["staged", "named"])
@pytest.mark.parametrize(
    ("step", "point"),
    [
        ("swap", "swap.intended"),
        ("swap", "swap.exchanged"),
        ("plain", "plain.exchanged"),
        ("in_place", "plain.in_place.chunk"),
    ],
)
def test_a_step_whose_files_can_not_be_opened_just_now_waits_for_the_next_recovery(
    place, monkeypatch, closed, step, point
):
    if step != "swap":
        place.put_blob()
    run_killed(place, step, point, place.blob if step == "swap" else VIEW)
    before, staged = place.file.read_bytes(), place.staged()
    really_beneath = recovery.beneath

    def beneath(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
        if flags & os.O_RDWR and closed == "named":
            raise OSError(errno.EMFILE, "no descriptor left", path)
        return really_beneath(root_fd, path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(
            recovery.os, "open", fails_with(errno.EMFILE, names=staged if closed == "staged" else ["photo.jpg"])
        )
        patch.setattr(recovery, "beneath", beneath)
        assert len(recovery.recover(place.store).problems) == 1
    assert (place.file.read_bytes(), place.staged(), place.found()) == (before, staged, [])
    report = recover_twice(place)
    assert report.problems == []
    assert place.file.read_bytes() == {"swap.intended": ORIGINAL, "swap.exchanged": place.blob}.get(point, VIEW)


# ---- what others do in the middle of it


def act(place: Place, deed: str) -> None:
    """Change the file behind everybody's back."""
    file, other = place.file, place.root / "other.jpg"
    if deed == "replace":
        new = place.root / "new"
        new.write_bytes(NEWER)
        new.rename(file)
    elif deed == "delete":
        file.unlink()
    elif deed == "delete and create":
        file.unlink()
        file.write_bytes(NEWER)
    elif deed == "write":
        with open(file, "r+b") as stream:
            stream.write(NEWER)
    elif deed == "truncate":
        os.truncate(file, 5)
    elif deed == "chmod":
        file.chmod(0o604)
    elif deed == "setxattr":
        os.setxattr(file, "user.note", b"theirs")
    elif deed == "utime":
        os.utime(file, ns=(1, 1))
    elif deed == "link":
        os.link(file, other)
    elif deed == "rename":
        file.rename(other)
    elif deed == "rename parent":
        file.parent.rename(place.root / "moved")
    else:
        raise ValueError(deed)


DEEDS = (
    "replace", "delete", "delete and create", "write", "truncate", "chmod", "setxattr", "utime", "link", "rename",
    "rename parent",
)  # fmt: skip


@pytest.mark.parametrize("point", swap.FAULT_POINTS)
@pytest.mark.parametrize("deed", DEEDS)
def test_the_newer_truth_wins(place, at_point, point, deed):
    seen: list[bytes] = []

    def do() -> None:
        act(place, deed)
        if place.file.exists():
            seen.append(place.file.read_bytes())

    threads: list[threading.Thread] = []

    def start() -> None:
        """A writer waits in open(2) as long as the lease is held, so it gets a thread and a head start."""
        threads.append(threading.Thread(target=do))
        threads[0].start()
        threads[0].join(0.1)

    at_point(point, start)
    started = time.monotonic()
    result = place.swap()
    threads[0].join()
    assert time.monotonic() - started < 5, "a writer was kept waiting"
    assert place.staged() == []
    either = (ORIGINAL, place.blob)
    moved = {"rename": place.root / "other.jpg", "rename parent": place.root / "moved" / "photo.jpg"}.get(deed)
    if deed in ("replace", "delete and create"):
        assert place.file.read_bytes() == NEWER
    elif deed == "delete":
        assert not place.file.exists()
    elif deed in ("write", "truncate"):
        # What the writer saw when it was done is what there is: its write went to the file that has the name.
        assert place.file.read_bytes() == seen[0]
    elif deed == "link":
        assert place.file.read_bytes() in either
        assert (place.root / "other.jpg").read_bytes() in either
    elif moved is not None:
        assert not place.file.exists()
        assert moved.read_bytes() in either
    else:
        assert place.file.read_bytes() in either
    if deed == "chmod":
        assert place.file.stat().st_mode & 0o777 == 0o604
    elif deed == "setxattr":
        assert os.getxattr(place.file, "user.note") == b"theirs"
    elif deed == "utime":
        assert place.file.stat().st_mtime_ns == 1
    if result.status is SwapStatus.DONE:
        assert ORIGINAL in place.kept()
    assert (
        ledger.pending(ledger.decode((place.root / RESERVED / "ledger" / place.store.ledger.name).read_bytes()).records)
        == []
    )


@pytest.mark.parametrize("deed", ["replace", "delete", "rename", "chmod", "write"])
@pytest.mark.parametrize(
    ("point", "failure"),
    [
        ("swap.exchanged", "interrupted"),
        ("swap.exchanged", "error"),
        ("swap.looked", "error"),
        ("swap.directories_synced", "error"),
        ("swap.kept_synced", "error"),
    ],
)
def test_the_newer_truth_wins_over_taking_back(place, at_point, point, deed, failure):
    """Somebody changes what lies under the name while the swap, for another reason, is about to be taken back."""

    def do() -> None:
        act(place, deed)
        if failure == "error":
            raise OSError(errno.EIO, "a directory could not be synced")

    at_point(point, do)
    late = iter([False, False, True])
    if failure == "error":
        with pytest.raises(OSError, match="could not be synced"):
            place.swap()
    else:
        assert place.swap(interrupted=lambda: next(late, True)).status is SwapStatus.BUSY
    assert place.staged() == []
    if deed == "replace":
        assert place.file.read_bytes() == NEWER
        assert place.kept() == [ORIGINAL]
    elif deed == "delete":
        assert not place.file.exists()
        assert place.kept() == [ORIGINAL]
    elif deed == "rename":
        assert not place.file.exists()
        assert (place.root / "other.jpg").read_bytes() == place.blob
        assert place.kept() == [ORIGINAL]
    elif deed == "chmod":
        assert place.file.read_bytes() == ORIGINAL
        assert place.file.stat().st_mode & 0o777 == 0o604
    else:
        assert place.file.read_bytes() == ORIGINAL
        assert [content[: len(NEWER)] for content in place.found()] == [NEWER]


def test_take_back_follows_a_name_that_is_replaced_again_and_again(place):
    """Each exchange back may bring out something newer still; the newest stays, and nothing is dropped."""
    root = place.root
    (root / "held").write_bytes(b"first")
    (root / "name").write_bytes(b"ours")
    placed = os.stat(root / "name")
    fd = os.open(root, os.O_RDONLY)
    (root / "second").write_bytes(b"second")
    (root / "second").rename(root / "name")
    taken = swap.exchange.take_back(fd, "held", fd, "name", placed)
    os.close(fd)
    assert taken is swap.TakenBack.REPLACED
    assert (root / "name").read_bytes() == b"second"
    assert (root / "held").read_bytes() == b"first"


def test_a_broken_lease_kills_nobody(place):
    """SIGIO's default action would end the process; it must not need the entry point's SIG_IGN."""
    fd = os.open(place.file, os.O_RDONLY)
    with linux.read_lease(fd) as broken:
        assert not broken()
        writer = threading.Thread(target=lambda: os.close(os.open(place.file, os.O_WRONLY)))
        writer.start()
        deadline = time.monotonic() + 5
        while not broken() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert broken()
    writer.join()
    os.close(fd)


# ---- full disks and failing ones


@pytest.mark.parametrize("point", [*swap.FAULT_POINTS, "ledger.append", "ledger.fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_step_leaves_everything_as_it_was(either_place, at_point, expect_log, point, number):
    place = either_place
    expect_log("ledger takes no record")

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    place.store.ledger  # noqa: B018 (opened here: it is the intent's append that is to fail)
    at_point(point, fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        place.swap()
    complete = point == "swap.done" or (
        not place.store.config.probe.exchange and point in ("swap.directories_synced", "swap.kept", "swap.kept_synced")
    )
    assert place.file.read_bytes() == (place.blob if complete else ORIGINAL)
    assert place.kept() == ([ORIGINAL] if complete else [])
    assert place.staged() == []


def test_a_failed_fsync_of_the_ledger_is_not_retried(place, at_point):
    place.store.ledger  # noqa: B018
    at_point("ledger.fsync", lambda: (_ for _ in ()).throw(OSError(errno.EIO, "failed")))
    with pytest.raises(OSError, match="failed"):
        place.swap()
    with pytest.raises(OSError, match="the ledger failed before"):
        place.swap()
    assert place.file.read_bytes() == ORIGINAL


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 1 MiB with a store, and the store."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        yield from make_place(disk, "exchange")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_on_a_full_disk_nothing_is_lost(small_disk, expect_log):
    """Of every size that is left free: each step meets a full disk at some point."""
    expect_log("ledger takes no record|can't be taken back yet")
    place = small_disk
    filler = place.root.parent / "filler"
    filler.write_bytes(bytes(1 << 20 >> 1))
    results = set()
    for free in range(0, 64 * 1024, 4096):
        with open(filler, "ab") as file:
            try:
                while True:
                    os.write(file.fileno(), bytes(4096))
            except OSError:
                pass
        os.truncate(filler, max(0, filler.stat().st_size - free))
        for what in (place.swap, place.materialise):
            if what == place.materialise and place.file.read_bytes() != place.blob:
                continue
            try:
                results.add(str(getattr(what(), "status", "view")))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                results.add("full")
            assert place.file.read_bytes() in (ORIGINAL, place.blob, VIEW)
            assert place.staged() == []
            if place.file.read_bytes() == VIEW:
                place.file.write_bytes(b"")
                os.truncate(filler, 0)
                place.file.write_bytes(ORIGINAL)
                for name in os.listdir(place.store.originals_fd):
                    os.unlink(name, dir_fd=place.store.originals_fd)
    assert results >= {"full", "done"}
    os.truncate(filler, 0)
    assert recovery.recover(place.store).problems == []


# ---- a blob becomes a plain file


def test_materialise_takes_the_name_and_keeps_the_metadata(place):
    place.put_blob()
    before = metadata_of(place.file)
    assert place.materialise() == VIEW
    assert place.file.read_bytes() == VIEW
    assert metadata_of(place.file) == before
    assert place.staged() == []
    assert place.found() == []


def test_materialise_of_a_file_with_several_names_is_in_place(place):
    place.put_blob()
    other = place.root / "other.jpg"
    os.link(place.file, other)
    before = metadata_of(place.file)
    assert place.materialise() == VIEW
    assert os.stat(place.file).st_ino == os.stat(other).st_ino
    assert other.read_bytes() == VIEW
    assert metadata_of(place.file) == before
    assert place.staged() == []


@pytest.mark.parametrize("path", [None, "elsewhere.jpg", "gone/photo.jpg"])
def test_materialise_without_knowing_the_name_is_in_place(place, path):
    place.put_blob()
    inode = os.stat(place.file).st_ino
    assert place.materialise(path=path) == VIEW
    assert place.file.read_bytes() == VIEW
    assert os.stat(place.file).st_ino == inode


def test_materialise_in_a_write_protected_directory_is_in_place(place, monkeypatch):
    """Who may write to a file need not be allowed to change the names in its directory."""
    place.put_blob()
    inode = os.stat(place.file).st_ino

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "write-protected")

    monkeypatch.setattr(swap.exchange, "exchange", refuse)
    assert place.materialise() == VIEW
    assert place.file.read_bytes() == VIEW
    assert os.stat(place.file).st_ino == inode
    assert place.staged() == []
    place.file.write_bytes(ORIGINAL)
    os.utime(place.file, ns=(MTIME, MTIME))
    assert place.swap().status is SwapStatus.UNAVAILABLE
    assert place.file.read_bytes() == ORIGINAL


def test_materialise_of_a_deleted_file_gives_a_file_without_name(place):
    place.put_blob()
    blob_fd = os.open(place.file, os.O_RDONLY)
    place.file.unlink()
    fd = plain.materialise(place.store, "sub/photo.jpg", blob_fd, lambda fd: write_all(fd, VIEW))
    assert os.pread(fd, 1 << 24, 0) == VIEW
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    os.close(blob_fd)
    assert not place.file.exists()
    assert place.staged() == []


def test_a_shorter_view_in_place_leaves_nothing_of_the_blob(place):
    place.put_blob()
    assert place.materialise(view=b"", path=None) == b""
    assert place.file.read_bytes() == b""


@pytest.mark.parametrize("what", ["plain", "in_place", "restore"])
@pytest.mark.parametrize("point", [*plain.FAULT_POINTS, "plain.in_place.chunk"])
def test_a_crash_while_materialising_leaves_blob_or_view(place, what, point):
    if what == "in_place":
        if point == "plain.exchanged":
            return
    elif point in ("plain.in_place", "plain.in_place.chunk"):
        return
    place.put_blob()
    before = metadata_of(place.file)
    other = place.root / "other.jpg"
    if what == "in_place":
        os.link(place.file, other)
    run_killed(place, what, point, VIEW)
    report = recover_twice(place)
    after = ORIGINAL if what == "restore" else VIEW
    content = place.file.read_bytes()
    assert content in (place.blob, after)
    late = plain.FAULT_POINTS.index("plain.exchanged")
    if point in plain.FAULT_POINTS[late:]:
        assert content == after
    assert metadata_of(place.file) == before
    if what == "in_place":
        assert os.stat(place.file).st_ino == os.stat(other).st_ino
    if point != "plain.in_place.chunk":
        assert report.found == []
    assert place.kept() == [ORIGINAL]


@pytest.fixture
def another_host(place, monkeypatch):
    """``another_host()``: the store as it is seen from a machine with another name."""
    with ExitStack() as opened:

        def look() -> Place:
            with monkeypatch.context() as there:  # undo() would take the test's own XDG directories back, too
                there.setattr(layout.socket, "gethostname", lambda: "another")
                store = opened.enter_context(open_store(str(place.root)))
            return Place(place.root, store, place.blob)

        yield look


@pytest.mark.parametrize("point", ["swap.exchanged", "swap.looked", "swap.directories_synced"])
def test_an_original_in_the_hands_of_a_machine_that_is_gone_comes_back(place, another_host, point):
    """Its step is not ended: that machine may live. What it holds is only read, so when it comes back all is well."""
    run_killed(place, "swap", point, place.blob)
    there = another_host()
    report = recovery.recover(there.store)
    assert (report.finished, report.undone, report.found, report.problems) == ([], [], [], [])
    assert place.file.read_bytes() == place.blob
    (held,) = staging.entries(place.store)
    (finding,) = check.check(there.store).findings
    assert finding.problem == "unfinished"
    assert f"{RESERVED}/staging/{place.store.host}/{held.name}" in finding.message
    assert "sub/photo.jpg" in finding.message
    assert "esrfs restore" in finding.message
    os.close(plain.restore(there.store, "sub/photo.jpg"))
    assert place.file.read_bytes() == ORIGINAL
    assert [one.name for one in staging.entries(place.store)] == [held.name]
    os.unlink(place.file)
    there.store.close()
    assert recovery.recover(place.store).problems == []
    assert not place.file.exists()
    assert place.kept() == [ORIGINAL]
    assert place.staged() == []


def test_an_original_that_rotted_in_such_hands_is_not_brought_back_and_its_place_is_told(
    place, another_host, expect_log
):
    expect_log("is not what it was")
    run_killed(place, "swap", "swap.exchanged", place.blob)
    (held,) = staging.entries(place.store)
    where = f"{RESERVED}/staging/{place.store.host}/{held.name}"
    (place.root / where).write_bytes(ORIGINAL[:-1] + b"X")
    there = another_host()
    with pytest.raises(StoreError, match=where):
        plain.restore(there.store, "sub/photo.jpg")
    assert place.file.read_bytes() == place.blob
    os.unlink(place.root / where)
    with pytest.raises(StoreError, match="left the undo window"):
        plain.restore(there.store, "sub/photo.jpg")


def test_a_blob_that_a_machine_that_is_gone_left_half_overwritten_is_named_with_its_complete_copy(place, another_host):
    place.put_blob()
    run_torn(place, 0, 64)
    (held,) = staging.entries(place.store)
    there = another_host()
    unfinished = [one for one in check.check(there.store).findings if one.problem == "unfinished"]
    assert len(unfinished) == 1
    where = f"{RESERVED}/staging/{place.store.host}/{held.name}"
    assert where in unfinished[0].message
    assert (place.root / where).read_bytes() == VIEW
    there.store.close()
    recover_twice(place)
    assert place.file.read_bytes() == VIEW


TORN = """
import os, signal, sys
from esrfs.store import plain
from esrfs.store.layout import open_store
root, view, first, last = sys.argv[1], open(sys.argv[2], "rb").read(), int(sys.argv[3]), int(sys.argv[4])

def cut(from_fd, to_fd):
    st = os.fstat(to_fd)
    os.pwrite(to_fd, os.pread(from_fd, last - first, first), first)
    os.utime(to_fd, ns=(st.st_atime_ns, st.st_mtime_ns))
    os.fsync(to_fd)
    os.kill(os.getpid(), signal.SIGKILL)

plain.copy_over = cut
with open_store(root) as store:
    fd = os.open(os.path.join(root, "sub/photo.jpg"), os.O_RDONLY)
    plain.materialise(store, None, fd, lambda to: os.pwrite(to, view, 0))
"""


def run_torn(place: Place, first: int, last: int) -> None:
    """Leave what a power cut leaves when of a view only the bytes from ``first`` to ``last`` reached the disk."""
    payload = place.root.parent / "payload"
    payload.write_bytes(VIEW)
    command = [sys.executable, "-c", TORN, str(place.root), str(payload), str(first), str(last)]
    assert subprocess.run(command, check=False).returncode == -9


@pytest.mark.parametrize("where", ["picture", "recipe", "footer", "nothing"])
def test_a_power_cut_in_the_middle_of_writing_over_a_blob_keeps_the_complete_copy(place, where):
    """fsync writes data over the blob's own blocks first, and the inode after it: what comes back has the blob's size
    and mtime, and bytes of the view in it."""
    place.put_blob()
    size = len(place.blob)
    first, last = {"picture": (0, 64), "recipe": (size - 160, size - 100), "footer": (size - 8, size)}.get(
        where, (0, 0)
    )
    before = metadata_of(place.file)
    run_torn(place, first, last)
    torn = place.file.read_bytes()
    assert (len(torn), torn != place.blob) == (size, where != "nothing")
    report = recover_twice(place)
    assert place.file.read_bytes() == (place.blob if where == "nothing" else VIEW)
    assert place.found() == ([] if where == "nothing" else [torn])
    assert len(report.found) == len(place.found())
    assert metadata_of(place.file) == before


def test_a_half_overwritten_blob_that_a_full_disk_lets_nobody_complete_waits(place, monkeypatch):
    """What it was can't be put aside: nothing is touched or piles up in staging, and the next recovery does it."""
    place.put_blob()
    run_torn(place, 0, 64)
    torn, staged = place.file.read_bytes(), place.staged()
    really = recovery.copy_over

    def full(from_fd: int, to_fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(recovery, "copy_over", full)
    assert len(recovery.recover(place.store).problems) == 1
    assert (place.file.read_bytes(), place.staged()) == (torn, staged)
    monkeypatch.setattr(recovery, "copy_over", really)
    recover_twice(place)
    assert place.file.read_bytes() == VIEW
    assert place.found() == [torn]


def test_recovery_never_overwrites_another_file_that_got_the_inode_number(either_place):
    """ext4 reuses inode numbers at once."""
    place = either_place
    place.put_blob()
    other = place.root / "other.jpg"
    os.link(place.file, other)
    number = os.stat(other).st_ino
    run_killed(place, "in_place", "plain.in_place.chunk", VIEW)
    place.file.unlink()
    other.unlink()
    for attempt in range(64):
        reused = place.file.parent / f"{attempt}.txt"
        reused.write_bytes(NEWER)
        if os.stat(reused).st_ino == number:
            break
    recover_twice(place)
    for path in place.file.parent.glob("*.txt"):
        assert path.read_bytes() == NEWER


@pytest.mark.parametrize("point", plain.FAULT_POINTS)
@pytest.mark.parametrize("deed", ["replace", "delete", "chmod", "rename", "rename parent", "link"])
def test_the_newer_truth_wins_over_materialising(place, at_point, point, deed):
    place.put_blob()
    at_point(point, lambda: act(place, deed))
    assert place.materialise() == VIEW
    assert place.staged() == []
    either = (place.blob, VIEW)
    if deed == "replace":
        if point != "plain.in_place":
            assert place.file.read_bytes() == NEWER
    elif point == "plain.in_place":
        return
    elif deed == "delete":
        assert not place.file.exists()
    elif deed == "chmod":
        assert place.file.stat().st_mode & 0o777 == 0o604
        assert place.file.read_bytes() == VIEW
    elif deed == "rename":
        assert not place.file.exists()
        assert (place.root / "other.jpg").read_bytes() == VIEW
    elif deed == "rename parent":
        assert not place.file.exists()
        assert (place.root / "moved" / "photo.jpg").read_bytes() == VIEW
    else:
        assert place.file.read_bytes() in either


@pytest.mark.parametrize("path", ["sub/photo.jpg", None])
@pytest.mark.parametrize("point", [*plain.FAULT_POINTS[:-2], "plain.in_place.chunk", "ledger.append"])
def test_a_full_disk_while_materialising_leaves_the_blob(place, at_point, point, path):
    place.put_blob()
    before = metadata_of(place.file)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "no space")

    reached = at_point(point, fail)
    try:
        place.materialise(path=path)
    except OSError as error:
        assert error.errno == errno.ENOSPC
        if not (path is None and point == "plain.looked"):
            assert place.file.read_bytes() == place.blob
    else:
        assert point not in reached
        assert place.file.read_bytes() == VIEW
    assert metadata_of(place.file) == before


@pytest.mark.parametrize("path", ["sub/photo.jpg", None])
def test_what_is_left_in_staging_undoes_no_write(place, monkeypatch, expect_log, path):
    """The plain file has the name: a program that is told of an error, and tries again, must not write elsewhere."""
    expect_log("could not be removed from staging")
    place.put_blob()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "a bad sector")

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "same_content", fail)
        patch.setattr(staging, "remove", fail)
        assert place.materialise(path=path) == VIEW
    assert len(place.staged()) == 1
    place.file.write_bytes(b"changed by the program")
    place.store.close()
    with open_store(str(place.root)) as store:
        recovery.recover(store)
    assert place.file.read_bytes() == b"changed by the program"
    assert place.staged() == place.found() == []


def test_a_blob_that_lost_its_name_is_not_written_to(place, monkeypatch):
    """Where neither the exchange nor its undoing could be ended, the blob lies in staging: nobody would find there what
    a program writes."""
    place.put_blob()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the disk fails")

    blob_fd = os.open(place.file, os.O_RDONLY)
    with monkeypatch.context() as patch:
        patch.setattr(plain.exchange, "take_back", fail)
        patch.setattr(metadata, "difference", fail)
        with pytest.raises(OSError, match="the disk fails"):
            plain.materialise(place.store, "sub/photo.jpg", blob_fd, lambda fd: write_all(fd, VIEW))
    assert place.file.read_bytes() == VIEW
    with pytest.raises(OSError, match="open it again"):
        plain.materialise(place.store, "sub/photo.jpg", blob_fd, lambda fd: write_all(fd, VIEW))
    assert os.pread(blob_fd, 1 << 24, 0) == place.blob
    os.close(blob_fd)
    place.store.close()
    with open_store(str(place.root)) as store:
        recovery.recover(store)
    assert place.file.read_bytes() == VIEW
    assert place.staged() == []


def test_a_view_that_can_not_be_written_leaves_the_blob(place):
    place.put_blob()
    blob_fd = os.open(place.file, os.O_RDONLY)

    def write_view(fd: int) -> None:
        os.write(fd, b"half")
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        plain.materialise(place.store, "sub/photo.jpg", blob_fd, write_view)
    os.close(blob_fd)
    assert place.file.read_bytes() == place.blob
    assert place.staged() == []


def test_no_descriptor_is_left_open(place):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    place.put_blob()
    before = count()
    place.materialise()
    place.file.write_bytes(ORIGINAL)
    os.utime(place.file, ns=(MTIME, MTIME))
    place.put_blob()
    os.close(plain.restore(place.store, "sub/photo.jpg"))
    recovery.recover(place.store)
    with pytest.raises(StoreError):
        plain.restore(place.store, "nothing")
    assert count() == before
    assert staging.entries(place.store) == []
