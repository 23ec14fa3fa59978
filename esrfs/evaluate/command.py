"""What ``esrfs evaluate`` does: look at the pictures, run what is missing, write page, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esrfs import whole
from esrfs.evaluate import comparison, grid, page, results, run
from esrfs.evaluate.curves import Comparison


class NothingToDoError(Exception):
    """For people: there is no picture, or no trial."""


@dataclass(frozen=True)
class Made:
    files: list[Path]
    refused: dict[str, str]
    """Files that were left out, and why."""
    left_out: list[str]


def evaluate(
    files: Sequence[tuple[Path, str]],
    choice: grid.Choice,
    out: Path,
    *,
    jobs: int,
    crop_rows: int,
    command_line: str,
    looking: run.Progress,
    progress: run.Progress,
) -> Made:
    """Write ``report.html``, ``results.csv`` and ``results.json`` to the folder ``out``; ``results.jsonl`` there is
    what is known already. The same results give the same files.

    Raises ChoiceError, WeightsError, BusyError, NothingToDoError, WorkerLostError, OSError.
    """
    grid.plan([], choice)  # a choice that can't be had is told before anything is done
    if not files:
        raise NothingToDoError("there is no file to evaluate")
    with results.Kept(out) as kept, run.Crew(jobs) as crew:
        pictures, refused = crew.examine(files, looking)
        if not pictures:
            reasons = "; ".join(f"{name} {why}" for name, why in list(refused.items())[:3])
            raise NothingToDoError(f"there is no picture to evaluate{': ' if reasons else ''}{reasons}")
        plan = grid.plan(pictures, choice)
        if not plan.trials:
            because = "".join(f" ({why})" for why in plan.left_out[:3])
            raise NothingToDoError(
                f"with these options there is nothing to try; give more codecs, scales or networks{because}"
            )
        found, failed = crew.run(plan.trials, kept, progress)
        left_out = [*plan.left_out, *failed]
        if not found:
            raise NothingToDoError(f"nothing could be measured: {'; '.join(failed[:3])}")
        told = comparison.Run(command_line, pictures, refused, left_out, choice.measures, choice.anchor, crop_rows)
        table = results.rows(found, choice.measures)
        written = [out / "report.html", out / "results.csv", out / "results.json"]
        whole.write(written[1], results.as_csv(table, choice.measures))
        whole.write(written[2], (json.dumps(table, indent=1) + "\n").encode())
        whole.write(written[0], page.as_html(comparison.make(Comparison(found), told)))
    return Made(written, refused, left_out)
