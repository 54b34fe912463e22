"""Extremes: whether an event was forecast, and with which probability.

An event is a value beyond a quantile of the local climatology: below it for quantiles under one half, above
it for the others. Everything follows from one table per event: the share of area and time at which k of M
members say yes, with and without the event in the truth. Definitions as in Wilks (2011), chapter 8; the
debiased Brier score takes off p(1 - p)/(M - 1) (Ferro 2014); SEDI after Ferro and Stephenson (2011).

Legend: M members, C channels, Y rows, X cols, J lead times, Q quantiles, K = M + 1 counts of members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.scores.areas import AreaMean
from aeris.scores.collecting import Fields, LeadSums, Part

Array = NDArray[np.float64]

MEANING = {
    "base_rate": "share of area and time with the event in the truth",
    "frequency_bias": "share of yes forecasts of members / base rate",
    "brier": "debiased Brier score of the share of members",
    "brier_skill": "1 - brier / (base_rate (1 - base_rate)): against the observed frequency",
    "roc_area": "area under the ROC curve of the share of members; 0.5: no skill",
    "pod": "hit rate H / (H + M) of single members",
    "far": "false-alarm ratio F / (H + F) of single members",
    "pofd": "false-alarm rate F / (F + C) of single members",
    "csi": "critical success index H / (H + M + F) of single members",
    "ets": "equitable threat score of single members",
    "sedi": "symmetric extremal dependence index of single members; 1: perfect, 0: no skill",
}


def event_name(quantile: float) -> str:
    """Return how an event is called: "below q0.1", "above q0.95"."""
    return f"{'below' if quantile < 0.5 else 'above'} q{quantile:g}"


@dataclass(frozen=True)
class Events:
    """Tables of events.

    Attributes:
        channels: places of the channels among those scored.
        quantiles: what makes the events.
        table_JCQ2K: share of area and time by [truth has it: no, yes] and the number of members that say yes.
    """

    channels: tuple[int, ...]
    quantiles: tuple[float, ...]
    table_JCQ2K: Array

    @property
    def probability_K(self) -> Array:
        """The share of members, for each count."""
        members = self.table_JCQ2K.shape[-1] - 1
        return np.arange(members + 1) / members

    def scores(self) -> dict[str, Array]:
        """Return the scores of `MEANING`, each [J, C, Q]; NaN where one does not exist."""
        no_K, yes_K = self.table_JCQ2K[..., 0, :], self.table_JCQ2K[..., 1, :]
        share_K = self.probability_K
        hits, misses = (yes_K * share_K).sum(axis=-1), (yes_K * (1 - share_K)).sum(axis=-1)
        false, correct = (no_K * share_K).sum(axis=-1), (no_K * (1 - share_K)).sum(axis=-1)
        base = hits + misses
        brier = self.brier()
        found = {"base_rate": base, "frequency_bias": _ratio(hits + false, base), "brier": brier}
        found["brier_skill"] = 1 - _ratio(brier, base * (1 - base))
        found["roc_area"] = self.roc_area()
        return found | contingency_scores(hits, misses, false, correct)

    def brier(self) -> Array:
        """Return the debiased Brier score [J, C, Q]; of one member the raw one."""
        members, share_K = self.table_JCQ2K.shape[-1] - 1, self.probability_K
        debias_K = share_K * (1 - share_K) / (members - 1) if members > 1 else np.zeros(2)
        no_K, yes_K = self.table_JCQ2K[..., 0, :], self.table_JCQ2K[..., 1, :]
        return np.asarray(
            (no_K * (share_K**2 - debias_K) + yes_K * ((1 - share_K) ** 2 - debias_K)).sum(axis=-1)
        )

    def roc(self) -> tuple[Array, Array]:
        """Return false-alarm and hit rates [J, C, Q, M + 2] where M + 1, M .. 0 members make a yes."""
        tail = np.cumsum(self.table_JCQ2K[..., ::-1], axis=-1)
        tail = np.concatenate([np.zeros_like(tail[..., :1]), tail], axis=-1)
        total = tail[..., -1:]
        rates = np.divide(tail, total, out=np.full_like(tail, np.nan), where=total > 0)
        return rates[..., 0, :], rates[..., 1, :]

    def roc_area(self) -> Array:
        """Return the area under the ROC curve [J, C, Q], by trapezoids."""
        false, hits = self.roc()
        return np.asarray((np.diff(false) * (hits[..., 1:] + hits[..., :-1]) / 2).sum(axis=-1))

    def reliability(self) -> tuple[Array, Array]:
        """Return the observed frequency and the share of forecasts [J, C, Q, K] by share of members."""
        forecast_K = self.table_JCQ2K.sum(axis=-2)
        return _ratio(self.table_JCQ2K[..., 1, :], forecast_K), forecast_K


def contingency_scores(hits: Array, misses: Array, false: Array, correct: Array) -> dict[str, Array]:
    """Return pod, far, pofd, csi, ets and sedi of a table of two by two; NaN where one does not exist."""
    total = hits + misses + false + correct
    by_chance = _ratio((hits + misses) * (hits + false), total)
    pod, pofd = _ratio(hits, hits + misses), _ratio(false, false + correct)
    within = (pod > 0) & (pod < 1) & (pofd > 0) & (pofd < 1)
    h, f = np.where(within, pod, 0.5), np.where(within, pofd, 0.25)
    logs = (np.log(f), np.log(h), np.log(1 - f), np.log(1 - h))
    sedi = (logs[0] - logs[1] - logs[2] + logs[3]) / sum(logs)
    return {
        "pod": pod,
        "far": _ratio(false, hits + false),
        "pofd": pofd,
        "csi": _ratio(hits, hits + misses + false),
        "ets": _ratio(hits - by_chance, hits + misses + false - by_chance),
        "sedi": np.where(within, sedi, np.nan),
    }


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


class EventCounts(LeadSums):
    """Gathers the tables of events (aeris/scores/collecting.py).

    Args:
        lead_times: J.
        members: M.
        area: area means of all channels.
        channels: places of the channels whose events are counted.
        quantiles: between 0 and 1.
        threshold: returns a quantile of the climatology [C, Y, X] at a valid time.
        executor: counts channels side by side.
    """

    def __init__(
        self,
        lead_times: int,
        members: int,
        area: AreaMean,
        channels: Sequence[int],
        quantiles: Sequence[float],
        threshold: Callable[[np.datetime64, float], Fields],
        executor: Executor | None = None,
    ) -> None:
        self._area, self._threshold, self._executor = area, threshold, executor
        self._channels, self._quantiles = tuple(channels), tuple(quantiles)
        super().__init__((lead_times, len(self._channels), len(self._quantiles), 2, members + 1))

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        """Add a lead time."""
        assert y_CYX is not None
        truth_CYX = y_CYX
        for number, quantile in enumerate(self._quantiles):
            limit_CYX = self._threshold(valid, quantile)
            sign = np.float32(-1 if quantile < 0.5 else 1)

            def table_of(channel: int, sign: Any = sign, limit_CYX: Fields = limit_CYX) -> Array:
                limit_YX = sign * limit_CYX[channel]
                x_MYX = sign * x_MCYX[:, channel]
                yes_YX = (x_MYX > limit_YX).sum(axis=0)
                known_YX = np.isfinite(limit_YX) & np.isfinite(x_MYX).all(axis=0)
                return self._table(channel, yes_YX, sign * truth_CYX[channel] > limit_YX, known_YX)

            run = map if self._executor is None else self._executor.map
            self._sums[lead, :, number] += np.stack(list(run(table_of, self._channels)))
        self._counted(lead)

    def _table(
        self,
        channel: int,
        yes_YX: NDArray[np.intp],
        truth_YX: NDArray[np.bool_],
        known_YX: NDArray[np.bool_],
    ) -> Array:
        """Return the weight of the points by truth and number of members: [2, M + 1], NaN with a gap."""
        counts = self._shape[-1]
        weight_YX = self._area.points(channel)
        if not known_YX[weight_YX > 0].all():
            return np.full((2, counts), np.nan)
        place = truth_YX * counts + yes_YX
        return np.asarray(
            np.bincount(place.ravel(), weight_YX.ravel(), 2 * counts).reshape(2, counts), dtype=np.float64
        )

    def combine(self, parts: Sequence[Part]) -> Events:
        """Return the tables of all init times."""
        return Events(self._channels, self._quantiles, self._mean(parts))
