"""Standardising and back, in numpy and torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aeris.data.normalize import Normalizer
from aeris.data.store import Store, packaged_sample


@pytest.fixture
def store() -> Store:
    return Store(packaged_sample())


@pytest.mark.parametrize("kind", ["numpy float32", "numpy float64", "torch float32", "torch float64"])
def test_round_trip(kind: str, store: Store) -> None:
    package, precision = kind.split()
    before, after = (store.read(i).transpose(1, 2, 0).astype(precision) for i in (0, 1))
    if package == "torch":
        before, after = torch.from_numpy(before), torch.from_numpy(after)
    normalizer = Normalizer(store.statistics, 6)
    relative = 1e-6 if precision == "float32" else 1e-13
    back = normalizer.destandardise(normalizer.standardise(before))
    assert back.dtype == before.dtype
    residual = normalizer.standardise_residual(before, after)
    # The unit of rounding is that of the state, geopotential's 10^5 in float32 against its change of 10^2.
    size = np.abs(np.asarray(before)).max((0, 1)) + store.statistics.std_C
    assert (np.abs(np.asarray(back) - np.asarray(before)) / size).max() < relative
    again = normalizer.apply_residual(before, residual)
    assert (np.abs(np.asarray(again) - np.asarray(after)) / size).max() < relative


def test_standardised_train_data_have_mean_0_and_std_1(store: Store) -> None:
    normalizer = Normalizer(store.statistics, 24)
    states = np.stack([store.read(i) for i in range(120)]).transpose(0, 2, 3, 1).astype(np.float64)
    state = normalizer.standardise(states).reshape(-1, 24)
    residual = normalizer.standardise_residual(states[:-4], states[4:]).reshape(-1, 24)
    for x in (state, residual):
        np.testing.assert_allclose(x.mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(x.std(0), 1, atol=1e-9)


def test_interval_without_statistics_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="for 18 h, only for 6 h, 12 h, 24 h"):
        Normalizer(store.statistics, 18)


def test_masked_points_are_zero_after_standardising(store_path: Path) -> None:
    store = Store(store_path)
    state = Normalizer(store.statistics, 6).standardise(store.read(0).transpose(1, 2, 0))
    assert np.all(state[..., -1][~store.mask_CYX[-1]] == 0)


def test_a_pair_is_standardised_to_where_it_is_wanted(store: Store) -> None:
    """The same bits, also into a part of a larger tensor."""
    before, after = (torch.from_numpy(store.read(i).transpose(1, 2, 0).copy()) for i in (3, 4))
    normalizer, whole = Normalizer(store.statistics, 6), torch.zeros(*before.shape[:2], 60)
    state, residual, rest = whole.split((24, 24, 12), dim=-1)
    normalizer.standardise_pair(before, after, state, residual)
    assert np.array_equal(state, normalizer.standardise(before.numpy()))
    assert np.array_equal(residual, normalizer.standardise_residual(before.numpy(), after.numpy()))
    assert not rest.any()
