"""The TrigFlow objective (Lu and Song, arXiv 2410.11081; AERIS, arXiv 2509.13523): noise as a rotation.

    x_t = cos(t) x + sin(t) z        z ~ N(0, sigma_d^2), t in [0, pi/2]: t = 0 is clean, t = pi/2 pure noise
    v_t = cos(t) z - sin(t) x        what the network predicts: sigma_d F(x_t / sigma_d, t)

In the words of EDM (Karras et al., arXiv 2206.00364), y = x_t / cos t = x + sigma n, sigma = sigma_d tan t:

    c_skip = cos^2 t    c_out = sigma_d sin t    c_in = cos(t) / sigma_d    F_edm = -F

EDM's loss weight times c_out^2 is 1: at equal t the squared error of v is sigma_d^2 times the EDM loss.

Shapes: B samples; x, z, v are [B, ...].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aeris.config import DiffusionConfig


def time_of(sigma: float, sigma_data: float = 1.0) -> float:
    """Return the noise time t in radians of a noise level: t = atan(sigma / sigma_d)."""
    return math.atan(sigma / sigma_data)


def sigma_of(t: float, sigma_data: float = 1.0) -> float:
    """Return the noise level of a noise time in radians: sigma = sigma_d tan t."""
    return sigma_data * math.tan(t)


def noise_times(u_B: Tensor, config: DiffusionConfig) -> Tensor:
    """Turn uniform numbers into noise times by the inverse distribution function: [B] -> [B], radians.

    Element by element, so a sample's time depends on its own number only, whatever the batch. `log-uniform`
    is ln sigma uniform between the ends; `log-normal` is ln sigma ~ N(log_mean, log_std^2), without ends.

    Args:
        u_B: one number in (0, 1) per sample, keyed by the sample (`swipe.noise.uniform`).
        config: which distribution and its numbers.

    Raises:
        ValueError: the range is empty or not positive, or the spread is not positive.
    """
    if config.noise_times == "log-uniform":
        low, high = config.sigma_min, config.sigma_max
        if not 0 < low < high:
            raise ValueError(f"noise levels from {low:g} to {high:g}: 0 < sigma_min < sigma_max is needed")
        log_sigma_B = math.log(low) + u_B * math.log(high / low)
    else:
        if config.log_std <= 0:
            raise ValueError(f"log_std is {config.log_std:g}: a standard deviation must be positive")
        log_sigma_B = config.log_mean + config.log_std * torch.special.ndtri(u_B)
    return torch.atan(torch.exp(log_sigma_B) / config.sigma_data)


def add_noise(x: Tensor, z: Tensor, t_B: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Return x_t = cos(t) x + sin(t) sigma_d z for clean `x` and standard normal `z`, both [B, ...]."""
    cos, sin = _cos_sin(t_B, x)
    return cos * x + sin * (sigma_data * z)


def velocity(x: Tensor, z: Tensor, t_B: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Return v_t = dx_t/dt = cos(t) sigma_d z - sin(t) x, the target, for standard normal `z`."""
    cos, sin = _cos_sin(t_B, x)
    return cos * (sigma_data * z) - sin * x


def denoised(x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
    """Return the clean sample that a velocity `v` = sigma_d F implies: cos(t) x_t - sin(t) v."""
    cos, sin = _cos_sin(t_B, x_t)
    return cos * x_t - sin * v


def noise_of(x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
    """Return the noise (of size sigma_d) that a velocity `v` = sigma_d F implies: sin(t) x_t + cos(t) v."""
    cos, sin = _cos_sin(t_B, x_t)
    return sin * x_t + cos * v


def _cos_sin(t_B: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos t and sin t, shaped to multiply `x` [B, ...]."""
    t = t_B.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return torch.cos(t), torch.sin(t)
