"""``python -m esrfs.train.measure NETWORK FOLDER``: what a network gains over bicubic, in dB, by AVIF quality.

Pictures are shrunk as the store does, kept clean or sent through AVIF, and enlarged whole; borders count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from esrfs.metrics.fidelity import y_psnr
from esrfs.networks import loading
from esrfs.train.degradation import Pixels, find_photographs, read_rgb, shrink, through_avif


class Gain(msgspec.Struct, frozen=True):
    """Y-PSNR against the original, dB."""

    bicubic: float
    network: float


def measure(network: loading.Network, full: Pixels, quality: int | None) -> Gain:
    """Shrink ``full`` (H×W×3), send it through AVIF at ``quality`` (None: clean), enlarge it by bicubic and network."""
    height, width = (size // network.scale * network.scale for size in full.shape[:2])
    full = full[:height, :width]
    small = shrink(full, network.scale)
    if quality is not None:
        small = through_avif(small, quality)
    bicubic = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return Gain(y_psnr(full, bicubic), y_psnr(full, network(small[None])[0]))


def main(
    weights: Annotated[Path, typer.Argument(metavar="NETWORK", help="A weights file.")],
    folder: Path,
    quality: Annotated[Sequence[int], typer.Option(help="AVIF qualities, beside clean.")] = (90, 80, 70, 60, 50),
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    network = loading.load(weights.read_bytes(), name=weights.stem)
    pictures = find_photographs(folder)
    qualities: list[int | None] = [None, *quality]
    gains: dict[int | None, list[Gain]] = {step: [] for step in qualities}
    for path in track(pictures, "measuring", transient=True):
        full = read_rgb(path)
        for step in qualities:
            gains[step].append(measure(network, full, step))
    table = Table(
        "AVIF quality", "bicubic", "network", "gain", title=f"{network.spec.name}, {len(pictures)} pictures, dB"
    )
    for step in qualities:
        bicubic = float(np.mean([gain.bicubic for gain in gains[step]]))
        enlarged = float(np.mean([gain.network for gain in gains[step]]))
        name = "clean" if step is None else str(step)
        table.add_row(name, f"{bicubic:.2f}", f"{enlarged:.2f}", f"{enlarged - bicubic:+.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
