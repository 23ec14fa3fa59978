"""The systemd unit: systemd itself finds no fault with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

UNIT = Path(__file__).resolve().parent.parent / "systemd" / "esrfs@.service"


def test_systemd_accepts_the_unit(needs: Callable[[str], str], tmp_path: Path) -> None:
    analyze = needs("systemd-analyze")
    # `esrfs` need not be installed where systemd looks for programs.
    text = UNIT.read_text().replace("ExecStart=esrfs ", f"ExecStart={sys.executable} ")
    (tmp_path / "esrfs@.service").write_text(text)
    result = subprocess.run(
        [analyze, "verify", str(tmp_path / "esrfs@.service")], capture_output=True, text=True, check=False
    )
    complaints = [line for line in result.stderr.splitlines() if "esrfs" in line]
    assert complaints == []
