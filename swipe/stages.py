"""Cutting a row of units into pipeline stages, so that the slowest stage is as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def balanced_cut(costs: Sequence[float], stages: int) -> list[range]:
    """Cut units 0 .. len(costs) - 1 into `stages` runs, none empty, with the smallest possible largest sum.

    Among those, the sums are as even as possible (least sum of squares).

    Raises:
        ValueError: there are more stages than units.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} units cannot be cut into {stages} stages: take 1 to {len(costs)}")

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """Cut the units from `first` on into `left` runs: (largest sum, sum of squares, ends)."""
        if left == 1:
            rest = sum(costs[first:])
            return rest, rest**2, (len(costs),)
        found, total = [], 0.0
        for end in range(first + 1, len(costs) - left + 2):
            total += costs[end - 1]
            largest, squares, ends = best(end, left - 1)
            found.append((max(largest, total), squares + total**2, (end, *ends)))
        return min(found, key=lambda cut: cut[:2])

    ends = best(0, stages)[2]
    return [range(start, end) for start, end in zip((0, *ends), ends)]
