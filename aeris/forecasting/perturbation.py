"""Perturbed initial conditions: what the members of an ensemble start from.

    none      every member starts from the analysis; only the model's noise tells them apart
    noise     analysis + Gaussian noise, correlated on the sphere (aeris/data/spherical.py)
    analyses  member i starts from member i of an ensemble of analyses, or of initial states
    bred      analysis + a bred vector: what grows when the model itself steps on from two near states
              (Toth and Kalnay 1993, Bull. Amer. Meteor. Soc. 74, 2317)

A member's perturbation depends on (seed, init time, member), not on ranks, batch or ensemble size.

Shapes: B members, N windows, T tokens per window, C channels, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeris.data.normalize import Normalizer
from aeris.data.spherical import SphericalNoise
from aeris.data.store import Store, StoreError
from aeris.data.variables import SURFACE, latitude_weights
from aeris.forecasting.analyses import Analyses, open_analyses
from swipe import noise
from swipe.groups import Groups, make_groups
from swipe.images import total
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims

Step = Callable[[Tensor, np.datetime64, int, Sequence[int]], Tensor]
"""`Forecaster.step`: (states [B, N, T, C], init time, number of the step from 1, members) -> states after."""


@dataclass(frozen=True)
class PerturbationConfig:
    """How the members' initial states differ."""

    kind: Literal["none", "noise", "analyses", "bred"] = "none"
    """none: not at all. noise: Gaussian noise correlated on the sphere. analyses: member i starts from member
    i of --perturb.analyses. bred: what grows in the model itself; costs 2 x cycles steps a member."""
    amplitude: float = 0.1
    """Size (noise, bred): share of the standard deviation of a change over the model's interval."""
    length_km: float = 500.0
    """Correlation length L of the noise: the correlation at distance r is about exp(-r^2 / 2 L^2)."""
    vertical: float = 0.5
    """Likewise between levels of a variable, in ln(pressure); 0: every level by itself."""
    channels: tuple[str, ...] = ()
    """Channels the noise changes, by short name; empty: all. Bred vectors grow into the others."""
    pairs: bool = False
    """Members 2k and 2k + 1 get opposite perturbations; of analyses, mirrored about their mean."""
    analyses: str = ""
    """A forecast with a lead time of 0 h, or stores with {member} (from 0) in their path."""
    cycles: int = 8
    """Steps of the model that breed, before the init time; the store needs the times."""

    def __post_init__(self) -> None:
        """Check what can be checked without data."""
        for name in ("amplitude", "vertical"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"--perturb.{name} is {getattr(self, name):g}: it must be 0 or more")
        if self.cycles < 1:
            raise ValueError(f"--perturb.cycles is {self.cycles}: breeding takes 1 or more")
        if self.analyses and self.kind != "analyses":
            raise ValueError(
                f"--perturb.analyses {self.analyses} is of no use with --perturb.kind {self.kind}: take "
                "--perturb.kind analyses"
            )


STEP_BEFORE_THE_FIRST = -1
"""Stands in noise keys where a forecast has the number of its step."""
UNITS, LARGEST = 2**20, 2.0**16
"""Squares are summed in integers of 1 / UNITS; those above LARGEST are a model's that has blown up."""
LEAST = dict.fromkeys(("q", "r", "clwc", "ciwc", "tcwv", "tcc", "tp6h", "tp24h", "sic"), 0.0)
MOST = dict.fromkeys(("tcc", "sic"), 1.0)
"""Bounds of channels by short name, without a level."""


class Perturbation:
    """Initial states of members.

    Args:
        config: which kind, how large.
        store: where analyses and statistics come from.
        layout: how this rank's tokens lie.
        interval_h: hours of a step of the model.
        seed: first part of every noise key.
        device: where states are wanted.
        groups: the ranks that forecast together; this process alone by default.

    Raises:
        ValueError: a channel the store does not have, or analyses that do not fit the store.
    """

    def __init__(
        self,
        config: PerturbationConfig,
        store: Store,
        layout: WindowLayout,
        *,
        interval_h: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        groups: Groups | None = None,
    ) -> None:
        self.config, self.store, self.layout = config, store, layout
        self.interval_h, self.seed, self.device = interval_h, seed, torch.device(device)
        self.groups = groups or make_groups(ParallelDims(), 0, self.device)
        self._hidden_NTC = torch.from_numpy(~store.valid_windows(layout.shard)).to(self.device)
        Normalizer(store.statistics, interval_h)  # says so if there are none for the interval
        self._std_C = self._to_device(store.statistics.residual_std[interval_h])
        self._least_C, self._most_C = (
            self._to_device(np.array([table.get(_short(name), otherwise) for name in store.names]))
            for table, otherwise in ((LEAST, -np.inf), (MOST, np.inf))
        )
        self._analyses: Analyses | None = None
        self._mean: tuple[np.datetime64, Tensor] | None = None
        if config.kind == "analyses":
            self._analyses = open_analyses(config.analyses, store, layout.shard)
        if config.kind in ("noise", "bred"):
            self._noise = SphericalNoise(store.latitude_deg, store.longitude_deg, config.length_km)
            self._mix_CC = mixing(store, config)
        if config.kind == "bred":
            self._weight_NT1, self._weight_sum = self._weights()

    def _to_device(self, values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.device)

    def _weights(self) -> tuple[Tensor, float]:
        """Return the area weight of this rank's tokens, and the sum of weights over all valid points."""
        weight_Y = latitude_weights(self.store.latitude_deg, "cell")
        row_NT = self.layout.tokens_NT // self.store.cols
        weight_sum = float((self.store.mask_CYX * weight_Y[:, None]).sum())
        return self._to_device(weight_Y)[row_NT.to(self.device)].unsqueeze(-1), weight_sum

    def check(self, inits: Sequence[np.datetime64], members: int) -> None:
        """Check, before anything is computed, that every init time and member can be made.

        Raises:
            ValueError: names the first time or member that cannot.
        """
        config = self.config
        if self._analyses is not None:
            there = self._analyses.members * (2 if config.pairs else 1)
            if members > there:
                mirrored = (
                    "" if config.pairs else "; --perturb.pairs gives twice as many, mirrored about their mean"
                )
                raise ValueError(
                    f"{config.analyses} has {self._analyses.members} members: enough for {there} members of "
                    f"a forecast, not for {members}{mirrored}"
                )
            self._analyses.check(inits)
        if self._breeds:
            for init in inits:
                for cycle in range(config.cycles):
                    self._check_history(init, self._time(init, cycle))

    def _check_history(self, init: np.datetime64, time: np.datetime64) -> None:
        try:
            self.store.index_of(time)
        except StoreError as error:
            raise ValueError(
                f"bred vectors of {init} begin {self.config.cycles} steps of {self.interval_h} h earlier, "
                f"but {error}: take fewer --perturb.cycles, or later init times"
            ) from None

    @property
    def _breeds(self) -> bool:
        return self.config.kind == "bred" and self.config.amplitude > 0

    def _time(self, init: np.datetime64, cycle: int) -> np.datetime64:
        """Return the time at which breeding cycle number `cycle` (from 0) starts."""
        return init.astype("datetime64[s]") - np.timedelta64(
            (self.config.cycles - cycle) * self.interval_h, "h"
        )

    def steps(self, members: int) -> int:
        """Return how many steps of the model it takes to make the initial states of so many members."""
        if not self._breeds:
            return 0
        return 2 * self.config.cycles * (-(-members // 2) if self.config.pairs else members)

    def states(
        self, x_NTC: Tensor, init: np.datetime64, members: Sequence[int], step: Step | None = None
    ) -> Tensor:
        """Return the initial states of members: float32 [B, N, T, C], physical units.

        All ranks of a replica call it with the same members; only "bred" communicates, among them.

        Args:
            x_NTC: the analysis, this rank's tokens; not read by "analyses".
            step: the model's step, for "bred".

        Raises:
            ValueError: a time or member is missing (see `check`).
        """
        x_NTC = x_NTC.to(self.device)
        if not members or self.config.kind == "none":
            return x_NTC.expand(len(members), -1, -1, -1)
        sources, signs = split(members, self.config.pairs)
        if self._analyses is not None:
            return self._from_analyses(init, sources, signs)
        if self.config.amplitude == 0:
            return x_NTC.expand(len(members), -1, -1, -1)
        each = sorted(set(sources))
        if self._breeds:
            assert step is not None, "bred vectors need the model"
            e_ENTC = self._bred(init, each, step)
        else:
            e_ENTC = self._noisy(init, each)
        sign_B = torch.tensor(signs, dtype=torch.float32, device=self.device)
        e_BNTC = e_ENTC[[each.index(source) for source in sources]] * sign_B[:, None, None, None]
        return self._add(x_NTC, e_BNTC)

    def _add(self, x_NTC: Tensor, e_BNTC: Tensor) -> Tensor:
        """Add perturbations; a channel that cannot be negative is not made so."""
        least_NTC, most_NTC = torch.minimum(x_NTC, self._least_C), torch.maximum(x_NTC, self._most_C)
        return torch.where(self._hidden_NTC, x_NTC, (x_NTC + e_BNTC).clamp(least_NTC, most_NTC))

    def _noisy(self, init: np.datetime64, sources: Sequence[int]) -> Tensor:
        """Draw noise: [E, N, T, C], physical units, a share of the residual's standard deviation."""
        init_s = int(init.astype("datetime64[s]").astype(np.int64))
        number_1K = torch.arange(self._noise.coefficients).unsqueeze(0)
        tokens_NT = self.layout.tokens_NT.numpy()
        parts = []
        for source in sources:  # one by one: what a member gets must not depend on the batch
            key = noise.key(self.seed, init_s, source, STEP_BEFORE_THE_FIRST)
            white_KC = noise.normal([key], number_1K, len(self.store.names))[0, 0].numpy().astype(np.float64)
            f_CYX = self._noise.fields(self._mix_CC @ white_KC.T)
            parts.append(torch.from_numpy(f_CYX.reshape(len(f_CYX), -1).T[tokens_NT]))
        return torch.stack(parts).to(self.device) * (self.config.amplitude * self._std_C)

    def _bred(self, init: np.datetime64, sources: Sequence[int], step: Step) -> Tensor:
        """Breed: [E, N, T, C], physical units, of the size `amplitude`.

        Each step starts from the analysis and from analysis + vector, with the same noise of the sampler:
        what differs afterwards is what the model made of the vector, scaled back to its size. Numbers that
        are not finite stay in it; the forecast names them after its first step.
        """
        first = self._time(init, 0)
        e_ENTC = self._noisy(first, sources)
        for cycle in range(self.config.cycles):
            index = self.store.index_of(self._time(init, cycle))
            x_NTC = torch.from_numpy(self.store.read_windows(index, self.layout.shard)).to(self.device)
            control_ENTC = step(x_NTC.expand(len(sources), -1, -1, -1), first, cycle + 1, sources)
            e_ENTC = step(self._add(x_NTC, e_ENTC), first, cycle + 1, sources) - control_ENTC
            e_ENTC = e_ENTC * (self.config.amplitude / self.size(e_ENTC))[:, None, None, None]
        return e_ENTC

    def size(self, e_ENTC: Tensor) -> Tensor:
        """Return the root mean square of perturbations in residual standard deviations: float32 [E].

        The mean is over the globe, weighted by area, and over channels; crosses wp and sp with 8 bytes per E.
        """
        square_ENTC = (e_ENTC / (self.config.amplitude * self._std_C)).square() * self._weight_NT1
        square_ENTC = square_ENTC.where(~self._hidden_NTC, 0.0).nan_to_num(0.0).clamp(max=LARGEST)
        # Integers have the same sum in any order: a last bit would grow in the steps that follow.
        units_E = (square_ENTC * UNITS).round().long().sum(dim=(1, 2, 3)).cpu()
        mean_E = total(units_E, self.groups).double() / (UNITS * self._weight_sum)
        return (self.config.amplitude * mean_E.sqrt()).float().to(self.device)

    def _from_analyses(self, init: np.datetime64, sources: Sequence[int], signs: Sequence[int]) -> Tensor:
        """Read the members' own analyses: [B, N, T, C]; those with sign -1 mirrored about the mean."""
        assert self._analyses is not None
        parts = []
        for source, sign in zip(sources, signs):
            if source >= self._analyses.members:
                raise ValueError(f"{self.config.analyses} has {self._analyses.members} members, no {source}")
            x_NTC = torch.from_numpy(self._analyses.read(init, source)).to(self.device)
            mean_NTC = x_NTC if sign > 0 else self._mean_analysis(init)
            parts.append(x_NTC if sign > 0 else self._add(mean_NTC, mean_NTC - x_NTC))
        return torch.stack(parts)

    def _mean_analysis(self, init: np.datetime64) -> Tensor:
        """Return the mean of all analyses of a time, of which the last is kept: [N, T, C]."""
        if self._mean is None or self._mean[0] != init:
            assert self._analyses is not None
            count = self._analyses.members
            mean_NTC = sum(self._analyses.read(init, member) / np.float64(count) for member in range(count))
            self._mean = init, torch.from_numpy(np.asarray(mean_NTC, dtype=np.float32)).to(self.device)
        return self._mean[1]


def split(members: Sequence[int], pairs: bool) -> tuple[list[int], list[int]]:
    """Return the number and the sign of every member's perturbation."""
    if not pairs:
        return list(members), [1] * len(members)
    return [member // 2 for member in members], [1 - 2 * (member % 2) for member in members]


def mixing(store: Store, config: PerturbationConfig) -> NDArray[np.float64]:
    """Return what makes the noise of the levels of a variable go together: float64 [C, C].

    It is the symmetric root of their correlation, exp(-(ln p / p')^2 / 2 V^2) with V = `vertical`; rows of
    channels without noise are 0.

    Raises:
        ValueError: the store has no channel of a name.
    """
    unknown = [name for name in config.channels if name not in store.names]
    if unknown:
        raise ValueError(f"--perturb.channels {' '.join(unknown)}: {store.path} has {' '.join(store.names)}")
    levelled = [one.level_hpa is not None for one in store.channels]
    ln_C = np.array([np.log(one.level_hpa or 1.0) for one in store.channels])
    same_CC = np.array([[a.variable == b.variable for b in store.channels] for a in store.channels])
    apart_CC = np.abs(ln_C[:, None] - ln_C) / max(config.vertical, 1e-9)
    correlation_CC = np.where(same_CC & np.outer(levelled, levelled), np.exp(-0.5 * apart_CC**2), 0.0)
    np.fill_diagonal(correlation_CC, 1.0)
    values, vectors = np.linalg.eigh(correlation_CC)
    root_CC = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    wanted_C = np.array([not config.channels or name in config.channels for name in store.names])
    return np.asarray(root_CC * wanted_C[:, None])


def _short(name: str) -> str:
    """Return the name of a channel without its level."""
    return name if name in SURFACE else name.removesuffix("hpa").rstrip("0123456789.")
