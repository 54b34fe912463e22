"""Statistics, against plain numpy in float64 over all values at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from aeris.data import statistics
from aeris.data.statistics import Band, Moments, Statistics
from aeris.data.store import Store, StoreError, packaged_sample
from aeris.data.yearfile import YearFile, Years


def plain(store: Store, interval_h: int) -> dict[str, np.ndarray]:
    """Compute everything from all fields of the train period in memory, masked points as NaN."""
    start, end = store.statistics.train_period
    inside = np.flatnonzero((store.times >= start) & (store.times <= end))
    x = np.stack([np.where(store.mask_CYX, store.read(i), np.nan) for i in inside]).astype(np.float64)
    steps = interval_h // store.interval_h
    change = x[steps:] - x[:-steps]
    axes = (0, 2, 3)
    return {
        "mean": np.nanmean(x, axes),
        "std": np.nanstd(x, axes),
        "residual_mean": np.nanmean(change, axes),
        "residual_std": np.nanstd(change, axes),
    }


@pytest.mark.parametrize("interval_h", [6, 24])
@pytest.mark.parametrize("which", ["masked", "packaged"])
def test_statistics_are_those_of_all_values_at_once(which: str, interval_h: int, store_path: Path) -> None:
    store = Store(store_path if which == "masked" else packaged_sample())
    expected = plain(store, interval_h)
    ours = store.statistics
    std = expected["std"]
    np.testing.assert_allclose(ours.mean_C, expected["mean"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(ours.std_C, std, rtol=1e-11, atol=0)
    np.testing.assert_allclose(
        ours.residual_mean[interval_h] / std, expected["residual_mean"] / std, atol=1e-12
    )
    np.testing.assert_allclose(ours.residual_std[interval_h], expected["residual_std"], rtol=1e-11, atol=0)


def test_times_after_the_train_period_do_not_count(weather, convert, tmp_path: Path) -> None:
    source = weather()
    source.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    changed = source.copy(deep=True)
    changed["2m_temperature"][7:] = 999.0
    changed.to_netcdf(tmp_path / "b.nc", engine="h5netcdf")
    one, two = (convert(tmp_path / f"{n}.nc", tmp_path / n) for n in "ab")  # 7 of 10 times: the first 75 %
    assert one.statistics.train_period[1] == one.times[6]
    assert one.fingerprint_id == two.fingerprint_id
    assert not np.array_equal(one.read(8), two.read(8))


def test_gap_in_the_times_makes_no_pair(weather, convert, tmp_path: Path) -> None:
    source = weather(times=12).isel(time=[0, 1, 2, 3, 6, 7, 8, 9, 10, 11])
    source.to_netcdf(tmp_path / "gap.nc", engine="h5netcdf")
    store = convert(tmp_path / "gap.nc", tmp_path / "gap", intervals_h=(6,), train_period=("1999", "2001"))
    x = source["2m_temperature"].values.astype(np.float64)
    change = np.concatenate([np.diff(x[:4], axis=0), np.diff(x[4:], axis=0)])
    assert store.statistics.residual_std[6][0] == pytest.approx(change.std(), rel=1e-12)
    assert len(store.pairs(6)) == 8


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1e5, -273.15]),
    cut=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_moments_do_not_depend_on_blocks(blocks: list[int], offset: float, cut: int, seed: int) -> None:
    x = offset + np.random.default_rng(seed).standard_normal(sum(blocks))
    parts = Moments(2, 3), Moments(2, 3)
    for number, (start, count) in enumerate(zip(np.cumsum([0, *blocks]), blocks)):
        parts[number >= cut].add(1, 2, x[start : start + count].copy())
    parts[0].merge(parts[1])
    assert parts[0].count_SC.sum() == parts[0].count_SC[1, 2] == len(x)
    if len(x):
        assert parts[0].mean_SC[1, 2] == pytest.approx(x.mean(), rel=1e-12, abs=1e-12)
        assert parts[0].std_SC[1, 2] == pytest.approx(x.std(), rel=1e-8, abs=1e-9)


def test_processes_and_kept_bands_do_not_change_a_bit(store_path: Path, tmp_path: Path, monkeypatch) -> None:
    store = Store(store_path)

    def compute(**how: object) -> Statistics:
        years = Years([YearFile(store_path / f"{year}.h5") for year in (1999, 2000)], [5, 5])
        time_s = store.times.astype(np.int64)
        train_s = tuple(int(t.astype(np.int64)) for t in store.statistics.train_period)
        return statistics.compute(years, time_s, store.names, train_s, (6, 24), store.masks, **how)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        done = []
        work = Band.moments
        patch.setattr(
            Band, "moments", lambda b, advance: stop() if done else done.append(b) or work(b, advance)
        )
        with pytest.raises(KeyboardInterrupt):
            compute(keep=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["band0.npz"]
    for how in ({"keep": tmp_path}, {"processes": 2}):
        count = []
        numbers = compute(advance=lambda count=count: count.append(1), **how)
        assert len(count) == 2 * 7
        assert numbers.std_C.tobytes() == store.statistics.std_C.tobytes()
        assert numbers.residual_std[24].tobytes() == store.statistics.residual_std[24].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 273.15 + 0 * x, r"t2m is 273.15 everywhere in the train period .* zero; leave it out"),
        (
            lambda x: x.isel(time=0).broadcast_like(x).transpose(*x.dims),
            r"t2m never changes over 6 h in the train period",
        ),
    ],
)
def test_channel_that_does_not_vary_is_named(change, message: str, weather, convert, tmp_path: Path) -> None:
    source: xr.Dataset = weather()
    source["2m_temperature"] = change(source["2m_temperature"]).astype(np.float32)
    source.to_netcdf(tmp_path / "still.nc", engine="h5netcdf")
    with pytest.raises(StoreError, match=message):
        convert(tmp_path / "still.nc", tmp_path / "still")
    assert not (tmp_path / "still").exists()
