"""Real ECMWF fields all the way: convert, train, forecast, score, each by its program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aeris import evaluate, forecast, train
from aeris.data import convert

FIELDS = Path(__file__).parent / "data" / "files" / "ecmwf_open_10deg_20240603.nc"
SMALL = ["--model.width", "16", "--model.heads", "2", "--model.hidden", "24", "--model.layers", "2"]
GRID = ["--model.rows", "18", "--model.cols", "36", "--model.window", "6", "--model.row-offset", "1"]


def test_from_netcdf_to_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 six-hourly times on 10 degrees, 30 channels, no static fields: everything runs and is scored."""

    def program(main: object, *words: object) -> None:
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        main()  # type: ignore[operator]

    store, run, out = tmp_path / "store", tmp_path / "run", tmp_path / "forecast"
    program(convert.main, FIELDS, store, "--window", 6, "--allow-missing-static", "--intervals-h", 6)
    with pytest.raises(ValueError, match="--model.rows 18 --model.cols 36"):
        program(train.main, "tiny", "--data.store", store, "--run-dir", run)
    program(train.main, "tiny", "--data.store", store, "--run-dir", run, "--train.images", 4, *GRID, *SMALL)
    program(
        forecast.main, run, "--init", "2024-06-04T06", "--lead-h", 12, "--members", 2, "--out", out,
        "--sampler.levels", 2,
    )  # fmt: skip
    program(evaluate.main, out, "--truth", store, "--no-plots", "--out", tmp_path / "scores")
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert "z500" in json.dumps(scores) and (run / "log.jsonl").read_text().count("\n") == 2
