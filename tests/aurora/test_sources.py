"""Weather for Aurora from every layout: the same numbers come out, under Aurora's names."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.sources import Weather, open_weather
from aeris.aurora.training.statics import read_statics
from aeris.data.store import Store, packaged_sample

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
    with pytest.raises(ValueError, match=r"has not the static slt: name a file with --static"):
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
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=said):
            read_statics(path, lat, lon)


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
