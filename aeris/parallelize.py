"""Wire a model to `swipe`: degrees, layout, stages, weights, pipeline. Only this place knows both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aeris.config import ModelConfig, RunConfig
from aeris.flops import unit_flops
from aeris.model.attention import Layout
from aeris.model.swin import Swin, edge
from swipe.collectives import broadcast
from swipe.groups import Groups, check_shard, make_groups
from swipe.layout import WindowLayout
from swipe.mesh import Coordinate, Limits, ParallelDims
from swipe.pipeline import Microbatch, Pipeline
from swipe.sharding import shard
from swipe.stages import balanced_cut
from swipe.windows import WindowGrid


def window_grid(config: ModelConfig) -> WindowGrid:
    """Return the windows of the model's grid.

    Raises:
        ValueError: the window does not tile the grid; names the nearest sizes that do.
    """
    return WindowGrid(config.rows, config.cols, config.window, row_edge=config.poles)


def limits(config: RunConfig, members: int = 0) -> Limits:
    """Say how far the model and the batch can be spread out; in a forecast the members of the ensemble."""
    grid = window_grid(config.model)
    return Limits(
        windows_y=grid.windows_y,
        windows_x=grid.windows_x,
        window=grid.window,
        heads=config.model.heads,
        units=config.model.layers + 2,
        samples=members or config.train.batch // config.train.microbatch,
        uneven=members > 0,
        prefix="--parallel.",
    )


def choose_degrees(config: RunConfig, world: int, members: int = 0) -> ParallelDims:
    """Take the degrees of parallelism the run asks for, and choose those it leaves open.

    Args:
        members: of the ensemble, in a forecast; 0 in training.

    Raises:
        ValueError: they do not suit the model, the batch or the number of ranks; names the nearest that do.
    """
    axes = ("dp", "wp_y", "wp_x", "pp", "sp")
    fixed = {axis: getattr(config.parallel, axis) for axis in axes}
    try:
        dims = limits(config, members).choose(world, fixed=fixed)
    except ValueError as error:
        microbatch = config.train.microbatch
        if members or microbatch == 1 or "microbatch" not in str(error):
            raise
        raise ValueError(
            f"{error}. With less than --train.microbatch {microbatch} there is more for dp"
        ) from None
    check_shard(dims, config.parallel.shard)
    return dims


def cut(config: ModelConfig, in_channels: int, out_channels: int, stages: int) -> list[range]:
    """Return the units of every stage (`Swin`), balanced by FLOPs."""
    return balanced_cut(unit_flops(config, in_channels, out_channels), stages)


@dataclass(frozen=True)
class Seat:
    """One rank of a run: where it sits on the mesh, what it holds, whom it talks to."""

    dims: ParallelDims
    at: Coordinate
    groups: Groups
    device: torch.device
    layout: WindowLayout
    units: range
    """Units of the network on this rank's stage."""
    shifts: tuple[int, int]
    """Shift on the edges from the stage before and to the stage after."""

    @property
    def first(self) -> bool:
        """Whether this is the first stage."""
        return self.at.pp == 0

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.at.pp == self.dims.pp - 1

    @property
    def lead(self) -> bool:
        """Whether this is the rank that speaks and writes what is written once."""
        return self.groups.rank == 0


def take_seat(
    config: RunConfig, counts: tuple[int, int], dims: ParallelDims, rank: int, device: torch.device
) -> Seat:
    """Make this rank's groups and layout; a collective call over all ranks.

    Args:
        counts: input and output channels of the network.

    Raises:
        ValueError: messages cannot be posted as asked on this device.
    """
    parallel = config.parallel
    groups = make_groups(dims, rank, device, parallel.shard, parallel.p2p, parallel.timeout_s)
    units, layers = cut(config.model, *counts, dims.pp)[dims.coordinate(rank).pp], config.model.layers
    return Seat(
        dims=dims,
        at=dims.coordinate(rank),
        groups=groups,
        device=device,
        layout=make_layout(config.model, groups),
        units=units,
        shifts=(edge(units.start, layers), edge(units.stop, layers)),
    )


def make_layout(config: ModelConfig, groups: Groups | None = None) -> WindowLayout:
    """Lay the grid out in windows over the ranks of `groups`; on this process alone without.

    Raises:
        ValueError: the window does not tile the grid; names the nearest sizes that do.
    """
    return WindowLayout.of(window_grid(config), groups)


def build_model(
    config: ModelConfig,
    in_channels: int,
    out_channels: int,
    layout: Layout,
    device: torch.device | str,
    units: range | None = None,
) -> Swin:
    """Build the network, or the `units` of a stage, uninitialised in fp32 (fp64 in fp64 runs).

    Args:
        device: "meta" for shapes only.
    """
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    with torch.device("meta"):
        model = Swin(config, in_channels, out_channels, layout, units).to(dtype)
    return model if str(device) == "meta" else model.to_empty(device=device)


def share_weights(model: Swin, seat: Seat) -> None:
    """Divide a stage's weights over the ranks that hold it; gradients become means over them."""
    shard(model, model.parts(), seat.groups.weights, model.products(), torch.bfloat16)


def make_pipeline(
    model: Swin, seat: Seat, loss: Callable[[Tensor, Any], Tensor], schedule: str = "1f1b"
) -> Pipeline:
    """Link this rank's stage to its neighbours; a collective call over all ranks.

    The microbatches of a step share one copy of the weights in the type of the products.
    """
    model.keep_casts()
    return Pipeline.linked(model, loss, seat.layout, seat.groups, seat.shifts, schedule, model.drop_casts)


def make_network(model: Swin, seat: Seat, channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Make one function of all stages: F(x [B, N, T, C_in], t [B]) -> [B, N, T, `channels`], on every rank.

    Each rank passes and gets its own tokens, of the same samples on all stages. Several stages work on one
    sample after the other. A collective call over all ranks; those of the function are over wp, sp and pp:
    the output's bytes go from the last stage to each other.
    """
    pipeline = make_pipeline(model, seat, _no_loss)
    dtype = torch.float64 if model.config.precision == "fp64" else torch.float32

    def network(x_BNTC: Tensor, t_B: Tensor) -> Tensor:
        count = 1 if seat.dims.pp == 1 else len(t_B)
        parts = zip(x_BNTC.chunk(count), t_B.chunk(count))
        outputs = pipeline.evaluate((Microbatch(x, (t,)) for x, t in parts), count)
        shape = (*x_BNTC.shape[:-1], channels)
        y_BNTC = torch.cat(outputs) if outputs else torch.empty(shape, dtype=dtype, device=seat.device)
        return broadcast(y_BNTC, seat.groups.chain, seat.dims.pp - 1, "the network's output")

    return network


def _no_loss(y: Tensor, target: Any) -> Tensor:
    raise AssertionError("a forecast has no loss")
