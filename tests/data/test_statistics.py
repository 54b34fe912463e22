"""Statistics, against plain numpy in float64 over all values at once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from aeris.data import statistics
from aeris.data.statistics import Moments, Train
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
    options = {"intervals_h": (6,), "train_period": ("1999", "2001")}
    with pytest.raises(ValueError, match=r"missing between 1999-12-31T12:00:00 and 2000-01-01T06:00:00: add"):
        convert(tmp_path / "gap.nc", tmp_path / "gap", **options)
    store = convert(tmp_path / "gap.nc", tmp_path / "gap", allow_gaps=True, **options)
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


@pytest.fixture(scope="module")
def train(store_path: Path) -> Train:
    store = Store(store_path)
    train_s = tuple(int(t.astype(np.int64)) for t in store.statistics.train_period)
    masks = {store.names.index(name): valid_YX for name, valid_YX in store.masks.items()}
    return Train(store.years, store.times.astype(np.int64), train_s, (6, 24), masks)


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_do_not_change_a_bit(processes: int, train: Train, store_path: Path) -> None:
    store, count = Store(store_path), []
    numbers = statistics.compute(train, store.names, [(0, 5), (5, 10)], processes, count.append)
    assert count == [5, 5]
    assert numbers.std_C.tobytes() == store.statistics.std_C.tobytes()
    assert numbers.residual_std[24].tobytes() == store.statistics.residual_std[24].tobytes()


@pytest.mark.parametrize("cuts", [(0, 10), (0, 1, 2, 10), (0, 4, 6, 9, 10), tuple(range(11))])
def test_blocks_share_the_changes_between_them(cuts: tuple[int, ...], train: Train, store_path: Path) -> None:
    """However the times are cut, every change is counted once: same counts, same numbers to rounding."""
    store = Store(store_path)
    parts = [train.moments(*block) for block in pairwise(cuts)]
    whole = train.moments(0, 10)
    counts = sum(part.count_SC for part in parts)
    np.testing.assert_array_equal(counts, whole.count_SC)
    numbers = train.statistics(parts, store.names)
    np.testing.assert_allclose(numbers.std_C, store.statistics.std_C, rtol=1e-12)
    np.testing.assert_allclose(numbers.residual_std[24], store.statistics.residual_std[24], rtol=1e-12)
    assert numbers.train_period == store.statistics.train_period


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
