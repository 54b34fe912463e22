"""Rehearsals: sound meshes pass, with the counts of formulas; faults are found, and the ranks named."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from swipe import layout as layouts_file
from swipe import rehearsal
from swipe.backend import pretending
from swipe.collectives import HEADER_TAG, Message, Pending, barrier, exchange
from swipe.edge import Edge
from swipe.groups import make_groups
from swipe.layout import WindowLayout
from swipe.mesh import Coordinate, ParallelDims
from swipe.pipeline import Microbatch
from swipe.rehearsal import Meeting, Plan, check_groups, lay_out, meet_all, play, seat_all
from swipe.runthrough import Ends, Exchange, pair, run_through
from swipe.schedule import POLICIES, SCHEDULES, Action, Transfer, lower, simulate
from swipe.shift import Part, ShiftPlan, shift_plan
from swipe.windows import WindowGrid, WindowShard
from tests.harness import run_distributed
from tests.swipe.meshes import GRID as SMALL
from tests.swipe.meshes import WIDTH, draw, linked
from tests.swipe.meshes import Stage as MeshStage

GRID = WindowGrid(24, 48, 12)
DIMS = ParallelDims(2, 1, 2, 3, 2)


def plan(dims: ParallelDims, inner: Sequence[int] = ()) -> Plan:
    """Shift on every second edge, there and back; one stage has shifts inside."""
    edges = [(1, -1)[edge % 2] for edge in range(dims.pp - 1)]
    return Plan(edges, [inner, *([()] * (dims.pp - 1))], (1, 8), torch.float32)


def meeting(dims: ParallelDims = DIMS, inner: Sequence[int] = ()) -> Meeting:
    """All that small ranks exchange."""
    return meet_all(seat_all(dims), lay_out(GRID, dims), plan(dims, inner))


@pytest.mark.parametrize(
    "dims",
    [
        ParallelDims(),
        ParallelDims(1, 2, 2, 1, 4),
        DIMS,
        ParallelDims(1, 2, 4, 2, 12),
        ParallelDims(3, 2, 1, 2, 1),
        ParallelDims(1, 1, 1, 4, 3),
    ],
    ids=str,
)
def test_sound_meshes_pass_with_the_bytes_of_the_formulas(dims: ParallelDims) -> None:
    """Between stages M bytes a microbatch and way, shifted or not; inside, what stays is not sent."""
    assert check_groups(seat_all(dims))["pp"] == dims.world // dims.pp
    found = meeting(dims, (1, -1))
    tokens = 24 * 48 * 8 * 4  # bytes of an image's
    assert found.between == dims.dp * tokens * 2 * (dims.pp - 1)
    stays = 1 / (min(2, dims.wp_y) * min(2, dims.wp_x)) if dims.sp % 2 else 0
    assert found.inside == dims.dp * tokens * 4 * (1 - stays)
    for schedule, policy in product(("1f1b", "gpipe"), POLICIES):
        played = play(found, schedule, 5, policy)
        assert played == (dims.world * 2 * 5, 5 * len(found.sender))


def real_step(dims: ParallelDims, count: int) -> dict[str, list[tuple[int, int, int]]]:
    """Run a step of `count` microbatches and a shift; return (peer, tag, bytes) of this rank's messages."""
    groups = make_groups(dims, dist.get_rank(), torch.device("cpu"))
    stage, layout = dims.coordinate(groups.rank).pp, WindowLayout.of(SMALL, groups)
    posted: dict[str, list[tuple[int, int, int]]] = {"sends": [], "receives": []}

    def post(sends: Sequence[Message], receives: Sequence[Message], *args: Any, **options: Any) -> Pending:
        for side, messages in (("sends", sends), ("receives", receives)):
            posted[side] += [(m.rank, m.tag, m.tensor.nbytes) for m in messages if m.tag != HEADER_TAG]
        return exchange(sends, receives, *args, **options)

    with mock.patch("swipe.pipeline.exchange", post), mock.patch("swipe.layout.exchange", post):
        pipeline = linked(MeshStage(stage, dims.pp), SMALL, groups, (1,))
        drawn = [draw(m, 2) for m in range(count)]
        tokens = (Microbatch(layout.to_windows(x), (t,), layout.to_windows(y)) for x, y, t in drawn)
        pipeline.step(tokens, count)
        layout.shift(torch.zeros(2, *layout.tokens_NT.shape, WIDTH, dtype=torch.float64), 1)
    return posted


def test_a_real_step_sends_what_was_rehearsed() -> None:
    """Eight ranks over gloo: every message between stages and in a shift, by peer, stream and bytes."""
    dims, count = ParallelDims(1, 2, 1, 2, 2), 3
    posted = run_distributed(real_step, dims.world, dims, count)
    seating, small = seat_all(dims), lay_out(SMALL, dims)
    found = Plan([1], [(), ()], (2, WIDTH), torch.float64)
    exchanges = [*meet_all(seating, small, found).exchanges.values()] * count
    for own in seating.ranks:
        exchanges.append(rehearsal.spread(rehearsal.inside_stage(small, 1, found), own, own, "shift"))
    for rank, side in product(range(dims.world), ("sends", "receives")):
        expected = [
            tuple(int(column[i]) for column in ends[1:])
            for ends in (getattr(one, side) for one in exchanges)
            for i in np.flatnonzero(ends.rank == rank)
        ]
        assert sorted(posted[rank][side]) == sorted(expected), (rank, side)


def deadlocks(run: Callable[..., object], *args: object) -> bool:
    """Whether it ends in a deadlock."""
    try:
        run(*args)
    except ValueError as error:
        if "deadlock" not in str(error):
            raise
        return True
    return False


def test_run_through_agrees_with_the_clock_on_any_table() -> None:
    """Stages that go through the microbatches each in a way of its own: some deadlock, some do not."""
    stages, count = 3, 3
    found, chance, ends = meeting(ParallelDims(1, 1, 1, stages, 1)), random.Random(0), []
    for _ in range(60):
        table = []
        for _ in range(stages):
            ahead, row = 0, []
            for m in range(count):
                more = chance.randint(max(ahead, m + 1), count)
                row += [Action("F", f) for f in range(ahead, more)] + [Action("B", m)]
                ahead = more
            table.append(row)
        for policy in POLICIES:
            rows = lower(table, policy)
            ends.append(deadlocks(run_through, rows, found.stages, found.sender, found.receiver, policy))
            assert ends[-1] == deadlocks(simulate, table, policy), (table, policy)
    assert 20 < sum(ends) < len(ends) - 20


def wrong_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two coordinates lead to one rank."""
    right = ParallelDims.rank
    monkeypatch.setattr(ParallelDims, "rank", lambda self, at: right(self, Coordinate(0, *at[1:])))


def wrong_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 7 thinks that it shares windows with others."""
    right = ParallelDims.along
    wrong = lambda self, rank, *axes: right(self, rank + (rank == 7) * 2, *axes)  # noqa: E731
    monkeypatch.setattr(ParallelDims, "along", wrong)


def wrong_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Place 3 holds what place 1 holds."""
    right = WindowShard.at_place.__func__  # type: ignore[attr-defined]
    wrong = lambda cls, grid, wp, sp, place: right(cls, grid, wp, sp, place % 3 if place == 3 else place)  # noqa: E731
    monkeypatch.setattr(WindowShard, "at_place", classmethod(wrong))
    monkeypatch.setattr(WindowLayout, "__init__", _unchecked(WindowLayout.__init__))


def _unchecked(init: Any) -> Any:
    def wrong(self: Any, shard: WindowShard, wp: Any, ranks: Any, place: int) -> None:
        init(self, shard, wp, ranks, place % 3 if place == 3 else place)
        self.place = place

    return wrong


def wrong_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Place 2 sends to place 0 what is for another."""

    def wrong(grid: WindowGrid, wp: tuple[int, int], sp: int, place: int, sign: int) -> ShiftPlan:
        found = shift_plan(grid, wp, sp, place, sign)
        if place != 2 or sign != 1:
            return found
        return found._replace(sends=tuple(Part((part.place + 1) % 4, part.pieces) for part in found.sends))

    monkeypatch.setattr(layouts_file, "shift_plan", wrong)


def lost_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Place 1 sends one piece less than is expected."""

    def wrong(grid: WindowGrid, wp: tuple[int, int], sp: int, place: int, sign: int) -> ShiftPlan:
        found = shift_plan(grid, wp, sp, place, sign)
        if place != 1 or sign != -1:
            return found
        return found._replace(sends=tuple(Part(part.place, part.pieces[1:]) for part in found.sends))

    monkeypatch.setattr(layouts_file, "shift_plan", wrong)


def swapped_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage sends outputs in the stream of gradients."""

    class Wrong(Edge):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._tags = self._tags[::-1] if self.after else self._tags

    monkeypatch.setattr(rehearsal, "Edge", Wrong)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (wrong_seat, r"rank 12 is at Coordinate\(dp=1, .*\), where rank 0 is"),
        (wrong_group, r"rank 7 shares sp with ranks \[8, 9\]"),
        (wrong_windows, r"token \d+ of the image is held by the places \[0, 3\], not by one"),
        (
            wrong_plan,
            r"outputs of stage 0: from rank 6 to rank \d+ \(tag 2\) is sent and not expected; .* and",
        ),
        (lost_piece, r"gradients of stage 1: rank 3 sends 3,456 bytes to rank 0, which expects 4,608"),
        (
            swapped_tags,
            r"outputs of stage 0: from rank 0 to rank \d+ \(tag 3\) is expected with tag 2; and 15 more",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_plan_is_found(fault: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(ValueError, match=says):
        seating = seat_all(DIMS)
        check_groups(seating)
        meet_all(seating, lay_out(GRID, DIMS), plan(DIMS))


def changed(policy: str, stage: int, without: Transfer, instead: Transfer) -> list[list[Any]]:
    """A schedule in which one transfer is another."""
    rows = [list(row) for row in lower(SCHEDULES["1f1b"](3, 3), policy)]
    rows[stage][rows[stage].index(without)] = instead
    return rows


CIRCLE = (
    "rank (.*) waits for rank (.*) to .* of microbatch .; rank .* waits for rank .* to .* of microbatch ."
)
F0, F1, B0, B1 = (Action(kind, m) for kind in "FB" for m in (0, 1))


def test_messages_that_nobody_waits_for_and_circles_are_found() -> None:
    """On every rank of a stage, and on a single one: the error names ranks and microbatch."""
    found = meeting()
    first, second, nothing = Transfer((F0,), ()), Transfer((F1,), ()), Transfer((), ())
    for policy, stage, without, instead, says in (
        (
            "batched",
            1,
            Transfer((), (F0,)),
            nothing,
            "rank 2 is to compute F0 on stage 1, but has not posted",
        ),
        ("batched", 0, first, nothing, "sends the output of microbatch 1 as number 0, rank . expects"),
        ("batched", 0, second, nothing, "sends the output of microbatch 2 as number 1, rank . expects"),
        (
            "parity",
            2,
            Transfer((B0,), (F1,)),
            Transfer((), (F1,)),
            "the gradient of microbatch 1 as number 0",
        ),
    ):
        rows = changed(policy, stage, without, instead)
        with pytest.raises(ValueError, match=says):
            run_through(rows, found.stages, found.sender, found.receiver, policy)
    last = lower(SCHEDULES["1f1b"](3, 1), "async")
    last[2] = [step for step in last[2] if step != Transfer((B0,), ())]
    with pytest.raises(
        ValueError, match="rank [01278] waits for rank . to send the gradient of microbatch 0"
    ):
        run_through(last, found.stages, found.sender, found.receiver, "async")
    circle = [[F0, B0, F1, B1], [F0, F1, B0, B1], [F0, F1, B0, B1]]
    for policy in POLICIES:
        with pytest.raises(ValueError, match=f"deadlock with {policy} messages: {CIRCLE}"):
            run_through(lower(circle, policy), found.stages, found.sender, found.receiver, policy)
    link = int(found.stages[1].receives["F"][5, 0])
    found.stages[1].receives["F"][5, 0] = -1  # of one rank
    says = (
        f"rank {found.sender[link]} waits for rank {found.receiver[link]} to receive the output of microbatch"
    )
    for policy in POLICIES:
        with pytest.raises(ValueError, match=says):
            play(found, "1f1b", 4, policy)


def test_pretending_to_be_a_rank_ends_with_its_context() -> None:
    """Also with an error; meanwhile groups of ranks that are not there are made, and their calls return."""
    with pytest.raises(ValueError, match="enough"), pretending(7, 120_960):
        groups = make_groups(ParallelDims(14, 6, 6, 20, 12), 7, torch.device("cpu"))
        assert groups.sequence.ranks == tuple(range(12)) and len(groups.saving[0].ranks) == 6_048
        barrier(groups.world, "nobody")
        raise ValueError("enough")
    assert not dist.is_initialized()


def test_pairs() -> None:
    """What one side lacks, has twice, or sends to nobody."""

    def ends(*rows: tuple[int, int, int, int]) -> Ends:
        return Ends(*np.array(rows, np.int64).reshape(-1, 4).T)

    sound = Exchange("x", ends((0, 1, 2, 8), (2, 1, 2, 8)), ends((1, 2, 2, 8), (1, 0, 2, 8)))
    links = pair(sound, 3)
    assert links.of_sends.tolist() == [0, 1] and links.of_receives.tolist() == [1, 0]
    assert links.sender.tolist() == [0, 2] and links.receiver.tolist() == [1, 1]
    for sends, receives, says in (
        (ends(), ends((1, 0, 2, 8)), r"x: from rank 0 to rank 1 \(tag 2\) is expected and not sent$"),
        (ends((0, 1, 2, 8)), ends(), r"from rank 0 to rank 1 \(tag 2\) is sent and not expected$"),
        (ends((0, 1, 2, 8), (0, 1, 2, 8)), ends((1, 0, 2, 8)), "one rank sends twice: from rank 0 to rank 1"),
        (ends((0, 3, 2, 8)), ends(), "rank 0 sends to rank 3, itself or none of 3"),
        (ends(), ends((1, 1, 2, 8)), "rank 1 receives from rank 1, itself"),
    ):
        with pytest.raises(ValueError, match=says):
            pair(Exchange("x", sends, receives), 3)
