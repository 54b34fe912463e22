"""Weather for Aurora from every layout: the same numbers come out, under Aurora's names."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.sequences import first_batch
from aeris.aurora.training.sources import Weather, open_weather
from aeris.aurora.v1p5 import AuroraV1p5
from aeris.aurora.wave import WAVE_VARS, AuroraWave
from aeris.data.store import Store, packaged_sample
from aeris.data.variables import ALIASES, UNITS

ROWS, COLS, TIMES = 6, 12, 8
LEVELS = (300, 500, 850)
CONFIG = AuroraConfig(static_vars=("lsm", "z"))
Change = Callable[[xr.Dataset], xr.Dataset]


def dataset(times: int = TIMES, start: str = "2020-01-01", seed: int = 0) -> xr.Dataset:
    """Make weather in the order of ours: north first, levels rising."""
    rng = np.random.default_rng(seed)
    four, three = ("time", "level", "latitude", "longitude"), ("time", "latitude", "longitude")
    sizes = {"time": times, "level": len(LEVELS), "latitude": ROWS, "longitude": COLS}
    steps = np.datetime64(start, "ns") + np.arange(times) * np.timedelta64(6, "h")
    coords = {
        "time": steps,
        "level": np.array(LEVELS),
        "latitude": np.linspace(75.0, -75.0, ROWS),
        "longitude": np.arange(COLS) * 30.0,
    }
    names = {
        "2m_temperature": (three, "K"),
        "10m_u_component_of_wind": (three, "m s-1"),
        "10m_v_component_of_wind": (three, "m s-1"),
        "mean_sea_level_pressure": (three, "Pa"),
        "geopotential": (four, "m2 s-2"),
        "u_component_of_wind": (four, "m s-1"),
        "v_component_of_wind": (four, "m s-1"),
        "temperature": (four, "K"),
        "specific_humidity": (four, "kg kg-1"),
        "land_sea_mask": (three[1:], "1"),
        "geopotential_at_surface": (three[1:], "m2 s-2"),
    }
    data = {
        name: (dims, rng.normal(size=[sizes[dim] for dim in dims]).astype(np.float32), {"units": units})
        for name, (dims, units) in names.items()
    }
    return xr.Dataset(data, coords)


def netcdf(path: Path, data: xr.Dataset) -> Path:
    data.to_netcdf(path, engine="h5netcdf")
    return path


def zarr(path: Path, data: xr.Dataset) -> Path:
    data.to_zarr(path, consolidated=False)
    return path


def same(weather: Weather, data: xr.Dataset) -> None:
    """Check every field of every time against the dataset in our own order."""
    surf = {"2t": "2m_temperature", "10u": "10m_u_component_of_wind"}
    surf |= {"10v": "10m_v_component_of_wind", "msl": "mean_sea_level_pressure"}
    atmos = {"z": "geopotential", "u": "u_component_of_wind", "v": "v_component_of_wind"}
    atmos |= {"t": "temperature", "q": "specific_humidity"}
    np.testing.assert_array_equal(weather.times, data.time.values.astype("datetime64[s]"))
    np.testing.assert_allclose(weather.lat, data.latitude.values)
    np.testing.assert_allclose(weather.lon, data.longitude.values)
    assert weather.levels == LEVELS
    for index in range(len(weather)):
        fields = weather.read(index)
        assert [*fields.surf] == [*surf] and [*fields.atmos] == [*atmos]
        for name, key in surf.items():
            np.testing.assert_array_equal(fields.surf[name], data[key].values[index])
        for name, key in atmos.items():
            np.testing.assert_array_equal(fields.atmos[name], data[key].values[index])
            assert fields.atmos[name].dtype == np.float32
    np.testing.assert_array_equal(weather.statics["lsm"], data.land_sea_mask.values)
    np.testing.assert_array_equal(weather.statics["z"], data.geopotential_at_surface.values)


LAYOUTS: dict[str, Change] = {
    "as ours": lambda x: x,
    "latitude rises": lambda x: x.isel(latitude=slice(None, None, -1)),
    "axes transposed": lambda x: x.transpose("longitude", "latitude", "level", "time"),
    "levels fall": lambda x: x.isel(level=slice(None, None, -1)),
    "from 180 west": lambda x: x.assign_coords(longitude=(x.longitude + 180) % 360 - 180).sortby("longitude"),
    "short names": lambda x: x.rename(
        {"2m_temperature": "t2m", "geopotential": "z", "latitude": "lat", "longitude": "lon"}
    ).rename({"mean_sea_level_pressure": "msl", "u_component_of_wind": "u"}),
}


@pytest.mark.parametrize("write", [netcdf, zarr])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weather(tmp_path: Path, layout: str, write: Callable[..., Path]) -> None:
    data = dataset()
    suffix = {"netcdf": ".nc", "zarr": ".zarr"}[write.__name__]
    same(open_weather(write(tmp_path / f"x{suffix}", LAYOUTS[layout](data)), CONFIG), data)


def test_sources_cut_by_time_and_by_variable_are_one(tmp_path: Path) -> None:
    data = dataset()
    wet = data[["specific_humidity"]].transpose("longitude", "latitude", "level", "time")
    rest = data.drop_vars("specific_humidity")
    parts = [
        netcdf(tmp_path / "a.nc", rest.isel(time=slice(0, 3))),
        netcdf(tmp_path / "b.nc", rest.isel(time=slice(3, None), latitude=slice(None, None, -1))),
        zarr(tmp_path / "q.zarr", wet),
    ]
    same(open_weather(parts, CONFIG), data)


def test_a_directory_of_files_is_all_of_them(tmp_path: Path) -> None:
    data = dataset()
    for name, piece in (("jan", data.isel(time=slice(0, 5))), ("feb", data.isel(time=slice(5, None)))):
        netcdf(tmp_path / f"{name}.nc", piece)
    weather = open_weather(tmp_path, CONFIG)
    same(weather, data)
    assert ("file", str(tmp_path / "feb.nc"), "and 1 more") in weather.mapping
    with pytest.raises(ValueError, match="holds no NetCDF file"):
        open_weather(_made(tmp_path / "empty"), CONFIG)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_many_times_are_those_of_one_by_one(tmp_path: Path) -> None:
    weather = open_weather(netcdf(tmp_path / "x.nc", dataset()), CONFIG)
    many = weather.read_many([1, 2, 5])
    assert many.surf["2t"].shape == (3, ROWS, COLS) and many.atmos["z"].shape == (3, 3, ROWS, COLS)
    for place, index in enumerate((1, 2, 5)):
        np.testing.assert_array_equal(many.atmos["u"][place], weather.read(index).atmos["u"])


def test_a_time_is_there_when_all_variables_are(tmp_path: Path) -> None:
    data = dataset()
    wind = data[["10m_u_component_of_wind"]].isel(time=[0, 1, 3, 4, 5, 6, 7])
    parts = [
        netcdf(tmp_path / "a.nc", data.drop_vars("10m_u_component_of_wind")),
        netcdf(tmp_path / "b.nc", wind),
    ]
    weather = open_weather(parts, CONFIG)
    assert len(weather) == TIMES - 1
    assert weather.index("2020-01-01T12") is None and weather.index("2020-01-01T18") == 2
    assert weather.index("2021-01-01") is None
    assert any("1 left out where a variable is missing" in row[2] for row in weather.mapping)
    np.testing.assert_array_equal(weather.read(2).surf["msl"], data.mean_sea_level_pressure.values[3])
    np.testing.assert_array_equal(weather.read(2).surf["10u"], data["10m_u_component_of_wind"].values[3])


def test_a_time_in_two_files_is_refused(tmp_path: Path) -> None:
    data = dataset()
    parts = [netcdf(tmp_path / "a.nc", data), netcdf(tmp_path / "b.nc", data.isel(time=slice(0, 2)))]
    with pytest.raises(ValueError, match="in two sources at 2020-01-01T00:00:00"):
        open_weather(parts, CONFIG)


def test_missing_values_stay_missing(tmp_path: Path) -> None:
    data = dataset()
    data["2m_temperature"][2, 1, 3] = np.nan
    weather = open_weather(netcdf(tmp_path / "x.nc", data), CONFIG)
    assert np.argwhere(np.isnan(weather.read(2).surf["2t"])).tolist() == [[1, 3]]


def test_what_is_missing_is_listed_with_what_there_is(tmp_path: Path) -> None:
    data = dataset().drop_vars(["mean_sea_level_pressure", "specific_humidity"])
    path = netcdf(tmp_path / "x.nc", data)
    with pytest.raises(ValueError, match=r"no msl, no q on levels; it has .*2m_temperature") as error:
        open_weather(path, CONFIG)
    assert "geopotential" in str(error.value)
    whole = netcdf(tmp_path / "y.nc", dataset())
    with pytest.raises(ValueError, match=r"has not the static slt .*: name a file with --static"):
        open_weather(whole, AuroraConfig())
    with pytest.raises(ValueError, match=r"no level 50, 1000 hPa; it has 300 500 850"):
        open_weather(whole, CONFIG, levels=(50, 500, 1000))
    with pytest.raises(ValueError, match="no weather is given"):
        open_weather([], CONFIG)
    with pytest.raises(ValueError, match="does not exist"):
        open_weather(tmp_path / "none.nc", CONFIG)


def test_levels_are_those_asked_for_or_those_of_the_model(tmp_path: Path) -> None:
    data = dataset()
    data = data.assign_coords(level=[500, 501, 850])  # nobody has statistics of 501 hPa
    path = netcdf(tmp_path / "x.nc", data)
    assert open_weather(path, CONFIG).levels == (500, 850)
    assert open_weather(path, CONFIG, levels=(850, 501)).levels == (501, 850)
    conditioned = AuroraConfig(static_vars=("lsm", "z"), level_condition=(850.0,))
    weather = open_weather(path, conditioned)
    assert weather.levels == (850,)
    np.testing.assert_array_equal(weather.read(0).atmos["t"][0], data.temperature.values[0, 2])


def test_variables_without_a_name_of_ours_keep_theirs(tmp_path: Path) -> None:
    data = dataset()
    waves = data["2m_temperature"].transpose("longitude", "time", "latitude") * 2
    data["swh"] = waves.assign_attrs(units="m")
    config = AuroraConfig(surf_vars=("2t", "swh"), static_vars=("lsm", "z"))
    weather = open_weather(netcdf(tmp_path / "x.nc", data.isel(latitude=slice(None, None, -1))), config)
    np.testing.assert_array_equal(weather.read(3).surf["swh"], 2 * data["2m_temperature"].values[3])
    assert any(row[2] == "swh" and "taken as it is" in row[1] for row in weather.mapping)


def waves() -> xr.Dataset:
    """Waves with the speed and direction of their wind, as they come: a file without any weather."""
    like = dataset()["2m_temperature"]
    names = [name for name in WAVE_VARS if name not in ("10u_wave", "10v_wave")]
    return xr.Dataset({name: like.copy(data=like.values + n) for n, name in enumerate([*names, "dwi"])})


def with_own_statics(data: xr.Dataset, *names: str) -> xr.Dataset:
    field = data.land_sea_mask
    return data.assign({name: field.copy(data=field.values + n) for n, name in enumerate(names)})


def test_waves_come_with_the_direction_of_their_wind(tmp_path: Path) -> None:
    """A file of waves alone beside the weather; the model makes the parts of the wind."""
    data, config = dataset(), AuroraWave.default
    path = netcdf(tmp_path / "x.nc", with_own_statics(data, "slt", "wmb", "lat_mask"))
    weather = open_weather([path, netcdf(tmp_path / "waves.nc", waves())], config)
    found = weather.read(2)
    assert [*found.surf] == ["2t", "10u", "10v", "msl", *waves().data_vars]
    np.testing.assert_array_equal(found.surf["dwi"], waves()["dwi"].values[2])
    assert [*weather.statics] == [*config.static_vars]
    np.testing.assert_array_equal(weather.statics["wmb"], data.land_sea_mask.values + 1)
    batch = AuroraWave.batch_transform_hook(
        SimpleNamespace(keep_mpts=False), first_batch(weather, "2020-01-02")
    )
    assert set(batch.surf_vars) == set(config.surf_vars)
    parts = waves().drop_vars("dwi").assign({n: waves()["swh"] for n in ("10u_wave", "10v_wave")})
    weather = open_weather([path, netcdf(tmp_path / "parts.nc", parts)], config)
    assert set(weather.read(0).surf) == set(config.surf_vars)
    lacking = netcdf(tmp_path / "lacking.nc", waves().drop_vars("dwi"))
    with pytest.raises(ValueError, match=r"no 10u_wave \(nor dwi, its direction\), no 10v_wave"):
        open_weather([path, lacking], config)


def test_what_is_only_predicted_or_computed_need_not_be_there(tmp_path: Path) -> None:
    """Aurora v1.5: seven variables are targets at most, and sunlight comes from time and place."""
    config, data = AuroraV1p5.default, with_own_statics(dataset(), *AuroraV1p5.default.static_vars[2:])
    fed = [name for name in config.surf_vars if name not in (*config.output_only_surf_vars, "insolation")]
    like = data["2m_temperature"]
    data = data.assign({name: like.assign_attrs(units="") for name in fed[4:] if name not in ALIASES})
    known = [ALIASES[name] for name in fed[4:] if name in ALIASES]
    data = data.assign({name: like.assign_attrs(units=UNITS[name]) for name in known})
    weather = open_weather(netcdf(tmp_path / "x.nc", data), config)
    assert [*weather.read(0).surf] == [*fed, "insolation"] and len(weather.statics) == 36
    assert ("variable", "computed from time and place", "insolation") in weather.mapping
    data["blh"] = like
    there = open_weather(netcdf(tmp_path / "y.nc", data), config)
    assert set(there.read(0).surf) == {*fed, "blh", "insolation"}
    levels = AuroraConfig(atmos_vars=("z", "t", "w"), static_vars=("lsm", "z"), output_only_atmos_vars=("w",))
    assert [*open_weather(tmp_path / "y.nc", levels).read(0).atmos] == ["z", "t"]


def test_our_store_is_read_too() -> None:
    weather, store = open_weather(packaged_sample(), CONFIG), Store(packaged_sample())
    assert weather.levels == (300, 500, 700, 850) and len(weather) == 160
    x_CYX = store.read(17)
    fields = weather.read(17)
    np.testing.assert_array_equal(fields.surf["10v"], x_CYX[store.names.index("v10")])
    np.testing.assert_array_equal(fields.atmos["q"][2], x_CYX[store.names.index("q700")])
    np.testing.assert_array_equal(weather.statics["z"], store.static["geopotential_at_surface"])
    assert ("variable", "z300 z500 z700 z850", "z") in weather.mapping
    assert open_weather(packaged_sample(), CONFIG, levels=(850,)).read(0).atmos["z"].shape == (1, 24, 48)
    with pytest.raises(ValueError, match="is a store, which is read alone"):
        open_weather([packaged_sample(), "x.nc"], CONFIG)


def test_masked_points_of_a_store_are_missing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weather = open_weather(packaged_sample(), CONFIG)
    store = weather._origin._store
    valid = np.ones((24, 48), bool)
    valid[3, 4] = False
    monkeypatch.setitem(store.masks, "t2m", valid)
    fields = weather.read(0)
    assert np.argwhere(np.isnan(fields.surf["2t"])).tolist() == [[3, 4]]
    assert np.isfinite(fields.surf["msl"]).all()


@pytest.mark.parametrize("kind", ["files", "store"])
def test_weather_goes_to_another_process(tmp_path: Path, kind: str) -> None:
    path = netcdf(tmp_path / "x.nc", dataset()) if kind == "files" else packaged_sample()
    weather = open_weather(path, CONFIG)
    before = weather.read(1)
    there = pickle.loads(pickle.dumps(weather))
    np.testing.assert_array_equal(there.read(1).atmos["t"], before.atmos["t"])
    assert there.index(weather.times[3]) == 3
