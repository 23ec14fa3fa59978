"""The command line on stores that are not mounted: results, messages and exit codes. (Mounted: levels 4 and 5.)"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import typer.main
from esrfs_daemon import main as daemon
from PIL import Image

from esrfs import __version__
from esrfs.blob import container, recipe
from esrfs.blob.recipe import JpegCoding, Literal, Recipe, Run, Scores
from esrfs.cli import main, manual, mounting, paths, show
from esrfs.cli.show import CommandError
from esrfs.engine.client import Engine, EngineError
from esrfs.engine.protocol import Lane
from esrfs.exit_codes import ExitCode
from esrfs.mount.options import OWN
from esrfs.networks import registry
from esrfs.store import swap
from esrfs.store.identity import Identity
from esrfs.store.layout import Store, open_store
from esrfs.upkeep import check, walk

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def esrfs(capsys):
    """Call with arguments: (exit code, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main.run(["esrfs", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture
def store(tmp_path, esrfs) -> Path:
    path = tmp_path / "store"
    code, out, err = esrfs("init", path)
    assert (code, err) == (0, "")
    assert "esrfs mount" in out
    return path


def blob_for(store: Store, original: bytes, network: bytes = b"", **more: bytes) -> bytes:
    """A blob as compaction could have made it; its view (zeros) is not one that an engine would rebuild."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 24), "teal").save(picture, "AVIF")
    made = Recipe(
        width=64,
        height=48,
        original_size=len(original),
        sha256_original=hashlib.sha256(original).digest(),
        sha256_view=hashlib.sha256(bytes(len(original))).digest(),
        preset="high",
        scale=2,
        network="lite-x2" if network else "",
        network_sha256=network,
        quality=55,
        coding=JpegCoding(mode="RGB", subsampling="4:2:0", quantisation=[[1] * 64] * 3),
        prefix=[Literal(b"\xff\xd8"), Run(0, 98)],
        scan_length=len(original) - 102,
        suffix=[Literal(b"\xff\xd9")],
        encoder="none",
        scores=Scores(ssimulacra2=71.5, worst_tile=65.0, psnr=34.25),
        created_by="esrfs test",
    )
    made = msgspec.structs.replace(made, **more)
    return container.pack(picture.getvalue(), recipe.encode(made), store.config.id_bytes, store.config.key_bytes)


def compact(path: Path, name: str, network: bytes = b"", **more: bytes) -> bytes:
    """Put an original into the store and swap a blob in for it; returns the original's bytes."""
    original = random.Random(name + str(more)).randbytes(50_000)
    (path / name).write_bytes(original)
    if "sha256_view" in more:  # it came home: its view is the file itself
        more["sha256_view"] = hashlib.sha256(original).digest()
    with open_store(str(path)) as store, (path / name).open("rb") as source:
        result = swap.swap_in(
            store,
            name,
            source.fileno(),
            Identity.from_stat(os.fstat(source.fileno())),
            blob_for(store, original, network, **more),
            hashlib.sha256(original).digest(),
            lease_ok=lambda: True,
            interrupted=lambda: False,
        )
    if result.status is swap.SwapStatus.UNAVAILABLE:
        pytest.skip(f"the filesystem of {path} can't: {result.message}")
    assert result.status is swap.SwapStatus.DONE
    return original


# ---- the interface


def test_exit_codes_are_an_interface():
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0, "FAILED": 1, "USAGE": 2, "NOT_A_STORE": 3, "NOT_MOUNTED": 4, "REFUSED": 5, "DAMAGE": 6, "BUSY": 7,
        "PERMISSION": 8, "ENGINE": 9, "MOUNT_FAILED": 10, "NETWORK": 11, "INTERNAL": 70, "INTERRUPTED": 130,
    }  # fmt: skip


def test_the_readme_lists_every_exit_code():
    table = (REPOSITORY / "README.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == sorted(ExitCode)


MANUAL = REPOSITORY / "docs" / "man"


def test_the_manual_is_up_to_date():
    """After a change of commands, options or their help: python -m esrfs.cli.manual docs/man (or: make man)."""
    made = manual.pages()
    there = {path.name: path.read_text() for path in MANUAL.iterdir()}
    assert sorted(there) == sorted(made)
    stale = [name for name in made if there[name] != made[name]]
    assert not stale, "run: .venv/bin/python -m esrfs.cli.manual docs/man"


def test_the_manual_lists_every_option():
    def look(page: str, command) -> None:
        for parameter in command.params:
            for name in [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []:
                assert rf"\fB{name}\fR".replace("-", r"\-") in page, name
        for below in getattr(command, "commands", {}).values():
            look(page, below)

    commands = typer.main.get_command(main.make_app()).commands | {"daemon": typer.main.get_command(daemon.app)}
    for name, command in commands.items():
        look((MANUAL / f"esrfs-{name}.1").read_text(), command)
    page = (MANUAL / "esrfs-mount.1").read_text()
    for option in OWN:
        assert rf"\fB{option}\fR" in page


def test_the_manual_is_well_formed(needs):
    result = subprocess.run(
        [needs("mandoc"), "-Tlint", "-Wwarning", *sorted(map(str, MANUAL.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
    )
    # Pages have no date: they would change each day.
    assert [line for line in result.stdout.splitlines() if "missing date" not in line] == []


def test_every_command_is_there_alone_and_among_all():
    everything = typer.main.get_command(main.make_app()).commands
    assert set(everything) == set(main.COMMANDS)
    for name in main.COMMANDS:
        assert name in typer.main.get_command(main.make_app(name)).commands


def test_help(esrfs):
    for command in ([], *([name] for name in main.COMMANDS)):
        code, out, _ = esrfs(*command, "--help")
        assert code == 0
        assert "Usage" in out


def test_bad_usage(esrfs):
    assert esrfs("fly")[0] == ExitCode.USAGE
    assert esrfs("status")[0] == ExitCode.USAGE
    assert esrfs("init", "--preset", "best", "x")[0] == ExitCode.USAGE


def test_version(esrfs):
    code, out, _ = esrfs("--version")
    assert code == 0
    assert out.splitlines()[0] == f"esrfs {__version__}"
    assert re.search(r"mfusepy \d+\.\d.*, torch \d+\.\d", out)
    show_modules = "import sys; from esrfs.cli import main; main.run(['esrfs', '--version']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", show_modules], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "mfusepy"} & set(result.stdout.split("\n")[-2].split())


def test_as_a_program():
    command = [sys.executable, "-m", "esrfs.cli.main", "status", "/"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == ExitCode.NOT_A_STORE
    assert result.stderr.startswith("esrfs: / is neither")


# ---- init


def test_init_tells_what_it_made(esrfs, tmp_path):
    code, out, _ = esrfs("init", "--preset", "small", "--undo-days", "7", "--carry", "full", tmp_path / "s")
    assert code == 0
    assert "preset small, originals kept 7 days" in out
    with open_store(str(tmp_path / "s")) as store:
        assert (store.config.policy.preset, store.config.undo_days) == ("small", 7)
        assert store.config.policy.carry == "full"


def test_init_in_place(esrfs, tmp_path, request):
    folder = tmp_path / "pictures"
    folder.mkdir()
    # Made immutable where we are root: nobody could tidy up.
    request.addfinalizer(lambda: subprocess.run(["chattr", "-i", str(folder)], check=False, capture_output=True))
    (folder / "a.jpg").write_bytes(b"a")
    code, out, _ = esrfs("init", "--in-place", folder)
    moved = tmp_path / ".pictures.esrfs"
    assert code == 0
    assert f"esrfs mount {moved} {folder}" in out
    assert (moved / "a.jpg").read_bytes() == b"a"
    # The name that the person knows still means the store.
    assert paths.resolve(str(folder)) == paths.Place(str(moved), "", None)
    assert esrfs("status", folder)[0] == 0
    # Once more is harmless, and what it can't change it does not pass over.
    assert esrfs("init", "--in-place", folder)[2] == ""
    code, _, err = esrfs("init", "--in-place", "--undo-days", "3", folder)
    assert code == 0
    assert "keeps its settings" in err
    assert str(moved / ".esrfs" / "store.toml") in err


def test_what_somebody_else_mounted_is_asked_by_them(esrfs, store, tmp_path, monkeypatch):
    """A store's owner whose mount root runs would else be told what no mount knows, with exit code 0."""
    original = compact(store, "a.jpg")
    theirs = paths.Mount(str(store), str(tmp_path / "view"), "", os.getuid() + 1)
    monkeypatch.setattr(paths, "mounts", lambda: [theirs])
    for command in ("status", "explain", "restore", "resume"):
        code, _, err = esrfs(command, store / "a.jpg")
        assert code == ExitCode.PERMISSION, command
        assert "give this command as" in err
    assert esrfs("cache", "clear", store)[0] == ExitCode.PERMISSION
    assert (store / "a.jpg").stat().st_size < len(original), "nothing was done behind the mount"
    assert esrfs("pause", store)[0] == 0, "which holds for every mount of the store"
    monkeypatch.setattr(os, "getuid", lambda: theirs.user_id + 1)
    code, _, err = esrfs("umount", theirs.mountpoint)
    assert code == ExitCode.PERMISSION
    assert "another user" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_store_of_somebody_else(store, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own are for their owner alone
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            paths.resolve(str(store / "a.jpg"))
        except CommandError as error:
            os._exit(error.exit_code if "may not look into" in str(error) else 99)
        os._exit(98)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ExitCode.PERMISSION


def test_init_refuses_a_store_in_a_store(esrfs, store):
    code, _, err = esrfs("init", store / "inner")
    assert code == ExitCode.REFUSED
    assert "Nothing was changed" in err


def test_a_store_can_be_made_exclusive_later(esrfs, store):
    with open_store(str(store)) as before:
        pass
    assert esrfs("init", "--exclusive", store)[0] == 0
    with open_store(str(store)) as after:
        assert after.config.exclusive
        assert (after.config.id, after.config.key) == (before.config.id, before.config.key)
    assert (store / ".esrfs" / "store.toml").stat().st_mode & 0o777 == 0o600


def test_originals_can_be_kept_for_ever(esrfs, tmp_path):
    (tmp_path / "photos").mkdir()
    assert esrfs("init", tmp_path / "photos", "--undo-days", 999_999_999_999)[0] == 0
    compact(tmp_path / "photos", "a.jpg")
    code, out, _ = esrfs("status", tmp_path / "photos", "--json")
    assert (code, json.loads(out)["freed_by"]) == (0, "9999-12-31")
    assert esrfs("explain", tmp_path / "photos" / "a.jpg")[0] == 0


def test_init_with_a_network_that_is_not_here(esrfs, tmp_path):
    code, _, err = esrfs("init", "--network", "nope", tmp_path / "s")
    assert code == ExitCode.NETWORK
    assert "nope" in err
    assert not (tmp_path / "s").exists()


# ---- where a path leads


def test_mounts_with_odd_names(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text(
        "36 35 0:50 / /mnt/a\\040b rw,nosuid - fuse.esrfs /st\\134ore\\011x rw,user_id=1000,group_id=1000\n"
        "37 35 0:51 / /mnt/other rw shared:1 - fuse.sshfs host: rw,user_id=0\n"
        "38 35 0:52 /sub /mnt/bind rw - fuse.esrfs /s rw,user_id=0,default_permissions\n"
    )
    assert paths.mounts(str(table)) == [
        paths.Mount("/st\\ore\tx", "/mnt/a b", "", 1000),
        paths.Mount("/s", "/mnt/bind", "sub", 0),
    ]


def test_paths_in_mounts(monkeypatch, store, tmp_path):
    inner = tmp_path / "mnt" / "inner"
    inner.mkdir(parents=True)
    table = [
        paths.Mount(str(store), str(tmp_path / "mnt"), "", 0),
        paths.Mount("/another", str(inner), "", 0),
        paths.Mount("/top", str(inner), "", 0),
        paths.Mount("/bound", "/bind", "sub", 0),
    ]
    monkeypatch.setattr(paths, "mounts", lambda: table)
    mnt = str(tmp_path / "mnt")
    assert paths.resolve(f"{mnt}/a/b.jpg") == paths.Place(str(store), "a/b.jpg", mnt)
    assert paths.resolve(mnt + "/") == paths.Place(str(store), "", mnt)
    assert paths.resolve(f"{inner}/c") == paths.Place("/top", "c", str(inner))
    assert paths.resolve("/bind/x") == paths.Place("/bound", "sub/x", "/bind")
    assert paths.resolve(str(store / "a")) == paths.Place(str(store), "a", mnt)
    (tmp_path / "link").symlink_to(mnt)
    assert paths.resolve(str(tmp_path / "link" / "x.jpg")) == paths.Place(str(store), "x.jpg", mnt)
    assert paths.resolve(str(tmp_path / "link")) == paths.Place(str(store), "", mnt)


def test_paths_that_lead_nowhere(esrfs, tmp_path):
    code, _, err = esrfs("explain", tmp_path / "nothing")
    assert code == ExitCode.NOT_A_STORE
    assert "does not exist" in err


# ---- status, explain


def test_status_of_an_empty_store(esrfs, store):
    code, out, _ = esrfs("status", store, "--json")
    values = json.loads(out)
    assert code == 0
    assert (values["files"], values["ratio"], values["freed_by"], values["engine_state"]) == (0, 1.0, None, "stopped")


def test_status_counts(esrfs, store):
    original = compact(store, "a.jpg")
    (store / "sub").mkdir()
    (store / "sub" / "b.jpg").write_bytes(bytes(1000))
    os.link(store / "sub" / "b.jpg", store / "c.jpg")
    (store / "link").symlink_to("a.jpg")
    _, out, _ = esrfs("status", store / "sub", "--json")
    values = json.loads(out)
    expected = {
        "files": 3, "originals": 2, "blobs": 1, "refused": 0, "passed_through": 0, "pending": 2, "undo_files": 1,
        "logical_bytes": len(original) + 1000, "stored_bytes": (store / "a.jpg").stat().st_size + 1000,
        "cache_hits": 0, "cache_misses": 0, "engine_calls": 0, "mounted": False, "mountpoint": None,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert values["freed_now_bytes"] == values["freed_later_bytes"] - values["undo_bytes"]
    assert {"cache_bytes", "ratio", "freed_by"} <= values.keys()
    code, out, _ = esrfs("status", store)
    assert code == 0
    assert "3: 1 stored small, 2 waiting" in out
    assert "nothing yet" in out  # the original waits in the window, so that more is in use than before
    assert values["freed_now_bytes"] < 0


def test_explain_a_blob(esrfs, store):
    original = compact(store, "a.jpg")
    code, out, _ = esrfs("explain", store / "a.jpg", "--json")
    found = json.loads(out)
    assert code == 0
    stored = (store / "a.jpg").stat().st_size
    expected = {
        "path": "a.jpg", "state": "blob", "reason": None, "format": "jpeg", "width": 64, "height": 48, "scale": 2,
        "original_bytes": len(original), "stored_bytes": stored, "ratio": round(len(original) / stored, 3),
        "quality": {"ssimulacra2": 71.5, "worst_tile": 65.0, "psnr": 34.25, "colour": 0.0, "worst_colour": 0.0},
        "network": None, "sha256_original": hashlib.sha256(original).hexdigest(),
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["undo_until"]
    assert found["sha256_view"]
    _, out, _ = esrfs("explain", store / "a.jpg")
    assert "SSIMULACRA2 71.5" in out


def test_explain_what_compaction_has_not_seen(esrfs, store):
    Image.new("RGB", (8, 8)).save(store / "a.jpg")
    (store / "notes").write_text("x")
    assert json.loads(esrfs("explain", store / "a.jpg", "--json")[1])["format"] == "jpeg"
    assert json.loads(esrfs("explain", store / "notes", "--json")[1])["state"] == "pending"
    assert esrfs("explain", store / "gone")[0] == ExitCode.FAILED


def test_explain_does_not_hang_on_what_is_no_file(esrfs, store):
    os.mkfifo(store / "pipe")
    (store / "link").symlink_to("/etc/passwd")
    assert json.loads(esrfs("explain", store / "pipe", "--json")[1])["reason"] == "not_a_picture"
    assert esrfs("explain", store / "link")[0] == ExitCode.FAILED
    assert json.loads(esrfs("explain", store, "--json")[1])["state"] == "passed_through"


def test_names_that_are_not_utf8(esrfs, store):
    name = os.fsdecode(b"caf\xe9.jpg")
    (store / name).write_bytes(b"x")
    assert json.loads(esrfs("explain", store / name, "--json")[1])["path"] == name
    command = [sys.executable, "-m", "esrfs.cli.main", "explain", str(store / name)]
    assert b"caf\xe9.jpg" in subprocess.run(command, capture_output=True, check=True).stdout


# ---- compact, pause, resume


def test_compact_says_what_it_needs(esrfs, store):
    (store / "a.jpg").write_bytes(b"x")
    code, _, err = esrfs("compact", store / "a.jpg")
    assert code == ExitCode.NOT_MOUNTED
    assert "--now" in err
    assert esrfs("compact", "--now", store / "gone.jpg")[0] == ExitCode.FAILED


def test_compact_unmounted(esrfs, store):
    (store / "notes.txt").write_text("no picture")
    code, out, _ = esrfs("compact", "--now", store)
    assert (code, out) == (0, "1 passed through\n")
    found = json.loads(esrfs("explain", store / "notes.txt", "--json")[1])
    assert (found["state"], found["reason"]) == ("passed_through", "not_a_picture")


def test_pause_holds(esrfs, store):
    (store / "notes.txt").write_text("no picture")
    assert esrfs("pause", store)[0] == 0
    code, _, err = esrfs("compact", "--now", store)
    assert code == ExitCode.REFUSED
    assert "resume" in err
    assert esrfs("resume", store)[0] == 0
    assert esrfs("compact", "--now", store)[0] == 0


# ---- check, restore


def test_check_finds_nothing_in_a_sound_store(esrfs, store):
    compact(store, "a.jpg")
    (store / "b.jpg").write_bytes(bytes(13))
    code, out, _ = esrfs("check", store)
    assert code == 0, out
    assert out == "2 files, 1 of them stored small: the store is sound\n"


def problems(store: Path) -> set[tuple[str, str]]:
    with open_store(str(store), readonly=True) as opened:
        return {(finding.severity, finding.problem) for finding in check.check(opened).findings}


def test_check_finds_damage(esrfs, store):
    compact(store, "a.jpg")
    data = bytearray((store / "a.jpg").read_bytes())
    data[-200] ^= 1  # in the recipe
    (store / "a.jpg").write_bytes(data)
    code, out, _ = esrfs("check", store, "--json")
    assert code == ExitCode.DAMAGE
    assert [finding["problem"] for finding in json.loads(out)["findings"]] == ["blob_damaged"]
    found = json.loads(esrfs("explain", store / "a.jpg", "--json")[1])
    assert (found["state"], found["reason"]) == ("blob", "broken")


def test_check_finds_a_missing_network_and_a_damaged_one(store):
    with open_store(str(store)) as opened:
        kept = opened.keep_network(b"weights")
    compact(store, "a.jpg", kept)
    compact(store, "b.jpg", hashlib.sha256(b"other").digest())
    assert problems(store) == {("damage", "network_missing")}
    (store / ".esrfs" / "networks" / kept.hex()).write_bytes(b"w3ights")
    assert problems(store) == {("damage", "network_missing"), ("damage", "network_damaged")}


def test_check_names_a_lost_network_and_counts_the_blobs_that_need_it(store):
    lost = hashlib.sha256(b"weights").digest()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        compact(store, name, lost)

    def found() -> dict[str, tuple[str, str]]:
        with open_store(str(store), readonly=True) as opened:
            return {each.path: (each.severity, each.message) for each in check.check(opened).findings}

    place = f".esrfs/networks/{lost.hex()}"
    missing = found()
    assert missing.keys() == {"a.jpg", "b.jpg", "c.jpg", place}
    assert missing[place][0] == "damage"
    assert "3 blobs need the network " in missing[place][1]
    registry.user_directory().mkdir(parents=True)
    (registry.user_directory() / "mine.pth").write_bytes(b"weights")
    elsewhere = found()
    assert elsewhere.keys() == {place}
    assert elsewhere[place][0] == "note"
    assert "mine.pth" in elsewhere[place][1]
    assert not (store / place).exists(), "check only reads"
    (store / place).write_bytes(b"w3ights")
    assert problems(store) == {("note", "network_damaged"), ("note", "network_elsewhere")}


def test_a_mount_puts_back_the_networks_that_some_of_its_blobs_need(store, expect_log):
    expect_log("was lost and is put back")
    kept = hashlib.sha256(b"weights").digest()
    compact(store, "a.jpg", kept)
    compact(store, "b.jpg", hashlib.sha256(b"other").digest())
    registry.user_directory().mkdir(parents=True)
    (registry.user_directory() / "mine.pth").write_bytes(b"weights")
    with open_store(str(store)) as opened:
        findings = check.sample(opened, 50)
        assert opened.network_bytes(kept) == b"weights"
    assert {finding.problem for finding in findings} == {"network_missing"}


def test_check_finds_an_original_that_was_taken_away(store):
    compact(store, "a.jpg")
    for path in (store / ".esrfs" / "originals").iterdir():
        path.unlink()
    assert problems(store) == {("damage", "original_missing")}


def test_check_finds_a_ledger_that_was_changed(store):
    compact(store, "a.jpg")
    (ledger,) = (store / ".esrfs" / "ledger" / "settled").iterdir()
    data = ledger.read_bytes()
    ledger.write_bytes(data.replace(b'"intent"', b'"intend"'))
    assert ("damage", "ledger_damaged") in problems(store)


def test_check_knows_a_blob_that_a_program_rewrote(store):
    compact(store, "a.jpg")
    data = (store / "a.jpg").read_bytes()
    # As exiftool does: something after our box.
    (store / "a.jpg").write_bytes(data + (16).to_bytes(4, "big") + b"free" + bytes(8))
    assert problems(store) == {("note", "box_moved")}


def test_check_deep_reports_a_view_that_can_not_be_rebuilt(esrfs, store, monkeypatch):
    compact(store, "a.jpg")
    reached = []

    def rebuild(blob):
        reached.append(blob.avif[4:8])
        raise TimeoutError("no answer")

    with open_store(str(store), readonly=True) as opened:
        report = check.check(opened, rebuild)
    assert (report.rebuilt, [finding.problem for finding in report.findings]) == (1, ["rebuild_failed"])
    assert reached == [b"ftyp"]


def test_check_deep_gives_large_pictures_time(esrfs, store, monkeypatch):
    """A picture that a slow machine works on for longer than a reader would wait is not damaged."""
    compact(store, "a.jpg")
    asked = []

    class Slow:
        def wait(self, seconds=120.0):
            asked.append(seconds)
            raise EngineError("the engine could not be started; the log says why")

        def release(self):
            asked.append("released")

    def rebuild(engine, key, load, lane=Lane.INTERACTIVE, *, megapixels=0.0):
        asked.append(megapixels)
        return Slow()

    monkeypatch.setattr(Engine, "rebuild", rebuild)
    assert esrfs("check", store, "--deep")[0] == ExitCode.DAMAGE
    assert asked == [pytest.approx(64 * 48 / 1e6), 3600.0, "released"]


def test_a_store_whose_empty_folders_were_lost(esrfs, store):
    """As git, rsync -m and some backups do it."""
    (store / "plain.txt").write_text("x")
    for command in (["status", store], ["check", store], ["resume", store], ["compact", "--now", store]):
        for folder in (".esrfs/originals", ".esrfs/staging", ".esrfs/networks", ".esrfs/ledger", ".esrfs/blobs"):
            shutil.rmtree(store / folder)
        code, _, err = esrfs(*command)
        assert code in (0, ExitCode.REFUSED), err
        assert "not an esrfs store" not in err
        assert (store / ".esrfs/originals").is_dir()
        assert esrfs("resume", store)[0] == 0


def test_a_store_that_lacks_a_folder_where_none_can_be_made(esrfs, store, monkeypatch):
    (store / ".esrfs/originals").rmdir()

    def refuse(*_args, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    code, _, err = esrfs("status", store)
    assert code == ExitCode.DAMAGE
    assert ".esrfs/originals" in err


def test_restore(esrfs, store):
    (store / "sub").mkdir()
    first, second = compact(store, "a.jpg"), compact(store, "sub/b.jpg")
    code, out, err = esrfs("restore", store / "a.jpg", store / "sub")
    assert (code, out, err) == (0, "2 originals brought back\n", "")
    assert (store / "a.jpg").read_bytes() == first
    assert (store / "sub" / "b.jpg").read_bytes() == second
    assert json.loads(esrfs("explain", store / "a.jpg", "--json")[1])["state"] == "original"
    assert esrfs("check", store)[0] == 0


def rewritten(store: Path) -> tuple[bytes, bytes]:
    """``a.jpg`` was compacted, rewritten by a program, and came home; what it was at first, and then."""
    reference = b"r" * 32
    first = compact(store, "a.jpg", reference=reference)
    os.rename(store / "a.jpg", store / ".esrfs" / "blobs" / f"{reference.hex()}-{'0' * 16}.0")
    return first, compact(store, "a.jpg", reference=reference, sha256_view=b"")


def test_restore_of_a_photograph_that_a_program_rewrote(esrfs, store):
    first, then = rewritten(store)
    code, out, err = esrfs("restore", store / "a.jpg")
    assert (code, out) == (0, "1 original brought back\n")
    assert "as a program rewrote it" in err
    assert "--first" in err
    assert (store / "a.jpg").read_bytes() == then != first


def test_restore_of_what_a_photograph_was_at_first(esrfs, store):
    first, then = rewritten(store)
    plain = compact(store, "b.jpg")
    code, out, err = esrfs("restore", "--first", store)
    assert (code, out) == (0, "2 originals brought back\n")
    assert "a.jpg: this is what was there first" in err
    assert "b.jpg" not in err
    assert (store / "a.jpg").read_bytes() == first
    assert (store / "b.jpg").read_bytes() == plain
    kept = {hashlib.sha256(path.read_bytes()).digest() for path in (store / ".esrfs" / "originals").iterdir()}
    assert hashlib.sha256(then).digest() in kept
    assert esrfs("check", store)[0] == 0


@pytest.mark.parametrize("lost", [b"first", b"then"])
def test_restore_first_needs_both_originals(esrfs, store, lost):
    """Without the rewritten file's own, what a program wrote into it would be lost."""
    first, then = rewritten(store)
    gone = hashlib.sha256(first if lost == b"first" else then).hexdigest()
    next((store / ".esrfs" / "originals").glob(f"{gone}-*")).unlink()
    code, _, err = esrfs("restore", "--first", store / "a.jpg")
    if lost == b"first":
        assert (code, (store / "a.jpg").read_bytes()) == (0, then)
    else:
        assert code == ExitCode.FAILED
        assert "has left the undo window" in err


def test_restore_of_what_is_gone(esrfs, store):
    compact(store, "a.jpg")
    (store / "plain.txt").write_text("x")
    for path in (store / ".esrfs" / "originals").iterdir():
        path.unlink()
    code, out, err = esrfs("restore", store / "a.jpg", store / "plain.txt")
    assert code == ExitCode.FAILED
    assert out == "0 originals brought back\n"
    assert "a.jpg: its original has left the undo window" in err
    assert "esrfs: plain.txt is not compacted" in err


def test_a_walk_stays_out_of_the_reserved_directory_and_survives_what_it_can_not_read(store):
    (store / "a").write_text("x")
    (store / "up").symlink_to("..")
    with open_store(str(store)) as opened:
        assert [found.path for found in walk.files(opened)] == ["a"]
        for path in (".esrfs", ".esrfs/store.toml", "gone", "../store"):
            with pytest.raises(OSError):
                list(walk.files(opened, [path]))


# ---- cache, weights, upscale, mount


def test_cache_without_a_mount(esrfs, store):
    code, out, _ = esrfs("cache", "show", store, "--json")
    assert (code, json.loads(out)["views"]) == (0, 0)
    assert esrfs("cache", "clear", store) == (0, "0 views dropped\n", "")
    code, _, err = esrfs("cache", "warm", store)
    assert code == ExitCode.NOT_MOUNTED
    assert "esrfs mount" in err


def test_weights(esrfs, tmp_path):
    code, out, _ = esrfs("weights", "list", "--json")
    listed = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert listed["lite-x2"]["here"]
    assert listed["lite-x2"]["scale"] == 2
    assert [listed[name]["texture"] for name in ("lite-x2", "lite-x2-texture")] == [0, 1]
    assert not listed["realesr-general-x4v3"]["here"]
    assert "realesr-general-x4v3" in esrfs("weights", "list")[1]
    assert esrfs("weights", "pull", "nope")[0] == ExitCode.NETWORK
    (tmp_path / "junk.pth").write_bytes(b"junk")
    assert esrfs("weights", "add", tmp_path / "junk.pth")[0] == ExitCode.NETWORK
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(Path(listed["lite-x2"]["path"]).read_bytes()[:-1])
    code, _, err = esrfs("weights", "add", copy)
    assert code == ExitCode.NETWORK
    assert "mine.safetensors is no network that esrfs can run" in err
    copy.write_bytes(Path(listed["lite-x2"]["path"]).read_bytes())
    assert esrfs("weights", "add", copy)[0] == 0
    assert "mine" in [row["name"] for row in json.loads(esrfs("weights", "list", "--json")[1])]


def test_upscale_says_what_is_wrong(esrfs, tmp_path):
    assert esrfs("upscale", tmp_path / "a.jpg", "-o", tmp_path / "b.jpg")[0] == ExitCode.USAGE
    assert esrfs("upscale", tmp_path / "a.jpg", "-o", tmp_path / "b.png", "--network", "x")[0] == ExitCode.NETWORK
    code, _, err = esrfs("upscale", tmp_path / "a.jpg", "-o", tmp_path / "nowhere" / "b.png")
    assert (code, err) == (ExitCode.FAILED, f"esrfs: {tmp_path / 'nowhere'} is no folder; nothing was done\n")
    code, _, err = esrfs("upscale", tmp_path / "a.jpg", "-o", tmp_path / "b.png")
    assert (code, err) == (ExitCode.FAILED, f"esrfs: {tmp_path / 'a.jpg'}: No such file or directory\n")


def test_umount_of_what_is_not_mounted(esrfs, store):
    assert esrfs("umount", store)[0] == ExitCode.NOT_MOUNTED


@pytest.fixture
def mounted(monkeypatch):
    """What the mount was asked for, instead of a mount."""
    asked = []
    monkeypatch.setattr(mounting, "_serve", lambda *arguments: asked.append(arguments) or 0)
    return asked


def test_mount_passes_its_options_on(esrfs, mounted):
    assert esrfs("mount", "/s", "/d", "-o", "ro,quiet=5", "-o", "fsname=a\\,b", "--foreground")[0] == 0
    assert mounted == [("/s", "/d", ["ro", "quiet=5", "fsname=a,b"], True)]


@pytest.mark.parametrize("program", ["esrfs", "/sbin/mount.fuse.esrfs"])
def test_mount_as_mount8_calls_it(mounted, program):
    assert main.run([program, "/my/store", "/my/photos", "-o", "rw,noatime", "-o", "dev"]) == 0
    assert mounted == [("/my/store", "/my/photos", ["rw", "noatime", "dev"], False)]


def test_mount8_only_asks(mounted):
    assert main.run(["/sbin/mount.fuse.esrfs", "/s", "/d", "-f", "-n", "-t", "fuse.esrfs"]) == 0
    assert mounted == []
    assert main.run(["/sbin/mount.fuse.esrfs", "/s"]) == ExitCode.USAGE


def test_a_folder_named_like_a_command_is_no_store(tmp_path, monkeypatch, mounted, esrfs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "status").mkdir()
    assert esrfs("status", "x")[0] == ExitCode.NOT_A_STORE
    (tmp_path / "s").mkdir()
    assert main.run(["esrfs", "s", "d"]) == 0
    assert mounted == [(str(tmp_path / "s"), str(tmp_path / "d"), [], False)]


# ---- trouble


def test_a_store_toml_that_is_damaged(esrfs, store):
    (store / ".esrfs" / "store.toml").write_text("id = 7")
    code, _, err = esrfs("status", store)
    assert code == ExitCode.DAMAGE
    assert "Nothing was changed" in err


def test_a_bug_is_told_as_one(monkeypatch, capsys):
    monkeypatch.setattr(main, "make_app", lambda command: 1 / 0)
    assert main.run(["esrfs", "status", "."]) == ExitCode.INTERNAL
    assert "bug in esrfs" in capsys.readouterr().err


def test_a_reader_that_leaves_early(store):
    code = f"{sys.executable} -m esrfs.cli.main weights list --json | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_sizes_for_people():
    sizes = [0, 999, 1000, 12_345, 3_420_000, 12_900_000_000, 2_500_000_000_000, -318_000]
    assert [show.size(size) for size in sizes] == [
        "0 bytes", "999 bytes", "1 kB", "12.3 kB", "3.42 MB", "12.9 GB", "2.50 TB", "-318 kB",
    ]  # fmt: skip
