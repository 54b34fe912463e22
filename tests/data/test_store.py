"""A store: what it says, what it reads, and how it refuses to be read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from aeris.data import yearfile
from aeris.data.store import Store, StoreError, packaged_sample
from swipe.windows import WindowGrid, WindowShard


@pytest.fixture
def broken(store_path: Path, tmp_path: Path) -> Path:
    """Return a copy of the store to break."""
    return Path(shutil.copytree(store_path, tmp_path / "store"))


def test_what_a_store_says(store_path: Path) -> None:
    store = Store(store_path)
    assert store.names[:6] == ("t2m", "u10", "v10", "msl", "z300", "z500")
    assert store.names[-2:] == ("q850", "sst")
    assert [channel.units for channel in store.channels[3:5]] == ["Pa", "m2 s-2"]
    assert (len(store), store.rows, store.cols, store.interval_h, store.window) == (10, 12, 24, 6, 6)
    assert store.latitude_deg[0] > store.latitude_deg[-1]
    assert store.longitude_deg[0] == 0
    assert store.times[0] == np.datetime64("1999-12-30T18")
    assert sorted(path.name for path in store_path.iterdir()) == ["1999.h5", "2000.h5", "store.h5"]
    assert set(store.static) == {"geopotential_at_surface", "land_sea_mask"}
    assert set(store.statistics.residual_std) == {6, 24}


def test_files_describe_themselves(store_path: Path) -> None:
    with h5py.File(store_path / "2000.h5") as file:
        assert file["fields"].chunks == (1, 20, 6, 6)
        assert file["fields"].dtype == "<f4"
        assert tuple(file["channel"].asstr()[:]) == Store(store_path).names
        assert file["time"][0] == np.datetime64("2000-01-01T00", "s").astype(np.int64)
        np.testing.assert_array_equal(file["latitude"][:], Store(store_path).latitude_deg)


@pytest.mark.parametrize("window", [2, 4, 6, 12])
@pytest.mark.parametrize("kind", ["full", "round robin", "odd"])
def test_windows_are_pieces_of_the_field(store_path: Path, window: int, kind: str) -> None:
    store = Store(store_path)
    grid = WindowGrid(12, 24, window)
    shard = WindowShard.full(grid)
    if kind == "round robin":
        shard = WindowShard(
            grid, tuple((y, x) for y in range(0, grid.windows_y, 2) for x in range(1, grid.windows_x, 2))
        )
    if kind == "odd":
        shard = WindowShard(grid, shard.windows[::-3])
    for index in (0, 5, 9):
        field_CYX = store.read(index)
        expected = field_CYX.reshape(20, -1).T[shard.token_index()]
        np.testing.assert_array_equal(store.read_windows(index, shard), expected)
        for number, corner in enumerate(shard.windows):
            row, col = (place * window for place in corner)
            cut = field_CYX[:, row : row + window, col : col + window].reshape(20, 2, window // 2, 2, -1)
            quadrants = cut.transpose(1, 3, 2, 4, 0).reshape(-1, 20)
            np.testing.assert_array_equal(store.read_windows(index, shard)[number], quadrants)


@pytest.mark.parametrize("sp", [2, 3, 4, 6, 12])
def test_a_rank_can_read_its_strips_only(store_path: Path, sp: int) -> None:
    store = Store(store_path)
    for sp_rank in range(sp):
        shard = WindowShard.dealt(WindowGrid(12, 24, 12), (1, 2), (0, 1), sp, sp_rank)
        expected = store.read(3).reshape(20, -1).T[shard.token_index()]
        np.testing.assert_array_equal(store.read_windows(3, shard), expected)


@pytest.mark.parametrize("roll", [0, 4, 6])
def test_plain_chunks_are_read_past_hdf5_bit_for_bit(
    weather: Callable[..., xr.Dataset], convert: Callable[..., Store], tmp_path: Path, roll: int
) -> None:
    """Windows of any side, a part of one channel, and what a compressed store gives."""
    weather().to_netcdf(tmp_path / "source.nc", engine="h5netcdf")
    plain = convert(tmp_path / "source.nc", tmp_path / "plain")
    packed = convert(tmp_path / "source.nc", tmp_path / "packed", compress=True)
    for side in (6, 4):
        shard = WindowShard.dealt(WindowGrid(12, 24, side), (1, 2), (0, 1))
        for index in (0, len(plain) - 1):  # in different years
            plain.expect(index, shard, roll)
            ours = plain.read_windows(index, shard, roll)
            np.testing.assert_array_equal(ours, packed.read_windows(index, shard, roll))
    for store, straight in ((plain, True), (packed, False)):
        (file,) = {store.years.locate(0)[0]}
        assert (file._straight is not None) is straight
    corner, size = (3, 5), (4, 11)
    field = plain.read(1)[7, 3:7, 5:16]
    np.testing.assert_array_equal(plain.years.read(1, corner, size, channel=7)[0], field)


def test_chunks_in_another_order_are_read_by_hdf5(tmp_path: Path) -> None:
    """The first and the last lie where they would; two between are the other way round."""
    x = np.arange(3 * 8 * 8, dtype=np.float32).reshape(1, 3, 8, 8)
    with h5py.File(tmp_path / "1970.h5", "w", locking=False) as file:
        fields = file.create_dataset("fields", x.shape, "<f4", chunks=(1, 3, 4, 4))
        for row, col in ((0, 0), (4, 0), (0, 4), (4, 4)):
            part = ..., slice(row, row + 4), slice(col, col + 4)
            fields[part] = x[part]
    year = yearfile.YearFile(tmp_path / "1970.h5")
    np.testing.assert_array_equal(year.read(0, (0, 0), (8, 8)), x[0])


def test_a_rank_reads_its_chunks_and_no_byte_more(
    weather: Callable[..., xr.Dataset],
    convert: Callable[..., Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what the kernel is told ahead is the same bytes, each before it is read."""
    weather().to_netcdf(tmp_path / "source.nc", engine="h5netcdf")
    store = convert(tmp_path / "source.nc", tmp_path / "plain")
    shard = WindowShard.dealt(WindowGrid(12, 24, 6), (1, 2), (0, 1))
    expected, read, told = store.read_windows(0, shard), list[int](), list[int]()
    preadv, advise = os.preadv, hasattr(os, "posix_fadvise")

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert not advise or offset in told or offset - 1000 in told
        read.append(offset)
        short = len(read) == 1  # goes on where it ended
        return preadv(descriptor, [buffers[0][:1000]] if short else buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    if advise:
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, size, how: told.append(offset))
    monkeypatch.setattr(yearfile, "AHEAD_BYTES", 1)  # one chunk ahead
    np.testing.assert_array_equal(store.read_windows(0, shard), expected)
    assert len(read) == 1 + len(shard.windows) and read[1] == read[0] + 1000
    offsets = [read[0], *read[2:]]
    assert not any((offset - offsets[0]) % (len(store.names) * 36 * 4) for offset in offsets)
    assert not advise or sorted(told) == sorted(offsets)


def test_masked_points_have_one_fill_value_whoever_reads_them(store_path: Path) -> None:
    store = Store(store_path)
    with xr.open_dataset(store_path.parent / "source.nc", engine="h5netcdf") as source:
        sst = source["sea_surface_temperature"].values
    valid = np.isfinite(sst).all(axis=0)
    assert 0 < valid.sum() < np.isfinite(sst[0]).sum()  # one point is missing at one time only
    np.testing.assert_array_equal(store.mask_CYX[-1], valid)
    assert store.mask_CYX[:-1].all()
    train = sst[store.times <= np.datetime64("2000-01-01T06:59:59")].astype(np.float64)
    fill = train[:, valid].mean()
    assert store.fill_C[-1] == np.float32(fill)
    for index in range(len(store)):
        np.testing.assert_array_equal(store.read(index)[-1], np.where(valid, sst[index], np.float32(fill)))
    grid = WindowGrid(12, 24, 4)
    whole = store.read_windows(3, WindowShard.full(grid))
    for number, window in enumerate(WindowShard.full(grid).windows):
        alone = store.read_windows(3, WindowShard(grid, (window,)))
        np.testing.assert_array_equal(alone[0], whole[number])
    shard = WindowShard.full(grid)
    expected = store.mask_CYX.reshape(20, -1).T[shard.token_index()]
    np.testing.assert_array_equal(store.valid_windows(shard), expected)


def test_shard_of_another_grid_is_refused(store_path: Path) -> None:
    with pytest.raises(ValueError, match=r"24 x 48 points, but .* has 12 x 24"):
        Store(store_path).read_windows(0, WindowShard.full(WindowGrid(24, 48, 12)))


def test_times_and_pairs(store_path: Path) -> None:
    store = Store(store_path)
    assert store.index_of("2000-01-01T06") == 6
    assert store.index_of(store.times[9]) == 9
    with pytest.raises(StoreError, match=r"nearest is 2000-01-01T06:00:00 .*every 6 h"):
        store.index_of("2000-01-01T07")
    np.testing.assert_array_equal(store.pairs(6), [[i, i + 1] for i in range(9)])
    np.testing.assert_array_equal(store.pairs(24), [[i, i + 4] for i in range(6)])
    period = (np.datetime64("1999-12-31T00"), np.datetime64("1999-12-31T18"))
    np.testing.assert_array_equal(store.pairs(12, period), [[1, 3], [2, 4]])
    with pytest.raises(StoreError, match="7 h apart .* are 6 h apart"):
        store.pairs(7)
    with pytest.raises(StoreError, match="24 h apart"):
        store.pairs(24, period)
    with pytest.raises(IndexError, match="outside 0 to 9"):
        store.read(10)


def test_pickled_store_reads_in_a_new_place(store_path: Path) -> None:
    store = Store(store_path)
    before = store.read(7)  # opens a file
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.read(7), before)
    store.close()
    np.testing.assert_array_equal(store.read(7), before)


def test_fingerprint_depends_on_what_a_model_depends_on(store_path: Path) -> None:
    store = Store(store_path)
    assert json.loads(json.dumps(store.fingerprint)) == store.fingerprint
    assert len(store.fingerprint_id) == 16
    assert Store(packaged_sample()).fingerprint_id != store.fingerprint_id
    before = store.fingerprint_id
    for change, other in ((1e-14, False), (1e-6, True)):  # another machine's rounding is no other store
        del store.__dict__["fingerprint"]
        store.statistics.residual_std[24][0] *= 1 + change
        assert (store.fingerprint_id != before) is other


def test_missing_value_is_named(broken: Path) -> None:
    with h5py.File(broken / "2000.h5", "r+") as file:
        file["fields"][3, 5, 7, 11] = np.nan
        file["fields"][3, 5, 8, 2] = np.nan
    store = Store(broken)
    store.read(7)
    where = r"z500 is nan at 2000-01-01T18:00:00, row 7, col 11 of .*2000.h5"
    with pytest.raises(StoreError, match=where):
        store.read(8)
    grid = WindowGrid(12, 24, 6)
    with pytest.raises(StoreError, match=where):
        store.read_windows(8, WindowShard(grid, ((1, 1),)))
    store.read_windows(8, WindowShard(grid, ((0, 1),)))  # the other windows are whole


def test_truncated_year_is_named(broken: Path) -> None:
    data = (broken / "2000.h5").read_bytes()
    (broken / "2000.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        StoreError, match=rf"2000.h5 is truncated or damaged \({len(data) // 2} bytes .*copy it again"
    ):
        Store(broken)


def test_damaged_year_is_named(broken: Path) -> None:
    size = (broken / "2000.h5").stat().st_size
    (broken / "2000.h5").write_bytes(b"\0" * size)
    store = Store(broken)
    store.read(0)
    with pytest.raises(StoreError, match=r"2000.h5 is truncated or damaged"):
        store.read(9)


def test_missing_year_is_named(broken: Path) -> None:
    (broken / "1999.h5").unlink()
    with pytest.raises(StoreError, match=r"1999.h5 is missing: copy it again"):
        Store(broken)


def test_truncated_header_is_named(broken: Path) -> None:
    data = (broken / "store.h5").read_bytes()
    (broken / "store.h5").write_bytes(data[:1000])
    with pytest.raises(StoreError, match=r"store.h5 is truncated or damaged"):
        Store(broken)


@pytest.mark.parametrize(
    ("new", "what"), [(0, "1999-12-30T18:00:00 .index 4. does not come"), (3, "index 4")]
)
def test_times_that_do_not_rise_are_named(broken: Path, new: int, what: str) -> None:
    with h5py.File(broken / "store.h5", "r+") as file:
        file["time"][4] = file["time"][new]
    with pytest.raises(StoreError, match=what):
        Store(broken)


def test_other_version_and_other_directories_are_refused(broken: Path, tmp_path: Path) -> None:
    with h5py.File(broken / "store.h5", "r+") as file:
        file.attrs["version"] = 99
    with pytest.raises(StoreError, match="not a store of version 1"):
        Store(broken)
    with pytest.raises(
        StoreError, match=r"nowhere does not exist: make a store with python -m aeris.data.convert"
    ):
        Store(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"empty is not a store, it has no store.h5"):
        Store(tmp_path / "empty")


def test_packaged_sample() -> None:
    store = Store(packaged_sample())
    assert len(store) == 160
    assert len(store.names) == 24
    assert (store.rows, store.cols, store.window, store.interval_h) == (24, 48, 12, 6)
    assert set(store.statistics.residual_std) == {6, 12, 24}
    assert store.statistics.train_period == (store.times[0], store.times[119])
    assert sum(file.stat().st_size for file in packaged_sample().iterdir()) < 12e6
    assert not [word for word in ("/work", "/tmp", "/home") if word in json.dumps(store.made)]
    assert "jcm 3.0.0" in json.dumps(store.made)
    # What weather people know: a warm surface, and wind from the west that grows with height.
    mean = dict(zip(store.names, store.statistics.mean_C))
    assert 270 < mean["t2m"] < 290
    assert mean["u300"] > mean["u700"] > 0
    assert mean["z300"] > 80000
