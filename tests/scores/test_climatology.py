"""Climatology against a loop over every time, xarray's weighted quantiles, and files of WeatherBench 2."""

from dataclasses import dataclass, field

import h5py
import numpy as np
import pandas
import pytest
import xarray

from aeris.scores.climatology import Build, build, needed_slots
from aeris.scores.climatology_files import open_climatology, save
from aeris.scores.quantiles import weighted_quantiles
from aeris.scores.slots import Samples, Slot, day_of_year, draw_times, slots_of, window_weight

NAMES = ("t2m", "z500", "msl")
FIRST, LAST = np.datetime64("2015-01-01T00", "s"), np.datetime64("2016-12-31T12", "s")
VALID = np.array(["2018-01-02T12", "2018-07-01T00", "2020-02-29T00", "2018-12-31T12"], dtype="datetime64[s]")


@dataclass
class Record:
    """Two years and a bit, 12-hourly, with an annual cycle: 2016 is a leap year."""

    names: tuple[str, ...] = NAMES
    path: str = "made-up"
    latitude_deg: np.ndarray = field(default_factory=lambda: np.array([60.0, 0.0, -60.0]))
    longitude_deg: np.ndarray = field(default_factory=lambda: np.array([0.0, 90.0, 180.0, 270.0]))
    counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.times = FIRST + np.arange(2 * 800) * np.timedelta64(12, "h")
        rng = np.random.default_rng(0)
        cycle = 10 * np.cos(2 * np.pi * np.arange(len(self.times)) / 730.5)[:, None, None, None]
        noise = rng.standard_normal((len(self.times), 3, 3, 4))
        offset = np.array([280.0, 5.5e4, 1e5])[:, None, None]
        self.fields = (offset + cycle + noise).astype(np.float32)

    def read(self, index: int) -> np.ndarray:
        """Return the fields of a time."""
        self.counts[index] = self.counts.get(index, 0) + 1
        return self.fields[index]


@pytest.fixture(scope="module")
def record():
    return Record()


@pytest.fixture(scope="module")
def usual(record):
    return build(record, (FIRST, LAST), needed_slots(VALID), (2, 0), (0.1, 0.9))


def samples(record, valid):
    """Return the fields and weights of the window of a valid time, by a loop over the calendar."""
    wanted = pandas.Timestamp(valid)
    fields, weights = [], []
    for number, time in enumerate(map(pandas.Timestamp, record.times)):
        apart = abs(time.day_of_year - wanted.day_of_year)
        weight = 1 - min(apart, 366 - apart) / 30
        if time <= pandas.Timestamp(LAST) and time.hour == wanted.hour and weight > 0:
            fields.append(record.fields[number, [2, 0]].astype(np.float64))
            weights.append(weight)
    return np.stack(fields), np.array(weights)


@pytest.mark.parametrize("valid", VALID, ids=str)
def test_every_slot_is_the_weighted_mean_of_its_window(record, usual, valid):
    x_nCYX, weight_n = samples(record, valid)
    mean = np.average(x_nCYX, axis=0, weights=weight_n)
    std = np.sqrt(np.average((x_nCYX - mean) ** 2, axis=0, weights=weight_n))
    np.testing.assert_allclose(usual.at(valid), mean, rtol=2e-7)
    np.testing.assert_allclose(usual.std_at(valid), std, rtol=1e-5)
    window = xarray.DataArray(x_nCYX, dims=("n", "c", "y", "x"))
    theirs = window.weighted(xarray.DataArray(weight_n, dims="n")).quantile([0.1, 0.9], dim="n")
    for place, quantile in enumerate((0.1, 0.9)):
        np.testing.assert_allclose(usual.quantile_at(valid, quantile), theirs[place], rtol=2e-7)


def test_a_window_is_61_days_on_a_circle_of_366_with_end_weights_of_zero():
    weight = window_weight(np.arange(-366, 367))
    assert weight.max() == weight[366] == weight[0] == 1
    assert (window_weight(np.arange(-40, 41)) > 0).sum() == 59
    assert window_weight(np.array([30, -30, 336]))[0] == 0
    np.testing.assert_allclose(window_weight(np.array([15, 1 - 366, 365])), [0.5, 29 / 30, 29 / 30])


def test_days_of_the_year_and_slots():
    times = np.array(["2019-03-01T06", "2020-03-01T06", "2020-12-31T18", "2019-03-01T06"], "datetime64[s]")
    np.testing.assert_array_equal(day_of_year(times), [60, 61, 366, 60])
    assert needed_slots(times) == (Slot(21600, 60), Slot(21600, 61), Slot(64800, 366))
    assert slots_of(times[:1]) == [Slot(21600, 60)]


def test_less_memory_reads_more_and_gives_the_same(record, usual):
    wide = Build(record, (FIRST, LAST), needed_slots(VALID), (2, 0), (0.1, 0.9))
    narrow = Build(record, (FIRST, LAST), needed_slots(VALID), (2, 0), (0.1, 0.9), memory_bytes=20_000)
    assert len(narrow.bands()) == 3
    assert narrow.reads > wide.reads
    record.counts.clear()
    calls = []
    again = narrow.run(lambda: calls.append(1))
    assert len(calls) == narrow.reads == sum(record.counts.values())
    for valid in VALID:
        np.testing.assert_allclose(again.at(valid), usual.at(valid), rtol=1e-7)
        np.testing.assert_array_equal(again.quantile_at(valid, 0.9), usual.quantile_at(valid, 0.9))


def test_a_slot_is_the_same_to_the_bit_whatever_is_made_beside_it(record, usual):
    alone = build(record, (FIRST, LAST), needed_slots(VALID[1:2]), (2, 0), (0.9,))
    np.testing.assert_array_equal(alone.at(VALID[1]), usual.at(VALID[1]))
    np.testing.assert_array_equal(alone.std_at(VALID[1]), usual.std_at(VALID[1]))
    np.testing.assert_array_equal(alone.quantile_at(VALID[1], 0.9), usual.quantile_at(VALID[1], 0.9))


def test_with_enough_memory_a_time_is_read_once_for_the_moments(record):
    job = Build(record, (FIRST, LAST), needed_slots(VALID), (0,))
    record.counts.clear()
    job.run()
    record.counts.pop(0)  # its shape is looked at
    assert set(record.counts.values()) <= {1, 2}
    assert job.reads == job.times_used


def test_quantiles_of_some_channels_only(record):
    job = Build(record, (FIRST, LAST), needed_slots(VALID[:1]), (2, 0), (0.5,), quantile_channels=(1,))
    field_CYX = job.run().quantile_at(VALID[0], 0.5)
    assert np.isnan(field_CYX[0]).all()
    assert (np.abs(field_CYX[1] - 290) < 2).all()


def test_a_short_period_is_a_mean_by_hour_of_day_and_says_so(record):
    period = (FIRST, np.datetime64("2015-06-30T12", "s"))
    usual = build(record, period, needed_slots(VALID), (0,))
    np.testing.assert_allclose(usual.at(VALID[1])[0], record.fields[0:362:2, 0].mean(axis=0), rtol=1e-6)
    assert usual.describe() == (
        "mean by hour of day, 2015-01-01 .. 2015-06-30, 362 times (shorter than a year: no annual cycle)"
    )


def test_words(record, usual):
    used = len({n for valid in VALID for n in range(len(samples(record, valid)[0]))})
    assert usual.describe().startswith(
        "by hour and day of year, 61-day triangular window, 2015-01-01 .. 2016-12-31, "
    )
    assert used < usual.about.times_used
    assert usual.about.inside(record.times) == 2 * 731
    assert usual.without(np.append(VALID, FIRST)) == [Slot(0, 1)]


def test_what_is_not_there_is_refused_by_name(record, usual):
    with pytest.raises(ValueError, match="no day 100 of the year at 00 UTC, which 2018-04-10T00:00:00 needs"):
        usual.at(np.datetime64("2018-04-10T00", "s"))
    with pytest.raises(ValueError, match="no quantile 0.5; it has 0.1 0.9"):
        usual.quantile_at(VALID[0], 0.5)
    with pytest.raises(ValueError, match="no time at 06:00 UTC in the period 2015-01-01"):
        build(record, (FIRST, LAST), [Slot(6 * 3600, 1)], (0,))


def test_a_gap_in_the_record_is_refused(record):
    gappy = Record()
    keep = (day_of_year(gappy.times) < 100) | (day_of_year(gappy.times) > 200)
    gappy.times = gappy.times[keep]
    with pytest.raises(ValueError, match="no time within 30 days of day 150 of the year at 00 UTC"):
        build(gappy, (FIRST, LAST), [Slot(0, 150)], (0,))


def test_an_ensemble_of_climatology_is_keyed_by_its_valid_time_and_calibrated(record):
    samples = Samples(record.times, (FIRST, LAST))
    drawn = draw_times(samples, VALID[1], 20, seed=3)
    assert len(set(drawn.tolist())) == 20
    np.testing.assert_array_equal(drawn, draw_times(samples, VALID[1], 20, seed=3))
    weights = window_weight(day_of_year(record.times[drawn]) - 182)
    assert (weights > 0).all()
    assert (record.times[drawn] <= LAST).all()
    with pytest.raises(ValueError, match="200 members of climatology from 118 times in the window of 2018"):
        draw_times(samples, VALID[1], 200)


@pytest.mark.parametrize("weights", [np.ones(7), np.arange(1.0, 8.0)])
def test_weighted_quantiles(weights):
    x_nP = np.random.default_rng(1).standard_normal((7, 5))
    ours = weighted_quantiles(x_nP, weights, (0.0, 0.01, 0.5, 0.95, 1.0))
    window = xarray.DataArray(x_nP, dims=("n", "p"))
    theirs = window.weighted(xarray.DataArray(weights, dims="n")).quantile([0, 0.01, 0.5, 0.95, 1], dim="n")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
    if weights[-1] == 1:
        np.testing.assert_allclose(ours, np.quantile(x_nP, [0, 0.01, 0.5, 0.95, 1], axis=0), atol=1e-13)


def test_quantiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="0 samples"):
        weighted_quantiles(np.zeros((0, 2)), np.zeros(0), (0.5,))
    with pytest.raises(ValueError, match="between 0 and 1"):
        weighted_quantiles(np.zeros((1, 2)), np.ones(1), (95,))


def test_a_file_gives_back_what_was_saved(record, usual, tmp_path):
    path = tmp_path / "deep" / "usual.h5"
    save(usual, path, record)
    assert [entry.name for entry in path.parent.iterdir()] == ["usual.h5"]
    again = open_climatology(str(path), record, ("t2m", "msl"))
    assert again.describe() == usual.describe()
    assert again.slots == usual.slots
    for valid in VALID:
        np.testing.assert_array_equal(again.at(valid), usual.at(valid)[[1, 0]])
        np.testing.assert_array_equal(again.std_at(valid), usual.std_at(valid)[[1, 0]])
        np.testing.assert_array_equal(again.quantile_at(valid, 0.1), usual.quantile_at(valid, 0.1)[[1, 0]])
    with pytest.raises(ValueError, match="has no channel z500; it has msl t2m"):
        open_climatology(str(path), record, ("z500",))
    other = Record(latitude_deg=np.array([60.0, 10.0, -60.0]))
    with pytest.raises(ValueError, match="has no latitude 10: it has 3 from 60 to -60"):
        open_climatology(str(path), other, ("t2m",))


def write_wb2(path, order, engine):
    """Write a climatology as WeatherBench 2 lays it out, latitudes rising; return its fields."""
    rng = np.random.default_rng(2)
    dims = {"hour": [0, 6, 12, 18], "dayofyear": np.arange(1, 367)}
    place = {"latitude": [-90.0, -60.0, 0.0, 60.0], "longitude": [-180.0, -90.0, 0.0, 90.0]}
    coords = dims | {"level": [500, 850]} | place
    surface, levelled = ("hour", "dayofyear", *order), ("hour", "dayofyear", "level", *order)
    data = {}
    for name, of in (("2m_temperature", surface), ("geopotential", levelled), ("geopotential_std", levelled)):
        values = rng.standard_normal([len(coords[dim]) for dim in of]).astype(np.float32)
        data[name] = xarray.DataArray(values, dims=of)
    dataset = xarray.Dataset(data, coords)
    if engine == "zarr":
        dataset.to_zarr(path, zarr_format=2)
    else:
        dataset.to_netcdf(path, engine="h5netcdf")
    return dataset


@pytest.mark.parametrize(
    ("name", "order", "engine"),
    [
        ("1990-2019_6h_4x4.zarr", ("longitude", "latitude"), "zarr"),
        ("usual.nc", ("latitude", "longitude"), "h5netcdf"),
    ],
)
def test_files_of_weatherbench_2(record, tmp_path, name, order, engine):
    dataset = write_wb2(tmp_path / name, order, engine)
    usual = open_climatology(str(tmp_path / name), record, ("z500", "t2m"))
    at = {"hour": 12, "dayofyear": 366}
    t2m = dataset["2m_temperature"].sel(at, drop=True).sel(latitude=[60, 0, -60])
    expected = t2m.sel(longitude=[0, 90, -180, -90]).transpose("latitude", "longitude")
    time = np.datetime64("2020-12-31T12", "s")
    np.testing.assert_array_equal(usual.at(time)[1], expected.values)
    z500 = dataset["geopotential"].sel(at | {"level": 500}).sel(latitude=60, longitude=-90)
    assert usual.at(time)[0, 0, 3] == z500
    assert len(usual.slots) == 4 * 366
    assert np.isnan(usual.std_at(time)[1]).all()
    z500_std = dataset["geopotential_std"].sel(at | {"level": 500}).sel(latitude=0, longitude=0)
    assert usual.std_at(time)[0, 1, 0] == z500_std
    if engine == "zarr":
        assert "1990-01-01 .. 2019-12-31" in usual.describe()
        assert usual.about.inside(np.array(["2000-01-01", "2020-01-01"], "datetime64[s]")) == 1
    else:
        assert "period not stated" in usual.describe()
    with pytest.raises(ValueError, match="no level 700 hPa for z700"):
        open_climatology(str(tmp_path / name), record, ("z700",))
    with pytest.raises(ValueError, match="no variable total_cloud_cover"):
        open_climatology(str(tmp_path / name), record, ("tcc",))


def test_files_that_are_no_climatology(record, tmp_path):
    with pytest.raises(ValueError, match="there is no climatology"):
        open_climatology(str(tmp_path / "none.zarr"), record, ("t2m",))
    xarray.Dataset({"a": ("time", [1.0])}).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="not a climatology by hour and day of year: it has the dims time 1"):
        open_climatology(str(tmp_path / "a.nc"), record, ("t2m",))
    (tmp_path / "b.nc").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a climatology that can be read"):
        open_climatology(str(tmp_path / "b.nc"), record, ("t2m",))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.attrs.update(format="aeris-climatology", version=99)
    with pytest.raises(ValueError, match="version 99: build it again"):
        open_climatology(str(tmp_path / "c.h5"), record, ("t2m",))
