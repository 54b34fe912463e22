"""The SPEEDY program, with an atmosphere in place of the model whose pressure levels are known exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from aeris.data.sources import Sources, open_source
from aeris.data.speedy import __main__ as program
from aeris.data.speedy import control, restarts
from aeris.data.speedy.control import Options, generate
from aeris.data.speedy.levels import GAS_CONSTANT, GRAVITY, LAPSE_RATE, on_pressure_levels
from aeris.data.speedy.model import Speedy
from aeris.data.variables import STATIC
from tests.data.simulation import POWER, SEA_K, SEA_PA, SIGMA, Standard


def weather(levels: tuple[int, ...] = (100, 500, 850, 925, 1000), **options: object) -> xr.Dataset:
    model = Standard(**options)
    return on_pressure_levels(model.advance(1.0, 0.25), model.statics(), levels)


def make(out: Path, days: int = 5, model: Standard | None = None) -> Options:
    options = Options(out, days=days, spin_up_days=2, start="2000-12-31", levels_hpa=(500, 850))
    list(generate(options, model or Standard()))
    return options


def test_below_ground_follows_the_lapse_rate_exactly() -> None:
    x = weather()
    model = Standard()
    ground_pa = SEA_PA * (1 - LAPSE_RATE * model.ground_m / SEA_K) ** (1 / POWER)
    below = 0
    for level in (850, 925, 1000):
        hidden = (level * 100.0 > ground_pa * SIGMA[0]).T[::-1]
        below += int(hidden.sum())
        t = SEA_K * (level * 100.0 / SEA_PA) ** POWER
        one = x.sel(level=level).isel(time=0)
        np.testing.assert_allclose(one.temperature.values[hidden], t, rtol=1e-6)
        z = (SEA_K - t) / LAPSE_RATE * GRAVITY
        np.testing.assert_allclose(one.geopotential.values[hidden], z, rtol=1e-5, atol=0.1)
        assert float(one.temperature.min()) > 250  # a straight line from the lowest levels gave 129 K
    assert below > 50


def test_between_levels_is_linear_in_the_logarithm_of_pressure() -> None:
    x = weather()
    model = Standard()
    lowest_pa = (SIGMA[0] * SEA_PA * (1 - LAPSE_RATE * model.ground_m / SEA_K) ** (1 / POWER)).T[::-1]
    for level in (500, 850):
        inside = level * 100.0 < lowest_pa
        u = x.u_component_of_wind.sel(level=level).isel(time=0).values
        np.testing.assert_allclose(u[inside], np.log(level * 100.0), rtol=1e-6)
        np.testing.assert_allclose(u[~inside], np.log(lowest_pa[~inside]), rtol=1e-6)
        t = SEA_K * (level * 100.0 / SEA_PA) ** POWER
        found = x.temperature.sel(level=level).isel(time=0).values
        np.testing.assert_allclose(found[inside], t, rtol=1e-2)


def test_above_the_top_the_air_is_isothermal() -> None:
    x = weather(levels=(5, 10, 100)).isel(time=0)
    np.testing.assert_allclose(x.temperature.sel(level=5), x.temperature.sel(level=10), rtol=1e-6)
    rise = GAS_CONSTANT * x.temperature.sel(level=5) * np.log(2.0)
    thickness = x.geopotential.sel(level=5) - x.geopotential.sel(level=10)
    np.testing.assert_allclose(thickness, rise, rtol=1e-5)


def test_sea_level_pressure_takes_the_ground_away() -> None:
    np.testing.assert_allclose(weather().mean_sea_level_pressure, SEA_PA, rtol=1e-6)


def test_axes_names_and_units_are_those_of_weatherbench() -> None:
    x = weather()
    assert x.geopotential.dims == ("time", "level", "latitude", "longitude")
    assert list(x.level) == [100, 500, 850, 925, 1000] and x.latitude.values[0] == 80.0
    np.testing.assert_array_equal(
        x.geopotential_at_surface.values[0, 0], np.float32(GRAVITY * Standard().ground_m[0, -1])
    )
    assert float(x["2m_temperature"][0, 0, 0]) == pytest.approx(280.0 + (-72 + 6))
    assert all(x[name].dtype == np.float32 for name in x.data_vars)


def test_humidity_is_never_negative() -> None:
    assert float(weather(wet=-1e-9).specific_humidity.min()) == 0.0


def test_files_hold_every_time_once(tmp_path: Path) -> None:
    options = make(tmp_path / "out", days=35)
    files = sorted((tmp_path / "out").glob("*.nc"))
    assert [file.name for file in files] == ["speedy_2000-12.nc", "speedy_2001-01.nc", "speedy_2001-02.nc"]
    parts = Sources([open_source(file) for file in files])
    times = parts.times(["geopotential"])
    np.testing.assert_array_equal(times, options.times)
    assert times[0] == np.datetime64("2000-12-31") and len(times) == 140
    hour = (times - np.datetime64("2001-01-01")) / np.timedelta64(1, "h")
    read = parts.read("2m_temperature", times, ())[:, 0, 0, 0]
    np.testing.assert_allclose(read, 280.0 + hour, rtol=1e-6)
    assert {name for name, _ in STATIC.values()} <= {*parts.parts[0].variables}


def test_spin_up_comes_before_the_first_day(tmp_path: Path) -> None:
    model = Standard()
    make(tmp_path, days=12, model=model)
    assert model.asked == [(1.75, 1.75), (10, 0.25), (2, 0.25)]


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name)
    for file in (tmp_path / "a").glob("*.nc"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_whole_directory_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = make(out)
    assert control.is_done(options)
    (out / "speedy_2001-01.nc").unlink()
    assert not control.is_done(options)
    with pytest.raises(ValueError, match=r"made with .*'days': 5"):
        control.is_done(Options(out, days=6))
    (out / "speedy.json").unlink()
    with pytest.raises(ValueError, match=r"other files \(speedy_2000-12.nc\)"):
        control.is_done(options)
    assert not control.is_done(Options(tmp_path / "new"))


def test_a_simulation_that_blows_up_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="blew up: geopotential is not finite"):
        make(tmp_path, model=Standard(blow_up=True))


def test_a_small_disk_is_said_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="needs 0.0 GB, the disk has 0.0 GB free"):
        make(tmp_path)


def test_a_year_is_a_year_of_the_calendar(tmp_path: Path) -> None:
    assert Options(tmp_path).length_days == Options(tmp_path, years=1).length_days == 365
    assert Options(tmp_path, years=4).times[-1] == np.datetime64("2004-12-31T18")
    assert Options(tmp_path, years=4).made == Options(tmp_path, days=1461).made


class Killed(Exception):
    """The simulation was stopped."""


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_stopped_run_goes_on_from_a_restart_to_the_same_bytes(tmp_path: Path, chunks: int) -> None:
    whole = make(tmp_path / "whole", days=45, model=Standard(weather=1.0))
    options = Options(**{**vars(whole), "out": tmp_path / "stopped"})
    stopped = Standard(weather=1.0)
    advance, left = stopped.advance, iter(range(chunks + 1))

    def dying(days: float, step_days: float) -> xr.Dataset:
        if next(left, None) is None:
            raise Killed
        return advance(days, step_days)

    stopped.advance = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        list(generate(options, stopped))
    again = Standard(weather=1.0)
    assert list(generate(options, again))
    assert len(again.asked) <= 5  # a month and a part of it are computed again at most
    assert (2.0 - 0.25,) * 2 not in again.asked
    for file in (tmp_path / "whole").glob("*.nc"):
        assert file.read_bytes() == (options.out / file.name).read_bytes()
    assert [*restarts.find(options.out)] == [*restarts.find(whole.out)]


def test_restarts_hold_arrays_only_and_damage_is_said(tmp_path: Path) -> None:
    options = make(tmp_path, days=12)
    found = restarts.find(options.out)
    assert [str(time) for time in found] == ["2000-12-30T18:00:00", "2001-01-09T18:00:00"]
    path = restarts.newest(options.out, np.datetime64("2001-01-09T17"))
    assert path == found[np.datetime64("2000-12-30T18", "s")]
    assert restarts.newest(options.out, np.datetime64("2000-12-30T00")) is None
    with np.load(path, allow_pickle=False) as file:
        assert {name.split(".")[0] for name in file.files} == {"dynamics", "physics", "clock"}
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"30T18.npz is damaged .* remove it"):
        restarts.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"days": -1}, "at least 1"),
        ({"days": 3, "years": 1}, "give one of them"),
        ({"restart_days": 5}, "multiple of 10"),
        ({"step_h": 5}, "does not divide 24"),
        ({"levels_hpa": (850, 500)}, "rising"),
        ({"start": "spring"}, "no day"),
    ],
)
def test_wrong_options_are_said(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(tmp_path, **change)


def test_without_jcm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jcm", None)
    with pytest.raises(ValueError, match=r"pip install aeris-swipe\[speedy\]"):
        Speedy(np.datetime64("2001-01-01"))


def test_the_program_runs_and_knows_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began: list[np.datetime64] = []

    def model(start: np.datetime64) -> Standard:
        began.append(start)
        return Standard(str(start))

    monkeypatch.setattr(program, "Speedy", model)
    command = [
        "speedy",
        "--out",
        str(tmp_path),
        "--days",
        "3",
        "--spin-up-days",
        "2",
        "--start",
        "2001-01-30",
    ]
    monkeypatch.setattr(sys, "argv", command)
    program.main()
    assert began == [np.datetime64("2001-01-28")]
    said = capsys.readouterr().out
    assert "speedy_2001-01.nc: 8 times" in said and "speedy_2001-02.nc: 4 times" in said
    assert json.loads((tmp_path / "speedy.json").read_text())["days"] == 3
    program.main()
    assert "nothing to do" in capsys.readouterr().out and len(began) == 1
