"""A run of any number of ranks rehearsed in one process: who sits where, holds which tokens, talks to whom.

Nothing is planned here. Every rank is asked for its coordinate and groups, every place of a stage makes the
layout and the links to its neighbours that a run makes (`WindowLayout`, `Edge`), on the meta device, and what
they would send is compared with what the others would expect. Places of different images and stages have the
same plans and other ranks, so plans are made once per place and looked up for all of them.

Shapes: R ranks, S stages, D images at a time (dp), Q places of a stage, n messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from swipe.collectives import SHIFT_TAG, Message
from swipe.edge import Edge
from swipe.layout import WindowLayout
from swipe.mesh import AXES, ParallelDims
from swipe.runthrough import WORDS, Counts, Ends, Exchange, Links, Numbers, Stage, pair, run_through
from swipe.schedule import SCHEDULES, lower
from swipe.windows import WindowGrid, WindowShard

IN_A_STAGE = tuple(axis for axis in AXES if axis != "pp")


class Seating(NamedTuple):
    """Where every rank sits.

    Attributes:
        coordinates: of every rank, int64 [R, 5].
        ranks: global, by stage, image and place, int64 [S, D, Q].
    """

    dims: ParallelDims
    coordinates: Numbers
    ranks: Numbers


def seat_all(dims: ParallelDims) -> Seating:
    """Ask for every rank's coordinate and for the rank there, and compare.

    Raises:
        ValueError: two ranks have one seat, or a coordinate leads to another rank.
    """
    world = range(dims.world)
    at = [dims.coordinate(rank) for rank in world]
    wrong = next((rank for rank in world if dims.rank(at[rank]) != rank), None)
    if wrong is not None:
        raise ValueError(f"rank {wrong} is at {at[wrong]}, where rank {dims.rank(at[wrong])} is")
    shape = dims.pp, dims.dp, dims.places
    ranks = np.array(
        [
            dims.rank_at(dp, pp, place)
            for pp in range(dims.pp)
            for dp in range(dims.dp)
            for place in range(shape[2])
        ]
    ).reshape(shape)
    coordinates = np.array(at)
    places = np.array([dims.place(rank) for rank in world])
    found = ranks[coordinates[:, AXES.index("pp")], coordinates[:, 0], places]
    if len(wrong_ranks := np.flatnonzero(found != np.arange(dims.world))):
        rank = wrong_ranks[0]
        raise ValueError(f"rank {rank} takes place {places[rank]}, where rank {found[rank]} is")
    return Seating(dims, coordinates, ranks)


def check_groups(seating: Seating) -> dict[str, int]:
    """Check the ranks that share windows (sp), a chain of stages (pp) and weights: each in one such group.

    Of the ranks with the same weights one of each group is asked for the others, of the rest every rank.

    Returns:
        How many groups there are, by the axes they cross.

    Raises:
        ValueError: a rank names others than they name, or ranks that differ along another axis.
    """
    dims, counts = seating.dims, {}
    for axes in (("sp",), ("pp",), IN_A_STAGE):
        size = int(np.prod([getattr(dims, axis) for axis in axes]))
        asked = seating.ranks[:, 0, 0].tolist() if axes == IN_A_STAGE else range(dims.world)
        groups = np.array([dims.along(rank, *axes) for rank in asked], np.int32).reshape(-1, size)
        others = [number for number, axis in enumerate(AXES) if axis not in axes]
        own = seating.coordinates[asked][:, None, others]
        bad = (seating.coordinates[groups][:, :, others] != own).any(axis=(1, 2))
        bad |= (np.diff(groups) <= 0).any(axis=1) | ~(groups == np.array(asked)[:, None]).any(axis=1)
        if bad.any():
            rank = np.array(asked)[bad.argmax()]
            raise ValueError(
                f"rank {rank} shares {' x '.join(axes)} with ranks {groups[bad.argmax()].tolist()}"
            )
        counts[" x ".join(axes)] = dims.world // size
    return counts


def lay_out(grid: WindowGrid, dims: ParallelDims) -> list[WindowLayout]:
    """Make the layout of every place, with places for ranks, and check that each token is held once.

    Raises:
        ValueError: a token is held twice or not at all, or ranks of one place's windows hold others; or the
            windows cannot be dealt.
    """
    wp, places = (dims.wp_y, dims.wp_x), range(dims.places)
    layouts = [
        WindowLayout(WindowShard.at_place(grid, wp, dims.sp, place), wp, places, place) for place in places
    ]
    held = np.zeros(grid.rows * grid.cols, np.int64)
    for layout in layouts:
        held += np.bincount(layout.tokens_NT.numpy().ravel(), minlength=len(held))
    if len(wrong := np.flatnonzero(held != 1)):
        holders = [layout.place for layout in layouts if (layout.tokens_NT == int(wrong[0])).any()]
        raise ValueError(f"token {wrong[0]} of the image is held by the places {holders}, not by one")
    for layout in layouts:
        first = layouts[layout.place // dims.sp * dims.sp]
        if layout.shard.windows != first.shard.windows or layout.tokens_NT.shape != first.tokens_NT.shape:
            raise ValueError(
                f"places {first.place} and {layout.place} share windows, but hold different ones"
            )
    return layouts


class Plan(NamedTuple):
    """What the stages of a model exchange, whoever they are.

    Attributes:
        edges: shift of the tiling between each stage and the next.
        inner: shifts inside each stage.
        shape: microbatch B and width D of the tokens.
        dtype: their type.
    """

    edges: Sequence[int]
    inner: Sequence[Sequence[int]]
    shape: tuple[int, int]
    dtype: torch.dtype


def between_stages(layouts: Sequence[WindowLayout], shift: int, plan: Plan) -> dict[str, Exchange]:
    """Let the two sides of a link between stages say what they would send and expect, for every place.

    Returns:
        By kind, outputs "F" and gradients "B"; ranks are places.
    """
    sends: dict[str, list[Sequence[Message]]] = {"F": [], "B": []}
    receives: dict[str, list[Sequence[Message]]] = {"F": [], "B": []}
    for layout in layouts:
        x = _tokens(layout, plan)
        after, before = (Edge(layout, shift, range(len(layouts)), after=side) for side in (True, False))
        sends["F"].append(after.outgoing(x))
        receives["F"].append(before.expect(x.shape, x.dtype, x.device).messages)
        sends["B"].append(before.outgoing(x))
        receives["B"].append(after.expect(x.shape, x.dtype, x.device).messages)
    return {kind: Exchange(WORDS[kind], ends_of(sends[kind]), ends_of(receives[kind])) for kind in sends}


def inside_stage(layouts: Sequence[WindowLayout], sign: int, plan: Plan) -> Exchange:
    """Let every place say what it would send and expect in the shift inside a stage (`WindowLayout.move`)."""
    sends: list[list[Message]] = []
    receives: list[list[Message]] = []
    for layout in layouts:
        x, mover = _tokens(layout, plan), layout.movers[sign]
        for listed, tensors in (
            (sends, mover.outgoing(x)),
            (receives, mover.buffers(x.shape, x.dtype, x.device)),
        ):
            listed.append([Message(place, y, SHIFT_TAG) for place, y in tensors if place != layout.place])
    return Exchange(f"shift {sign:+d}", ends_of(sends), ends_of(receives))


def _tokens(layout: WindowLayout, plan: Plan) -> torch.Tensor:
    batch, width = plan.shape
    return torch.empty(batch, *layout.tokens_NT.shape, width, dtype=plan.dtype, device="meta")


def ends_of(by_place: Sequence[Sequence[Message]]) -> Ends:
    """List the messages of every place as one side of an exchange."""
    listed = [
        (place, message.rank, message.tag, message.tensor.nbytes)
        for place, messages in enumerate(by_place)
        for message in messages
    ]
    return Ends(*np.array(listed, np.int64).reshape(-1, 4).T)


class Meeting(NamedTuple):
    """All that ranks exchange for one microbatch, paired.

    Attributes:
        stages: the ranks of each stage, and their links.
        sender: of every link between stages, and `receiver`: global ranks.
        between: bytes of a microbatch between stages, over all ranks, and `inside`: of shifts inside them.
        inside_messages: of a microbatch, over all ranks.
        exchanges: between stages, by the stage that sends and the kind, "F" or "B".
    """

    stages: list[Stage]
    sender: Numbers
    receiver: Numbers
    between: int
    inside: int
    inside_messages: int
    exchanges: dict[tuple[int, str], Exchange]


def meet_all(seating: Seating, layouts: Sequence[WindowLayout], plan: Plan) -> Meeting:
    """Pair all sends and receives of a microbatch, between stages and inside them, over all ranks.

    Raises:
        ValueError: a message has one side only, or two that differ; names the ranks.
    """
    world, ranks = seating.dims.world, seating.ranks
    rows = np.empty(world, np.int64)
    rows[ranks.reshape(len(ranks), -1)] = np.arange(ranks[0].size)
    stages = [Stage(own, {}, {}) for own in ranks]
    plans = {shift: between_stages(layouts, shift, plan) for shift in set(plan.edges)}
    links: list[Links] = []
    exchanges = {}
    for edge, shift in enumerate(plan.edges):
        for kind, source, target in (("F", edge, edge + 1), ("B", edge + 1, edge)):
            what = f"{WORDS[kind]}s of stage {source}"
            exchange = spread(plans[shift][kind], ranks[source], ranks[target], what)
            found = pair(exchange, world)
            first = sum(len(known.sender) for known in links)
            for side, ends, numbers in (
                (stages[source].sends, exchange.sends, found.of_sends),
                (stages[target].receives, exchange.receives, found.of_receives),
            ):
                side[kind] = _by_rank(rows[ends.rank], ends.peer, numbers + first, ranks[0].size)
            links.append(found)
            exchanges[source, kind] = exchange
    inside, inside_messages = _pair_inside(seating, layouts, plan)
    empty = np.zeros(0, np.int64)
    return Meeting(
        stages=stages,
        sender=np.concatenate([empty, *(found.sender for found in links)]),
        receiver=np.concatenate([empty, *(found.receiver for found in links)]),
        between=sum(int(exchange.sends.size.sum()) for exchange in exchanges.values()),
        inside=inside,
        inside_messages=inside_messages,
        exchanges=exchanges,
    )


def _pair_inside(seating: Seating, layouts: Sequence[WindowLayout], plan: Plan) -> tuple[int, int]:
    """Pair the messages of shifts inside stages, forward and back; return bytes and messages of all ranks."""
    plans: dict[int, Exchange] = {}
    size = count = 0
    for stage, signs in enumerate(plan.inner):
        for sign in {way * sign for sign in signs for way in (1, -1)}:
            plans[sign] = plans.get(sign) or inside_stage(layouts, sign, plan)
            paired = pair_inside(seating, stage, plans[sign])
            times = sum(way * done == sign for done in signs for way in (1, -1))
            size, count = size + times * paired[0], count + times * paired[1]
    return size, count


def pair_inside(seating: Seating, stage: int, exchange: Exchange) -> tuple[int, int]:
    """Pair messages among the places of one stage, for all images; return their bytes and how many they are.

    Raises:
        ValueError: as `pair`.
    """
    own = seating.ranks[stage]
    everywhere = spread(exchange, own, own, f"{exchange.what} of stage {stage}")
    pair(everywhere, seating.dims.world)
    return int(everywhere.sends.size.sum()), len(everywhere.sends.rank)


def spread(exchange: Exchange, senders: Numbers, receivers: Numbers, what: str) -> Exchange:
    """Put ranks, given as [D, Q], for the places of an exchange."""

    def ends(one: Ends, own: Numbers, other: Numbers) -> Ends:
        times = len(own)
        rank, peer = own[:, one.rank].ravel(), other[:, one.peer].ravel()
        return Ends(rank, peer, np.tile(one.tag, times), np.tile(one.size, times))

    sends, receives = ends(exchange.sends, senders, receivers), ends(exchange.receives, receivers, senders)
    return Exchange(what, sends, receives)


def _by_rank(rows: Numbers, peers: Numbers, links: Numbers, count: int) -> Numbers:
    """List the links of every rank in the order of its peers, filled up with -1: [ranks, most]."""
    order = np.lexsort((peers, rows))
    rows, links = rows[order], links[order]
    first = np.searchsorted(rows, np.arange(count))
    column = np.arange(len(rows)) - first[rows]
    table = np.full((count, int(column.max(initial=-1)) + 1), -1, np.int64)
    table[rows, column] = links
    return table


def play(meeting: Meeting, schedule: str, count: int, policy: str) -> Counts:
    """Let all ranks go through a step of `count` microbatches; see `run_through`, whose errors it raises."""
    rows = lower(SCHEDULES[schedule](len(meeting.stages), count), policy)
    return run_through(rows, meeting.stages, meeting.sender, meeting.receiver, policy)
