"""The whole program on the packaged atmosphere, with a forecast made of the truth and noise."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aeris.data.forecasts import ForecastPlan, ForecastWriter, open_forecast
from aeris.data.store import Store, packaged_sample
from aeris.data.variables import latitude_weights
from aeris.evaluate import Crew, EvaluateConfig, Evaluation, evaluate
from aeris.scores.matching import Match

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
    card = scored(forecast, tmp_path, channels=("z500", "t2m"))
    assert card.title == "SPEEDY perfect-model experiment"
    written = sorted(
        str(path.relative_to(tmp_path / "scores")) for path in tmp_path.rglob("*") if path.is_file()
    )
    pictures = [
        f"plots/{name}.png"
        for name in ("bands", "curves", "extremes", "maps", "ranks", "scorecard", "spectra")
    ]
    tables = ["events.csv", "inits.npz", "regions.csv", "scores.csv", "scores.json", "spectra.npz"]
    assert written == sorted([*tables, *pictures])
    said = capsys.readouterr().out
    for words in (
        *written,
        "mean over 2 channels",
        "24 h ahead",
        "area weights 'cell'",
        "mean by hour of day",
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


class Rank(Crew):
    """One of several ranks that are run one after the other, in one process."""

    def __init__(self, rank, world, told):
        self.rank, self.world, self.told, self._group = rank, world, told, None

    def tell(self, value):
        """Return what rank 0 saw before anybody began."""
        return self.told


QUICK = {"plots": False, "channels": ("t2m", "z500"), "quantiles": (0.9,)}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A forecast of five init times."""
    path = write_forecast(tmp_path_factory.mktemp("many") / "f", inits=(130, 134, 138, 142, 146))
    return path, scored(path, path.parent / "alone", **QUICK)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_same_bytes(many, tmp_path, world):
    path, _ = many
    for rank in reversed(range(world)):  # rank 0 is the last, as the others leave their parts on disk
        config = EvaluateConfig(str(path), out=str(tmp_path / "scores"), **QUICK)
        if rank == world - 1:
            job = Evaluation(config)
            job.parts.prepare()
            job.make_climatology(job.out / "parts" / "climatology.h5", lambda: None)
        card = evaluate(config, Rank(rank, world, [0, 1, 2, 3, 4]))
        assert (card is None) == (rank > 0)
    expected = path.parent / "alone" / "scores"
    for name in ("scores.json", "scores.csv", "regions.csv", "events.csv", "spectra.npz", "inits.npz"):
        assert (tmp_path / "scores" / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_stopped_evaluation_goes_on(many, tmp_path, monkeypatch, capsys):
    path, _ = many
    read, calls = Match.read_forecast, []

    def stop_in_the_third(self, init, lead, finite=True):
        calls.append(init)
        if init == 2 and len(calls) < 8:
            raise KeyboardInterrupt
        return read(self, init, lead, finite)

    monkeypatch.setattr(Match, "read_forecast", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        scored(path, tmp_path, **QUICK)
    calls[:] = [9] * 8
    scored(path, tmp_path, **QUICK)
    assert sorted(set(calls[8:])) == [0, 2, 3, 4]  # 0 for the maps
    assert "going on: 2 of 5 init times were scored before" in capsys.readouterr().out
    expected = path.parent / "alone" / "scores"
    assert (tmp_path / "scores" / "scores.json").read_bytes() == (expected / "scores.json").read_bytes()
    assert not (tmp_path / "scores" / "parts").exists()


def test_a_climatology_can_come_from_another_store_or_file(many, tmp_path):
    path, card = many
    job = Evaluation(EvaluateConfig(str(path), climatology=str(packaged_sample()), **QUICK))
    job.make_climatology(tmp_path / "climatology.h5", lambda: None)
    again = scored(path, tmp_path, climatology=str(tmp_path / "climatology.h5"), **QUICK)
    np.testing.assert_array_equal(again.values["acc"], card.values["acc"])
    np.testing.assert_array_equal(again.events.table_JCQ2K, card.events.table_JCQ2K)
    with pytest.raises(ValueError, match=r"climatology.h5 has no quantile 0.5; it has 0.9"):
        options = QUICK | {"quantiles": (0.5,)}
        Evaluation(EvaluateConfig(str(path), climatology=str(tmp_path / "climatology.h5"), **options))
    with pytest.raises(ValueError, match="there is no climatology nowhere.zarr"):
        Evaluation(EvaluateConfig(str(path), climatology="nowhere.zarr"))


def test_members_of_the_climatology_are_drawn_and_scored(many, tmp_path, capsys):
    path, _ = many
    job = Evaluation(EvaluateConfig(str(path), climatology_members=9, **QUICK))
    card = scored(path, tmp_path, climatology_members=9, **QUICK)
    said = capsys.readouterr().out
    assert "climatology" in said
    drawn_MCYX = job._draw(job.pair.valid_times[0, 0])
    assert drawn_MCYX.shape[:2] == (9, 2)
    # the sample is steady: nearly calibrated, better than its mean field, and worse than the forecast
    assert ((card.values["ssr_climatology"] > 0.7) & (card.values["ssr_climatology"] < 1.3)).all()
    assert (card.values["crps_climatology"] < card.values["mae_climatology"]).all()
    np.testing.assert_allclose(
        card.values["crps_ratio_climatology"], card.values["crps"] / card.values["crps_climatology"]
    )
    for members, said in [(1, "must be 2 or more"), (31, "the climatology has 30 times of a kind")]:
        with pytest.raises(ValueError, match=said):
            Evaluation(EvaluateConfig(str(path), climatology_members=members, **QUICK))
    with pytest.raises(ValueError, match="from a climatology that is built"):
        Evaluation(EvaluateConfig(str(path), climatology_members=5, climatology="none"))


def test_intervals_are_given_with_enough_init_times(many):
    _, card = many
    low, high = card.intervals["crps_ratio"]
    assert ((low <= card.values["crps_ratio"]) & (card.values["crps_ratio"] <= high)).all()
    assert "paired bootstrap of 5 init times, 1 at a time" in " ".join(card.conditions())


def test_forecasts_are_laid_side_by_side(many, tmp_path, capsys):
    path, _ = many
    (path.parent / "f.scores").symlink_to(path.parent / "alone" / "scores")
    worse = write_forecast(tmp_path / "worse", lambda x, init, lead: x * 1.001, inits=(130, 138))
    evaluate(EvaluateConfig(str(worse), against=(f"better={path}",), **QUICK))
    said = capsys.readouterr().out
    assert "RMSE against sample" in said
    assert "2 init times all have; members: this forecast 3, better 3" in said
    record = json.loads((tmp_path / "worse.scores" / "comparison.json").read_text())
    assert (
        record["scores"]["rmse"]["better"]["z500"][0] < record["scores"]["rmse"]["this forecast"]["z500"][0]
    )


def test_a_forecast_beyond_the_truth_is_scored_as_far_as_it_goes(tmp_path):
    path = write_forecast(tmp_path / "late", inits=(140,))
    store = Store(packaged_sample())
    plan = dataclasses.replace(open_forecast(path)._files.plan, lead_h=(6, 24, 24 * 40))
    writer = ForecastWriter(tmp_path / "beyond", plan)
    for lead in range(3):
        writer.write(0, range(MEMBERS), lead, open_forecast(path).read(0, min(lead, 1)))
    writer.finish()
    card = scored(tmp_path / "beyond", tmp_path, plots=False, quantiles=())
    assert np.isfinite(card.values["rmse"][:2]).all()
    assert np.isnan(card.values["rmse"][2]).all()
    assert f"1 of 3 valid times have no truth, which covers {store.times[0]}" in card.notes[0]
    assert card.events is None


def test_a_stability_report_is_made_when_asked_for(many, tmp_path, capsys):
    path, _ = many
    scored(path, tmp_path, drift="yes", reference="era5", **QUICK)
    said = capsys.readouterr().out
    assert "stability to 24 h" in said
    assert "not all scores may stand beside the published ones: the truth is simulated" in said
    assert json.loads((tmp_path / "scores" / "stability.json").read_text())["bounds"]["mean"] > 0
    with pytest.raises(ValueError, match="--drift yes needs a climatology"):
        Evaluation(EvaluateConfig(str(path), drift="yes", climatology="none"))
    with pytest.raises(ValueError, match="cyclones need the channel msl"):
        scored(path, tmp_path, tracks="truth", **QUICK)


def test_channels_weights_leads_and_events_can_be_chosen(forecast, tmp_path):
    options = {
        "channels": ("q700", "t2m"),
        "weights": "cos",
        "quantiles": (0.9,),
        "lead_h": (24,),
        "table_lead_h": (24,),
    }
    card = scored(forecast, tmp_path, plots=False, **options)
    assert card.names == ("q700", "t2m")
    assert card.weights == "cos"
    assert card.lead_h == (24,)
    assert card.events.quantiles == (0.9,)
    with (tmp_path / "scores" / "scores.csv").open() as file:
        assert {row["channel"] for row in csv.DictReader(file)} == {"q700", "t2m"}
    card = scored(forecast, tmp_path, plots=False, climatology="none")
    assert card.climatology == ""
    assert card.events is None
    assert not [name for name in card.values if "climatology" in name]


def test_the_plan_is_printed_and_nothing_written(forecast, tmp_path, capsys):
    assert scored(forecast, tmp_path, dry_run=True, json=True) is None
    plan = json.loads(capsys.readouterr().out)
    assert (plan["members"], plan["lead_h"], plan["climatology_times"]) == (3, [6, 24], 120)
    assert plan["forecast_bytes"] == 2 * 2 * 3 * 3 * 24 * 48 * 4
    assert scored(forecast, tmp_path, dry_run=True) is None
    assert "z500" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_scores_can_be_printed_as_json(forecast, tmp_path, capsys):
    card = scored(forecast, tmp_path, plots=False, json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["scores"]["rmse"]["t2m"] == card.values["rmse"][:, 0].tolist()
    assert len(record["files"]) == 6


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
