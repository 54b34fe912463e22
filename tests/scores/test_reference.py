"""The published scores against numbers read off their table, and every reason not to stand beside them."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from aeris.data.variables import channel
from aeris.scores.comparison import Comparison, comparison_table
from aeris.scores.plots.reference import plot_beside, plot_differences
from aeris.scores.reference import (
    Conditions,
    caveats,
    comparable,
    compare_with_published,
    reference_rows,
    table,
)
from aeris.scores.winds import speed_channel
from tests.scores.test_plots import check

YEAR = np.arange(
    np.datetime64("2022-01-01T00", "s"), np.datetime64("2023-01-01", "s"), np.timedelta64(12, "h")
)
FINE = Conditions(
    "a forecast", YEAR, np.linspace(90, -90, 721), np.arange(1440) / 4, weights="wb2", truth="analysis"
)
COARSE = dataclasses.replace(FINE, latitude_deg=np.linspace(90, -90, 121), longitude_deg=np.arange(240) * 1.5)
LEADS = (24, 36, 72, 120, 240)
CHANNELS = tuple(map(channel, ("z500", "t500", "t2m")))


@pytest.mark.parametrize(
    ("name", "metric", "lead_h", "truth", "model", "value"),
    [
        ("z500", "crps", 24, "analysis", "IFS ENS", 21.5),
        ("z500", "crps", 240, "era5", "GenCast", 256),
        ("z500", "crps", 24, "era5", "Probabilistic Climatology", 352),
        ("t850", "rmse", 120, "analysis", "IFS ENS", 1.60),
        ("t850", "rmse_member", 120, "analysis", "IFS ENS", 2.22),
        ("t2m", "rmse", 24, "era5", "Pangu-Weather", 0.569),
        ("msl", "rmse", 72, "analysis", "Aurora", 127),
        ("q700", "ssr", 240, "analysis", "FGN", 0.970),
        ("z500", "acc", 240, "era5", "Persistence", 0.0666),
        ("z500", "acc", 240, "era5", "GraphCast", 0.566),
    ],
)
def test_numbers(name, metric, lead_h, truth, model, value):
    rows = [row for row in reference_rows(channel(name), metric, lead_h, truth) if row.model == model]
    assert len(rows) == 1
    assert rows[0].value * (1000 if metric == "rmse" and name == "q700" else 1) == pytest.approx(value, 5e-3)


def test_each_number_is_there_once_and_truths_are_apart():
    keys = [dataclasses.replace(row, value=0.0) for row in table()]
    assert len(keys) == len(set(keys)) == 7433
    assert {row.truth for row in table()} == {"analysis", "era5"}
    assert not reference_rows(channel("t500"), "crps")
    assert not reference_rows(channel("z500"), "crps", resolution="1.5deg")
    assert reference_rows(speed_channel("ws850"), "crps")
    with pytest.raises(ValueError, match="no published 'mae' against 'era5': scores are rmse, rmse_member"):
        reference_rows(channel("z500"), "mae", truth="era5")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"title": "SPEEDY perfect-model experiment"}, "simulated"),
        ({"inits": YEAR - np.timedelta64(365, "D")}, "init times of 2021, theirs of 2022"),
        ({"truth": ""}, "nobody said what the truth is"),
        ({"weights": "cos"}, "area weights 'cos', theirs 'wb2'"),
        ({"latitude_deg": np.linspace(87, -87, 24)}, "a grid of 24 x 1440, their crps is of 721 x 1440"),
        ({"latitude_deg": np.sin(np.linspace(1.5, -1.5, 721)) * 90}, "a grid of 721 x 1440"),
    ],
)
def test_reasons_not_to_compare(change, reason):
    assert comparable(FINE, "crps") == []
    other = dataclasses.replace(FINE, **change)
    assert len(comparable(other, "crps")) == 1
    assert reason in comparable(other, "crps")[0]
    with pytest.raises(ValueError, match="crps cannot stand beside the published scores"):
        compare_with_published(other, "crps", np.ones((5, 3)), LEADS, CHANNELS)


def test_each_score_has_its_grid_and_each_evaluation_its_caveats():
    assert comparable(COARSE, "rmse") == []
    assert "their crps is of 721 x 1440" in comparable(COARSE, "crps")[0]
    assert "spread is not published" in comparable(COARSE, "spread")[0]
    assert caveats(FINE, "crps") == []
    cropped = dataclasses.replace(FINE, latitude_deg=FINE.latitude_deg[1:], inits=YEAR[::10])
    assert comparable(cropped, "crps") == []
    assert [note.split(";")[0] for note in caveats(cropped, "crps")] == [
        "73 init times at 00 UTC",
        "one pole row is missing, 1e-5 of the area",
    ]


@pytest.fixture(scope="module")
def crps():
    values = np.full((5, 3), 0.5)
    values[:, 0] = [20, 30, 58, 110, 300]
    return compare_with_published(FINE, "crps", values, LEADS, CHANNELS)


def test_a_comparison_has_the_channels_that_are_published(crps):
    assert [one.name for one in crps.channels] == ["z500", "t2m"]
    assert list(crps.others) == ["IFS ENS", "GenCast", "FGN"]
    assert crps.truth == "operational analysis (HRES-T0)"
    difference = crps.difference_JC("IFS ENS")
    np.testing.assert_allclose(difference[[0, 2], 0], [20 / 21.5 - 1, 58 / 58.0 - 1], atol=2e-3)
    assert np.isnan(difference[1]).all()
    systems = {record["system"] for record in crps.records()}
    assert systems == {"this forecast", "IFS ENS", "GenCast", "FGN"}
    assert all(np.isfinite(record["value"]) for record in crps.records())
    era5 = compare_with_published(
        dataclasses.replace(FINE, truth="era5"), "crps", crps.ours_JC, LEADS, crps.channels
    )
    assert "Probabilistic Climatology" in era5.others
    with pytest.raises(ValueError, match="no published crps of t500 at these leads"):
        compare_with_published(FINE, "crps", np.ones((5, 1)), LEADS, CHANNELS[1:2])


def test_acc_is_compared_by_what_is_missing_to_one():
    ours, theirs = np.array([[0.9]]), np.array([[0.8]])
    one = Comparison("acc", "a", "b", (24,), CHANNELS[:1], ours, {"x": theirs})
    np.testing.assert_allclose(one.difference_JC("x"), -0.5)
    assert one.has_difference


def test_the_table(crps):
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(comparison_table(crps))
    text = capture.get()
    assert "a forecast: fair CRPS against operational analysis (HRES-T0)" in text
    line = next(line for line in text.splitlines() if "IFS ENS" in line)
    assert line.split() == ["IFS", "ENS", "21.5", "-7%", "58.0", "0%", "115", "-4%", "262", "+15%"]
    assert "36 h" not in text


def test_pictures(crps, tmp_path):
    ssr = compare_with_published(FINE, "ssr", np.ones((5, 3)), LEADS, CHANNELS)
    acc = compare_with_published(COARSE, "acc", np.full((5, 3), 0.9), LEADS, CHANNELS)
    plot_differences(acc, tmp_path / "a.png", ["IFS HRES"])
    plot_beside([crps, ssr], tmp_path / "b.png", most=1)
    for path in tmp_path.iterdir():
        check(path)
    with pytest.raises(ValueError, match="ssr has no better and worse"):
        plot_differences(ssr, tmp_path / "d.png")
    with pytest.raises(ValueError, match=r"nothing to compare with called \['me'\]"):
        plot_differences(crps, tmp_path / "d.png", ["me"])
    with pytest.raises(ValueError, match="no score to draw"):
        plot_beside([], tmp_path / "d.png")
