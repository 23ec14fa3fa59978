"""A picture through a network in tiles is, bit for bit, the picture through the network at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from esrfs.engine import tiles
from esrfs.engine.lanes import Cancelled, Crossing, Running
from esrfs.engine.protocol import Lane
from esrfs.engine.room import Turns
from esrfs.engine.tiles import Crew
from esrfs.networks import architectures, loading
from esrfs.networks.loading import Network
from esrfs.networks.spec import NetworkSpec

SHARED = Path(__file__).parent.parent.parent / "shared"


def picture(height: int, width: int, seed: int = 1) -> tiles.Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def network(architecture: str, arguments: dict[str, int | str]) -> Network:
    torch.manual_seed(7)
    model = architectures.build(architecture, arguments)  # type: ignore[arg-type]
    description = NetworkSpec(
        name="test",
        architecture=architecture,  # type: ignore[arg-type]
        arguments=arguments,
        scale=model.scale,
        margin=model.margin,
        multiple=model.multiple,
    )
    return Network(description, model, torch.device("cpu"))


NETWORKS: list[tuple[str, dict[str, int | str]]] = [
    ("SRVGGNetCompact", {"num_feat": 8, "num_conv": 3, "upscale": scale, "act_type": "relu"}) for scale in (1, 2, 3, 4)
] + [("RRDBNet", {"num_feat": 16, "num_block": 1, "num_grow_ch": 16, "scale": scale}) for scale in (1, 2, 4)]


@pytest.mark.parametrize(("architecture", "arguments"), NETWORKS)
@pytest.mark.parametrize("shape", [(1, 1), (67, 130), (64, 96), (131, 5)])
def test_tiled_is_whole(architecture: str, arguments: dict[str, int | str], shape: tuple[int, int]) -> None:
    net = network(architecture, arguments)
    pixels = picture(*shape)
    whole = net(pixels[None])[0]
    assert whole.shape == (shape[0] * net.scale, shape[1] * net.scale, 3)
    assert np.array_equal(tiles.enlarge(net, pixels, size=32), whole)


@pytest.mark.parametrize("name", ["realesr-general-x4v3", "realesr-animevideov3"])
def test_tiled_is_whole_with_official_weights(name: str) -> None:
    found = sorted((SHARED / "weights").glob(f"{name}*"))
    if not found:
        pytest.skip(f"no {name} in ../shared/weights")
    net = loading.load(found[0].read_bytes(), name=name)
    pixels = picture(150, 171)
    assert np.array_equal(tiles.enlarge(net, pixels, size=64), net(pixels[None])[0])


def test_layout_covers_all_once() -> None:
    for height, width, margin, multiple in [(1, 1, 6, 1), (257, 1025, 6, 1), (999, 301, 10, 4), (256, 256, 0, 2)]:
        seen = np.zeros((height, width), dtype=int)
        for tile in tiles.lay_out(height, width, margin, multiple):
            seen[tile.top : tile.bottom, tile.left : tile.right] += 1
            assert tile.bottom - tile.top <= tiles.TILE + multiple
            assert tile.outer_top % multiple == tile.outer_left % multiple == 0
            assert tile.outer_top == max(0, tile.outer_top)
            assert tile.outer_bottom <= height
        assert (seen == 1).all()


def test_rejects_other_shapes() -> None:
    with pytest.raises(ValueError, match="H×W×3"):
        tiles.enlarge(network(*NETWORKS[0]), np.zeros((4, 4, 1), dtype=np.uint8))


def test_crew_gives_the_same_and_stops_on_errors() -> None:
    crew, crossing = Crew(2), Crossing()
    net = network(*NETWORKS[1])
    pixels = picture(200, 133)
    for lane in Lane:
        job = crossing.enter(1, lane)
        result = tiles.enlarge(net, pixels, lambda tasks, job=job: crew.spread(job, tasks), size=32)  # type: ignore[misc]
        assert np.array_equal(result, net(pixels[None])[0])
        job.leave()
    job = crossing.enter(2, Lane.INTERACTIVE)

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crew.spread(job, [broken] * 10)
    crossing.cancel(2)
    with pytest.raises(Cancelled):
        crew.spread(job, [lambda: None] * 10)
    crew.spread(crossing.enter(3, Lane.READ_AHEAD), [])


def test_crew_lets_a_reader_overtake() -> None:
    crew, crossing = Crew(1), Crossing()
    order: list[str] = []
    compaction, reader = crossing.enter(1, Lane.COMPACTION), None

    def slow(name: str) -> None:
        order.append(name)
        time.sleep(0.02)

    background = threading.Thread(target=crew.spread, args=(compaction, [lambda: slow("c")] * 10))
    background.start()
    while not order:
        time.sleep(0.001)
    reader = crossing.enter(2, Lane.INTERACTIVE)
    crew.spread(reader, [lambda: slow("r")] * 5)
    reader.leave()
    background.join()
    assert order.count("c") == 10
    first = order.index("r")
    assert order[first : first + 5].count("r") >= 4  # at most one tile of compaction was already running


@pytest.mark.parametrize("turned", [False, True], ids=["compaction", "turned compaction on the way"])
def test_a_reader_does_not_wait_for_the_turn_of_a_compaction_that_waits_for_readers(turned: bool) -> None:
    """A carried blob of more than 16 MP is rebuilt, memory is short, and somebody reads another large picture: neither
    went on until the reader gave up."""
    crew, crossing, turns = Crew(2), Crossing(), Turns(lambda: 1e9)
    done: list[str] = []

    def rebuild(job: Running, count: int, name: str) -> None:
        with turns.taking(720e6, job):
            crew.spread(job, [lambda: time.sleep(0.05)] * count)
        job.leave()
        done.append(name)

    carried = crossing.enter(1, Lane.READ_AHEAD if turned else Lane.COMPACTION)
    threads = [threading.Thread(target=rebuild, args=(carried, 40, "carried blob"), daemon=True)]
    threads[0].start()
    time.sleep(0.2)
    threads.append(threading.Thread(target=rebuild, args=(crossing.enter(2, Lane.INTERACTIVE), 4, "read"), daemon=True))
    threads[1].start()
    time.sleep(0.2)
    crossing.set_lane(1, Lane.COMPACTION)
    for thread in reversed(threads):
        thread.join(10)
    assert done == ["read", "carried blob"]


def test_a_job_that_changes_to_compaction_or_back_goes_on() -> None:
    """Its tiles are then the other threads' work, who may be asleep."""
    crew, crossing = Crew(1), Crossing()
    job = crossing.enter(1, Lane.COMPACTION)
    lanes = iter([Lane.INTERACTIVE, Lane.COMPACTION, Lane.READ_AHEAD])
    spreading = threading.Thread(
        target=crew.spread, args=(job, [lambda: crossing.set_lane(1, next(lanes, Lane.COMPACTION))] * 8), daemon=True
    )
    spreading.start()
    spreading.join(10)
    assert not spreading.is_alive()
