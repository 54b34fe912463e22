"""The comparison of layouts: what it counts is what the formulas say, and a difference is shown."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aeris.planning.traffic import KINDS
from aeris.restore import open_store
from benchmarks.accounts import tables
from benchmarks.parallelism import Options, Trial, choose_layouts, name, parse, read_layout, report, small
from benchmarks.records import Output
from swipe.mesh import ParallelDims
from tests.harness import run_distributed

LAYOUTS = ("dp 2", "wp 1x2", "pp 2", "sp 2")


def rows() -> list[dict[str, Any]]:
    """Compare the layouts of two ranks, with the smallest network."""
    config = small()
    model = replace(config.model, width=16, heads=2, hidden=16, layers=2)
    config = replace(config, model=model, train=replace(config.train, batch=2))
    found = []
    half = replace(config, model=replace(config.model, precision="bf16"))
    for layout in (*LAYOUTS, "bf16"):
        config, layout = (half, "dp 2") if layout == "bf16" else (config, layout)
        dims, device = read_layout(layout), torch.device("cpu")
        trial = Trial(config, open_store(config), dims, device, dist.get_rank(), rounds=1)
        trial.step()
        found.append(trial.row())
    return found


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Rows of two ranks, which must be the same on both but for their clocks."""
    first, second = run_distributed(rows, 2)
    assert [row["activations"] for row in first] == [row["activations"] for row in second]
    return first


def test_counted_bytes_are_those_of_the_formulas(measured: list[dict[str, Any]]) -> None:
    for row in measured:
        assert all(row[kind] == row[f"{kind}_formula"] for kind in KINDS), row
        # The loss and its weights come on top, and are not small beside 16 features; neither are the scores
        # of attention, which bf16 on a CPU writes out.
        most = 1.2 if row is not measured[-1] else 2.0
        assert 1.0 <= row["activations"] / row["activations_formula"] < most
        assert row["slowest"] <= row["samples_per_s"] <= row["fastest"]
    dp, wp, pp, sp, half = measured
    assert half["gradients"] == dp["gradients"] and half["weights"] < dp["weights"]
    assert dp["equal_on_all_ranks"] and pp["equal_on_all_ranks"]
    used = [{kind for kind in KINDS if row[kind]} for row in measured[:4]]
    shared = {"weights", "gradients"}
    assert used == [shared, {*shared, "shift"}, {"pipeline"}, {*KINDS} - {"pipeline"}]
    assert dp["activations"] == pytest.approx(2 * wp["activations"], rel=0.02)
    assert dp["activations"] == pytest.approx(2 * sp["activations"], rel=0.02)
    assert pp["in_flight"] == 2 and [row["smallest_batch"] for row in measured] == [2, 1, 1, 1, 2]


def test_a_difference_is_shown_and_written(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [measured[0], measured[2] | {"shift": 1, "equal_on_all_ranks": False}]
    path = tmp_path / "rows.csv"
    assert report(Options(output=Output(csv=path)), wrong, "here") == 0
    slower = [row | {"samples_per_s": row["samples_per_s"] / 2} for row in wrong]
    assert report(Options(output=Output(compare=path)), slower, "there") == 2
    said = capsys.readouterr().out
    assert "Some ranks send other bytes" in said and said.count("≠") == 2 * 3
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and lines[1].startswith("dp 2,") and ",here," in lines[2]
    assert len(tables(measured)) == 2


def test_it_is_drawn(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report(Options(output=Output(plot=tmp_path / "rows.png")), measured, "here")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_layouts_are_read_as_they_are_written() -> None:
    dims = ParallelDims(dp=2, wp_y=2, wp_x=3, sp=4)
    assert name(dims) == "dp 2 x wp 2x3 x sp 4" and read_layout(name(dims)) == dims
    assert name(ParallelDims()) == "1 rank"
    with pytest.raises(ValueError, match="write parts of"):
        read_layout("wp 4")
    assert [name(dims) for dims in choose_layouts(Options(config=small()), 8)] == [
        *("dp 8", "dp 2 x pp 4", "sp 8", "dp 2 x sp 4", "wp 2x4", "dp 2 x wp 2x2"),
        *("wp 2x2 x sp 2", "wp 1x2 x pp 2 x sp 2", "wp 1x2 x pp 4"),
    ]
    with pytest.raises(ValueError, match="cannot work"):
        choose_layouts(Options(layouts=("dp 3",), config=small()), 8)


def test_presets_and_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["parallelism"])
    assert parse(["1.3b-6h", "--train.batch", "4"]).config.model.width == 1536
    assert parse(["--model.width", "32"]).config.model.heads == 8
    with pytest.raises(ValueError, match="no preset"):
        parse(["huge"])
