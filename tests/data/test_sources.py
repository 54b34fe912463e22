"""Every layout a source may have ends in the same store, bit for bit; what is not understood is named."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from aeris.data.sources import open_source
from aeris.data.store import Store
from aeris.data.units import conversion

LEVELLED = ["geopotential", "u_component_of_wind", "v_component_of_wind", "temperature", "specific_humidity"]
GRIB_NAMES = {
    "geopotential": "z",
    "u_component_of_wind": "u",
    "v_component_of_wind": "v",
    "temperature": "t",
    "specific_humidity": "q",
    "2m_temperature": "t2m",
    "10m_u_component_of_wind": "u10",
    "10m_v_component_of_wind": "v10",
    "mean_sea_level_pressure": "msl",
    "geopotential_at_surface": "zs",
    "land_sea_mask": "lsm",
}


def netcdf(dataset: xr.Dataset, path: Path, **options: object) -> list[Path]:
    dataset.to_netcdf(path.with_suffix(".nc"), engine="h5netcdf", **options)
    return [path.with_suffix(".nc")]


def zarr(dataset: xr.Dataset, path: Path, consolidated: bool = True) -> list[Path]:
    chunks = {name: tuple(min(4, n) for n in array.shape) for name, array in dataset.data_vars.items()}
    encoding = {name: {"chunks": chunk} for name, chunk in chunks.items()}
    where = path.with_suffix(".zarr")
    dataset.to_zarr(where, encoding=encoding, consolidated=consolidated, zarr_format=2)
    return [where]


def packed(dataset: xr.Dataset, path: Path, dtype: str) -> list[Path]:
    """Store every variable as integers (or float64) times a power of two, plus an offset."""
    encoding = {}
    for name, array in dataset.data_vars.items():
        step = 2.0**-20 if name == "specific_humidity" else 2.0**-15 if name == "land_sea_mask" else 0.25
        offset = float(np.round(float(array.min())))
        encoding[name] = {"dtype": dtype, "scale_factor": step, "add_offset": offset}
        if dtype == "int16":
            encoding[name]["_FillValue"] = -32768
    return netcdf(dataset, path, encoding=encoding)


def west(dataset: xr.Dataset) -> xr.Dataset:
    longitude = (dataset.longitude.values + 180) % 360 - 180
    return dataset.assign_coords(longitude=longitude).sortby("longitude")


def grib(dataset: xr.Dataset) -> xr.Dataset:
    """Name everything as cfgrib does: levels falling, a scalar step, a valid time beside the time."""
    dataset = dataset.isel(level=slice(None, None, -1)).rename(level="isobaricInhPa", **GRIB_NAMES)
    for name, unit in (("z", "m**2 s**-2"), ("u", "m s**-1"), ("q", "kg kg**-1"), ("lsm", "(0 - 1)")):
        dataset[name].attrs["units"] = unit
    dataset["zs"] = dataset["zs"].rename("z")
    dataset = dataset.assign_coords(step=np.timedelta64(0, "ns"), valid_time=("time", dataset.time.values))
    dataset["step"].encoding["units"] = "hours"
    return dataset


def new_cds(dataset: xr.Dataset) -> xr.Dataset:
    """Name everything as the Climate Data Store does since 2024."""
    names = {"level": "pressure_level", "time": "valid_time"}
    dataset = dataset.rename(**names, **GRIB_NAMES).assign_coords(number=0, expver="0001")
    return dataset.transpose(..., "longitude", "latitude")


def members(dataset: xr.Dataset) -> xr.Dataset:
    others = [dataset + 1, dataset, dataset - 1]
    joined = xr.concat(others, xr.Variable("number", [5, 7, 9]), data_vars="all")
    return joined.transpose("latitude", "number", ...)


def in_pascal(dataset: xr.Dataset) -> xr.Dataset:
    plev = ("level", dataset.level.values * 100.0, {"units": "Pa"})
    return dataset.assign_coords(level=plev).rename(level="plev", latitude="lat", longitude="lon")


def forecast(dataset: xr.Dataset) -> xr.Dataset:
    """Shift the times back and give every field a lead of 6 h."""
    shifted = dataset.assign_coords(time=dataset.time - np.timedelta64(6, "h"))
    lead = xr.Variable("prediction_timedelta", np.array([6], "timedelta64[h]").astype("timedelta64[ns]"))
    return shifted.expand_dims(prediction_timedelta=lead)


Write = Callable[[xr.Dataset, Path], list[Path]]
VARIANTS: dict[str, Write] = {
    "latitude rising": lambda d, p: netcdf(d.isel(latitude=slice(None, None, -1)), p),
    "longitude from -180": lambda d, p: netcdf(west(d), p),
    "levels falling": lambda d, p: netcdf(d.isel(level=slice(None, None, -1)), p),
    "levels shuffled": lambda d, p: netcdf(d.isel(level=[1, 2, 0]), p),
    "longitude before latitude": lambda d, p: netcdf(
        d.transpose("time", "level", "longitude", "latitude"), p
    ),
    "all dims reversed": lambda d, p: netcdf(d.transpose("longitude", "latitude", "level", "time"), p),
    "coarse WeatherBench zarr": lambda d, p: zarr(
        d.isel(latitude=slice(None, None, -1)).transpose("time", "level", "longitude", "latitude"), p
    ),
    "zarr without consolidated metadata": lambda d, p: zarr(d, p, consolidated=False),
    "GRIB names": lambda d, p: netcdf(grib(d), p),
    "new CDS names": lambda d, p: netcdf(new_cds(d), p),
    "levels in Pa, lat and lon": lambda d, p: netcdf(in_pascal(d), p),
    "int16": lambda d, p: packed(d, p, "int16"),
    "scaled float64": lambda d, p: packed(d, p, "float64"),
    "plain float64": lambda d, p: netcdf(d.astype(np.float64), p),
    "cut by time": lambda d, p: [
        *netcdf(d.isel(time=slice(6, None)), p.with_name("late")),
        *netcdf(d.isel(time=slice(0, 6)), p.with_name("early")),
    ],
    "cut by variable": lambda d, p: [
        *netcdf(d[LEVELLED], p.with_name("levels")),
        *netcdf(west(d.drop_vars(LEVELLED)), p.with_name("surface")),
    ],
    "static fields apart": lambda d, p: [
        *netcdf(d[["geopotential_at_surface", "land_sea_mask"]], p.with_name("static")),
        *netcdf(d.drop_vars(["geopotential_at_surface", "land_sea_mask"]), p.with_name("moving")),
    ],
    "static fields apart, of another date": lambda d, p: [
        *netcdf(
            d[["geopotential_at_surface", "land_sea_mask"]].expand_dims(
                time=np.array(["1979-01-01"], "datetime64[ns]")
            ),
            p.with_name("static"),
        ),
        *netcdf(d.drop_vars(["geopotential_at_surface", "land_sea_mask"]), p.with_name("moving")),
    ],
    "coordinates in float32": lambda d, p: [
        *netcdf(d[LEVELLED], p.with_name("levels")),
        *netcdf(
            d.drop_vars(LEVELLED).assign_coords(latitude=d.latitude.astype(np.float32)),
            p.with_name("surface"),
        ),
    ],
    "static fields with times": lambda d, p: netcdf(
        d.assign(land_sea_mask=d.land_sea_mask.broadcast_like(d["2m_temperature"])), p
    ),
    "ensemble": lambda d, p: netcdf(members(d), p),
    "forecasts of one lead": lambda d, p: netcdf(forecast(d), p),
    "more than needed": lambda d, p: netcdf(
        d.assign(fluff=d["2m_temperature"] * 2, number_of_cats=("cat", np.arange(3.0))), p
    ),
}


@pytest.fixture(scope="module")
def straight(weather, convert, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Store]:
    """Return what makes, once, the store of the dataset in our own order; 13 rows have both poles."""

    @functools.cache
    def make(rows: int) -> Store:
        base = tmp_path_factory.mktemp("straight")
        source = netcdf(weather(rows=rows, poles=rows == 13), base / "source")
        return convert(*source, base / "store")

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_gives_the_same_store(variant: str, weather, convert, straight, tmp_path: Path) -> None:
    rows = 13 if variant == "latitude rising" else 12
    dataset, expected = weather(rows=rows, poles=rows == 13), straight(rows)
    options = {"member": 7} if variant == "ensemble" else {}
    store = convert(*VARIANTS[variant](dataset, tmp_path / "variant"), tmp_path / "store", **options)
    assert store.names == expected.names
    np.testing.assert_array_equal(store.times, expected.times)
    for index in range(len(store)):
        assert store.read(index).tobytes() == expected.read(index).tobytes()
    for name, field in expected.static.items():
        assert store.static[name].tobytes() == field.tobytes()
    assert store.fingerprint_id == expected.fingerprint_id


def test_straight_store_is_the_dataset(weather, straight) -> None:
    """The anchor of the comparison above: the canonical dataset itself, field by field."""
    dataset, store = weather(rows=13, poles=True), straight(13)
    assert (store.rows, store.row_offset) == (12, 1)
    np.testing.assert_array_equal(store.latitude_deg, np.linspace(90, -90, 13)[1:])
    for index in range(len(store)):
        x = store.read(index)
        for number, channel in enumerate(store.channels):
            field = dataset[channel.variable].isel(time=index)
            field = field if channel.level_hpa is None else field.sel(level=channel.level_hpa)
            np.testing.assert_array_equal(x[number], field.values[1:])
    np.testing.assert_array_equal(store.static["land_sea_mask"], dataset["land_sea_mask"].values[1:])


def test_units_are_converted(weather, convert, tmp_path: Path) -> None:
    dataset = weather()
    other = dataset.copy()
    for name, turn, unit in (
        ("2m_temperature", lambda x: x - 273.15, "degC"),
        ("mean_sea_level_pressure", lambda x: x / 100, "hPa"),
        ("specific_humidity", lambda x: x * 1000, "g/kg"),
        ("geopotential", lambda x: x / 9.80665, "gpm"),
    ):
        other[name] = turn(dataset[name].astype(np.float64)).assign_attrs(units=unit)
    source = open_source(netcdf(other, tmp_path / "other")[0])
    for name in LEVELLED + ["2m_temperature", "mean_sea_level_pressure"]:
        ours = source.read(name, 2, 4, (300, 500, 850) if name in LEVELLED else ()).squeeze()
        np.testing.assert_allclose(ours, dataset[name].values[2:4], rtol=2e-7)
    said = " ".join(to for _, _, to in source.mapping)
    assert "degC turned into K" in said
    assert "gpm turned into m2 s-2" in said


def test_zarr_of_version_3(weather, tmp_path: Path) -> None:
    if int(version("zarr").split(".")[0]) < 3:
        pytest.skip("zarr 2 neither writes nor reads it")
    dataset = weather()
    dataset.to_zarr(tmp_path / "x.zarr", zarr_format=3, consolidated=False)
    levels = open_source(tmp_path / "x.zarr").read("geopotential", 1, 3, (850, 300))
    np.testing.assert_array_equal(levels, dataset["geopotential"].values[1:3, [2, 0]])


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        ("m**2 s**-2", "m2 s-2", (1, 0)),
        ("m^2/s^2", "m2 s-2", (1, 0)),
        ("Kelvin", "K", (1, 0)),
        ("%", "1", (0.01, 0)),
        ("(0 - 1)", "1", (1, 0)),
        ("m s**-1", "m s-1", (1, 0)),
        ("millibars", "hPa", (1, 0)),
    ],
)
def test_spellings_of_units(given: str, wanted: str, expected: tuple[float, float]) -> None:
    assert conversion(given, wanted) == expected


@pytest.mark.parametrize("given", ["furlong", "kg"])
def test_unknown_unit_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=f"the unit '{given}' cannot be turned into 'K'"):
        conversion(given, "K")


def test_mapping_says_what_was_done(weather, tmp_path: Path) -> None:
    dataset = west(
        weather(rows=13, poles=True).isel(latitude=slice(None, None, -1), level=slice(None, None, -1))
    )
    dataset["fluff"] = dataset["2m_temperature"]
    dataset["2m_temperature"] = dataset["2m_temperature"].clip(max=300.0)
    dataset["2m_temperature"].attrs = {}
    rows = {
        what: (source, store)
        for what, source, store in open_source(netcdf(dataset, tmp_path / "x")[0]).mapping
    }
    assert rows["rows"] == ("latitude 13: -90 to 90", "13, flipped")
    assert rows["cols"] == ("longitude 24: -180 to 165", "24, rolled to 0..360")
    assert rows["levels"] == ("level 3: 850 to 300", "300 500 850 hPa")
    assert rows["left out"] == ("fluff", "")
    said = [store for what, _, store in open_source(tmp_path / "x.nc").mapping if what == "variable"]
    assert "2m_temperature, no unit given, taken as K" in said


def twice(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.isel(time=[0, 1, 1, 2, 3])


BAD: dict[str, tuple[Callable[[xr.Dataset], xr.Dataset], str]] = {
    "time twice": (twice, r"time 1999-12-31T00:00:00 \(index 2\) occurs twice"),
    "times fall": (
        lambda d: d.isel(time=[0, 2, 1]),
        r"time 1999-12-31T00:00:00 \(index 2\) comes after 1999-12-31T06:00:00",
    ),
    "no latitude": (
        lambda d: d.rename(latitude="y"),
        r"no dimension is called latitude or lat; there are .*y",
    ),
    "no coordinates": (lambda d: d.drop_vars("latitude"), "dimension latitude has no coordinate values"),
    "latitude shuffled": (lambda d: d.isel(latitude=[0, 2, 1, 3]), "latitude neither rises nor falls"),
    "0 and 360": (
        lambda d: xr.concat(
            [d, d.isel(longitude=[0]).assign_coords(longitude=[360.0])], "longitude", data_vars="minimal"
        ),
        "longitude 0 occurs twice",
    ),
    "level twice": (lambda d: d.isel(level=[0, 0, 1]), "level 300 hPa occurs twice"),
    "model levels": (
        lambda d: d.assign_coords(level=("level", [1, 2, 3], {"units": "layer"})),
        "levels along level are in 'layer', which is no pressure",
    ),
    "two time dims": (lambda d: d.assign(a=("date", [1.0])), "time and date both look like time"),
    "unit of length": (
        lambda d: d.assign(u10=d["10m_u_component_of_wind"].assign_attrs(units="m")).drop_vars(
            "10m_u_component_of_wind"
        ),
        "u10: the unit 'm' cannot be turned into 'm s-1'",
    ),
    "same variable twice": (
        lambda d: d.assign(t2m=d["2m_temperature"]),
        "are both 2m_temperature: remove one",
    ),
    "nothing known": (
        lambda d: d[["2m_temperature"]].rename({"2m_temperature": "fluff"}),
        "none of its variables is known: fluff",
    ),
    "several leads": (
        lambda d: d.expand_dims(step=np.array([0, 6], "timedelta64[h]").astype("timedelta64[ns]")),
        "a forecast with 2 lead times along step",
    ),
    "several members": (members, r"choose one ensemble member with --member: number has 5, 7, 9"),
    "odd calendar": (
        lambda d: d.assign_coords(
            time=("time", np.arange(10.0), {"units": "days since 2000-01-01", "calendar": "360_day"})
        ),
        "(?s)calendar|not dates of the standard calendar",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_understood_is_named(bad: str, weather, tmp_path: Path) -> None:
    change, message = BAD[bad]
    path = netcdf(change(weather()), tmp_path / "bad")[0]
    with pytest.raises(ValueError, match=message) as error:
        open_source(path)
    assert str(error.value).startswith(str(path))


def test_files_that_are_none(weather, tmp_path: Path) -> None:
    path = netcdf(weather(), tmp_path / "x")[0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"x.nc is truncated or damaged"):
        open_source(path)
    path.write_bytes(b"GRUB....")
    with pytest.raises(ValueError, match="cannot be read: it is neither NetCDF, HDF5, GRIB nor Zarr"):
        open_source(path)
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "nothing.nc")
    path.unlink()
    with pytest.raises(ValueError, match="it holds neither Zarr nor files that end in"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda d: d, r"is in two sources at 1999-12-30T18:00:00 \(index 0\)"),
        (lambda d: d.isel(latitude=slice(0, 6)), r"is on another grid than .* \(latitude_deg\)"),
        (
            lambda d: d.assign_coords(time=d.time + np.timedelta64(60, "h"))[["2m_temperature"]],
            r"10m_u_component_of_wind is missing at 2000-01-02T06:00:00 \(index 10\)",
        ),
    ],
)
def test_sources_that_do_not_fit_together(second, message: str, weather, convert, tmp_path: Path) -> None:
    dataset = weather()
    paths = [*netcdf(dataset, tmp_path / "a"), *netcdf(second(dataset), tmp_path / "b")]
    with pytest.raises(ValueError, match=message):
        convert(*paths, tmp_path / "store")
    assert not re.findall("store", " ".join(path.name for path in tmp_path.iterdir()))
