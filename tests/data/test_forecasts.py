"""Forecasts on disk: what is written is read, nothing unfinished looks finished, and a stop costs little.

Small arrays on disk, no network; xarray reads the files as somebody else would.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from aeris.data.forecast_members import read_progress
from aeris.data.forecasts import ForecastError, ForecastPlan, ForecastWriter, open_forecast

NAMES = ("t2m", "u10", "z500", "z850", "q850", "u10hpa", "sst")
PLAN = ForecastPlan(
    inits=("2000-05-31T00:00:00", "2000-06-01T12:00:00"),
    lead_h=(6, 12, 18),
    members=3,
    names=NAMES,
    latitude_deg=(60.0, 0.0, -60.0, -75.0),
    longitude_deg=(0.0, 90.0, 180.0),
    made={"seed": 1, "weights": "abc", "sampler_churn_max": "inf"},
    about={"title": "test", "run": "runs/test"},
)
KINDS = ["forecast.zarr", "forecast"]


def truth(init: int, members: range, lead: int) -> np.ndarray:
    """Values [M, C, Y, X] that say where they belong; the last channel has no value in one corner."""
    x_MCYX = np.empty((len(members), len(NAMES), 4, 3), dtype=np.float32)
    for place, member in enumerate(members):
        case = 100 * init + 10 * member + lead
        x_MCYX[place] = 1000 * np.arange(len(NAMES))[:, None, None] + case + np.arange(12).reshape(4, 3) / 16
    x_MCYX[:, -1, 0, 0] = np.nan
    return x_MCYX


def fill(writer: ForecastWriter, stop_after: int = 10**6, batch: int = 2) -> None:
    """Write what is missing, lead by lead for batches of members, as a forecast does."""
    written = 0
    for init in range(2):
        for first in range(0, 3, batch):
            members = range(first, min(first + batch, 3))
            for lead in range(writer.leads_done(init, members), 3):
                if written == stop_after:
                    return
                writer.write(init, members, lead, truth(init, members, lead))
                written += 1


def check_whole(path: Path) -> None:
    forecast = open_forecast(path)
    for init in range(2):
        for lead in range(3):
            np.testing.assert_array_equal(forecast.read(init, lead), truth(init, range(3), lead))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    writer = ForecastWriter(tmp_path / name, PLAN)
    fill(writer)
    writer.finish()
    check_whole(tmp_path / name)
    forecast = open_forecast(str(tmp_path / name))
    assert forecast.inits.dtype == np.dtype("datetime64[s]")
    assert [str(t) for t in forecast.inits] == list(PLAN.inits)
    assert forecast.lead_h.tolist() == [6, 12, 18]
    assert (forecast.members, forecast.names) == (3, NAMES)
    np.testing.assert_array_equal(forecast.latitude_deg, [60, 0, -60, -75])
    np.testing.assert_array_equal(forecast.longitude_deg, [0, 90, 180])
    assert forecast.attrs["seed"] == 1
    assert forecast.attrs["title"] == "test"
    assert forecast.attrs["units"]["q850"] == "kg kg-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_zarr_is_laid_out_as_in_weatherbench(tmp_path: Path) -> None:
    writer = ForecastWriter(tmp_path / "f.zarr", PLAN)
    fill(writer)
    writer.finish()
    dataset = xr.open_zarr(tmp_path / "f.zarr", consolidated=True)
    assert dataset["2m_temperature"].dims == (
        "time", "number", "prediction_timedelta", "latitude", "longitude",
    )  # fmt: skip
    z = dataset["geopotential"]
    assert z.dims == ("time", "number", "prediction_timedelta", "level", "latitude", "longitude")
    assert z.dtype == np.float32
    assert z.encoding["chunks"] == (1, 1, 1, 3, 4, 3)
    assert dataset["level"].values.tolist() == [10, 500, 850]
    assert dataset["prediction_timedelta"].values[1] == np.timedelta64(12, "h")
    one = z.sel(time="2000-06-01T12", number=2, prediction_timedelta="18h", level=850)
    np.testing.assert_array_equal(one.values, truth(1, range(2, 3), 2)[0, NAMES.index("z850")])
    assert bool(np.isnan(z.sel(level=10)).all())
    assert dataset["u_component_of_wind"].attrs["standard_name"] == "eastward_wind"
    assert dataset["specific_humidity"].attrs["units"] == "kg kg-1"
    assert dataset.attrs["seed"] == 1
    dataset.close()


def test_netcdf_follows_cf(tmp_path: Path) -> None:
    writer = ForecastWriter(tmp_path / "f", PLAN)
    fill(writer)
    writer.finish()
    files = sorted(path.name for path in (tmp_path / "f").glob("*.nc"))
    assert files[0] == "20000531T0000_m000.nc"
    assert len(files) == 6
    with xr.open_dataset(tmp_path / "f" / "20000601T1200_m002.nc", decode_timedelta=True) as one:
        assert one.attrs["Conventions"] == "CF-1.11"
        assert one["z"].dims == (
            "realization", "forecast_reference_time", "forecast_period", "level", "latitude", "longitude",
        )  # fmt: skip
        field = one["z"].sel(realization=2, forecast_reference_time="2000-06-01T12", forecast_period="18h")
        np.testing.assert_array_equal(
            field.sel(level=850).squeeze().values, truth(1, range(2, 3), 2)[0, NAMES.index("z850")]
        )
        assert one["time"].values[0, 2] == np.datetime64("2000-06-02T06:00")
        names = {
            "z": "geopotential",
            "t2m": "air_temperature",
            "u": "eastward_wind",
            "q": "specific_humidity",
        }
        assert {name: one[name].attrs["standard_name"] for name in names} == names
        assert one["q"].attrs["units"] == "1"
        assert float(one["t2m"]["height_2m"]) == 2.0
        assert one["level"].attrs["standard_name"] == "air_pressure"
        assert bool(np.isnan(one["sst"][0, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("name", "stop_after"),
    [*(("forecast.zarr", n) for n in (0, 1, 3, 4, 8, 12)), ("forecast", 1), ("forecast", 4)],
)
def test_a_stopped_forecast_goes_on(tmp_path: Path, name: str, stop_after: int) -> None:
    """Whatever was written before the stop, the end is the same, and in between it never looks finished."""
    path = tmp_path / name
    fill(ForecastWriter(path, PLAN), stop_after)
    assert not path.exists()
    if stop_after:
        with pytest.raises(ForecastError, match="not finished: .* of 18"):
            open_forecast(path)
        part = open_forecast(path, partial=True).read(0, 0)
        whole_netcdf_members = name == "forecast" and stop_after < 3
        seen = part[0] if not whole_netcdf_members else np.full_like(part[0], np.nan)
        expected = truth(0, range(1), 0)[0] if not whole_netcdf_members else seen
        np.testing.assert_array_equal(seen, expected)
        if stop_after < 4:
            assert np.isnan(part[2]).all()
    writer = ForecastWriter(path, PLAN)
    assert writer.steps_done <= 2 * stop_after
    fill(writer)
    writer.finish()
    check_whole(path)


def test_zarr_reads_back_to_go_on_and_netcdf_starts_a_member_again(tmp_path: Path) -> None:
    for name, done in [("f.zarr", 2), ("f", 0)]:
        fill(ForecastWriter(tmp_path / name, PLAN), stop_after=2)
        writer = ForecastWriter(tmp_path / name, PLAN)
        assert writer.leads_done(0, range(2)) == done
        if done:
            np.testing.assert_array_equal(writer.read(0, range(2), 1), truth(0, range(2), 1))


def test_members_that_are_ahead_are_left_alone(tmp_path: Path) -> None:
    """With another batch size some members of a batch may be further: only the late ones are written."""
    fill(ForecastWriter(tmp_path / "f.zarr", PLAN), stop_after=2, batch=1)
    writer = ForecastWriter(tmp_path / "f.zarr", PLAN)
    assert writer.leads_done(0, range(3)) == 0
    wrong = truth(0, range(3), 0)
    wrong[0] = -1
    writer.write(0, range(3), 0, wrong)
    np.testing.assert_array_equal(writer.read(0, range(3), 0), truth(0, range(3), 0))
    assert [writer.leads_done(0, range(m, m + 1)) for m in range(3)] == [2, 1, 1]


def test_finished_forecast_is_recognised(tmp_path: Path) -> None:
    writer = ForecastWriter(tmp_path / "f.zarr", PLAN)
    with pytest.raises(ForecastError, match="lacks 18 lead times"):
        writer.finish()
    fill(writer)
    writer.finish()
    again = ForecastWriter(tmp_path / "f.zarr", replace(PLAN, about={"title": "other words"}))
    assert again.complete
    assert again.steps_done == 18


@pytest.mark.parametrize(("name", "finished"), [("f.zarr", True), ("f.zarr", False), ("f", False)])
def test_another_forecast_is_refused_with_the_difference(tmp_path: Path, name: str, finished: bool) -> None:
    writer = ForecastWriter(tmp_path / name, PLAN)
    fill(writer, 10**6 if finished else 2)
    if finished:
        writer.finish()
    made = {**PLAN.made, "seed": 2, "sampler_levels": 19}
    other = replace(
        PLAN, made=made, members=5, inits=tuple(f"2000-06-0{day}T00:00:00" for day in range(1, 6))
    )
    with pytest.raises(ForecastError) as error:
        ForecastWriter(tmp_path / name, other)
    message = str(error.value)
    for words in (
        "seed: 1 there, 2 now", "members: 3 there, 5 now", "sampler_levels: None there, 19 now",
        "inits: 2000-05-31T00:00:00, 2000-06-01T12:00:00 there, 5 from 2000-06-01", "--overwrite", "--out",
    ):  # fmt: skip
        assert words in message
    assert "weights" not in message
    assert (tmp_path / name).exists() == finished


def test_overwriting_keeps_the_old_forecast_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.zarr"
    first = ForecastWriter(path, PLAN)
    fill(first)
    first.finish()
    other = replace(PLAN, made={"seed": 2})
    fill(ForecastWriter(path, other, overwrite=True), stop_after=3)
    assert open_forecast(path).attrs["seed"] == 1
    second = ForecastWriter(path, other, overwrite=True)  # the same command goes on
    assert second.steps_done == 6
    fill(second)
    second.finish()
    assert open_forecast(path).attrs["seed"] == 2
    check_whole(path)
    assert [p.name for p in tmp_path.iterdir()] == ["f.zarr"]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    fill(ForecastWriter(tmp_path / "f.zarr", PLAN), stop_after=2)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    ForecastWriter(tmp_path / "f.zarr", replace(PLAN, made={"seed": 2}), overwrite=True)
    ForecastWriter(tmp_path / "g.zarr", PLAN)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_stop_between_the_last_renames(tmp_path: Path) -> None:
    """The old forecast is out of the way, the new one not yet in place: the next call finishes it."""
    path = tmp_path / "f.zarr"
    for made in ({"seed": 1}, {"seed": 2}):
        writer = ForecastWriter(path, replace(PLAN, made=made), overwrite=True)
        fill(writer)
        if made["seed"] == 1:
            writer.finish()
    path.rename(tmp_path / "f.zarr.old")
    ForecastWriter(path, replace(PLAN, made={"seed": 2}), overwrite=True).finish()
    assert open_forecast(path).attrs["seed"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["f.zarr"]


def test_stop_while_creating(tmp_path: Path) -> None:
    """A directory with nothing in it, or with progress and no files, is started afresh."""
    (tmp_path / "f.zarr.partial").mkdir()
    fill(ForecastWriter(tmp_path / "f.zarr", PLAN), stop_after=2)
    shutil.rmtree(tmp_path / "f.zarr.partial" / "forecast")
    writer = ForecastWriter(tmp_path / "f.zarr", PLAN)
    assert writer.steps_done == 0
    fill(writer)
    writer.finish()
    check_whole(tmp_path / "f.zarr")


def test_refuses_what_is_no_forecast(tmp_path: Path) -> None:
    with pytest.raises(ForecastError, match=r"name it f\.zarr for Zarr, or f for a directory"):
        ForecastWriter(tmp_path / "f.nc", PLAN)
    (tmp_path / "photos").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ForecastError, match="photos is not a forecast"):
            ForecastWriter(tmp_path / "photos", PLAN, overwrite)
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(tmp_path / "other.zarr", zarr_format=2)
    with pytest.raises(ForecastError, match=r"other\.zarr is not a forecast of aeris\.forecast"):
        open_forecast(tmp_path / "other.zarr")
    with pytest.raises(ForecastError, match="does not exist: make a forecast with"):
        open_forecast(tmp_path / "none.zarr")
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "thesis.txt").touch()
    with pytest.raises(ForecastError, match=r"x\.partial is in the way"):
        ForecastWriter(tmp_path / "x", PLAN)


def test_damage_is_named(tmp_path: Path) -> None:
    for name in KINDS:
        writer = ForecastWriter(tmp_path / name, PLAN)
        fill(writer)
        writer.finish()
    (tmp_path / "forecast" / "20000531T0000_m001.nc").write_bytes(b"not HDF5")
    with pytest.raises(ForecastError, match=r"20000531T0000_m001\.nc is missing or damaged"):
        open_forecast(tmp_path / "forecast").read(0, 0)
    (tmp_path / "forecast" / "forecast.json").write_text("{}")
    with pytest.raises(ForecastError, match="lacks"):
        open_forecast(tmp_path / "forecast")
    fill(ForecastWriter(tmp_path / "g", PLAN), stop_after=1)
    progress = tmp_path / "g.partial" / "progress.json"
    progress.write_text(progress.read_text()[:50])
    with pytest.raises(ForecastError, match=r"g\.partial is in the way and no forecast"):
        ForecastWriter(tmp_path / "g", PLAN)


def test_progress_is_plain_text(tmp_path: Path) -> None:
    fill(ForecastWriter(tmp_path / "f.zarr", PLAN), stop_after=2)
    partial = tmp_path / "f.zarr.partial"
    values = json.loads((partial / "progress.json").read_text())
    assert values["leads_done"] == [[0, 0, 0], [0, 0, 0]]
    assert ForecastPlan.from_json(values["plan"]).differences(PLAN) == []
    assert (partial / "done" / "0").read_text().split("\n") == ["0 0 2 1", "0 0 2 2", ""]
    assert read_progress(partial)[1].tolist() == [[2, 2, 0], [0, 0, 0]]
    ForecastWriter(tmp_path / "f.zarr", PLAN).begin()
    assert not list((partial / "done").iterdir())
    assert read_progress(partial)[1].tolist() == [[2, 2, 0], [0, 0, 0]]


def test_surface_only(tmp_path: Path) -> None:
    plan = replace(PLAN, names=("t2m",), inits=PLAN.inits[:1], lead_h=(6,), members=1)
    x_MCYX = np.arange(12, dtype=np.float32).reshape(1, 1, 4, 3)
    for name in KINDS:
        writer = ForecastWriter(tmp_path / name, plan)
        writer.write(0, range(1), 0, x_MCYX)
        writer.finish()
        np.testing.assert_array_equal(open_forecast(tmp_path / name).read(0, 0), x_MCYX)
