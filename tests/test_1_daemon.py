"""Parts of the migration daemon that need no mount: configuration, filters, journal, throttle, names, settling."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from esrfs_daemon import config, copying, main, sources, throttle, walk
from esrfs_daemon.copying import Identity
from esrfs_daemon.journal import Busy, Journal, JournalError, Row
from esrfs_daemon.settle import Settling
from esrfs_daemon.throttle import Stopped, Throttle
from esrfs_daemon.walk import Filters, Found

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
        found = [(one.path, one.kind) for one in walk.walk(fd, str(root), Filters(), told.append)]
    finally:
        os.close(fd)
    assert found == [("", "directory"), ("up", "symlink"), ("b", "directory"), ("b/c.jpg", "file")]
    assert [(one.path, one.passing) for one in told] == [("a.part", True)]


# ---- at rest


def test_files_settle_by_the_monotonic_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (tmp_path / "a").write_text("1")
    (tmp_path / "gone").write_text("1")
    settling = Settling(30)
    fd = os.open(tmp_path, os.O_RDONLY)

    def see(*names: str) -> None:
        for name in names:
            settling.see(Found(name, "file", os.stat(tmp_path / name)))

    try:
        assert settling.next_due() is None
        see("a", "gone")
        now[0] += 29
        assert list(settling.take(fd)) == []
        (tmp_path / "a").write_text("22")
        (tmp_path / "gone").unlink()
        now[0] += 2
        assert list(settling.take(fd)) == [], "one changed, one is gone"
        see("a")
        now[0] += 29
        assert settling.next_due() == pytest.approx(1)
        now[0] += 1
        assert [(found.path, found.st.st_size) for found in settling.take(fd)] == [("a", 2)]
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
    with pytest.raises(JournalError, match="nothing was done"):
        Journal(tmp_path / "file" / "j.db")
    (tmp_path / "folder").mkdir()
    with pytest.raises(JournalError, match="nothing was done"):
        Journal(tmp_path / "folder")


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
