"""Ranks of a mesh, and which meshes a model allows, against brute force on small worlds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swipe.mesh import AXES, Coordinate, Limits, ParallelDims

# 2 x 4 windows of 12 x 12 tokens, 4 heads.
TINY = Limits(windows_y=2, windows_x=4, window=12, heads=4, units=6, samples=2)
WHOLE_MACHINE = ParallelDims(dp=14, wp_y=6, wp_x=6, pp=20, sp=12)

degree = st.integers(1, 4)
meshes = st.builds(ParallelDims, dp=degree, wp_y=degree, wp_x=degree, pp=degree, sp=degree)


@settings(deadline=None)
@given(meshes)
def test_ranks_and_coordinates_are_one_to_one(dims: ParallelDims) -> None:
    """Coordinates in lexicographic order are the ranks in order: sp runs fastest, dp slowest."""
    ranges = (range(dims.dp), range(dims.wp_y), range(dims.wp_x), range(dims.pp), range(dims.sp))
    coordinates = [Coordinate(*values) for values in itertools.product(*ranges)]
    assert len(coordinates) == dims.world
    assert [dims.rank(c) for c in coordinates] == list(range(dims.world))
    assert [dims.coordinate(rank) for rank in range(dims.world)] == coordinates


@settings(deadline=None)
@given(meshes, st.sets(st.sampled_from(AXES)))
def test_along_cuts_the_world_into_groups(dims: ParallelDims, axes: set[str]) -> None:
    groups = {dims.along(rank, *axes) for rank in range(dims.world)}
    assert sorted(itertools.chain(*groups)) == list(range(dims.world))
    for group in groups:
        assert list(group) == sorted(group)
        assert len(group) == math.prod(getattr(dims, axis) for axis in axes)
        for axis, values in zip(AXES, zip(*map(dims.coordinate, group))):
            assert len(set(values)) == (getattr(dims, axis) if axis in axes else 1)


@settings(deadline=None)
@given(meshes)
def test_places_are_counted_without_replica_and_stage(dims: ParallelDims) -> None:
    assert dims.wp == dims.wp_y * dims.wp_x
    assert dims.places * dims.dp * dims.pp == dims.world
    for rank in range(dims.world):
        here = dims.coordinate(rank)
        assert dims.rank_at(here.dp, here.pp, dims.place(rank)) == rank
        stage = dims.along(rank, "wp_y", "wp_x", "sp")
        assert [dims.place(other) for other in stage] == list(range(dims.places))


def test_a_whole_machine_is_quick() -> None:
    dims, began = WHOLE_MACHINE, time.perf_counter()
    assert dims.world == 120_960
    assert all(dims.rank(dims.coordinate(rank)) == rank for rank in range(dims.world))
    assert len(dims.along(777, "dp", "wp_y", "wp_x", "sp")) == 6048
    limits = Limits(windows_y=24, windows_x=48, window=30, heads=12, units=20, samples=1400)
    assert not limits.problems(dims, dims.world)
    assert dims in limits.layouts(dims.world)
    assert limits.nearest(dims, dims.world)[0] == dims
    assert time.perf_counter() - began < 5  # 0.3 s on an idle core


def test_the_order_of_ranks_is_written_out() -> None:
    dims = ParallelDims(dp=2, wp_y=2, wp_x=3, pp=4, sp=5)
    assert dims.rank(Coordinate(dp=1, wp_y=1, wp_x=2, pp=3, sp=4)) == dims.world - 1
    assert dims.rank(Coordinate(dp=1, wp_y=0, wp_x=2, pp=3, sp=1)) == (((1 * 2 + 0) * 3 + 2) * 4 + 3) * 5 + 1
    assert str(dims) == "dp 2 x wp 2x3 x pp 4 x sp 5"
    assert dims.flags() == "--dp 2 --wp-y 2 --wp-x 3 --pp 4 --sp 5"
    assert ParallelDims(wp_x=2).flags("--parallel.") == "--parallel.wp-x 2"
    assert ParallelDims().flags() == "1 rank"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: ParallelDims(pp=0), "pp is a number of ranks and must be at least 1, not 0"),
        (lambda: ParallelDims(dp=2).coordinate(2), "there is no rank 2: there are 2"),
        (lambda: ParallelDims(dp=2).coordinate(-1), "there is no rank -1"),
        (lambda: ParallelDims(dp=2).rank(Coordinate(0, 0, 1, 0, 0)), "there is no wp_x coordinate 1"),
        (lambda: ParallelDims(wp_x=2).rank_at(0, 0, 2), "there is no place 2: there are 2"),
        (lambda: ParallelDims(wp_x=2).rank_at(0, 1, 0), "there is no pp coordinate 1"),
        (lambda: ParallelDims().along(0, "wp"), "wp is no axis of the mesh: dp, wp_y, wp_x, pp, sp are"),
        (lambda: Limits(2, 4, 12, 4, 0, 2), "units must be at least 1, not 0"),
        (lambda: Limits(2, 4, 15, 4, 6, 2), "a window of 15 x 15 tokens has no four equal quadrants"),
    ],
)
def test_what_does_not_exist_is_refused(wrong: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()  # type: ignore[operator]


def brute_force(limits: Limits, world: int) -> set[ParallelDims]:
    """Try every five numbers that multiply to `world`."""
    found = set()
    for dims in itertools.product([n for n in range(1, world + 1) if world % n == 0], repeat=5):
        dp, wp_y, wp_x, pp, sp = dims
        quadrant_tokens = (limits.window // 2) ** 2
        strips = sp // 4 if sp % 4 == 0 else sp // 2 if sp % 2 == 0 else sp
        if (
            math.prod(dims) == world
            and limits.windows_y % wp_y == limits.windows_x % wp_x == limits.heads % sp == 0
            and (dp <= limits.samples if limits.uneven else limits.samples % dp == 0)
            and quadrant_tokens % strips == 0
            and pp <= limits.units
        ):
            found.add(ParallelDims(*dims))
    return found


small_limits = st.builds(
    Limits,
    windows_y=st.integers(1, 6),
    windows_x=st.integers(1, 8),
    window=st.sampled_from([2, 4, 6, 10, 12]),
    heads=st.sampled_from([1, 3, 4, 6, 8, 12, 16]),
    units=st.integers(1, 6),
    samples=st.integers(1, 8),
    uneven=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(small_limits, st.integers(1, 24))
def test_layouts_are_all_there_are(limits: Limits, world: int) -> None:
    layouts = limits.layouts(world)
    assert len(set(layouts)) == len(layouts)
    assert set(layouts) == brute_force(limits, world)
    assert not any(limits.problems(dims, world) for dims in layouts)


@settings(max_examples=60, deadline=None)
@given(small_limits, st.integers(1, 24), meshes)
def test_the_nearest_are_the_nearest(limits: Limits, world: int, asked: ParallelDims) -> None:
    def distance(dims: ParallelDims) -> float:
        return sum(abs(math.log(getattr(dims, axis) / getattr(asked, axis))) for axis in AXES)

    near = limits.nearest(asked, world)
    every = sorted(map(distance, brute_force(limits, world)))
    assert [distance(dims) for dims in near] == pytest.approx(every[:3])


@settings(max_examples=60, deadline=None)
@given(small_limits, st.integers(1, 24), st.dictionaries(st.sampled_from(AXES), st.integers(0, 4)))
def test_what_is_chosen_keeps_what_is_fixed(limits: Limits, world: int, fixed: dict[str, int]) -> None:
    """And no other that keeps it waits less for others or, waiting as little, has a larger dp."""

    def idle(dims: ParallelDims) -> tuple[Fraction, int, int]:
        passes = math.ceil(limits.samples / dims.dp) + dims.pp - 1  # of the replica with most samples
        return 1 - Fraction(limits.samples, dims.dp * passes), -dims.dp, -dims.wp

    keep = [
        dims
        for dims in brute_force(limits, world)
        if all(getattr(dims, axis) == value for axis, value in fixed.items() if value)
    ]
    if keep:
        chosen = limits.choose(world, fixed=fixed)
        assert chosen in keep
        assert idle(chosen) == min(map(idle, keep))
    else:
        with pytest.raises(ValueError, match="cannot work: "):
            limits.choose(world, fixed=fixed)


def test_small_worlds_of_the_tiny_model() -> None:
    chosen, refused = {}, []
    for world in range(1, 17):
        if brute_force(TINY, world):
            dims = TINY.choose(world, fixed={})
            TINY.check(dims, world)
            chosen[world] = str(dims)
        else:
            with pytest.raises(
                ValueError, match=f"No mesh of {world} ranks does; the nearest numbers of ranks"
            ):
                TINY.choose(world, fixed={})
            refused.append(world)
    assert refused == [7, 9, 11, 13, 14, 15]
    assert chosen[1] == "dp 1 x wp 1x1 x pp 1 x sp 1"
    assert chosen[2] == "dp 2 x wp 1x1 x pp 1 x sp 1"
    assert chosen[4] == "dp 2 x wp 1x2 x pp 1 x sp 1"
    assert chosen[6] == "dp 1 x wp 1x2 x pp 3 x sp 1"
    assert chosen[8] == "dp 2 x wp 2x2 x pp 1 x sp 1"
    assert chosen[16] == "dp 2 x wp 2x4 x pp 1 x sp 1"


def test_a_choice_keeps_to_what_was_asked() -> None:
    assert TINY.choose(8, fixed={"pp": 2, "sp": 0}) == ParallelDims(dp=1, wp_x=2, wp_y=2, pp=2)
    assert TINY.choose(8, fixed={"sp": 4}) == ParallelDims(dp=2, sp=4)
    assert TINY.choose(4, fixed={"dp": 1, "pp": 1}) == ParallelDims(wp_y=2, wp_x=2)


def test_samples_need_not_come_out_even() -> None:
    uneven = dataclasses.replace(TINY, samples=8, uneven=True)
    assert uneven.choose(3, fixed={}) == ParallelDims(dp=3)  # 3 + 3 + 2 samples: 1/9 idle, pp 3 would be 1/5
    assert uneven.choose(8, fixed={}) == ParallelDims(dp=8)
    assert uneven.problems(ParallelDims(dp=9)) == ["dp 9 is more than the 8 samples"]
    with pytest.raises(ValueError, match="to 22, dp be at most 8, wp_y divide 2, wp_x 4 and sp 4, and pp"):
        uneven.choose(22, fixed={})


@pytest.mark.parametrize(
    ("dims", "world", "says"),
    [
        (
            ParallelDims(dp=2, wp_y=2),
            6,
            "6 ranks as dp 2 x wp 2x1 x pp 1 x sp 1 cannot work: these degrees need 4 ranks, not 6. Nearest "
            "that do: --wp-y 2 --pp 3; --dp 2 --pp 3; "
            "--wp-x 2 --pp 3",
        ),
        (
            ParallelDims(dp=3, wp_y=4, wp_x=3, pp=7, sp=8),
            2016,
            "2016 ranks as dp 3 x wp 4x3 x pp 7 x sp 8 cannot work: dp 3 does not divide the 2 microbatches "
            "of a step; wp_y 4 does not divide the 2 rows of windows; wp_x 3 does not divide the 4 columns "
            "of windows; pp 7 is more than the 6 stages the model can have; sp 8 does not divide the 4 "
            "attention heads. No mesh of 2016 ranks does; the nearest numbers of ranks that can: 384",
        ),
        (
            ParallelDims(dp=2),
            1,
            "1 rank as dp 2 x wp 1x1 x pp 1 x sp 1 cannot work: these degrees need 2 ranks, not 1. Nearest "
            "that do: 1 rank",
        ),
    ],
)
def test_a_refusal_names_the_numbers_and_what_would_work(dims: ParallelDims, world: int, says: str) -> None:
    with pytest.raises(ValueError) as error:
        TINY.check(dims, world)
    assert str(error.value) == says


def test_a_choice_that_cannot_be_made_says_why() -> None:
    with pytest.raises(ValueError) as error:
        TINY.choose(8, fixed={"pp": 5, "dp": 1})
    assert str(error.value) == (
        "8 ranks with pp 5 and dp 1 cannot work: the degrees must multiply to 8, dp divide 2, wp_y 2, wp_x 4 "
        "and sp 4, and pp be at most 6. Nearest that do: --wp-x 2 --pp 4; "
        "--wp-y 2 --pp 4; --pp 4 --sp 2"
    )
    with pytest.raises(ValueError, match="7 ranks cannot work: .* the nearest numbers .*: 6 or 8"):
        TINY.choose(7, fixed={})
    with pytest.raises(ValueError, match="8 ranks with sp 3 cannot work: sp 3 does not divide the 4 att"):
        TINY.choose(8, fixed={"sp": 3})
    with pytest.raises(ValueError, match="8 ranks as dp 1 x wp 1x1 x pp 1 x sp 4 cannot work: these deg"):
        TINY.choose(8, fixed={"dp": 1, "wp_y": 1, "wp_x": 1, "pp": 1, "sp": 4})


def test_strips_must_be_equal() -> None:
    """Sixteen ranks to a window of 6 x 6 would cut each quadrant of 9 tokens into 4."""
    limits = Limits(windows_y=1, windows_x=1, window=6, heads=16, units=1, samples=1)
    assert limits.problems(ParallelDims(sp=16)) == [
        "sp 16 needs 4 equal strips of the 3 x 3 tokens of a quarter window"
    ]
    assert not limits.problems(ParallelDims(sp=4))


@settings(max_examples=40, deadline=None)
@given(small_limits, st.integers(2, 40))
def test_the_nearest_worlds_are_the_nearest(limits: Limits, world: int) -> None:
    if limits.layouts(world):
        return
    with pytest.raises(ValueError) as error:
        limits.choose(world, fixed={})
    match = re.search(r"can: (\d+)(?: or (\d+))?$", str(error.value))
    assert match
    below, above = match.groups()
    assert limits.layouts(int(below))
    assert not any(limits.layouts(n) for n in range(int(below) + 1, world))
    last = limits.windows_y * limits.windows_x * limits.heads * limits.units * limits.samples
    assert above is None or limits.layouts(int(above))
    assert not any(limits.layouts(n) for n in range(world + 1, int(above) if above else last + 1))


def test_the_arithmetic_needs_no_torch() -> None:
    code = "import sys, swipe.mesh; print([name for name in sys.modules if name in ('torch', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
