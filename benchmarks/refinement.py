"""What refining a small picture gives: bytes at equal SSIMULACRA2, against the same picture unrefined.

    python -m benchmarks.refinement PICTURE… [--network lite-x2] [--crop 384] [--at 44] [--levels 32 40 48 56]

Of each picture the middle is shrunk, refined for the planner's level ``--at``, and coded at all ``--levels``, refined
and not; the difference in bytes is the mean over the scores that both curves reach (log bytes, straight lines between).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe
from esrfs.compaction import refine, shrinking
from esrfs.metrics.ssimulacra2 import Reference
from esrfs.networks import loading, registry
from esrfs.networks.loading import Network
from esrfs.reconstruction import Pixels
from esrfs.train.photographs import read_rgb
from esrfs.train.store_degradation import code, decode

Curve = list[tuple[float, float]]
"""(SSIMULACRA2, log bytes), by rising score."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--network", default="lite-x2")
    parser.add_argument("--crop", type=int, default=384, help="pixels, a multiple of the scale")
    parser.add_argument("--at", type=int, default=44, help="the level whose noise is refined against")
    parser.add_argument("--levels", type=int, nargs="+", default=[32, 40, 48, 56])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = loading.load(registry.find(arguments.network).read_bytes())
    gains, seconds, pixels = [], 0.0, 0
    print("| picture | bytes at equal SSIMULACRA2 | SSIMULACRA2 at the highest level |\n|---|---|---|")
    for path in arguments.pictures:
        full = _middle(read_rgb(path), arguments.crop)
        reference = Reference(full)
        small = shrinking.reduced(full, network.scale)
        noise = refine.codec_noise(small, decode(code(small, arguments.at)))
        start = time.process_time()
        refined = refine.refine(
            full, small, network.differentiable, scale=network.scale, margin=network.margin, noise=noise
        )  # fmt: skip
        seconds += time.process_time() - start
        pixels += full.shape[0] * full.shape[1]
        plain, better = (
            _curve(network, picture, reference, arguments.levels) for picture in (small, refined.small)
        )  # fmt: skip
        gains.append(_difference(plain, better))
        told = f"{math.expm1(gains[-1]):+.1%}"
        print(f"| {path.name} | {told} | {plain[-1][0]:.1f} → {better[-1][0]:.1f} |", flush=True)
    print(f"| mean | {math.expm1(float(np.mean(gains))):+.1%} | |")
    print(f"\n{describe()}; {seconds / pixels * 1e6:.0f} s of CPU for each megapixel")


def _middle(full: Pixels, side: int) -> Pixels:
    top, left = (max(0, (length - side) // 2) for length in full.shape[:2])
    return np.ascontiguousarray(full[top : top + side, left : left + side])


def _curve(network: Network, small: Pixels, reference: Reference, levels: list[int]) -> Curve:
    coded = [code(small, level) for level in levels]
    return sorted((reference.compare(network(decode(avif)[None])[0]).score, math.log(len(avif))) for avif in coded)


def _difference(plain: Curve, better: Curve) -> float:
    """In log bytes; nan if they have no score in common."""
    low, high = max(plain[0][0], better[0][0]), min(plain[-1][0], better[-1][0])
    if low >= high:
        return math.nan
    scores = np.linspace(low, high, 20)
    of = [np.interp(scores, [score for score, _ in curve], [size for _, size in curve]) for curve in (plain, better)]
    return float(np.mean(of[1] - of[0]))


if __name__ == "__main__":
    main()
