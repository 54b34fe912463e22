"""True ensembles, with a small chaotic atmosphere in place of the SPEEDY model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from aeris.data import convert
from aeris.data.forecasts import ForecastWriter, open_forecast
from aeris.data.speedy import __main__ as program
from aeris.data.speedy import control, ensemble, errors, restarts
from aeris.data.speedy.ensemble import EnsembleOptions
from aeris.data.speedy.model import TEMPERATURE
from aeris.data.store import Store
from tests.data.simulation import Standard

INITS = ("2001-04-11T00:2001-05-21T00:240h", "2001-05-03T12")


class Model(Standard):
    """The atmosphere on 8 x 8 points, in weather that moves temperature by 3 K."""

    def __init__(self, start: object) -> None:
        super().__init__(str(start), rows=8, weather=3.0)


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (ensemble, program):
        monkeypatch.setattr(place, "Speedy", Model)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("control") / "run"
    options = control.Options(out, days=150, spin_up_days=3, levels_hpa=(500, 850), step_h=12)
    list(control.generate(options, Model(options.began)))
    return out


@pytest.fixture(scope="module")
def store(run: Path) -> Store:
    path = run.parent / "store"
    words = [*map(str, sorted(run.glob("*.nc"))), str(path), "--window", "2", "--coarsen", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert", *words, "--channels", "t500", "t850", "--intervals-h", "24"])
        convert.main()
    return Store(path)


def options_of(run: Path, out: Path, **changes: object) -> EnsembleOptions:
    settings = {"init": INITS, "members": 6, "lead_h": 48, "season_days": 90} | changes
    return EnsembleOptions(run, out, **settings)


def made(options: EnsembleOptions) -> Path:
    work, forecast = ensemble.plan(options)
    writer = ForecastWriter(options.out, forecast)
    list(ensemble.make(work, writer))
    writer.finish()
    return options.out


@pytest.mark.parametrize("breed_days", [0, 2])
def test_the_truth_is_one_of_the_members(run: Path, store: Store, tmp_path: Path, breed_days: int) -> None:
    options = options_of(run, tmp_path / "f.zarr", store=str(store.path), breed_days=breed_days)
    forecast = open_forecast(made(options))
    assert forecast.names == store.names and forecast.lead_h.tolist() == [0, 24, 48]
    t850 = store.names.index("t850")
    between, from_truth = np.zeros(3), np.zeros(3)
    for i, init in enumerate(forecast.inits):
        for j, lead in enumerate(forecast.lead_h):
            x = forecast.read(i, j)[:, t850]
            y = store.read(store.index_of(init + np.timedelta64(int(lead), "h")))[t850]
            between[j] += x.var(axis=0, ddof=1).mean()
            from_truth[j] += np.square(x.mean(axis=0) - y).mean()
    ratio = np.sqrt((1 + 1 / 6) * between / from_truth)
    assert np.all((ratio > 0.6) & (ratio < 1.6)), ratio
    assert between[2] > between[0]


def test_tiny_errors_leave_the_control_run_on_the_grid_of_the_store(
    run: Path, store: Store, tmp_path: Path
) -> None:
    options = options_of(run, tmp_path / "f.zarr", store=str(store.path), amplitude=1e-12, members=2)
    forecast = open_forecast(made(options))
    for i, init in enumerate(forecast.inits):
        truth = store.read(store.index_of(init))
        np.testing.assert_allclose(forecast.read(i, 0), np.stack([truth, truth]), rtol=1e-6)
    assert (forecast.latitude_deg == store.latitude_deg).all()
    assert forecast.attrs["data"] == store.fingerprint_id


def test_without_a_store_every_channel_of_the_simulation_is_written(run: Path, tmp_path: Path) -> None:
    forecast = open_forecast(made(options_of(run, tmp_path / "f.zarr", init=INITS[1:], members=1)))
    assert len(forecast.names) == 5 + 5 * 2 and len(forecast.latitude_deg) == 8


def test_a_stopped_ensemble_goes_on_to_the_same_values_and_more_members_change_none(
    run: Path, store: Store, tmp_path: Path
) -> None:
    """It stops among the members of the second init time."""
    few = {"init": ("2001-05-03T12", "2001-05-11T00"), "members": 3, "lead_h": 24, "store": str(store.path)}
    whole = open_forecast(made(options_of(run, tmp_path / "whole.zarr", **few)))
    options = options_of(run, tmp_path / "stopped.zarr", **few)
    work, forecast = ensemble.plan(options)
    steps = ensemble.make(work, ForecastWriter(options.out, forecast))
    for _ in range(4):
        next(steps)
    steps.close()
    again = open_forecast(made(options))
    fewer = open_forecast(made(options_of(run, tmp_path / "fewer.zarr", **{**few, "members": 2})))
    for i in range(2):
        for j in range(2):
            np.testing.assert_array_equal(again.read(i, j), whole.read(i, j))
            np.testing.assert_array_equal(fewer.read(i, j), whole.read(i, j)[:2])


def test_errors_have_the_size_asked_for_and_are_symmetric(run: Path) -> None:
    model = Model("2000-12-29")
    draws = errors.Errors(run, model, 0.25, 90, 0, seed=3)
    signs = []
    for day in range(8):
        init = np.datetime64("2001-05-01", "s") + day * np.timedelta64(1, "D")
        truth = restarts.load(next(iter(restarts.find(run).values())))
        same, found = draws.draw(init, truth, 5)
        assert same is truth
        size = 0.25 * errors.season_std(errors.seasonal(run, init, 90))
        np.testing.assert_allclose([np.linalg.norm(one[TEMPERATURE]) for one in found], size, rtol=1e-12)
        signs += [np.sign(one[TEMPERATURE].sum()) for one in found]
    assert 0.25 < np.mean(np.array(signs) > 0) < 0.75


def test_a_season_wraps_around_the_year_and_leaves_out_the_weather_of_the_day(tmp_path: Path) -> None:
    (tmp_path / restarts.RESTARTS).mkdir()
    for day in ("2001-12-20", "2002-06-20", "2003-01-20", "2003-12-24", "2004-01-02"):
        (tmp_path / restarts.RESTARTS / f"{day}T18.npz").write_bytes(b"")
    found = errors.seasonal(tmp_path, np.datetime64("2004-01-05", "s"), 45)
    assert [path.stem[:10] for path in found] == ["2001-12-20", "2003-01-20"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init": ("2001-04-11T03",)}, "no time 2001-04-11T03:00:00: it covers 2001-01-01"),
        ({"init": ("spring",)}, "'spring' is not a time"),
        ({"init": ("2001-04-11T00:2001-05-21T00:0h",)}, "are none: the end comes before .* or the step is 0"),
        ({"init": ("2001-05-03T12", "2001-05-21:2001-04-11:24h")}, "'2001-05-21:2001-04-11:24h' are none"),
        ({"init": ("2001-01-01T00",), "breed_days": 1}, "no state before 2001-01-01"),
        ({"step_h": 6}, "--step-h 6 is no multiple of the simulation's 12 h"),
        ({"lead_h": 30}, "--lead-h 30 must be a multiple"),
        ({"amplitude": 0.0}, "--amplitude 0 .* positive"),
        ({"members": 30}, "need 31 restarts of the season .* fewer members, more --season-days than 60"),
        ({"control": Path("nowhere")}, "nowhere is no control run"),
    ],
)
def test_what_cannot_be_is_said(run: Path, tmp_path: Path, change: dict[str, object], said: str) -> None:
    settings = {"control": run, "out": tmp_path / "f.zarr", "init": INITS, "lead_h": 48, "season_days": 60}
    with pytest.raises(ValueError, match=said):
        made(EnsembleOptions(**{**settings, **change}))  # type: ignore[arg-type]


def test_restarts_of_another_run_are_found_out(run: Path, tmp_path: Path) -> None:
    options = options_of(run, tmp_path / "f.zarr", init=INITS[1:], members=1)
    work, _ = ensemble.plan(options)

    class Other(Model):
        def advance(self, days: float, step_days: float):
            self.modes = self.modes * 0.99
            return super().advance(days, step_days)

    with pytest.raises(ValueError, match=r"run again from its restart, the temperature at 2001-05-03T12"):
        list(ensemble.Maker(work, Other("2000-12-29")).members(np.datetime64("2001-05-03T12", "s"), [0]))


def test_the_store_must_be_of_the_simulation(run: Path, store: Store, tmp_path: Path) -> None:
    from aeris.data.store import packaged_sample

    with pytest.raises(ValueError, match=r"does not have .* of .*sample"):
        ensemble.plan(options_of(run, tmp_path / "f.zarr", store=str(packaged_sample())))


def test_the_program_says_what_it_makes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.zarr"
    words = [str(run), "--out", str(out), "--init", INITS[1], "--members", "2", "--lead-h", "24"]
    monkeypatch.setattr(sys, "argv", ["speedy", "ensemble", *words, "--season-days", "60"])
    program.main()
    assert "members: 2" in capsys.readouterr().out and open_forecast(out).members == 2
    program.main()
    assert "is there already" in capsys.readouterr().out
