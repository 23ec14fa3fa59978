"""Programs that people use, on a real mount with compacted photographs."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import photograph
from tests.mounting import Mounted
from tests.twin import Shared, listed, shared_mount

pytestmark = pytest.mark.mount

Needs = Callable[[str], str]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None:
        pytest.skip("FUSE can't be used here")
    with shared_mount(tmp_path_factory.mktemp("programs")) as started:
        yield started


@dataclass(frozen=True)
class Album:
    """Photographs on the native filesystem, and the same in the mount, compacted."""

    source: Path
    mounted: Path
    stored: Path
    views: dict[str, bytes]
    """Of the blobs, by relative path."""


@pytest.fixture(scope="module")
def album(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Album:
    source = tmp_path_factory.mktemp("album")
    (source / "2024").mkdir()
    exif = Image.Exif()
    exif[0x010F], exif[0x9003] = "esrfs", "2024:05:06 07:08:09"
    for number, name in enumerate(("coffee", "chelsea")):
        small = photograph(name).resize((360, 240), Image.Resampling.LANCZOS)
        small.save(source / "2024" / f"{name}.jpg", quality=95, exif=exif)
        os.utime(source / "2024" / f"{name}.jpg", ns=(10**18 + number, 10**18 + 123_456_789 + number))
        os.setxattr(source / "2024" / f"{name}.jpg", "user.rating", b"5")
        os.chmod(source / "2024" / f"{name}.jpg", 0o640)
    photograph("coffee").resize((240, 160), Image.Resampling.LANCZOS).save(source / "scan.png")
    (source / "notes.txt").write_text("Not a photograph.\n")
    os.symlink("2024/coffee.jpg", source / "best.jpg")
    with pytest.MonkeyPatch.context() as patch:
        mount = shared.adopt(patch)
        mounted, stored = mount.path / "album", mount.store / "album"
        subprocess.run(["cp", "-a", source, mounted], check=True)
        result = mount.compact("album")
        assert result["compacted"] >= 2, mount.log()
        files = [path for path in source.rglob("*") if path.is_file() and not path.is_symlink()]
        relative = [str(path.relative_to(source)) for path in files]
        blobs = [name for name in relative if mount.explain(f"album/{name}")["state"] == "blob"]
        return Album(source, mounted, stored, {name: (mounted / name).read_bytes() for name in blobs})


@pytest.fixture
def mount(shared: Shared, monkeypatch: pytest.MonkeyPatch, _own_directories: None) -> Mounted:
    return shared.adopt(monkeypatch)


@pytest.fixture
def blob(mount: Mounted, album: Album, request: pytest.FixtureRequest) -> tuple[str, bytes]:
    """A blob of its own for one test: (its name in the mount, the view's bytes)."""
    name = f"{request.node.name}.jpg"
    shutil.copy2(album.stored / "2024" / "coffee.jpg", mount.store / name)
    return name, album.views["2024/coffee.jpg"]


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def check_copy(album: Album, copy: Path) -> None:
    """``copy`` holds what the mount shows, with times, modes and attributes."""
    for path in sorted(album.mounted.rglob("*")):
        other = copy / path.relative_to(album.mounted)
        ours, theirs = path.lstat(), other.lstat()
        assert ours.st_mode == theirs.st_mode, path
        assert listed(path) == listed(other), path
        if path.is_symlink():
            assert os.readlink(path) == os.readlink(other)
        elif path.is_file():
            assert (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns), path
            assert other.read_bytes() == path.read_bytes(), path


def test_rsync_a_second_time_transfers_nothing(mount: Mounted, album: Album, needs: Needs) -> None:
    # A guessed size, or times that are not kept, would have rsync send every photograph again.
    rsync = needs("rsync")
    assert run(rsync, "-aiX", "--delete", f"{album.source}/", f"{album.mounted}/") == ""
    assert set(album.views) >= {"2024/coffee.jpg", "2024/chelsea.jpg"}
    target = mount.path / "by rsync"
    run(rsync, "-aX", f"{album.source}/", f"{target}/")
    assert run(rsync, "-aiX", f"{album.source}/", f"{target}/") == ""
    mount.compact("by rsync")
    assert mount.explain("by rsync/2024/coffee.jpg")["state"] == "blob"
    assert run(rsync, "-aiX", f"{album.source}/", f"{target}/") == ""
    assert ".fuse_hidden" not in " ".join(os.listdir(target))


def test_rsync_out_again(mount: Mounted, album: Album, needs: Needs, tmp_path: Path) -> None:
    run(needs("rsync"), "-aXS", f"{album.mounted}/", f"{tmp_path}/copy/")
    check_copy(album, tmp_path / "copy")
    assert run("rsync", "-aiX", "--checksum", f"{album.mounted}/", f"{tmp_path}/copy/") == ""


@pytest.mark.parametrize("options", [["--sparse=always"], ["--sparse=auto"], ["--reflink=auto"]], ids=str)
def test_cp(mount: Mounted, album: Album, tmp_path: Path, options: list[str]) -> None:
    mount.call("cache-clear")
    run("cp", "-a", *options, album.mounted, tmp_path / "copy")
    check_copy(album, tmp_path / "copy")
    run("cp", "-a", *options, tmp_path / "copy", mount.path / f"copied {options[0]}")
    check_copy(album, mount.path / f"copied {options[0]}")


@pytest.mark.parametrize("cold", [False, True], ids=["cached", "cold"])
def test_tar_of_sparse_files(mount: Mounted, album: Album, needs: Needs, tmp_path: Path, cold: bool) -> None:
    # tar -S takes a file with no blocks for one hole, and pads what turns out shorter than stat said.
    if cold:
        mount.call("cache-clear")
    run(needs("tar"), "-C", album.mounted, "--xattrs", "-Scf", tmp_path / "archive.tar", ".")
    (tmp_path / "out").mkdir()
    run("tar", "-C", tmp_path / "out", "--xattrs", "-Sxf", tmp_path / "archive.tar")
    for name, view in album.views.items():
        assert (tmp_path / "out" / name).read_bytes() == view
    assert run("tar", "-C", album.mounted, "-df", tmp_path / "archive.tar") == ""
    (mount.path / f"untarred {cold}").mkdir()
    run("tar", "-C", mount.path / f"untarred {cold}", "--xattrs", "-Sxf", tmp_path / "archive.tar")
    check_copy(album, mount.path / f"untarred {cold}")


def test_mv_out_and_in(mount: Mounted, blob: tuple[str, bytes], tmp_path: Path) -> None:
    name, view = blob
    before = (mount.path / name).stat()
    run("mv", mount.path / name, tmp_path / "moved.jpg")
    assert (tmp_path / "moved.jpg").read_bytes() == view
    assert (tmp_path / "moved.jpg").stat().st_mtime_ns == before.st_mtime_ns
    assert not (mount.store / name).exists()
    run("mv", tmp_path / "moved.jpg", mount.path / name)
    assert (mount.path / name).read_bytes() == (mount.store / name).read_bytes() == view
    run("mv", mount.path / name, mount.path / f"again {name}")
    assert (mount.path / f"again {name}").read_bytes() == view


def test_du(mount: Mounted, album: Album) -> None:
    def size(*options: str) -> int:
        return int(run("du", "-s", "-B1", *options, album.mounted / "2024").split()[0])

    apparent = int(run("du", "-s", "-B1", "--apparent-size", album.source / "2024").split()[0])
    assert size("--apparent-size") == apparent, "the photographs' own sizes"
    assert size() < apparent / 2, "what the store uses"
    assert size() == int(run("du", "-s", "-B1", album.stored / "2024").split()[0])


def test_find_newer(mount: Mounted, album: Album) -> None:
    # The blob's inode is new since compaction, but not its time.
    reference = mount.path / "reference"
    reference.touch()
    os.utime(reference, ns=(10**18, 10**18 + 123_456_789))
    assert run("find", album.mounted / "2024", "-name", "*.jpg", "-newer", reference).split() == [
        str(album.mounted / "2024" / "chelsea.jpg")
    ]
    assert run("find", album.mounted / "2024", "-name", "*.jpg", "-size", "-4k") == ""


def test_git(mount: Mounted, album: Album, needs: Needs) -> None:
    repository = mount.path / "repository"
    shutil.copytree(album.mounted, repository, symlinks=True)
    git = [needs("git"), "-c", "user.name=esrfs", "-c", "user.email=esrfs@example.org", "-c", "safe.directory=*"]
    for command in (
        ["init", "-q", "."],
        ["add", "-A"],
        ["commit", "-qm", "one"],
        ["fsck", "--strict", "--no-progress"],
        ["checkout", "-q", "-b", "other"],
        ["mv", "notes.txt", "renamed.txt"],
        ["commit", "-qm", "two"],
        ["checkout", "-q", "-"],
        ["gc", "-q"],
        ["fsck", "--full", "--strict", "--no-progress"],
    ):
        run(*git, *command, cwd=repository)
    assert run(*git, "status", "--porcelain", cwd=repository) == ""
    run(*git, "clone", "-q", repository, mount.path / "clone")
    assert (mount.path / "clone" / "notes.txt").read_text() == "Not a photograph.\n"
    mount.compact("repository/2024")
    # Compaction changes bytes of what git tracks, and git notices: the README says to leave repositories alone.
    assert run(*git, "fsck", "--full", "--no-progress", cwd=repository) == ""


def test_sqlite_with_a_write_ahead_log_and_two_connections(mount: Mounted, needs: Needs) -> None:
    # Its -shm file is mapped shared by both processes.
    database = mount.path / "catalogue.db"
    run(needs("sqlite3"), database, "pragma journal_mode=wal; create table t(who text, n int);")
    script = (
        "import sqlite3,sys\nc=sqlite3.connect(sys.argv[1],timeout=30,isolation_level=None)\n"
        "assert c.execute('pragma journal_mode=wal').fetchone()==('wal',)\n"
        "for n in range(150):\n  c.execute('begin immediate')\n"
        "  c.execute('insert into t values(?,?)',(sys.argv[2],n))\n  c.execute('commit')\n"
        "c.execute('create temp table big as select * from t a, t b limit 5000')\n"
        "print(c.execute('pragma integrity_check').fetchone()[0])\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(database), who], stdout=subprocess.PIPE, text=True)
        for who in "ab"
    ]
    assert [process.communicate(timeout=120)[0] for process in both] == ["ok\n", "ok\n"]
    count = run("sqlite3", database, "select who, count(*), sum(n) from t group by who; vacuum;")
    assert count == "a|150|11175\nb|150|11175\n"
    assert run("sqlite3", mount.store / "catalogue.db", "pragma integrity_check") == "ok\n"


@pytest.mark.parametrize("how", ["-overwrite_original", "-overwrite_original_in_place", "-preserve"])
def test_exiftool_writes(mount: Mounted, blob: tuple[str, bytes], needs: Needs, how: str) -> None:
    name, view = blob
    path = mount.path / name
    run(needs("exiftool"), "-q", how, "-Artist=somebody", "-GPSLatitude=47.5", "-GPSLatitudeRef=N", path)
    assert run("exiftool", "-s3", "-Artist", "-Make", path) == "somebody\nesrfs\n"
    assert Image.open(path).tobytes() == Image.open(io.BytesIO(view)).tobytes(), "the pixels are the view's"
    assert path.read_bytes() == (mount.store / name).read_bytes(), "a plain file now"
    if how == "-preserve":
        assert path.with_name(name + "_original").read_bytes() == view
        assert path.stat().st_mtime_ns // 10**9 == path.with_name(name + "_original").stat().st_mtime_ns // 10**9
    assert not list(mount.path.glob("*_exiftool_tmp"))


def test_small_tools_change_a_view(mount: Mounted, blob: tuple[str, bytes]) -> None:
    name, view = blob
    path = mount.path / name
    run("dd", "if=/dev/zero", f"of={path}", "bs=1", "seek=100", "count=5", "conv=notrunc", "status=none")
    expected = view[:100] + bytes(5) + view[105:]
    assert path.read_bytes() == expected
    run("truncate", "-s", "+10", path)
    run("sh", "-c", f"echo more >> '{path}'")
    expected += bytes(10) + b"more\n"
    assert path.read_bytes() == expected
    run("sed", "-i", "$d", path)
    assert path.read_bytes() == (mount.store / name).read_bytes() != expected
    run("shred", "-u", path)
    assert not path.exists()


def test_viewers_open_views(mount: Mounted, album: Album, needs: Needs) -> None:
    mount.call("cache-clear")
    path = album.mounted / "2024" / "coffee.jpg"
    assert run(needs("identify"), "-format", "%m %w %h", path) == "JPEG 360 240"
    mount.call("cache-clear")
    with Image.open(path) as image:
        assert image.size == (360, 240)
        image.load()
    assert "JPEG image data" in run("file", path)
    assert run("cmp", path, album.mounted / "best.jpg") == ""
