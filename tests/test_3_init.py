"""`esrfs init`: in place and not, what it refuses, what it predicts, and crashes in the middle."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from esrfs.cli import main
from esrfs.compaction.outcome import Outcome, Policy, Reason, Verdict, stored_bytes
from esrfs.store import initialise, layout, linux, mountpoint
from esrfs.store.errors import Problem, StoreError
from esrfs.store.initialise import Predicted, init, predict
from esrfs.store.layout import RESERVED, open_store

PHOTO = b"\xff\xd8\xff\xe0" + bytes(10_000)


@pytest.fixture
def folder(tmp_path):
    """A folder with photographs; whatever became of it can be removed again at the end."""
    path = tmp_path / "photos"
    (path / "sub").mkdir(parents=True)
    (path / "a.jpg").write_bytes(PHOTO)
    (path / "sub" / "b.jpg").write_bytes(PHOTO + b"b")
    (path / "link").symlink_to("a.jpg")
    yield path
    for directory in (path, path.with_name(".photos.esrfs")):
        if directory.is_dir():
            mountpoint.unprotect_mountpoint(str(directory))


def content(path: Path) -> dict[str, object]:
    """Every file's inode and digest: nothing is copied."""
    found: dict[str, object] = {}
    for each in path.rglob("*"):
        name = str(each.relative_to(path))
        if name.partition("/")[0] not in (RESERVED, ".esrfs.new") and not each.is_dir():
            found[name] = (each.lstat().st_ino, hashlib.sha256(each.read_bytes()).hexdigest())
    return found


def test_a_folder_becomes_a_store_where_it_stands(folder):
    before = content(folder)
    done = init(str(folder), policy=Policy(preset="small"), undo_days=3)
    assert (done.store, done.mountpoint) == (str(folder), "")
    assert content(folder) == before
    with open_store(str(folder)) as store:
        assert store.config == done.config
        assert (store.config.policy.preset, store.config.undo_days) == ("small", 3)
        assert not store.readonly
    assert not (folder / ".esrfs.new").exists()


def test_a_missing_folder_is_made(tmp_path):
    init(str(tmp_path / "new"))
    assert layout.is_store(str(tmp_path / "new"))


def test_stores_have_keys_of_their_own(tmp_path):
    one, two = (init(str(tmp_path / name)).config for name in "ab")
    assert one.id != two.id
    assert one.key != two.key
    assert len(one.key_bytes) == 32


def test_the_probe_leaves_nothing_and_says_what_is_so(folder):
    done = init(str(folder))
    assert sorted(os.listdir(folder / RESERVED)) == [
        "blobs",
        "ledger",
        "networks",
        "originals",
        "staging",
        "store.toml",
    ]
    assert done.config.probe.links
    assert done.config.probe.fsync
    assert done.warnings == []


def test_in_place_the_view_gets_the_old_name(folder):
    before = content(folder)
    owner = os.stat(folder).st_uid
    done = init(str(folder), in_place=True)
    moved = folder.with_name(".photos.esrfs")
    assert (done.store, done.mountpoint) == (str(moved), str(folder))
    assert content(moved) == before
    assert os.listdir(folder) == []
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o555
    assert os.stat(folder).st_uid == owner
    with mountpoint_of(folder) as fd:
        assert mountpoint.is_protected(fd)
        if linux.is_immutable(fd):
            with pytest.raises(PermissionError):
                (folder / "file").touch()


def mountpoint_of(path):
    return initialise._open_directory(str(path))


def test_in_place_twice_is_once(folder):
    first = init(str(folder), in_place=True)
    assert init(str(folder), in_place=True) == first


def test_a_store_that_stands_can_be_moved_in_place_later(folder):
    config = init(str(folder)).config
    done = init(str(folder), in_place=True)
    assert done.config == config
    assert layout.is_store(done.store)


def test_a_link_to_the_folder_means_the_folder(folder):
    (folder.parent / "alias").symlink_to(folder)
    done = init(str(folder.parent / "alias"), in_place=True)
    assert done.mountpoint == str(folder)


def test_what_is_in_the_way_stays(folder):
    taken = folder.with_name(".photos.esrfs")
    taken.mkdir()
    (taken / "mine").write_text("mine")
    with pytest.raises(StoreError, match="in the way"):
        init(str(folder), in_place=True)
    assert (taken / "mine").exists()
    assert (folder / "a.jpg").exists()


def test_what_is_not_there_can_not_be_moved(tmp_path):
    with pytest.raises(StoreError, match="not a directory"):
        init(str(tmp_path / "nothing"), in_place=True)


CRASH = """
import sys
from esrfs.store.initialise import init
init(sys.argv[1], in_place=sys.argv[2] == "in place")
"""


@pytest.mark.parametrize("point", initialise.FAULT_POINTS)
@pytest.mark.parametrize("how", ["in place", "standing", "in place without exchange"])
def test_after_a_crash_all_photographs_are_in_one_place_and_init_goes_on(folder, point, how):
    before = content(folder)
    script = CRASH
    if how.endswith("without exchange"):
        script = "from esrfs.store import probe; probe._exchange = lambda *_: False\n" + CRASH
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), how[:8]],
        env={**os.environ, "ESRFS_FAULTS": f"{point}=kill"},
        check=False,
    )
    if how == "standing" and point in ("init.mountpoint", "init.exchanged"):
        assert done.returncode == 0
        return
    assert done.returncode == -9
    moved = folder.with_name(".photos.esrfs")
    assert before in [content(path) for path in (folder, moved) if path.is_dir()]
    if layout.is_store(str(folder)) and how == "standing":
        return
    again = init(str(folder), in_place=how != "standing")
    assert content(Path(again.store)) == before
    if how != "standing":
        assert again.store == str(moved)
        assert os.listdir(folder) == []
    with open_store(again.store) as store:
        assert not store.readonly


# ---- refusals


def make(path: Path, *names: str) -> None:
    for name in names:
        target = path / name
        if name.endswith("/"):
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("[repository]\nversion = 1\nid = 00\n" if name == "config" else "")


MARKS = {
    "git-annex": [".git/annex/"],
    "bare git-annex": ["annex/objects/", "HEAD"],
    "Syncthing": [".stfolder/"],
    "Nextcloud": [".sync_0123456789ab.db"],
    "Nextcloud or ownCloud": [".nextcloudsync.log"],
    "ownCloud": [".owncloudsync.log"],
    "Dropbox": [".dropbox.cache/"],
    "restic": ["config", "data/", "index/", "keys/", "snapshots/", "locks/"],
    "borg": ["config", "data/", "README"],
}


@pytest.mark.parametrize("where", ["itself", "above", "below"])
@pytest.mark.parametrize("program", MARKS)
def test_what_other_programs_mirror_or_address_by_content_is_refused(folder, program, where):
    make({"itself": folder, "above": folder.parent, "below": folder / "sub"}[where], *MARKS[program])
    before = content(folder)
    for in_place in (False, True):
        with pytest.raises(StoreError, match=program) as error:
            init(str(folder), in_place=in_place)
        assert error.value.problem is Problem.REFUSED
        assert "Nothing was changed" in error.value.message
    assert content(folder) == before
    assert not (folder / RESERVED).exists()


@pytest.mark.parametrize("names", [[".git/objects/"], ["config", "data/", "README.md"], [".sync_notes.db", "index/"]])
def test_what_only_looks_similar_is_not_refused(folder, names):
    make(folder, *names)
    init(str(folder))


@pytest.mark.parametrize("inner", ["sub", "sub/deeper"])
def test_a_store_within_a_store_is_refused(folder, inner):
    init(str(folder))
    with pytest.raises(StoreError, match="esrfs store already"):
        init(str(folder / "sub"))
    with pytest.raises(StoreError, match="esrfs store already"):
        init(str(folder))


def test_a_folder_that_holds_a_store_is_refused(folder):
    init(str(folder / "sub"))
    with pytest.raises(StoreError, match="esrfs store already"):
        init(str(folder), in_place=True)
    assert (folder / "a.jpg").exists()


def test_a_policy_that_does_not_exist_is_refused_before_anything_is_a_store(folder):
    with pytest.raises(StoreError, match="splendid"):
        init(str(folder), policy=Policy(preset="splendid"))
    assert not layout.is_store(str(folder))
    init(str(folder))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_a_store_that_root_makes_for_somebody_is_theirs(folder):
    os.chown(folder, 65534, 65534)
    init(str(folder), in_place=True)
    moved = folder.with_name(".photos.esrfs")
    assert {path.lstat().st_uid for path in (moved / RESERVED).rglob("*")} == {65534}
    assert os.stat(folder).st_uid == 65534


# ---- prediction


def test_a_prediction_writes_nothing_and_counts_what_stays(folder):
    (folder / "notes.txt").write_bytes(bytes(50_000))
    before = sorted(folder.rglob("*"))
    asked = []

    def compact(data: bytes, preset: str) -> Outcome:
        asked.append((data, preset))
        if data.endswith(b"b") or preset == "faithful":
            return Outcome(verdict=Verdict.REFUSED, reason=Reason.QUALITY)
        return Outcome(verdict=Verdict.COMPACTED, avif=bytes(700), recipe=b"")

    seen: list[tuple[int, int]] = []
    presets = ("faithful", "high")
    told = predict(str(folder), compact, presets, progress=lambda done, total: seen.append((done, total)))
    assert sorted(folder.rglob("*")) == before
    assert (told.files, told.candidates, told.sampled) == (3, 2, 2)
    assert told.bytes == 50_000 + told.candidate_bytes
    assert told.presets["faithful"] == Predicted(0, told.bytes)
    assert told.presets["high"] == Predicted(1, 50_000 + len(PHOTO) + 1 + stored_bytes(bytes(700), b""))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(asked) == 4


def test_a_prediction_is_drawn_from_a_sample_and_is_the_same_twice(folder):
    for number in range(50):
        (folder / f"{number}.jpg").write_bytes(PHOTO)

    def compact(data: bytes, preset: str) -> Outcome:
        return Outcome(verdict=Verdict.COMPACTED, avif=bytes(len(data) // 2))

    told = predict(str(folder), compact, ["high"], sample=5)
    assert told == predict(str(folder), compact, ["high"], sample=5)
    assert (told.sampled, told.candidates) == (5, 52)
    assert 0.5 < told.presets["high"].bytes / told.bytes < 0.6


def test_a_prediction_of_files_of_all_sizes_is_near(folder):
    """A few files hold most bytes, and small ones hardly shrink."""
    rng = random.Random(7)
    truth = 0

    def stored(size: int) -> int:
        return int(size * (0.9 if size < 30_000 else 0.15 + 0.2 * (size % 97) / 97))

    for number in range(150):
        size = int(5000 * 1.04**number) + rng.randrange(1000)
        (folder / f"{number}.jpg").write_bytes(PHOTO[:16] + bytes(size - 16))
        truth += stored(size)
    for name in ("a.jpg", "sub/b.jpg"):
        (folder / name).unlink()

    def compact(data: bytes, preset: str) -> Outcome:
        return Outcome(verdict=Verdict.COMPACTED, avif=bytes(stored(len(data))))

    told = predict(str(folder), compact, ["high"])
    assert told.sampled <= initialise.SAMPLE
    saved, predicted = told.bytes - truth, told.bytes - told.presets["high"].bytes
    assert predicted == pytest.approx(saved, rel=0.05)


def test_predictions_lean_to_neither_side():
    """Over many draws: files of all sizes, some of which stay as they are."""
    rng = random.Random(3)
    sizes = [int(5000 * 1.01 ** rng.randrange(600)) for _ in range(400)]
    shares = [rng.choice((0.1, 0.3, 1.0)) * (1 if size > 50_000 else 0.9) for size in sizes]
    saved = sum(size * (1 - share) for size, share in zip(sizes, shares, strict=True))
    candidates = [(str(number), size) for number, size in enumerate(sizes)]
    said = [
        sum(part * (1 - shares[int(name)]) for name, _, part in initialise.draw(candidates, initialise.SAMPLE, seed))
        for seed in range(300)
    ]
    assert sum(said) / len(said) == pytest.approx(saved, rel=0.02)
    assert len(set(said)) > 50


def test_a_prediction_refuses_what_init_refuses(folder):
    make(folder, ".stfolder/")
    with pytest.raises(StoreError, match="Syncthing"):
        predict(str(folder), lambda _, __: Outcome(verdict=Verdict.REFUSED), ["high"])


def test_a_folder_without_photographs_stays_as_large_as_it_is(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "n.txt").write_bytes(bytes(9000))
    told = predict(str(tmp_path / "notes"), lambda _, __: Outcome(verdict=Verdict.REFUSED), ["high"])
    assert told.presets["high"].bytes == told.bytes == 9000


def test_a_dry_run_shows_all_presets_side_by_side(folder, monkeypatch, capsys):
    class FakeEngine:
        def __init__(self, settings: object, network_bytes: object) -> None:
            pass

        def compact(self, original: bytes, policy: Policy, networks: dict[str, bytes]) -> Outcome:
            assert networks
            assert policy.patience == "high"
            if policy.preset in ("faithful", "lossless"):
                return Outcome(verdict=Verdict.REFUSED, reason=Reason.QUALITY)
            return Outcome(verdict=Verdict.COMPACTED, avif=bytes(len(original) // 4))

        def close(self) -> None:
            pass

    monkeypatch.setattr("esrfs.cli.initialising.Engine", FakeEngine)
    before = sorted(folder.rglob("*"))
    assert main.run(["esrfs", "init", "--dry-run", "--preset", "small", "--patience", "high", str(folder)]) == 0
    assert sorted(folder.rglob("*")) == before
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "73%" in rows["small"]
    assert "(this one)" in rows["small"]
    assert "73%" in rows["high"]
    assert "0%" in rows["faithful"]
    assert "0%" in rows["lossless"]
    assert "2 were tried" in rows["of"]
