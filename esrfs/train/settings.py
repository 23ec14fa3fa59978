"""What decides how a training turns out: a TOML file, read and checked here and nowhere else.

The files of the shipped networks lie in ``weights/training``; docs/training.md explains them to people. Together with
the photographs, the device and the number of threads, a file decides every number that a training writes.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec
import torch

from esrfs.metrics.colour import BLOCK
from esrfs.networks import architectures, registry
from esrfs.networks.spec import Architecture


class TrainingError(ValueError):
    """For people: which setting, file or folder, what is wrong with it, what to do."""


class StoreDegradation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="store"):
    """What a store does to a picture: Pillow's bicubic reduction, then AVIF as compaction encodes it."""

    versions: int = 3
    """AVIF versions of each photograph, beside the clean one: n / (n + 1) of the patches are coded."""
    levels: tuple[int, int] = (24, 58)
    """The planner's levels of quality, drawn evenly from this range, both ends included."""
    enlarged: float = 1.0
    """Photographs are made so much larger before all else (bicubic): files from cameras hold less detail in each pixel
    than pictures that somebody has made smaller."""
    shrinker: str = ""
    """A shrinker, by name or file, that coded versions go through first, as compaction's do; empty: none."""


class RealEsrganDegradation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="real-esrgan"):
    """Unknown damage, drawn anew for each patch: blur, resizing, noise and JPEG, twice (arXiv 2107.10833)."""

    second_order: bool = True
    """All of it twice, as in Real-ESRGAN; once is the older practice."""


Degradation = StoreDegradation | RealEsrganDegradation


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of a training: its own losses, optimizer and learning rate; it begins where the one before ended."""

    name: str
    """Of the network that this stage exports; stages of one name replace each other's."""
    steps: int
    batch: int = 16
    patch: int = 48
    """Edge of a patch of the small picture, pixels."""
    learning_rate: float = 1e-3
    """Peak: reached after ``warm_up`` steps, then falling to 0 along half a cosine."""
    warm_up: int = 100
    average: float = 0.999
    """Decay of the moving average of weights; it starts lower, so that early exports aren't the first weights."""

    l1: float = 1.0
    """Weight of the mean absolute difference, of values in 0 to 1."""
    ssimulacra2: float = 0.0
    """Weight of (100 - SSIMULACRA2) / 100; patches must be at least 64 pixels wide when enlarged, better 128."""
    colour: float = 0.0
    """Weight of the colour error of blocks of 16 pixels (CIE94; 1 is about just noticeable). SSIMULACRA2 lets them
    drift, and the gate bounds them."""
    rate: float = 0.0
    """For a shrinker, which learns by this and ``ssimulacra2`` (there the logarithm of what is missing to 100) alone:
    weight of the bits against those of the picture as it was reduced."""
    features: float = 0.0
    """Weight of the perceptual loss."""
    adversarial: float = 0.0
    """Weight of the generator's part in the game; 0: no discriminator."""
    discriminator: Literal["unet", "vgg"] = "unet"
    """Real-ESRGAN's, which judges each pixel, or ESRGAN's, which judges patches (128 pixels wide when enlarged)."""
    discriminator_width: int = 64
    discriminator_sees: Literal["colour", "gray"] = "colour"
    """``gray``: the mean of red, green and blue, so that brightness gets texture and colour follows the photograph.
    Small networks that are judged in colour make patterns of green and magenta pixels."""


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    architecture: Architecture
    arguments: dict[str, int | str]
    """What the architecture's constructor takes."""
    degradation: Degradation
    stages: list[Stage]
    enlarger: str = ""
    """For a shrinker: the network that will enlarge what it makes, by name or file."""
    start: str = ""
    """A network whose weights to begin with, by name or file; empty: random ones. An SRVGGNetCompact may be a smaller
    one: it grows, and gives the same pictures at first."""
    stored: Literal["fp32", "fp16"] = "fp32"
    """How exported weights are kept; networks always run in fp32."""
    licence: str = "Apache-2.0"
    data: str = ""
    """What the photographs are and under which licence: for the model card."""
    seed: int = 0
    validation: int = 6
    """Photographs that are kept out of the training, to measure it."""
    validate_every: int = 1000
    save_every: int = 500
    log_every: int = 50
    precision: Literal["mixed", "full"] = "mixed"
    """``mixed``: bfloat16 where the device is a GPU that has it. A CPU always works in full precision."""

    @property
    def scale(self) -> int:
        name = {"SRVGGNetCompact": "upscale", "RRDBNet": "scale", "Shrinker": "reduction"}[self.architecture]
        return int(self.arguments.get(name, 2 if self.architecture == "Shrinker" else 4))


def file_or_name(text: str) -> Path:
    """The file called ``text``; without a suffix, that of the shipped network called so. Raises TrainingError when
    there is no such network."""
    path = Path(text)
    if path.suffix:
        return path
    shipped = sorted((registry.shipped_directory() / "training").glob("*.toml"))
    found = next((each for each in shipped if each.stem == text), None)
    if found is None:
        names = ", ".join(each.stem for each in shipped)
        raise TrainingError(f"there are no settings called {text!r}: name a TOML file, or one of {names}")
    return found


def read(path: Path) -> Training:
    """Raises TrainingError when the file is missing, is no TOML, or asks for what can't be."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is no TOML file (it is not in UTF-8)") from error
    return parse(text, str(path))


def parse(text: str, source: str = "the settings") -> Training:
    """Raises TrainingError."""
    try:
        training = msgspec.convert(tomllib.loads(text), Training)
        check(training)
    except ValueError as error:  # of TOML, of msgspec, and ours
        raise TrainingError(f"{source}: {error}") from error
    return training


def check(training: Training) -> None:
    """Raises TrainingError when the parts contradict each other."""
    with torch.device("meta"):
        architectures.build(training.architecture, training.arguments)  # raises ValueError
    scale = training.scale
    if scale not in {1, 2, 3, 4}:
        raise TrainingError(f"the scale must be 1, 2, 3 or 4, not {scale}")
    if not training.stages:
        raise TrainingError("there is no stage")
    if training.validation < 0 or min(training.validate_every, training.save_every, training.log_every) <= 0:
        raise TrainingError("validation can't be negative; validate_every, save_every and log_every must be positive")
    for stage in training.stages:
        if not registry.is_name(stage.name):
            raise TrainingError(f"{stage.name!r} can't name a network: use letters, digits, dot, dash and underscore")
        edge = stage.patch * scale
        if min(stage.steps, stage.batch, stage.patch, stage.average, stage.learning_rate) <= 0:
            raise TrainingError(f"stage {stage.name}: steps, batch, patch, average and learning rate must be positive")
        if min(stage.warm_up, stage.discriminator_width - 1) < 0:
            raise TrainingError(f"stage {stage.name}: warm_up can't be negative, nor the discriminator's width below 1")
        if stage.average >= 1:
            raise TrainingError(f"stage {stage.name}: an average of {stage.average:g} would never learn; below 1")
        if stage.ssimulacra2 and edge < 64:
            raise TrainingError(f"stage {stage.name}: SSIMULACRA2 needs patches of 64 pixels or more, not {edge}")
        if stage.colour and edge < BLOCK:
            raise TrainingError(f"stage {stage.name}: colour needs patches of {BLOCK} pixels or more, not {edge}")
        if stage.features and edge < 32:
            raise TrainingError(f"stage {stage.name}: features need patches of 32 pixels or more, not {edge}")
        if stage.adversarial and stage.discriminator == "vgg" and edge != 128:
            raise TrainingError(f"stage {stage.name}: the vgg discriminator judges 128 pixels, not {edge}")
        if stage.adversarial and edge % 8:
            raise TrainingError(f"stage {stage.name}: patches of {edge} pixels are no multiple of 8")
        if training.architecture == "Shrinker":
            if (
                stage.l1
                or stage.colour
                or stage.features
                or stage.adversarial
                or not (stage.rate and stage.ssimulacra2)
            ):
                raise TrainingError(f"stage {stage.name}: a shrinker learns by rate and ssimulacra2, and nothing else")
            if stage.patch % 8:
                raise TrainingError(f"stage {stage.name}: a shrinker's patches must be a multiple of 8 pixels wide")
        elif stage.rate:
            raise TrainingError(f"stage {stage.name}: only a shrinker can learn by rate")
        if not (stage.l1 or stage.ssimulacra2 or stage.features):
            raise TrainingError(f"stage {stage.name} has no loss that ties the picture to the photograph")
    if training.architecture == "Shrinker":
        if not training.enlarger:
            raise TrainingError("a shrinker is made for a network: say which (enlarger)")
        if not isinstance(training.degradation, StoreDegradation) or not training.degradation.versions:
            raise TrainingError("a shrinker learns from the store's own degradation, with one coded version or more")
    elif training.enlarger:
        raise TrainingError("only a shrinker has an enlarger")
    if isinstance(training.degradation, StoreDegradation):
        low, high = training.degradation.levels
        if training.architecture == "Shrinker" and training.degradation.shrinker:
            raise TrainingError("a shrinker learns from pictures that no shrinker has changed")
        if not 0 <= low <= high <= 63 or training.degradation.versions < 0:
            raise TrainingError("levels go from 0 to 63, and versions can't be negative")
        if not 1 <= training.degradation.enlarged <= 4:
            raise TrainingError("photographs can be enlarged by 1 to 4")
