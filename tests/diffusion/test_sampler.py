"""Solvers against EDM's formulas, exact solutions and published tables, on data with a known best network.

Cheap: scalars and a handful of Gaussian modes, no network.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from aeris.config import DiffusionConfig
from aeris.diffusion import gaussian, sampler, solvers
from aeris.diffusion.sampler import SamplerConfig, nfe, noise_levels, sample, share_kept
from aeris.diffusion.trigflow import time_of

AERIS = SamplerConfig(sigma_min=0.2, sigma_max=500.0, spacing="power", rho=10.0)
SWIFT = SamplerConfig(sigma_min=0.02, sigma_max=200.0)
GENCAST = SamplerConfig(sigma_min=0.03, sigma_max=80.0, spacing="power", rho=7.0)
HEUN = {"solver": "heun", "levels": 10, "last_step": "euler"}
TWO_S = {"solver": "dpm2s", "levels": 10}
TWO_M = {"solver": "dpm2m", "levels": 19}
FIRST = {"solver": "euler", "levels": 19}


# Output std / true std for modes .05 .1 .2 .5 1 with an exact score, measured with another program.
KEPT = [
    (AERIS, HEUN, "0.245 0.437 0.755 0.986 1.00"),
    (AERIS, TWO_S, "0.241 0.440 0.682 0.876 0.923"),
    (AERIS, TWO_M, "0.242 0.442 0.691 0.922 0.993"),
    (AERIS, FIRST, "0.240 0.434 0.655 0.817 0.857"),
    (SWIFT, HEUN, "0.941 1.01 1.03 1.03 1.00"),
    (SWIFT, TWO_S, "0.887 0.931 0.943 0.947 0.947"),
    (SWIFT, TWO_M, "0.923 0.986 1.01 1.01 1.01"),
    (SWIFT, FIRST, "0.831 0.867 0.877 0.879 0.880"),
    (GENCAST, HEUN, "0.955 1.04 1.06 1.03 1.00"),
    (GENCAST, TWO_S, "0.802 0.885 0.918 0.939 0.949"),
    (GENCAST, {"solver": "dpm2s", "levels": 20}, "0.842 0.938 0.970 0.983 0.987"),
    (GENCAST, TWO_M, "0.833 0.958 1.01 1.03 1.03"),
]


@pytest.mark.parametrize(("grid", "solver", "expected"), KEPT)
def test_spread_kept_by_every_solver(grid: SamplerConfig, solver: dict[str, object], expected: str) -> None:
    config = replace(grid, **solver)  # type: ignore[arg-type]
    assert nfe(config) == (39 if config.levels == 20 else 19)
    for share, printed in zip(share_kept(config), expected.split()):
        digits = len(printed.split(".")[1])
        assert f"{share:.{digits}f}" == printed


def edm_reference(config: SamplerConfig, s: float, y: float) -> float:
    """Sample one mode in EDM's plane y = x + sigma n, with the formulas of EDM and GenCast."""

    def denoise(y: float, sigma: float) -> float:
        return y * s**2 / (s**2 + sigma**2)

    before = None
    for a, b in pairwise([*noise_levels(config), 0.0]):
        clean = denoise(y, a)
        if config.solver == "dpm2s" and b > 0:
            middle = math.sqrt(a * b)
            clean = denoise(middle / a * y + (1 - middle / a) * clean, middle)
        elif config.solver == "dpm2m" and b > 0:
            here = clean
            if before is not None:  # DPM-Solver++ 2M in lambda = -ln sigma
                r = math.log(before[1] / a) / math.log(a / b)
                clean = (1 + 1 / (2 * r)) * here - before[0] / (2 * r)
            before = (here, a)
        y = b / a * y + (1 - b / a) * clean
    return y


@pytest.mark.parametrize("solver", ["euler", "dpm2s", "dpm2m"])
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_solvers_in_trigflow_are_those_of_edm(solver: str, sigma_data: float) -> None:
    """An x of TrigFlow is cos(t) y; at t = 0 they are equal."""
    config = replace(GENCAST, solver=solver, levels=7)  # type: ignore[type-var]
    std_S = torch.tensor([0.05, 0.4, 1.3], dtype=torch.float64)
    velocity = gaussian.exact_velocity(std_S, sigma_data)
    got_BS = sample(velocity, lambda draw: torch.ones(1, 3, dtype=torch.float64), config, sigma_data)
    start = sigma_data / math.cos(time_of(80.0, sigma_data))
    expected = [edm_reference(config, s, start) for s in std_S.tolist()]
    torch.testing.assert_close(got_BS[0], torch.tensor(expected, dtype=torch.float64))


def heun_reference(config: SamplerConfig, s: float) -> float:
    """Solve dx/dt = g(t) x by Heun's method as in a textbook, the last step by Euler, from x = 1."""

    def g(t: float) -> float:
        return math.cos(t) * math.sin(t) * (1 - s**2) / (math.cos(t) ** 2 * s**2 + math.sin(t) ** 2)

    x = 1.0
    for a, b in pairwise([*(math.atan(sigma) for sigma in noise_levels(config)), 0.0]):
        h = b - a
        x *= 1 + h * g(a) if b == 0 else 1 + h / 2 * (g(a) + g(b) * (1 + h * g(a)))
    return x


def test_heun_is_the_textbook_method() -> None:
    config = replace(AERIS, solver="heun", levels=10, last_step="euler")
    std_S = torch.tensor([0.05, 0.4, 1.3], dtype=torch.float64)
    got_BS = sample(
        gaussian.exact_velocity(std_S), lambda draw: torch.ones(1, 3, dtype=torch.float64), config
    )
    expected = [heun_reference(config, s) for s in std_S.tolist()]
    torch.testing.assert_close(got_BS[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("dpm2s", 2), ("dpm2m", 2)], ids=lambda value: str(value)
)
def test_order_of_convergence(solver: str, order: int) -> None:
    """Halving the steps divides the error to the exact solution by 2^order, nearly so at this size."""
    config = SamplerConfig(solver=solver, sigma_min=0.002, sigma_max=80.0)  # type: ignore[arg-type]
    errors = [sampler.ode_error(replace(config, levels=levels), (0.5, 1.0, 2.0)) for levels in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05 * order)


def test_exact_map_solves_the_ode() -> None:
    std_S = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    config = SamplerConfig(solver="heun", levels=4000, sigma_min=1e-4, sigma_max=80.0)
    got_BS = sample(
        gaussian.exact_velocity(std_S), lambda draw: torch.ones(1, 3, dtype=torch.float64), config
    )
    torch.testing.assert_close(got_BS[0], gaussian.exact_map(std_S, 80.0), rtol=2e-5, atol=0)


def test_floor_of_the_last_step() -> None:
    """With many steps only the last one loses spread: s / sqrt(s^2 + sigma_min^2)."""
    config = SamplerConfig(solver="dpm2m", levels=400, sigma_min=0.2, sigma_max=500.0)
    std_S = torch.tensor(sampler.MODES, dtype=torch.float64)
    kept = torch.tensor(share_kept(config), dtype=torch.float64)
    torch.testing.assert_close(kept, gaussian.std_floor(std_S, 0.2), rtol=1e-3, atol=0)
    assert gaussian.std_floor(torch.tensor(0.1), 0.2).item() == pytest.approx(0.447, abs=5e-4)


def test_noise_times_of_the_published_sampler() -> None:
    expected = "1.5688 1.5671 1.5636 1.5561 1.5392 1.4986 1.3942 1.1222 0.6041 0.1974"
    times = [time_of(sigma) for sigma in noise_levels(replace(AERIS, levels=10))]
    assert [f"{t:.4f}" for t in times] == expected.split()


def test_log_uniform_levels() -> None:
    levels = noise_levels(SamplerConfig(levels=5, sigma_min=0.01, sigma_max=100.0))
    assert levels == pytest.approx([100.0, 10.0, 1.0, 0.1, 0.01])


# (sigma, gamma) -> noise level reached by the published angle with S_noise 1 and 3.
PUBLISHED = [(2.08, 0.1, "2.135", "2.530"), (10.0, 0.1, "14.2", "31.8")]


def noise_level_after(sigma: float, gamma: float, scale: float, rotation: str) -> float:
    """Churn unit signal and unit noise apart; the level is their ratio, noise adding up in squares."""
    t = time_of(sigma)
    raised = solvers.raised_time(t, gamma)
    signal, old, new = (
        solvers.churn(torch.tensor(x), t, raised, torch.tensor(z), rotation).item()
        for x, z in [(math.cos(t), 0.0), (math.sin(t), 0.0), (0.0, scale)]
    )
    return math.hypot(old, new) / signal


@pytest.mark.parametrize(("sigma", "gamma", "with_1", "with_3"), PUBLISHED)
def test_churn_lands_on_its_level_and_the_published_angle_does_not(
    sigma: float, gamma: float, with_1: str, with_3: str
) -> None:
    assert noise_level_after(sigma, gamma, 1.0, "level") == pytest.approx(sigma * (1 + gamma), rel=1e-5)
    for scale, printed in [(1.0, with_1), (3.0, with_3)]:
        digits = len(printed.split(".")[1])
        assert f"{noise_level_after(sigma, gamma, scale, 'published'):.{digits}f}" == printed


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9, 1.4])
@pytest.mark.parametrize("gamma", [0.01, 0.12, 0.414])
def test_churn_keeps_signal_and_noise_of_its_level(t: float, gamma: float) -> None:
    """sin^2 raised = sin^2 delta + cos^2 delta sin^2 t, and the signal is cos raised."""
    raised = solvers.raised_time(t, gamma)
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    cos_delta = solvers.churn(one, t, raised, zero).item()
    sin_delta = solvers.churn(zero, t, raised, one).item()
    assert sin_delta**2 + cos_delta**2 * math.sin(t) ** 2 == pytest.approx(math.sin(raised) ** 2)
    assert cos_delta * math.cos(t) == pytest.approx(math.cos(raised))
    assert math.tan(raised) == pytest.approx((1 + gamma) * math.tan(t))


@pytest.mark.parametrize("solver", ["heun", "dpm2s"])
def test_churn_of_many_small_steps_keeps_the_distribution(solver: str) -> None:
    """Level-consistent churn with S_noise 1 changes the path, not the spread, up to the solver's error."""
    config = SamplerConfig(solver=solver, levels=60, sigma_min=0.005, sigma_max=80.0)  # type: ignore[arg-type]
    calm, churned = (share_kept(replace(config, churn=churn), (0.2, 1.0)) for churn in (0.0, 10.0))
    assert calm == pytest.approx([1.0, 1.0], abs=0.003)
    assert churned == pytest.approx([1.0, 1.0], abs=0.006)


def test_2m_under_churn_is_of_first_order() -> None:
    """Its memory of the level before lacks the new noise: twice the levels, half the excess of spread."""
    config = SamplerConfig(sigma_min=0.005, sigma_max=80.0, churn=10.0)
    coarse, fine = (share_kept(replace(config, levels=levels), (1.0,))[0] - 1 for levels in (60, 120))
    assert 0 < fine < coarse < 0.1
    assert coarse / fine == pytest.approx(2.0, abs=0.3)


def test_2m_under_churn_survives_levels_that_meet() -> None:
    """At the upper end of the band a level is raised exactly to the one before: no distance between them."""
    config = SamplerConfig(levels=41, sigma_min=0.02, sigma_max=0.02 * 1.25**40, churn=0.25 * 41)
    for share in share_kept(replace(config, churn_min=0.0, churn_max=1.0)):
        assert 0.9 < share < 1.2


def test_churn_draws_by_step_and_only_inside_its_band() -> None:
    drawn = []

    def noise(draw: int) -> torch.Tensor:
        drawn.append(draw)
        return torch.ones(1, 1)

    config = SamplerConfig(
        levels=5, sigma_min=0.01, sigma_max=100.0, churn=1.0, churn_min=0.05, churn_max=20.0
    )
    sample(lambda x, t: torch.zeros_like(x), noise, config)
    assert drawn == [0, 2, 3, 4]  # levels 100, 10, 1, 0.1, 0.01
    drawn.clear()
    sample(lambda x, t: torch.zeros_like(x), noise, replace(config, churn=0.0))
    assert drawn == [0]


def test_churn_noise_has_the_size_asked_for() -> None:
    """Seen by the network in the first step if the initial noise is 0: sin(delta) sigma_d S_noise."""
    config = SamplerConfig(levels=10, sigma_min=0.1, sigma_max=2.0, churn=1.0, churn_noise=1.05)
    seen: list[float] = []

    def velocity(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        seen.append(x.item())
        return torch.zeros_like(x)

    sample(velocity, lambda draw: torch.full((1, 1), float(draw > 0), dtype=torch.float64), config, 0.5)
    cos_delta = math.cos(math.atan(1.1 * 4.0)) / math.cos(math.atan(4.0))
    assert seen[0] == pytest.approx(0.5 * 1.05 * math.sqrt(1 - cos_delta**2))


def test_churn_is_limited_to_doubling_the_variance() -> None:
    config = SamplerConfig(levels=2, churn=10.0)
    assert sampler.churn_share(1.0, config) == pytest.approx(math.sqrt(2) - 1)


def counted(velocity: Callable[..., torch.Tensor]) -> tuple[Callable[..., torch.Tensor], list[float]]:
    calls: list[float] = []

    def count(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        assert t_B.shape == x.shape[:1]
        calls.append(t_B[0].item())
        return velocity(x, t_B)

    return count, calls


@pytest.mark.parametrize("solver", ["heun", "dpm2s", "dpm2m", "euler"])
def test_evaluations_are_as_announced_and_never_at_zero(solver: str) -> None:
    config = SamplerConfig(solver=solver, levels=6, sigma_min=0.02, sigma_max=80.0)  # type: ignore[arg-type]
    velocity, calls = counted(lambda x, t: torch.zeros_like(x))
    sample(velocity, lambda draw: torch.ones(2, 3), config)
    assert len(calls) == nfe(config)
    assert min(calls) > 0


@pytest.mark.parametrize("solver", ["heun", "dpm2s", "dpm2m", "euler"])
def test_a_sample_does_not_depend_on_its_batch(solver: str) -> None:
    """A network that treats samples apart gives the same bits for one sample alone and among others."""
    config = SamplerConfig(solver=solver, levels=5, sigma_min=0.1, sigma_max=10.0, churn=1.0)  # type: ignore[arg-type]
    weight = torch.randn(6, generator=torch.Generator().manual_seed(5))
    fields = torch.randn(6, 4, 8, 6, generator=torch.Generator().manual_seed(6))

    def velocity(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        return torch.sin(x * weight) * torch.cos(t_B).reshape(-1, 1, 1)

    together = sample(velocity, lambda draw: fields[draw], config)
    for one in range(4):
        alone = sample(velocity, lambda draw, one=one: fields[draw][one : one + 1], config)
        assert torch.equal(together[one : one + 1], alone)


def test_initial_scale_and_last_step() -> None:
    config = SamplerConfig(
        solver="euler", levels=2, sigma_min=1.0, sigma_max=math.tan(1.5), initial_scale=1.1
    )
    seen = []

    def velocity(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        seen.append(x.item())
        return torch.full_like(x, 0.3)

    noise = torch.full((1, 1), 2.0, dtype=torch.float64)
    clean = sample(velocity, lambda draw: noise, config, sigma_data=1.0).item()
    assert seen[0] == pytest.approx(2.2)
    at_one = seen[1]
    assert clean == pytest.approx(math.cos(math.pi / 4) * at_one - math.sin(math.pi / 4) * 0.3)
    euler = sample(velocity, lambda draw: noise, replace(config, last_step="euler"), sigma_data=1.0).item()
    assert euler == pytest.approx(at_one - math.pi / 4 * 0.3)


def test_range_comes_from_training_and_stays_inside() -> None:
    training = DiffusionConfig(sigma_min=0.2, sigma_max=500.0)
    filled = sampler.for_training(SamplerConfig(), training)
    assert (filled.sigma_min, filled.sigma_max) == (0.2, 500.0)
    assert sampler.for_training(SamplerConfig(sigma_min=0.5, sigma_max=80.0), training).sigma_max == 80.0
    with pytest.raises(ValueError, match=r"trained from 0\.2 to 500 only"):
        sampler.for_training(SamplerConfig(sigma_min=0.02), training)
    free = DiffusionConfig(noise_times="log-normal")
    assert sampler.for_training(SamplerConfig(sigma_min=0.002), free).sigma_min == 0.002


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": 1}, "at least 2"),
        ({"rho": 0.0}, "rho is 0"),
        ({"churn": -1.0}, "churn is -1"),
        ({"churn_min": 2.0, "churn_max": 1.0}, "from 2 to 1 is empty"),
        ({"initial_scale": 0.0}, "initial_scale is 0"),
    ],
)
def test_refuses_impossible_settings(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplerConfig(**settings)  # type: ignore[arg-type]


def test_refuses_an_open_range() -> None:
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        noise_levels(SamplerConfig())


def test_self_test_prints_its_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["sampler", "--levels", "10"])
    sampler.main()
    printed = capsys.readouterr().out
    for words in ("0.2-500 rho 10 (AERIS code)", "0.986", "as asked", "dpm2m, 0.02-200", "0.957", "80 evals"):
        assert words in printed
    assert "…" not in printed
