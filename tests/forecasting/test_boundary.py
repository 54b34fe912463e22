"""Boundary fields by name: what is set, what is left alone, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aeris.data.store import Store, StoreError, packaged_sample
from aeris.forecasting.boundary import Boundary, BoundaryConfig, fit_times
from swipe.layout import WindowLayout
from swipe.windows import WindowGrid, WindowShard

ROWS, COLS = 4, 8
NAMES = ("t2m", "sic", "sst")
GRID = WindowGrid(ROWS, COLS, 4)
FIRST, INIT = np.datetime64("2000-01-01T00", "s"), np.datetime64("2001-10-10T00", "s")
DAY = np.timedelta64(24, "h")


class ToyStore:
    """Two years of daily fields: a yearly wave that differs from point to point, land, and an anomaly."""

    def __init__(self, days: int = 731) -> None:
        rng = np.random.default_rng(0)
        self.path, self.names = Path("toy"), NAMES
        self.times = FIRST + np.arange(days) * DAY
        self.statistics = SimpleNamespace(train_period=(self.times[0], self.times[-1]))
        self.fill_C = np.array([280.0, 0.4, 290.0], dtype=np.float32)
        self.mask_CYX = np.ones((3, ROWS, COLS), dtype=bool)
        self.mask_CYX[1:, 1:3, 2:5] = False
        self.amplitude = rng.normal(size=(2, 3, ROWS, COLS))
        self.amplitude[:, 1] *= 0.05

    def season(self, time: np.datetime64) -> np.ndarray:
        angle = 2 * np.pi * (time - FIRST) / np.timedelta64(1, "s") / (365.2425 * 86400)
        waves = self.amplitude[0] * np.cos(angle) + self.amplitude[1] * np.sin(2 * angle + 1.0)
        return np.array([280.0, 0.4, 290.0])[:, None, None] + waves

    def index_of(self, time: np.datetime64) -> int:
        found = np.flatnonzero(self.times == time)
        if not len(found):
            raise StoreError(f"toy has no time {time}: the nearest is {self.times[-1]}")
        return int(found[0])

    def read_windows(self, index: int, shard: WindowShard) -> np.ndarray:
        x_CYX = np.where(self.mask_CYX, self.season(self.times[index]), self.fill_C[:, None, None])
        return np.moveaxis(x_CYX.reshape(3, -1)[:, shard.token_index()], 0, -1).astype(np.float32)

    def valid_windows(self, shard: WindowShard) -> np.ndarray:
        return np.moveaxis(self.mask_CYX.reshape(3, -1)[:, shard.token_index()], 0, -1)


def boundary(store: object, place: int = 0, ranks: int = 1, **choices: str) -> Boundary:
    """Boundary fields on the tokens of one rank."""
    shard = WindowShard.at_place(GRID, (1, ranks), 1, place)
    layout = WindowLayout(shard, (1, ranks), tuple(range(ranks)), place)
    return Boundary(BoundaryConfig(**choices), store, layout)  # type: ignore[arg-type]


def states(store: ToyStore, one: Boundary, anomaly: float = 0.0, members: int = 2) -> torch.Tensor:
    """Members at the init time: the store's fields and an anomaly of the sea."""
    x_NTC = torch.from_numpy(store.read_windows(store.index_of(INIT), one.layout.shard))
    x_BNTC = x_NTC.repeat(members, 1, 1, 1)
    x_BNTC[..., 2] += anomaly
    return x_BNTC


def sea(store: ToyStore, one: Boundary, x_BNTC: torch.Tensor) -> np.ndarray:
    """Sea temperature as images, land NaN."""
    image = one.layout.from_windows(x_BNTC).numpy()[:, 2]
    return np.where(store.mask_CYX[2], image, np.nan)


def test_forecast_leaves_everything_alone() -> None:
    """The same tensor comes back."""
    one = boundary(ToyStore())
    x = torch.ones(1, 2, 16, 3)
    assert not one.active and not one.needs_start and one.apply(x, INIT, 24) is x


def test_persist_keeps_each_members_own() -> None:
    """Sea as at the start; air as predicted; land at its fill value; the prediction is not written into."""
    store = ToyStore()
    one = boundary(store, sst="persist")
    start = states(store, one)
    start[1, ..., 2] += 1.0
    ahead = start + 5.0
    before = ahead.clone()
    result = one.apply(ahead, INIT, 48, start)
    np.testing.assert_array_equal(sea(store, one, result), sea(store, one, start))
    assert torch.equal(result[..., :2], ahead[..., :2]) and torch.equal(ahead, before)
    assert one.needs_start


def test_anomaly_rides_on_the_season() -> None:
    """The fitted climatology follows the yearly wave exactly, so valid = season + anomaly of the start."""
    store = ToyStore()
    one = boundary(store, sst="anomaly", sic="anomaly")
    start = states(store, one, anomaly=1.5)
    for days in (1, 90):
        result = one.apply(torch.zeros_like(start), INIT, 24 * days, start)
        expected = np.where(store.mask_CYX[2], store.season(INIT + days * DAY)[2] + 1.5, np.nan)
        np.testing.assert_allclose(sea(store, one, result)[1], expected, atol=2e-3)
        assert 0 <= result[..., 1].min() and result[..., 1].max() <= 1


def test_truth_comes_from_the_store_on_every_layout() -> None:
    """Prescribed fields, put together from two ranks."""
    store = ToyStore()
    found = np.full((2, ROWS, COLS), np.nan)
    for place in range(2):
        one = boundary(store, place, 2, sst="truth")
        start = states(store, one)
        here = sea(store, one, one.apply(start + 9.0, INIT, 72))
        found = np.where(np.isnan(here), found, here)
    expected = np.where(store.mask_CYX[2], store.season(INIT + 3 * DAY)[2], np.nan).astype(np.float32)
    np.testing.assert_array_equal(found[0], expected)


def test_what_is_missing_is_named() -> None:
    """A valid time, a channel, a year of training data."""
    late = ToyStore().times[-1]
    one = boundary(ToyStore(), sst="truth")
    one.check([INIT], (24, 48))
    with pytest.raises(
        ValueError, match=r"--boundary.sst truth, 24 h after 2001-12-31.*has no time 2002-01-01"
    ):
        one.check([INIT, late], (24, 48))
    boundary(ToyStore(), sst="persist").check([late], (24,))
    with pytest.raises(ValueError, match="has no sst, so the model does not see it"):
        Boundary(BoundaryConfig(sst="persist"), Store(packaged_sample()), boundary(ToyStore()).layout)
    with pytest.raises(ValueError, match=r"needs a year, but toy has 99 days .* or take persist"):
        boundary(ToyStore(days=100), sst="anomaly")


def test_times_of_the_climatology_cover_period_and_seasons() -> None:
    """At most 240, in every month of every year."""
    store = ToyStore()
    numbers = fit_times(store)  # type: ignore[arg-type]
    assert 200 < len(numbers) <= 240
    months = store.times[numbers].astype("datetime64[M]")
    assert len(np.unique(months)) == 24
