"""How long networks take for a picture, without codec and metric: beside the time that DESIGN 10 expects of them, and
as a share of what this machine reaches when it multiplies matrices.

``python -m benchmarks.networks [--names lite-x2 …] [--megapixels 12] [--rounds N] [--device cuda]``. It takes the
architectures of ``weights/training``, with the shipped weights or, where nobody has trained them, random ones: time
does not depend on them. Pictures go through the engine's own tiles, one thread for each core.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import machine
from esrfs.engine import tiles
from esrfs.networks import architectures, loading
from esrfs.networks.spec import NetworkSpec
from esrfs.train import settings

WEIGHTS = Path(__file__).parent.parent / "weights"
_MATRIX = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="+", default=["lite-x2", "lite-x4", "base-x2", "base-x4"])
    parser.add_argument("--megapixels", type=float, default=12.0, help="of the enlarged picture, 4 : 3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the engine does
    threads = (os.cpu_count() or 1) if arguments.device == "cpu" else 1
    with ThreadPoolExecutor(threads) as pool:

        def spread(tasks: list[Callable[[], None]]) -> None:
            for _ in pool.map(lambda task: task(), tasks):
                pass

        print("| network | MAC for each output pixel | seconds | DESIGN 10, 2 cores | GFLOP/s | of matrix products' |")
        print("|---|---|---|---|---|---|")
        for name in arguments.names:
            network, multiplications = build(name, arguments.device)
            height = round(math.sqrt(arguments.megapixels * 1e6 * 3 / 4) / network.scale)
            picture = np.random.default_rng(0).integers(0, 256, (height, height * 4 // 3, 3), dtype=np.uint8)
            tiles.enlarge(network, picture[:256, :256], spread)  # the first call chooses kernels
            seconds, peaks = [], []
            for _ in range(arguments.rounds):
                peaks.append(matrix_rate(pool, threads, arguments.device))
                seconds.append(timed(lambda: tiles.enlarge(network, picture, spread)))  # noqa: B023 (runs at once)
            found, peak = statistics.median(seconds), statistics.median(peaks)
            pixels = picture.shape[0] * picture.shape[1] * network.scale**2
            rate = 2 * multiplications * pixels / found
            expected = pixels / 12e6 * (24 * multiplications / 370_000 + 0.25)
            print(
                f"| {network.spec.name} | {multiplications:,.0f} | {found:.2f} | {expected:.2f} | {rate / 1e9:.0f} "
                f"| {rate / peak:.0%} |"
            )
    print(f"\n{machine.describe()}; {arguments.megapixels:g} MP, {arguments.rounds} rounds, medians")


def build(name: str, device: str) -> tuple[loading.Network, float]:
    """A network by the name of its training settings, and its multiplications for each output pixel."""
    training = settings.read(WEIGHTS / "training" / f"{name}.toml")
    model = architectures.build(training.architecture, training.arguments)
    multiplications = count_multiplications(model)
    shipped = WEIGHTS / f"{name}.safetensors"
    if shipped.exists():
        return loading.load(shipped.read_bytes(), device=device), multiplications
    description = NetworkSpec(
        name=f"{name}, random weights",
        architecture=training.architecture,
        arguments=training.arguments,
        scale=model.scale,
        margin=model.margin,
        multiple=model.multiple,
    )
    return loading.Network(description, model, torch.device(device)), multiplications


def count_multiplications(model: architectures.Model) -> float:
    """Of all convolutions, for each output pixel."""
    counted = 0
    side = 8 * model.multiple

    def count(layer: nn.Conv2d, _inputs: object, output: torch.Tensor) -> None:
        nonlocal counted
        counted += layer.weight[0].numel() * output.numel()

    hooks = [layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    with torch.inference_mode():
        model(torch.zeros(1, model.channels, side, side))
    for hook in hooks:
        hook.remove()
    return counted / (side * model.scale) ** 2


def matrix_rate(pool: ThreadPoolExecutor, threads: int, device: str) -> float:
    """Operations a second of fp32 matrix products, one in each thread."""
    pairs = [torch.rand(2, _MATRIX, _MATRIX, device=device) for _ in range(threads)]

    def multiply(pair: torch.Tensor) -> float:
        return float((pair[0] @ pair[1])[0, 0])  # the number is there when the device has done its work

    return 2 * threads * _MATRIX**3 / timed(lambda: list(pool.map(multiply, pairs)))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
