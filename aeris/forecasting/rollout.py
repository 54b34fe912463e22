"""Run a trained network forward in time: sample a residual, add it to the state, repeat.

    for lead_h, x_BNTC in rollout(forecaster, np.datetime64("2000-05-31T00"), range(8), lead_h=24):
        x_MCYX = forecaster.layout.from_windows(x_BNTC)  # on one process; among several, swipe/images.py

Every rank takes the same steps with its own tokens; only the network makes them depend on those of others.
States stay in physical units and float32 from step to step, as they are written, so a forecast that goes on
from disk is the one that was never stopped. Noise is keyed by (seed, init time, member, step, draw). Members
start from the analysis or near it (perturbation.py); boundary fields may be prescribed (boundary.py).

Shapes: B = M members, N windows, T tokens per window, C channels, F forcings, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from aeris.data.forcing import Forcing
from aeris.data.normalize import Normalizer
from aeris.data.store import Store
from aeris.diffusion.sampler import SamplerConfig, sample
from aeris.forecasting.boundary import Boundary
from aeris.forecasting.perturbation import Perturbation
from swipe import noise
from swipe.collectives import AgreedError, agree
from swipe.groups import Groups, make_groups
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims

Network = Callable[[Tensor, Tensor], Tensor]
"""F(x [B, N, T, C_in], t [B]) -> [B, N, T, C]; x is the noisy residual, the state, the forcings."""


class Forecaster:
    """A network with everything one step needs.

    Args:
        network: F, in evaluation mode.
        layout: how this rank's tokens lie.
        store: where statistics, static fields and masks come from.
        interval_h: hours of a step; the store needs its residual statistics.
        sampler: solver and noise levels, the range filled in (`for_training`).
        sigma_data: standard deviation sigma_d of the residual in training.
        seed: first part of every noise key.
        device: where to compute.
        groups: the ranks that forecast together; this process alone by default.
        perturbation: makes the members' initial states; without, all start from the analysis.
        boundary: sets fields after every step; without, all are the network's.

    Raises:
        ValueError: no statistics for the interval, or no static fields.
    """

    def __init__(
        self,
        network: Network,
        layout: WindowLayout,
        store: Store,
        interval_h: int,
        sampler: SamplerConfig,
        *,
        sigma_data: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        groups: Groups | None = None,
        perturbation: Perturbation | None = None,
        boundary: Boundary | None = None,
    ) -> None:
        self.network, self.layout, self.store, self.interval_h = network, layout, store, interval_h
        self.sampler, self.sigma_data, self.seed = sampler, sigma_data, seed
        self.device = torch.device(device)
        self.groups = groups or make_groups(ParallelDims(), 0, self.device)
        self.perturbation, self.boundary = perturbation, boundary
        self._normalizer = Normalizer(store.statistics, interval_h)
        self._forcing = Forcing(store, interval_h)
        self._tokens_NT = layout.tokens_NT.to(self.device)
        self._fill_C = torch.from_numpy(store.fill_C).to(self.device)
        self._valid_NTC: Tensor | None = None
        if store.masks:
            self._valid_NTC = torch.from_numpy(store.valid_windows(layout.shard)).to(self.device)

    @torch.no_grad()
    def state(self, init: np.datetime64, members: Sequence[int]) -> Tensor:
        """Make the members' states at an init time: float32 [B, N, T, C], physical units.

        Without a perturbation it is the analysis for all. All ranks of a replica call it with the same
        members, which may be none.

        Raises:
            ValueError: the store does not have the time (names the nearest), or no such perturbation.
        """
        x_NTC = torch.from_numpy(self.store.read_windows(self.store.index_of(init), self.layout.shard))
        x_NTC = x_NTC.to(self.device)
        if self.perturbation is None:
            return x_NTC.expand(len(members), -1, -1, -1)
        return self.perturbation.states(x_NTC, init, members, self.step)

    def start_of(self, init: np.datetime64, members: Sequence[int]) -> Tensor | None:
        """Make the states at the init time again if the boundary fields depend on them; else None."""
        needed = self.boundary is not None and self.boundary.needs_start
        return self.state(init, members) if needed else None

    def bounded(
        self, x_BNTC: Tensor, init: np.datetime64, lead_h: int, start_BNTC: Tensor | None = None
    ) -> Tensor:
        """Set the prescribed fields of states that are valid `lead_h` hours after `init`: [B, N, T, C]."""
        if self.boundary is None or not len(x_BNTC):
            return x_BNTC
        return self.boundary.apply(x_BNTC, init, lead_h, start_BNTC)

    @torch.no_grad()
    def step(self, x_BNTC: Tensor, init: np.datetime64, step: int, members: Sequence[int]) -> Tensor:
        """Take step number `step` (from 1): states in physical units before it -> after it, [B, N, T, C].

        Where a mask hides a point nothing is predicted: noise and residual are 0 there, as in training, and
        the state keeps its fill value.
        """
        if not members:  # an ensemble may have fewer members left than there are replicas
            return x_BNTC
        time = init.astype("datetime64[s]") + np.timedelta64((step - 1) * self.interval_h, "h")
        forcing_NTF = torch.from_numpy(self._forcing.windows(time, self.layout.shard)).to(self.device)
        state_BNTC = self._normalizer.standardise(x_BNTC)  # 0 where hidden: the fill value is the mean
        known = torch.cat((state_BNTC, forcing_NTF.expand(len(members), -1, -1, -1)), dim=-1)

        def velocity(x_t: Tensor, t_B: Tensor) -> Tensor:
            inputs = torch.cat((x_t / self.sigma_data, known), dim=-1)
            return self._hide(self.sigma_data * self.network(inputs, t_B))

        def field(draw: int) -> Tensor:
            init_s = int(init.astype("datetime64[s]").astype(np.int64))
            keys = [noise.key(self.seed, init_s, member, step, draw) for member in members]
            return self._hide(noise.normal(keys, self._tokens_NT, x_BNTC.shape[-1]))

        residual_BNTC = sample(velocity, field, self.sampler, self.sigma_data)
        ahead = self._normalizer.apply_residual(x_BNTC, residual_BNTC).float()
        return ahead if self._valid_NTC is None else torch.where(self._valid_NTC, ahead, self._fill_C)

    def _hide(self, x_BNTC: Tensor) -> Tensor:
        """Put 0 where a mask hides a point, unless the network was trained with numbers there."""
        if self._valid_NTC is None or self.store.noise_where_hidden:
            return x_BNTC
        return torch.where(self._valid_NTC, x_BNTC, 0.0)


@torch.no_grad()
def ahead(
    forecaster: Forecaster,
    x_BNTC: Tensor,
    init: np.datetime64,
    lead_h: int,
    members: Sequence[int],
    start_BNTC: Tensor | None = None,
) -> Tensor:
    """Go from the states of the interval before to those at `lead_h`, boundary fields set: [B, N, T, C].

    The ranks of a replica call it together; other replicas may be elsewhere.
    """
    step = lead_h // forecaster.interval_h
    return forecaster.bounded(forecaster.step(x_BNTC, init, step, members), init, lead_h, start_BNTC)


def rollout(
    forecaster: Forecaster,
    init: np.datetime64,
    members: Sequence[int],
    lead_h: int,
    start: tuple[int, Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Forecast autoregressively, yielding every interval up to `lead_h`. All ranks iterate in step.

    Args:
        init: init time; its state is read from the store. Replicas may have different ones.
        members: numbers of the members to compute together, alike on all ranks of a replica; may be none.
        lead_h: last lead time in hours, the same on all ranks.
        start: go on from a lead time in hours and its state [B, N, T, C], not from the init time.

    Yields:
        Lead time in hours and this rank's tokens of the state, float32 [B, N, T, C], physical units, masked
        points at their fill value.

    Raises:
        ValueError: the lead time is no multiple of the interval, or a forecast stopped being finite, on
            whatever rank.
    """
    every_h = forecaster.interval_h
    lead_times(lead_h, every_h)
    begun_h, x_BNTC = start or (0, forecaster.state(init, members))
    x_BNTC = x_BNTC.to(forecaster.device)
    start_BNTC = forecaster.start_of(init, members) if start else x_BNTC
    for now_h in range(begun_h + every_h, lead_h + 1, every_h):
        x_BNTC = ahead(forecaster, x_BNTC, init, now_h, members, start_BNTC)
        error = not_finite(x_BNTC, forecaster, init, members, now_h)
        if error := agree(forecaster.groups.world, error):
            raise AgreedError(error)
        yield now_h, x_BNTC


def lead_times(last_h: int, interval_h: int) -> tuple[int, ...]:
    """Return every lead time in hours up to `last_h`.

    Raises:
        ValueError: it is no multiple of the interval; names those next to it.
    """
    if last_h < interval_h or last_h % interval_h:
        below = max(1, last_h // interval_h) * interval_h
        near = f"{below} or {below + interval_h}"
        raise ValueError(f"a lead of {last_h} h is no multiple of the model's {interval_h} h: take {near}")
    return tuple(range(interval_h, last_h + 1, interval_h))


def not_finite(
    x_BNTC: Tensor, forecaster: Forecaster, init: np.datetime64, members: Sequence[int], lead_h: int
) -> str | None:
    """Say where a forecast is no longer made of numbers; None if it is."""
    if bool(torch.isfinite(x_BNTC.sum())):
        return None
    bad_BCS = ~torch.isfinite(x_BNTC.flatten(1, 2).transpose(1, 2))
    if not bool(bad_BCS.any()):
        return None
    member, channel, _ = torch.nonzero(bad_BCS)[0].tolist()
    layout = forecaster.layout
    tokens = layout.tokens_NT.flatten()[bad_BCS[member, channel].cpu()]
    token = int(tokens.min())
    where = torch.nonzero(layout.tokens_NT.flatten() == token).item()
    value = x_BNTC.flatten(1, 2)[member, int(where), channel].item()
    row, col = divmod(token, layout.shard.grid.cols)
    return (
        f"{forecaster.store.names[channel]} of member {members[member]} is {value} at row {row}, col {col}, "
        f"{lead_h} h after {init}: network or sampler are unstable, try more --sampler.levels, another "
        "--checkpoint, or --weights ema"
    )
