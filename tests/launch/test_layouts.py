"""Layouts: the published ones are those of the presets and fit, and nodes that do not fit are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from aeris.config import ParallelConfig
from aeris.parallelize import choose_degrees
from aeris.presets import PRESETS
from launch.layouts import LAYOUTS, Degrees, Limits, batch_problem, check, degrees, flag, number
from launch.machines import MACHINES

ROOT = Path(__file__).resolve().parents[2]
FULL = Degrees(14, 6, 6, 20, 12)
KNOWN = [(machine, preset) for machine, layouts in LAYOUTS.items() for preset in layouts]


@pytest.mark.parametrize(("machine", "preset"), KNOWN)
def test_layout_fits_its_preset(machine: str, preset: str) -> None:
    """What launch says without importing aeris is what the trainer would say: batch and mesh."""
    layout, config = LAYOUTS[machine][preset], PRESETS[preset]()
    assert layout.batch == config.train.batch
    assert (ROOT / layout.script).is_file()
    if layout.degrees.known > 1:
        asked = layout.degrees._replace(dp=1)
        dims = choose_degrees(replace(config, parallel=ParallelConfig(**asked._asdict())), asked.known)
        assert dims.world == asked.known and config.train.microbatch == 1
        # Whole nodes, and the ranks of a window's tokens on one node.
        per_node = MACHINES[machine].ranks_per_node
        assert dims.world % per_node == 0 and per_node % dims.sp == 0


def test_published_numbers_of_nodes() -> None:
    """Nodes of one replica: 40B 720, 1.3B 160, 13B 256, 80B 1,664 (AERIS, arXiv 2509.13523)."""
    nodes = {preset: layout.degrees.known // 12 for preset, layout in LAYOUTS["alcf-aurora"].items()}
    assert nodes == {"tiny": 0, "1.3b-6h": 160, "1.3b-24h": 160, "13b": 256, "40b": 720, "80b": 1664}
    assert check(10_080, 12, LAYOUTS["alcf-aurora"]["40b"].degrees) == FULL and FULL.known == 120_960


def test_flags_are_read_as_the_trainer_reads_them() -> None:
    words = "aeris.train 40b --parallel.dp 14 --parallel.wp-y=6 --parallel.wp_x 6 --parallel.pp 20".split()
    assert degrees(words) == FULL._replace(sp=0)
    assert degrees([*words, "--parallel.dp", "7"]).dp == 7  # the last one counts
    assert degrees(FULL.flags) == FULL
    assert flag(words, "run-dir") is None and number(words, "train.batch", 3) == 3
    for bad, what in ((["--parallel.dp", "x"], "whole number"), (["--parallel.dp"], "without a value")):
        with pytest.raises(ValueError, match=what):
            degrees(bad)


@pytest.mark.parametrize(
    ("nodes", "per_node", "asked", "says"),
    [
        (
            10_079,
            12,
            FULL,
            "10,079 nodes x 12 ranks = 120,948 ranks, but dp 14 x wp 6x6 x pp 20 x sp 12 needs 120,960",
        ),
        (10_081, 12, FULL, "start it on 10,080 nodes, or take dp 15 on 10,800 nodes"),
        (100, 12, FULL, "start it on 10,080 nodes, or take dp 1 on 720 nodes"),
        (
            10_079,
            12,
            FULL._replace(dp=0),
            "a multiple of 8,640: dp 13 on 9,360 nodes or dp 14 on 10,080 nodes would fit",
        ),
        (
            3,
            12,
            Degrees(pp=8),
            "36 ranks, but pp 8 needs a multiple of 8: 2 nodes or 4 nodes would fit",
        ),
        (5, 12, Degrees(2, 1, 1, 1, 5), "60 ranks, but dp 2 x wp 1x1 x pp 1 x sp 5 needs 10"),
        (1, 2, Degrees(3), "1 node x 2 ranks = 2 ranks, but dp 3 needs a multiple of 3: 3 nodes would fit"),
        (1, 2, Degrees(3, wp_y=2), "but dp 3 x wp-y 2 needs a multiple of 6: 3 nodes would fit"),
        (1, 2, Degrees(3, 1, 2, 1, 1), "dp 3 x wp 1x2 x pp 1 x sp 1 needs 6: start it on 3 nodes"),
        (-3, 12, FULL, "--nodes -3: it must be 1 or more"),
        (1, 0, FULL, "--ranks-per-node 0: it must be 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(nodes: int, per_node: int, asked: Degrees, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        check(nodes, per_node, asked)
    # What the advice names does fit, with the degree it names.
    for dp, count in re.findall(r"dp (\d+) on ([\d,]+) nodes", str(caught.value)):
        other = asked._replace(dp=int(dp))
        assert check(int(count.replace(",", "")), per_node, other) == other


@pytest.mark.parametrize(
    ("nodes", "per_node", "asked", "limits", "says"),
    [
        (
            20_000,
            12,
            FULL._replace(dp=0),
            Limits("here", 10_624),
            "20,000 nodes, but here has 10,624: dp 14 on",
        ),
        (
            10_800,
            12,
            FULL._replace(dp=0),
            Limits("here", 10_624),
            "10,800 nodes, but here has 10,624: dp 14 on",
        ),
        (
            10_081,
            12,
            FULL._replace(dp=0),
            Limits("here", 10_624),
            "dp 14 on 10,080 nodes would fit (here has",
        ),
        (
            100,
            12,
            FULL,
            Limits("here", 500),
            "sp 12 needs 120,960: no number of nodes fits (here has 500 nodes)",
        ),
        (1, 2, Degrees(3), Limits("local", 1, 99), "a multiple of 3: --ranks-per-node 3 on 1 node would fit"),
        (1, 2, Degrees(3), Limits("here", 9, 12), "3: 3 nodes or --ranks-per-node 3 on 1 node would fit"),
        (1, 2, Degrees(13), Limits("here", 20, 12), "a multiple of 13: 13 nodes would fit"),
        (
            1,
            2,
            Degrees(3, 1, 1, 1, 1),
            Limits("l", 1, 99),
            "sp 1 needs 3: --ranks-per-node 3 on 1 node would",
        ),
        (2, 2, Degrees(3, 1, 1, 1, 1), Limits("h", 9, 9), "needs 3: dp 6 on 3 nodes would fit"),
    ],
)
def test_advice_keeps_to_the_limits(
    nodes: int, per_node: int, asked: Degrees, limits: Limits, says: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        check(nodes, per_node, asked, limits)


def test_what_fits_is_filled_in() -> None:
    assert check(10_080, 12, FULL) == FULL
    assert check(320, 12, Degrees(0, 4, 4, 10, 12)).dp == 2
    assert check(3, 1, Degrees()) == Degrees()  # the trainer chooses
    assert check(3, 4, Degrees(sp=4)) == Degrees(sp=4)


def test_batches_that_cannot_be_shared() -> None:
    assert batch_problem(1400, 1, 14) == ""
    assert batch_problem(1400, 1, 30).endswith("dp 28 or 25 does")
    assert batch_problem(20, 3, 1) == "microbatches of 3 do not divide a batch of 20"
    assert batch_problem(0, 1, 1)
