"""Small synthetic atmospheres, and a shortcut to convert them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from aeris.data.conversion import run
from aeris.data.plan import Options, plan
from aeris.data.store import Store

Weather = Callable[..., xr.Dataset]
Convert = Callable[..., Store]


def make_weather(
    times: int = 10,
    rows: int = 12,
    cols: int = 24,
    levels_hpa: tuple[int, ...] = (300, 500, 850),
    start: str = "1999-12-30T18",
    poles: bool = False,
    sst: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """Make a dataset in our own order. Values are multiples of 1/4 (humidity 2^-20), so packing is exact."""
    rng = np.random.default_rng(seed)
    steps = np.datetime64(start, "s") + np.arange(times) * np.timedelta64(6, "h")
    north = 90.0 if poles else 90.0 - 90.0 / rows
    coords = {
        "time": steps.astype("datetime64[ns]"),
        "level": np.array(levels_hpa),
        "latitude": np.linspace(north, -north, rows),
        "longitude": np.arange(cols) * (360.0 / cols),
    }
    four, three = ("time", "level", "latitude", "longitude"), ("time", "latitude", "longitude")
    table = {
        "2m_temperature": (three, 280.0, 0.25, "K"),
        "10m_u_component_of_wind": (three, 0.0, 0.25, "m s-1"),
        "10m_v_component_of_wind": (three, 0.0, 0.25, "m s-1"),
        "mean_sea_level_pressure": (three, 101000.0, 0.25, "Pa"),
        "geopotential": (four, 50000.0, 0.25, "m2 s-2"),
        "u_component_of_wind": (four, 0.0, 0.25, "m s-1"),
        "v_component_of_wind": (four, 0.0, 0.25, "m s-1"),
        "temperature": (four, 250.0, 0.25, "K"),
        "specific_humidity": (four, 0.0, 2.0**-20, "kg kg-1"),
        "geopotential_at_surface": (three[1:], 0.0, 0.25, "m2 s-2"),
        "land_sea_mask": (three[1:], 0.0, 2.0**-15, "1"),
    }
    data = {}
    for name, (dims, offset, step, units) in table.items():
        shape = tuple(len(coords[dim]) for dim in dims)
        values = (offset + step * rng.integers(0, 4000, shape)).astype(np.float32)
        data[name] = (dims, values, {"units": units})
    dataset = xr.Dataset(data, coords=coords)
    if sst:
        values = (285.0 + 0.25 * rng.integers(0, 40, (times, rows, cols))).astype(np.float32)
        values[:, :, cols // 2 :] = np.nan  # land
        values[times // 2, rows // 2, 0] = np.nan  # once only
        dataset["sea_surface_temperature"] = (three, values, {"units": "K"})
    return dataset


def run_conversion(*paths: Path, **options: object) -> Store:
    """Convert the sources among `paths` to the store that is last among them."""
    settings: dict[str, object] = {"window": 6, "intervals_h": (6, 24)} | options
    run(plan(Options(tuple(map(str, paths)), **settings)))  # type: ignore[arg-type]
    return Store(paths[-1])


@pytest.fixture(scope="session")
def weather() -> Weather:
    """Return `make_weather`."""
    return make_weather


@pytest.fixture(scope="session")
def convert() -> Convert:
    """Return `run_conversion`."""
    return run_conversion


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of 12 x 24 points, 20 channels with sst, 10 times over the new year of 2000."""
    base = tmp_path_factory.mktemp("store")
    make_weather(sst=True).to_netcdf(base / "source.nc", engine="h5netcdf")
    run_conversion(base / "source.nc", base / "store", train_period=("1999-12-30", "2000-01-01T06"))
    return base / "store"


@pytest.fixture
def source(weather: Weather, tmp_path: Path) -> Path:
    """Return the file of an atmosphere with sea surface temperature."""
    weather(sst=True).to_netcdf(tmp_path / "source.nc", engine="h5netcdf")
    return tmp_path / "source.nc"
