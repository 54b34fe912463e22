"""Every foreign layout, written by an independent writer, ends in the same store, bit for bit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import xarray as xr

from aeris.data.axes import find_gaps
from aeris.data.layouts import samples as samples_layout
from aeris.data.plan import refuse_gaps
from aeris.data.plausible import complaint
from aeris.data.sources import Sources, open_source
from aeris.data.store import Store
from aeris.data.variables import field_called
from tests.data import writers

Write = Callable[[Path, xr.Dataset], Path]


def turned(write: Write) -> Write:
    """Write with latitude rising and longitude from -180."""

    def turn(path: Path, data: xr.Dataset) -> Path:
        longitude = (data.longitude.values + 180) % 360 - 180
        data = data.assign_coords(longitude=longitude).sortby("longitude").sortby("latitude")
        return write(path, data)

    return turn


def netcdf_months(path: Path, data: xr.Dataset) -> Path:
    """Write surface and levels apart, in two files each."""
    path.mkdir()
    levelled = [str(name) for name in data.data_vars if "level" in data[name].dims]
    for name, part in (("levels", data[levelled]), ("surface", data.drop_vars([*levelled, *writers.STATIC]))):
        for number, times in enumerate((slice(0, 7), slice(7, None))):
            part.isel(time=times).to_netcdf(path / f"{name}_{number}.nc", engine="h5netcdf")
    data[list(writers.STATIC)].to_netcdf(path / "static.nc", engine="h5netcdf")
    return path


def placeholder(path: Path, data: xr.Dataset) -> Path:
    """Write what HRES-T0 has: latitude rising, and one number in place of missing sea temperature."""
    data = data.isel(latitude=slice(None, None, -1)).assign(
        sea_surface_temperature=data["sea_surface_temperature"].fillna(273.16)
    )
    data["sea_surface_temperature"].attrs["units"] = "K"
    return writers.wb2(path, data)


LAYOUTS: dict[str, tuple[Write, str]] = {
    "makani": (writers.makani, "makani HDF5, 2 files"),
    "makani turned": (turned(writers.makani), "makani HDF5, 2 files"),
    "samples": (writers.samples, "HDF5 per time (Swift, AERIS)"),
    "samples turned": (turned(writers.samples), "HDF5 per time (Swift, AERIS)"),
    "anemoi": (writers.anemoi, "anemoi Zarr"),
    "anemoi turned": (turned(writers.anemoi), "anemoi Zarr"),
    "shards": (writers.shards, "AERIS window shards"),
    "NetCDF collection": (netcdf_months, "NetCDF-4, 5 files"),
    "HRES-T0": (placeholder, "Zarr version 2"),
}


@pytest.fixture(scope="module")
def air() -> xr.Dataset:
    return writers.atmosphere()


@pytest.fixture(scope="module")
def plain(air: xr.Dataset, convert, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of the plain WeatherBench 2 Zarr of the same fields."""
    base = tmp_path_factory.mktemp("plain")
    return convert(writers.wb2(base / "wb2.zarr", air), base / "store")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_store_of_the_plain_zarr(
    layout: str, air, plain, convert, tmp_path: Path
) -> None:
    write, called = LAYOUTS[layout]
    source = write(tmp_path / "source", air)
    assert open_source(source).layout == called
    store = convert(source, tmp_path / "store")
    assert store.names == plain.names
    np.testing.assert_array_equal(store.times, plain.times)
    assert np.datetime64("2000-02-29T12") in store.times
    np.testing.assert_allclose(store.latitude_deg, plain.latitude_deg, atol=1e-12)
    for index in range(len(store)):
        assert store.read(index).tobytes() == plain.read(index).tobytes()
    for name, field in plain.static.items():
        assert store.static[name].tobytes() == field.tobytes()
    assert store.row_offset == plain.row_offset == 1
    assert store.fingerprint == plain.fingerprint
    assert store.masks["sst"].tobytes() == plain.masks["sst"].tobytes()


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("2t", ("2m_temperature", None)),
        ("u10m", ("10m_u_component_of_wind", None)),
        ("u10", ("10m_u_component_of_wind", None)),
        ("u_10", ("u_component_of_wind", 10.0)),
        ("q_500", ("specific_humidity", 500.0)),
        ("geopotential_850", ("geopotential", 850.0)),
        ("Z500", ("geopotential", 500.0)),
        ("z", ("geopotential_at_surface", None)),
        ("temperature", None),
        ("u100m", None),
        ("cos_latitude", None),
        ("total_precipitation_24hr", ("total_precipitation_24hr", None)),
    ],
)
def test_names_of_fields(spelled: str, expected: tuple[str, float | None] | None) -> None:
    assert field_called(spelled) == expected


@pytest.mark.parametrize(
    ("variable", "level", "values", "odd"),
    [
        ("temperature", 50.0, (190.0, 240.0), False),
        ("temperature", 850.0, (-40.0, 25.0), True),
        ("geopotential", 1.0, (440e3, 480e3), False),
        ("geopotential", 500.0, (5000.0, 5900.0), True),
        ("geopotential", 1000.0, (-2000.0, 3500.0), False),
        ("specific_humidity", 850.0, (0.0, 0.02), False),
        ("specific_humidity", 850.0, (0.0, 20.0), True),
        ("geopotential_at_surface", None, (-1000.0, 57000.0), False),
        ("geopotential_at_surface", None, (-100.0, 5800.0), True),
        ("total_cloud_cover", None, (0.0, 100.0), True),
    ],
)
def test_what_can_be_on_earth(variable: str, level: float | None, values, odd: bool) -> None:
    x = np.linspace(*values, 50)
    assert (complaint(variable, level, x, is_global=True) is not None) == odd
    assert complaint(variable, level, np.array([np.nan])) is None


def test_fingerprint_tells_data_from_layout(air, tmp_path: Path) -> None:
    air = air.isel(time=slice(0, 2))
    one = open_source(writers.makani(tmp_path / "makani", air, split=1))
    other = open_source(turned(writers.samples)(tmp_path / "samples", air))
    assert one.fingerprint == other.fingerprint and len(one.fingerprint) == 16
    later = air.assign_coords(time=air.time + np.timedelta64(1, "h"))
    assert open_source(writers.samples(tmp_path / "later", later)).fingerprint != one.fingerprint


def test_units_are_assumed_and_said(air, tmp_path: Path) -> None:
    source = open_source(writers.makani(tmp_path / "m", air))
    assert "2m_temperature" in source.units_assumed and "geopotential" in source.units_assumed
    assert ("variable", "t2m", "2m_temperature, no unit given, taken as K") in source.mapping
    air.isel(time=[0]).to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    assert open_source(tmp_path / "x.nc").units_assumed == ()
    assert source.about == {"title": "test"}


@pytest.mark.parametrize(
    ("name", "change", "unit"),
    [
        ("2m_temperature", lambda x: x - 273.15, "degC"),
        ("temperature", lambda x: x - 273.15, "degC"),
        ("mean_sea_level_pressure", lambda x: x / 100, "hPa"),
        ("geopotential", lambda x: x / 9.80665, "m"),
        ("specific_humidity", lambda x: x * 1000, "g kg-1"),
    ],
)
def test_assumed_unit_that_the_values_contradict(name: str, change, unit: str, air, tmp_path: Path) -> None:
    other = air.assign({name: change(air[name].astype(np.float64))})
    path = writers.makani(tmp_path / "m", other)
    with pytest.raises(ValueError, match=rf"{name}.*it looks like {unit}: say --units {name}={unit}"):
        open_source(path)
    source = open_source(path, units={writers.SHORT[name].replace("10m", "10"): unit})
    levels = source.variables[name].levels_hpa
    np.testing.assert_allclose(source.read(name, 0, 10, levels).squeeze(), air[name].values, rtol=1e-5)


def test_stated_unit_that_the_values_contradict(air, tmp_path: Path) -> None:
    """Relative humidity is a fraction in WeatherBench 2 and percent in GRIB."""
    humid = (air["temperature"] - 230.0) * 3.0
    air.assign(relative_humidity=humid.assign_attrs(units="1")).to_netcdf(
        tmp_path / "x.nc", engine="h5netcdf"
    )
    source = open_source(tmp_path / "x.nc")
    with pytest.raises(ValueError, match=r"relative_humidity at 850 hPa.* in the unit stated has .* like %"):
        source.read("relative_humidity", 0, 1, (500, 850))
    told = open_source(tmp_path / "x.nc", units={"relative_humidity": "%"})
    assert 0.2 < told.read("relative_humidity", 0, 1, (500, 850)).mean() < 0.8
    with pytest.raises(ValueError, match="--units names 'fluff', which is no variable"):
        open_source(tmp_path / "x.nc", units={"fluff": "K"})


def test_climatology_is_refused_by_name(air, tmp_path: Path) -> None:
    climate = air.isel(time=[0]).drop_vars("time").rename(time="dayofyear").expand_dims(hour=[0, 6])
    writers.wb2(tmp_path / "c.zarr", climate)
    with pytest.raises(ValueError, match=r"it is a climatology \(by dayofyear and hour\)"):
        open_source(tmp_path / "c.zarr")


def test_times_that_arco_only_announces_are_left_out(air, tmp_path: Path) -> None:
    announced = air.assign_attrs(valid_time_start="2000-02-29", valid_time_stop="2000-02-29")
    writers.wb2(tmp_path / "a.zarr", announced)
    source = open_source(tmp_path / "a.zarr")
    times = source.variables["temperature"].times
    assert (str(times[0]), str(times[-1])) == ("2000-02-29T00:00:00", "2000-02-29T18:00:00")
    np.testing.assert_array_equal(
        source.read("temperature", 1, 3, (300, 850)), air["temperature"].values[5:7, [0, 2]]
    )


def test_makani_without_scales_takes_the_year_of_the_name(tmp_path: Path) -> None:
    year = writers.atmosphere(366 * 2, "2000-01-01", 4, 12, False)[["2m_temperature"]]
    writers.makani_metadata(tmp_path, year, key="coord", dhours=12)
    writers.makani_year(tmp_path / "train" / "2000.h5", year, scales=False)
    times = open_source(tmp_path).variables["2m_temperature"].times
    assert np.datetime64("2000-02-29T12") in times and str(times[-1]) == "2000-12-31T12:00:00"
    (tmp_path / "train" / "2000.h5").rename(tmp_path / "train" / "2001.h5")
    with pytest.raises(ValueError, match="its 732 times are not the 730 of 2001 every 12 h"):
        open_source(tmp_path)
    shutil.rmtree(tmp_path / "metadata")
    with pytest.raises(ValueError, match="it has no scale timestamp: add dhours"):
        open_source(tmp_path)


def test_imputed_times_are_left_out_where_they_matter(air, tmp_path: Path) -> None:
    names = list(writers.columns(air))
    valid = np.ones((10, len(names)), np.int8)
    valid[3, names.index("q500")] = 0
    writers.makani_year(tmp_path / "2000.h5", air, valid=valid)
    sources = Sources([open_source(tmp_path / "2000.h5")])
    assert ("imputed", "specific_humidity at 2000-02-28T18:00:00", "left out") in sources.parts[0].mapping
    assert len(sources.times(["temperature"])) == 10
    times = sources.times(["temperature", "specific_humidity"])
    assert len(times) == 9 and find_gaps(times) == [(times[2], times[3])]
    with pytest.raises(
        ValueError, match="2000-02-28T12:00:00 and .*, whose values a source calls made up: add"
    ):
        refuse_gaps(times, sources.imputed(["specific_humidity"]))
    q = sources.read("specific_humidity", times, (850,))
    np.testing.assert_array_equal(q[:, 0], air["specific_humidity"].values[[0, 1, 2, 4, 5, 6, 7, 8, 9], 2])


def test_makani_channel_that_does_not_change(air, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers.columns, "__defaults__", ("", {**writers.SHORT, "land_sea_mask": "lsm"}))
    land = air["land_sea_mask"].expand_dims(time=air.time)
    path = writers.makani_year(tmp_path / "2000.h5", air.assign(land_sea_mask=land))
    x_YX = Sources([open_source(path)]).read_static("land_sea_mask")
    np.testing.assert_array_equal(x_YX, air["land_sea_mask"].values)
    with pytest.raises(ValueError, match="--member 2 was given, but there is no ensemble dimension"):
        open_source(path, member=2)


def test_makani_invariant_in_another_order(air, tmp_path: Path) -> None:
    root = writers.makani(tmp_path / "m", air)
    with h5py.File(root / "invariants" / "orography.nc", "r+") as file:
        file["latitude"] = air.latitude.values
        open_source(root)
        file["latitude"][:] = -air.latitude.values
    with pytest.raises(
        ValueError, match=r"orography.nc: its latitude runs from -90 to 90, .* from 90 to -90"
    ):
        open_source(root)


def test_virtual_file_that_lost_its_sources(air, tmp_path: Path) -> None:
    real = writers.makani_year(tmp_path / "real" / "2000.h5", air)
    with h5py.File(real) as file:
        layout = h5py.VirtualLayout(shape=file["fields"].shape, dtype="f4")
        layout[...] = h5py.VirtualSource(str(real), "fields", shape=file["fields"].shape)
        (tmp_path / "v").mkdir()
        with h5py.File(tmp_path / "v" / "2000.h5v", "w") as virtual:
            virtual.create_virtual_dataset("fields", layout)
            for name in ("timestamp", "channel", "lat", "lon"):
                virtual[name] = file[name][:]
    x = open_source(tmp_path / "v").read("temperature", 4, 5, (500,))
    np.testing.assert_array_equal(x[0, 0], air["temperature"].values[4, 1])
    real.rename(tmp_path / "moved.h5")
    with pytest.raises(ValueError, match=r"is virtual and 1 of the 1 files it points to are not there"):
        open_source(tmp_path / "v")


def test_many_samples_are_not_all_opened(monkeypatch: pytest.MonkeyPatch, air, tmp_path: Path) -> None:
    monkeypatch.setattr(samples_layout, "PROBES", 4)
    root = writers.samples(tmp_path / "s", air)
    source = open_source(root)
    said = next(row for row in source.mapping if row[0] == "times")
    assert "read from 5 files, regular; the others are checked when read" in said[1]
    np.testing.assert_array_equal(
        source.variables["temperature"].times, air.time.values.astype("datetime64[s]")
    )
    with h5py.File(root / "train" / "2000_5.h5", "r+") as file:
        del file["input/time"]
        file["input/time"] = b"2000-02-29T05:00:00Z"
    with pytest.raises(ValueError, match=r"2000_5.h5 is of 2000-02-29T05:00:00, its place .* 2000-02-29T06"):
        open_source(root).read("temperature", 4, 7, (500,))
    (root / "train" / "2000_3.h5").unlink()  # no longer regular: every file is read
    assert "read from every file" in next(row for row in open_source(root).mapping if row[0] == "times")[1]
    shutil.copy(root / "train" / "2000_1.h5", root / "train" / "2000_3.h5")
    with pytest.raises(ValueError, match=r"2000_1.h5 and .*2000_3.h5 are both of 2000-02-28T06:00:00"):
        open_source(root)


def test_missing_dates_and_members_of_anemoi(air, tmp_path: Path) -> None:
    source = open_source(writers.anemoi(tmp_path / "a.zarr", air, missing=(2, 3)))
    assert ("missing dates", "2000-02-28T12:00:00 and 1 more", "left out") in source.mapping
    times = source.variables["temperature"].times
    assert len(times) == 8 and find_gaps(times) == [(times[1], times[2])]
    x = source.read("temperature", 1, 4, (300, 850))
    np.testing.assert_array_equal(x, air["temperature"].values[[1, 4, 5]][:, [0, 2]])
    assert ("left out", "cos_latitude", "") in source.mapping
    with pytest.raises(ValueError, match="the members are 0 to 0"):
        open_source(tmp_path / "a.zarr", member=3)


def test_reduced_grid_is_refused_by_name(air, tmp_path: Path) -> None:
    path = writers.anemoi(tmp_path / "o96.zarr", air.isel(time=[0]), field_shape=[312], resolution="o96")
    source = open_source(path)  # a flat shape of a regular grid is recovered from the coordinates
    assert source.axes.latitude_deg.size == 13
    import zarr

    group = zarr.open_group(str(path), mode="r+")
    group["longitudes"][:] = group["longitudes"][:] + group["latitudes"][:] / 90
    with pytest.raises(ValueError, match=r"o96 is no regular grid of latitudes and longitudes \(312 cells\)"):
        open_source(path)


def test_shards_say_what_is_missing(air, tmp_path: Path) -> None:
    root = writers.shards(tmp_path / "s", air, beside=False)
    with pytest.raises(ValueError, match="neither channels nor times: put channels.txt"):
        open_source(root)
    (root / "channels.txt").write_text("t2m u10")
    with pytest.raises(ValueError, match="channels.txt has 2 names, the shards have 22 channels"):
        open_source(root)
    (root / "y_2_x_3" / "channels.txt").write_text(" ".join([*writers.columns(air), "zs", "lsm"]))
    with pytest.raises(ValueError, match=r"put times.txt \(the date of every time, one a line\)"):
        open_source(root)
    (root / "times.txt").write_text("\n".join(map(str, air.time.values.astype("datetime64[s]"))))
    assert len(open_source(root).variables["temperature"].times) == 10
    writers.shards(root, air, (1, 2))
    with pytest.raises(ValueError, match="cut in 2 ways: give one of y_1_x_2, y_2_x_3"):
        open_source(root)
    (root / "y_2_x_3" / "y_1_x_2.hdf5").unlink()
    with pytest.raises(ValueError, match=r"y_1_x_2.hdf5 of 2 x 3 shards is missing"):
        open_source(root / "y_2_x_3")


def test_damaged_files_are_named(air, tmp_path: Path) -> None:
    root = writers.makani(tmp_path / "m", air)
    file = root / "test" / "2001.h5"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="2001.h5 is truncated or damaged"):
        open_source(root)
    with pytest.raises(ValueError, match=r"gs://bucket/x.zarr needs a package .*: pip install gcsfs"):
        open_source("gs://bucket/x.zarr")
    with pytest.raises(ValueError, match="it holds neither Zarr nor files that end in"):
        open_source(tmp_path)


def test_collection_names_what_does_not_fit(air, convert, tmp_path: Path) -> None:
    folder = netcdf_months(tmp_path / "nc", air)
    shutil.copy(folder / "levels_0.nc", folder / "levels_2.nc")
    with pytest.raises(ValueError, match=r"geopotential at 2000-02-28T00:00:00 is in two files: .*levels_0"):
        open_source(folder)
    (folder / "levels_2.nc").unlink()
    (folder / "levels_1.nc").unlink()
    with pytest.raises(ValueError, match=r"geopotential is missing at 2000-02-29T18:00:00 \(index 7\)"):
        convert(folder, tmp_path / "store")
    assert len(open_source(str(folder / "levels_*.nc")).variables["geopotential"].times) == 7


def test_grib_is_read_through_cfgrib(monkeypatch: pytest.MonkeyPatch, air, tmp_path: Path) -> None:
    """A stand-in for cfgrib returns what it makes of a GRIB file: hypercubes with short names, two leads."""
    path = tmp_path / "x.grib"
    path.write_bytes(b"GRIB")
    names = {"temperature": "t", "geopotential": "z"}
    levels = air[list(names)].rename(names).rename(level="isobaricInhPa").isel(isobaricInhPa=[2, 1, 0])
    halves = [levels.isel(time=slice(n, None, 2)).assign_coords(time=air.time.values[::2]) for n in (0, 1)]
    leads = xr.Variable("step", np.array([0, 6], "timedelta64[h]").astype("timedelta64[ns]"))
    levels = xr.concat(halves, leads).transpose("time", "step", ...)
    other = air[["2m_temperature"]].rename({"2m_temperature": "fluff"})
    opened = SimpleNamespace(open_datasets=lambda *args, **options: [levels, other])
    with pytest.raises(ValueError, match="x.grib is GRIB, which needs cfgrib: pip install cfgrib"):
        monkeypatch.setitem(sys.modules, "cfgrib", None)
        open_source(path)
    monkeypatch.setitem(sys.modules, "cfgrib", opened)
    source = open_source(path)
    assert source.layout == "GRIB" and ("left out", "fluff", "") in source.mapping
    np.testing.assert_array_equal(
        source.variables["temperature"].times, air.time.values.astype("datetime64[s]")
    )
    for start, stop in ((0, 10), (3, 4), (2, 7)):
        x = source.read("temperature", start, stop, (300, 850))
        np.testing.assert_array_equal(x, air["temperature"].values[start:stop, [0, 2]])
