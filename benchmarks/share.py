"""What becomes of the files of a folder: how many are compacted, to what size, and why not the others.

``python -m benchmarks.share FOLDER… [--preset high]`` compacts each file in this process and changes nothing.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

from benchmarks import family
from esrfs.compaction import compactor
from esrfs.compaction.outcome import Outcome, Policy, Reason, Verdict, stored_bytes
from esrfs.formats import kinds


def _why(outcome: Outcome) -> str:
    """Its reason, and for a kind that is passed through what the message says of it."""
    if outcome.verdict is Verdict.COMPACTED:
        return "compacted"
    assert outcome.reason is not None
    if outcome.reason in (Reason.UNSUPPORTED_KIND, Reason.SIGNED, Reason.BROKEN):
        said = outcome.message.split("; ")[1 if outcome.kind not in kinds.COMPACTED else 0].removesuffix(" and stays")
        return f"{outcome.reason}: {said.removesuffix(' bit for bit')}"
    return str(outcome.reason)


def _paths(folder: Path) -> list[Path]:
    return sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--preset", default="high")
    parser.add_argument("--largest", type=float, default=4.0, help="MiB; larger files are left out")
    arguments = parser.parse_args()
    policy = Policy(preset=arguments.preset)
    networks, infer = family.ready(policy.network)
    for folder in arguments.folders:
        counts: Counter[tuple[str, str]] = Counter()
        before: Counter[str] = Counter()
        after: Counter[str] = Counter()
        for path in _paths(folder):
            if path.stat().st_size > arguments.largest * 2**20:
                continue
            data = path.read_bytes()
            outcome = compactor.compact(data, policy, networks, infer)
            kind = outcome.kind or "no picture"
            counts[kind, _why(outcome)] += 1
            if outcome.verdict is Verdict.COMPACTED:
                before[kind] += len(data)
                after[kind] += stored_bytes(outcome.avif, outcome.recipe)
        print(f"{folder}, preset {arguments.preset}:")
        for (kind, why), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1])):
            size = f", {before[kind]:,} bytes as {after[kind]:,}" if why == "compacted" else ""
            print(f"  {count:4} {kind:10} {why}{size}")


if __name__ == "__main__":
    main()
