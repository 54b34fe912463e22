"""Bytes by kind and link, against counting message by message over all ranks of whole machines.

That they are those of real steps is tested with the byte log (tests/test_benchmarks.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import pytest

from aeris.config import RunConfig
from aeris.model.swin import edge
from aeris.parallelize import window_grid
from aeris.planning.traffic import (
    KINDS,
    microbatches,
    traffic,
    unit_shapes,
    units_of_stage,
    weight_bytes,
)
from aeris.presets import PRESETS
from swipe.mesh import ParallelDims
from swipe.shift import shift_plan

CHANNELS = 24


def small(**train: int) -> RunConfig:
    """Tiny in bf16 with 8 heads, so that sp 8 is possible; 8 microbatches of one image."""
    tiny = PRESETS["tiny"]()
    model = replace(tiny.model, heads=8, precision="bf16", residual="bf16", layers=6)
    return replace(tiny, model=model, train=replace(tiny.train, **({"batch": 8, "microbatch": 1} | train)))


class Sent(NamedTuple):
    """A message."""

    kind: str
    sender: int
    receiver: int
    size: int


def messages(config: RunConfig, dims: ParallelDims) -> list[Sent]:
    """List every message of tokens of a step, rank by rank: what swipe posts."""
    model, grid, found = config.model, window_grid(config.model), []
    count = microbatches(config, dims)
    message = config.train.microbatch * model.rows * model.cols // dims.places * model.width * 2
    for rank in range(dims.world):
        at, place = dims.coordinate(rank), dims.place(rank)
        units = units_of_stage(config, CHANNELS, dims, at.pp)
        blocks = sum(0 < unit <= model.layers for unit in units) * model.blocks
        for peer in dims.along(rank, "sp"):
            if peer != rank:
                found.append(Sent("all-to-all", rank, peer, count * blocks * 8 * message // dims.sp))
        edges = [(at.pp, edge(u, model.layers), "shift") for u in units[1:] if edge(u, model.layers)]
        edges += [(at.pp, -sign, kind) for _, sign, kind in edges]  # the way back of the gradient
        edges += [(at.pp + 1, edge(units.stop, model.layers), "pipeline")]
        edges += [(at.pp - 1, -edge(units.start, model.layers), "pipeline")]
        for stage, sign, kind in edges:
            if 0 <= stage < dims.pp:
                plan = shift_plan(grid, (dims.wp_y, dims.wp_x), dims.sp, place, sign)
                whole = sum(len(part.pieces) for part in plan.sends)
                for part in plan.sends:
                    peer = dims.rank_at(at.dp, stage, part.place)
                    size = count * message * len(part.pieces) // whole
                    found += [Sent(kind, rank, peer, size)] if peer != rank else []
    return found


@pytest.mark.parametrize(
    "dims",
    [
        ParallelDims(wp_y=2, wp_x=2, pp=2, sp=2),
        ParallelDims(dp=2, wp_x=4, pp=3),
        ParallelDims(pp=4, sp=8),
        ParallelDims(wp_y=2, wp_x=2, sp=4),
        ParallelDims(dp=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("devices_per_node", [3, 4, 8])
def test_tokens_are_counted_as_they_are_sent(dims: ParallelDims, devices_per_node: int) -> None:
    config = small()
    inside, between = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    for kind, sender, receiver, size in messages(config, dims):
        near = sender // devices_per_node == receiver // devices_per_node
        (inside if near else between)[sender, kind] += size
    for rank in range(dims.world):
        found = traffic(config, CHANNELS, dims, rank, devices_per_node)
        for kind in ("all-to-all", "shift", "pipeline"):
            assert (found.inside[kind], found.between[kind]) == (inside[rank, kind], between[rank, kind]), (
                kind
            )
        reads = dims.coordinate(rank).sp == 0 and dims.coordinate(rank).pp in (0, dims.pp - 1)
        assert bool(found.total["samples"]) == (reads and dims.sp > 1)


def test_weights_and_gradients() -> None:
    """Padded to the shards; products gathered in bf16; a ring leaves a node once, its ranks take turns."""
    config, dims = small(), ParallelDims(dp=2, wp_x=4, pp=2)
    found = traffic(config, CHANNELS, dims, 0, 8)
    units = units_of_stage(config, CHANNELS, dims, 0)
    reduced, gathered = (weight_bytes(config, CHANNELS, units, 8, way) for way in (False, True))
    assert gathered < reduced < weight_bytes(config, CHANNELS, units, 7 * 128)
    assert found.total["gradients"] == reduced * 7 // 8 and found.total["weights"] == gathered * 7 // 8
    # Ranks 0-7 are a node: dp 0, four of each stage.
    assert found.between["gradients"] == found.total["gradients"] // 4
    assert traffic(config, CHANNELS, dims, 0, 16).between["gradients"] == 0
    shard = replace(config, parallel=replace(config.parallel, shard=4))
    halves = traffic(shard, CHANNELS, dims, 0, 8)
    whole = weight_bytes(config, CHANNELS, units, 4)
    assert halves.inside["gradients"] == whole * 3 // 4 and halves.between["gradients"] == 2 * whole // 4 // 2
    assert traffic(config, CHANNELS, ParallelDims(pp=2), 0, 8).total["weights"] == 0


def test_recomputed_blocks_exchange_again() -> None:
    config, dims = small(), ParallelDims(sp=4)
    again = replace(config, model=replace(config.model, checkpointing="block"))
    one, two = (traffic(run, CHANNELS, dims, 0, 4).total for run in (config, again))
    assert two["all-to-all"] * 2 == one["all-to-all"] * 3
    assert all(one[kind] == two[kind] for kind in KINDS if kind != "all-to-all")


def test_40b_on_10080_nodes_is_planned_at_once() -> None:
    """The published layout: all-to-alls stay in the node, messages between stages and shifts leave it."""
    config, dims = PRESETS["40b"](), ParallelDims(14, 6, 6, 20, 12)
    for rank in (0, 12 * 7 + 5, dims.world - 13):
        found = traffic(config, 69, dims, rank, 12)
        assert found.between["all-to-all"] == found.inside["pipeline"] == found.total["shift"] == 0
    stage = units_of_stage(config, 69, dims, 1)
    assert found.total["pipeline"] == 2 * 100 * 2400 * 6144 * 2  # two ways, microbatches, tokens, width, bf16
    assert weight_bytes(config, 69, stage) == 4 * sum(
        rows * (rest[0] if rest else 1) for rows, *rest in unit_shapes(config.model, 69, "layer")
    )
    with pytest.raises(ValueError, match="no rank"):
        traffic(config, 69, dims, dims.world, 12)
