"""The self-test of communication: silent where all is well, and it names what is not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from swipe import selftest
from swipe.collectives import CommunicationError
from swipe.groups import make_groups
from swipe.mesh import ParallelDims
from swipe.selftest import WrongData, self_test
from tests.harness import run_distributed
from tests.swipe.meshes import GRID, linked

CPU = torch.device("cpu")
SUMS = ("sum (fp32)", "sum (fp64)", "broadcast of objects")
SP = ("all-to-all (bf16)", "all-to-all (fp32)", "all-to-all (fp64)")
WEIGHTS = ("gathering of weights", "reduction of gradients")
PP = ("broadcast", "messages between stages")
READ, SAVED = "hand-on of samples", "sum for checkpoints"

# Meshes, ranks the weights are divided over, policy, and what there is to try.
RUNS = [
    (ParallelDims(dp=2, wp_x=2, pp=2), 2, "async", {*SUMS, *WEIGHTS, *PP, SAVED}),
    (ParallelDims(wp_y=2, pp=2, sp=2), 0, "batched", {*SUMS, *SP, *WEIGHTS, *PP, READ, SAVED}),
    (ParallelDims(pp=4, sp=2), 0, "parity", {*SUMS, *SP, *WEIGHTS, *PP, READ, SAVED}),
    (ParallelDims(dp=8), 1, "async", {*SUMS, SAVED}),
    (ParallelDims(dp=2), 0, "async", {*SUMS, *WEIGHTS, SAVED}),
    (ParallelDims(pp=3), 0, "parity", {*SUMS, *PP, SAVED}),
]


def tried(runs: list[Any]) -> list[tuple[str, list[str]]]:
    """Test the groups of every mesh, without a pipeline and with one: what is said, and what was tried."""
    found = []
    for dims, shard, policy, _ in runs:
        groups = make_groups(dims, dist.get_rank(), CPU, shard, policy)
        shifts = [1, -1, 1][: dims.pp - 1]
        pipeline = linked(nn.Linear(1, 1), GRID, groups, shifts)
        for one in (None, pipeline):
            said = self_test(groups, CPU, one)
            found.append((said, list(selftest._try_all(groups, CPU, one).kinds)))
    return found


@pytest.mark.parametrize("world", sorted({run[0].world for run in RUNS}))
def test_every_kind_of_communication_is_tried(world: int) -> None:
    runs = [run for run in RUNS if run[0].world == world]
    for results in run_distributed(tried, world, runs):
        for number, (said, tries) in enumerate(results):
            *_, kinds = runs[number // 2]
            assert set(tries) == kinds and len(tries) == len(kinds)
            match = re.fullmatch(r"(\d+) kinds of communication checked in ([\de.-]+) s", said)
            assert match and int(match[1]) == len(kinds) and 0 < float(match[2]) < 10


def test_one_rank_has_nothing_to_try() -> None:
    """Without torch.distributed."""
    assert self_test(make_groups(ParallelDims(), 0, CPU), CPU) == ""
    with pytest.raises(KeyError):
        selftest._SHORT[torch.int64]


def corrupt(name: str, culprit: int, change: Callable[[torch.Tensor], Any], argument: int) -> None:
    """Let a call of torch.distributed deliver wrong data on one rank."""
    original = getattr(dist, name)

    def wrong(*args: Any, **how: Any) -> Any:
        work = original(*args, **how)
        if hasattr(work, "wait"):
            work.wait()
        change(args[argument])
        return work

    if dist.get_rank() == culprit:
        setattr(dist, name, wrong)


def off_by_one(x: torch.Tensor) -> None:
    if x.numel() > 5 and x.dtype != torch.uint8:  # the exchange of errors goes on as it is
        x.view(-1)[5] += 1


FAULTS = {
    "all_reduce": r"sum \(fp32\) over all ranks \(ranks 0, 1, 2, 3, 4, 5, \.\.\.\)",
    "all_to_all_single": r"all-to-all \(bf16\) over sp \(ranks 2, 3\), on cpu",
    "all_gather_single": r"gathering of weights over shard \(ranks",
    "reduce_scatter_single": r"reduction of gradients over shard \(ranks",
    "broadcast": r"broadcast over pp \(ranks",
}
OLD_NAMES = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}


def with_faults(names: list[str]) -> list[str]:
    """Let one call after the other deliver wrong data on rank 3; return what every rank says of it."""
    dims = ParallelDims(wp_y=2, pp=2, sp=2)
    groups, found = make_groups(dims, dist.get_rank(), CPU), []
    for name in names:
        name = name if hasattr(dist, name) else OLD_NAMES[name]
        original = getattr(dist, name)
        corrupt(name, 3, off_by_one, 0)
        try:
            self_test(groups, CPU)
            found.append("")
        except WrongData as error:
            found.append(str(error))
        setattr(dist, name, original)
    assert self_test(groups, CPU)
    return found


def test_wrong_data_are_named_by_all_ranks_alike() -> None:
    """Which rank, which communication, which group, what came instead of what; all stop, none hangs."""
    results = run_distributed(with_faults, 8, list(FAULTS))
    assert len({tuple(said) for said in results}) == 1
    for said, (name, expected) in zip(results[0], FAULTS.items()):
        assert re.match(
            r"rank 3 got \d+ instead of \d+ at 5 of \d+ \(\d+ wrong\) in the self-test: ", said
        ), name
        assert re.search(expected, said), f"{name}: {said}"
        assert "\n" not in said and "try its other settings or another --parallel.p2p" in said


def by_rows_and_columns(size: int) -> list[str]:
    """Let sums over groups of one size deliver wrong data, where small messages go by rows and columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swipe.groups.LEVELS_FROM", 2)
        groups = make_groups(ParallelDims(dp=6), dist.get_rank(), CPU)
    original, sizes = dist.all_reduce, []

    def wrong(x: torch.Tensor, *args: Any, **how: Any) -> None:
        original(x, *args, **how)
        sizes.append(dist.get_world_size(how["group"]))
        if sizes[-1] == size and x.numel() > 5:
            x[5] += 1

    dist.all_reduce = wrong if groups.rank == 3 else original
    said = ""
    try:
        self_test(groups, CPU)
    except WrongData as error:
        said = str(error)
    return [said, "by levels" if {2, 3} <= set(sizes) else ""]


def test_rows_and_columns_of_many_ranks_are_tried() -> None:
    assert run_distributed(by_rows_and_columns, 6, 0)[3] == ["", "by levels"]
    found = run_distributed(by_rows_and_columns, 6, 3)
    assert len({said for said, _ in found}) == 1
    assert "rank 3 got" in found[0][0] and "sum (fp32) over a column of ranks (ranks 1, 3, 5)" in found[0][0]


def with_swapped_peers() -> str:
    """Take a message of one peer for that of another, as a library that ignores tags and order might."""
    groups = make_groups(ParallelDims(dp=2, pp=2), dist.get_rank(), CPU)
    original = dist.isend

    def early(tensor: torch.Tensor, *args: Any, **how: Any) -> Any:
        return original(torch.roll(tensor, 17), *args, **how)

    dist.isend = early if groups.rank == 0 else original
    with pytest.raises(WrongData) as error:
        self_test(groups, CPU)
    return str(error.value)


def test_a_message_of_another_turn_is_noticed() -> None:
    """Numbers differ by sender, receiver and turn."""
    said = run_distributed(with_swapped_peers, 4)
    assert len(set(said)) == 1 and re.match(
        r"rank 1 got .* messages between stages .*\(ranks 0, 1\)", said[0]
    )


def with_a_rank_missing() -> str:
    groups = make_groups(ParallelDims(sp=2), dist.get_rank(), CPU, timeout_s=0.5)
    if groups.rank == 1:
        time.sleep(2)
        return ""
    with pytest.raises(CommunicationError) as error:
        selftest._Trial(groups, CPU).attention()
    return str(error.value)


def test_a_rank_that_does_not_answer_is_named() -> None:
    said = run_distributed(with_a_rank_missing, 2)[0]
    assert "rank 0 waited in the all-to-all of bf16 numbers over sp" in said
