"""Pipeline schedules: order against torch's own, bubbles against formulas, no deadlock under any policy.

All pure Python and small; only the oracle imports torch, and starts no process.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swipe.schedule import (
    POLICIES,
    SCHEDULES,
    Action,
    Step,
    check,
    gpipe,
    lower,
    neighbour,
    one_f_one_b,
    render,
    simulate,
    zero_bubble,
)

SIZES = list(product(range(1, 7), range(1, 10)))


def row(text: str) -> list[Action]:
    """Read "F0 B0" as actions."""
    return [Action(word[0], int(word[1:])) for word in text.split()]


def rows(*texts: str) -> list[list[Action]]:
    """Read one row per stage."""
    return [row(text) for text in texts]


def words(steps: Sequence[Step]) -> str:
    """Write a lowered row: actions as they are, a transfer as [>sent <needing what is received]."""

    def word(step: Step) -> str:
        if isinstance(step, Action):
            return str(step)
        return "[" + " ".join([f">{a}" for a in step.sends] + [f"<{a}" for a in step.receives]) + "]"

    return " ".join(word(step) for step in steps)


# Order


def executed_by_torch(kind: Any, stage: int, stages: int, microbatches: int) -> str:
    """Let a schedule of torch drive a stage without neighbours and note what it does."""
    done: list[str] = []
    fake = mock.MagicMock(num_stages=stages, stage_index=stage, is_last=False)  # False: computes no loss
    for ways in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(fake, ways).return_value = []
    fake.forward_one_chunk.side_effect = lambda m, *_, **__: done.append(f"F{m}")
    fake.backward_one_chunk.side_effect = lambda m, *_, **__: done.append(f"B{m}")
    schedule = kind(fake, microbatches)
    schedule._initialize_stage, schedule._has_backward = mock.MagicMock(), True
    schedule._step_microbatches([()] * microbatches, [{}] * microbatches)
    return " ".join(done)


@pytest.mark.parametrize(("ours", "theirs"), [(gpipe, "ScheduleGPipe"), (one_f_one_b, "Schedule1F1B")])
def test_order_is_what_torch_executes(ours: Any, theirs: str) -> None:
    """Stage by stage, wherever torch has a schedule: it asks for at least as many microbatches as stages."""
    from torch.distributed import pipelining

    for stages, microbatches in [(1, 1), (1, 4), (2, 2), (2, 5), (3, 4), (4, 4), (4, 9), (6, 8)]:
        for stage, actions in enumerate(ours(stages, microbatches)):
            executed = executed_by_torch(getattr(pipelining, theirs), stage, stages, microbatches)
            assert " ".join(map(str, actions)) == executed


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (2, 6), (3, 6), (4, 4), (4, 8), (6, 12)])
def test_zero_bubble_is_the_table_of_torch(stages: int, microbatches: int) -> None:
    """Torch's interleaved zero-bubble schedule with one stage per rank; the text has torch's form, "2F0"."""
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble

    fake = mock.create_autospec(PipelineStage, instance=True)
    fake.group_rank, fake.group_size, fake.num_stages, fake.submod = 0, stages, stages, None
    order = ScheduleInterleavedZeroBubble([fake], microbatches).pipeline_order
    for stage, actions in enumerate(zero_bubble(stages, microbatches)):
        theirs = [str(action) for action in order[stage] if action is not None]
        assert [action.at(stage) for action in actions] == [t for t in theirs if t[1] in "FIW"]


def test_fewer_microbatches_than_stages() -> None:
    """Torch has no such schedule, so by hand."""
    assert one_f_one_b(4, 2) == rows("F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1")
    assert zero_bubble(3, 1) == rows("F0 I0 W0", "F0 I0 W0", "F0 I0 W0")
    assert zero_bubble(3, 2) == rows("F0 F1 I0 W0 I1 W1", "F0 F1 I0 I1 W0 W1", "F0 I0 F1 I1 W0 W1")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(0, 1), (2, 0), (-1, 3)])
def test_impossible_schedules_are_refused(name: str, stages: int, microbatches: int) -> None:
    with pytest.raises(ValueError, match=f"no schedule for {stages} stages and {microbatches} microbatches"):
        SCHEDULES[name](stages, microbatches)


# Time and memory


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_deadlock_and_the_bubble_of_the_papers(name: str, policy: str) -> None:
    """Every size: it runs to the end, and GPipe and 1F1B idle (P-1)/(M+P-1) under all policies."""
    for stages, microbatches in SIZES:
        table = SCHEDULES[name](stages, microbatches)
        timeline = simulate(table, policy)
        assert [[s.action for s in timeline.spans if s.stage == stage] for stage in range(stages)] == table
        if name != "zero-bubble":
            assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
            assert timeline.ticks == 3 * (microbatches + stages - 1)
        else:  # blocking messages cost it time, but never more than 1F1B takes
            assert timeline.ticks <= 3 * (microbatches + stages - 1)
            if policy == "async" and microbatches >= stages:
                assert timeline.ticks == 3 * microbatches + stages - 1
                assert timeline.bubble == pytest.approx((stages - 1) / (3 * microbatches + stages - 1))


def test_bubbles_at_scale() -> None:
    """20 stages, 100 or 140 microbatches: 16.0 and 11.9 % for 1F1B, a third of the idle time with ZB-H1."""
    assert simulate(one_f_one_b(20, 100)).bubble == pytest.approx(0.160, abs=5e-4)
    assert simulate(one_f_one_b(20, 140)).bubble == pytest.approx(0.119, abs=6e-4)
    assert simulate(zero_bubble(20, 140)).bubble == pytest.approx(19 / 439)


@given(stages=st.integers(1, 8), extra=st.integers(0, 12), times=st.tuples(*[st.floats(0.1, 10)] * 2))
@settings(max_examples=50, deadline=None)
def test_bubble_of_1f1b_does_not_depend_on_durations(
    stages: int, extra: int, times: tuple[float, float]
) -> None:
    """(P-1)/(M+P-1) for any forward and backward time, if M >= P."""
    timeline = simulate(one_f_one_b(stages, stages + extra), "async", *times)
    assert timeline.bubble == pytest.approx((stages - 1) / (2 * stages + extra - 1), abs=1e-9)


def test_microbatches_in_flight() -> None:
    """1F1B and zero-bubble: stages - stage; GPipe: all. Zero-bubble holds no more than 1F1B's first stage."""
    for stages, microbatches in SIZES:
        few = [min(stages - stage, microbatches) for stage in range(stages)]
        line = simulate(one_f_one_b(stages, microbatches))
        assert line.in_flight == line.held == few
        line = simulate(gpipe(stages, microbatches))
        assert line.in_flight == line.held == [microbatches] * stages
        line = simulate(zero_bubble(stages, microbatches))
        assert line.in_flight == few
        assert line.held == [min(stages, microbatches)] * stages


# What neighbours exchange


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("policy", POLICIES)
def test_transfers_fit_together(name: str, policy: str) -> None:
    """Every message is sent once, after it is made, and received before it is needed, in the order sent."""
    for stages, microbatches in SIZES:
        table = SCHEDULES[name](stages, microbatches)
        program = lower(table, policy)
        links: dict[tuple[str, int, int], list[int]] = {}
        for stage, steps in enumerate(program):
            assert [step for step in steps if isinstance(step, Action)] == table[stage]
            place = {step: index for index, step in enumerate(steps)}
            open_receives = 0
            for index, step in enumerate(steps):
                if isinstance(step, Action):
                    open_receives -= neighbour("receive", step, stage, stages) is not None
                    continue
                assert step.sends or step.receives
                open_receives += len(step.receives)
                assert open_receives <= (2 if policy == "async" else 1)
                assert all(place[action] < index for action in step.sends)
                assert all(place[action] > index for action in step.receives)
                for verb, actions in (("send", step.sends), ("receive", step.receives)):
                    for action in actions:
                        peer = neighbour(verb, action, stage, stages)
                        assert peer is not None
                        ends = (stage, peer) if verb == "send" else (peer, stage)
                        links.setdefault((verb, *ends), []).append(action.microbatch)
        for stage, step in product(range(stages), (1, -1)):
            if 0 <= stage + step < stages:
                assert links["send", stage, stage + step] == list(range(microbatches))
                assert links["receive", stage, stage + step] == list(range(microbatches))


def test_lowered_1f1b() -> None:
    """By hand: blocking policies pair send and receive, async posts receives one computation earlier."""
    table = one_f_one_b(3, 3)
    for policy in ("batched", "parity"):
        assert [words(steps) for steps in lower(table, policy)] == [
            "F0 [>F0] F1 [>F1] F2 [>F2 <B0] B0 [<B1] B1 [<B2] B2",
            "[<F0] F0 [>F0 <F1] F1 [>F1 <B0] B0 [>B0 <F2] F2 [>F2 <B1] B1 [>B1 <B2] B2 [>B2]",
            "[<F0] F0 B0 [>B0 <F1] F1 B1 [>B1 <F2] F2 B2 [>B2]",
        ]
    assert [words(steps) for steps in lower(table, "async")] == [
        "F0 [>F0] F1 [>F1 <B0] F2 [>F2 <B1] B0 [<B2] B1 B2",
        "[<F0 <F1] F0 [>F0 <B0] F1 [>F1 <F2] B0 [>B0 <B1] F2 [>F2 <B2] B1 [>B1] B2 [>B2]",
        "[<F0] F0 [<F1] B0 [>B0] F1 [<F2] B1 [>B1] F2 B2 [>B2]",
    ]


def test_lowering_avoids_deadlocks() -> None:
    """A gradient that answers the send comes after it; a forward is received before the W's in its way."""
    assert [words(steps) for steps in lower(gpipe(2, 1), "parity")] == [
        "F0 [>F0] [<B0] B0",
        "[<F0] F0 B0 [>B0]",
    ]
    assert (
        words(lower(zero_bubble(2, 3), "batched")[1])
        == "[<F0] F0 I0 [>I0 <F1] F1 I1 [>I1 <F2] W0 F2 I2 [>I2] W1 W2"
    )
    # In async a gradient is not awaited before its forward, which tells its shape.
    assert words(lower(one_f_one_b(2, 1), "async")[0]) == "F0 [>F0 <B0] B0"


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="'eager'; choose from async, batched, parity"):
        lower(gpipe(2, 2), "eager")


# Tables that are wrong


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ([], "no actions"),
        ([[], []], "no actions"),
        (rows("F0 B0 F1 B1", "F0 B0"), "stage 1 runs microbatch 1 as ''"),
        (rows("F0 B0 F2 B2"), "stage 0 runs microbatch 1 as ''"),
        (rows("F0 F1 B0"), "stage 0 runs microbatch 1 as 'F'"),
        (rows("F0 B0", "B0 F0"), "stage 1 runs microbatch 0 as 'B F'"),
        (rows("F0 B0 F0"), "stage 0 runs microbatch 0 as 'F B F'"),
        (rows("F0 W0 I0"), "as 'F W I', not as 'F B' or 'F I W'"),
        (rows("F0 I0"), "as 'F I'"),
        (rows("F0 B0 W0"), "as 'F B W'"),
        (rows("F0 X0"), "as 'F X'"),
        ([[Action("F", -1), Action("B", -1)]], "stage 0 runs microbatch 0 as ''"),
        (rows("F0 F1 B0 B1", "F1 F0 B0 B1"), r"stage 1 does F in the order \[1, 0\], stage 0 in \[0, 1\]"),
        (rows("F0 F1 B0 B1", "F0 F1 I1 W1 B0"), r"stage 1 does B in the order \[1, 0\], stage 0 in \[0, 1\]"),
    ],
)
def test_wrong_tables_are_refused(table: list[list[Action]], told: str) -> None:
    """By `check`, and so by all that take a table."""
    for use in (check, simulate, render, lambda t: lower(t, "batched")):
        with pytest.raises(ValueError, match=told):
            use(table)


def test_split_and_whole_backwards_may_be_mixed() -> None:
    """A first stage that sends no gradient has no use for I and W apart."""
    assert simulate(rows("F0 B0", "F0 I0 W0"), "parity").ticks == 5


def test_deadlock_names_every_stage() -> None:
    """Stage 0 wants the gradient before it goes on, stage 1 wants the second microbatch first."""
    table = rows("F0 B0 F1 B1", "F0 F1 B0 B1", "F0 F1 B0 B1")
    check(table)
    told = (
        "deadlocks with async messages: stage 0 waits for stage 1 to send the gradient of microbatch 0; "
        "stage 1 waits for stage 0 to send the output of microbatch 1; "
        "stage 2 waits for stage 1 to send the output of microbatch 1"
    )
    for use in (simulate, render):
        with pytest.raises(ValueError, match=told):
            use(table)


@pytest.mark.parametrize("policy", ["batched", "parity"])
def test_deadlock_of_blocking_messages_only(policy: str) -> None:
    """A stage that runs further ahead than its neighbour takes in: fine while sends are buffered."""
    table = rows("F0 F1 F2 F3 B0 B1 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3")
    assert simulate(table).ticks == 15
    told = (
        f"with {policy} messages: stage 0 waits for stage 1 to receive the output of microbatch 2; "
        "stage 1 waits for stage 0 to receive the gradient of microbatch 0"
    )
    with pytest.raises(ValueError, match=told):
        simulate(table, policy)


# Drawing


def test_render_1f1b() -> None:
    """The drawing of the module's description."""
    assert render(simulate(one_f_one_b(3, 4), backward=1)).splitlines() == [
        "stage 0 | F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3",
        "stage 1 | .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .",
        "stage 2 | .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .",
    ]


def test_render_durations() -> None:
    """A table has backwards of two ticks; the tick of a split backward is half of it; ragged times fit."""
    assert render(gpipe(2, 2)).splitlines() == [
        "stage 0 | F0 F1 .  .  .  B0 -  B1 -",
        "stage 1 | .  F0 F1 B0 -  B1 -  .  .",
    ]
    assert render(simulate(zero_bubble(2, 2), forward=2)).splitlines() == [
        "stage 0 | F0 -  F1 -  .  I0 W0 .  I1 W1",
        "stage 1 | .  .  F0 -  I0 F1 -  I1 W0 W1",
    ]
    ragged = render(simulate(one_f_one_b(2, 2), backward=2.5)).splitlines()
    assert ragged[1] == "stage 1 | .  F0 B0 -  F1 B1 -  -  .  ."
    assert len({line.index("|") for line in render(gpipe(11, 1)).splitlines()}) == 1, "stage 9 and stage 10"
