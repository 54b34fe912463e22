"""The clock of a schedule: by hand, and against the longest path through any table."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swipe.schedule import POLICIES, Action, Timeline, check, one_f_one_b, simulate


@pytest.mark.parametrize("policy", POLICIES)
def test_stages_and_messages_take_their_own_time(policy: str) -> None:
    """By hand: one microbatch goes through all stages and back; the slowest stage sets the pace of many."""
    line = simulate(one_f_one_b(3, 1), policy, (1, 2, 3), (2, 4, 6), message=0.5)
    assert line.ticks == 1 + 2 + 3 + 6 + 4 + 2 + 4 * 0.5
    many = [simulate(one_f_one_b(3, m), policy, (1, 3, 1), (1, 3, 1)).ticks for m in (20, 30)]
    assert many[1] - many[0] == 10 * 6
    slower = simulate(one_f_one_b(3, 30), policy, (1, 3, 1), (1, 3, 1), message=0.1)
    assert many[1] < slower.ticks <= many[1] + 0.1 * 4 * 30
    assert slower.bubble == pytest.approx(1 - 30 * 10 / (3 * slower.ticks))


def test_times_that_cannot_be() -> None:
    table = one_f_one_b(2, 2)
    with pytest.raises(ValueError, match="3 forward times for 2 stages"):
        simulate(table, forward=(1, 1, 1))
    for times in ({"backward": (1.0, 0.0)}, {"message": -1.0}):
        with pytest.raises(ValueError, match="every pass must take some time"):
            simulate(table, **times)  # type: ignore[arg-type]


@st.composite
def tables(draw: st.DrawFn) -> list[list[Action]]:
    """Any table that `check` accepts: stages differ in their order of kinds, and in splitting backwards."""
    stages, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    table = []
    for _ in range(stages):
        kinds = draw(st.sampled_from(["FB", "FIW"]))
        done = dict.fromkeys(kinds, 0)
        actions: list[Action] = []
        while len(actions) < len(kinds) * microbatches:
            before = {kind: done[previous] for previous, kind in pairwise(kinds)} | {"F": microbatches}
            kind = draw(st.sampled_from([kind for kind in kinds if done[kind] < before[kind]]))
            actions.append(Action(kind, done[kind]))
            done[kind] += 1
        table.append(actions)
    return table


def longest_path(table: list[list[Action]]) -> dict[tuple[int, Action], float] | None:
    """When each action ends at the earliest, by recursion over what it needs; None if that is circular."""
    cost = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    open_actions = set()

    @cache
    def end(stage: int, action: Action) -> float:
        if (stage, action) in open_actions:
            raise RecursionError
        open_actions.add((stage, action))
        needs = [(stage, earlier) for earlier in table[stage][: table[stage].index(action)]][-1:]
        other = stage - 1 if action.kind == "F" else stage + 1
        if action.kind != "W" and 0 <= other < len(table):
            kinds = "F" if action.kind == "F" else "BI"
            needs += [
                (other, a) for a in table[other] if a.kind in kinds and a.microbatch == action.microbatch
            ]
        start = max((end(*need) for need in needs), default=0.0)
        open_actions.remove((stage, action))
        return start + cost[action.kind]

    try:
        return {
            (stage, action): end(stage, action) for stage, actions in enumerate(table) for action in actions
        }
    except RecursionError:
        return None


def outcome(table: list[list[Action]], policy: str) -> Timeline | None:
    """Simulate; None for a deadlock."""
    try:
        return simulate(table, policy)
    except ValueError:
        return None


@given(table=tables())
@settings(max_examples=150, deadline=None)
def test_clock_is_the_longest_path(table: list[list[Action]]) -> None:
    """Async: each action ends when the longest chain before it does, deadlock exactly where that is a circle.

    Blocking messages never make anything earlier.
    """
    check(table)
    expected = longest_path(table)
    if expected is None:
        assert not any(outcome(table, policy) for policy in POLICIES)
        return
    timeline = simulate(table)
    assert {(span.stage, span.action): span.end for span in timeline.spans} == expected
    batched, parity = outcome(table, "batched"), outcome(table, "parity")
    assert batched or not parity, "a batch posts at once what parity posts one by one"
    for span in [*(batched.spans if batched else []), *(parity.spans if parity else [])]:
        assert span.end >= expected[span.stage, span.action]
