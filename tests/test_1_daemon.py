"""Parts of the migration daemon that need no mount: configuration, filters, journal, throttle, names, settling."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from esrfs_daemon import asking, config, copies, copying, main, migration, sources, throttle, walk
from esrfs_daemon.copying import Identity
from esrfs_daemon.destination import Destination
from esrfs_daemon.journal import Busy, Journal, JournalError, Row
from esrfs_daemon.nested import STORE, VIEW, Inside, Nested
from esrfs_daemon.once import Once
from esrfs_daemon.settle import Settling
from esrfs_daemon.throttle import Stopped, Throttle
from esrfs_daemon.walk import Filters, Found

from esrfs import faults
from esrfs.store.beneath import beneath
from esrfs.store.initialise import init
from tests.witness import wait_until

REPOSITORY = Path(__file__).resolve().parent.parent


# ---- configuration


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "daemon.toml"
    path.write_text(text)
    return config.load(path)


def test_the_example_in_the_documentation_is_accepted(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "daemon.md").read_text()
    example = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0]
    found = load(tmp_path, example)
    assert [rule.then for rule in found.rules] == ["trash", "keep"]
    for name in (*config.Config.__struct_fields__, *config.Throttle.__struct_fields__, *config.Rule.__struct_fields__):
        assert name in text, f"docs/daemon.md does not tell of {name}"


RULE = '[[rules]]\nsource = "/a"\ndestination = "/b"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules = []", "nothing to do"),
        ("", "missing required field `rules`"),
        ("[[rules]]\nsource = '/a'", "destination"),
        ("[[rules]]\nsource = 'a'\ndestination = '/b'", "absolute path"),
        (RULE + "then = 'burn'", "burn"),
        (RULE + "colour = 'blue'", "colour"),
        (RULE + "quiet = -1", "quiet"),
        (RULE + RULE, "has a rule already"),
        (RULE + "[throttle]\nhours = 'at night'", "22:00-06:30"),
        (RULE + "[throttle]\nbytes_per_second = 'much'", "no size"),
        (RULE + "[throttle]\nmin_free = -5", "negative"),
        (RULE + "[throttle]\nmax_load = -1", "max_load"),
        ("reconcile_seconds = 0\n" + RULE, "at least 1"),
        ("this is no toml", "line 1"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(config.ConfigError) as caught:
        load(tmp_path, text)
    assert says in str(caught.value)
    assert "daemon.toml" in str(caught.value)


def test_a_configuration_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="No such file"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(config.ConfigError, match="UTF-8"):
        config.load(tmp_path / "bytes.toml")


def test_sizes() -> None:
    for text, wanted in (
        ("20M", 20 << 20),
        ("1.5k", 1536),
        ("2 GB", 2 * 10**9),
        ("3GiB", 3 << 30),
        ("7", 7),
        (9, 9),
        ("5B", 5),
    ):
        assert config.size(text) == wanted
    for text in ("", "M", "1X", "-1", "1e3"):
        with pytest.raises(ValueError, match="size"):
            config.size(text)


def test_hours_over_midnight() -> None:
    night, day = config.hours("22:00-06:30"), config.hours("8:00-12:00")
    assert night is not None
    assert day is not None
    assert [night.includes(hour * 60) for hour in (21, 22, 0, 6, 7)] == [False, True, True, True, False]
    assert [day.includes(hour * 60) for hour in (7, 8, 11, 12)] == [False, True, True, False]
    assert config.hours("") is None


def test_the_program_checks_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text(f'[[rules]]\nsource = "{tmp_path}"\ndestination = "/b"\nthen = "trash"\n')
    main.app(["--config", str(path), "--check-config"], standalone_mode=False)
    assert capsys.readouterr().out == f"{tmp_path} → /b, then trash\n"
    path.write_text("[[rules]]\n")
    assert main.app(["--config", str(path), "--check-config"], standalone_mode=False) == 2
    assert "source" in capsys.readouterr().err
    assert main.app(["--status"], standalone_mode=False) == 4


# ---- what is meant, and what it is called


def test_filters() -> None:
    filters = Filters(["*.jpg", "raw/*"], ["thumbs", "*/tmp/*"])
    assert [filters.takes(path) for path in ("a.JPG", "x/b.jpg", "raw/c.txt", "d.txt", "x/tmp/e.jpg")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert filters.leaves_out("x/thumbs")


def test_names_beside_never_get_too_long() -> None:
    for name in (
        "a.jpg",
        "é" * 125 + ".jpeg",
        "x" * 255,
        "\udcff" * 255,
        ".hidden",
        "archive.tar.gz",
        "a." + "b" * 100,
    ):
        found = [made for made, _ in zip(sources.names_beside(name), range(12), strict=False)]
        assert len(set(found)) == 12
        assert all(len(os.fsencode(made)) <= 255 for made in found)
    assert next(sources.names_beside("a.jpg")) == "a (2).jpg"
    assert next(sources.names_beside(".hidden")) == ".hidden (2)"


def test_a_rename_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the filesystem has no RENAME_NOREPLACE, and where it has no links either."""

    def unknown(*_arguments: object) -> None:
        raise OSError(22, "Invalid argument")

    def no_links(*_arguments: object, **_named: object) -> None:
        raise OSError(1, "Operation not permitted")

    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for patch in (None, ("esrfs.store.linux.renameat2", unknown), ("os.link", no_links)):
            if patch:
                monkeypatch.setattr(*patch)
            (tmp_path / "a").write_text("a")
            (tmp_path / "b").write_text("b")
            with pytest.raises(FileExistsError):
                sources.move(fd, "a", fd, "b")
            sources.move(fd, "a", fd, "c")
            assert {path.name: path.read_text() for path in tmp_path.glob("?")} == {"b": "b", "c": "a"}
            (tmp_path / "c").unlink()
    finally:
        os.close(fd)


def test_a_filesystem_without_exchange_gets_no_symlinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")

    def unknown(*_arguments: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("esrfs.store.linux.renameat2", unknown)
    directory, fd = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path / "a", os.O_RDONLY)
    try:
        with pytest.raises(sources.Left, match="exchange"):
            sources.replace_by_symlink(directory, "a", Identity.of(os.fstat(fd)), "0" * 16, fd=fd, target="/x")
    finally:
        os.close(directory)
        os.close(fd)
    assert [(path.name, path.is_symlink()) for path in tmp_path.glob("*") if path.name[0] != "."] == [("a", False)]
    assert not list(tmp_path.glob(".esrfs*"))


def test_a_walk_stays_in_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "b" / "c.jpg").touch()
    (root / ".esrfs-0123456789abcdef.taken").touch()
    (root / "a.part").touch()
    os.symlink("..", root / "up")
    told: list[walk.Unmovable] = []
    fd = os.open(root, os.O_RDONLY)
    try:
        found = [
            (one.path, one.kind) for one in walk.walk(fd, str(root), Filters(), told.append, Nested(str(root), fd))
        ]
    finally:
        os.close(fd)
    assert found == [("", "directory"), ("up", "symlink"), ("b", "directory"), ("b/c.jpg", "file")]
    assert [(one.path, one.passing) for one in told] == [(".esrfs-0123456789abcdef.taken", False), ("a.part", True)]


def test_stores_and_views_in_a_source_are_known_without_touching_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    for folder in ("a/b/store/.esrfs/originals", "a/view/x", "a/views", "odd/.esrfs", "file"):
        (root / folder).mkdir(parents=True)
    (root / "a/b/store/.esrfs/store.toml").touch()
    (root / "file" / ".esrfs").touch()
    os.symlink("a/b/store", root / "link")
    monkeypatch.setattr("esrfs_daemon.nested._FRESH_SECONDS", 0.0)
    mounts = [(1, "/", f"{root}/a/view", "fuse.esrfs", "/elsewhere"), (2, "/", f"{root}/a/views", "fuse.sshfs", "host")]
    monkeypatch.setattr("esrfs_daemon.destination._mount_table", lambda: iter(mounts))
    opened: list[str] = []
    monkeypatch.setattr("esrfs_daemon.nested.beneath", lambda *wanted: opened.append(wanted[1]) or beneath(*wanted))
    fd = os.open(root, os.O_RDONLY)
    try:
        nested = Nested(str(root), fd)
        assert nested.views() == {"a/view"}
        assert nested.around("a/view/x") == nested.around("a/view") == Inside("a/view", VIEW)
        assert not [path for path in opened if path.startswith("a/view/") or path == "a/view"]
        assert nested.around("a/b/store/.esrfs/originals") == nested.around("a/b/store") == Inside("a/b/store", STORE)
        for folder in ("", "a", "a/b", "a/views", "odd", "odd/.esrfs", "file", "link", "gone/x"):
            assert nested.around(folder) is None, folder
        (root / "odd/.esrfs/store.toml").touch()
        assert nested.around("odd") == Inside("odd", STORE), "it came meanwhile"
        mounts.append((3, "/", f"{root}/a/b", "fuse.esrfs", "/elsewhere"))
        assert nested.around("a/b/store") == Inside("a/b", VIEW), "the outermost"
        told: list[walk.Unmovable] = []
        found = [
            one.path for one in walk.walk(fd, str(root), Filters(), told.append, nested) if one.kind == "directory"
        ]
    finally:
        os.close(fd)
    assert found == ["", "a", "a/views", "file"]
    assert [(one.path, one.reason) for one in told] == [("a/b", VIEW), ("a/view", VIEW), ("odd", STORE)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_store_that_this_user_may_not_look_into_is_a_store_all_the_same(tmp_path: Path) -> None:
    """Its ``.esrfs`` is its owner's alone; the files beside it may be this user's."""
    root = tmp_path / "root"
    root.mkdir()
    init(str(root / "theirs"))
    (root / "theirs" / "mine.jpg").touch()
    fd = os.open(root, os.O_RDONLY)
    for above in [root, *root.parents][:5]:
        above.chmod(above.stat().st_mode | 0o111)
    os.seteuid(65534)
    try:
        nested = Nested(str(root), fd)
        told: list[walk.Unmovable] = []
        found = [one.path for one in walk.walk(fd, str(root), Filters(), told.append, nested)]
        inside = nested.around("theirs")
    finally:
        os.seteuid(0)
        os.close(fd)
    assert found == [""]
    assert [(one.path, one.reason) for one in told] == [("theirs", STORE)]
    assert inside == Inside("theirs", STORE)


# ---- at rest


def test_files_settle_by_the_monotonic_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (tmp_path / "a").write_text("1")
    (tmp_path / "gone").write_text("1")
    settling = Settling(30)
    fd = os.open(tmp_path, os.O_RDONLY)
    nested = Nested(str(tmp_path), fd)

    def see(*names: str) -> None:
        for name in names:
            settling.see(Found(name, "file", os.stat(tmp_path / name)))

    try:
        assert settling.next_due() is None
        see("a", "gone")
        now[0] += 29
        assert list(settling.take(fd, nested)) == []
        (tmp_path / "a").write_text("22")
        (tmp_path / "gone").unlink()
        now[0] += 2
        assert list(settling.take(fd, nested)) == [], "one changed, one is gone"
        see("a")
        now[0] += 29
        assert settling.next_due() == pytest.approx(1)
        now[0] += 1
        assert [(found.path, found.st.st_size) for found in settling.take(fd, nested)] == [("a", 2)]
        assert len(settling) == 0
    finally:
        os.close(fd)


# ---- journal


def row(source: str = "a.jpg", **values: object) -> Row:
    known = {"source_root": "/s", "dest_root": "/d", "store": "", "dest": source, "kind": "file", "state": "done"}
    return Row(**{**known, "source": source, "wanted": "keep", **values})  # type: ignore[arg-type]


def test_a_journal_keeps_rows_and_bytes_of_names(tmp_path: Path) -> None:
    name = "a\udcff\n🌄"
    with contextlib.closing(Journal(tmp_path / "j.db")) as journal:
        journal.write([row(name, sha256=b"\0" * 32, size=2**40, ino=2**50), row("b", state="verified")])
    with contextlib.closing(Journal(tmp_path / "j.db")) as journal:
        found = journal.latest("/s", name, "/d")
        assert found is not None
        assert (found.source, found.size, found.ino, found.sha256) == (name, 2**40, 2**50, b"\0" * 32)
        assert [one.source for one in journal.unfinished("/s")] == ["b"]
        found.state = "undone"
        journal.write([found])
        assert journal.latest("/s", name, "/d") is None
        assert [one.source for one in journal.to_undo("/s", "/d")] == ["b"]
    assert (tmp_path / "j.db").stat().st_mode & 0o777 == 0o600


def test_a_journal_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    Journal(tmp_path / "j.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "j.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = (tmp_path / "j.db").read_bytes()
    with pytest.raises(JournalError, match="newer"):
        Journal(tmp_path / "j.db")
    assert (tmp_path / "j.db").read_bytes() == before


def test_a_journal_that_can_not_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="can't be used"):
        Journal(tmp_path / "file" / "j.db")
    (tmp_path / "folder").mkdir()
    with pytest.raises(JournalError, match="can't be used"):
        Journal(tmp_path / "folder")


def test_rows_that_can_not_be_written_are_not_there_and_have_no_number(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path / "j.db")) as journal:
        known, *new = (row(f"{number:0200}", token=str(number)) for number in range(500))
        journal.write([known])
        known.state = "undone"
        with journal._using() as connection:
            connection.execute("PRAGMA max_page_count = 1")  # the disk has no room for more than there is
        with pytest.raises(JournalError, match=r"j\.db.*its disk is full"):
            journal.write([known, *new])
        assert known.id == 1
        assert {one.id for one in new} == {0}
        assert [one.source for one in journal.to_undo("/s", "/d")] == [known.source]
        journal.write([row("other")])
        journal.write(new)
        assert len({one.id for one in new}) == len(new)
        assert journal.latest("/s", "other", "/d") is not None
        assert len(journal.to_undo("/s", "/d")) == 1 + 1 + len(new)


def test_a_journal_that_is_damaged_in_use_is_put_aside_and_rows_get_numbers_of_the_new_one(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("is damaged")
    with contextlib.closing(Journal(tmp_path / "j.db")) as journal:
        old = row("old", token="1")
        journal.write([old])
        with journal._using() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            size = (tmp_path / "j.db").stat().st_size
            (tmp_path / "j.db").write_bytes(os.urandom(size))
            connection.execute("PRAGMA shrink_memory")
        with pytest.raises(JournalError, match=r"j\.db.*it is damaged"):
            journal.latest("/s", "old", "/d")
        new = row("new", token="2")
        journal.write([new])
        assert new.id == old.id
        old.state = "left"
        journal.write([old])
        journal.write([], forget=[row("gone", id=new.id, token="3")])
        assert {(one.source, one.state) for one in journal.to_undo("/s", "/d")} == {("new", "done"), ("old", "left")}
    assert len(list(tmp_path.glob("j.db.damaged-*"))) >= 1


def test_a_journal_that_is_deleted_in_use_is_begun_anew(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path / "state" / "j.db")) as journal:
        journal.write([row("old")])
        for path in (tmp_path / "state").iterdir():
            path.unlink()
        (tmp_path / "state").rmdir()
        with journal.holding("/s"):
            journal.write([row("new")])
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with contextlib.closing(Journal(tmp_path / "state" / "j.db")) as journal:
        assert [one.source for one in journal.to_undo("/s", "/d")] == ["new"]


class Killed(BaseException):
    pass


@contextlib.contextmanager
def between(source: Path, destination: Path, journal: Journal) -> Iterator[Once]:
    """A migration between two ordinary folders: what a mount adds is not looked at."""
    limits = Throttle(config.Throttle(min_free=0, on_battery=True), threading.Event())
    flags = os.O_RDONLY | os.O_DIRECTORY
    source_fd, fd = os.open(source, flags), os.open(destination, flags)
    to = Destination(str(destination), fd, str(destination), str(destination), "", "", -1)
    try:
        yield Once(str(source), source_fd, to, journal=journal, throttle=limits, filters=Filters())
    finally:
        os.close(source_fd)
        os.close(fd)


@pytest.fixture
def cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[config.Then], Once]]:
    """Migrates the files of ``source``, and is killed in undoing that: the copy of the last has just left the
    destination, and the journal has not heard of it."""
    for module in (copies, migration):
        monkeypatch.setattr(module, "SMALL", 0)  # smaller files are written as only a mount takes it
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    destination.mkdir()

    def killed(point: str) -> None:
        if point == "migrate.touched":
            raise Killed

    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(contextlib.closing(Journal(tmp_path / "j.db")))
        work = stack.enter_context(between(source, destination, journal))

        def cut_short(then: config.Then) -> Once:
            before = sorted(os.listdir(source))
            assert work.migrate(then, quiet=0.0).failed == []
            for _ in before:  # one after the other: each kill comes a file later
                with monkeypatch.context() as patch, pytest.raises(Killed):
                    patch.setattr(faults, "reach", killed)
                    work.undo()
            assert os.listdir(destination) == []
            assert sorted(os.listdir(source)) == before
            return work

        yield cut_short


@pytest.mark.parametrize("then", ["keep", "delete"])
@pytest.mark.parametrize("inodes", ["lasting", "fleeting"])
def test_what_an_undo_that_was_cut_short_has_put_back_is_migrated_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_short: Callable[[config.Then], Once],
    inodes: str,
    then: config.Then,
) -> None:
    monkeypatch.setattr(migration, "_FLEETING_INODES", () if inodes == "lasting" else ("",))
    (tmp_path / "source" / "a.jpg").write_bytes(b"content")
    (tmp_path / "source" / "link").symlink_to("a.jpg")
    work = cut_short(then)
    report = work.migrate(then, quiet=0.0)
    assert (report.copied, report.symlinks, report.unchanged) == (1, 1, 0)
    assert sorted(os.listdir(tmp_path / "destination")) == ["a.jpg", "link"]
    undone = work.undo()
    assert undone.failed == undone.kept == []
    assert os.listdir(tmp_path / "destination") == []
    assert (tmp_path / "source" / "a.jpg").read_bytes() == b"content"
    assert os.readlink(tmp_path / "source" / "link") == "a.jpg"


@pytest.mark.parametrize("content", [b"content", b"edited", None])
def test_an_undo_that_was_cut_short_leaves_what_was_done_since(
    tmp_path: Path, cut_short: Callable[[config.Then], Once], content: bytes | None
) -> None:
    path = tmp_path / "source" / "a.jpg"
    path.write_bytes(b"content")
    work = cut_short("delete")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    report = work.undo()
    assert report.failed == report.kept == []
    assert work.journal.to_undo(work.source, work.destination.path) == []
    assert (path.read_bytes() if path.exists() else None) == content


def test_a_source_is_held_by_one(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path / "j.db")) as journal:
        with journal.holding("/a"), journal.holding("/b"), pytest.raises(Busy), journal.holding("/a"):
            pass
        with journal.holding("/a"):
            pass


# ---- gently


def test_a_rate_is_kept_over_several_takers() -> None:
    gentle = Throttle(config.Throttle(bytes_per_second=1_000_000, on_battery=True), threading.Event())
    began = time.monotonic()
    takers = [threading.Thread(target=lambda: [gentle.take(50_000) for _ in range(4)]) for _ in range(2)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert 0.3 < time.monotonic() - began < 5


def test_conditions_pause_and_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "_LOOK_SECONDS", 0.0)
    stop = threading.Event()
    gentle = Throttle(config.Throttle(max_load=0.5, on_battery=True), stop)
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0 * (os.cpu_count() or 1), 0, 0))
    assert "load" in gentle.blocked()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        gentle.take(1)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0, 0))
    assert gentle.blocked() == ""
    hour = time.localtime().tm_hour
    closed = Throttle(config.Throttle(hours=f"{(hour + 2) % 24}:00-{(hour + 3) % 24}:00", on_battery=True), stop)
    assert "outside the hours" in closed.blocked()


@pytest.mark.parametrize("compared", [64 << 20, 1000], ids=["by bytes", "by sum"])
def test_a_copy_is_told_from_what_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: int) -> None:
    monkeypatch.setattr(copying, "_COMPARED", compared)
    monkeypatch.setattr(copying, "_CHUNK", 4096)  # so that these files take several reads
    for size in (0, 1, 4095, 4096, 4097, 8192, 10_000):
        content = os.urandom(size)
        sha256 = hashlib.sha256(content).digest()
        candidates = {"same": content, "more": content + b"x"}
        if size:
            candidates |= {"less": content[:-1], "spoilt": content[:-1] + bytes([content[-1] ^ 1])}
        for name, found in candidates.items():
            (tmp_path / "source").write_bytes(content)
            (tmp_path / "copy").write_bytes(found)
            with open(tmp_path / "source", "rb") as source, open(tmp_path / "copy", "rb") as copy:
                told = copying.is_copy(source.fileno(), copy.fileno(), size, sha256)
            assert told is (name == "same"), (name, size)


def test_a_filesystem_that_calls_data_a_hole_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZFS did with files that had just been written (2.1.13, 2.2.1): cp made zeros of what was in them."""
    content = os.urandom(3_000_000)
    with open(tmp_path / "written", "wb") as file:
        file.write(content)
        file.truncate(len(content) + (100 << 20))
    as_ever = os.lseek
    monkeypatch.setattr(
        os,
        "lseek",
        lambda fd, at, how: as_ever(fd, max(at, 2 << 20), how) if how == os.SEEK_DATA else as_ever(fd, at, how),
    )
    gentle = Throttle(config.Throttle(on_battery=True), threading.Event())
    with open(tmp_path / "written", "rb") as source, open(tmp_path / "copy", "w+b") as target:
        st = os.fstat(source.fileno())
        sha256 = copying.copy(source.fileno(), target.fileno(), st, gentle)
        target.seek(0)
        assert target.read(1 << 20) == bytes(1 << 20), "nothing can tell while it is copied"
        assert not copying.is_copy(source.fileno(), target.fileno(), st.st_size, sha256)


def test_holes_are_hashed_as_zeros(tmp_path: Path) -> None:
    content = bytes(3_000_000) + b"data" + bytes(2_000_000)
    with open(tmp_path / "holes", "wb") as file:
        file.seek(3_000_000)
        file.write(b"data")
        file.truncate(len(content))
    gentle = Throttle(config.Throttle(on_battery=True), threading.Event())
    with open(tmp_path / "holes", "rb") as source, open(tmp_path / "copy", "w+b") as target:
        st = os.fstat(source.fileno())
        found = copying.copy(source.fileno(), target.fileno(), st, gentle)
        assert found == hashlib.sha256(content).digest() == copying.digest_past_cache(target.fileno())
    assert (tmp_path / "copy").read_bytes() == content


# ---- filesystems that do not answer


def test_what_does_not_answer_is_left_behind_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_ANSWER_SECONDS", 0.2)
    goes_on = threading.Event()
    asked: list[str] = []
    late: list[str] = []

    def ask() -> str:
        asked.append("")
        goes_on.wait()
        return "there"

    for _ in range(3):
        with pytest.raises(asking.NoAnswer, match="has not answered for"):
            asking.within_time("/far", ask, late.append)
    assert len(asked) == 1, "a server that is away for days costs one thread"
    assert asking.within_time("/near", lambda: "there") == "there"
    goes_on.set()
    wait_until(lambda: late == ["there"])
    wait_until(lambda: not asking._left["/far"].is_alive())
    assert asking.within_time("/far", ask) == "there"


def test_an_error_is_an_answer() -> None:
    def ask() -> None:
        raise TimeoutError(errno.ETIMEDOUT, "a soft mount gives up")

    with pytest.raises(TimeoutError, match="gives up"):
        asking.within_time("/far", ask)
    assert asking.answers("/not there")
