"""Cutting units into stages, against all cuts there are. Pure Python."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swipe.stages import balanced_cut


def all_cuts(units: int, stages: int) -> list[list[range]]:
    """List every way to cut units into runs, none empty."""
    return [
        [range(start, end) for start, end in pairwise((0, *ends, units))]
        for ends in combinations(range(1, units), stages - 1)
    ]


def sums(costs: list[int], cut: list[range]) -> list[int]:
    """Add up the costs of every stage."""
    return [sum(costs[unit] for unit in part) for part in cut]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Draw the costs of units and a number of stages they can be cut into."""
    costs = draw(st.lists(st.integers(0, 12), min_size=1, max_size=9))
    return costs, draw(st.integers(1, len(costs)))


@settings(deadline=None, max_examples=300)
@given(rows())
def test_no_cut_has_a_faster_slowest_stage(row: tuple[list[int], int]) -> None:
    """Runs one after the other, none empty, and the largest sum is the smallest possible."""
    costs, stages = row
    cut = balanced_cut(costs, stages)
    assert cut in all_cuts(len(costs), stages)
    assert max(sums(costs, cut)) == min(max(sums(costs, other)) for other in all_cuts(len(costs), stages))


@settings(deadline=None, max_examples=300)
@given(rows())
def test_among_those_the_cut_is_the_most_even(row: tuple[list[int], int]) -> None:
    """The least sum of squares of those with the smallest largest sum."""
    costs, stages = row

    def quality(cut: list[range]) -> tuple[int, int]:
        return max(sums(costs, cut)), sum(total**2 for total in sums(costs, cut))

    assert quality(balanced_cut(costs, stages)) == min(map(quality, all_cuts(len(costs), stages)))


def test_a_slow_first_stage_leaves_the_others_even() -> None:
    """The others need not have the smallest largest sum of their own: 6, 6, 1 is less even than 3, 3, 7."""
    assert balanced_cut([8, 3, 3, 6, 0, 1], 4) == [range(1), range(1, 2), range(2, 3), range(3, 6)]


@pytest.mark.parametrize(("units", "stages"), [(3, 2), (5, 2), (5, 3), (7, 4)])
def test_later_stages_are_the_lighter_ones(units: int, stages: int) -> None:
    """What does not divide evenly is given to the first stages."""
    counts = [len(part) for part in balanced_cut([1.0] * units, stages)]
    assert counts == sorted(counts, reverse=True) and sum(counts) == units


@pytest.mark.parametrize("stages", [0, 4, -1])
def test_impossible_numbers_of_stages_are_refused(stages: int) -> None:
    """More than there are units, or none."""
    with pytest.raises(ValueError, match=f"3 units cannot be cut into {stages} stages: take 1 to 3"):
        balanced_cut([1, 2, 3], stages)


def test_a_real_size_is_quick() -> None:
    """A hundred units into twenty stages, the ends being lighter."""
    costs = [1.0, *[10.0] * 98, 1.0]
    cut = balanced_cut(costs, 20)
    assert max(sum(costs[unit] for unit in part) for part in cut) == 50
