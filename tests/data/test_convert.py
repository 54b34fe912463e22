"""The conversion: bad data and options, rounding, coarsening, a real file, and the program around it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from aeris.data.convert import main
from aeris.data.loader import SampleDataset
from aeris.data.store import Store, StoreError
from swipe.windows import WindowGrid, WindowShard

ECMWF = Path(__file__).parent / "files" / "ecmwf_open_10deg_20240603.nc"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "geopotential",
            np.nan,
            r"z500 is nan at 1999-12-31T12:00:00, row 2, col 3; if z500 may be missing .* --masked z500",
        ),
        ("geopotential", np.inf, r"z500 is inf at 1999-12-31T12:00:00, row 2, col 3"),
        ("sea_surface_temperature", -np.inf, r"sst is -inf at 1999-12-31T12:00:00, row 2, col 3$"),
        ("geopotential_at_surface", np.nan, r"geopotential_at_surface is nan at NaT, row 2, col 3"),
    ],
)
def test_missing_value_is_named(
    variable: str, value: float, message: str, weather, convert, tmp_path: Path
) -> None:
    dataset = weather(sst=True)
    place = {"time": 3, "level": 1, "latitude": 2, "longitude": 3}
    field = dataset[variable]
    field[{dim: place[dim] for dim in field.dims}] = value
    dataset.to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
    with pytest.raises(StoreError, match=message):
        convert(tmp_path / "bad.nc", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_time_without_any_value_and_channel_without_a_common_point(weather, convert, tmp_path: Path) -> None:
    dataset = weather(sst=True)
    dataset["sea_surface_temperature"][4] = np.nan
    dataset.to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
    with pytest.raises(StoreError, match=r"sst has no value at all at 1999-12-31T18:00:00"):
        convert(tmp_path / "bad.nc", tmp_path / "store")
    dataset = weather(sst=True)
    dataset["sea_surface_temperature"][0, :6] = np.nan
    dataset["sea_surface_temperature"][1, 6:] = np.nan
    dataset.to_netcdf(tmp_path / "worse.nc", engine="h5netcdf")
    with pytest.raises(StoreError, match=r"sst has no point with a value at every time"):
        convert(tmp_path / "worse.nc", tmp_path / "other")


def test_declared_channel_may_miss_points(weather, convert, tmp_path: Path) -> None:
    dataset = weather()
    dataset["2m_temperature"][:, 0, 0] = np.nan
    dataset.to_netcdf(tmp_path / "gap.nc", engine="h5netcdf")
    store = convert(tmp_path / "gap.nc", tmp_path / "store", masked=("t2m",))
    assert list(store.masks) == ["t2m"]
    assert store.masks["t2m"].sum() == store.rows * store.cols - 1


def test_already_filled_sst_has_no_mask(weather, convert, tmp_path: Path) -> None:
    dataset = weather(sst=True)
    filled = dataset.fillna(280.0)
    filled.to_netcdf(tmp_path / "filled.nc", engine="h5netcdf")
    store = convert(tmp_path / "filled.nc", tmp_path / "store")
    assert store.masks == {}
    assert store.mask_CYX.all()


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_rounding_is_to_a_power_of_two_below_the_share(
    share: float, source: Path, convert, tmp_path: Path
) -> None:
    exact = convert(source, tmp_path / "exact")
    rough = convert(source, tmp_path / "rough", round=share, compress=True)
    for c, (std, name) in enumerate(zip(exact.statistics.residual_std[6], exact.names)):
        error = max(np.abs(rough.read(i)[c] - exact.read(i)[c])[exact.mask_CYX[c]].max() for i in range(10))
        assert error <= share * std / 2, name
        values = rough.read(0)[c][exact.mask_CYX[c]].astype(np.float64)
        step = 2.0 ** np.floor(np.log2(share * std))
        assert np.all(values % step == 0), name
    size = {s: sum(p.stat().st_size for p in s.path.iterdir()) for s in (exact, rough)}
    assert size[rough] < size[exact]


def test_coarsening_is_the_area_mean(weather, convert, tmp_path: Path) -> None:
    dataset = weather(rows=24, cols=48)
    dataset.to_netcdf(tmp_path / "fine.nc", engine="h5netcdf")
    store = convert(tmp_path / "fine.nc", tmp_path / "store", coarsen=2)
    edges = np.sin(np.deg2rad(np.linspace(90, -90, 25)))
    area = edges[:-1] - edges[1:]
    x = dataset["2m_temperature"].values[3].astype(np.float64)
    for row, col in ((0, 0), (5, 7), (11, 23)):
        weights = area[2 * row : 2 * row + 2]
        box = x[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        assert store.read(3)[0, row, col] == pytest.approx(
            (box.mean(axis=1) * weights).sum() / weights.sum(), rel=1e-7
        )
    np.testing.assert_allclose(store.latitude_deg, dataset.latitude.values.reshape(12, 2).mean(1))
    np.testing.assert_allclose(store.longitude_deg, dataset.longitude.values.reshape(24, 2).mean(1))


def test_single_time_takes_the_statistics_of_another_store(
    weather, convert, tmp_path: Path, store_path: Path
) -> None:
    one = weather(times=11, sst=True, seed=1).isel(time=[10])
    one["sea_surface_temperature"][0, 0, 0] = np.nan
    one.to_netcdf(tmp_path / "one.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match=r"a single time, so there is no change .* --statistics-from"):
        convert(tmp_path / "one.nc", tmp_path / "store")
    store, other = (
        convert(tmp_path / "one.nc", tmp_path / "store", statistics_from=str(store_path)),
        Store(store_path),
    )
    assert store.fingerprint == other.fingerprint
    assert store.interval_h == 0
    expected = other.mask_CYX[-1].copy()
    expected[0, 0] = False
    np.testing.assert_array_equal(store.mask_CYX[-1], expected)
    assert np.all(store.read(0)[-1][~expected] == other.fill_C[-1])
    with pytest.raises(ValueError, match="has the channels t2m .*, not t2m u10$"):
        convert(
            tmp_path / "one.nc", tmp_path / "few", statistics_from=str(store_path), channels=("t2m", "u10")
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, r"a window of 5 x 5 does not tile an image of 12 x 24.* 4 or 6"),
        ({"coarsen": 5}, r"boxes of 5 x 5 do not tile 12 x 24 points: --coarsen can be 1, 2, 3, 4, 6, 12"),
        (
            {"channels": ("t2m", "z400")},
            r"geopotential has no level 400 hPa \(z400\): the levels are 300, 500, 850",
        ),
        ({"channels": ("t2m", "w")}, r"the sources have no vertical_velocity \(w\)"),
        ({"channels": ("sp",)}, r"the sources have no surface_pressure \(sp\)"),
        ({"channels": ("spam",)}, r"no channel is called 'spam'"),
        (
            {"intervals_h": (6, 9)},
            r"no two times of the train period are 9 h apart: --intervals-h can be 6, 12, 18",
        ),
        ({"intervals_h": (0,)}, r"are 0 h apart"),
        (
            {"train_period": ("1979", "1980")},
            r"train period 1979-01-01T00:00:00 to 1980-12-31T23:59:59 has no time",
        ),
        ({"train_period": ("2001", "1999")}, r"the period 2001 to 1999 ends before it begins"),
        ({"train_period": ("soon", "later")}, r"soon later are not two dates such as 2018"),
        (
            {"period": ("2010", "2012")},
            r"no time is left: the sources cover 1999-12-30T18:00:00 to 2000-01-02T00",
        ),
        ({"member": 3}, r"--member 3 was given, but there is no ensemble dimension"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str, source: Path, convert, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "store", **options)
    assert not list(tmp_path.glob("store*"))


def test_choice_of_channels_levels_and_times(source: Path, convert, tmp_path: Path) -> None:
    options = {"channels": ("q850", "z", "t2m"), "levels_hpa": (850, 300), "step_h": 12, "intervals_h": (12,)}
    store = convert(source, tmp_path / "store", period=("1999-12-31", "2000"), **options)
    assert store.names == ("t2m", "z300", "z850", "q850")
    assert store.interval_h == 12
    assert store.times[0] == np.datetime64("1999-12-31T00")
    assert store.times[-1] == np.datetime64("2000-01-02T00")


def test_real_file_from_ecmwf(convert, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no geopotential_at_surface and no land_sea_mask: .*--allow-missing-static"
    ):
        convert(ECMWF, tmp_path / "store")
    store = convert(ECMWF, tmp_path / "store", allow_missing_static=True)
    assert (store.rows, store.cols, store.row_offset, len(store.names)) == (18, 36, 1, 30)
    assert store.made["zeros for"] == ["geopotential_at_surface", "land_sea_mask"]
    assert not store.static["land_sea_mask"].any()
    with xr.open_dataset(ECMWF, engine="h5netcdf") as raw:
        for name, variable, factor in (("z500", "geopotential", 1), ("r850", "relative_humidity", 0.01)):
            expected = raw[variable].sel(level=int(name[1:])).values[5, 1:] * factor
            np.testing.assert_allclose(store.read(5)[store.names.index(name)], expected, rtol=1e-6, atol=1e-7)
    sample = SampleDataset(store.path, 24, WindowShard.full(WindowGrid(18, 36, 6)), seed=0)[0]
    assert sample.state_BNTC.shape == (18, 36, 30)
    assert sample.residual_BNTC.isfinite().all()


def program(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "160")
    main()


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    before = set(tmp_path.iterdir())
    program(monkeypatch, source, tmp_path / "store", "--window", 6, "--dry-run")
    said = capsys.readouterr().out
    for words in (
        "12 x 24",
        "2 x 4 of 6 x 6 points",
        "the first 75%",
        "6 h, 24 h",
        "1999.h5 2000.h5 store.h5",
        "230 kB",
    ):
        assert words in said
    program(monkeypatch, source, tmp_path / "store", "--window", 6, "--dry-run", "--json", "--levels", 500)
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == 10 * 10 * 12 * 24 * 4
    assert said["channels"] == ["t2m", "u10", "v10", "msl", "z500", "u500", "v500", "t500", "q500", "sst"]
    assert set(tmp_path.iterdir()) == before


def test_program_converts_and_says_when_there_is_nothing_to_do(
    source: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    words = (source, tmp_path / "store", "--window", 6, "--train-period", "1999", "2000-01-01", "--compress")
    program(monkeypatch, *words)
    assert f"fingerprint {Store(tmp_path / 'store').fingerprint_id}" in capsys.readouterr().out
    with h5py.File(tmp_path / "store" / "1999.h5") as file:
        assert file["fields"].compression == "gzip"
    program(monkeypatch, *words)
    assert "there already and whole; nothing to do" in capsys.readouterr().out


def test_store_says_nothing_of_the_machine_it_was_made_on(source: Path, convert, tmp_path: Path) -> None:
    store = convert(source, tmp_path / "store")
    assert str(tmp_path) not in json.dumps(store.made)
    assert store.made["sources"] == ["source.nc"]
    assert os.sep not in "".join(store.made["sources"])
