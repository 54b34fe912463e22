"""Several forecasters on the same starts, scored against the truth: errors by start, lead time and channel.

Every error is kept, so that forecasters can be compared start by start and not by their means alone.

Legend: N forecasters, I init times, J lead times, C channels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aeris.aurora.batch import Batch
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.conditions import Predictor, require_same_input, steps_of
from aeris.aurora.training.errors import (
    Array,
    ChannelFields,
    area_weights,
    errors,
    fields_of,
    matched,
    variable_name,
)
from aeris.data.variables import Channel

Stack = NDArray[np.float64]


class Sample(Protocol):
    """A start and what came after it."""

    @property
    def input(self) -> Batch:
        """The states a forecast starts from."""

    @property
    def targets(self) -> Sequence[Batch]:
        """The truth, a step apart."""


def mean_of_known(values: Stack, axis: int) -> Stack:
    """Return the mean of the finite values along an axis, NaN where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


@dataclass(frozen=True)
class Comparison:
    """Errors of several forecasters; the first is the one that others are measured against."""

    names: tuple[str, ...]
    made_from: tuple[str, ...]
    """What each was opened from."""
    inits: NDArray[np.datetime64]
    lead_h: tuple[int, ...]
    channels: tuple[Channel, ...]
    weights: str
    """Scheme of the area weights."""
    mse_NIJC: Stack
    """Area mean of the squared error; NaN where nothing is known."""
    mae_NIJC: Stack
    bias_NIJC: Stack

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the channels."""
        return tuple(one.name for one in self.channels)

    def rmse(self) -> Stack:
        """Return the root of the mean squared error over area and starts [N, J, C]."""
        return np.asarray(np.sqrt(mean_of_known(self.mse_NIJC, 1)))

    def mae(self) -> Stack:
        """Return the mean absolute error [N, J, C]."""
        return mean_of_known(self.mae_NIJC, 1)

    def bias(self) -> Stack:
        """Return the mean error [N, J, C]."""
        return mean_of_known(self.bias_NIJC, 1)

    def ratio(self) -> Stack:
        """Return the RMSE over that of the first [N, J, C], NaN where that is zero."""
        rmse = self.rmse()
        first = np.broadcast_to(rmse[:1], rmse.shape)
        return np.asarray(np.divide(rmse, first, out=np.full(rmse.shape, np.nan), where=first > 0))

    def mean_ratio(self) -> Stack:
        """Return the mean over channels of `ratio` [N, J]."""
        return mean_of_known(self.ratio(), 2)

    def wins(self) -> Stack:
        """Return the share of (start, channel) with a smaller squared error than the first [N, J]."""
        known = np.isfinite(self.mse_NIJC) & np.isfinite(self.mse_NIJC[:1])
        better = np.where(known, self.mse_NIJC < self.mse_NIJC[:1], np.nan)
        count = np.swapaxes(better, 1, 2).reshape(*better.shape[:1], better.shape[2], -1)
        return mean_of_known(np.asarray(count, dtype=np.float64), 2)

    def conditions(self) -> str:
        """Say how the numbers were made, in one line."""
        first, last = (str(time.astype("datetime64[h]")) for time in (self.inits.min(), self.inits.max()))
        start = (
            f"{len(self.inits)} starts, {first} to {last} UTC"
            if len(self.inits) > 1
            else f"start {first} UTC"
        )
        area = "cos(latitude)" if self.weights == "cos" else f"'{self.weights}'"
        return f"{start}; area weights {area}; RMSE: root after the mean over starts"


@dataclass
class Case:
    """The fields of one start, for maps."""

    init: np.datetime64
    truth: dict[int, ChannelFields] = field(default_factory=dict)
    """By lead time in hours."""
    forecasts: dict[str, dict[int, ChannelFields]] = field(default_factory=dict)
    """By name and lead time in hours."""
    land_YX: NDArray[np.floating] | None = None


def compare(
    predictors: Iterable[Predictor],
    samples: Callable[[], Iterable[Sample]],
    lead_h: Sequence[int],
    step_h: float = 6.0,
    weights: str = "cos",
    case_init: np.datetime64 | None = None,
    advance: Callable[[str], None] = lambda words: None,
) -> tuple[Comparison, Case]:
    """Score forecasters on the same samples, one forecaster after the other.

    So only one model is in memory at a time, where `predictors` makes them one by one.

    Args:
        predictors: the first is what others are measured against.
        samples: gives the samples from the start, once for every forecaster.
        lead_h: lead times in hours, rising; multiples of the step.
        step_h: hours from one target to the next, and the step of the models.
        weights: scheme of the area weights.
        case_init: start whose fields are kept for maps; None keeps the first.
        advance: called with the name of the forecaster after every start.

    Raises:
        ValueError: no sample, a lead time that is none, models that start from different things, or forecasts
            that do not fit the truth.
    """
    found = _Found(tuple(lead_h), step_h, weights, case_init)
    for predictor in predictors:
        found.run(predictor, samples(), advance)
    return found.result()


class _Found:
    """What has been found so far."""

    def __init__(
        self, lead_h: tuple[int, ...], step_h: float, weights: str, case_init: np.datetime64 | None
    ) -> None:
        self.lead_h, self.weights, self.case_init = lead_h, weights, case_init
        self.step_h = step_h
        self.made_from: dict[str, str] = {}
        self.settings: dict[str, AuroraConfig | None] = {}
        self.tallies: list[dict[np.datetime64, Stack]] = []
        self.channels: tuple[Channel, ...] = ()
        self.case: Case | None = None

    def run(self, predictor: Predictor, samples: Iterable[Sample], advance: Callable[[str], None]) -> None:
        """Score one forecaster on every sample."""
        if predictor.name in self.made_from:
            raise ValueError(f"two forecasters are called {predictor.name!r}: name them, LABEL=...")
        steps = steps_of(self.lead_h, self.step_h)
        if predictor.timestep_h not in (0.0, self.step_h):
            raise ValueError(
                f"{predictor.name} makes steps of {predictor.timestep_h:g} h, others of {self.step_h:g} h: "
                f"compare models of one step"
            )
        self.settings[predictor.name] = predictor.config
        require_same_input(self.settings)
        tally: dict[np.datetime64, Stack] = {}
        for sample in samples:
            init = np.datetime64(sample.input.metadata.time[0], "s")
            truths = [fields_of(sample.targets[step - 1]) for step in steps]
            self.channels = self.channels or _scored(truths[0], predictor)
            if self.case is None and self.case_init in (None, init):
                self.case = Case(init, dict(zip(self.lead_h, truths)), land_YX=_land(sample.input))
            made = list(predictor.forecast(sample.input, self.lead_h))
            pairs = zip(made, truths, strict=True)
            tally[init] = np.stack([_score(one, truth, self.channels, self.weights) for one, truth in pairs])
            if self.case is not None and self.case.init == init:
                self.case.forecasts[predictor.name] = dict(zip(self.lead_h, made))
            advance(predictor.name)
        self.made_from[predictor.name] = predictor.made_from
        self.tallies.append(tally)

    def result(self) -> tuple[Comparison, Case]:
        """Put everything together."""
        if not self.tallies or not self.tallies[0]:
            raise ValueError("no start has all its lead times in the data: widen the period")
        inits = sorted(self.tallies[0])
        if self.case is None:
            raise ValueError(
                f"no start at {self.case_init}: starts are {inits[0]} .. {inits[-1]} ({len(inits)})"
            )
        sums_NIJ3C = np.array([[tally[init] for init in inits] for tally in self.tallies])
        mse, mae, bias = np.moveaxis(sums_NIJ3C, 3, 0)
        names, specs = tuple(self.made_from), tuple(self.made_from.values())
        times = np.array(inits, dtype="datetime64[s]")
        shape = (self.lead_h, self.channels, self.weights)
        return Comparison(names, specs, times, *shape, mse, mae, bias), self.case


def _scored(truth: ChannelFields, predictor: Predictor) -> tuple[Channel, ...]:
    """Return the channels of the truth that the model predicts, all where it does not say."""
    if predictor.config is None:
        return truth.channels
    ours = {*predictor.config.surf_vars, *predictor.config.atmos_vars}
    return tuple(one for one in truth.channels if variable_name(one) in ours)


def _land(batch: Batch) -> NDArray[np.floating] | None:
    land = batch.static_vars.get("lsm")
    return None if land is None else land.float().cpu().numpy()


def _score(forecast: ChannelFields, truth: ChannelFields, channels: Sequence[Channel], weights: str) -> Stack:
    """Return mse, mae and bias [3, C] of the channels asked for, NaN where the forecast has none."""
    truth, forecast = matched(truth, forecast)
    found: Array = np.full((3, len(channels)), np.nan)
    names = [one.name for one in channels]
    places = [names.index(name) for name in truth.names if name in names]
    kept = [names[place] for place in places]
    scores = errors(
        forecast.select(kept).values_CYX,
        truth.select(kept).values_CYX,
        area_weights(truth.latitude_deg, weights),
    )
    found[:, places] = (scores.mse, scores.mae, scores.bias)
    return found
