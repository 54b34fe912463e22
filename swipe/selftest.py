"""Try every kind of communication a run will use, on its own groups, before it starts.

Libraries have been seen to deliver wrong data without an error (docs/faults.md). So exact integers are sent
and compared on arrival. It also makes every group connect, in one order on all ranks: connections made on the
way, in orders that differ, have hung.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swipe.collectives import (
    BACKWARD_TAG,
    DATA_TAG,
    FORWARD_TAG,
    CommunicationError,
    Group,
    Message,
    Pending,
    agree,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    exchange,
    tell,
    waiting,
)
from swipe.groups import Groups
from swipe.pipeline import Pipeline

_BASE = 251  # numbers are below it: exact in bf16 up to 256
_SMALL, _LARGE = 64, 2**18  # elements of a message between CPUs, and between devices: 1 MiB of fp32
_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_ROUNDS = 3  # messages between two stages that are under way at once


class WrongData(CommunicationError):
    """What arrived is not what was sent. Every rank raises it in the same words."""


def self_test(groups: Groups, device: torch.device, pipeline: Pipeline | None = None) -> str:
    """Try all groups of a run; a collective call over all ranks.

    Args:
        device: this rank's device; messages between devices are of up to 1 MiB, between CPUs of 256 bytes.
        pipeline: of the run: messages then go to the same peers, in the same way. Without it neighbouring
            stages exchange them place by place.

    Returns:
        How much was tried and how long it took, for the log; nothing where a rank is alone.

    Raises:
        WrongData: on every rank: which one got what, instead of what, by which kind of communication, over
            which group.
        CommunicationError: a rank did not answer.
    """
    if groups.world.size == 1:
        return ""
    started = time.monotonic()
    trial = _try_all(groups, device, pipeline)
    problem = agree(groups.world, trial.problem)
    if problem is not None:
        raise WrongData(problem)
    return f"{len(trial.kinds)} kinds of communication checked in {time.monotonic() - started:.2g} s"


def _try_all(groups: Groups, device: torch.device, pipeline: Pipeline | None) -> _Trial:
    """Try everything, in the order in which groups are to connect."""
    trial = _Trial(groups, device)
    trial.sums()
    trial.attention()
    trial.weights()
    trial.chain()
    trial.stages(pipeline)
    trial.reading()
    trial.saving()
    return trial


class _Trial:
    """The checks, the kinds of communication they have tried, and the first thing this rank found wrong."""

    def __init__(self, groups: Groups, device: torch.device) -> None:
        self.groups, self.device = groups, device
        self.count = _SMALL if device.type == "cpu" else _LARGE
        self.kinds: dict[str, None] = {}  # in the order tried
        self.problem: str | None = None

    def sums(self) -> None:
        """All-reduce over all ranks, as for the gradient norm, and news from the first rank."""
        world = self.groups.world
        for dtype in (torch.float32, torch.float64):
            self._sum(world, dtype, self.device)
        for group in world.levels or (world,):  # barriers go over CPUs
            self._sum(group, torch.float32, torch.device("cpu"))
        told = tell(world, {"from": 0} if world.rank == 0 else None)
        self.kinds["broadcast of objects"] = None
        if told != {"from": 0}:
            self._note("broadcast of objects", world, f"{told!r} instead of {{'from': 0}}")

    def attention(self) -> None:
        """All-to-all over the ranks that share windows."""
        group = self.groups.sequence
        each = max(1, self.count // group.size)
        for dtype in _SHORT if group.size > 1 else ():
            sent = [self._numbers(each, group.rank, to) for to in range(group.size)]
            got = all_to_all(torch.stack(sent).to(self.device, dtype), group, f"{_SHORT[dtype]} numbers")
            wanted = torch.stack([self._numbers(each, sender, group.rank) for sender in range(group.size)])
            self._compare(f"all-to-all ({_SHORT[dtype]})", group, got, wanted)

    def weights(self) -> None:
        """Gathering of weights and reduction of gradients over the ranks that share a stage."""
        mesh = self.groups.weights
        for name in () if mesh is None else mesh.mesh_dim_names or ():
            assert mesh is not None
            handle = mesh.get_group(name)
            ranks = tuple(dist.get_process_group_ranks(handle))
            group = Group(name, ranks, ranks.index(self.groups.rank), handle)
            if name == "replicate" and group.size > 1:
                self._sum(group, torch.float32, self.device)
            elif group.size > 1:
                self._gather(group)
                self._scatter(group)

    def chain(self) -> None:
        """Broadcast from the last stage, as of a forecast."""
        group = self.groups.chain
        if group.size > 1:
            last = group.size - 1
            wanted = self._numbers(self.count, last)
            x = wanted if group.rank == last else torch.zeros_like(wanted)
            got = broadcast(x.to(self.device, copy=True), group, last, "numbers")
            self._compare("broadcast", group, got, wanted)

    def stages(self, pipeline: Pipeline | None) -> None:
        """Messages between neighbouring stages: first across the edges after even stages, then after odd."""
        dims, rank = self.groups.dims, self.groups.rank
        stage, place = dims.coordinate(rank).pp, dims.place(rank)
        before: Sequence[int] = ()
        after: Sequence[int] = ()
        if pipeline is not None:
            before = sorted(set(pipeline.before.slots())) if pipeline.before else ()
            after = sorted(set(pipeline.after.slots())) if pipeline.after else ()
        else:
            before = (self.groups.ranks_of_stage(stage - 1)[place],) if stage > 0 else ()
            after = (self.groups.ranks_of_stage(stage + 1)[place],) if stage < dims.pp - 1 else ()
        pairs = None if pipeline is None else pipeline.pairs
        for even in (0, 1):
            here = stage % 2 == even
            self._messages(after if here else before, here, stage % 2 == 0, pairs)

    def reading(self) -> None:
        """Samples handed on by the rank of the sp axis that has read them."""
        group = self.groups.reading
        if group.size == 1:
            return
        reader = group.ranks[0]
        if group.rank == 0:
            sends = [
                Message(to, self._numbers(_SMALL, reader, to).float(), DATA_TAG) for to in group.ranks[1:]
            ]
            exchange(sends, [], "samples", group=group).wait()
        else:
            got = torch.zeros(_SMALL)
            exchange([], [Message(reader, got, DATA_TAG)], "samples", group=group).wait()
            self._compare(
                "hand-on of samples", group, got, self._numbers(_SMALL, reader, group.ranks[group.rank])
            )
        self.kinds["hand-on of samples"] = None

    def saving(self) -> None:
        """The groups of CPUs that write checkpoints."""
        for group in self.groups.saving:
            for level in (group.levels or (group,)) if group.size > 1 else ():
                self._sum(level, torch.float32, torch.device("cpu"), "sum for checkpoints")

    def _numbers(self, count: int, sender: int, receiver: int = 0, turn: int = 0) -> Tensor:
        """Make integers [count] that differ by sender, receiver and turn."""
        return (torch.arange(count) + 31 * sender + 17 * receiver + 7 * turn) % _BASE

    def _sum(self, group: Group, dtype: torch.dtype, device: torch.device, kind: str = "") -> None:
        """Add up numbers whose sum is exact: below 2^24 for 10^6 ranks."""
        count = self.count if device.type != "cpu" else _SMALL
        kind = kind or f"sum ({_SHORT[dtype]})"
        period = 11
        x = (torch.arange(count) + 5 * group.rank) % period
        got = all_reduce(x.to(device, dtype), group, "numbers")
        wanted = torch.zeros(count, dtype=torch.int64)
        for start, ranks in Counter(5 * rank % period for rank in range(group.size)).items():
            wanted += ranks * ((torch.arange(count) + start) % period)
        self._compare(kind, group, got, wanted)

    def _gather(self, group: Group) -> None:
        each = max(1, self.count // group.size)
        own = self._numbers(each, group.rank).to(self.device, torch.float32)
        got = all_gather(own, group, "numbers")
        wanted = torch.cat([self._numbers(each, sender) for sender in range(group.size)])
        self._compare("gathering of weights", group, got, wanted)

    def _scatter(self, group: Group) -> None:
        each = max(1, self.count // group.size)
        parts = [(self._numbers(each, 0, to) + group.rank) for to in range(group.size)]
        got = torch.empty(each, device=self.device)
        # Its newer name, where this torch has it; the older one warns there.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with waiting(f"reduction of numbers over {group.name}", group):
            scatter(got, torch.cat(parts).to(self.device, torch.float32), group=group.handle)
        size = group.size
        wanted = size * self._numbers(each, 0, group.rank) + size * (size - 1) // 2
        self._compare("reduction of gradients", group, got, wanted)

    def _messages(
        self, peers: Sequence[int], ahead: bool, sends_first: bool, pairs: dict[int, Any] | None
    ) -> None:
        """Exchange messages with the ranks of one neighbouring stage, several under way at once.

        The first goes forward only, the second both ways, the third back only, as in a pipeline's step.

        Args:
            ahead: whether the peers are on the stage after.
            sends_first: for the policy "parity".
        """
        if not peers:
            return
        rank, policy = self.groups.rank, self.groups.policy
        tags = (FORWARD_TAG, BACKWARD_TAG) if ahead else (BACKWARD_TAG, FORWARD_TAG)
        under_way: list[Pending] = []
        receives: list[tuple[int, Message]] = []
        for turn in range(_ROUNDS):
            forward, back = turn < _ROUNDS - 1, turn > 0
            sends = [
                Message(
                    peer, self._numbers(self.count, rank, peer, turn).to(self.device, torch.bfloat16), tags[0]
                )
                for peer in (peers if (forward if ahead else back) else ())
            ]
            empty = [
                Message(peer, torch.zeros(self.count, dtype=torch.bfloat16, device=self.device), tags[1])
                for peer in (peers if (back if ahead else forward) else ())
            ]
            what = "messages between stages"
            under_way.append(
                exchange(sends, empty, what, policy=policy, sends_first=sends_first, pairs=pairs)
            )
            receives += [(turn, message) for message in empty]
        for pending in under_way:
            pending.wait()
        for turn, (peer, got, _) in receives:
            group = Group("neighbouring stages", (peer, rank), 1)
            wanted = self._numbers(self.count, peer, rank, turn)
            self._compare("messages between stages", group, got, wanted)

    def _compare(self, kind: str, group: Group, got: Tensor, wanted: Tensor) -> None:
        """Count a kind of communication as tried, and note what did not arrive as it was sent."""
        self.kinds[kind] = None
        found = got.detach().cpu().double().flatten()
        different = (found != wanted.double().flatten()).nonzero().flatten()
        if len(different):
            at = int(different[0])
            self._note(
                kind,
                group,
                f"{found[at]:g} instead of {int(wanted.flatten()[at])} at {at} of {len(found)} "
                f"({len(different)} wrong)",
            )

    def _note(self, kind: str, group: Group, what: str) -> None:
        """Keep the first thing found wrong: the rest may follow from it."""
        if self.problem is None:
            ranks = ", ".join(map(str, group.ranks[:6])) + ", ..." * (group.size > 6)
            self.problem = (
                f"rank {self.groups.rank} got {what} in the self-test: {kind} over {group.name} (ranks "
                f"{ranks}), on {self.device.type}. The communication library delivers wrong data: try its "
                "other settings or another --parallel.p2p, or leave this rank's machine out"
            )
