"""TrigFlow against its definition, against EDM written out, and against exact distribution functions."""

import math
from statistics import NormalDist

import pytest
import torch

from aeris.config import DiffusionConfig
from aeris.diffusion import trigflow

T_B = torch.tensor([0.02, 0.4, 0.785, 1.2, 1.5688], dtype=torch.float64)
SHAPE = (5, 3, 4, 2)


def fields(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_clean_sample_and_noise_come_back_from_state_and_velocity(sigma_data: float) -> None:
    x, z = fields(2)
    x_t = trigflow.add_noise(x, z, T_B, sigma_data)
    v = trigflow.velocity(x, z, T_B, sigma_data)
    torch.testing.assert_close(trigflow.denoised(x_t, v, T_B), x)
    torch.testing.assert_close(trigflow.noise_of(x_t, v, T_B), sigma_data * z)


def test_velocity_is_the_derivative_in_time() -> None:
    x, z = fields(2)
    after, before = (trigflow.add_noise(x, z, T_B + h, 0.7) for h in (1e-5, -1e-5))
    torch.testing.assert_close(
        trigflow.velocity(x, z, T_B, 0.7), (after - before) / 2e-5, rtol=1e-7, atol=1e-8
    )


def test_ends() -> None:
    x, z = fields(2)
    zero, right = torch.zeros(5, dtype=torch.float64), torch.full((5,), math.pi / 2, dtype=torch.float64)
    assert torch.equal(trigflow.add_noise(x, z, zero), x)
    torch.testing.assert_close(trigflow.add_noise(x, z, right, 2.0), 2.0 * z)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_is_edm_with_other_words(sigma_data: float) -> None:
    """D(y, sigma) = c_skip y + c_out F_edm(c_in y) (EDM, eq. 7) for any network; weight c_out^2 = 1."""
    x, n = fields(2)
    for t in T_B.tolist():
        sigma = trigflow.sigma_of(t, sigma_data)
        assert trigflow.time_of(sigma, sigma_data) == pytest.approx(t)
        y = x + sigma * n
        total = sigma**2 + sigma_data**2
        c_skip, c_in = sigma_data**2 / total, 1 / math.sqrt(total)
        c_out, weight = sigma * sigma_data / math.sqrt(total), total / (sigma * sigma_data) ** 2
        edm_denoised = c_skip * y + c_out * (torch.tanh(3 * c_in * y) - 0.2)

        t_B = torch.full((5,), t, dtype=torch.float64)
        x_t = trigflow.add_noise(x, n, t_B, sigma_data)
        torch.testing.assert_close(x_t, math.cos(t) * y)
        network = -(
            torch.tanh(3 * x_t / sigma_data) - 0.2
        )  # F = -F_edm on the same input, c_in y = x_t / sigma_d
        ours = trigflow.denoised(x_t, sigma_data * network, t_B)
        torch.testing.assert_close(ours, edm_denoised)

        assert weight * c_out**2 == pytest.approx(1.0)
        assert (c_skip, c_out) == pytest.approx((math.cos(t) ** 2, sigma_data * math.sin(t)))
        assert c_in == pytest.approx(math.cos(t) / sigma_data)
        v_error = sigma_data * network - trigflow.velocity(x, n, t_B, sigma_data)
        torch.testing.assert_close(v_error.square(), sigma_data**2 * weight * (edm_denoised - x).square())


def test_log_uniform_times() -> None:
    config = DiffusionConfig(sigma_min=0.2, sigma_max=500.0)
    u_B = torch.tensor([1e-7, 0.25, 0.5, 1 - 1e-7], dtype=torch.float64)
    sigma_B = torch.tan(trigflow.noise_times(u_B, config))
    expected = [0.2, 0.2 * 2500**0.25, 10.0, 500.0]
    torch.testing.assert_close(sigma_B, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_log_normal_times_against_the_standard_library() -> None:
    config = DiffusionConfig(noise_times="log-normal", log_mean=-0.2, log_std=2.2, sigma_data=0.5)
    u = [1e-4, 0.3, 0.5, 0.84, 0.9999]
    expected = [math.atan(math.exp(NormalDist(-0.2, 2.2).inv_cdf(p)) / 0.5) for p in u]
    got_B = trigflow.noise_times(torch.tensor(u, dtype=torch.float64), config)
    torch.testing.assert_close(got_B, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["log-uniform", "log-normal"])
def test_times_have_their_distribution(kind: str) -> None:
    """Kolmogorov-Smirnov: the gap between distribution functions is below 1.63 / sqrt(n), the 1 % point."""
    n = 4000
    u_B = torch.rand(n, generator=torch.Generator().manual_seed(1))
    config = DiffusionConfig(noise_times=kind, sigma_min=0.02, sigma_max=200.0)  # type: ignore[arg-type]
    t_B = trigflow.noise_times(u_B, config)
    assert t_B.dtype == torch.float32
    assert bool(((t_B > 0) & (t_B <= math.pi / 2)).all())
    log_sigma = [math.log(math.tan(t)) for t in sorted(t_B.double().tolist())]
    if kind == "log-uniform":
        known = [(value - math.log(0.02)) / math.log(1e4) for value in log_sigma]
    else:
        known = [NormalDist(-1.2, 1.2).cdf(value) for value in log_sigma]
    gap = max(max(abs(i / n - p), abs((i + 1) / n - p)) for i, p in enumerate(known))
    assert gap < 1.63 / math.sqrt(n)


@pytest.mark.parametrize("kind", ["log-uniform", "log-normal"])
def test_a_time_depends_on_its_own_number_only(kind: str) -> None:
    config = DiffusionConfig(noise_times=kind)  # type: ignore[arg-type]
    u_B = torch.rand(37, generator=torch.Generator().manual_seed(2))
    together = trigflow.noise_times(u_B, config)
    apart = torch.cat([trigflow.noise_times(part, config) for part in u_B.split([1, 5, 31])])
    assert torch.equal(together, apart)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DiffusionConfig(sigma_min=0.0), "0 < sigma_min"),
        (DiffusionConfig(sigma_min=5.0, sigma_max=2.0), "from 5 to 2"),
        (DiffusionConfig(noise_times="log-normal", log_std=0.0), "log_std is 0"),
    ],
)
def test_refuses_what_is_no_distribution(config: DiffusionConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trigflow.noise_times(torch.tensor([0.5]), config)
