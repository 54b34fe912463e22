"""A world with a perfect network: data whose modes are independent Gaussians, so that all is known exactly.

A mode of standard deviation s has x_t ~ N(0, cos^2(t) s^2 + sin^2(t) sigma_d^2). The best network is linear,
and the sampling ODE only rescales: x_t / std(x_t) is constant. What a solver keeps of a mode's spread is then
a number, and what it loses is its own fault. Real fields have modes of every size, small scales small ones.

Shapes: S modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from aeris.diffusion.trigflow import time_of

Velocity = Callable[[Tensor, Tensor], Tensor]
DrawSample = Callable[[Velocity, Callable[[int], Tensor]], Tensor]


def exact_velocity(std_S: Tensor, sigma_data: float = 1.0) -> Velocity:
    """Return v(x [B, S], t [B]) = E[v_t | x_t = x] for modes of standard deviation `std_S`."""

    def velocity(x_BS: Tensor, t_B: Tensor) -> Tensor:
        cos, sin = torch.cos(t_B)[:, None], torch.sin(t_B)[:, None]
        variance = cos**2 * std_S**2 + sin**2 * sigma_data**2
        return x_BS * cos * sin * (sigma_data**2 - std_S**2) / variance

    return velocity


def exact_map(std_S: Tensor, sigma_max: float, sigma_data: float = 1.0) -> Tensor:
    """Return the factor by which the exact ODE takes x from the noise level sigma_max to t = 0: [S]."""
    t = time_of(sigma_max, sigma_data)
    return std_S / torch.sqrt(math.cos(t) ** 2 * std_S**2 + math.sin(t) ** 2 * sigma_data**2)


def sampled_std(std_S: Tensor, draw_sample: DrawSample, draws: int, sigma_data: float = 1.0) -> Tensor:
    """Return the standard deviation of a sampler's output for each mode, without random numbers: [S].

    A sampler is linear in its noise fields here, so each is switched on alone and the variances add up.

    Args:
        std_S: true standard deviations.
        draw_sample: the sampler, as a function of velocity(x [B, S], t [B]) and noise(number of the field).
        draws: noise fields it may ask for.
        sigma_data: standard deviation sigma_d the noise is scaled with.
    """
    velocity = exact_velocity(std_S, sigma_data)
    variance_S = torch.zeros_like(std_S)
    for one in range(draws):

        def noise(draw: int, one: int = one) -> Tensor:
            return torch.full_like(std_S, float(draw == one))[None]

        variance_S += draw_sample(velocity, noise)[0] ** 2
    return variance_S.sqrt()


def std_floor(std_S: Tensor, sigma_min: float) -> Tensor:
    """Return the share of its spread a mode keeps if all steps were exact but the last, from sigma_min to 0.

    Denoising from sigma_min returns the mean of what is possible: s / sqrt(s^2 + sigma_min^2) is left.
    """
    return std_S / torch.sqrt(std_S**2 + sigma_min**2)
