"""Groups of ranks: who is in them, and that messages in them go where they should."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import swipe.groups as groups_module
from swipe.collectives import (
    ALONE,
    CommunicationError,
    Group,
    Message,
    agree,
    all_gather,
    all_to_all,
    barrier,
    exchange,
    least,
)
from swipe.groups import check_shard, choose_policy, make_groups, make_pairs
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.windows import WindowGrid
from tests.harness import run_distributed
from tests.swipe.meshes import linked

CPU = torch.device("cpu")

# Meshes by number of ranks, with the ranks the weights are divided over (0: all of a stage).
MESHES = [
    (ParallelDims(dp=2, wp_x=2, pp=2), 0),
    (ParallelDims(wp_y=2, wp_x=2, sp=2), 4),
    (ParallelDims(dp=2, pp=2, sp=2), 2),
    (ParallelDims(pp=8), 0),
    (ParallelDims(dp=8), 1),
    (ParallelDims(dp=2, wp_y=3, pp=1, sp=2), 3),
    (ParallelDims(wp_x=2, pp=3, sp=2), 2),
    (ParallelDims(sp=12), 0),
]


def added(group: Group) -> int:
    """Add up the global ranks of a group by asking them."""
    x = torch.tensor([dist.get_rank()])
    if group.handle is not None:
        dist.all_reduce(x, group=group.handle)
    return int(x)


def join(meshes: list[tuple[ParallelDims, int]]) -> list[dict[str, Any]]:
    """Make the groups of every mesh; return who is in them, as they say and as the ranks in them say."""
    rank, found = dist.get_rank(), []
    for dims, shard in meshes:
        groups = make_groups(dims, rank, CPU, shard)
        named = {name: getattr(groups, name) for name in ("world", "sequence", "reading", "chain")}
        named |= {"stage": groups.saving[0], "all": groups.saving[1]}
        out: dict[str, Any] = {
            name: (group.name, group.ranks, group.rank, added(group)) for name, group in named.items()
        }
        out["handles"] = len({id(group.handle) for group in named.values() if group.handle is not None})
        out["places"] = groups.place_ranks, [groups.ranks_of_stage(stage) for stage in range(dims.pp)]
        if mesh := groups.weights:
            names = mesh.mesh_dim_names or ()
            members = [dist.get_process_group_ranks(mesh.get_group(name)) for name in names]
            sums = [added(Group(name, (), 0, mesh.get_group(name))) for name in names]
            out["weights"] = names, members, sums, mesh.device_type, mesh.mesh.tolist()
        found.append(out)
    return found


@cache
def joined(world: int) -> list[list[dict[str, Any]]]:
    return run_distributed(join, world, [mesh for mesh in MESHES if mesh[0].world == world])


def members(dims: ParallelDims, *axes: str) -> dict[int, tuple[int, ...]]:
    """Say by rank who differs from it along these axes only: slices of an array of the ranks."""
    order = ("dp", "wp_y", "wp_x", "pp", "sp")
    mesh = np.arange(dims.world).reshape([getattr(dims, axis) for axis in order])
    rest = [order.index(axis) for axis in order if axis not in axes]
    moved = np.moveaxis(mesh, rest, range(len(rest)))
    rows = moved.reshape(int(np.prod(moved.shape[: len(rest)])), -1)
    return {int(rank): tuple(int(other) for other in row) for row in rows for rank in row}


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}, shard {mesh[1]}")
def test_groups_divide_the_ranks_along_their_axes(mesh: tuple[ParallelDims, int]) -> None:
    """Every group holds the ranks of a row of the mesh, by its own account and by a sum over its members."""
    dims, _ = mesh
    number = [other for other in MESHES if other[0].world == dims.world].index(mesh)
    everyone = tuple(range(dims.world))
    expected = {
        "world": ("all ranks", dict.fromkeys(everyone, everyone)),
        "sequence": ("sp", members(dims, "sp")),
        "reading": ("sp", members(dims, "sp")),
        "chain": ("pp", members(dims, "pp")),
        "stage": (None, members(dims, "dp", "wp_y", "wp_x", "sp")),
        "all": (None, dict.fromkeys(everyone, everyone)),
    }
    for rank, results in enumerate(joined(dims.world)):
        out = results[number]
        for key, (name, rows) in expected.items():
            row = rows[rank]
            assert out[key][1:] == (row, row.index(rank), sum(row)), key
            assert name in (None, out[key][0])
        assert out["handles"] == 3 + 2 * (dims.sp > 1) + (dims.pp > 1), "no two share a process group"
        places, by_stage = out["places"]
        same_image, same_stage = (
            members(dims, "wp_y", "wp_x", "pp", "sp"),
            members(dims, "wp_y", "wp_x", "sp"),
        )
        assert places == same_stage[rank]
        assert by_stage == [same_stage[other] for other in members(dims, "pp")[rank]]
        assert sorted(r for ranks in by_stage for r in ranks) == sorted(same_image[rank])


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}, shard {mesh[1]}")
def test_weights_are_divided_over_neighbours(mesh: tuple[ParallelDims, int]) -> None:
    """`shard` neighbours of a stage hold the weights once; those that hold the same part are replicas."""
    dims, shard = mesh
    number = [other for other in MESHES if other[0].world == dims.world].index(mesh)
    for rank, results in enumerate(joined(dims.world)):
        stage = members(dims, "dp", "wp_y", "wp_x", "sp")[rank]
        if len(stage) == 1:
            assert "weights" not in results[number]
            continue
        whole = np.array(stage).reshape(-1, shard or len(stage))
        (row,), (col,) = np.where(whole == rank)
        names, lists, sums, kind, table = results[number]["weights"]
        expected = {"replicate": whole[:, col].tolist(), "shard": whole[row].tolist()}
        if len(whole) == 1:
            del expected["replicate"]
            whole = whole[0]
        assert (names, lists) == (tuple(expected), list(expected.values())) and kind == "cpu"
        assert sums == [sum(ranks) for ranks in lists] and table == whole.tolist()


def test_one_rank_needs_no_group() -> None:
    """Without torch.distributed."""
    groups = make_groups(ParallelDims(), 0, CPU)
    assert groups.weights is None and groups.place_ranks == (0,)
    assert {groups.world, groups.sequence, groups.reading, groups.chain, *groups.saving} == {ALONE}


@pytest.mark.parametrize("shard", [5, 12, -1])
def test_weights_that_cannot_be_divided_so_are_refused(shard: int) -> None:
    """The numbers that would do are named."""
    dims = ParallelDims(dp=2, wp_x=2, pp=3, sp=2)
    for fits in (0, 1, 2, 4, 8):
        check_shard(dims, fits)
    says = f"over {shard} of the 8 ranks of a stage: the shard degree can be 0 .all., 1, 2, 4, 8$"
    with pytest.raises(ValueError, match=says):
        make_groups(dims, 0, CPU, shard)


def wait_for_nobody() -> str:
    """Call the others of a group, of whom one does not come; return what is said, and after how long."""
    groups = make_groups(ParallelDims(sp=2), dist.get_rank(), CPU, timeout_s=0.5)
    start = time.monotonic()
    if groups.rank == 1:
        time.sleep(3)
        return ""
    with pytest.raises(CommunicationError) as error:
        all_to_all(torch.zeros(2), groups.sequence, "tokens")
    assert time.monotonic() - start < 2.5
    return str(error.value)


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_asked() -> None:
    """Groups do not inherit the time limit of the world's, which here is minutes."""
    assert "rank 0 waited in the all-to-all of tokens over sp" in run_distributed(wait_for_nobody, 2)[0]


def test_messages_are_posted_as_the_device_allows() -> None:
    """Backends without tags cannot have messages posted by themselves."""
    cpu, gpu = CPU, torch.device("cuda")
    assert [choose_policy("auto", device) for device in (cpu, gpu)] == ["async", "batched"]
    assert [choose_policy(policy, gpu) for policy in ("batched", "parity")] == ["batched", "parity"]
    with pytest.raises(ValueError, match=r"\(async\) between cuda devices.*take batched or parity"):
        make_groups(ParallelDims(), 0, gpu, policy="async")


# Pairs. Meshes with stages, and the shift on each edge.

CHAINS = [
    (ParallelDims(pp=2, wp_y=2, wp_x=2), (1,)),
    (ParallelDims(pp=2, wp_y=2, wp_x=2), (0,)),
    (ParallelDims(pp=4, sp=2), (0, 1, -1)),
    (ParallelDims(pp=2, wp_x=2, sp=2), (-1,)),
    (ParallelDims(dp=2, pp=4), (1, 0, -1)),
    (ParallelDims(pp=3, wp_y=2, wp_x=2), (1, -1)),
    (ParallelDims(pp=3, sp=4), (-1, 1)),
    (ParallelDims(pp=4, sp=3), (0, 1, 0)),
]


def meet(chains: list[tuple[ParallelDims, tuple[int, ...]]]) -> list[tuple[list[int], set[int], list[int]]]:
    """Make pairs with all peers of both edges and exchange ranks in them: pairs, peers, what they said."""
    rank, found = dist.get_rank(), []
    for dims, shifts in chains:
        groups, grid = make_groups(dims, rank, CPU, policy="parity"), WindowGrid(12, 12, 6)
        pipeline = linked(nn.Identity(), grid, groups, shifts)
        x = torch.zeros(1, *WindowLayout.of(grid, groups).tokens_NT.shape, 1)
        edges = [edge for edge in (pipeline.before, pipeline.after) if edge]
        peers = {message.rank for edge in edges for message in edge.outgoing(x)}
        pairs = pipeline.pairs
        assert pairs is not None
        members = [dist.get_process_group_ranks(pair) for pair in pairs.values()]
        assert members == [sorted((rank, peer)) for peer in pairs]
        sends = [Message(peer, torch.tensor([100 * rank + peer]), 1) for peer in pairs]
        receives = [Message(peer, torch.tensor([-1]), 1) for peer in pairs]
        side = dims.coordinate(rank).pp % 2 == 0
        exchange(sends, receives, "pairs", policy="parity", sends_first=side, pairs=pairs).wait()
        found.append((sorted(pairs), peers, [int(m.tensor) for m in sorted(receives, key=lambda m: m.rank)]))
    return found


@pytest.mark.parametrize("world", sorted({dims.world for dims, _ in CHAINS}))
def test_neighbours_meet_in_pairs(world: int) -> None:
    """Every rank has a group of two with each peer on both edges, and none else; messages arrive in them."""
    chains = [chain for chain in CHAINS if chain[0].world == world]
    for rank, results in enumerate(run_distributed(meet, world, chains)):
        for (dims, shifts), (pairs, peers, said) in zip(chains, results):
            assert set(pairs) == peers and said == [100 * peer + rank for peer in pairs], f"{dims}, {shifts}"
            stages = {dims.coordinate(peer).pp for peer in peers}
            stage = dims.coordinate(rank).pp
            assert stages == {stage - 1, stage + 1} & set(range(dims.pp))


def doubled() -> list[tuple[int, ...]]:
    """Meet the same peer in two slots, and nobody in others; then make another group of all."""
    rank = dist.get_rank()
    pairs = make_pairs(rank, [rank ^ 1, None, rank ^ 1, rank])
    x = torch.ones(1)
    dist.all_reduce(x, group=dist.new_group([0, 1, 2, 3], use_local_synchronization=True))
    return [*pairs, int(x)]


def test_every_rank_makes_as_many_groups() -> None:
    """A peer that comes twice gets one group, an empty slot none, and later groups still find each other."""
    assert run_distributed(doubled, 4) == [[1, 4], [0, 4], [3, 4], [2, 4]]


def agree_by_levels(errors: list[str | None]) -> tuple[list[tuple[int, ...]], int, str | None]:
    """Agree among ranks that are laid out in rows and columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swipe.groups.LEVELS_FROM", 2)
        world = make_groups(ParallelDims(dp=len(errors)), dist.get_rank(), CPU).world
    barrier(world, "the test")
    assert all_gather(torch.tensor([world.rank, 5]), world, "ranks").tolist() == [[r, 5] for r in world.ranks]
    return (
        [level.ranks for level in world.levels],
        least(world, 7 - world.rank, "numbers"),
        agree(world, errors[world.rank]),
    )


@pytest.mark.parametrize(
    ("errors", "said", "row", "column"),
    [
        ([None, None, "two", "three", None, None], "two", (2, 3), (1, 3, 5)),
        ([None, None, None, None, None, None], None, (2, 3), (1, 3, 5)),
        ([None, None, None, None, "four"], "four", (3,), (0, 1, 2, 3, 4)),
    ],
)
def test_many_ranks_agree_by_rows_and_columns(
    errors: list[str | None], said: str | None, row: tuple[int, ...], column: tuple[int, ...]
) -> None:
    found = run_distributed(agree_by_levels, len(errors), errors)
    assert {(smallest, text) for _, smallest, text in found} == {(8 - len(errors), said)}
    assert found[3][0] == [row, column]


def test_rows_and_columns_of_the_largest_run_are_few() -> None:
    """Who is in them, without making them: 120,960 ranks are 360 rows of 336."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swipe.groups._new_group", lambda ranks, timeout_s, backend: None)
        row, column = groups_module._levels(120_960, 777, 1.0)
    assert (row.size, column.size) == (336, 360)
    assert 777 in row.ranks and 777 in column.ranks
    assert row.ranks[row.rank] == column.ranks[column.rank] == 777
