"""Perturbed initial conditions: noise as theory has it, the same under every layout; who starts from what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre

from aeris.data.forecasts import ForecastPlan, ForecastWriter
from aeris.data.spherical import EARTH_RADIUS_KM, SphericalNoise, power
from aeris.data.store import Store, packaged_sample
from aeris.forecasting.perturbation import Perturbation, PerturbationConfig, mixing
from swipe.layout import WindowLayout
from swipe.windows import WindowGrid, WindowShard

INIT = np.datetime64("2000-06-04T00", "s")
GRID = WindowGrid(24, 48, 12)
LAYOUTS = {
    "one rank": ((1, 1), 1),
    "rows of windows": ((2, 1), 1),
    "columns of windows": ((1, 2), 1),
    "parts of windows": ((1, 1), 4),
    "both": ((2, 2), 2),
}


@pytest.fixture(scope="module")
def store() -> Store:
    """The packaged SPEEDY sample."""
    return Store(packaged_sample())


def layouts(name: str) -> list[WindowLayout]:
    """Every rank's layout."""
    wp, sp = LAYOUTS[name]
    count = wp[0] * wp[1] * sp
    shards = [WindowShard.at_place(GRID, wp, sp, place) for place in range(count)]
    return [WindowLayout(shard, wp, tuple(range(count)), place) for place, shard in enumerate(shards)]


def perturbation(
    store: Store, layout: WindowLayout | None = None, seed: int = 0, **settings: object
) -> Perturbation:
    """A perturbation of 6-h forecasts on one rank's tokens."""
    config = PerturbationConfig(**settings)  # type: ignore[arg-type]
    return Perturbation(config, store, layout or layouts("one rank")[0], interval_h=6, seed=seed)


def analysis(store: Store, layout: WindowLayout, init: np.datetime64 = INIT) -> torch.Tensor:
    """This rank's tokens of the analysis."""
    return torch.from_numpy(store.read_windows(store.index_of(init), layout.shard))


def images(layout: WindowLayout, x_BNTC: torch.Tensor) -> np.ndarray:
    """States as [B, C, Y, X]."""
    return layout.from_windows(x_BNTC).numpy()


def test_covariance_is_that_of_the_power_spectrum() -> None:
    """Summed over all coefficients it is sum_l power_l P_l(cos distance), over the date line and poles."""
    latitude_deg, longitude_deg = np.linspace(90, -90, 13), np.arange(16) * 22.5 + 3.0
    noise = SphericalNoise(latitude_deg, longitude_deg, 1500.0)
    f_KS = noise.fields(np.eye(noise.coefficients)).reshape(noise.coefficients, -1).astype(np.float64)
    phi, lam = (np.deg2rad(x).ravel() for x in np.meshgrid(latitude_deg, longitude_deg, indexing="ij"))
    xyz = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
    cosine_SS = np.clip(xyz.T @ xyz, -1, 1)
    np.testing.assert_allclose(f_KS.T @ f_KS, legendre.legval(cosine_SS, power(1500.0)), atol=1e-6)
    km_SS = EARTH_RADIUS_KM * np.arccos(cosine_SS)
    np.testing.assert_allclose(f_KS.T @ f_KS, np.exp(-0.5 * (km_SS / 1500.0) ** 2), atol=0.03)


def test_drawn_fields_have_the_stated_variance_and_correlation(store: Store) -> None:
    """200 draws: unit variance, the correlation at one length, no mean of their own."""
    e = perturbation(store, kind="noise", amplitude=1.0, length_km=2000.0, channels=("z500",))
    number, layout = store.names.index("z500"), e.layout
    f_BNT = e._noisy(INIT, range(200))[..., number] / e._std_C[number]
    f_BYX = layout.from_windows(f_BNT[..., None])[:, 0].numpy()
    assert f_BYX.std() == pytest.approx(1.0, abs=0.03)
    weight = np.cos(np.deg2rad(store.latitude_deg))[:, None]
    assert np.abs((f_BYX * weight).sum(axis=(1, 2)) / (weight.sum() * 48)).max() < 0.01
    row, degrees = 11, 360 / 48
    km = np.deg2rad(degrees) * EARTH_RADIUS_KM * np.cos(np.deg2rad(store.latitude_deg[row]))
    apart = round(2000.0 / km)
    correlation = (f_BYX[:, row] * np.roll(f_BYX[:, row], apart, axis=-1)).mean()
    assert correlation == pytest.approx(np.exp(-0.5 * (apart * km / 2000.0) ** 2), abs=0.06)


def test_short_lengths_fold_without_losing_variance() -> None:
    """Noise the grid does not resolve keeps its variance: 100 km on 7.5 degrees."""
    noise = SphericalNoise(np.linspace(86.25, -86.25, 24), np.arange(48) * 7.5, 100.0)
    white = np.random.default_rng(0).normal(size=(4, noise.coefficients))
    assert noise.fields(white).std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_has_the_same_noise(store: Store, name: str) -> None:
    """Put together from the ranks' tokens, the states are those of one rank, bit for bit."""
    whole = layouts("one rank")[0]
    expected = images(whole, perturbation(store, kind="noise").states(analysis(store, whole), INIT, [3, 5]))
    found = np.full_like(expected, np.nan)
    for layout in layouts(name):
        x = perturbation(store, layout, kind="noise").states(analysis(store, layout), INIT, [3, 5])
        here = images(layout, x)
        found = np.where(np.isnan(here), found, here)
    np.testing.assert_array_equal(found, expected)


def test_a_member_is_the_same_in_any_company(store: Store) -> None:
    """Noise depends on seed, init time and member, not on the batch."""
    e, layout = perturbation(store, kind="noise"), layouts("one rank")[0]
    x_NTC = analysis(store, layout)
    many, one = e.states(x_NTC, INIT, [0, 1, 2]), e.states(x_NTC, INIT, [2])
    assert torch.equal(many[2], one[0])
    others = [
        e.states(x_NTC, INIT, [1])[0],
        e.states(x_NTC, INIT + np.timedelta64(6, "h"), [2])[0],
        perturbation(store, seed=1, kind="noise").states(x_NTC, INIT, [2])[0],
    ]
    assert not any(torch.equal(other, one[0]) for other in others)
    assert e.states(x_NTC, INIT, range(0)).shape == (0, *x_NTC.shape)


def test_pairs_are_opposite_and_humidity_stays_positive(store: Store) -> None:
    """The mean of a pair is the analysis, but where humidity would have become negative."""
    layout = layouts("one rank")[0]
    x_NTC = analysis(store, layout)
    e = perturbation(store, kind="noise", amplitude=2.0, pairs=True)
    x_BNTC = e.states(x_NTC, INIT, [4, 5])
    dry = torch.tensor([name.startswith("q") for name in store.names])
    torch.testing.assert_close(x_BNTC.mean(0)[..., ~dry], x_NTC[..., ~dry], rtol=1e-6, atol=1e-3)
    assert x_BNTC[..., dry].min() >= min(0.0, float(x_NTC[..., dry].min()))
    assert (x_BNTC[..., dry].min() == 0.0) or (x_NTC[..., dry].min() < 0.0)


def test_levels_go_together_as_far_as_asked(store: Store) -> None:
    """The mixing is the root of the stated correlation; other variables are apart; some get no noise."""
    names = list(store.names)
    low, high = names.index("z850"), names.index("z500")
    mix = mixing(store, PerturbationConfig(vertical=0.5))
    expected = np.exp(-0.5 * (np.log(850 / 500) / 0.5) ** 2)
    assert (mix @ mix.T)[low, high] == pytest.approx(expected, abs=1e-9)
    assert (mix @ mix.T)[low, names.index("t850")] == pytest.approx(0.0, abs=1e-12)
    alone = mixing(store, PerturbationConfig(vertical=0.0))
    np.testing.assert_allclose(alone, np.eye(len(names)), atol=1e-12)
    some = mixing(store, PerturbationConfig(channels=("z500",)))
    assert np.flatnonzero(some.any(axis=1)).tolist() == [high]
    with pytest.raises(ValueError, match="z501"):
        mixing(store, PerturbationConfig(channels=("z501",)))


class Growth:
    """A model in which z500 grows, with noise that depends on member and step."""

    def __init__(self, store: Store, layout: WindowLayout, factor: float = 3.0) -> None:
        self.layout, self.factor, self.number = layout, factor, store.names.index("z500")
        self.calls: list[tuple[str, int, tuple[int, ...]]] = []

    def __call__(
        self, x_BNTC: torch.Tensor, init: np.datetime64, step: int, members: Sequence[int]
    ) -> torch.Tensor:
        self.calls.append((str(init), step, tuple(members)))
        gain = torch.ones(x_BNTC.shape[-1])
        gain[self.number] = self.factor
        shock = torch.tensor([100.0 * step + member for member in members])
        return x_BNTC * gain + shock[:, None, None, None]


def test_breeding_finds_what_grows_at_the_stated_size(store: Store) -> None:
    """After a few cycles the vector is almost all z500, of the size asked for, without the model's noise."""
    layout = layouts("one rank")[0]
    e = perturbation(store, kind="bred", amplitude=0.2, cycles=4, pairs=True)
    model = Growth(store, layout)
    x_NTC = analysis(store, layout)
    x_BNTC = e.states(x_NTC, INIT, [2, 3, 4], model)
    vector = x_BNTC - x_NTC
    assert e.size(vector[:1]).item() == pytest.approx(0.2, rel=1e-2)
    share = (vector[0] / e._std_C).square().sum(dim=(0, 1))
    assert share[model.number] / share.sum() > 0.99
    torch.testing.assert_close(vector[0][..., model.number], -vector[1][..., model.number], rtol=0, atol=0.01)
    # Twice a cycle, from the earliest time on, every pair once.
    assert model.calls == [("2000-06-03T00:00:00", step, (1, 2)) for step in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert e.steps(3) == 16


def test_breeding_needs_the_times_before(store: Store) -> None:
    """The first missing time is named, before anything is computed."""
    e = perturbation(store, kind="bred", cycles=200)
    with pytest.raises(
        ValueError, match=r"begin 200 steps of 6 h earlier.*has no time.*fewer --perturb.cycles"
    ):
        e.check([INIT], 2)
    assert perturbation(store, kind="bred", amplitude=0.0, cycles=200).check([INIT], 2) is None


def write_analyses(path: Path, store: Store, members: int, lead_h: tuple[int, ...] = (0, 6)) -> np.ndarray:
    """Write an ensemble of initial states with channels in another order; return [M, C, Y, X] in ours."""
    truth = store.read(store.index_of(INIT))
    rng = np.random.default_rng(1)
    x_MCYX = truth + rng.normal(size=(members, *truth.shape)).astype(np.float32)
    plan = ForecastPlan(
        inits=(str(INIT),), lead_h=lead_h, members=members, names=store.names[::-1],
        latitude_deg=tuple(store.latitude_deg), longitude_deg=tuple(store.longitude_deg), made={}, about={},
    )  # fmt: skip
    writer = ForecastWriter(path, plan)
    for lead in range(len(lead_h)):
        writer.write(0, range(members), lead, x_MCYX[:, ::-1].copy())
    writer.finish()
    return x_MCYX


def test_members_start_from_their_own_analyses(store: Store, tmp_path: Path) -> None:
    """Member i is analysis i whatever the layout; beyond them only mirrored ones, if asked for."""
    x_MCYX = write_analyses(tmp_path / "eda.zarr", store, 3)
    settings = {"kind": "analyses", "analyses": str(tmp_path / "eda.zarr")}
    for layout in layouts("both"):
        x = perturbation(store, layout, **settings).states(analysis(store, layout), INIT, [2, 0])
        here = images(layout, x)
        np.testing.assert_array_equal(here, np.where(np.isnan(here), np.nan, x_MCYX[[2, 0]]))
    e, layout = perturbation(store, **settings), layouts("one rank")[0]
    e.check([INIT], 3)
    with pytest.raises(ValueError, match=r"3 members: enough for 3 .* not for 4; --perturb.pairs"):
        e.check([INIT], 4)
    with pytest.raises(ValueError, match="no initial states of 2000-06-05"):
        e.check([INIT + np.timedelta64(24, "h")], 3)
    twice = perturbation(store, **settings, pairs=True)
    twice.check([INIT], 6)
    x_BNTC = twice.states(analysis(store, layout), INIT, range(6))
    z500 = store.names.index("z500")
    found = images(layout, x_BNTC)[:, z500].mean(0)
    np.testing.assert_allclose(found, x_MCYX[:, z500].mean(0), rtol=1e-5)


def test_analyses_that_do_not_fit_are_refused(store: Store, tmp_path: Path) -> None:
    """No lead time of 0 h, another grid, a channel too few, nothing there."""
    write_analyses(tmp_path / "late.zarr", store, 1, (6,))
    with pytest.raises(ValueError, match="no lead time of 0 h to start from: its first is 6 h"):
        perturbation(store, kind="analyses", analyses=str(tmp_path / "late.zarr"))
    with pytest.raises(ValueError, match="eda_0 does not exist"):
        perturbation(store, kind="analyses", analyses=str(tmp_path / "eda_{member}"))
    with pytest.raises(ValueError, match="needs --perturb.analyses"):
        perturbation(store, kind="analyses")
    write_analyses(tmp_path / "eda.zarr", store, 1)
    more = Store(packaged_sample())
    more.names = (*store.names, "sst")
    with pytest.raises(ValueError, match="lacks sst of the"):
        perturbation(more, kind="analyses", analyses=str(tmp_path / "eda.zarr"))
    turned = Store(packaged_sample())
    turned.longitude_deg = turned.longitude_deg + 3.0
    with pytest.raises(ValueError, match=r"48 longitudes from 1.875 to .* but .* from 4.875 to"):
        perturbation(turned, kind="analyses", analyses=str(tmp_path / "eda.zarr"))


def test_one_store_per_member(store: Store, tmp_path: Path) -> None:
    """A path with {member} counts the stores there are, and reads windows of each."""
    for member in range(2):
        (tmp_path / f"eda_{member}").symlink_to(packaged_sample())
    e = perturbation(store, kind="analyses", analyses=str(tmp_path / "eda_{member}"))
    e.check([INIT], 2)
    layout = layouts("one rank")[0]
    x_BNTC = e.states(analysis(store, layout), INIT, [1])
    assert torch.equal(x_BNTC[0], analysis(store, layout))


@pytest.mark.parametrize(
    "settings",
    [{"amplitude": -1.0}, {"cycles": 0}, {"vertical": float("nan")}, {"analyses": "x"}],
    ids=lambda settings: next(iter(settings)),
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    """By name."""
    with pytest.raises(ValueError, match=f"--perturb.{next(iter(settings))}"):
        dataclasses.replace(PerturbationConfig(kind="noise"), **settings)


@pytest.mark.parametrize("length_km", [0.0, 10.0, float("nan"), float("inf")])
def test_wrong_lengths_are_refused(length_km: float) -> None:
    """So short that the degrees needed are too many, or none at all."""
    with pytest.raises(ValueError, match="must be 33 km or more"):
        power(length_km)
