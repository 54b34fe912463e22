"""Which ranks compute longer than the others of their stage: a slow device holds up all of them.

Ranks of one stage (dp x wp x sp) do the same work on equally many tokens, so their times can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swipe.collectives import all_gather
from swipe.groups import Groups


class Slow(NamedTuple):
    """A rank that computes longer than its stage."""

    rank: int
    host: str
    stage: int
    seconds: float
    """Mean time a step takes it, without waiting for others."""
    median: float
    """The median of its stage."""

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.host}) {self.seconds:.3g} s a step, {self.median:.3g} s is the median "
            f"of stage {self.stage} (+{100 * (self.seconds / self.median - 1):.0f}%)"
        )


class Stragglers:
    """Compares mean times of all ranks every so many steps."""

    def __init__(self, groups: Groups, hosts: Sequence[str], pct: float, every: int) -> None:
        """Begin to count.

        Args:
            groups: of this rank.
            hosts: the machine of each rank (`swipe.collectives.host_names`).
            pct: a rank is slow if it takes so many percent longer than its stage's median; 0: never look.
            every: steps between two looks.
        """
        self._groups, self._hosts, self._pct, self._every = groups, hosts, pct, every
        self._total, self._steps = 0.0, -1  # the first step also makes what later ones use: not counted
        self._before: set[int] = set()

    def step_done(self, busy_s: float) -> list[Slow] | None:
        """Take in how long this rank computed in a step; every `every` steps compare all ranks.

        A collective call over all ranks that moves 8 bytes per rank, only then. What passes slows a rank down
        once: it is named if it was slow at the look before, too.

        Returns:
            None between looks; else the slow ranks, slowest first, the same on every rank.
        """
        if not self._pct or self._groups.dims.world == 1:
            return None
        self._steps += 1
        self._total += busy_s if self._steps else 0.0
        if self._steps < self._every:
            return None
        world = self._groups.world
        mean = torch.tensor(self._total / self._steps, dtype=torch.float64)
        self._total, self._steps = 0.0, 0
        slow = self.compare(all_gather(mean, world, "compute times"))
        before, self._before = self._before, {one.rank for one in slow}
        return [one for one in slow if one.rank in before]

    def compare(self, seconds: Tensor) -> list[Slow]:
        """Find the slow ones among the mean times of all ranks [world]."""
        dims = self._groups.dims
        times = seconds.view(-1, dims.pp, dims.sp)  # ranks are numbered that way: swipe/mesh.py
        # Of two the faster one: the other may be slow.
        medians = times.transpose(0, 1).flatten(1).median(1).values
        limits = (medians * (1 + self._pct / 100))[:, None]
        slow = []
        for rank in ((times > limits) & (limits > 0)).flatten().nonzero().flatten().tolist():
            stage = dims.coordinate(rank).pp
            slow.append(Slow(rank, self._hosts[rank], stage, float(seconds[rank]), float(medians[stage])))
        return sorted(slow, key=lambda one: one.seconds / one.median, reverse=True)


def named(slow: Sequence[Slow], most: int = 4) -> str:
    """Put slow ranks into one line: the slowest, and how many more there are."""
    more = f"; and {len(slow) - most} more" if len(slow) > most else ""
    return f"slow: {'; '.join(map(str, slow[:most]))}{more}"
