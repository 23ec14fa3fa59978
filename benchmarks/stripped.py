"""What it costs when a program strips a view of everything (``exiftool -all=``): in its own store, and in one that
never saw its blob.

``python -m benchmarks.stripped FILE… [--preset high]`` compacts each JPEG in this process, strips its view, and looks
whether the blob is known again by the pixels alone; then it compacts the stripped file as a new original. Scores are
SSIMULACRA2 against the file that was first.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import family
from esrfs import formats, reconstruction
from esrfs.blob import recipe as recipe_format
from esrfs.blob.container import Blob
from esrfs.compaction import compactor, homecoming
from esrfs.compaction.outcome import Outcome, Policy, Verdict
from esrfs.formats import scan
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.reconstruction import Infer


def _view(outcome: Outcome, infer: Infer) -> bytes:
    return reconstruction.rebuild(recipe_format.decode(outcome.recipe), outcome.avif, infer)


def _stripped(data: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jpg")
        path.write_bytes(data)
        subprocess.run(["exiftool", "-q", "-q", "-overwrite_original", "-all=", path], check=True)
        return path.read_bytes()


def _comes_home(stripped: bytes, outcome: Outcome) -> bool:
    """Whether its pixels tell the blob: then nothing is lost a second time."""
    found = scan.find(stripped)
    blob = Blob(outcome.avif, recipe_format.decode(outcome.recipe), outcome.recipe, bytes(16))
    return found is not None and homecoming.take_over(stripped, found, blob) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--preset", default="high")
    arguments = parser.parse_args()
    policy = Policy(preset=arguments.preset)
    networks, infer = family.ready(policy.network)
    print("| file | view | stripped, in its store | stripped, elsewhere: score | against the view | stored bytes |")
    print("|---|---|---|---|---|---|")
    for path in arguments.files:
        original = path.read_bytes()
        first = compactor.compact(original, policy, networks, infer)
        if first.verdict is not Verdict.COMPACTED:
            print(f"| {path.name} | {first.message} | | | | |")
            continue
        view = _view(first, infer)
        stripped = _stripped(view)
        second = compactor.compact(stripped, policy, networks, infer)
        again = _view(second, infer) if second.verdict is Verdict.COMPACTED else stripped
        shown = [np.ascontiguousarray(formats.decode(each, policy.max_megapixels)) for each in (original, view, again)]
        of_original = Reference(shown[0])
        scores = of_original.compare(shown[1]).score, of_original.compare(shown[2]).score
        against_view = Reference(shown[1]).compare(shown[2]).score
        home = "taken over, no loss" if _comes_home(stripped, first) else "new"
        sizes = f"{len(first.avif):,}, then {len(second.avif) or len(stripped):,}"
        figures = f"{scores[0]:.1f} | {home} | {scores[1]:.1f} | {against_view:.1f} | {sizes}"
        print(f"| {path.name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
