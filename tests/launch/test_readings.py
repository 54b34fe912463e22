"""What ranks of a preflight print: read, judged by the others, in a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from launch.readings import Reading, parse, slow, table

HOSTS = [f"x{number}.cluster" for number in range(3)]


def line(rank: int, host: str = "elsewhere", phase: str = "alone", **values: Any) -> str:
    place = {"phase": phase, "rank": rank, "local_rank": rank % 2, "host": host}
    return "PROBE " + json.dumps({**place, **values})


def test_lines_of_ranks_are_found_among_others() -> None:
    output = "\n".join(
        [
            "loading modules",
            "x1: " + line(2, gemm_tflops=1.5, device="cpu"),  # some launchers put the host before a line
            line(1, host="x2"),  # believed: it is on the list
            line(5, phase="together", error="connection lost"),
            line(3) + " and more",
            "PROBE {broken",
            "PROBE [1]",
            line(6),  # there is no such rank
        ]
    )
    found, rest = parse(output, HOSTS, 2)
    assert [(one.host, one.rank, one.local_rank) for one in found] == [
        ("x1.cluster", 2, 0),
        ("x2.cluster", 1, 1),
        ("x2.cluster", 5, 1),
        ("x1.cluster", 3, 1),
    ]
    assert found[0].values == {"gemm_tflops": 1.5}
    assert (found[2].phase, found[2].error) == ("together", "connection lost")
    assert rest.splitlines() == ["loading modules", "x1: ", "PROBE {broken", "PROBE [1]", line(6)]


def rated(rates: Iterable[float], name: str = "gemm_tflops") -> list[Reading]:
    return [Reading(f"x{n // 2}", n, n % 2, "alone", "", {name: rate}) for n, rate in enumerate(rates)]


@pytest.mark.parametrize(
    ("rates", "bad"),
    [
        ([100, 101, 99, 100, 70, 100, 100, 102], "x2"),  # a slow device
        ([100, 101, 99, 100, 85, 100, 100, 102], ""),  # slower, but by less than 20 %
        ([60, 140, 70, 130, 75, 125, 100, 100], ""),  # rates that differ anyway say nothing
        ([100, 50], ""),  # of two nobody knows which is bad
        ([100, 100, 50], "x1"),
        ([100, 100, 0.0, 100], "x1"),
    ],
)
def test_a_rate_far_below_the_others_is_bad(rates: list[float], bad: str) -> None:
    found = slow(rated(rates), 20.0)
    assert list(found) == [bad] * bool(bad)


def test_the_worst_rate_of_a_host_is_named() -> None:
    found = slow(rated([100.0] * 7 + [75.0]) + rated([50.0] * 7 + [20.0], "memory_gbs"), 20.0)
    assert found == {"x3": "local rank 1: memory 20 GB/s, 60% below the median 50"}


def test_what_is_shared_may_vary_more() -> None:
    rates = [1000.0] * 7
    assert not slow(rated([*rates, 400.0], "file_mbs"), 20.0)
    assert slow(rated([*rates, 200.0], "file_mbs"), 20.0)


def test_a_slow_neighbour_is_not_ones_own_fault() -> None:
    """x2 is slow both ways; x1 and x3 are slow towards it only."""
    links = [(10.0, 10.0), (2.0, 10.0), (2.0, 2.0), (10.0, 2.0), (10.0, 10.0)]
    values = [{"next_gbs": ahead, "previous_gbs": back} for ahead, back in links]
    found = [Reading(f"x{n}", n, 0, "together", "", each) for n, each in enumerate(values)]
    assert list(slow(found, 20.0)) == ["x2"]


def test_the_table_has_the_lowest_rate_of_each_host() -> None:
    found = rated([4.0, 3.0, 2.0, 2.5])
    rows = [row.split() for row in table(found, ["x0", "x1", "x2"], {"x1": "slow"}).splitlines()]
    assert rows == [
        ["host", "ranks", "GEMM", "TFLOP/s"],
        ["x0", "2", "3"],
        ["x1", "2", "2", "bad"],
        ["x2", "0", "-"],
        ["median", "of", "ranks", "4", "2.75"],
    ]
    many = [f"x{n}" for n in range(10_000)]
    assert len(table(found, many, {"x1": "slow"}).splitlines()) == 3
