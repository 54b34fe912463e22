"""Static fields: found in weather, NetCDF, Zarr and pickles, and nothing else taken for one."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from aeris.aurora.config import AuroraConfig
from aeris.aurora.training import statics
from aeris.aurora.training.sources import open_weather
from aeris.aurora.training.statics import read_statics
from tests.aurora.test_sources import COLS, CONFIG, ROWS, dataset, netcdf, zarr


def test_a_static_field_of_the_weather_does_not_change(tmp_path: Path) -> None:
    """It may have times, if it is the same at the first and at the last."""
    data = dataset()
    same_every_time = data.land_sea_mask.expand_dims(time=data.time)
    data["slt"] = same_every_time
    weather = open_weather(netcdf(tmp_path / "x.nc", data), AuroraConfig())
    np.testing.assert_array_equal(weather.statics["slt"], data.land_sea_mask.values)
    data["slt"] = data["2m_temperature"]
    with pytest.raises(ValueError, match="slt of .* changes with time"):
        open_weather(netcdf(tmp_path / "y.nc", data), AuroraConfig())
    data = dataset().assign(soil_type=dataset().land_sea_mask)
    assert "slt" in open_weather(netcdf(tmp_path / "z.nc", data), AuroraConfig()).statics


def test_geopotential_in_the_air_is_no_orography(tmp_path: Path) -> None:
    """Nor is anything else that changes along a dimension; what is equal all along is taken."""
    data = dataset().isel(time=slice(0, 2))
    lat, lon = data.latitude.values, data.longitude.values
    mask = data.land_sea_mask.expand_dims(time=data.time).copy()
    static = xr.Dataset({"geopotential": data.geopotential, "lsm": mask, "slt": data["2m_temperature"]})
    found = read_statics(netcdf(tmp_path / "air.nc", static), lat, lon)
    assert [*found] == ["lsm"]
    np.testing.assert_array_equal(found["lsm"], data.land_sea_mask.values)
    one = static.isel(time=[0], level=[0])
    assert {*read_statics(netcdf(tmp_path / "one.nc", one), lat, lon)} == {"lsm", "slt"}
    bare = netcdf(tmp_path / "bare.nc", dataset().drop_vars("geopotential_at_surface"))
    with pytest.raises(ValueError, match=r"air.nc nor the weather has the static z \(no levels, no change"):
        open_weather(bare, CONFIG, tmp_path / "air.nc")


def test_static_fields_come_from_a_second_file(tmp_path: Path) -> None:
    data = dataset()
    soil = np.arange(ROWS * COLS, dtype=np.float32).reshape(ROWS, COLS)
    static = xr.Dataset(
        {
            "slt": (("valid_time", "latitude", "longitude"), soil[None, ::-1]),
            "z": (("valid_time", "latitude", "longitude"), soil[None, ::-1] + 1),
            "mesh": (("other",), np.zeros(2)),
        },
        {
            "latitude": data.latitude.values[::-1],
            "longitude": data.longitude.values,
            "valid_time": np.array(["2000-01-01"], "datetime64[ns]"),
        },
    )
    path = netcdf(tmp_path / "x.nc", data)
    for write, name in ((netcdf, "static.nc"), (zarr, "static.zarr")):
        weather = open_weather(path, AuroraConfig(), write(tmp_path / name, static))
        np.testing.assert_array_equal(weather.statics["slt"], soil)
        np.testing.assert_array_equal(weather.statics["z"], soil + 1)  # before that of the weather
        np.testing.assert_array_equal(weather.statics["lsm"], data.land_sea_mask.values)
        assert [*weather.statics] == ["lsm", "z", "slt"]
    small = netcdf(tmp_path / "small.nc", static.isel(latitude=slice(1, None)))
    with pytest.raises(ValueError, match="its latitude is 5 from 75 to -45, not 6 from 75 to -75"):
        open_weather(path, AuroraConfig(), small)
    with pytest.raises(ValueError, match="does not exist"):
        open_weather(path, AuroraConfig(), tmp_path / "none.nc")


class Evil:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("1 + 1",)


def test_a_pickle_gives_arrays_and_runs_nothing(tmp_path: Path) -> None:
    lat, lon = np.linspace(75.0, -75.0, ROWS), np.arange(COLS) * 30.0
    fields = {
        name: np.full((ROWS, COLS), n, dtype) for n, (name, dtype) in enumerate((("slt", "f8"), ("z", "f4")))
    }
    path = tmp_path / "static.pickle"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(fields, protocol))
        found = read_statics(path, lat, lon)
        np.testing.assert_array_equal(found["z"], fields["z"])
        assert found["slt"].dtype == np.float32
    for wrong, said in (
        (pickle.dumps({"z": Evil()}), "holds builtins.eval, which is no array"),
        (pickle.dumps([1]), "no pickle of arrays by name"),
        (pickle.dumps({"z": np.zeros((2, 2))}), "has z on 2 x 2 points, the weather 6 x 12"),
        (b"nonsense", "no pickle of arrays"),
        (pickle.dumps({"z": np.array([["a"]])}), "no pickle of arrays by name"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=said):
            read_statics(path, lat, lon)


def test_a_damaged_pickle_is_one_error(tmp_path: Path) -> None:
    """Wherever a byte is wrong, and whatever numpy says of it."""
    lat, lon = np.linspace(75.0, -75.0, ROWS), np.arange(COLS) * 30.0
    path, rng, refused = tmp_path / "static.pickle", np.random.default_rng(1), []
    for protocol in (2, 5):
        whole = pickle.dumps({"z": np.zeros((ROWS, COLS), "f4")}, protocol)
        for place in range(min(len(whole), 260)):
            damaged = bytearray(whole)
            damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                read_statics(path, lat, lon)
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 200
    assert all(str(path) in one and "\n" not in one for one in refused)


@pytest.mark.parametrize("kind", [TypeError, OverflowError, MemoryError, SystemError, RuntimeError, KeyError])
def test_whatever_a_damaged_pickle_raises_is_one_error(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "static.pickle").write_bytes(pickle.dumps({}))

    def load(self: object) -> None:
        raise kind

    monkeypatch.setattr(statics._Arrays, "load", load)
    with pytest.raises(ValueError, match=f"is no pickle of arrays, or a damaged one: {kind.__name__}"):
        read_statics(tmp_path / "static.pickle", np.zeros(2), np.zeros(2))
