"""The work of an ensemble forecast as data: its portions, and which replica of the network makes which.

A portion is a few members at one init time, computed together. Portions do not depend on the number of
replicas (unless the batch is left to choose), so neither do the bits of a forecast. Each replica makes its
own, one step of one portion at a time; all replicas take their steps together, which is when they agree to
stop.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from aeris.data.forecasts import ForecastWriter

MOST = 4
"""Members at a time where nothing else is asked for; more need more memory."""
WORTH_IT = 0.9
"""A smaller batch is chosen only if it takes less than this share of the time: large ones are efficient."""


@dataclass(frozen=True)
class Portion:
    """What is left to do for a few members at one init time."""

    init: int
    """Number of the init time."""
    members: range
    done: int
    """Lead times all of them have on disk."""


@dataclass(frozen=True)
class Work:
    """What there is to do, as rank 0 sees it on disk."""

    portions: tuple[Portion, ...]
    complete: bool
    """The whole forecast is there already."""
    path: str
    """Of the forecast."""


def look(writer: ForecastWriter, batch: int) -> Work:
    """List in order what is left to do, in batches of members that are the same after a stop."""
    plan, portions = writer.plan, []
    for init in range(0 if writer.complete else len(plan.inits)):
        for members in share_out(range(plan.members), -(-plan.members // batch)):
            leads = [(writer.leads_done(init, range(member, member + 1)), member) for member in members]
            for done, group in groupby(leads, lambda pair: pair[0]):
                alike = [member for _, member in group]
                if done < len(plan.lead_h):
                    portions.append(Portion(init, range(alike[0], alike[-1] + 1), done))
    return Work(tuple(portions), writer.complete, str(writer.path))


def share_out(members: range, parts: int) -> list[range]:
    """Cut members into parts; the first ones get one more where it does not come out even."""
    each, more = divmod(len(members), parts)
    ends = [each * part + min(part, more) for part in range(parts + 1)]
    return [members[first:last] for first, last in pairwise(ends)]


def choose_batch(inits: int, members: int, replicas: int) -> int:
    """Choose how many members a replica computes at a time, so that few replicas are idle in the end."""

    def cost(batch: int) -> int:
        """Count member-steps one after the other: of each round of portions, those of the largest."""
        sizes = inits * [len(part) for part in share_out(range(members), -(-members // batch))]
        return sum(max(sizes[first : first + replicas]) for first in range(0, len(sizes), replicas))

    best = min(MOST, members)
    for batch in range(best - 1, 0, -1):
        if cost(batch) < WORTH_IT * cost(best):
            best = batch
    return best


def deal(steps: Sequence[int], replicas: int) -> list[list[int]]:
    """Deal portions to replicas: each in turn to the one that would begin it first.

    Args:
        steps: what each portion takes.

    Returns:
        Numbers of the portions of each replica, in order.
    """
    hands: list[list[int]] = [[] for _ in range(replicas)]
    until = [0] * replicas
    for portion, count in enumerate(steps):
        first = until.index(min(until))
        hands[first].append(portion)
        until[first] += count
    return hands


class Timeline:
    """When each replica makes which portion; all take their steps at the same ticks.

    Args:
        steps: what each portion takes.
        replicas: how many there are.

    Attributes:
        ticks: steps that are taken one after the other.
    """

    def __init__(self, steps: Sequence[int], replicas: int) -> None:
        hands = deal(steps, replicas)
        self._hands = hands
        self._begins = [[*accumulate((steps[portion] for portion in hand), initial=0)] for hand in hands]
        self.ticks = max(begins[-1] for begins in self._begins)

    def at(self, tick: int) -> dict[int, int]:
        """Return the portion that each replica is at; those that have none left are not there."""
        found = {}
        for replica, (hand, begins) in enumerate(zip(self._hands, self._begins)):
            if tick < begins[-1]:
                found[replica] = hand[bisect_right(begins, tick) - 1]
        return found

    def beginning(self, tick: int) -> dict[int, int]:
        """Return the portions that replicas begin at a tick."""
        found = {}
        for replica, (hand, begins) in enumerate(zip(self._hands, self._begins)):
            place = bisect_right(begins, tick) - 1
            if begins[place] == tick and place < len(hand):
                found[replica] = hand[place]
        return found
