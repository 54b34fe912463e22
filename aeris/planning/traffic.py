"""Bytes a rank sends in a training step, by kind and by link: inside its node or between nodes.

Peers come from the plans that the run itself follows: the mesh, the cut into stages and the shift. Only how
weights and gradients travel is the backend's choice; here, as rings over the ranks that share a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from aeris.config import ModelConfig, RunConfig
from aeris.data.forcing import FORCINGS
from aeris.model.swin import DTYPES, edge
from aeris.parallelize import build_model, cut, make_layout, window_grid
from aeris.restore import channel_counts
from swipe.mesh import ParallelDims
from swipe.shift import shift_plan
from swipe.windows import WindowGrid

KINDS = ("all-to-all", "shift", "pipeline", "samples", "weights", "gradients")
"""Ulysses around attention; the half-window shift inside a stage; between stages; from the rank that reads;
weights gathered; gradients reduced."""


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank sends in a step, by `KINDS`, to ranks inside its node and to those between nodes."""

    inside: dict[str, int]
    between: dict[str, int]

    @property
    def total(self) -> dict[str, int]:
        """Both links together, by kind."""
        return {kind: self.inside[kind] + self.between[kind] for kind in KINDS}


def microbatches(config: RunConfig, dims: ParallelDims) -> int:
    """Return the microbatches of a step on one replica."""
    return config.train.batch // (config.train.microbatch * dims.dp)


def tokens_of_rank(config: RunConfig, dims: ParallelDims) -> int:
    """Return the tokens of a microbatch that one rank holds."""
    model = config.model
    return config.train.microbatch * model.rows * model.cols // dims.places


def units_of_stage(config: RunConfig, channels: int, dims: ParallelDims, stage: int) -> range:
    """Return the units of the network on a stage: embedding 0, layers from 1, head last."""
    return _cut(config.model, *channel_counts(channels), dims.pp)[stage]


@cache
def _cut(model: ModelConfig, in_channels: int, out_channels: int, stages: int) -> list[range]:
    return cut(model, in_channels, out_channels, stages)


class Weight(NamedTuple):
    """A parameter of a unit."""

    shape: tuple[int, ...]
    product: bool
    """Of a product with the tokens of a block, used in the type of the products alone."""

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@cache
def unit_weights(model: ModelConfig, channels: int, kind: str) -> tuple[Weight, ...]:
    """List the parameters of an "embedding", "layer" or "head"."""
    unit = {"embedding": 0, "layer": 1, "head": model.layers + 1}[kind]
    small = replace(model, rows=model.window, cols=model.window, compile=False)  # they do not depend on it
    built = build_model(small, *channel_counts(channels), make_layout(small), "meta", range(unit, unit + 1))
    products = {p for modules in built.products() for module in modules for p in module.parameters()}
    return tuple(Weight(tuple(p.shape), p in products) for p in built.parameters())


def unit_shapes(model: ModelConfig, channels: int, kind: str) -> tuple[tuple[int, ...], ...]:
    """List the shapes of the parameters of a unit; see `unit_weights`."""
    return tuple(weight.shape for weight in unit_weights(model, channels, kind))


def kinds_of(model: ModelConfig, units: range) -> list[str]:
    """Name the kind of every unit, as `unit_weights` takes it."""
    return ["embedding" if u == 0 else "head" if u > model.layers else "layer" for u in units]


def weight_bytes(
    config: RunConfig, channels: int, units: range, shares: int = 1, gathered: bool = False
) -> int:
    """Bytes of the weights of some units, filled up to `shares` equal parts, as of their gradients.

    FSDP2 divides the first dimension of every parameter, filled up to a multiple of the shares.

    Args:
        gathered: weights of products in the type of the products, as they are gathered.
    """
    model = config.model
    exact, product = 8 if model.precision == "fp64" else 4, DTYPES[model.precision].itemsize
    found = 0
    for kind in kinds_of(model, units):
        for weight in unit_weights(model, channels, kind):
            rows, *rest = weight.shape
            size = product if gathered and weight.product else exact
            found += -(-rows // shares) * shares * math.prod(rest) * size
    return found


def traffic(
    config: RunConfig, channels: int, dims: ParallelDims, rank: int, devices_per_node: int
) -> Traffic:
    """Count what a rank sends in a step.

    Args:
        channels: of the data.
        dims: degrees of parallelism, which suit the model and the batch (`aeris.parallelize.limits`).
        rank: whose messages; rank // `devices_per_node` is its node.

    Raises:
        ValueError: there is no such rank.
    """
    one, count = (
        microbatch_traffic(config, channels, dims, rank, devices_per_node),
        microbatches(config, dims),
    )
    found = _Counter(rank, devices_per_node)
    for kind in KINDS:
        found.inside[kind], found.between[kind] = count * one.inside[kind], count * one.between[kind]
    _count_weights(found, config, channels, dims)
    return Traffic(found.inside, found.between)


def microbatch_traffic(
    config: RunConfig, channels: int, dims: ParallelDims, rank: int, devices_per_node: int
) -> Traffic:
    """Count what a rank sends for one microbatch, both ways, without weights; arguments as of `traffic`."""
    model, at, place = config.model, dims.coordinate(rank), dims.place(rank)
    grid, units = window_grid(model), units_of_stage(config, channels, dims, at.pp)
    tokens = tokens_of_rank(config, dims)
    message = tokens * model.width * DTYPES[model.residual].itemsize
    found = _Counter(rank, devices_per_node)

    heads = tokens * model.width * DTYPES[model.precision].itemsize  # one of q, k, v and their result
    blocks = sum(0 < unit <= model.layers for unit in units) * model.blocks
    sequence = range(rank - at.sp, rank - at.sp + dims.sp)
    size = blocks * passes(config) * 4 * heads * (dims.sp - 1) // dims.sp
    found.spread("all-to-all", size, sequence)

    for unit in units[1:]:
        for sign in (1, -1) if edge(unit, model.layers) else ():  # forward and back again
            for there, share in destinations(grid, dims, place, sign):
                if there != place:
                    found.add("shift", int(message * share), dims.rank_at(at.dp, at.pp, there))
    before, after = edge(units.start, model.layers), edge(units.stop, model.layers)
    for stage, sign in ((at.pp + 1, after), (at.pp - 1, -before)):
        if stage in range(dims.pp):
            for there, share in destinations(grid, dims, place, sign):
                found.add("pipeline", int(message * share), dims.rank_at(at.dp, stage, there))

    if at.sp == 0 and at.pp in (0, dims.pp - 1):
        fields = 2 * channels + len(FORCINGS)
        found.spread("samples", tokens * (dims.sp - 1) * fields * 4, sequence)
    return Traffic(found.inside, found.between)


def passes(config: RunConfig) -> int:
    """Count how often a microbatch goes through a block: forward, backward, perhaps forward again."""
    return 2 + (config.model.checkpointing == "block")


def destinations(
    grid: WindowGrid, dims: ParallelDims, place: int, sign: int
) -> tuple[tuple[int, float], ...]:
    """Say to which places, and which shares of it, a rank's tokens go in a shift; see `swipe.shift`."""
    return _destinations(grid, (dims.wp_y, dims.wp_x), dims.sp, place, sign)


@cache
def _destinations(
    grid: WindowGrid, wp: tuple[int, int], sp: int, place: int, sign: int
) -> tuple[tuple[int, float], ...]:
    parts = shift_plan(grid, wp, sp, place, sign).sends
    pieces = sum(len(part.pieces) for part in parts)
    return tuple((part.place, len(part.pieces) / pieces) for part in parts)


class _Counter:
    """Adds up what one rank sends, by kind and link."""

    def __init__(self, rank: int, devices_per_node: int) -> None:
        self.rank, first = rank, rank // devices_per_node * devices_per_node
        self.node = range(first, first + devices_per_node)
        self.inside, self.between = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)

    def add(self, kind: str, size: int, peer: int) -> None:
        """Count a message to one rank."""
        (self.inside if peer in self.node else self.between)[kind] += size

    def spread(self, kind: str, size: int, group: range) -> None:
        """Count messages of equal size, `size` in all, to the others of a group."""
        near = sum(peer in self.node for peer in group if peer != self.rank)
        inside = size * near // max(1, len(group) - 1)
        self.inside[kind] += inside
        self.between[kind] += size - inside

    def ring(self, kind: str, size: int, ranks: int, near: int) -> None:
        """Count a ring of `ranks`, `near` of them in this node: one of its links leaves it, in turns."""
        between = size // near if near < ranks else 0
        self.inside[kind] += size - between
        self.between[kind] += between


def _count_weights(found: _Counter, config: RunConfig, channels: int, dims: ParallelDims) -> None:
    """Count what FSDP2 gathers and reduces, and over replicas of the shards all-reduces."""
    here, ranks = dims.coordinate(found.rank), dims.dp * dims.places
    shares = config.parallel.shard or ranks
    near = [rank for rank in found.node if rank < dims.world and dims.coordinate(rank).pp == here.pp]
    numbers = {rank: dims.coordinate(rank).dp * dims.places + dims.place(rank) for rank in near}
    own = numbers[found.rank]
    units = units_of_stage(config, channels, dims, here.pp)
    size = {
        kind: weight_bytes(config, channels, units, shares, gathered)
        for kind, gathered in (("weights", True), ("gradients", False))
    }
    shards = sum(number // shares == own // shares for number in numbers.values())
    for kind, whole in size.items():
        found.ring(kind, whole * (shares - 1) // shares, shares, shards)
    replicas = ranks // shares
    copies = sum(number % shares == own % shares for number in numbers.values())
    found.ring("gradients", 2 * (size["gradients"] // shares) * (replicas - 1) // replicas, replicas, copies)
