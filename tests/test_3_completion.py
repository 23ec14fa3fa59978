"""Shell completion, installed as the documentation says, in the shells themselves."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

_SECONDS = 30.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new user's home directory; `esrfs` is on the PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "esrfs").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m esrfs.cli.main "$@"\n')
    (programs / "esrfs").chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {"HOME": home, "ZDOTDIR": home, "TERM": "dumb", "PS1": "$ "}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    monkeypatch.delenv("XDG_CONFIG_HOME")  # typer installs for fish in ~/.config, where fish looks by default
    monkeypatch.delenv("XDG_DATA_HOME")
    return home


def install(shell: str) -> str:
    # `; true`: a shell that runs one command only may become it, and it is the shell that is looked for.
    command = [shell, "-c", "esrfs --install-completion; true"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def type_into(shell: str, home: Path, keys: str, wanted: str) -> str:
    """What an interactive shell shows when somebody types ``keys``, until it shows ``wanted``."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(home)
        os.execvp(shell, [shell, "-i"])
    shown = ""
    try:
        _read(terminal, r"[$#%] ")
        for key in keys.split("|"):
            os.write(terminal, key.encode())
            shown += _read(terminal, rf"{wanted}|\a")  # shells beep when they find nothing
            if re.search(wanted, shown):
                break
    finally:
        os.close(terminal)  # hangs up: the shell ends
        os.waitpid(process, 0)
    return shown


def _read(terminal: int, wanted: str) -> str:
    shown = ""
    end = time.monotonic() + _SECONDS / 3
    while not re.search(wanted, shown) and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


def test_bash(home: Path, needs: Callable[[str], str]) -> None:
    needs("bash")
    assert "completion installed" in install("bash")
    assert "umount" in type_into("bash", home, "esrfs umo\t", "umount ")
    assert "--force" in type_into("bash", home, "esrfs umount --fo\t", "--force ")


def test_zsh(home: Path, needs: Callable[[str], str]) -> None:
    """Its first Tab only loads the completion: typer's script for zsh is so."""
    needs("zsh")
    assert "completion installed" in install("zsh")
    assert re.search("umo\a?unt ", type_into("zsh", home, "esrfs umo\t|\t", "unt "))


def test_fish(home: Path, needs: Callable[[str], str]) -> None:
    needs("fish")
    assert "completion installed" in install("fish")

    def complete(line: str) -> list[str]:
        result = subprocess.run(
            ["fish", "-c", f"complete -C '{line}'"], capture_output=True, text=True, check=True, timeout=60
        )
        return [found.split("\t")[0] for found in result.stdout.splitlines()]

    assert complete("esrfs umo") == ["umount"]
    assert complete("esrfs umount --fo") == ["--force"]
    (home / "a folder").mkdir()
    assert complete(f"esrfs umount {home}/a") == [f"{home}/a folder/"]
