"""What every file of some folders would take at each preset, each compacted once, and what `esrfs init --dry-run` says
of it.

    python -m benchmarks.ratios FOLDER… --keep FILE [--presets …] [--patience …] [--network …] [--table]
        [--refinement SECONDS]

Nothing is changed. Each result is kept at once in FILE (JSON lines): stop it when you like, and the same command goes
on. A result counts only for the code, networks and policy that it was made with. At the end, or at once with
``--table`` (of what there is), it prints Markdown: the camera JPEGs of 3 and of 12 MP and more, picture by picture; all
files together; and how far the prediction of `esrfs init --dry-run` is off for them, over many draws of its sample.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.compaction.outcome import CHOICES, LOSSLESS, PATIENCES, Outcome, Policy, Verdict, stored_bytes
from esrfs.engine import protocol
from esrfs.engine.handler import open_handler
from esrfs.engine.lanes import Crossing
from esrfs.engine.protocol import Lane
from esrfs.evaluate import grid
from esrfs.formats.kinds import COMPACTED
from esrfs.networks import registry
from esrfs.store import initialise

_CAMERA = 3.0
_LARGE = 12.0
"""Megapixels from which a JPEG counts as a camera's, and as a large one."""
_DRAWS = 200
_FOLDER = 1000
"""Files of a larger folder, drawn from those that were compacted."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One file under one preset."""

    sha256: str
    preset: str
    made_by: str
    """Code, networks and policy."""
    name: str
    bytes: int
    kind: str
    width: int
    height: int
    stored: int
    """Of the blob as it would lie in a store, or of the file that stays."""
    reckoned: int
    """The same as a prediction has it."""
    how: str
    """``×2 q60``, ``lossless``, or why it stays."""
    score: float | None
    seconds: float
    cpu_seconds: float

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.sha256, self.preset, self.made_by)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, required=True, help="results, JSON lines")
    parser.add_argument("--presets", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--patience", choices=PATIENCES, default="normal")
    parser.add_argument("--network", default="lite")
    parser.add_argument("--refinement", type=float, default=0, help="seconds for each picture; 0: off")
    parser.add_argument("--table", action="store_true", help="compact nothing; print what there is")
    arguments = parser.parse_args()
    policy = Policy(
        patience=arguments.patience,
        network=arguments.network,
        refinement="always" if arguments.refinement else "off",
        refinement_seconds=arguments.refinement or Policy().refinement_seconds,
    )
    weights = {name: path.read_bytes() for name, path in registry.family(policy.network).items()}
    networks = " ".join(hashlib.sha256(data).hexdigest()[:16] for data in weights.values())
    made_by = f"{grid.own_version()}, {policy.patience}, {policy.network} {networks}"
    if arguments.refinement:
        made_by += f", refined for at most {arguments.refinement:g} s"
    kept = _read(arguments.keep, made_by)
    files = {folder: _files(folder) for folder in arguments.folders}
    if not arguments.table:
        compact = _compactor(policy, weights)
        missing = [
            (path, sha256, preset)
            for each in files.values()
            for path, sha256 in each.items()
            for preset in arguments.presets
            if (sha256, preset, made_by) not in kept
        ]
        # Camera files first, the largest first: a run that is cut short then tells most.
        missing.sort(key=lambda each: (each[0].suffix.lower() not in {".jpg", ".jpeg"}, -each[0].stat().st_size))
        with arguments.keep.open("ab") as out:
            for number, (path, sha256, preset) in enumerate(missing, 1):
                result = _try(path, sha256, preset, made_by, compact)
                kept[result.key] = result
                out.write(msgspec.json.encode(result) + b"\n")
                out.flush()
                print(f"{number}/{len(missing)} {preset} {path.name}: {result.how}", file=sys.stderr, flush=True)
    print(f"esrfs {made_by}\n")
    results = list(kept.values())
    camera = [each for each in results if each.kind == "jpeg" and each.width * each.height >= _CAMERA * 1e6]
    large = [each for each in camera if each.width * each.height >= _LARGE * 1e6]
    print(f"Camera JPEGs of {_CAMERA:g} MP and more: original : stored, and SSIMULACRA2\n")
    _print_pictures(camera, arguments.presets)
    print(f"\nOf them those of {_LARGE:g} MP and more\n")
    _print_pictures(large, arguments.presets)
    _print_predictions(results, arguments.presets)


def _read(path: Path, made_by: str) -> dict[tuple[str, str, str], Kept]:
    """Those made by this code; a line that a crash cut short is as if it were not there."""
    found = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                result = msgspec.json.decode(line, type=Kept)
            except msgspec.DecodeError:
                continue
            if result.made_by == made_by:
                found[result.key] = result
    return found


def _files(folder: Path) -> dict[Path, str]:
    paths = sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if not path.is_symlink()}


def _compactor(policy: Policy, weights: dict[str, bytes]) -> Callable[[bytes, str], Outcome]:
    """The engine's own code in this process."""
    networks = {hashlib.sha256(data).digest(): data for data in weights.values()}
    handler = open_handler("auto", networks.__getitem__)
    named = {name: hashlib.sha256(data).digest() for name, data in weights.items()}

    def compact(original: bytes, preset: str) -> Outcome:
        job = Crossing().enter(0, Lane.COMPACTION)
        request = protocol.Compact(job=0, policy=msgspec.structs.replace(policy, preset=preset), networks=named)
        return handler.compact(request, original, job)

    return compact


def _try(path: Path, sha256: str, preset: str, made_by: str, compact: Callable[[bytes, str], Outcome]) -> Kept:
    original = path.read_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    outcome = compact(original, preset)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    stored = reckoned = len(original)
    how = str(outcome.reason or "")
    if outcome.verdict is Verdict.COMPACTED:
        recipe = recipe_format.decode(outcome.recipe)
        stored = len(container.pack(outcome.avif, outcome.recipe, bytes(16), bytes(32)))
        reckoned = stored_bytes(outcome.avif, outcome.recipe)
        how = LOSSLESS if recipe.preset == LOSSLESS else f"×{recipe.scale} q{recipe.quality}"
    return Kept(
        sha256=sha256,
        preset=preset,
        made_by=made_by,
        name=path.name,
        bytes=len(original),
        kind=outcome.kind,
        width=outcome.width,
        height=outcome.height,
        stored=stored,
        reckoned=reckoned,
        how=how,
        score=outcome.score if outcome.verdict is Verdict.COMPACTED else None,
        seconds=round(seconds, 2),
        cpu_seconds=round(cpu, 2),
    )


def _print_pictures(results: Iterable[Kept], presets: Sequence[str]) -> None:
    by_picture: dict[str, dict[str, Kept]] = {}
    for each in results:
        by_picture.setdefault(each.sha256, {})[each.preset] = each
    print(f"| file | MP | kB | bits per pixel | {' | '.join(presets)} |")
    print("|---" * (4 + len(presets)) + "|")
    pictures = sorted(by_picture.values(), key=lambda found: -_any(found).bytes)
    for found in pictures:
        one = _any(found)
        pixels = one.width * one.height
        cells = [_cell(found[preset]) if preset in found else "" for preset in presets]
        row = [one.name, f"{pixels / 1e6:.1f}", f"{one.bytes / 1000:,.0f}", f"{8 * one.bytes / pixels:.1f}", *cells]
        print(f"| {' | '.join(row)} |")
    for label, pick in (("all together", _all), ("of them with loss, together", _lossy)):
        row = [label, "", "", ""]
        for preset in presets:
            chosen = pick([found[preset] for found in pictures if preset in found])
            total = sum(each.stored for each in chosen)
            row.append(f"{sum(each.bytes for each in chosen) / total:.2f} ({len(chosen)})" if total else "")
        print(f"| {' | '.join(row)} |")


def _any(found: dict[str, Kept]) -> Kept:
    return next(iter(found.values()))


def _all(results: list[Kept]) -> list[Kept]:
    return results


def _lossy(results: list[Kept]) -> list[Kept]:
    return [each for each in results if each.how.startswith("×")]


def _cell(result: Kept) -> str:
    if result.score is None:
        return f"stays ({result.how})"
    ratio = f"{result.bytes / result.stored:.2f}"
    return f"{ratio} lossless" if result.how == LOSSLESS else f"{ratio} at {result.score:.1f}, {result.how}"


def _print_predictions(results: Iterable[Kept], presets: Sequence[str]) -> None:
    by_file: dict[str, dict[str, Kept]] = {}
    for each in results:
        by_file.setdefault(each.sha256, {})[each.preset] = each
    files = [found for found in by_file.values() if len(found) == len(presets)]
    larger = random.Random(0).choices(files, k=_FOLDER)
    print(f"\nPredictions from {initialise.SAMPLE} files, {_DRAWS} draws: how far the saving is off\n")
    print("| folder | preset | really saved | mean | half are within | 95 % are within | off by 15 % or less |")
    print("|---|---|---|---|---|---|---|")
    for label, folder in ((f"these {len(files)}", files), (f"{_FOLDER:,} drawn from them", larger)):
        for preset in presets:
            chosen = [found[preset] for found in folder]
            total, saved = sum(each.bytes for each in chosen), sum(each.bytes - each.reckoned for each in chosen)
            if not saved:
                continue
            errors = [_predicted(chosen, seed) / saved - 1 for seed in range(_DRAWS)]
            sizes = sorted(map(abs, errors))
            within = sum(size <= 0.15 for size in sizes) / _DRAWS
            print(
                f"| {label} | {preset} | {saved / total:.1%} | {sum(errors) / _DRAWS:+.1%} | {sizes[_DRAWS // 2]:.1%} "
                f"| {sizes[_DRAWS * 95 // 100]:.1%} | {within:.1%} |"
            )


def _predicted(files: Sequence[Kept], seed: int) -> float:
    """Bytes saved, as `init --dry-run` reckons it."""
    candidates = [
        (str(number), each.bytes)
        for number, each in enumerate(files)
        if each.kind in COMPACTED and each.bytes >= initialise.SMALLEST_CANDIDATE
    ]
    drawn = initialise.draw(candidates, initialise.SAMPLE, seed)
    return sum(part * (1 - files[int(name)].reckoned / size) for name, size, part in drawn)


if __name__ == "__main__":
    main()
