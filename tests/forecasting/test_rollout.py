"""Rollout against plain arrays without windows, and its promises: members, batches, masks, restarts.

A small made-up store and networks of one line stand in for data and training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aeris.data.forcing import Forcing
from aeris.data.forecasts import ForecastPlan, ForecastWriter, MemberWriter, open_forecast
from aeris.data.statistics import Statistics
from aeris.diffusion.sampler import SamplerConfig, noise_levels
from aeris.forecasting.ensemble import Ensemble, init_times
from aeris.forecasting.rollout import Forecaster, lead_times, rollout
from swipe import noise
from swipe.layout import WindowLayout
from swipe.windows import WindowGrid, WindowShard

ROWS, COLS = 4, 8
NAMES = ("t2m", "z500", "sst")
INIT = np.datetime64("2000-05-31T00", "s")
EULER = SamplerConfig(solver="euler", levels=3, sigma_min=0.5, sigma_max=50.0)
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ToyStore:
    """What a rollout needs of a store: two init times, three channels, the last hidden on some points."""

    noise_where_hidden = False

    def __init__(self, masked: bool = True) -> None:
        rng = np.random.default_rng(0)
        self.path = Path("toy")
        self.names = NAMES
        self.times = np.array([INIT, INIT + np.timedelta64(24, "h")])
        self.latitude_deg = np.linspace(67.5, -67.5, ROWS)
        self.longitude_deg = np.arange(COLS) * 45.0
        mean_C, std_C = np.array([280.0, 5e4, 290.0]), np.array([10.0, 3e3, 8.0])
        self.statistics = Statistics(
            mean_C, std_C, {6: np.array([0.1, -3.0, 0.0])}, {6: np.array([2.0, 400.0, 0.3])}, (INIT, INIT)
        )
        self.fill_C = mean_C.astype(np.float32)
        self.static = {
            "geopotential_at_surface": rng.normal(0, 5e3, (ROWS, COLS)).astype(np.float32),
            "land_sea_mask": (rng.random((ROWS, COLS)) > 0.5).astype(np.float32),
        }
        self.mask_CYX = np.ones((3, ROWS, COLS), dtype=bool)
        self.masks = {}
        if masked:
            self.mask_CYX[2, 1:3, 2:5] = False
            self.masks = {"sst": self.mask_CYX[2]}
        fields = mean_C[:, None, None] + std_C[:, None, None] * rng.normal(size=(2, 3, ROWS, COLS))
        self.fields = np.where(self.mask_CYX, fields, mean_C[:, None, None]).astype(np.float32)

    def index_of(self, time: np.datetime64) -> int:
        found = np.flatnonzero(self.times == np.datetime64(time, "s"))
        if not len(found):
            raise ValueError(f"toy has no time {time}: the nearest is {self.times[0]}")
        return int(found[0])

    def read_windows(self, index: int, shard: WindowShard) -> np.ndarray:
        return np.moveaxis(self.fields[index].reshape(3, -1)[:, shard.token_index()], 0, -1).copy()

    def valid_windows(self, shard: WindowShard) -> np.ndarray:
        return np.moveaxis(self.mask_CYX.reshape(3, -1)[:, shard.token_index()], 0, -1)


def pointwise(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """A network that mixes noisy residual, state and every forcing, and is not small on hidden points."""
    x, state, forcing = x_BNTC.split([3, 3, 4], dim=-1)
    mixed = 0.6 * x + 0.2 * state.flip(-1) + 0.1 * forcing[..., :3] - 0.05 * forcing[..., 1:] + 0.3
    return mixed * torch.cos(t_B)[:, None, None, None]


def make(network: Network = pointwise, masked: bool = True, seed: int = 3, **settings: object) -> Forecaster:
    layout = WindowLayout(WindowShard.full(WindowGrid(ROWS, COLS, 2)))
    sampler = settings.pop("sampler", EULER)
    return Forecaster(network, layout, ToyStore(masked), 6, sampler, seed=seed, **settings)  # type: ignore[arg-type]


def fields(forecaster: Forecaster, members: list[int], lead_h: int = 12) -> np.ndarray:
    steps = rollout(forecaster, INIT, members, lead_h)
    return np.stack([forecaster.layout.from_windows(x_BNTC).numpy() for _, x_BNTC in steps])


def test_equals_plain_arrays_without_windows() -> None:
    """The whole chain written out on [C, Y, X] in float64: standardise, noise, DDIM, residual, forcings."""
    forecaster = make(sigma_data=0.5)
    store, statistics = forecaster.store, forecaster.store.statistics
    column = (slice(None), None, None)
    mean, std = statistics.mean_C[column], statistics.std_C[column]
    shift, scale = statistics.residual_mean[6][column], statistics.residual_std[6][column]
    tokens_NT = torch.arange(ROWS * COLS).reshape(1, -1)
    times = [*(math.atan(sigma / 0.5) for sigma in noise_levels(EULER)), 0.0]
    valid, member = store.mask_CYX, 5
    x = store.fields[0].astype(np.float64)
    for step, ahead in enumerate(fields(forecaster, [member]), start=1):
        time = INIT + np.timedelta64(6 * (step - 1), "h")
        forcing = Forcing(store, 6).fields(time)  # type: ignore[arg-type]
        state = (x - mean) / std * valid
        key = noise.key(3, int(INIT.astype(np.int64)), member, step, 0)
        z = noise.normal([key], tokens_NT, 3).numpy().reshape(ROWS, COLS, 3).transpose(2, 0, 1)
        r = 0.5 * z * valid
        for a, b in pairwise(times):
            mixed = 0.6 * r / 0.5 + 0.2 * state[::-1] + 0.1 * forcing[:3] - 0.05 * forcing[1:] + 0.3
            v = 0.5 * mixed * math.cos(a) * valid
            r = math.cos(a - b) * r - math.sin(a - b) * v
        x = np.where(valid, x + r * scale + shift, mean)
        np.testing.assert_allclose(ahead[0], x, rtol=2e-6)


def test_a_member_is_the_same_in_any_batch_and_every_one_is_another() -> None:
    forecaster = make()
    together = fields(forecaster, [0, 1, 2, 3])
    np.testing.assert_array_equal(together[:, 2:3], fields(forecaster, [2]))
    np.testing.assert_array_equal(together[:, [3, 1]], fields(forecaster, [3, 1]))
    free = together[:, :, forecaster.store.mask_CYX]
    assert len(np.unique(free[:, :, 0])) == free[:, :, 0].size


def test_seed_and_init_time_change_the_noise() -> None:
    first, other = fields(make(), [0], 6), fields(make(seed=4), [0], 6)
    assert np.abs(first - other)[:, :, 0].min() > 0
    drawn: list[torch.Tensor] = []

    def watch(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        drawn.append(x_BNTC[..., :3].clone())
        return torch.zeros_like(drawn[-1])

    forecaster = make(watch)
    for time in forecaster.store.times:
        list(rollout(forecaster, time, [0], 12))
    starts = [drawn[number] for number in (0, 3, 6, 9)]  # two steps from each of two init times
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def test_hidden_points_stay_at_their_fill_value_and_show_the_network_zeros() -> None:
    def wild(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        seen.append(x_BNTC)
        return torch.where(hidden_NTC, 1e6, pointwise(x_BNTC, t_B))

    seen: list[torch.Tensor] = []
    forecaster = make(wild, sampler=SamplerConfig(levels=4, sigma_min=0.5, sigma_max=50.0, churn=1.0))
    hidden_NTC = torch.from_numpy(~forecaster.store.valid_windows(forecaster.layout.shard))
    calm = make(sampler=forecaster.sampler)
    np.testing.assert_array_equal(fields(forecaster, [0, 1]), fields(calm, [0, 1]))
    out = fields(forecaster, [0, 1])
    assert (out[:, :, ~forecaster.store.mask_CYX] == forecaster.store.fill_C[2]).all()
    for x_BNTC in seen:
        assert (x_BNTC[..., :3][:, hidden_NTC] == 0).all()
        assert (x_BNTC[..., 3:6][:, hidden_NTC] == 0).all()


def test_networks_of_other_code_see_noise_on_hidden_points_and_these_keep_their_fill_value() -> None:
    def watched(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        seen.append(x_BNTC)
        return pointwise(x_BNTC, t_B)

    seen: list[torch.Tensor] = []
    forecaster = make(watched)
    forecaster.store.noise_where_hidden = True
    hidden_NTC = torch.from_numpy(~forecaster.store.valid_windows(forecaster.layout.shard))
    out = fields(forecaster, [0, 1])
    assert (out[:, :, ~forecaster.store.mask_CYX] == forecaster.store.fill_C[2]).all()
    assert all((x_BNTC[..., :3][:, hidden_NTC] != 0).any() for x_BNTC in seen)


def test_goes_on_from_a_lead_time_bit_for_bit() -> None:
    forecaster = make()
    whole = list(rollout(forecaster, INIT, [1, 2], 24))
    rest = list(rollout(forecaster, INIT, [1, 2], 24, start=whole[1]))
    assert [lead for lead, _ in rest] == [18, 24]
    for (_, a), (_, b) in zip(rest, whole[2:]):
        assert torch.equal(a, b)


def test_a_perfect_network_gives_a_perfect_ensemble() -> None:
    """Residuals N(m, s^2) at every point: mean and spread come out, noise and statistics included."""
    mean, std = 0.4, 0.5

    def perfect(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        x = x_BNTC[..., :3]
        t = t_B[:, None, None, None]
        variance = torch.cos(t) ** 2 * std**2 + torch.sin(t) ** 2
        clean = mean + torch.cos(t) * std**2 / variance * (x - torch.cos(t) * mean)
        return (torch.cos(t) * x - clean) / torch.sin(t)

    sampler = SamplerConfig(levels=19, sigma_min=0.02, sigma_max=200.0)
    forecaster = make(perfect, masked=False, sampler=sampler)
    change = fields(forecaster, list(range(200)), 6)[0] - forecaster.store.fields[0]
    statistics = forecaster.store.statistics
    scale, shift = statistics.residual_std[6], statistics.residual_mean[6]
    standard_CS = (change.transpose(1, 0, 2, 3).reshape(3, -1) - shift[:, None]) / scale[:, None]
    # 6400 numbers per channel: standard errors 0.006 and 0.0045; the solver widens this mode by 1.3 %
    np.testing.assert_allclose(standard_CS.mean(axis=1), mean, atol=0.025)
    np.testing.assert_allclose(standard_CS.std(axis=1), std * 1.013, atol=0.02)


def test_a_forecast_that_is_no_longer_finite_is_named() -> None:
    def breaks(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        y = pointwise(x_BNTC, t_B)
        if x_BNTC.shape[0] == 3 and len(calls) >= 3:  # in the second step
            y[1, 0, 3, 1] = float("nan")
        calls.append(1)
        return y

    calls: list[int] = []
    steps = rollout(make(breaks), INIT, [4, 5, 6], 12)
    next(steps)
    with pytest.raises(
        ValueError, match=r"z500 of member 5 is nan at row 1, col 1, 12 h after 2000-05-31T00"
    ):
        next(steps)


def test_generator_leaves_gradients_on() -> None:
    for _ in rollout(make(), INIT, [0], 6):
        assert torch.is_grad_enabled()


def test_lead_times() -> None:
    assert lead_times(18, 6) == (6, 12, 18)
    for last_h, near in [(20, "18 or 24"), (3, "6 or 12"), (0, "6 or 12")]:
        with pytest.raises(ValueError, match=near):
            lead_times(last_h, 6)


def test_init_times() -> None:
    hours = np.arange(0, 97, 6)
    store = SimpleNamespace(index_of=lambda t: list(INIT + hours * np.timedelta64(1, "h")).index(t))
    three = ("2000-05-31T00:00:00", "2000-06-01T00:00:00", "2000-06-02T00:00:00")
    for words in (
        ("2000-06-02", "2000-05-31T00", "2000-06-01T00:00"),
        ("2000-05-31T00:2000-06-02T00:24h",),
        ("2000-05-31T00:00:2000-06-02T12:24h",),
        ("2000-05-31:2000-06-02:24h", "2000-06-01"),
    ):
        assert init_times(words, store) == three  # type: ignore[arg-type]
    for word, message in [
        ("yesterday", "not a time"),
        ("NaT", "are none"),
        ("2000-06-02:2000-05-31:24h", "the end comes before"),
        ("2000-05-31:2000-06-02:0h", "step is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            init_times((word,), store)  # type: ignore[arg-type]


def plan(members: int = 3) -> ForecastPlan:
    store = ToyStore()
    return ForecastPlan(
        inits=tuple(str(time) for time in store.times),
        lead_h=(6, 12),
        members=members,
        names=NAMES,
        latitude_deg=tuple(store.latitude_deg.tolist()),
        longitude_deg=tuple(store.longitude_deg.tolist()),
        made={"seed": 3},
        about={},
    )


def everything(path: Path) -> np.ndarray:
    forecast = open_forecast(path)
    return np.stack([forecast.read(i, j) for i in range(2) for j in range(2)])


def make_ensemble(forecaster: Forecaster, path: Path, batch: int = 2) -> Ensemble:
    return Ensemble(forecaster, plan(), ForecastWriter(path, plan()), batch)


def test_ensemble_writes_what_rollout_yields(tmp_path: Path) -> None:
    forecaster = make()
    evaluations: list[int] = []
    ensemble = make_ensemble(forecaster, tmp_path / "f.zarr")
    assert (ensemble.steps, ensemble.steps_left, ensemble.evaluations_per_step) == (12, 12, 3)
    ensemble.run(evaluations.append)
    assert sum(evaluations) == 3 * 12
    forecast = open_forecast(tmp_path / "f.zarr")
    hidden = ~forecaster.store.mask_CYX
    for number, time in enumerate(forecast.inits):
        for lead, (_, x_BNTC) in enumerate(rollout(forecaster, time, range(3), 12)):
            got, x_MCYX = forecast.read(number, lead), forecaster.layout.from_windows(x_BNTC).numpy()
            assert np.isnan(got[:, hidden]).all()
            np.testing.assert_array_equal(got[:, ~hidden], x_MCYX[:, ~hidden])
    assert make_ensemble(forecaster, tmp_path / "f.zarr").steps_left == 0


@pytest.mark.parametrize(("name", "stops"), [("f.zarr", (0, 1, 3, 2)), ("f", (1, 2))])
def test_a_stopped_ensemble_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, name: str, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, again and again, after so many writes; with a network whose bits depend on the batch."""

    def mixing(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        y = pointwise(x_BNTC, t_B)
        return y + 1e-6 * x_BNTC[..., :3].mean() * len(t_B)

    def run(path: Path) -> None:
        make_ensemble(make(mixing), path).run()

    run(tmp_path / ("whole" + Path(name).suffix))
    write = MemberWriter.write
    for stop in stops:
        left = [stop]

        def dying(self: MemberWriter, *args: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("killed")
            write(self, *args)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(MemberWriter, "write", dying)
            with pytest.raises(RuntimeError, match="killed"):
                run(tmp_path / name)
        assert not (tmp_path / name).exists()
    run(tmp_path / name)
    np.testing.assert_array_equal(
        everything(tmp_path / name), everything(tmp_path / ("whole" + Path(name).suffix))
    )


def test_nothing_is_written_after_a_value_that_is_not_finite(tmp_path: Path) -> None:
    calls: list[int] = []

    def breaks(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return pointwise(x_BNTC, t_B) * (float("inf") if len(calls) == 5 else 1.0)

    with pytest.raises(ValueError, match="12 h after"):
        make_ensemble(make(breaks), tmp_path / "f.zarr", batch=3).run()
    part = open_forecast(tmp_path / "f.zarr", partial=True)
    assert np.isfinite(part.read(0, 0)[:, :2]).all()
    assert np.isnan(part.read(0, 1)).all()
