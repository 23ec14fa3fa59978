"""Refinement as compaction uses it: fewer bytes for the same promise, never more; a policy, a time limit, an end."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esrfs.compaction import compactor, refine
from esrfs.compaction.compactor import NetworkRef
from esrfs.compaction.outcome import Outcome, Policy, Verdict, stored_bytes
from esrfs.engine import handler as handler_module
from esrfs.engine import protocol, tiles
from esrfs.engine.idleness import Watch
from esrfs.engine.lanes import Cancelled, Crossing
from esrfs.engine.protocol import Lane
from esrfs.networks import loading, registry
from tests.conftest import photograph

Pixels = refine.Pixels


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other: with anything else running, two are ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def network() -> tuple[NetworkRef, loading.Network]:
    data = registry.find("lite-x2").read_bytes()
    loaded = loading.load(data)
    return NetworkRef("lite-x2", hashlib.sha256(data).digest(), loaded.scale), loaded


def original(size: int = 256) -> bytes:
    out = io.BytesIO()
    photograph("coffee").crop((300, 100, 300 + size, 100 + size)).save(out, "PNG")
    return out.getvalue()


def infer(sha256: bytes, pixels: Pixels) -> Pixels:
    return tiles.enlarge(network()[1], pixels)


def refined(_: bytes, full: Pixels, small: Pixels, noise: float, seconds: float) -> refine.Refined:
    loaded = network()[1]
    return refine.refine(
        full, small, loaded.differentiable, scale=2, margin=loaded.margin, noise=noise, seconds=seconds, steps=8
    )


def compact(how: compactor.Refine | None) -> Outcome:
    outcome = compactor.compact(original(), Policy(preset="small"), [network()[0]], infer, refine=how)
    assert outcome.verdict is Verdict.COMPACTED
    return outcome


@functools.cache
def plain() -> Outcome:
    return compact(None)


def ruined(_: bytes, full: Pixels, small: Pixels, *rest: float) -> refine.Refined:
    noise = np.random.default_rng(0).integers(0, 60, small.shape)
    return refine.Refined((small // 2 + noise).astype(np.uint8), 1.0)


def stored(outcome: Outcome) -> int:
    return stored_bytes(outcome.avif, outcome.recipe)


def test_a_refined_picture_takes_fewer_bytes_for_the_same_promise() -> None:
    fitted = compact(refined)
    assert stored(fitted) < stored(plain())
    assert fitted.score is not None and fitted.score >= 50


def test_what_is_larger_or_was_not_reached_is_not_kept() -> None:
    assert compact(ruined) == plain()
    assert compact(lambda *_: None) == plain()


def test_where_memory_is_short_nothing_is_refined() -> None:
    def never(*_: object) -> refine.Refined:
        raise AssertionError("it would take more than there is")

    policy = Policy(preset="small")
    found = compactor.compact(original(), policy, [network()[0]], infer, room=1e9, refine=never)
    assert found == plain()


def test_a_large_picture_is_judged_by_its_mosaic_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compactor.mosaic, "mosaic", np.copy)
    given: list[float] = []

    def note(sha256: bytes, full: Pixels, small: Pixels, noise: float, seconds: float) -> refine.Refined:
        given.append(seconds)
        return refined(sha256, full, small, noise, 1e6)

    assert stored(compact(note)) < stored(compact(None))
    assert len(given) == 2
    assert given[0] < given[1] < Policy().refinement_seconds
    given.clear()

    def useless(*asked: object) -> refine.Refined:
        given.append(0)
        return ruined(*asked)  # type: ignore[arg-type]

    compact(useless)
    assert len(given) == 1, "no time is spent on the whole"


def ask(refinement: str, monkeypatch: pytest.MonkeyPatch, *, idle: bool = True) -> list[float]:
    """The seconds that refinement was given by the engine's handler, if it was asked at all."""
    given: list[float] = []

    def note(full: Pixels, small: Pixels, enlarge: refine.Enlarge, **named: object) -> refine.Refined:
        seconds = named["seconds"]
        assert isinstance(seconds, float)
        given.append(seconds)
        return refine.Refined(small, 0.0)

    monkeypatch.setattr(refine, "refine", note)
    monkeypatch.setattr(Watch, "was_idle", lambda self: idle)
    handler = handler_module.open_handler("cpu", lambda _: registry.find("lite-x2").read_bytes())
    policy = Policy(preset="small", refinement=refinement, refinement_seconds=7.0)
    request = protocol.Compact(job=0, policy=policy, networks={"lite-x2": network()[0].sha256})
    outcome = handler.compact(request, original(128), Crossing().enter(0, Lane.COMPACTION))
    assert outcome.verdict is Verdict.COMPACTED
    return given


def test_the_policy_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("off", monkeypatch) == []
    assert ask("idle", monkeypatch, idle=False) == []
    assert ask("idle", monkeypatch) == [7.0]
    assert ask("always", monkeypatch, idle=False) == [7.0]


def test_it_ends_when_nobody_waits_any_more() -> None:
    """At a step of a tile, not after the last."""
    crossing = Crossing()
    job = crossing.enter(3, Lane.COMPACTION)
    loaded = network()[1]
    steps = [0]

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 2:
            crossing.cancel(3)
        return loaded.differentiable(x)

    small = np.asarray(Image.open(io.BytesIO(original(128))).resize((64, 64)))
    full = np.asarray(Image.open(io.BytesIO(original(128))))
    with pytest.raises(Cancelled):
        refine.refine(
            full, small, enlarge, scale=2, margin=loaded.margin, noise=4.0,
            spread=functools.partial(tiles.Crew(1).spread, job), checkpoint=job.checkpoint,
        )  # fmt: skip
    assert steps[0] == 2


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "TILE", 40)
    full = np.asarray(Image.open(io.BytesIO(original(160))))
    small = np.asarray(Image.fromarray(full).resize((80, 80), Image.Resampling.BICUBIC))
    job = Crossing().enter(0, Lane.COMPACTION)
    loaded = network()[1]
    make = functools.partial(
        refine.refine, full, small, loaded.differentiable, scale=2, margin=loaded.margin, noise=4.0, steps=3
    )
    assert np.array_equal(make().small, make(spread=functools.partial(tiles.Crew(2).spread, job)).small)


def test_idle_is_when_others_take_little(tmp_path: Path) -> None:
    stat = tmp_path / "stat"

    def ticks(user: int, nice: int, idle: int) -> None:
        stat.write_text(f"cpu  {user} {nice} 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n")

    ticks(1000, 50, 9000)
    watch = Watch(stat)
    assert not watch.was_idle(), "no time has passed"
    ticks(1010, 140, 9100)
    assert watch.was_idle(), "what runs at low priority, like compaction itself, doesn't count"
    ticks(1100, 150, 9100)
    assert not watch.was_idle()
    assert not Watch(tmp_path / "missing").was_idle()
