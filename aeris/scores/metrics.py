"""Scores of an ensemble forecast, accumulated over init times in float64.

Definitions follow WeatherBench 2 and WeatherBench-X (Rasp et al. 2024): area mean, then the mean over init
times, then the root. Fair CRPS: Ferro (2014), QJRMS 140, 1917. Rank histogram: Hamill (2001), MWR 129, 550.
Every score is a function of the error x - y of the members, so the truth y is subtracted first, once.

Legend: M members, C channels, Y rows, X cols, J lead times, R regions, P points, S sums.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.scores.regions import GLOBAL

Array = NDArray[np.float64]

# Values of an ensemble worked on at a time: what fits a processor's cache is fastest, and bounds the memory.
BLOCK_VALUES = 2**17

SCORES = (
    *("rmse", "rmse_member", "bias", "crps", "spread", "ssr"),
    *("ssr_raw", "ssr_fortin", "mae_member", "crps_biased"),
)
_SUMS = 6


def fair_crps(error_MP: Array) -> Array:
    """Return the fair continuous ranked probability score at every point, in the unit of the errors.

    mean|x_i - y| - 1/(2 M (M-1)) sum_ij |x_i - x_j|, the double sum taken from the sorted members in
    O(M log M). One member has no spread: its score is the absolute error, as for any deterministic forecast.

    Args:
        error_MP: member minus truth, members first; any shape behind them.
    """
    return np.asarray(np.abs(error_MP).mean(axis=0) - _half_spread(error_MP))


def _half_spread(error_MP: Array) -> Array:
    """Return half the mean absolute difference of two members."""
    members = len(error_MP)
    half_P = np.zeros(error_MP.shape[1:])
    if members > 1:
        rank_M = np.arange(1, members + 1)
        factor_M = (2.0 * rank_M - members - 1) / (members * (members - 1))
        # half the spread of WeatherBench-X; the factors sum to 0, so errors do as well as values
        for factor, sorted_P in zip(factor_M, np.sort(error_MP, axis=0)):
            half_P += factor * sorted_P
    return half_P


def unbiased_spread_skill(variance: Array, squared_error: Array, members: int) -> Array:
    """Return the unbiased spread/skill ratio sqrt(var / (mse - var/M)), 1 for a calibrated ensemble.

    Args:
        variance: mean ensemble variance (divisor M - 1).
        squared_error: mean squared error of the ensemble mean; its own sampling error var/M is taken off.
        members: M. With one member, and where the corrected error is not positive, the ratio is NaN.
    """
    skill = squared_error - variance / members
    positive = (skill > 0) & (members > 1)
    return np.sqrt(np.divide(variance, skill, out=np.full_like(skill, np.nan), where=positive))


def raw_spread_skill(variance: Array, squared_error: Array, members: int) -> Array:
    """Return the raw spread/skill ratio sqrt(var / mse), which is sqrt(M / (M + 1)) when calibrated."""
    positive = (squared_error > 0) & (members > 1)
    return np.sqrt(
        np.divide(variance, squared_error, out=np.full_like(squared_error, np.nan), where=positive)
    )


def fortin_spread_skill(variance: Array, squared_error: Array, members: int) -> Array:
    """Return sqrt((M + 1) / M) times the raw ratio (Fortin et al. 2014): 1 when calibrated."""
    return np.asarray(np.sqrt((members + 1) / members) * raw_spread_skill(variance, squared_error, members))


def rank_weights(error_MP: Array, weight_P: Array) -> Array:
    """Return the weight of the points at which the truth has rank 0..M among the members.

    Where the truth equals members, its weight is shared evenly over the ranks it might take: the expectation
    of breaking ties at random, without random numbers.

    Returns:
        [M + 1], summing to the sum of `weight_P`.
    """
    slots = len(error_MP) + 2
    below_P = (error_MP < 0).sum(axis=0)
    after_P = below_P + (error_MP == 0).sum(axis=0) + 1
    share_P = weight_P / (after_P - below_P)
    steps = np.bincount(below_P, share_P, slots) - np.bincount(after_P, share_P, slots)
    return np.asarray(np.cumsum(steps)[:-1])


def _row_sums(error_MYX: Array) -> Array:
    """Return the sums over columns of what is averaged over the area: [S, Y]."""
    mean_YX = error_MYX.mean(axis=0)
    squared_YX = (error_MYX**2).mean(axis=0)
    variance_YX = error_MYX.var(axis=0, ddof=1) if len(error_MYX) > 1 else np.zeros_like(mean_YX)
    skill_YX = np.abs(error_MYX).mean(axis=0)
    crps_YX = skill_YX - _half_spread(error_MYX)
    fields = (mean_YX**2, squared_YX, mean_YX, crps_YX, variance_YX, skill_YX)
    return np.stack([field.sum(axis=-1) for field in fields])


class EnsembleScores:
    """Sums of scores over init times, for one forecast system.

    Holds a few numbers per lead time, channel and region; `add` works on a few rows of a channel at a time,
    so memory stays that of the fields handed in. A deterministic forecast is an ensemble of one member.

    Args:
        lead_times: J.
        members: M.
        weight_Y: area weight of each row, any scale.
        mask_CYX: True where a channel has a value; other points get no weight and may hold anything.
        regions: weight of each row by region, the global one first (aeris/scores/regions.py); by default
            the global one alone.
    """

    def __init__(
        self,
        lead_times: int,
        members: int,
        weight_Y: Array,
        mask_CYX: NDArray[np.bool_],
        regions: Mapping[str, Array] | None = None,
    ) -> None:
        rows = mask_CYX.shape[1]
        if weight_Y.shape != (rows,):
            raise ValueError(f"{len(weight_Y)} latitude weights for fields of {rows} rows")
        if not mask_CYX.any(axis=(1, 2)).all():
            raise ValueError("a channel is masked everywhere and cannot be scored")
        self.members = members
        self.regions = tuple(regions or (GLOBAL,))
        self._weight_RY = np.stack(list(regions.values())) if regions else weight_Y[None]
        self._mask_CYX = mask_CYX
        self._sums_JCRS = np.zeros((lead_times, len(mask_CYX), len(self.regions), _SUMS))
        self._ranks_JCS = np.zeros((lead_times, len(mask_CYX), members + 1))
        self._count_J = np.zeros(lead_times, dtype=np.int64)

    def add(
        self,
        lead: int,
        forecast_MCYX: NDArray[np.float32],
        truth_CYX: NDArray[np.float32],
        executor: Executor | None = None,
    ) -> None:
        """Add the forecast of one init time at lead number `lead`; an executor scores channels side by side.

        Raises:
            ValueError: shapes differ from those the sums were made for.
        """
        expected = (self.members, *self._mask_CYX.shape)
        if forecast_MCYX.shape != expected or truth_CYX.shape != expected[1:]:
            raise ValueError(f"expected fields {expected}, got {forecast_MCYX.shape} and {truth_CYX.shape}")

        def sums_of(channel: int) -> tuple[Array, Array]:
            return self._sums_of(forecast_MCYX[:, channel], truth_CYX[channel], self._mask_CYX[channel])

        run = map if executor is None else executor.map
        for channel, (sums_RS, ranks_S) in enumerate(run(sums_of, range(expected[1]))):
            self._sums_JCRS[lead, channel] += sums_RS
            self._ranks_JCS[lead, channel] += ranks_S
        self._count_J[lead] += 1

    def _sums_of(
        self, x_MYX: NDArray[np.float32], y_YX: NDArray[np.float32], mask_YX: NDArray[np.bool_]
    ) -> tuple[Array, Array]:
        """Return the area means of one channel by region [R, S], and the shares of rank [M + 1]."""
        rows, cols = mask_YX.shape
        step = max(1, BLOCK_VALUES // (self.members * cols))
        count_Y = mask_YX.sum(axis=-1)
        whole = bool(count_Y.sum() == mask_YX.size)
        # of a region without a valid point the mean is NaN, as 0 / 0
        total_R = np.where((total_R := (self._weight_RY * count_Y).sum(axis=-1)) > 0, total_R, np.nan)
        point_Y = self._weight_RY[0] / total_R[0]
        sums_SY, ranks_S = np.empty((_SUMS, rows)), np.zeros(self.members + 1)
        for first in range(0, rows, step):
            block = slice(first, first + step)
            error_MYX = x_MYX[:, block].astype(np.float64) - y_YX[block]
            weight_YX = np.broadcast_to(point_Y[block, None], error_MYX.shape[1:])
            if not whole:
                error_MYX = np.where(mask_YX[block], error_MYX, 0.0)
                weight_YX = np.where(mask_YX[block], weight_YX, 0.0)
            sums_SY[:, block] = _row_sums(error_MYX)
            ranks_S += rank_weights(error_MYX.reshape(self.members, -1), weight_YX.ravel())
        if not np.isfinite(sums_SY).all():  # NaN has no rank
            ranks_S[:] = np.nan
        # no matrix product here: its last bits would depend on the number of threads
        sums_RS = np.stack([(sums_SY * weight_Y).sum(axis=-1) for weight_Y in self._weight_RY])
        return sums_RS / total_R[:, None], ranks_S

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the sums so far, for `merge`."""
        return {"sums": self._sums_JCRS, "ranks": self._ranks_JCS, "count": self._count_J}

    def merge(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add sums made elsewhere of other init times."""
        self._sums_JCRS += state["sums"]
        self._ranks_JCS += state["ranks"]
        self._count_J += state["count"]

    def _over_count(self, sums: Array) -> Array:
        count_J = np.where(self._count_J > 0, self._count_J, np.nan)
        return np.asarray(sums / count_J.reshape(-1, *[1] * (sums.ndim - 1)))

    def result(self, region: str = GLOBAL) -> dict[str, Array]:
        """Return the scores so far by their names in `SCORES`, each [J, C]; NaN at a lead without forecasts.

        rmse and bias are those of the ensemble mean; rmse_member is the RMSE of a single member (mean over
        members before the root); spread is the root of the mean ensemble variance. spread and the three
        spread/skill ratios are NaN with one member.
        """
        means_JCS = self._over_count(self._sums_JCRS)[:, :, self.regions.index(region)]
        return scores_of(means_JCS, self.members)

    def ranks(self) -> Array:
        """Return the rank histogram [J, C, M + 1]: share of area and time with the truth at rank 0..M."""
        return self._over_count(self._ranks_JCS)


def scores_of(means_S: Array, members: int) -> dict[str, Array]:
    """Return scores by their names in `SCORES` from the sums of `EnsembleScores`, divided by their number.

    Args:
        means_S: [..., S].
        members: M.
    """
    squared, squared_member, bias, crps, variance, skill = np.moveaxis(means_S, -1, 0)
    spread = np.sqrt(variance) if members > 1 else np.full_like(variance, np.nan)
    ratios = [ssr(variance, squared, members) for ssr in SPREAD_SKILL.values()]
    # skill - crps is half the spread of the fair form, whose divisor is M - 1 in place of M
    biased = skill - (skill - crps) * (members - 1) / members
    values = (np.sqrt(squared), np.sqrt(squared_member), bias, crps, spread, *ratios, skill, biased)
    return dict(zip(SCORES, values))


SPREAD_SKILL = {
    "ssr": unbiased_spread_skill,
    "ssr_raw": raw_spread_skill,
    "ssr_fortin": fortin_spread_skill,
}


class CollectedScores:
    """Gathers an `EnsembleScores` init time by init time (aeris/scores/collecting.py).

    Args:
        empty: sums without any forecast yet; they stay so.
        executor: scores channels side by side.
    """

    needs_truth = True

    def __init__(self, empty: EnsembleScores, executor: Executor | None = None) -> None:
        self._empty, self._executor = empty, executor
        self._now = copy.deepcopy(empty)

    def begin(self, init: int) -> None:
        """Start an init time."""
        self._now = copy.deepcopy(self._empty)

    def add(
        self, lead: int, x_MCYX: NDArray[np.float32], y_CYX: NDArray[np.float32] | None, valid: np.datetime64
    ) -> None:
        """Add a lead time of it."""
        assert y_CYX is not None
        self._now.add(lead, x_MCYX, y_CYX, self._executor)

    def end(self) -> dict[str, NDArray[Any]]:
        """Return its sums."""
        return self._now.state()

    def combine(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> EnsembleScores:
        """Return the sums of all init times."""
        whole = copy.deepcopy(self._empty)
        for part in parts:
            whole.merge(part)
        return whole


def first_bad_value(
    forecast_MCYX: NDArray[np.float32], mask_CYX: NDArray[np.bool_]
) -> tuple[int, int, int, int] | None:
    """Return (member, channel, row, col) of the first value inside the mask that is not finite, or None."""
    for member, x_CYX in enumerate(forecast_MCYX):
        bad_CYX = ~np.isfinite(x_CYX) & mask_CYX
        if bad_CYX.any():
            channel, row, col = np.unravel_index(np.argmax(bad_CYX), bad_CYX.shape)
            return member, int(channel), int(row), int(col)
    return None
