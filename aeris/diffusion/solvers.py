"""One step, from time a to b < a, of solvers of the sampling ODE dx/dt = v(x, t) = sigma_d F(x / sigma_d, t).

In TrigFlow an Euler step of EDM is a rotation, and the DPM-Solver++ updates (Lu et al., arXiv 2211.01095,
with alpha = cos t and sigma = sin t there) mix x with a denoised estimate D:

    rotate  x_b = cos(a - b) x_a - sin(a - b) v                     first order: DDIM, and EDM's Euler step
    blend   x_b = sin(b)/sin(a) x_a + sin(a - b)/sin(a) D           the same when D = cos(a) x_a - sin(a) v

Steps onto b = 0 are left to the sampler. x, v and D have any shape; times are in radians, levels are sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""v(x, t) at one time for the whole batch."""


def log_uniform_levels(sigma_min: float, sigma_max: float, count: int) -> list[float]:
    """Space `count` noise levels evenly in ln sigma, from sigma_max down to sigma_min."""
    ratio = sigma_min / sigma_max
    return [sigma_max * ratio ** (i / (count - 1)) for i in range(count)]


def power_levels(sigma_min: float, sigma_max: float, count: int, rho: float) -> list[float]:
    """Space `count` noise levels evenly in sigma^(1/rho), downwards (EDM, eq. 5, with rho 7)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / (count - 1) * (low - high)) ** rho for i in range(count)]


def rotate(x: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """First order: keep the denoised estimate and the noise estimate of time a, and mix them for time b."""
    return math.cos(a - b) * x - math.sin(a - b) * v


def blend(x: Tensor, clean: Tensor, a: float, b: float) -> Tensor:
    """Move from a to b with a given denoised estimate."""
    return (math.sin(b) * x + math.sin(a - b) * clean) / math.sin(a)


def heun(velocity: Velocity, x: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """Take an Euler step in t, look at the velocity there, step again with the mean of both: second order.

    The published AERIS sampler. One evaluation beside `v` = v(x, a).
    """
    ahead = velocity(x + (b - a) * v, b)
    return x + (0.5 * (b - a)) * (v + ahead)


def dpm2s(velocity: Velocity, x: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """DPM-Solver++ 2S: rotate half way in ln tan t, denoise there, use that for the whole step: second order.

    The sampler of GenCast. One evaluation beside `v` = v(x, a).
    """
    middle = math.atan(math.sqrt(math.tan(a) * math.tan(b)))
    x_middle = rotate(x, v, a, middle)
    return blend(x, rotate(x_middle, velocity(x_middle, middle), middle, 0.0), a, b)


def extrapolate(clean: Tensor, clean_before: Tensor, ratio: float) -> Tensor:
    """Return the denoised estimate of DPM-Solver++ 2M: extrapolated to the middle of a step.

    D = D_a + (D_a - D_before) ratio / 2, with `ratio` the length of this step over that of the one before,
    both measured in lambda = -ln tan t (`log_ratio`).
    """
    return clean + (0.5 * ratio) * (clean - clean_before)


def log_ratio(a: float, b: float) -> float:
    """Return the length of a step from a to b in lambda: ln(tan a / tan b)."""
    return math.log(math.tan(a) / math.tan(b))


def raised_time(t: float, gamma: float) -> float:
    """Return the noise time at which the noise level is (1 + gamma) times that of `t`."""
    return math.atan((1 + gamma) * math.tan(t))


def churn(x: Tensor, t: float, raised: float, z: Tensor, rotation: str = "level") -> Tensor:
    """Add noise `z` (standard deviation sigma_d) so that x moves from noise time `t` up to `raised`.

    "level" rotates by delta with cos(delta) = cos(raised) / cos(t): the signal becomes cos(raised), and the
    noise sin(raised), because sin^2(raised) = sin^2(delta) + cos^2(delta) sin^2(t). "published" is the angle
    of the AERIS code, atan(tan(raised) - tan(t)), which does not land on the level.
    """
    if rotation == "published":
        delta = math.atan(math.tan(raised) - math.tan(t))
    else:
        delta = math.acos(math.cos(raised) / math.cos(t))
    return math.cos(delta) * x + math.sin(delta) * z
