"""Search for the settings of an ensemble whose spread fits its error: what is tried, and which is chosen.

A trial is a set of changes to the settings asked for, the baseline. Tried are all single changes, one factor
at a time; then the best ones are combined, one after the other, as long as that helps. So the cost grows with
the number of values, not with their product.

The rule: of the trials whose CRPS is not worse than the baseline's, the one whose spread/skill ratio is
nearest the target, in the mean of |SSR - target| over lead times and channels. CRPS is not worse if its
change, relative to the baseline and averaged over lead times and channels, has a mean over init times of at
most one standard error, and at most 0.5 %, above 0. Pairs are of the same init time, so the weather cancels.

Legend: I init times, J lead times, C channels, S sums of a score (aeris/scores/metrics.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.config import DiffusionConfig
from aeris.diffusion.sampler import SamplerConfig, for_training
from aeris.forecasting.perturbation import PerturbationConfig
from aeris.scores.metrics import scores_of

Array = NDArray[np.float64]
Changes = Mapping[str, float]

SAMPLER = ("churn", "churn_noise", "churn_min", "initial_scale", "sigma_min", "sigma_max", "levels")
PERTURB = "perturb"
NEEDS_CHURN = ("churn_noise", "churn_min")
DEFAULT = ("churn=0,2.5,5", "churn_noise=1,1.05", "initial_scale=1,1.05,1.1", "perturb=0,0.1,0.2")
LOWER_SIGMA_MAX = 0.25  # of the training's: tried by default
FEWEST = 3
"""Init times from which a standard error is taken; with fewer, CRPS must not be worse at all."""
MOST_WORSE = 0.005
"""Relative change of CRPS that no standard error excuses: few init times would excuse anything."""
NO_RATIO = 1.0  # what counts as |SSR - target| where the error, less its sampling part, is not positive


@dataclass(frozen=True)
class Settings:
    """How an ensemble is made."""

    sampler: SamplerConfig
    perturb: PerturbationConfig

    def value(self, factor: str) -> float:
        """Return the value of a factor; of `perturb` the amplitude, 0 for none."""
        if factor == PERTURB:
            return 0.0 if self.perturb.kind == "none" else self.perturb.amplitude
        return float(getattr(self.sampler, factor))

    def changed(self, changes: Changes) -> Settings:
        """Return other settings; amplitude 0 means no perturbation, another one of no kind means noise."""
        numbers: dict[str, Any] = {name: value for name, value in changes.items() if name != PERTURB}
        if "levels" in numbers:
            numbers["levels"] = int(numbers["levels"])
        perturb = self.perturb
        if changes.get(PERTURB) == 0:
            perturb = PerturbationConfig()
        elif PERTURB in changes:
            kind = "noise" if perturb.kind == "none" else perturb.kind
            perturb = dataclasses.replace(perturb, kind=kind, amplitude=changes[PERTURB])
        return Settings(dataclasses.replace(self.sampler, **numbers), perturb)


def read_sweep(
    words: Sequence[str], base: Settings, diffusion: DiffusionConfig
) -> dict[str, tuple[float, ...]]:
    """Read `churn=0,2.5,5` and the like: factor -> values other than the baseline's; by default `DEFAULT`.

    Raises:
        ValueError: not a factor, no numbers, or noise levels outside training.
    """
    found: dict[str, tuple[float, ...]] = {}
    for word in words or _default(base, diffusion):
        name, equals, values = word.partition("=")
        if not equals or name not in (*SAMPLER, PERTURB):
            raise ValueError(
                f"--sweep {word}: write a factor and its values, such as churn=0,2.5,5; factors are "
                f"{', '.join((*SAMPLER, PERTURB))}"
            )
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--sweep {word}: {values!r} are no numbers with commas between") from None
        if name == PERTURB and base.perturb.kind == "analyses":
            raise ValueError("--sweep perturb: members that start from analyses have no amplitude")
        for number in numbers:
            for_training(base.changed({name: number}).sampler, diffusion)
        found[name] = tuple(number for number in dict.fromkeys(numbers) if number != base.value(name))
    return {name: numbers for name, numbers in found.items() if numbers}


def _default(base: Settings, diffusion: DiffusionConfig) -> list[str]:
    words = [w for w in DEFAULT if not (base.perturb.kind == "analyses" and w.startswith(PERTURB))]
    low = base.sampler.sigma_min or diffusion.sigma_min
    lower = LOWER_SIGMA_MAX * (base.sampler.sigma_max or diffusion.sigma_max)
    return [*words, f"sigma_max={lower:g}"] if low < lower < math.inf else words


@dataclass(frozen=True)
class Trial:
    """What came of some changes."""

    changes: dict[str, float]
    sums_IJCS: Array
    """Area means at every init time; empty if the forecasts did not stay finite."""
    members: int
    target: float
    worse: float
    """Relative change of CRPS against the baseline, a mean; positive is worse."""
    error: float
    """Its standard error."""
    failed: str = ""

    @property
    def ssr_JC(self) -> Array:
        """Unbiased spread/skill ratio."""
        return np.asarray(scores_of(self.sums_IJCS.mean(axis=0), self.members)["ssr"])

    @property
    def crps_JC(self) -> Array:
        """Fair CRPS."""
        return np.asarray(scores_of(self.sums_IJCS.mean(axis=0), self.members)["crps"])

    @property
    def distance(self) -> float:
        """Mean of |SSR - target| over lead times and channels."""
        if self.failed:
            return math.inf
        return float(np.nan_to_num(np.abs(self.ssr_JC - self.target), nan=NO_RATIO).mean())

    @property
    def allowed(self) -> bool:
        """Whether CRPS is not worse than the baseline's."""
        return not self.failed and self.worse <= min(self.error, MOST_WORSE)

    @property
    def name(self) -> str:
        """The changes in words."""
        return ", ".join(f"{name} {value:g}" for name, value in self.changes.items()) or "baseline"


def crps_change(sums_IJCS: Array, base_IJCS: Array, members: int) -> tuple[float, float]:
    """Return the relative change of CRPS, mean over init times, and its standard error; see the rule."""
    scale_JC = scores_of(base_IJCS.mean(axis=0), members)["crps"]
    now, before = (scores_of(sums, members)["crps"] for sums in (sums_IJCS, base_IJCS))
    change_I = np.mean((now - before) / scale_JC, axis=(1, 2))
    count = len(change_I)
    error = float(change_I.std(ddof=1) / math.sqrt(count)) if count >= FEWEST else 0.0
    return float(change_I.mean()), error


Compute = Callable[[Changes], Array | str]
"""Make the forecasts with some changes: the sums [I, J, C, S], or what went wrong."""


class Search:
    """Tries changes and keeps what came of them.

    Args:
        compute: what makes the forecasts of a trial.
        members: of an ensemble.
        target: of the spread/skill ratio.

    Attributes:
        trials: all so far, the baseline first.
    """

    def __init__(self, compute: Compute, members: int, target: float = 1.0) -> None:
        self._compute, self.members, self.target = compute, members, target
        self.trials: list[Trial] = []

    def attempt(self, changes: Changes) -> Trial:
        """Make a trial, once.

        Raises:
            ValueError: the baseline itself went wrong.
        """
        for trial in self.trials:
            if trial.changes == changes:
                return trial
        sums = self._compute(changes)
        if isinstance(sums, str):
            if not self.trials:
                raise ValueError(sums)
            trial = Trial(dict(changes), np.zeros(0), self.members, self.target, math.inf, 0.0, sums)
        else:
            base = self.trials[0].sums_IJCS if self.trials else sums
            worse, error = crps_change(sums, base, self.members)
            trial = Trial(dict(changes), sums, self.members, self.target, worse, error)
        self.trials.append(trial)
        return trial

    @property
    def best(self) -> Trial:
        """The trial the rule chooses."""
        return min((trial for trial in self.trials if trial.allowed), key=lambda trial: trial.distance)

    def run(self, factors: Mapping[str, Sequence[float]], churn: float) -> Trial:
        """Try single changes, then combinations of the best; return the one chosen.

        Args:
            factors: values to try.
            churn: of the baseline: without any, its noise has no effect by itself.
        """
        self.attempt({})
        alone = {name: factors[name] for name in factors if churn > 0 or name not in NEEDS_CHURN}
        singles: dict[str, Trial] = {}
        for name, values in alone.items():
            trials = [self.attempt({name: value}) for value in values]
            if allowed := [trial for trial in trials if trial.allowed]:
                singles[name] = min(allowed, key=lambda trial: trial.distance)
        best = self.best
        for trial in sorted(singles.values(), key=lambda trial: trial.distance):
            if not set(trial.changes) & set(best.changes):
                best = self._better(best, trial.changes)
        for name in (name for name in factors if name not in alone):
            for value in factors[name]:
                if best.changes.get("churn", churn) > 0:
                    best = self._better(best, {name: value})
        return self.best

    def _better(self, best: Trial, more: Changes) -> Trial:
        trial = self.attempt({**best.changes, **more})
        return trial if trial.allowed and trial.distance < best.distance else best


def most_trials(factors: Mapping[str, Sequence[float]], churn: float) -> int:
    """Return how many trials a search makes at most."""
    alone = [name for name in factors if churn > 0 or name not in NEEDS_CHURN]
    return 1 + sum(map(len, factors.values())) + max(0, len(alone) - 1)
