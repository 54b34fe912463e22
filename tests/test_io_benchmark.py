"""The benchmark of reading: a small store, every row once, compared with itself and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import io
from benchmarks.records import Output, deliver


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> io.Options:
    monkeypatch.setattr(io, "ROWS", 60)
    monkeypatch.setattr(io, "COLS", 120)
    monkeypatch.setattr(io, "WP", (2, 2))
    return io.Options(gb=0.008, windows=(30,), ranks=2, rounds=1, workers=(), steps=0, directory=tmp_path)


def test_rows_are_measured_and_the_store_is_deleted(options: io.Options, tmp_path: Path) -> None:
    rows = io.run(options)
    assert list(tmp_path.iterdir()) == []
    assert [(row["what"], row["window"]) for row in rows] == [("windows", 30), ("samples", 30)]
    for row in rows:
        assert row["mb_per_s"] > 0 and row["sequential_mb_per_s"] > 0 and row["of_sequential"] > 0
        # The metadata of HDF5 are read as well, which counts beside so few bytes.
        assert row["read_over_needed"] == "" or 1 <= row["read_over_needed"] < 2
    rows.append(io.row("training tiny", window=12, workers=2, data_wait=0.01))
    csv = tmp_path / "rows.csv"
    settings = {"key": ("what", "window", "workers"), "numbers": io.BETTER, "draw": io.draw, "about": "here"}
    assert deliver(rows, Output(csv=csv), **settings) == 0
    assert deliver(rows, Output(compare=csv), **settings) == 0
    assert deliver([rows[0] | {"of_sequential": 0.0}], Output(compare=csv), **settings) == 1
    pytest.importorskip("matplotlib")
    io.draw(rows, tmp_path / "rows.png", "here")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_a_store_that_is_too_small_or_ranks_that_are_not_there(options: io.Options) -> None:
    with pytest.raises(ValueError, match="two times are 0.00 GB"):
        io.run(io.Options(gb=0.001, directory=options.directory))
    with pytest.raises(ValueError, match="the layout has 4"):
        io.run(io.Options(gb=0.008, ranks=5, directory=options.directory))
