"""Batches: what is refused, what stays float64, files, cropping and regridding."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from torch import Tensor

from aeris.aurora.batch import Batch, Metadata

TIME = datetime(2020, 6, 1, 12)


def metadata(rows: int = 17, cols: int = 32, **changes: Any) -> Metadata:
    values: dict[str, Any] = {
        "lat": torch.linspace(88, -88, rows, dtype=torch.float64),
        "lon": torch.arange(cols, dtype=torch.float64) * (360 / cols),
        "time": (TIME,),
        "atmos_levels": (100, 500, 850),
    }
    return Metadata(**{**values, **changes})


def make_batch(rows: int = 17, cols: int = 32, samples: int = 1, where: Metadata | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def field(*shape: int) -> Tensor:
        return torch.randn(*shape, rows, cols, generator=generator)

    where = where or metadata(rows, cols, time=(TIME,) * samples)
    return Batch(
        surf_vars={"2t": 280 + field(samples, 2), "msl": 101325 + field(samples, 2)},
        static_vars={"lsm": field(), "z": field()},
        atmos_vars={"z": field(samples, 2, 3), "t": 250 + field(samples, 2, 3)},
        metadata=where,
    )


def fields(batch: Batch) -> dict[str, Tensor]:
    groups = {"surf": batch.surf_vars, "static": batch.static_vars, "atmos": batch.atmos_vars}
    return {f"{kind}_{name}": x for kind, group in groups.items() for name, x in group.items()}


def grid(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    lat = torch.linspace(60, 20, rows, dtype=torch.float64)
    lon = torch.linspace(5, 50, cols, dtype=torch.float64)
    return lat[:, None] + 0.01 * lon, lon + 0.01 * lat[:, None]


def test_coordinates_stay_float64_on_the_cpu() -> None:
    batch = make_batch()
    for changed in (batch.type(torch.bfloat16), batch.type(torch.float64), batch.to("meta"), batch.crop(4)):
        assert changed.metadata.lat.dtype == changed.metadata.lon.dtype == torch.float64
        assert changed.metadata.lat.device.type == "cpu"
    assert {x.dtype for x in fields(batch.type(torch.bfloat16)).values()} == {torch.bfloat16}
    assert {x.device.type for x in fields(batch.to("meta")).values()} == {"meta"}
    assert metadata(lat=torch.linspace(90, -90, 17)).lat.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lat": torch.linspace(-90, 90, 17)}, "flip"),
        ({"lat": torch.linspace(91, -90, 17)}, r"\[-90, 90\], found -90.0 to 91.0"),
        ({"lat": torch.full((17,), float("nan"))}, r"\[-90, 90\]"),
        ({"lon": torch.linspace(-180, 170, 32)}, r"\[0, 360\), found -180.0 to 170.0"),
        ({"lon": torch.linspace(0, 360, 32)}, r"\[0, 360\)"),
        ({"lon": torch.linspace(350, 0, 32)}, "roll"),
        ({"lon": torch.zeros(17, 32)}, r"\(17,\) and \(17, 32\)"),
        ({"lat": torch.linspace(90, -90, 17).half()}, "float16"),
        ({"time": TIME}, "tuple of datetime"),
        ({"time": (np.datetime64("2020-06-01"),)}, "tuple of datetime"),
        ({"atmos_levels": (500, 0, 850)}, "above zero"),
        ({"atmos_levels": (500, 500, 850)}, "different"),
    ],
)
def test_bad_metadata_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        metadata(**changes)


def test_latitude_of_every_point_must_fall_along_columns() -> None:
    """The official package only looks for differences that are not zero, which rising ones pass."""
    lat, lon = grid(4, 6)
    assert metadata(lat=lat, lon=lon).lat.shape == (4, 6)
    with pytest.raises(ValueError, match="flip"):
        metadata(lat=lat.flip(0), lon=lon)
    with pytest.raises(ValueError, match="roll"):
        metadata(lat=lat, lon=lon.flip(1))


def test_times_become_utc() -> None:
    tokyo = timezone(timedelta(hours=9))
    where = metadata(time=(datetime(1950, 1, 1, 6), datetime(2022, 1, 1, 9, tzinfo=tokyo)))
    assert where.time == (datetime(1950, 1, 1, 6), datetime(2022, 1, 1))


def test_levels_become_plain_numbers() -> None:
    levels = metadata(atmos_levels=tuple(np.array([500, 850]))).atmos_levels
    assert levels == (500, 850)
    assert all(type(level) is int for level in levels)


def test_equal_grids_have_equal_keys() -> None:
    assert metadata().grid_key == metadata(time=(TIME, TIME)).grid_key
    assert metadata().grid_key != metadata(lat=torch.linspace(88.1, -88, 17)).grid_key


@pytest.mark.parametrize(
    ("group", "shape", "says"),
    [
        ("surf_vars", (2, 2, 17, 32), r"\(1, 2, 17, 32\)"),
        ("surf_vars", (1, 2, 17, 31), r"2t has shape \(1, 2, 17, 31\)"),
        ("surf_vars", (1, 17, 32), "B, T, H, W"),
        ("atmos_vars", (1, 2, 4, 17, 32), r"\(1, 2, 3, 17, 32\)"),
        ("atmos_vars", (1, 1, 3, 17, 32), r"\(1, 2, 3, 17, 32\)"),
        ("static_vars", (17, 31), r"\(17, 32\)"),
        ("static_vars", (2, 2, 17, 32), r"\(1, 2, 17, 32\)"),
    ],
)
def test_shapes_must_agree(group: str, shape: tuple[int, ...], says: str) -> None:
    batch = make_batch()
    name = {"surf_vars": "2t", "atmos_vars": "t", "static_vars": "lsm"}[group]
    with pytest.raises(ValueError, match=says):
        # An entry that is not first, so that the first says what T is.
        changed: dict[str, Any] = {
            group: {**dict(reversed(getattr(batch, group).items())), name: torch.zeros(shape)}
        }
        replace(batch, **changed)


def test_a_batch_needs_a_variable() -> None:
    with pytest.raises(ValueError, match="needs"):
        Batch({}, {}, {}, metadata())


def test_static_variables_may_have_all_dims() -> None:
    batch = make_batch()
    wide = replace(batch, static_vars={"lsm": torch.zeros(1, 2, 17, 32)})
    assert wide.crop(4).static_vars["lsm"].shape == (1, 2, 16, 32)


def test_normalise_and_back() -> None:
    batch = make_batch().type(torch.float64)
    stats = {"z": (1.0, 2.0)}
    normal = batch.normalise(stats)
    torch.testing.assert_close(normal.static_vars["z"], (batch.static_vars["z"] - 1) / 2)
    wanted = (batch.surf_vars["2t"] - 278.514) / 21.22036
    torch.testing.assert_close(normal.surf_vars["2t"], wanted, atol=1e-3, rtol=0)
    for name, x in fields(normal.unnormalise(stats)).items():
        torch.testing.assert_close(x, fields(batch)[name])


def test_crop_drops_the_southernmost_row() -> None:
    batch = make_batch()
    cropped = batch.crop(4)
    assert cropped.spatial_shape == (16, 32)
    assert torch.equal(cropped.surf_vars["2t"], batch.surf_vars["2t"][..., :16, :])
    assert torch.equal(cropped.metadata.lat, batch.metadata.lat[:16])
    assert cropped.crop(4) is cropped


def test_crop_keeps_coordinates_of_every_point_together() -> None:
    """The official package crops latitude alone."""
    lat, lon = grid(17, 32)
    cropped = make_batch(where=metadata(lat=lat, lon=lon)).crop(4)
    assert cropped.metadata.lat.shape == cropped.metadata.lon.shape == (16, 32)


@pytest.mark.parametrize(
    ("rows", "cols", "says"), [(16, 30, "28 or 32"), (18, 32, "16 or 20"), (19, 32, "leave 3")]
)
def test_grids_that_do_not_divide_are_refused(rows: int, cols: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_batch(rows, cols).crop(4)


def test_regrid_equals_numpy_twice() -> None:
    batch = make_batch()
    new = batch.regrid(9)
    assert new.spatial_shape == (21, 40)
    x, lat = batch.surf_vars["2t"][0, 0].double().numpy(), batch.metadata.lat.numpy()
    lon = np.append(batch.metadata.lon.numpy(), 360)
    rows = np.stack([np.interp(np.arange(40) * 9.0, lon, row) for row in np.column_stack((x, x[:, 0]))])
    wanted = np.stack([np.interp(np.linspace(-90, 90, 21), lat[::-1], col) for col in rows.T[:, ::-1]], 1)
    got = new.surf_vars["2t"][0, 0].numpy()
    # numpy.interp holds the last value beyond 88 degrees, where the slope is to go on
    np.testing.assert_allclose(got[1:-1], wanted[::-1][1:-1], atol=1e-4)
    step = 2 / float(lat[0] - lat[1])
    np.testing.assert_allclose(got[0], rows[0] + step * (rows[0] - rows[1]), atol=1e-4)


def test_regrid_refuses_what_it_cannot_do() -> None:
    lat, lon = grid(17, 32)
    with pytest.raises(ValueError, match=r"\(17, 32\)"):
        make_batch(where=metadata(lat=lat, lon=lon)).regrid(10)
    with pytest.raises(ValueError, match="resolution of 0"):
        make_batch().regrid(0)


@pytest.mark.parametrize("points", ["regular", "every point"])
def test_netcdf_gives_back_what_was_written(tmp_path: Path, points: str) -> None:
    lat, lon = grid(17, 32)
    where = metadata(rollout_step=3, atmos_levels=(100, 500.5, 850))
    batch = make_batch(where=where if points == "regular" else replace(where, lat=lat, lon=lon))
    batch.to_netcdf(tmp_path / "x.nc")
    again = Batch.from_netcdf(tmp_path / "x.nc")
    assert [path.name for path in tmp_path.iterdir()] == ["x.nc"]
    assert again.metadata.grid_key == batch.metadata.grid_key
    assert again.metadata.time == (TIME,)
    assert (again.metadata.atmos_levels, again.metadata.rollout_step) == ((100, 500.5, 850), 3)
    assert fields(again).keys() == fields(batch).keys()
    assert all(torch.equal(x, fields(again)[name]) for name, x in fields(batch).items())


def test_netcdf_has_the_official_layout(tmp_path: Path) -> None:
    make_batch(samples=2).type(torch.bfloat16).to_netcdf(tmp_path / "x.nc")
    with xarray.open_dataset(tmp_path / "x.nc", engine="h5netcdf") as data:
        assert data["surf_2t"].dims == ("batch", "history", "latitude", "longitude")
        assert data["atmos_t"].dims == ("batch", "history", "level", "latitude", "longitude")
        assert data["static_lsm"].dims == ("latitude", "longitude")
        assert set(data.coords) == {"latitude", "longitude", "time", "level", "rollout_step"}
        assert data["time"].dims == ("time",)
        assert data["surf_2t"].dtype == np.float32


def test_netcdf_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Batch.from_netcdf(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("no data")
    with pytest.raises(ValueError, match=r"text.nc is no NetCDF file"):
        Batch.from_netcdf(tmp_path / "text.nc")
    xarray.Dataset({"x": ("latitude", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="lacks latitude, level, longitude, rollout_step, time"):
        Batch.from_netcdf(tmp_path / "other.nc")
