"""Statistics, against plain numpy in float64 over all values at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from aeris.data.statistics import Moments
from aeris.data.store import Store, StoreError, packaged_sample


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
    np.testing.assert_allclose(ours.residual_mean[interval_h] / std, expected["residual_mean"] / std, atol=1e-12)
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
    blocks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1e5, -273.15]),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_moments_do_not_depend_on_blocks(blocks: list[int], offset: float, hidden: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = offset + rng.standard_normal((3, sum(blocks)))
    valid = rng.random(x.shape) >= hidden
    moments = Moments(3)
    for start, count in zip(np.cumsum([0, *blocks]), blocks):
        moments.update(x[:, start : start + count], valid[:, start : start + count])
    for c in range(3):
        values = x[c][valid[c]]
        assert moments.count_C[c] == len(values)
        if len(values):
            assert moments.mean_C[c] == pytest.approx(values.mean(), rel=1e-12, abs=1e-12)
            assert moments.std_C[c] == pytest.approx(values.std(), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 273.15 + 0 * x, r"t2m is 273.15 everywhere in the train period .* zero; leave it out"),
        (lambda x: x.isel(time=0).broadcast_like(x).transpose(*x.dims), r"t2m never changes over 6 h in the train period"),
    ],
)
def test_channel_that_does_not_vary_is_named(change, message: str, weather, convert, tmp_path: Path) -> None:
    source: xr.Dataset = weather()
    source["2m_temperature"] = change(source["2m_temperature"]).astype(np.float32)
    source.to_netcdf(tmp_path / "still.nc", engine="h5netcdf")
    with pytest.raises(StoreError, match=message):
        convert(tmp_path / "still.nc", tmp_path / "still")
    assert not (tmp_path / "still").exists()
