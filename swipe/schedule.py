"""Pipeline schedules as tables: what each stage computes and in which order, checkable without a process.

A table has one list of actions per stage. 1F1B, 3 stages, 4 microbatches, backwards as long as forwards:

    stage 0 | F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
    stage 1 | .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
    stage 2 | .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

F forward; B backward, whole, or split into I (gradient of the input) and W (gradient of the weights).
`lower` adds what neighbours exchange, `simulate` runs the result on a clock and finds deadlocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias


class Action(NamedTuple):
    """One computation of a stage: kind "F", "B", "I" or "W" of a microbatch."""

    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}"

    def at(self, stage: int) -> str:
        """Write the action with its stage, as torch.distributed.pipelining does: "2F0"."""
        return f"{stage}{self}"


class Transfer(NamedTuple):
    """Between two computations: `sends`, whose results leave, and `receives`, which need what arrives."""

    sends: tuple[Action, ...]
    receives: tuple[Action, ...]


class Span(NamedTuple):
    """When a stage ran an action, in the time unit of `simulate`."""

    stage: int
    action: Action
    start: float
    end: float


class Timeline(NamedTuple):
    """A table run on a clock.

    `in_flight`: per stage, the most microbatches between F and the end of B or I, with all activations.
    `held`: the same until B or W, so with what a split backward keeps for the gradient of the weights.
    `bubble`: the idle share over all stages. `ticks`: time from the first start to the last end.
    """

    spans: list[Span]
    in_flight: list[int]
    held: list[int]
    bubble: float
    ticks: float


Table: TypeAlias = Sequence[Sequence[Action]]
Step: TypeAlias = Action | Transfer
_Places: TypeAlias = dict[tuple[bool, int], int]  # (is forward, microbatch) -> where in the row of a stage
_Event: TypeAlias = "tuple[list[_Side], list[_Side], Action | None]"  # see _events


def one_f_one_b(stages: int, microbatches: int) -> list[list[Action]]:
    """Alternate forward and backward: 1F1B (Narayanan et al. 2021, arXiv 2104.04473).

    A stage runs `stages - stage - 1` forwards ahead, then alternates, then drains, so at most
    `stages - stage` microbatches are in flight. One stage is gradient accumulation: F0 B0 F1 B1 ...

    Raises:
        ValueError: no stage, or nothing to do.
    """
    if stages < 1 or microbatches < 1:
        raise ValueError(f"no schedule for {stages} stages and {microbatches} microbatches: both must be > 0")
    table = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, microbatches)
        actions = [Action("F", m) for m in range(ahead)]
        for m in range(microbatches - ahead):
            actions += [Action("F", ahead + m), Action("B", m)]
        table.append(actions + [Action("B", m) for m in range(microbatches - ahead, microbatches)])
    return table


def gpipe(stages: int, microbatches: int) -> list[list[Action]]:
    """Do all forwards, then all backwards, with all in flight (Huang et al. 2019, arXiv 1811.06965).

    Raises ValueError as `one_f_one_b` does.
    """
    return [sorted(row, key=lambda action: action.kind == "B") for row in one_f_one_b(stages, microbatches)]


def zero_bubble(stages: int, microbatches: int) -> list[list[Action]]:
    """Fill idle time of 1F1B with gradients of weights: ZB-H1 (Qi et al. 2023, arXiv 2401.10241).

    Each B becomes I, and its W comes `stage` microbatches later, so that gradients travel sooner. In flight
    are at most `stages - stage` as in 1F1B; with those that wait for W every stage holds at most `stages`,
    what the first stage of 1F1B holds. Raises ValueError as `one_f_one_b` does.
    """
    table = []
    for stage, whole in enumerate(one_f_one_b(stages, microbatches)):
        actions = []
        for kind, m in whole:
            actions.append(Action("I" if kind == "B" else kind, m))
            if kind == "B" and m >= stage:
                actions.append(Action("W", m - stage))
        table.append(actions + [Action("W", m) for m in range(max(0, microbatches - stage), microbatches)])
    return table


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "zero-bubble": zero_bubble}
POLICIES = ("async", "batched", "parity")


def neighbour(verb: str, action: Action, stage: int, stages: int) -> int | None:
    """Name the stage to "send" the result of an action to, or to "receive" from what it needs.

    Outputs of F go to the next stage, gradients from B and I to the previous one; None at the ends and for W.
    """
    step = {"F": 1, "B": -1, "I": -1}.get(action.kind, stages)
    peer = stage + (step if verb == "send" else -step)
    return peer if 0 <= peer < stages else None


def check(table: Table) -> None:
    """Check that every stage runs each microbatch as F B or F I W, all in one order.

    One order for all, since a link delivers as was sent. `simulate` finds stages that wait in a circle.

    Raises:
        ValueError: what is missing, doubled or out of order, and on which stage.
    """
    microbatches = {action.microbatch for actions in table for action in actions}
    if not microbatches:
        raise ValueError("the schedule has no actions")
    for stage, actions in enumerate(table):
        runs: dict[int, list[str]] = {}
        for action in actions:
            runs.setdefault(action.microbatch, []).append(action.kind)
        for m in range(len(microbatches)):
            if (run := " ".join(runs.get(m, []))) not in ("F B", "F I W"):
                raise ValueError(f"stage {stage} runs microbatch {m} as {run!r}, not as 'F B' or 'F I W'")
        for kinds in ("F", "BI"):
            here, first = ([a.microbatch for a in row if a.kind in kinds] for row in (actions, table[0]))
            if here != first:
                raise ValueError(f"stage {stage} does {kinds[0]} in the order {here}, stage 0 in {first}")


def lower(table: Table, policy: str) -> list[list[Step]]:
    """Put between the computations of each stage what it exchanges with its neighbours.

    A result is sent right after the action that made it. What an action needs is received
        "batched", "parity": right before it, in one transfer with the send of the action before it. But, lest
            neighbours deadlock, a forward after W's is received before those, so that they meet as in 1F1B,
            and what can only come as an answer to the send is a transfer of its own.
        "async": one computation earlier, but not before the forward of the same microbatch, and waited for
            right before the action; at most two are open. The two ways of a link need a group or queue each.

    Raises:
        ValueError: the policy is unknown, or the table fails `check`.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; choose from {', '.join(POLICIES)}")
    check(table)
    places = [{(a.kind == "F", a.microbatch): i for i, a in enumerate(row) if a.kind != "W"} for row in table]
    return [_lower_stage(list(row), stage, places, policy == "async") for stage, row in enumerate(table)]


def _lower_stage(actions: list[Action], stage: int, places: Sequence[_Places], early: bool) -> list[Step]:
    stages = len(places)
    receives: list[list[Action]] = [[] for _ in range(len(actions) + 1)]  # [i]: posted right before action i
    for index, action in enumerate(actions):
        post = index - 1 if early and index and actions[index - 1].microbatch != action.microbatch else index
        while not early and action.kind == "F" and post > 0 and actions[post - 1].kind == "W":
            post -= 1
        if neighbour("receive", action, stage, stages) is not None:
            receives[post].append(action)
    steps: list[Step] = []
    for index, needs in enumerate(receives):
        done = actions[max(0, index - 1) : index]
        sends = [a for a in done if neighbour("send", a, stage, stages) is not None]
        if sends and needs and not early and _is_answer(needs[0], sends[0], stage, places):
            steps += [Transfer(tuple(sends), ()), Transfer((), tuple(needs))]
        elif sends or needs:
            steps.append(Transfer(tuple(sends), tuple(needs)))
        steps += actions[index : index + 1]
    return steps


def _is_answer(needed: Action, sent: Action, stage: int, places: Sequence[_Places]) -> bool:
    """Tell whether the neighbour that makes what `needed` waits for first uses what `sent` gives it."""
    peer = neighbour("send", sent, stage, len(places))
    if peer is None or peer != neighbour("receive", needed, stage, len(places)):
        return False
    used, made = (places[peer][action.kind == "F", action.microbatch] for action in (sent, needed))
    return used < made


class _Side(NamedTuple):
    """One side of a message: what `stage` must "send" to or "receive" from `peer`."""

    stage: int
    verb: str
    peer: int
    microbatch: int

    def other(self) -> _Side:
        return _Side(self.peer, "receive" if self.verb == "send" else "send", self.stage, self.microbatch)

    def __str__(self) -> str:
        what = "output" if (self.verb == "send") == (self.stage < self.peer) else "gradient"
        return f"stage {self.stage} to {self.verb} the {what} of microbatch {self.microbatch}"


def _events(steps: list[Step], stage: int, stages: int, policy: str) -> Iterator[_Event]:
    """Say what a stage does in turn: wait for the other side of these, post these, compute."""

    def sides(verb: str, actions: Sequence[Action]) -> list[_Side]:
        peers = [(neighbour(verb, action, stage, stages), action.microbatch) for action in actions]
        return [_Side(stage, verb, peer, microbatch) for peer, microbatch in peers if peer is not None]

    for step in steps:
        if isinstance(step, Action):
            yield sides("receive", [step]) if policy == "async" else [], [], step
        elif policy == "async":
            yield [], sides("send", step.sends), None
        else:
            both = sides("send", step.sends) + sides("receive", step.receives)
            if policy == "parity" and stage % 2:
                both.sort(key=lambda side: side.verb == "send")
            for group in [both] if policy == "batched" else [[side] for side in both]:
                yield [], group, None
                yield group, [], None


def simulate(
    table: Table,
    policy: str = "async",
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    message: float = 0.0,
) -> Timeline:
    """Run a table on a clock, on which I and W take half a backward each.

    "async": sends are buffered, and an action waits for what it needs. "batched": a transfer blocks until
    all its other sides are posted. "parity": messages go one by one, each blocks until its other side is
    posted; even stages send first, odd stages receive first.

    Args:
        forward: time of a forward pass, of all stages or of each.
        backward: of a backward pass.
        message: from when both sides of a message are there (with "async" it is sent) until it has arrived.

    Raises:
        ValueError: the table fails `check`, the policy is unknown, a pass takes no time, not every stage has
            one, or stages wait in a circle, and for what.
    """
    stages = len(table)
    programs = [_events(steps, stage, stages, policy) for stage, steps in enumerate(lower(table, policy))]
    costs = _costs(stages, forward, backward, message)
    ahead = [next(program, None) for program in programs]
    clock, spans, moved = [0.0] * stages, [], True
    posted: dict[_Side, float] = {}
    while moved:
        moved = False
        for stage, program in enumerate(programs):
            while (event := ahead[stage]) and all(side.other() in posted for side in event[0]):
                waits, posts, action = event
                start = clock[stage] = max(
                    [clock[stage], *(posted[side.other()] + message for side in waits)]
                )
                posted.update((side, start) for side in posts)
                if action:
                    clock[stage] += costs[stage][action.kind]
                    spans.append(Span(stage, action, start, clock[stage]))
                ahead[stage], moved = next(program, None), True
    if any(ahead):
        missing = [{side.other() for side in event[0]} - posted.keys() if event else None for event in ahead]
        circle = "; ".join(f"stage {stage} waits for {min(s)}" for stage, s in enumerate(missing) if s)
        raise ValueError(f"the schedule deadlocks with {policy} messages: {circle}")
    ticks = max(span.end for span in spans)
    bubble = 1 - sum(span.end - span.start for span in spans) / (stages * ticks)
    spans.sort(key=lambda span: span.stage)
    return Timeline(spans, _most(table, "BI"), _most(table, "BW"), bubble, ticks)


def _costs(
    stages: int, forward: float | Sequence[float], backward: float | Sequence[float], message: float
) -> list[dict[str, float]]:
    """Return the time of every kind of action on every stage."""
    times = [[t] * stages if isinstance(t, int | float) else list(t) for t in (forward, backward)]
    for name, given in zip(("forward", "backward"), times):
        if len(given) != stages:
            raise ValueError(f"{len(given)} {name} times for {stages} stages: give one, or one for each")
    if min(*times[0], *times[1]) <= 0 or message < 0:
        raise ValueError("every pass must take some time, and a message no less than none")
    return [{"F": f, "B": b, "I": b / 2, "W": b / 2} for f, b in zip(*times)]


def _most(table: Table, ends: str) -> list[int]:
    """Count per stage the most microbatches that are at one time between F and a kind in `ends`."""
    return [max(accumulate((a.kind == "F") - (a.kind in ends) for a in actions)) for actions in table]


def render(what: Table | Timeline) -> str:
    """Draw a row per stage, a column per tick (the shortest action); "." is idle, "-" goes on.

    A table is simulated first, with the defaults and errors of `simulate`.
    """
    timeline = what if isinstance(what, Timeline) else simulate(what)
    tick = min(span.end - span.start for span in timeline.spans)
    rows: dict[int, list[str]] = {}
    for stage, action, start, end in timeline.spans:
        row = rows.setdefault(stage, ["."] * int(timeline.ticks / tick + 1e-6))
        first, last = int(start / tick + 1e-6), int(end / tick + 1e-6)
        row[first:last] = [str(action)] + ["-"] * (last - first - 1)
    width = max(len(cell) for row in rows.values() for cell in row)
    digits = len(str(len(rows) - 1))
    cells = {stage: " ".join(cell.ljust(width) for cell in row) for stage, row in rows.items()}
    return "\n".join(f"stage {stage:{digits}} | {row}".rstrip() for stage, row in cells.items())
