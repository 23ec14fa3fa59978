"""The owner's rules: which files are kept under another policy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esrfs.cli import main
from esrfs.compaction.outcome import Policy
from esrfs.exit_codes import ExitCode
from esrfs.store import rules
from esrfs.store.errors import StoreError
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.store.rules import Rules


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(str(tmp_path / "store"), policy=Policy(preset="balanced"))
    with open_store(str(tmp_path / "store")) as opened:
        yield opened


def write(store: Store, text: str) -> None:
    (Path(store.path) / ".esrfs" / "rules").write_text(text)


RULES = """
# pattern          what
*.png              never
Scans/             lossless
/Holidays/**       balanced
/Holidays/best/    faithful
/two words/*.jpg   small
"""


@pytest.mark.parametrize(
    ("path", "choice", "line"),
    [
        ("a.jpg", "balanced", None),
        ("a.png", "never", 3),
        ("deep/er/A.PNG", "never", 3),
        ("Scans/1.jpg", "lossless", 4),
        ("old/scans/x/1.png", "lossless", 4),  # the last one counts
        ("Scans", "balanced", None),  # no folder but a file
        ("Holidays/1.jpg", "balanced", 5),
        ("Holidays/best/of/1.png", "faithful", 6),
        ("other/Holidays/1.jpg", "balanced", None),
        ("two words/1.JPG", "small", 7),
        ("two words/sub/1.jpg", "balanced", None),
    ],
)
def test_the_last_rule_that_matches_counts(store: Store, path: str, choice: str, line: int | None) -> None:
    write(store, RULES)
    decision = Rules(store).decide(path)
    assert decision.choice == choice
    assert (decision.rule.line if decision.rule else None) == line


def test_without_rules_the_stores_policy_holds(store: Store) -> None:
    assert Rules(store).policy("a.jpg") == store.config.policy


def test_a_policy_of_its_own_changes_the_preset_only(store: Store) -> None:
    write(store, "*.jpg small\n*.png never")
    policy = Rules(store).policy("a.jpg")
    assert policy is not None
    assert (policy.preset, policy.network) == ("small", store.config.policy.network)
    assert Rules(store).policy("a.png") is None


def test_changes_hold_at_once(store: Store) -> None:
    known = Rules(store)
    stamps = [known.stamp]
    assert known.decide("a.jpg").choice == "balanced"
    for choice in ("never", "small", "lossless"):
        write(store, f"*.jpg   {choice} ")
        assert known.decide("a.jpg").choice == choice
        stamps.append(known.stamp)
    (Path(store.path) / ".esrfs" / "rules").unlink()
    assert known.decide("a.jpg").choice == "balanced"
    assert len(set(stamps)) == 4


@pytest.mark.parametrize("line", ["*.jpg", "never", "*.jpg best", "*.jpg never never2", "!*.jpg never"])
def test_what_can_not_be_understood_is_said_with_its_line(store: Store, line: str) -> None:
    write(store, f"# rules\n*.png never\n{line}\n")
    known = Rules(store)
    for _ in range(2):  # it is not taken for understood the second time
        with pytest.raises(StoreError, match=r"rules, line 3: .*Nothing is compacted"):
            known.decide("a.png")
    write(store, "*.png never")
    assert known.decide("a.png").choice == "never"


def test_names_that_are_not_utf8(store: Store) -> None:
    (Path(store.path) / ".esrfs" / "rules").write_bytes(b"caf\xe9* never\n")
    assert Rules(store).decide("caf\udce9.jpg").choice == "never"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main.run(["esrfs", "policy", *arguments])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo])
def test_rules_that_are_no_file_are_told_and_nothing_waits_for_them(store: Store, make: Callable[[Path], None]) -> None:
    make(Path(store.path, ".esrfs", "rules"))
    with pytest.raises(StoreError, match=r"\.esrfs/rules is no file"):
        Rules(store).decide("a.jpg")


def test_compact_tells_what_is_wrong_with_the_rules(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    Path(store.path, ".esrfs", "rules").write_text("*.png nonsense\n")
    Path(store.path, "a.txt").write_text("x")
    assert main.run(["esrfs", "compact", "--now", store.path]) == ExitCode.DAMAGE
    assert "rules, line 1: expected a pattern" in capsys.readouterr().err


def test_the_command(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    write(store, RULES)
    code, out = run(capsys, f"{store.path}/Scans/1.jpg")
    assert code == ExitCode.OK
    assert "lossless" in out
    assert "line 4 of" in out
    code, out = run(capsys, f"{store.path}/Holidays/best/1.jpg", "--json")
    assert code == ExitCode.OK
    assert json.loads(out) == {
        "path": "Holidays/best/1.jpg",
        "policy": "faithful",
        "least_score": 85.0,
        "least_score_of_a_part": 70.0,
        "rule": {"file": f"{store.path}/.esrfs/rules", "line": 6, "pattern": "/Holidays/best/"},
    }
    (Path(store.path) / "Scans").mkdir()
    assert "lossless" in run(capsys, f"{store.path}/Scans")[1]
    assert "own policy" in run(capsys, store.path)[1]
    write(store, "what is this")
    assert run(capsys, store.path)[0] == ExitCode.DAMAGE


def test_the_example_in_the_documentation_is_understood() -> None:
    assert rules.__doc__ is not None
    example = rules.__doc__.split("::\n", 1)[1].split("``never``")[0]
    assert [rule.choice for rule in rules.parse(example, "rules")] == ["never", "lossless", "balanced", "faithful"]
