"""`python -m aeris.plan`: what it prints and writes, and how wrong input fails."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from aeris import plan
from aeris.config import RunConfig
from aeris.planning import published
from aeris.planning.hardware import HARDWARE
from aeris.planning.memory import PARTS
from aeris.presets import PRESETS
from swipe.mesh import ParallelDims


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count memory by a formula that grows as the real one does, and takes no time."""

    def held(config: RunConfig, channels: int, dims: ParallelDims, stage: int) -> dict[str, int]:
        flying = min(config.train.batch // (config.train.microbatch * dims.dp), dims.pp - stage)
        model, tokens = config.model, config.train.microbatch * config.model.rows * config.model.cols
        layers = model.layers * model.blocks / max(1, dims.pp - 2)
        kept = 2 * (11 * model.width + 2 * model.hidden) * layers * tokens / dims.places
        weights = 8 * layers * (4 * model.width**2 + 3 * model.width * model.hidden)
        return dict.fromkeys(PARTS, 0) | {"gathered": int(weights), "activations": int(kept) * flying}

    monkeypatch.setattr("aeris.planning.estimate.memory", held)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run the program with these words."""
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    plan.main()


def test_tiny_on_a_laptop(monkeypatch, capsys, tmp_path: Path) -> None:
    """Table, details, formulas; rows in a file; flags that aeris.train takes."""
    rows = tmp_path / "new" / "rows.csv"
    run(monkeypatch, "tiny", "--ranks-per-node", "2", "--explain", "--top", "3", "--csv", str(rows))
    said = capsys.readouterr().out
    for words in ("the best 3 of", "python -m aeris.train tiny --parallel.dp", "memory of a device", "MFU"):
        assert words in said
    assert "q, k, v, out" in said and "6 B T 4 d^2 = 6 * 4 * 1152 * 4 * 128**2" in said
    with rows.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["name"] for row in found] == ["1", "2", "3"]
    assert all(int(row["devices"]) == 2 for row in found)


def test_json_is_one_object(monkeypatch, capsys) -> None:
    """With the layouts, what changes, and the machine."""
    run(monkeypatch, "tiny", "--json", "--train.microbatch", "1", "--parallel.pp", "2", "--top", "2")
    found = json.loads(capsys.readouterr().out)
    assert len(found["best"]) == 2 and found["published"] is None
    assert all(row["pp"] == 2 and row["microbatch"] == 1 and row["shard"] >= 0 for row in found["best"])
    assert "--parallel.pp 2" in found["best"][0]["flags"]
    assert {change["name"] for change in found["changes"]} >= {"--model.checkpointing"}
    assert found["machine"]["name"] == "cpu"


def test_the_command_keeps_what_was_asked_for(monkeypatch, capsys) -> None:
    """Settings that differ from the preset are in it, so that the run is the one that was planned."""
    asked = ("--model.checkpointing", "block", "--data.no-roll", "--optimizer.betas", "0.8", "0.9")
    run(monkeypatch, "tiny", "--json", "--top", "1", *asked)
    best = json.loads(capsys.readouterr().out)["best"][0]
    planned = plan.parse(["tiny", *best["flags"].split()]).config
    expected = plan.parse(["tiny", *asked]).config
    assert planned.model == expected.model and planned.data == expected.data
    assert planned.optimizer == expected.optimizer and planned.parallel.dp == best["dp"]
    run(monkeypatch, "tiny", "--top", "1", *asked)
    assert f"python -m aeris.train tiny {best['flags']}" in capsys.readouterr().out


def test_40b_on_the_whole_machine_beats_the_published_layout() -> None:
    """By its own model the search finds one at least as good as the published layout, which it also plans."""
    arguments = plan.Arguments("40b", "alcf-aurora", 10_080, top=1, config=PRESETS["40b"]())  # type: ignore[arg-type]
    planner = plan.Planner(arguments.config, 69, HARDWARE["alcf-aurora"], 120_960)
    best = planner.best(planner.candidates([1]), 1).plans[0]
    known, remark = plan.published_layout(arguments, planner)
    assert known is not None and not remark and str(known.dims) == "dp 14 x wp 6x6 x pp 20 x sp 12"
    assert best.images_per_s >= known.images_per_s
    assert not best.problem and best.dims.world == known.dims.world == 120_960


def test_published_layout_says_why_not() -> None:
    """Another number of nodes, or a machine without one."""
    config = PRESETS["40b"]()
    arguments = plan.Arguments("40b", "alcf-aurora", 1000, config=config)  # type: ignore[arg-type]
    planner = plan.Planner(config, 69, HARDWARE["alcf-aurora"], 12_000)
    known, remark = plan.published_layout(arguments, planner)
    assert known is None and "720" in remark
    other = plan.Planner(config, 69, HARDWARE["a100"], 4)
    assert plan.published_layout(dataclasses.replace(arguments, machine="a100"), other) == (None, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--machine", "frontier"), "no machine 'frontier'.*alcf-aurora"),
        (("--machine", "nothing.json"), "nothing.json does not exist"),
        (("--nodes", "0"), "--nodes 0"),
        (("--machine", "alcf-aurora", "--nodes", "10625"), "alcf-aurora has 10,624"),
        (("--ranks-per-node", "9"), "--ranks-per-node 9: a node of cpu has 8 devices"),
        (("--top", "0"), "--top 0"),
        (("--headroom", "1"), "--headroom 1"),
        (("--batch-per-replica", "-1"), "--batch-per-replica -1"),
        (("--parallel.pp", "7"), "pp 7"),
        (("--train.microbatch", "3"), "--train.microbatch 3 does not divide"),
        (("--ranks-per-node", "7"), "7"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        run(monkeypatch, "tiny", *words)
    assert "\n" not in str(error.value)


def test_nothing_fits_names_the_nearest_and_what_would_help(monkeypatch, tmp_path: Path) -> None:
    """In one line, with a number of nodes that would do."""
    small = dataclasses.asdict(HARDWARE["cpu"]) | {"name": "small", "memory_bytes": 8e6, "sources": {}}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small | {"devices_per_node": 1}))
    with pytest.raises(
        ValueError, match=r"none of \d+ layouts of tiny fits on 1 node of small: .* GB"
    ) as error:
        run(monkeypatch, "tiny", "--machine", str(path))
    assert re.search(r"--nodes \d+ would do", str(error.value))
    assert "\n" not in str(error.value)


def test_published_table(monkeypatch, capsys, tmp_path: Path) -> None:
    """Every point of the figure, with its residual, and in a file."""
    path, rows = tmp_path / "rows.csv", published.table(models=published.MODELS[:1])
    monkeypatch.setattr(published, "table", lambda: rows)
    run(monkeypatch, "--published", "--csv", str(path))
    said = capsys.readouterr().out
    assert "10,080" in said and "residual" in said
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = next(row for row in rows if (row["model"], row["nodes"]) == ("40B", "720"))
    assert abs(float(first["residual"])) < 1e-3
