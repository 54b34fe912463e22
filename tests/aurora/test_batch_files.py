"""Forecast files: layout, values, several starts, and nothing half written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from torch import Tensor

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.batch_files import open_cf, to_cf

START = datetime(2020, 6, 1, 12)
NAMES = pytest.mark.parametrize("name", ["x.nc", "x.zarr"])


def prediction(hours: float, samples: int = 1, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def field(*shape: int) -> Tensor:
        return torch.rand(*shape, 4, 8, generator=generator) + hours

    return Batch(
        surf_vars={"2t": field(samples, 1), "scaled_sd": field(samples, 1), "own": field(samples, 1)},
        static_vars={"z": field(), "tvl_0": field()},
        atmos_vars={"z": field(samples, 1, 3), "so2": field(samples, 1, 3)},
        metadata=Metadata(
            lat=torch.linspace(80, -80, 4, dtype=torch.float64),
            lon=torch.arange(8, dtype=torch.float64) * 45,
            time=tuple(START + timedelta(days=i, hours=hours) for i in range(samples)),
            atmos_levels=(100, 500, 850),
            rollout_step=int(hours // 6),
        ),
    )


def engine(name: str) -> str:
    return "zarr" if name.endswith(".zarr") else "h5netcdf"


@NAMES
def test_layout_is_that_of_weatherbench(tmp_path: Path, name: str) -> None:
    assert to_cf([prediction(6), prediction(12)], tmp_path / name, START) == 2
    with xarray.open_dataset(tmp_path / name, engine=engine(name), decode_timedelta=True) as data:
        assert dict(data.sizes) == {
            "time": 1,
            "prediction_timedelta": 2,
            "level": 3,
            "latitude": 4,
            "longitude": 8,
        }
        assert data["2m_temperature"].dims == ("time", "prediction_timedelta", "latitude", "longitude")
        assert data["geopotential"].dims[2] == "level"
        assert data["time"].values.astype("datetime64[h]").tolist() == [START]
        assert (data["prediction_timedelta"].values / np.timedelta64(1, "h")).tolist() == [6, 12]
        assert data["level"].values.tolist() == [100, 500, 850]
        assert data["geopotential"].attrs["units"] == "m2 s-2"
        assert data["snow_depth"].attrs["standard_name"] == "lwe_thickness_of_surface_snow_amount"
        assert data["geopotential_at_surface"].dims == ("latitude", "longitude")
        assert {"own", "tvl_0", "sulphur_dioxide"} <= set(data.data_vars)
        assert data.attrs["Conventions"] == "CF-1.11"
        got = data["2m_temperature"].values[0, 1]
    np.testing.assert_array_equal(got, prediction(12).surf_vars["2t"][0, 0].numpy())


@NAMES
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    states = [prediction(hours, samples=2, seed=int(hours)) for hours in (0.5, 6, 7.5)]
    starts = [START.replace(tzinfo=timezone.utc), START + timedelta(days=1)]
    to_cf(iter(states), tmp_path / name, starts)
    forecast = open_cf(tmp_path / name)
    assert forecast.starts == (START, START + timedelta(days=1))
    assert forecast.leads == tuple(timedelta(hours=hours) for hours in (0.5, 6, 7.5))
    for i, j in ((0, 0), (1, 2)):
        got, put = forecast.read(i, j), states[j]
        assert got.metadata.time == (put.metadata.time[i],)
        assert got.metadata.grid_key == put.metadata.grid_key
        assert (got.metadata.atmos_levels, got.metadata.rollout_step) == ((100, 500, 850), (0, 1, 1)[j])
        for kind in ("surf_vars", "atmos_vars"):
            for key, x in getattr(put, kind).items():
                assert torch.equal(getattr(got, kind)[key], x[i : i + 1])
        # static fields are those of the first prediction
        assert torch.equal(got.static_vars["z"], states[0].static_vars["z"])
    forecast.close()


@NAMES
def test_a_batch_without_levels(tmp_path: Path, name: str) -> None:
    batch = prediction(6)
    batch = replace(batch, atmos_vars={}, metadata=replace(batch.metadata, atmos_levels=()))
    to_cf([batch], tmp_path / name, START)
    forecast = open_cf(tmp_path / name)
    assert forecast.read(0, 0).metadata.atmos_levels == ()
    forecast.close()


@NAMES
def test_lead_times_are_written_as_they_come_and_the_name_at_the_end(tmp_path: Path, name: str) -> None:
    seen = []

    def states() -> Iterator[Batch]:
        for hours in (6, 12, 18):
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            yield prediction(hours)

    to_cf(states(), tmp_path / name, START)
    assert seen == [[], [f"{name}.partial"], [f"{name}.partial"]]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@NAMES
def test_a_failure_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    to_cf([prediction(6)], tmp_path / name, START)

    def broken() -> Iterator[Batch]:
        yield prediction(6, seed=3)
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="broke"):
        to_cf(broken(), tmp_path / name, START)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    forecast = open_cf(tmp_path / name)
    assert torch.equal(forecast.read(0, 0).surf_vars["2t"], prediction(6).surf_vars["2t"])
    forecast.close()
    to_cf([prediction(6), prediction(12)], tmp_path / name, START)
    forecast = open_cf(tmp_path / name)
    assert len(forecast.leads) == 2
    forecast.close()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.nc"
    first, other = prediction(6), prediction(12)
    lat = first.metadata.lat[:, None].expand(4, 8)
    lon = first.metadata.lon.expand(4, 8)
    cases: list[tuple[list[Batch], Any, str]] = [
        ([], START, "no prediction"),
        ([first], (START, START), "2 start times for 1 samples"),
        ([first, first], START, "must rise"),
        ([prediction(6, samples=2)], (START, START), "must be equal"),
        ([first, replace(other, surf_vars={"2t": other.surf_vars["2t"]})], START, "other variables"),
        ([replace(first, metadata=replace(first.metadata, lat=lat, lon=lon))], START, "regrid"),
        (
            [replace(first, surf_vars={**first.surf_vars, "geopotential": first.surf_vars["2t"]})],
            START,
            "rename",
        ),
    ]
    for batches, start, says in cases:
        with pytest.raises(ValueError, match=says):
            to_cf(batches, path, start)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"\.nc or \.zarr, not x\.grib"):
        to_cf([first], tmp_path / "x.grib", START)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_cf(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("nothing")
    (tmp_path / "empty.zarr").mkdir()
    for name in ("text.nc", "empty.zarr"):
        with pytest.raises(ValueError, match="neither NetCDF nor Zarr"):
            open_cf(tmp_path / name)
    prediction(6).to_netcdf(tmp_path / "batch.nc")
    with pytest.raises(ValueError, match="lacks prediction_timedelta"):
        open_cf(tmp_path / "batch.nc")


def with_data(path: Path) -> list[str]:
    """Make a Zarr of weather, or a directory of notes; return what is in it."""
    if path.suffix == ".zarr":
        names = ("time", "latitude", "longitude", "2m_temperature")
        xarray.Dataset({name: ("point", np.arange(3.0)) for name in names}).to_zarr(path, zarr_format=2)
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    return sorted(str(found) for found in path.rglob("*"))


@pytest.mark.parametrize(
    ("there", "name", "says"),
    [
        ("era5.zarr", "era5.zarr", "era5.zarr is no forecast of aeris.aurora: it lacks prediction_timedelta"),
        ("x.nc", "x.nc", "x.nc is a directory"),
        ("x.nc.partial", "x.nc", "x.nc.partial is no unfinished forecast"),
        ("x.zarr.partial", "x.zarr", "x.zarr.partial is no unfinished forecast"),
    ],
)
def test_what_is_no_forecast_is_not_deleted(tmp_path: Path, there: str, name: str, says: str) -> None:
    """Nor is any step computed first."""
    before, path = with_data(tmp_path / there), tmp_path / name

    def states() -> Iterator[Batch]:
        raise AssertionError("computed")
        yield

    with pytest.raises(ValueError, match=says):
        to_cf(states(), path, START)
    assert sorted(str(found) for found in (tmp_path / there).rglob("*")) == before


def test_other_names_in_the_way_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "x.zarr").write_text("a file")
    (tmp_path / "empty.zarr").mkdir()
    for name, says in (("x.zarr", "no directory of Zarr"), ("empty.zarr", "neither NetCDF nor Zarr")):
        with pytest.raises(ValueError, match=says):
            to_cf([prediction(6)], tmp_path / name, START)
    assert (tmp_path / "x.zarr").read_text() == "a file" and (tmp_path / "empty.zarr").is_dir()


def test_what_came_there_in_the_meantime_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"

    def states() -> Iterator[Batch]:
        yield prediction(6)
        with_data(path)

    with pytest.raises(ValueError, match="no forecast of aeris.aurora"):
        to_cf(states(), path, START)
    assert (path / "2m_temperature").is_dir()
    assert open_cf(tmp_path / "x.zarr.partial").leads == (timedelta(hours=6),)


@NAMES
def test_what_a_cut_off_run_left_is_replaced(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []
    monkeypatch.setattr("aeris.aurora.batch_files._remove", removed.append)
    with pytest.raises(ValueError, match="must rise"):
        to_cf([prediction(6), prediction(6)], tmp_path / name, START)
    monkeypatch.undo()
    assert len(removed) == 2 and (tmp_path / f"{name}.partial").exists()
    to_cf([prediction(6)], tmp_path / name, START)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_netcdf_file_is_replaced_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time is there none."""
    path = tmp_path / "x.nc"
    to_cf([prediction(6)], path, START)
    replace_file = Path.replace

    def look(self: Path, target: Path) -> Path:
        assert target.exists()
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", look)
    assert to_cf([prediction(6), prediction(12)], path, START) == 2


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 may crash when its last write fails, so room is looked for before each field."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match="No space left"):
        to_cf([prediction(6)], tmp_path / "forecast.nc", START)
    assert not list(tmp_path.iterdir())
