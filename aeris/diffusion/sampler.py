"""Sampling: solve dx/dt = v(x, t) = sigma_d F(x / sigma_d, t) from pure noise down to t = 0.

Sources: TrigFlow (arXiv 2410.11081), EDM (2206.00364: Heun, power levels, churn), DPM-Solver++ (2211.01095),
AERIS (2509.13523). `python -m aeris.diffusion.sampler` prints what solvers and noise levels do to the spread
of an ensemble when the network is perfect; its options are the fields of `SamplerConfig`.

Shapes: B samples; x is [B, ...] and keeps the shape and type of the noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import tyro
from rich import box
from rich.table import Table
from torch import Tensor

from aeris.config import DiffusionConfig
from aeris.diffusion import gaussian, solvers
from aeris.diffusion.trigflow import time_of
from aeris.log import console, run_program

Noise = Callable[[int], Tensor]
"""Standard normal field number `draw`: 0 starts the sampler, i churns step i (counted from 1)."""

CHURN_LIMIT = math.sqrt(2.0) - 1.0  # EDM, algorithm 2: a step adds no more noise than there is


@dataclass(frozen=True)
class SamplerConfig:
    """How a trained network is turned into a sample."""

    solver: Literal["dpm2m", "heun", "dpm2s", "euler"] = "dpm2m"
    """dpm2m: DPM-Solver++ 2M, one evaluation a level. heun: second order, as published, two a level. dpm2s:
    DPM-Solver++ 2S, as in GenCast, two a level, loses spread. euler: first order (DDIM), one a level, loses
    more."""
    levels: int = 19
    """Noise levels without the clean end. Network evaluations: as many, or 2 levels - 1 (heun, dpm2s)."""
    spacing: Literal["log-uniform", "power"] = "log-uniform"
    """Levels even in ln sigma, or in sigma^(1/rho)."""
    rho: float = 7.0
    """Exponent of power spacing: 7 in EDM and GenCast, 10 in the published AERIS code."""
    sigma_min: float = 0.0
    """Smallest noise level; a mode of standard deviation s keeps s / sqrt(s^2 + sigma_min^2). 0: that of
    training."""
    sigma_max: float = 0.0
    """Largest noise level, where sampling starts. 0: that of training."""
    last_step: Literal["denoise", "euler"] = "denoise"
    """From sigma_min to clean: the denoised estimate, or an Euler step in t as published (more spread)."""
    initial_scale: float = 1.0
    """Standard deviation of the initial noise relative to theory; 1.0 to 1.1 widens an ensemble."""
    churn: float = 0.0
    """S_churn: each step first raises its noise level by the share min(churn / levels, 0.41); 0 is off. With
    dpm2m it widens by itself (a few percent at 2.5); heun and dpm2s keep the spread."""
    churn_min: float = 0.75
    """S_min: smallest noise level that is churned."""
    churn_max: float = math.inf
    """S_max: largest noise level that is churned."""
    churn_noise: float = 1.0
    """S_noise: standard deviation of that noise relative to theory; 1.05 in GenCast, 3 in the AERIS code."""
    churn_rotation: Literal["level", "published"] = "level"
    """level: land exactly on the raised noise level; published: the AERIS code's angle, which does not."""

    def __post_init__(self) -> None:
        """Check what can be checked without the range of training."""
        if self.levels < 2:
            raise ValueError(f"{self.levels} noise levels are too few: a sampler needs at least 2")
        for name in ("rho", "initial_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: it must be positive")
        for name in ("churn", "churn_noise", "sigma_min", "sigma_max"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: it must be 0 or more")
        if self.churn_min > self.churn_max:
            raise ValueError(f"the band of churn from {self.churn_min:g} to {self.churn_max:g} is empty")


def for_training(config: SamplerConfig, diffusion: DiffusionConfig) -> SamplerConfig:
    """Fill the open ends of the noise levels with those a network was trained on.

    Raises:
        ValueError: an empty range, or levels outside log-uniform training: the network has never seen them.
    """
    least, most = diffusion.sigma_min, diffusion.sigma_max
    low, high = config.sigma_min or least, config.sigma_max or most
    if diffusion.noise_times == "log-uniform" and not (least <= low and high <= most):
        raise ValueError(
            f"the sampler goes from sigma {high:g} to {low:g}, but the network was trained from {least:g} to "
            f"{most:g} only: stay inside, or leave sigma_min and sigma_max at 0 to take that range"
        )
    closed = dataclasses.replace(config, sigma_min=low, sigma_max=high)
    noise_levels(closed)
    return closed


def noise_levels(config: SamplerConfig) -> list[float]:
    """Return the noise levels sigma, falling, without the final 0.

    Raises:
        ValueError: the range is empty, or its ends are still open.
    """
    low, high = config.sigma_min, config.sigma_max
    if not 0 < low < high < math.inf:
        raise ValueError(f"noise levels from {high:g} to {low:g}: 0 < sigma_min < sigma_max is needed")
    if config.spacing == "log-uniform":
        return solvers.log_uniform_levels(low, high, config.levels)
    return solvers.power_levels(low, high, config.levels, config.rho)


def nfe(config: SamplerConfig) -> int:
    """Return the number of network evaluations of one sample."""
    return 2 * config.levels - 1 if config.solver in ("heun", "dpm2s") else config.levels


def sample(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Noise, config: SamplerConfig, sigma_data: float = 1.0
) -> Tensor:
    """Draw one clean sample per element of the batch.

    Args:
        velocity: v(x [B, ...], t [B]) = sigma_d F(x / sigma_d, t); the network with its conditions.
        noise: standard normal fields [B, ...] by number. All randomness comes from here.
        config: solver and levels, its range filled in (`for_training`).
        sigma_data: standard deviation sigma_d of the clean data.

    Returns:
        x at t = 0, [B, ...].
    """
    sigmas = noise_levels(config)
    times = [*(time_of(sigma, sigma_data) for sigma in sigmas), 0.0]
    x = (config.initial_scale * sigma_data) * noise(0)

    def v_at(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device))

    before = None
    for step, (level, b) in enumerate(pairwise(times), start=1):
        a = level
        gamma = churn_share(sigmas[step - 1], config)
        if gamma > 0:
            a = solvers.raised_time(level, gamma)
            z = (config.churn_noise * sigma_data) * noise(step)
            x = solvers.churn(x, level, a, z, config.churn_rotation)
        v = v_at(x, a)
        if b == 0.0:
            return x - a * v if config.last_step == "euler" else solvers.rotate(x, v, a, 0.0)
        if config.solver == "heun":
            x = solvers.heun(v_at, x, v, a, b)
        elif config.solver == "dpm2s":
            x = solvers.dpm2s(v_at, x, v, a, b)
        elif config.solver == "dpm2m":
            clean = solvers.rotate(x, v, a, 0.0)
            x, before = solvers.blend(x, _ahead(clean, level, a, b, before), a, b), (clean, level)
        else:
            x = solvers.rotate(x, v, a, b)
    raise AssertionError("the last level is 0")


def churn_share(sigma: float, config: SamplerConfig) -> float:
    """Return gamma (EDM, algorithm 2), the share by which churn raises the noise level `sigma`."""
    inside = config.churn_min <= sigma <= config.churn_max
    return min(config.churn / config.levels, CHURN_LIMIT) if inside else 0.0


def _ahead(clean: Tensor, level: float, a: float, b: float, before: tuple[Tensor, float] | None) -> Tensor:
    """Extrapolate the denoised estimate with that of the level before; the first step has none: first order.

    The distance between the two is that of their levels: raised by churn, they may lie arbitrarily close.
    """
    if before is None:
        return clean
    clean_before, level_before = before
    ratio = solvers.log_ratio(a, b) / solvers.log_ratio(level_before, level)
    return solvers.extrapolate(clean, clean_before, ratio)


MODES = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Standard deviations of the modes of the self-test, in units of sigma_data."""
SOLVERS: dict[str, SamplerConfig] = {
    "Heun": SamplerConfig(solver="heun", levels=10, last_step="euler"),
    "2S": SamplerConfig(solver="dpm2s", levels=10),
    "2M": SamplerConfig(solver="dpm2m", levels=19),
    "first order": SamplerConfig(solver="euler", levels=19),
}
"""The solvers at 19 network evaluations each."""
GRIDS: dict[str, SamplerConfig] = {
    "0.02-200 log-uniform (Swift)": SamplerConfig(sigma_min=0.02, sigma_max=200.0),
    "0.2-500 rho 10 (AERIS code)": SamplerConfig(sigma_min=0.2, sigma_max=500.0, spacing="power", rho=10.0),
    "0.03-80 rho 7 (GenCast)": SamplerConfig(sigma_min=0.03, sigma_max=80.0, spacing="power"),
}
"""Noise levels in use."""


def share_kept(config: SamplerConfig, modes: Sequence[float] = MODES) -> list[float]:
    """Return std of samples / true std for Gaussian modes under a perfect network (sigma_data 1)."""
    std_S = torch.tensor(modes, dtype=torch.float64)
    draws = config.levels + 1 if config.churn > 0 else 1
    sampled_S = gaussian.sampled_std(std_S, lambda velocity, noise: sample(velocity, noise, config), draws)
    return [float(share) for share in sampled_S / std_S]


def spread_table(chosen: SamplerConfig | None) -> Table:
    """Tabulate what every solver keeps of the spread of small and large modes; last, the options chosen."""
    table = Table(
        title="Share of its standard deviation s that a mode keeps", box=box.SIMPLE, show_edge=False
    )
    table.add_column("noise levels, solver", no_wrap=True)
    for column in ("evals", *(f"s={mode:g}" for mode in MODES)):
        table.add_column(column, justify="right")

    def row(name: str, config: SamplerConfig) -> None:
        table.add_row(f"  {name}", str(nfe(config)), *(f"{share:.3f}" for share in share_kept(config)))

    for title, grid in GRIDS.items():
        table.add_row(title)
        for name, solver in SOLVERS.items():
            row(name, _with_levels_of(grid, solver))
        floor_S = gaussian.std_floor(torch.tensor(MODES, dtype=torch.float64), grid.sigma_min)
        floor = [f"{share:.3f}" for share in floor_S.tolist()]
        table.add_row("  exact but for the last step", "", *floor, end_section=True)
    if chosen is not None:
        table.add_row("as asked")
        row(f"{chosen.solver}, {chosen.sigma_min:g}-{chosen.sigma_max:g}", chosen)
    return table


def _with_levels_of(grid: SamplerConfig, solver: SamplerConfig) -> SamplerConfig:
    """Return `solver` on the range and spacing of `grid`."""
    names = ("sigma_min", "sigma_max", "spacing", "rho")
    return dataclasses.replace(solver, **{name: getattr(grid, name) for name in names})


def ode_error(config: SamplerConfig, modes: Sequence[float]) -> float:
    """Return the RMS over modes of sampled / exact - 1, for the exact ODE from the same starting noise."""
    std_S = torch.tensor(modes, dtype=torch.float64)
    velocity = gaussian.exact_velocity(std_S)
    got_BS = sample(velocity, lambda draw: torch.ones_like(std_S)[None], config)
    return float((got_BS[0] / gaussian.exact_map(std_S, config.sigma_max) - 1).square().mean().sqrt())


def convergence_table() -> Table:
    """Tabulate the error of every solver against the number of network evaluations."""
    modes, counts = (0.5, 1.0, 2.0), (10, 20, 40, 80)
    title = "RMS relative error to the exact ODE (modes 0.5, 1, 2; 0.002-80, log-uniform)"
    table = Table("solver", title=title, box=box.SIMPLE, show_edge=False)
    for count in counts:
        table.add_column(f"{count} evals", justify="right")
    for name, solver in SOLVERS.items():
        errors = []
        for count in counts:
            levels = count // 2 if solver.solver in ("heun", "dpm2s") else count
            config = dataclasses.replace(solver, levels=levels, sigma_min=0.002, sigma_max=80.0)
            errors.append(f"{ode_error(config, modes):.4f}")
        table.add_row(name, *errors)
    return table


def main() -> None:
    """Print what solvers and noise levels do to ensemble spread by themselves, with a perfect network."""
    default = SamplerConfig(sigma_min=0.02, sigma_max=200.0)
    program = "python -m aeris.diffusion.sampler"
    chosen = tyro.cli(SamplerConfig, default=default, prog=program, description=main.__doc__)
    console.print(spread_table(chosen if chosen != default else None))
    console.print()
    console.print(convergence_table())
    console.print()
    console.print(f"Default: dpm2m with {default.levels} levels, {nfe(default)} evaluations a step.")


if __name__ == "__main__":
    run_program(main)
