"""systemd units: systemd itself finds no fault with them, and ``install-units`` puts them where they belong; what is
logged reaches the journal with its level."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.testing

from esrfs.cli import installing, main
from esrfs.exit_codes import ExitCode

SHIPPED = Path(__file__).resolve().parent.parent / "systemd"
UNITS = sorted(SHIPPED.glob("*/*.*"))
EXPOSURE = {"system/esrfs@": 60, "user/esrfs@": 98, "system/esrfs-daemon": 36, "user/esrfs-daemon": 70}
"""At most, of 100, as `systemd-analyze security` counts (252: 55, 96, 30, 66). For users see the unit itself."""


def ids(path: Path) -> str:
    return str(path.relative_to(SHIPPED))


def run(command: list[str], base: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(base), "SYSTEMD_COLORS": "0", "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for units, and programs for them to name."""
    programs = tmp_path / "my 100% programs"
    programs.mkdir()
    for name in ("esrfs", "esrfs-daemon"):
        (programs / name).symlink_to(sys.executable)
    monkeypatch.setattr(sys, "argv", [str(programs / "esrfs")])
    monkeypatch.setattr(installing, "_directory", lambda user: tmp_path / ("user" if user else "system"))
    return tmp_path


def install(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(main.make_app("install-units"), ["install-units", *arguments])


@pytest.mark.parametrize("kind", ["system", "user"])
def test_systemd_accepts_installed_units(kind: str, needs: Callable[[str], str], installed: Path) -> None:
    analyze = needs("systemd-analyze")
    result = install(*(["--user"] if kind == "user" else []))
    assert result.exit_code == 0, result.output
    units = sorted((installed / kind).iterdir())
    assert [unit.name for unit in units] == sorted(unit.name for unit in SHIPPED.joinpath(kind).iterdir())
    for unit in units:
        assert "my 100%% programs" in unit.read_text()
        verified = run([analyze, "verify", f"--{kind}", "--man=no", "--recursive-errors=no", str(unit)], installed)
        complaints = [line for line in verified.stderr.splitlines() if "esrfs" in line]
        assert complaints == []
        assert verified.returncode == 0, verified.stderr
        # `security` says how much of the system a unit could reach; more than today is to be noticed.
        options = ["--offline=yes", f"--threshold={EXPOSURE[f'{kind}/{unit.stem}']}", "--no-pager"]
        judged = run([analyze, "security", *options, str(unit)], installed)
        assert judged.returncode == 0, judged.stdout


def test_systemd_finds_what_is_wrong(needs: Callable[[str], str], installed: Path) -> None:
    """That the test above can fail."""
    unit = installed / "esrfs@.service"
    unit.write_text((SHIPPED / "system" / "esrfs@.service").read_text().replace("Type=notify", "Type=notfy"))
    verified = run([needs("systemd-analyze"), "verify", "--man=no", str(unit)], installed)
    assert "notfy" in verified.stderr


def test_systemd_accepts_the_mount_unit(needs: Callable[[str], str], tmp_path: Path) -> None:
    unit = tmp_path / "srv-photos.mount"
    unit.write_text((SHIPPED / "examples" / unit.name).read_text())
    verified = run([needs("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", str(unit)], tmp_path)
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=ids)
def test_no_unit_hides_its_mount_or_breaks_fusermount(unit: Path) -> None:
    """Each of these gives a unit a mount namespace of its own, in which the mount would stay, or NoNewPrivileges."""
    hiding = r"(Private(Tmp|Devices|Mounts|Users)|Protect(System|Home|Kernel\w+|ControlGroups|Proc|Clock)|ProcSubset"
    hiding += r"|ReadOnlyPaths|ReadWritePaths|InaccessiblePaths|TemporaryFileSystem|Bind\w+|RootDirectory|MountFlags"
    hiding += r"|DynamicUser|NoNewPrivileges|RestrictSUIDSGID|MemoryDenyWriteExecute)="
    if unit.name == "esrfs@.service":
        assert not re.search(f"^{hiding}", unit.read_text(), re.MULTILINE)
    if unit.match("user/esrfs@.service"):
        assert not re.search(r"^(SystemCall|Restrict|Lock|Capability)\w+=", unit.read_text(), re.MULTILINE)


def test_install_units_twice_and_after_an_upgrade(installed: Path) -> None:
    unit = installed / "system" / "esrfs@.service"
    assert f"{unit} is written" in install().output
    text = unit.read_text()
    again = install()
    assert again.exit_code == 0
    assert "is up to date" in again.output
    # From an older esrfs, unchanged since.
    unit.write_text(installing._signed("[Service]\nExecStart=esrfs of old\n"))
    assert f"{unit} is written" in install().output
    assert unit.read_text() == text


def test_install_units_leaves_what_somebody_edited(installed: Path) -> None:
    unit = installed / "system" / "esrfs@.service"
    install()
    edited = unit.read_text().replace("TasksMax=4096", "TasksMax=9999")
    for text in (edited, "[Service]\nExecStart=/bin/true\n"):
        unit.write_text(text)
        result = install()
        assert result.exit_code == ExitCode.REFUSED
        assert "was edited" in result.output
        assert unit.read_text() == text


def test_install_units_dry_run_changes_nothing(installed: Path) -> None:
    result = install("--dry-run")
    assert result.exit_code == 0
    assert "Type=notify" in result.output
    assert not (installed / "system").exists()


def test_install_units_says_what_is_missing(installed: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [str(installed / "nowhere" / "esrfs")])
    monkeypatch.setattr(sys, "executable", str(installed / "nowhere" / "python"))
    monkeypatch.setenv("PATH", str(installed))
    assert main.run(["esrfs", "install-units"]) == ExitCode.FAILED
    assert "not installed" in capsys.readouterr().err
    assert not (installed / "system").exists()


def test_user_units_go_to_the_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert installing._directory(True) == tmp_path / "config" / "systemd" / "user"
    assert installing._directory(False) == Path("/etc/systemd/system")


LOGGING = """
import logging
from esrfs import journal
journal.log_to_stderr()
log = logging.getLogger("esrfs.test")
log.info("read %s", "a/b.jpg")
log.warning("%s: odd", "two\\nlines\\x1b[31m \\udcff é")
log.critical("bad")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def logged(journal: bool) -> list[str]:
    reader, writer = os.pipe()
    st = os.fstat(writer)
    stream = f"{st.st_dev}:{st.st_ino}" if journal else f"{st.st_dev}:1"
    environment = {**os.environ, "JOURNAL_STREAM": stream}
    subprocess.run([sys.executable, "-c", LOGGING], stderr=writer, env=environment, check=True)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        return pipe.read().splitlines()


def test_the_journal_gets_levels_for_each_line() -> None:
    lines = logged(journal=True)
    assert lines[:4] == [
        "<6>esrfs.test: read a/b.jpg",
        "<4>esrfs.test: two\\nlines\\x1b[31m \\udcff é: odd",
        "<2>esrfs.test: bad",
        "<3>esrfs.test: failed",
    ]
    assert lines[-1] == "<3>ZeroDivisionError: division by zero"
    assert all(line.startswith("<3>") for line in lines[4:])


def test_a_terminal_gets_words() -> None:
    assert logged(journal=False)[:2] == [
        "INFO esrfs.test: read a/b.jpg",
        "WARNING esrfs.test: two\\nlines\\x1b[31m \\udcff é: odd",
    ]
