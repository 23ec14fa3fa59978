"""What compaction saves, picture by picture, how long it takes, and what plain AVIF would take at the same score.

    python -m benchmarks.compaction [--preset high] [--patience normal] [--network lite] [--plain] FILE…

Runs the engine's own code in this process. ``--plain``: the peer is AVIF at full resolution with the same encoder,
speed and tuning, 4:4:4, at the lowest quality whose score is that of the view or more; its bytes are interpolated
between two qualities to that very score.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import family
from benchmarks.machine import describe
from esrfs import formats
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Recipe
from esrfs.compaction import compactor, encoder, planner
from esrfs.compaction.outcome import CHOICES, LOSSLESS, PATIENCES, Policy, Verdict, stored_bytes
from esrfs.engine import tiles
from esrfs.engine.lanes import Crossing
from esrfs.engine.protocol import Lane
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.reconstruction import Pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--preset", choices=CHOICES, default="high")
    parser.add_argument("--patience", choices=PATIENCES, default="normal")
    parser.add_argument("--network", default="lite")
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy(preset=arguments.preset, patience=arguments.patience, network=arguments.network)
    references, networks = family.load(policy.network)
    names = ", ".join(network.spec.name for network in networks.values())
    crew = tiles.Crew(len(os.sched_getaffinity(0)))
    job = Crossing().enter(0, Lane.COMPACTION)
    seconds_in_networks = [0.0]

    def infer(sha256: bytes, pixels: Pixels) -> Pixels:
        start = time.perf_counter()
        result = tiles.enlarge(networks[sha256], pixels, lambda tasks: crew.spread(job, tasks))
        seconds_in_networks[0] += time.perf_counter() - start
        return result

    print(f"{describe()}; preset {policy.preset}, patience {policy.patience}, networks {names}\n")
    print(
        "| file | MP | bytes | stored | ratio | how | score | worst tile | colour | s | of it networks | one AVIF |",
        end="",
    )
    print(" plain AVIF | of it |" if arguments.plain else "")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|" + ("---|---|" if arguments.plain else ""))
    sums = [0, 0, 0.0, 0]
    for path in arguments.files:
        original = path.read_bytes()
        seconds_in_networks[0] = 0.0
        start, cpu = time.perf_counter(), time.process_time()
        outcome = compactor.compact(original, policy, references, infer)
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        row = [path.name, f"{outcome.width * outcome.height / 1e6:.1f}", f"{len(original):,}"]
        if outcome.verdict is not Verdict.COMPACTED:
            print(
                f"| {' | '.join(row)} | {outcome.verdict.value}: {outcome.message} | | | | | | {took:.1f} |", flush=True
            )
            sums[0] += len(original)
            sums[1] += len(original)
            continue
        recipe = recipe_format.decode(outcome.recipe)
        stored = stored_bytes(outcome.avif, outcome.recipe)
        sums[0] += len(original)
        sums[1] += stored
        row += [f"{stored:,}", f"{len(original) / stored:.2f}"]
        times = [f"{took:.1f} ({cpu:.1f} of CPU)", f"{seconds_in_networks[0]:.1f}"]
        if recipe.preset == LOSSLESS:
            print(f"| {' | '.join([*row, f'lossless: {recipe.note}', '', '', '', *times])} |", flush=True)
            continue
        scores = recipe.scores
        row += [f"×{recipe.scale} q{recipe.quality} {recipe.subsampling}", f"{scores.ssimulacra2:.1f}"]
        row += [f"{scores.worst_tile:.1f}", f"{scores.colour:.2f}, {scores.worst_colour:.1f}"]
        pixels = _colour(formats.decode(original, 300))
        row += [*times, _one_encode(pixels, policy, recipe)]
        if arguments.plain:
            plain = _plain(pixels, scores.ssimulacra2, planner.PATIENCE[policy.patience].speed)
            row += [f"{plain:,.0f}", f"{len(outcome.avif) / plain:.3f}"]
            if not math.isnan(plain):
                sums[2] += math.log(len(outcome.avif) / plain)
                sums[3] += 1
        print(f"| {' | '.join(row)} |", flush=True)
    print(f"\n{sums[0]:,} bytes in {sums[1]:,}: {sums[0] / sums[1]:.2f} : 1")
    if sums[3]:
        print(
            f"of plain AVIF's bytes at the same score, geometric mean of {sums[3]}: {math.exp(sums[2] / sums[3]):.3f}"
        )


def _colour(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels[:, :, : 1 if pixels.shape[2] < 3 else 3])


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _one_encode(pixels: Pixels, policy: Policy, recipe: Recipe) -> str:
    """The time that one encode of the whole picture takes, alone."""
    start, cpu = time.perf_counter(), time.process_time()
    speed = planner.PATIENCE[policy.patience].speed
    encoder.encode_avif(_image(pixels), recipe.quality, recipe.subsampling, speed)
    return f"{time.perf_counter() - start:.1f} ({time.process_time() - cpu:.1f} of CPU)"


def _plain(pixels: Pixels, score: float, speed: int) -> float:
    """Bytes of plain AVIF at this score; nan if it never gets there."""
    reference, image = Reference(pixels, threads=2), _image(pixels)

    def attempt(level: int) -> tuple[float, int]:
        avif = encoder.encode_8_bits(image, planner.quality(level), "4:4:4", speed)
        decoded = formats.decode(avif, 300)
        return reference.compare(np.ascontiguousarray(decoded[:, :, : pixels.shape[2]])).score, len(avif)

    low, high = 2, 62
    at = {low: attempt(low), high: attempt(high)}
    while high - low > 1:
        (worse, _), (better, _) = at[low], at[high]
        guess = low + round((high - low) * min(max((score - worse) / max(better - worse, 0.1), 0.2), 0.8))
        middle = min(max(guess, low + 1), high - 1)
        at[middle] = attempt(middle)
        low, high = (middle, high) if at[middle][0] < score else (low, middle)
    (worse, small), (better, large) = at[low], at[high]
    if not worse <= score <= better:
        return math.nan
    return float(small * (large / small) ** ((score - worse) / max(better - worse, 1e-9)))


if __name__ == "__main__":
    main()
