"""The whole program on the packaged atmosphere, with a forecast made of the truth and noise."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aeris.data.forecasts import ForecastPlan, ForecastWriter
from aeris.data.store import Store, packaged_sample
from aeris.data.variables import latitude_weights
from aeris.evaluate import EvaluateConfig, Evaluation, evaluate

NAMES = ("t2m", "z500", "q700")
INITS, LEAD_H, MEMBERS = (130, 140), (6, 24), 3


def write_forecast(path: Path, change=lambda x, init, lead: x, names=NAMES, inits=INITS, finish=True) -> Path:
    """Write the truth plus noise of a tenth of its standard deviation."""
    store, rng = Store(packaged_sample()), np.random.default_rng(0)
    numbers = [store.names.index(name) for name in names]
    plan = ForecastPlan(
        inits=tuple(str(store.times[init]) for init in inits),
        lead_h=LEAD_H,
        members=MEMBERS,
        names=names,
        latitude_deg=tuple(store.latitude_deg.tolist()),
        longitude_deg=tuple(store.longitude_deg.tolist()),
        made={"seed": 0},
        about={},
    )
    writer = ForecastWriter(path, plan)
    scale_C11 = 0.1 * store.statistics.std_C[numbers][:, None, None]
    for init, start in enumerate(inits):
        for lead, lead_h in enumerate(LEAD_H):
            y_CYX = store.read(start + lead_h // 6)[numbers]
            noise = rng.standard_normal((MEMBERS, *y_CYX.shape)) + 0.5 * rng.standard_normal(y_CYX.shape)
            x_MCYX = change((y_CYX + scale_C11 * noise).astype(np.float32), init, lead)
            if finish or lead == 0:
                writer.write(init, range(MEMBERS), lead, x_MCYX)
    if finish:
        writer.finish()
    return path


@pytest.fixture(scope="module")
def forecast(tmp_path_factory):
    return write_forecast(tmp_path_factory.mktemp("forecast") / "forecast.zarr")


def scored(forecast, tmp_path, **options):
    return evaluate(EvaluateConfig(str(forecast), out=str(tmp_path / "scores"), **options))


def test_everything_is_written_and_said(forecast, tmp_path, capsys):
    card = scored(forecast, tmp_path)
    assert card.title == "SPEEDY perfect-model experiment"
    written = sorted(
        str(path.relative_to(tmp_path / "scores")) for path in tmp_path.rglob("*") if path.is_file()
    )
    pictures = [f"plots/{name}.png" for name in ("curves", "maps", "ranks", "scorecard", "spectra")]
    assert written == [*pictures, "scores.csv", "scores.json", "spectra.npz"]
    said = capsys.readouterr().out
    for words in (
        *written,
        "mean over 3 channels",
        "24 h ahead",
        "area weights 'cell'",
        "training-period mean",
    ):
        assert words in said


def test_scores_equal_a_plain_computation(forecast, tmp_path):
    card = scored(forecast, tmp_path, plots=False)
    store, place = Store(packaged_sample()), NAMES.index("z500")
    weight_Y = latitude_weights(store.latitude_deg, "cell")
    number = store.names.index("z500")
    fields = np.stack([store.read(time)[number] for time in range(160)]).astype(np.float64)
    starts = np.array(INITS)
    for lead, lead_h in enumerate(LEAD_H):
        y_IYX = fields[starts + lead_h // 6]
        squared = ((fields[starts] - y_IYX) ** 2).mean(axis=(0, 2))
        expected = np.sqrt(np.average(squared, weights=weight_Y))
        assert card.values["rmse_persistence"][lead, place] == pytest.approx(expected, rel=1e-6)
        usual = np.stack([fields[(start + lead_h // 6) % 4 : 120 : 4].mean(axis=0) for start in starts])
        expected = np.sqrt(np.average(((usual - y_IYX) ** 2).mean(axis=(0, 2)), weights=weight_Y))
        assert card.values["rmse_climatology"][lead, place] == pytest.approx(expected, rel=1e-5)
    # noise of its own (1) and shared (0.5), in tenths of a standard deviation
    sigma = 0.1 * store.statistics.std_C[number]
    np.testing.assert_allclose(card.values["spread"][:, place], sigma, rtol=0.03)
    np.testing.assert_allclose(card.values["rmse"][:, place], sigma * np.sqrt(0.25 + 1 / 3), rtol=0.05)
    np.testing.assert_allclose(card.values["ssr"][:, place], 2, rtol=0.1)


def test_a_second_run_gives_the_same_bytes(forecast, tmp_path):
    scored(forecast, tmp_path, plots=False, threads=1)
    first = {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()}
    scored(forecast, tmp_path, plots=False, threads=3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()} == first


def test_channels_weights_and_stride_can_be_chosen(forecast, tmp_path):
    options = {
        "channels": ("q700", "t2m"),
        "weights": "cos",
        "climatology_stride": 10,
        "table_lead_h": (6, 24),
    }
    card = scored(forecast, tmp_path, plots=False, **options)
    assert card.names == ("q700", "t2m")
    assert card.weights == "cos"
    assert card.climatology.endswith("12 times")
    with (tmp_path / "scores" / "scores.csv").open() as file:
        assert {row["channel"] for row in csv.DictReader(file)} == {"q700", "t2m"}
    card = scored(forecast, tmp_path, plots=False, climatology_stride=0)
    assert card.climatology == ""
    assert not [name for name in card.values if "climatology" in name]


def test_the_plan_is_printed_and_nothing_written(forecast, tmp_path, capsys):
    assert scored(forecast, tmp_path, dry_run=True, json=True) is None
    plan = json.loads(capsys.readouterr().out)
    assert (plan["members"], plan["lead_h"], plan["climatology_times"]) == (3, [6, 24], 120)
    assert plan["forecast_bytes"] == 2 * 2 * 3 * 24 * 24 * 48 * 4
    assert scored(forecast, tmp_path, dry_run=True) is None
    assert "z500" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_scores_can_be_printed_as_json(forecast, tmp_path, capsys):
    card = scored(forecast, tmp_path, plots=False, json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["scores"]["rmse"]["t2m"] == card.values["rmse"][:, 0].tolist()
    assert len(record["files"]) == 3


def test_forecasts_of_the_training_period_are_noted(tmp_path):
    path = write_forecast(tmp_path / "seen", inits=(20, 140))
    card = scored(path, tmp_path, plots=False)
    assert "1 of 2 forecasts lie in the training period" in card.notes[0]


def test_missing_values_and_times_are_named(forecast, tmp_path):
    def spoil(x_MCYX, init, lead):
        if (init, lead) == (1, 0):
            x_MCYX[2, 1, 7, 9] = np.nan
        return x_MCYX

    path = write_forecast(tmp_path / "spoilt", spoil)
    with pytest.raises(ValueError, match=r"lead 6 h, member 2 has z500 = nan at row 7, col 9"):
        scored(path, tmp_path, plots=False)
    with pytest.raises(ValueError, match="no init time 2000-01-01T00:00:00; it has 2000-"):
        Evaluation(EvaluateConfig(str(forecast), case_init="2000-01-01T00"))
    with pytest.raises(ValueError, match=r"no lead time \(h\) 12; it has 6, 24"):
        Evaluation(EvaluateConfig(str(forecast), case_lead_h=12))
    with pytest.raises(ValueError, match="does not exist"):
        Evaluation(EvaluateConfig(str(tmp_path / "nothing.zarr")))


def test_an_unfinished_forecast_is_refused(tmp_path):
    path = write_forecast(tmp_path / "half", finish=False)
    with pytest.raises(ValueError, match="not finished"):
        Evaluation(EvaluateConfig(str(path)))


def test_missing_matplotlib_is_told_before_any_work(forecast, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="or leave pictures out: --no-plots"):
        scored(forecast, tmp_path)
    assert scored(forecast, tmp_path, plots=False).names == NAMES


def test_a_mistake_is_one_line_on_stderr(tmp_path):
    command = [sys.executable, "-m", "aeris.evaluate", str(tmp_path / "nothing.zarr"), "--no-plots"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
