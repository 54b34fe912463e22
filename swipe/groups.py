"""Process groups of one rank, made by the ranks that are in them only.

Each is created with `use_local_synchronization`, because some backends (gloo, xccl) cannot split a group and
a `DeviceMesh` over the world would create every group on every rank. Every rank makes as many groups of each
kind as every other, in the same order: nobody waits for somebody who waits for another, and torch, which
names such a group after how many its member has made, gives it one name on all its members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from swipe.collectives import ALONE, Group, Policy
from swipe.mesh import ParallelDims


@dataclass(frozen=True)
class Groups:
    """The groups this rank communicates in.

    Attributes:
        dims: the mesh.
        rank: this rank.
        world: all ranks.
        sequence: ranks that share windows: sp. All-to-alls of attention.
        reading: the same ranks over gloo, for handing on what one of them has read.
        chain: ranks of all stages at this rank's (dp, wp, sp).
        saving: the ranks of the stage (dp x wp x sp, those with the same weights) and all ranks again, over
            gloo, for checkpoints written in the background.
        weights: mesh to shard the weights over: (shard,) or (replicate, shard); None for one rank.
        policy: how messages between ranks are posted.
        timeout_s: how long an exchange may wait for a rank.
    """

    dims: ParallelDims
    rank: int
    world: Group
    sequence: Group
    reading: Group
    chain: Group
    saving: tuple[Group, Group]
    weights: DeviceMesh | None
    policy: Policy = "async"
    timeout_s: float = 600.0

    @property
    def place_ranks(self) -> tuple[int, ...]:
        """Global ranks that share this rank's image and stage, by place."""
        return self.ranks_of_stage(self.dims.coordinate(self.rank).pp)

    def ranks_of_stage(self, stage: int) -> tuple[int, ...]:
        """Global ranks that share this rank's image on another stage, by place."""
        dp = self.dims.coordinate(self.rank).dp
        return tuple(self.dims.rank_at(dp, stage, place) for place in range(self.dims.places))


SAVING_TIMEOUT_S = 3600.0  # a slow file system is not a lost rank
LEVELS_FROM = 256  # ranks from which small messages between CPUs go by rows and columns of ranks


def make_groups(
    dims: ParallelDims,
    rank: int,
    device: torch.device,
    shard: int = 0,
    policy: Policy | Literal["auto"] = "auto",
    timeout_s: float = 600.0,
) -> Groups:
    """Make this rank's groups; a collective call over all ranks.

    Args:
        shard: ranks the weights of a stage are divided over; 0 is all that share them. Every group of `shard`
            neighbouring ranks holds them once.
        policy: "auto" is "async" between CPUs (gloo) and "batched" elsewhere.
        timeout_s: how long an exchange may wait for a rank; groups do not inherit it from the world's.

    Raises:
        ValueError: `shard` does not divide the ranks of a stage, or the policy is not for this device; names
            what is possible.
    """
    check_shard(dims, shard)
    policy = choose_policy(policy, device)
    if dims.world == 1:
        return Groups(dims, 0, ALONE, ALONE, ALONE, ALONE, (ALONE, ALONE), None)
    everyone = tuple(range(dims.world))
    stage = dims.along(rank, "dp", "wp_y", "wp_x", "sp")
    sequence = dims.along(rank, "sp")
    all_saving = _gloo("all ranks", everyone, rank)
    return Groups(
        dims=dims,
        rank=rank,
        world=Group("all ranks", everyone, rank, dist.group.WORLD, _levels(dims.world, rank, timeout_s)),
        sequence=_group("sp", sequence, rank, timeout_s),
        reading=_gloo("sp", sequence, rank, timeout_s) if dims.sp > 1 else Group("sp", sequence, 0),
        chain=_group("pp", dims.along(rank, "pp"), rank, timeout_s),
        saving=(
            _gloo("dp x wp x sp", stage, rank),
            replace(all_saving, levels=_levels(dims.world, rank, SAVING_TIMEOUT_S)),
        ),
        policy=policy,
        timeout_s=timeout_s,
        weights=_weight_mesh(stage, rank, shard or len(stage), device, timeout_s),
    )


def choose_policy(asked: str, device: torch.device) -> Policy:
    """Choose how messages are posted between devices of this kind, or check what was asked for.

    Raises:
        ValueError: it would deadlock there.
    """
    if asked == "async" and device.type != "cpu":
        raise ValueError(
            f"messages cannot be posted by themselves (async) between {device.type} devices, that match them "
            "by their order: take batched or parity"
        )
    if asked == "auto":
        return "async" if device.type == "cpu" else "batched"
    return cast(Policy, asked)


def check_shard(dims: ParallelDims, shard: int) -> None:
    """Check that weights can be divided over `shard` ranks.

    Raises:
        ValueError: they cannot; names the numbers that can.
    """
    ranks = dims.dp * dims.places
    if shard < 0 or (shard and ranks % shard):
        fits = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ValueError(
            f"weights cannot be divided over {shard} of the {ranks} ranks of a stage: the shard degree can "
            f"be 0 (all), {fits}"
        )


def make_pairs(rank: int, slots: list[int | None], timeout_s: float = 600.0) -> dict[int, Any]:
    """Make a process group of two with each peer, for backends that want one per pair.

    A collective call over all ranks. Slot i of a rank holds the peer it makes its i-th group with, and slot i
    of that peer holds this rank; None where it has nothing to do, and a group of its own keeps the count. The
    count must agree: torch names a group made by its members only after how many groups they have made.
    """
    pairs: dict[int, Any] = {}
    for peer in slots:
        new = peer is not None and peer != rank and peer not in pairs
        ranks = sorted((rank, peer)) if new and peer is not None else [rank]
        handle = _new_group(ranks, timeout_s)
        if new and peer is not None:
            pairs[peer] = handle
    return pairs


def _new_group(ranks: Sequence[int], timeout_s: float, backend: str | None = None) -> Any:
    """Make a group, by its members alone; where nobody is connected (swipe/rehearsal.py), of that kind."""
    pretends = dist.is_initialized() and dist.get_backend() == "fake"
    timeout, backend = timedelta(seconds=timeout_s), "fake" if pretends else backend
    return dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)


def _group(name: str, ranks: tuple[int, ...], rank: int, timeout_s: float) -> Group:
    if len(ranks) == 1:
        return Group(name, ranks, 0)
    return Group(name, ranks, ranks.index(rank), _new_group(ranks, timeout_s))


def _gloo(name: str, ranks: tuple[int, ...], rank: int, timeout_s: float = SAVING_TIMEOUT_S) -> Group:
    """Make a group for CPU tensors, with a handle even for one rank: DCP wants one."""
    return Group(name, ranks, ranks.index(rank), _new_group(ranks, timeout_s, "gloo"))


def _levels(world: int, rank: int, timeout_s: float) -> tuple[Group, ...]:
    """Lay many ranks out in rows and columns, as near to a square as their number allows.

    gloo passes a sum round the whole ring: over 120,960 ranks that is 240,000 messages one after the other,
    over a row and then a column of them 1,400.
    """
    if world < LEVELS_FROM:
        return ()
    columns = next(n for n in range(math.isqrt(world), 0, -1) if world % n == 0)
    row, column = rank // columns, rank % columns
    return (
        _gloo("a row of ranks", tuple(range(row * columns, (row + 1) * columns)), rank, timeout_s),
        _gloo("a column of ranks", tuple(range(column, world, columns)), rank, timeout_s),
    )


def _weight_mesh(
    stage: tuple[int, ...], rank: int, shard: int, device: torch.device, timeout_s: float
) -> DeviceMesh | None:
    """Lay the ranks of a stage out as (replicate, shard), neighbours in one shard group."""
    if len(stage) == 1:
        return None
    number, kind = stage.index(rank), device.type
    columns = tuple(stage[number // shard * shard : (number // shard + 1) * shard])
    rows = tuple(stage[number % shard :: shard])
    handles = [_new_group(ranks, timeout_s) for ranks in (rows, columns)]
    if len(rows) == 1:
        return DeviceMesh.from_group(handles[1], kind, mesh_dim_names=("shard",))
    ranks = torch.tensor(stage).view(-1, shard)
    return DeviceMesh.from_group(handles, kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))
