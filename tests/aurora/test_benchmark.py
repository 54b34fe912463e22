"""The benchmark of Aurora: it counts FLOPs rightly, and works without the official package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import aurora
from benchmarks.aurora import Contender, Options, compare, contenders, make_trial, measure_alone, report
from benchmarks.contest import Row, ratios
from benchmarks.records import Output

CPU = torch.device("cpu")
OPTIONS = Options(model="tiny", levels=4, grids=("17x32",), rounds=1, memory=False, device="cpu")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Rows of ours alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aurora, "load_official", lambda: None)
        return compare(OPTIONS, "17x32", CPU)


def by_work(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """Find rows by work and policy."""
    return {(row["work"], row["policy"]): row for row in rows}


def test_a_step_costs_three_forward_passes_and_a_checkpointed_one_less_than_four(rows: list[Row]) -> None:
    found = by_work(rows)
    assert [*found] == [("forward", "-"), ("step", "-"), *(("checkpointed", name) for name in OPTIONS.ours)]
    forward = found["forward", "-"]["gflop"]
    assert 2.9 < found["step", "-"]["gflop"] / forward < 3.05
    assert all(3.1 < found["checkpointed", name]["gflop"] / forward <= 3.8 for name in OPTIONS.ours)
    assert all(row["fastest"] == row["seconds"] == row["slowest"] > 0 for row in rows)


def test_rows_are_said_written_and_drawn(
    rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    theirs = [row | {"package": "official", "seconds": 2 * row["seconds"], "peak_mb": 4.0} for row in rows]
    both = theirs + [row | {"peak_mb": 3.0} for row in rows]
    options = Options(output=Output(tmp_path / "rows.csv", plot=tmp_path / "rows.png"))
    assert report(options, both, "here") == 0
    said = capsys.readouterr().out
    assert "2.00 times as fast" in said and "0.75 of the peak memory" in said
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(both)
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    slower = [row | {"seconds": 3 * row["seconds"]} for row in both]
    assert report(Options(output=Output(compare=tmp_path / "rows.csv")), slower, "here") == len(both)
    assert all("against" not in line for line in ratios(rows))


def test_a_full_device_ends_no_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    who = Contender("17x32", "step", "ours", "-")
    trial = make_trial(OPTIONS, who, None, CPU)

    def call() -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(trial, "call", call)
    aurora.attempt(aurora.call, trial, CPU)
    aurora.attempt(aurora.clock, trial, CPU)
    assert trial.full and trial.times == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_memory_alone() -> None:
    who = Contender("17x32", "step", "ours", "-")
    found = measure_alone(Options(model="tiny", levels=2, alone=str(who)), CPU)
    assert 0 < found["working_mb"] < found["peak_mb"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_memory_in_a_process_of_its_own() -> None:
    options = Options(model="tiny", levels=1)
    trial = make_trial(options, Contender("13x24", "forward", "ours", "-"), None, CPU)
    aurora.measure_memory(options, trial, CPU)
    assert 0 < trial.working_mb < trial.peak_mb


def test_unknown_policies_of_the_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aurora, "load_official", lambda: object())
    assert [str(who) for who in contenders(Options(works=("forward",)), "17x32")] == [
        "17x32 forward official -",
        "17x32 forward ours -",
    ]
    with pytest.raises(ValueError, match="no policy 'all': choose from default, layers, blocks"):
        contenders(Options(official=("all",)), "17x32")
