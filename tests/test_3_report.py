"""``esrfs report`` of stores that are not mounted, and what it is made of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from esrfs import config
from esrfs.cli import main
from esrfs.evaluate import store_page
from esrfs.exit_codes import ExitCode
from esrfs.store import ledger
from esrfs.store.catalog import Catalog, Entry
from esrfs.store.identity import Identity
from esrfs.store.layout import open_store
from esrfs.upkeep import history
from esrfs.upkeep.history import Day
from tests.test_1_cli import compact


@pytest.fixture
def store(tmp_path) -> Path:
    path = tmp_path / "store"
    assert main.run(["esrfs", "init", str(path)]) == ExitCode.OK
    return path


def told(path: Path) -> history.History:
    with open_store(str(path)) as opened:
        catalog = Catalog(str(config.state_directory(opened.config.id) / "catalog.db"))
        try:
            return history.of(opened, catalog)
        finally:
            catalog.close()


def next_day(path: Path, date: str, boot: str) -> None:
    with open_store(str(path)) as opened:
        ledger.mark_day(opened.ledger_fd, date=date, boot=boot, uptime=5.0)


def test_savings_are_told_by_the_day_on_which_they_were_made(store):
    next_day(store, "2031-05-01", "b1")
    compact(store, "a.jpg")
    compact(store, "b.jpg")
    next_day(store, "2031-05-03", "b2")
    compact(store, "c.jpg")
    first, second = told(store).days
    assert (first.date, first.compacted, first.original_bytes) == ("2031-05-01", 2, 100_000)
    assert (second.date, second.compacted, second.original_bytes) == ("2031-05-03", 1, 50_000)
    sizes = {name: (store / name).stat().st_size for name in ("a.jpg", "b.jpg", "c.jpg")}
    assert first.blob_bytes == sizes["a.jpg"] + sizes["b.jpg"]
    assert second.blob_bytes == sizes["c.jpg"]


def test_what_is_brought_back_is_saved_no_more(store, capsys):
    next_day(store, "2031-05-01", "b1")
    compact(store, "a.jpg")
    size = (store / "a.jpg").stat().st_size
    assert main.run(["esrfs", "restore", str(store / "a.jpg")]) == ExitCode.OK
    (day,) = [each for each in told(store).days if each.compacted]
    assert sum(each.brought_back for each in told(store).days) == 1
    assert sum(each.brought_back_bytes for each in told(store).days) == 50_000 - size == day.original_bytes - size


def test_files_are_told_by_verdict_and_reason(store):
    compact(store, "a.jpg")
    for name in ("b.jpg", "c.jpg", "d.txt", "e.jpg"):
        (store / name).write_bytes(b"x" * 1000)
    with open_store(str(store)) as opened:
        catalog = Catalog(str(config.state_directory(opened.config.id) / "catalog.db"))
        for name, state, reason in (
            ("b.jpg", "refused", "quality"),
            ("c.jpg", "refused", "quality"),
            ("d.txt", "passed_through", "not_a_picture"),
        ):
            catalog.put(Identity.from_stat((store / name).stat()), Entry(state=state, reason=reason))
        catalog.close()
    found = told(store)
    assert [(group.state, group.reason, group.files, group.bytes) for group in found.groups] == [
        ("refused", "quality", 2, 2000),
        ("blob", "", 1, 50_000),
        ("passed_through", "not_a_picture", 1, 1000),
        ("pending", "", 1, 1000),
    ]
    blobs = found.blobs  # one, which the catalog does not know: its recipe was read
    assert (blobs.count, blobs.scores, blobs.scales) == (1, [(71.5, 1)], [(2, 1)])
    assert blobs.ratios == [(pytest.approx(50_000 / (store / "a.jpg").stat().st_size, rel=0.005), 1)]


def test_a_damaged_blob_is_no_reason_to_fail(store):
    compact(store, "a.jpg")
    data = bytearray((store / "a.jpg").read_bytes())
    data[-80:] = bytes(80)
    (store / "a.jpg").write_bytes(data)
    found = told(store)
    assert found.blobs.count == 0
    assert [(group.state, group.files) for group in found.groups] == [("pending", 1)]


def test_the_report_is_a_page_and_its_figures(store, tmp_path, capsys):
    capsys.readouterr()
    for index, date in enumerate(("2031-05-01", "2031-05-02", "2031-05-09")):
        next_day(store, date, f"b{index}")
        compact(store, f"{index}.jpg")
    out = tmp_path / "made" / "report"
    assert main.run(["esrfs", "report", str(store), "-o", str(out)]) == ExitCode.OK
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(out / "report.json")]
    page = (out / "report.html").read_text()
    assert "from 2031-05-01 to 2031-05-09" in page
    assert "not mounted" in page
    assert "median 71.5, least 71.5" in page
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert page.count('role="img" aria-label="') == page.count("<svg") == 4
    values = json.loads((out / "report.json").read_text())
    assert values["status"]["blobs"] == 3
    assert [day["compacted"] for day in values["days"]] == [1, 1, 1]


def test_an_empty_store_has_a_report(store, tmp_path):
    assert main.run(["esrfs", "report", str(store), "-o", str(tmp_path / "r")]) == ExitCode.OK
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Nothing was compacted yet." in page
    assert main.run(["esrfs", "report", str(tmp_path / "elsewhere"), "-o", str(tmp_path / "r")]) == ExitCode.NOT_A_STORE


def test_classes_hold_every_value_and_no_empty_ends():
    assert store_page._classes((1, 2, 3), [(0.5, 1), (1, 1), (2, 1), (2.9, 1)]) == (
        ["< 1", "1 to 2", "2 to 3"],
        [1, 1, 2],
    )
    assert store_page._classes((1, 2, 3), [(3, 1)]) == (["≥ 3"], [1])
    assert store_page._classes((1, 2, 3), [(0, 1), (5, 3)]) == (["< 1", "1 to 2", "2 to 3", "≥ 3"], [1, 0, 0, 3])


@pytest.mark.parametrize(
    ("values", "median"),
    [([(7.0, 1)], 7), ([(1.0, 2), (3.0, 1)], 1), ([(1.0, 2), (3.0, 2)], 1), ([(1.0, 1), (3.0, 2)], 3)],
)
def test_the_median_of_counted_values(values, median):
    assert store_page._median(values) == median


def test_savings_before_the_first_day_are_in_the_table():
    blocks = store_page._savings([Day(date="", compacted=1, original_bytes=9, blob_bytes=4)])
    assert blocks[0].rows[0][0] == "before the first counted day"
