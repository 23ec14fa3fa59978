"""Which trials answer what was asked: every picture × codec × scale × kernel × quality, each grown in every way."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import esrfs
from esrfs.compaction.outcome import PRESETS
from esrfs.evaluate import codecs
from esrfs.evaluate.measures import MEASURES
from esrfs.evaluate.trial import ESRFS, GROWS, SHRINKS, Picture, Trial
from esrfs.networks import loading, registry

SCALES = (1, 2, 3, 4)
_QUICK = slice(0, None, 2)
"""Of a codec's qualities, for a coarse grid: every other one."""


class ChoiceError(Exception):
    """For people: which choice can't be had, and what there is."""


@dataclass(frozen=True)
class Choice:
    """What is to be compared."""

    codecs: tuple[str, ...] = (*codecs.NAMES, ESRFS)
    qualities: tuple[int, ...] = ()
    """Empty: each codec's own."""
    scales: tuple[int, ...] = SCALES
    shrinks: tuple[str, ...] = tuple(SHRINKS)
    grows: tuple[str, ...] = tuple(GROWS)
    networks: tuple[str, ...] | None = None
    """None: all that are here and were trained for fidelity."""
    presets: tuple[str, ...] = tuple(PRESETS)
    measures: tuple[str, ...] = tuple(MEASURES)
    anchor: str = ""
    """The codec that others are compared with, at full size; empty: AVIF, or what there is."""
    quick: bool = False
    """Every other quality, and one way to shrink: the first."""
    store_network: str = "lite-x2"
    """Of esrfs."""
    may_lack: frozenset[str] = field(default=frozenset({"jxl"}))
    """Codecs that are left out where they are missing, rather than an error."""


@dataclass(frozen=True)
class _Network:
    name: str
    scale: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    trials: list[Trial]
    left_out: list[str]
    """What of the choice can't be had here, and why; for people."""


def plan(pictures: Sequence[Picture], choice: Choice) -> Plan:
    """The trials, picture by picture, in a fixed order. Raises ChoiceError, WeightsError."""
    _check("codec", choice.codecs, (*codecs.NAMES, ESRFS))
    _check("way to shrink", choice.shrinks, SHRINKS)
    _check("way to grow", choice.grows, GROWS)
    _check("preset", choice.presets, PRESETS)
    _check("measure", choice.measures, MEASURES)
    _check("scale", choice.scales, SCALES)
    if bad := [quality for quality in choice.qualities if not 1 <= quality <= 100]:
        raise ChoiceError(f"qualities are 1 to 100, not {bad[0]}")
    if not choice.scales:
        raise ChoiceError(f"there is no scale to try; give some of {', '.join(map(str, SCALES))} (1: at full size)")
    # The store's own network is another matter.
    networks, left_out = _networks_of(choice) if set(choice.codecs) - {ESRFS} else ([], [])
    usable = []
    for name in choice.codecs:
        if name == ESRFS:
            continue
        try:
            usable.append(codecs.load(name))
        except codecs.CodecMissingError as error:
            if name not in choice.may_lack:
                raise ChoiceError(str(error)) from error
            left_out.append(str(error))
    if choice.anchor and (1 not in choice.scales or choice.anchor not in [codec.name for codec in usable]):
        there = ", ".join(codec.name for codec in usable)
        raise ChoiceError(
            f"nothing can be compared with {choice.anchor!r}: it must be one of the codecs that are tried ({there}), "
            "and 1 one of the scales"
        )
    store_network = _network(choice.store_network) if ESRFS in choice.codecs else None
    trials = []
    for picture in pictures:
        for codec in usable:
            for scale in choice.scales:
                grows = _grows(choice, networks, scale, codec.settings)
                for shrink in _shrinks(choice, scale) if grows else ():
                    trials += [
                        Trial(picture, codec.name, scale, shrink, str(quality), grows, choice.measures)
                        for quality in _qualities(choice, codec, scale)
                    ]
        if store_network is not None:
            # With its shrinker, on which the bytes depend, too.
            files = registry.family(store_network.name)
            made_by = f"esrfs {own_version()}, " + ", ".join(
                f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in files.items()
            )
            grows = ((store_network.name, made_by),)
            trials += [Trial(picture, ESRFS, 0, "", preset, grows, choice.measures) for preset in choice.presets]
    return Plan(trials, left_out)


@functools.cache
def own_version() -> str:
    """esrfs's, and a digest of the code that compaction's bytes depend on: results of other code don't count."""
    package = Path(esrfs.__file__).parent
    sources = [package / "reconstruction.py", package / "engine" / "tiles.py", package / "evaluate" / "trial.py"]
    for name in ("blob", "compaction", "formats", "metrics", "networks"):
        sources += sorted((package / name).glob("*.py"))
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sources))
    return f"{esrfs.__version__} ({digest.hexdigest()[:12]})"


def _check(what: str, given: Sequence[object], known: Collection[object]) -> None:
    for name in given:
        if name not in known:
            raise ChoiceError(f"there is no {what} {name!r}; there are {', '.join(map(str, known))}")


def _networks_of(choice: Choice) -> tuple[list[_Network], list[str]]:
    """(those to try; what is left out, and why). Raises WeightsError for one that was named and can't be had."""
    if choice.networks is not None:
        named = [_network(name) for name in choice.networks]
        scales = ", ".join(map(str, choice.scales))
        return named, [
            f"{network.name} is not tried: it enlarges by {network.scale}, and the scales are {scales}"
            for network in named
            if network.scale not in choice.scales
        ]
    found, left_out = [], []
    textured = registry.textured()
    for name in registry.enlargers():
        if name not in textured:
            try:
                found.append(_network(name))
            except registry.WeightsError as error:
                left_out.append(str(error))
        elif textured[name] in choice.scales:
            left_out.append(
                f"{name} is not tried: it is for texture, to be mixed with one for fidelity; --networks can name it"
            )
    return found, left_out


def _network(name: str) -> _Network:
    data = registry.enlarger(name).read_bytes()
    try:
        network = loading.load(data, name=name)
    except ValueError as error:
        raise registry.WeightsError(f"the network {name} can't be used: {error}") from error
    return _Network(name, network.scale, hashlib.sha256(data).hexdigest())


def _qualities(choice: Choice, codec: codecs.Codec, scale: int) -> tuple[int, ...]:
    if choice.qualities:
        return choice.qualities
    own = codec.qualities if scale == 1 else codec.small_qualities
    return own[_QUICK] if choice.quick else own


def _shrinks(choice: Choice, scale: int) -> tuple[str, ...]:
    if scale == 1:
        return ("",)
    return choice.shrinks[:1] if choice.quick else choice.shrinks


def _grows(choice: Choice, networks: Sequence[_Network], scale: int, settings: str) -> tuple[tuple[str, str], ...]:
    """Ways to grow by ``scale``, with what their results are made by."""
    kernels = ("",) if scale == 1 else choice.grows
    grows = [(kernel, settings) for kernel in kernels]
    return (
        *grows,
        *((network.name, f"{settings}, {network.sha256}") for network in networks if network.scale == scale),
    )
