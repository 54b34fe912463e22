"""A run on any number of ranks, rehearsed in one process: all of them as numbers, a few of them as they are.

What every rank holds, sends and expects, and the whole step's schedule, are gone through for all ranks at
once (`swipe.rehearsal`). A few ranks are built as a run builds them, with groups, weights, optimizer and
pipeline, on the meta device and among ranks that are not there; they must be what was found before.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aeris.config import RunConfig
from aeris.data.forcing import FORCINGS
from aeris.model.swin import DTYPES, Swin, edge
from aeris.optim import make_optimizer
from aeris.parallelize import Seat, build_model, cut, make_pipeline, share_weights, take_seat, window_grid
from aeris.planning.traffic import KINDS, microbatches, traffic, weight_bytes
from aeris.restore import channel_counts
from swipe import rehearsal
from swipe.backend import pretending
from swipe.collectives import DATA_TAG, Message
from swipe.layout import WindowLayout
from swipe.mesh import AXES, Coordinate, ParallelDims
from swipe.rehearsal import Meeting, Plan, Seating
from swipe.runthrough import Exchange
from swipe.sharding import local

SAMPLED = 12
"""Ranks that are built."""
Say = Callable[[str, str, float], None]
"""Tells of a part that is done: its name, what was found, the seconds it took."""


@dataclass
class Rehearsal:
    """What was gone through, and how much it was.

    Attributes:
        groups: by the axes they cross.
        links: from a rank to another between stages, one for outputs and one for gradients.
        actions: forward and backward passes of a step on all ranks.
        messages: of a step from all ranks between stages, inside them and with samples.
        sent: bytes of a step from all ranks, by kind.
        policies: the ways to post messages that were gone through.
        sampled: the ranks that were built.
        seconds: and `peak_bytes`: what the rehearsal itself took.
    """

    groups: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    links: int = 0
    actions: int = 0
    messages: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    policies: tuple[str, ...] = ()
    sampled: tuple[int, ...] = ()
    seconds: float = 0.0
    peak_bytes: int = 0


def rehearse(
    config: RunConfig, channels: int, dims: ParallelDims, say: Say, sampled: int = SAMPLED
) -> Rehearsal:
    """Go through a step of a run of `dims.world` ranks.

    Args:
        channels: of the data.
        say: is told of every part that is done.
        sampled: how many ranks are built.

    Raises:
        ValueError: two ranks do not agree, or wait for each other; names them.
    """
    found, clock = Rehearsal(), _Clock(say)
    seating = rehearsal.seat_all(dims)
    clock.tell("coordinates", f"{dims.world:,} ranks, each the only one at its place")
    found.groups = rehearsal.check_groups(seating)
    clock.tell("groups", ", ".join(f"{count:,} of {axes}" for axes, count in found.groups.items()))
    layouts = rehearsal.lay_out(window_grid(config.model), dims)
    found.tokens = config.model.rows * config.model.cols
    clock.tell("windows", f"{found.tokens:,} tokens on {dims.places:,} places of a stage, each held once")
    plan = plan_of(config, channels, dims)
    meeting = rehearsal.meet_all(seating, layouts, plan)
    samples = pair_samples(config, channels, seating, layouts)
    found.links, count = len(meeting.sender), microbatches(config, dims)
    clock.tell("messages", f"{found.links:,} links between stages, both ends with the same bytes and tag")
    found.policies = ("async", "batched") if config.parallel.p2p == "auto" else (config.parallel.p2p,)
    for policy in found.policies:
        played = rehearsal.play(meeting, config.parallel.schedule, count, policy)
        found.actions = played.actions
        found.messages = played.messages + count * (meeting.inside_messages + samples[1])
        done = f"{played.actions:,} passes, {played.messages:,} messages, all ranks done"
        clock.tell(f"{config.parallel.schedule}, {policy}", done)
    found.sent = sent_by_all(config, channels, seating)
    counted = {"pipeline": meeting.between, "shift": meeting.inside, "samples": samples[0]}
    for kind, size in counted.items():
        if found.sent[kind] != count * size:
            raise ValueError(f"{kind}: ranks send {count * size:,} bytes, planned are {found.sent[kind]:,}")
    found.sampled = sample(dims, sampled, config.train.seed)
    build_ranks(config, channels, seating, meeting, found.sampled)
    clock.tell("built", f"{len(found.sampled)} ranks: {', '.join(map(str, found.sampled))}")
    found.seconds, found.peak_bytes = time.perf_counter() - clock.started, peak_bytes()
    return found


class _Clock:
    """Times the parts of a rehearsal."""

    def __init__(self, say: Say) -> None:
        self.say, self.started = say, time.perf_counter()
        self.last = self.started

    def tell(self, name: str, what: str) -> None:
        now = time.perf_counter()
        self.say(name, what, now - self.last)
        self.last = now


def plan_of(config: RunConfig, channels: int, dims: ParallelDims) -> Plan:
    """Say what the stages of a run exchange for a microbatch."""
    model = config.model
    stages = cut(model, *channel_counts(channels), dims.pp)
    return Plan(
        edges=[edge(units.start, model.layers) for units in stages[1:]],
        inner=[[sign for unit in units[1:] if (sign := edge(unit, model.layers))] for units in stages],
        shape=(config.train.microbatch, model.width),
        dtype=DTYPES[model.residual],
    )


def pair_samples(
    config: RunConfig, channels: int, seating: Seating, layouts: list[WindowLayout]
) -> tuple[int, int]:
    """Pair what ranks that read hand on with what the others expect; bytes and messages of a microbatch."""
    fields, batch = 2 * channels + len(FORCINGS), config.train.microbatch
    sends: list[list[Message]] = []
    receives: list[list[Message]] = []
    for layout in layouts:
        first = layout.place - layout.shard.sp_rank
        windows, tokens = layout.tokens_NT.shape
        mine = Message(first, torch.empty(batch, windows, tokens, fields, device="meta"), DATA_TAG)
        receives.append([mine] if layout.shard.sp_rank else [])
        sets, quadrants, strips, rest = layout.shard.split(layout.shard.grid.tokens)
        part = torch.empty(batch, windows, quadrants * rest, fields, device="meta")
        others = () if layout.shard.sp_rank else range(first + 1, first + sets * strips)
        sends.append([Message(place, part, DATA_TAG) for place in others])
    exchange = Exchange("samples", rehearsal.ends_of(sends), rehearsal.ends_of(receives))
    found = [rehearsal.pair_inside(seating, stage, exchange) for stage in {0, seating.dims.pp - 1}]
    return sum(size for size, _ in found), sum(count for _, count in found)


def sent_by_all(config: RunConfig, channels: int, seating: Seating) -> dict[str, int]:
    """Add up what the ranks send in a step, by kind, as planned; those of a stage and sp send the same."""
    dims, total = seating.dims, dict.fromkeys(KINDS, 0)
    for stage in range(dims.pp):
        for sp in range(min(2, dims.sp)):  # the reader of samples, and the others
            rank = int(seating.ranks[stage, 0, sp])
            alike = dims.dp * dims.wp * (dims.sp - 1 if sp else 1)
            for kind, size in traffic(config, channels, dims, rank, 1).total.items():
                total[kind] += alike * size
    return total


def sample(dims: ParallelDims, count: int, seed: int) -> tuple[int, ...]:
    """Choose ranks: the first, the last, some at corners of the mesh and some anywhere, ascending."""
    chance = random.Random(seed)
    degrees = [getattr(dims, axis) for axis in AXES]
    chosen = dict.fromkeys((0, dims.world - 1))
    for number in range(8 * count):
        corner = number < count  # some of which are the same
        at = [chance.choice((0, n - 1)) if corner else chance.randrange(n) for n in degrees]
        if len(chosen) < (count // 2 if corner else count):
            chosen[dims.rank(Coordinate(*at))] = None
    return tuple(sorted(list(chosen)[:count]))


def build_ranks(
    config: RunConfig, channels: int, seating: Seating, meeting: Meeting, ranks: tuple[int, ...]
) -> None:
    """Build ranks as a run does, on the meta device, and compare them with what was found of all ranks.

    Raises:
        ValueError: a rank is not as expected; says which and in what.
    """
    plain = replace(config, model=replace(config.model, compile=False))
    counts, device = channel_counts(channels), torch.device("cpu")
    for rank in ranks:
        with pretending(rank, seating.dims.world):
            seat = take_seat(plain, counts, seating.dims, rank, device)
            model = build_model(plain.model, *counts, seat.layout, "meta", seat.units)
            whole = {name: p.shape for name, p in model.named_parameters()}
            share_weights(model, seat)
            check_seat(seat, seating, rank)
            check_weights(plain, channels, seat, model, whole)
            pipeline = make_pipeline(model, seat, _no_loss, plain.parallel.schedule)
            shape = (config.train.microbatch, *seat.layout.tokens_NT.shape, config.model.width)
            x = torch.empty(shape, dtype=DTYPES[config.model.residual], device="meta")
            for side, other in ((pipeline.after, seat.at.pp + 1), (pipeline.before, seat.at.pp - 1)):
                if side is None:
                    continue
                kinds = ("F", "B") if other > seat.at.pp else ("B", "F")
                out = meeting.exchanges[seat.at.pp, kinds[0]].sends
                into = meeting.exchanges[other, kinds[1]].receives
                coming = side.expect(shape, x.dtype, x.device).messages
                for messages, ends in ((side.outgoing(x), out), (coming, into)):
                    own = ends.rank == rank
                    here = sorted((m.rank, m.tag, m.tensor.nbytes) for m in messages)
                    there = sorted(zip(*(column[own].tolist() for column in ends[1:])))
                    _compare(rank, f"messages (rank, tag, bytes) with stage {other}", here, there)


def check_seat(seat: Seat, seating: Seating, rank: int) -> None:
    """Compare a rank's place and groups with those found for all ranks."""
    dims, groups = seat.dims, seat.groups
    _compare(rank, "coordinate", tuple(seat.at), tuple(seating.coordinates[rank].tolist()))
    stage = seating.ranks[seat.at.pp]
    _compare(rank, "places", groups.place_ranks, tuple(stage[seat.at.dp].tolist()))
    _compare(rank, "chain", groups.chain.ranks, dims.along(rank, "pp"))
    _compare(rank, "sp group", groups.sequence.ranks, dims.along(rank, "sp"))
    _compare(rank, "group for checkpoints", set(groups.saving[0].ranks), set(stage.ravel().tolist()))
    if groups.weights is not None:
        mesh = groups.weights.mesh
        _compare(
            rank, "ranks with its weights", sorted(mesh.flatten().tolist()), sorted(stage.ravel().tolist())
        )


def check_weights(
    config: RunConfig, channels: int, seat: Seat, model: Swin, whole: dict[str, torch.Size]
) -> None:
    """Compare a rank's weights and the state of its optimizer with the plan of its stage.

    Args:
        model: the stage, its weights divided.
        whole: shapes of all weights of the stage.
    """
    rank, mesh = seat.groups.rank, seat.groups.weights
    shares = 1 if mesh is None else mesh.size(mesh.ndim - 1)
    number = 0 if mesh is None else mesh.get_local_rank(mesh.ndim - 1)
    size = 8 if config.model.precision == "fp64" else 4
    planned = weight_bytes(config, channels, seat.units)
    _compare(rank, "bytes of its stage", size * sum(s.numel() for s in whole.values()), planned)
    for name, p in model.named_parameters():
        rows, part = whole[name][0], -(-whole[name][0] // shares)
        own = (max(0, min(part, rows - number * part)), *whole[name][1:])
        _compare(rank, f"part of {name}", tuple(local(p).shape), own)
    if config.optimizer.offload != "none":
        return  # it is made in host memory
    for weight, state in make_optimizer(model, config.optimizer).state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            _compare(rank, f"optimizer's {name}", local(state[name]).shape, local(weight).shape)


def _compare(rank: int, what: str, here: Any, expected: Any) -> None:
    if here != expected:
        raise ValueError(f"rank {rank}: its {what}: {_short(here)} is built, {_short(expected)} is planned")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _no_loss(y: Tensor, target: Any) -> Tensor:
    raise AssertionError("nothing is computed")


def peak_bytes() -> int:
    """Return the most memory this process has had, resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
