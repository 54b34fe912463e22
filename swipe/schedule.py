"""Pipeline schedules as tables of actions: plain data, printable and checkable without a process."""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """One thing a stage does: the forward ("F") or backward ("B") pass of a microbatch."""

    kind: str
    microbatch: int


def one_f_one_b(stage: int, stages: int, microbatches: int) -> list[Action]:
    """Order one stage's work by the 1F1B schedule (Narayanan et al. 2021, arXiv 2104.04473).

    A stage runs `stages - stage - 1` forwards ahead, then alternates, then drains, so at most
    `stages - stage` microbatches are in flight. With one stage it is plain gradient accumulation:
    F0 B0 F1 B1 ...

    Raises:
        ValueError: the stage does not exist or there is nothing to do.
    """
    if not 0 <= stage < stages or microbatches < 1:
        raise ValueError(f"no schedule for stage {stage} of {stages} with {microbatches} microbatches")
    ahead = min(stages - stage - 1, microbatches)
    actions = [Action("F", m) for m in range(ahead)]
    for m in range(microbatches - ahead):
        actions += [Action("F", ahead + m), Action("B", m)]
    return actions + [Action("B", m) for m in range(microbatches - ahead, microbatches)]
