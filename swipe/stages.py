"""Cutting a row of units into pipeline stages, so that the slowest stage is as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def balanced_cut(costs: Sequence[float], stages: int) -> list[range]:
    """Cut units 0 .. len(costs) - 1 into `stages` runs, none empty, with the smallest possible largest sum.

    Among those, the sums are as even as possible (least sum of squares), later stages being the lighter ones.

    Raises:
        ValueError: there are more stages than units.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} units cannot be cut into {stages} stages: take 1 to {len(costs)}")
    limit = _smallest_largest(costs, stages)

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]] | None:
        """Cut the units from `first` on into `left` runs within the limit: (sum of squares, ends)."""
        if left == 1:
            rest = sum(costs[first:])
            return (rest**2, (len(costs),)) if rest <= limit else None
        found: list[tuple[float, tuple[int, ...]]] = []
        total: float = 0  # sums of whole numbers stay exact: no rounding decides between equals
        for end in range(first + 1, len(costs) - left + 2):
            total += costs[end - 1]
            if total <= limit and (cut := best(end, left - 1)):
                found.append((cut[0] + total**2, (end, *cut[1])))
        return min(reversed(found), key=lambda cut: cut[0]) if found else None

    cut = best(0, stages)
    assert cut is not None, "the limit is that of some cut"
    return [range(start, end) for start, end in zip((0, *cut[1]), cut[1])]


def _smallest_largest(costs: Sequence[float], stages: int) -> float:
    """Return the smallest possible largest sum of a run."""

    @cache
    def largest(first: int, left: int) -> float:
        if left == 1:
            return sum(costs[first:])
        found: list[float] = []
        total: float = 0
        for end in range(first + 1, len(costs) - left + 2):
            total += costs[end - 1]
            found.append(max(total, largest(end, left - 1)))
        return min(found)

    return largest(0, stages)
