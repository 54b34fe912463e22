"""Scores of an ensemble forecast, accumulated over init times in float64.

Definitions follow WeatherBench 2 and WeatherBench-X (Rasp et al. 2024): area mean, then the mean over init
times, then the root. Fair CRPS: Ferro (2014), QJRMS 140, 1917. Rank histogram: Hamill (2001), MWR 129, 550.
Every score is a function of the error x - y of the members, so the truth y is subtracted first, once.

Legend: M members, C channels, Y rows, X cols, J lead times, P points with a weight, S sums.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Values of an ensemble worked on at a time: what fits a processor's cache is fastest, and bounds the memory.
BLOCK_VALUES = 2**17

SCORES = ("rmse", "rmse_member", "bias", "crps", "spread", "ssr")


def fair_crps(error_MP: Array) -> Array:
    """Return the fair continuous ranked probability score at every point, in the unit of the errors.

    mean|x_i - y| - 1/(2 M (M-1)) sum_ij |x_i - x_j|, the double sum taken from the sorted members in
    O(M log M). One member has no spread: its score is the absolute error, as for any deterministic forecast.

    Args:
        error_MP: member minus truth, members first; any shape behind them.
    """
    members = len(error_MP)
    skill = np.abs(error_MP).mean(axis=0)
    if members == 1:
        return np.asarray(skill)
    rank_M = np.arange(1, members + 1)
    factor_M = (2.0 * rank_M - members - 1) / (members * (members - 1))
    # half the spread of WeatherBench-X; the factors sum to 0, so errors do as well as values
    return np.asarray(skill - np.tensordot(factor_M, np.sort(error_MP, axis=0), axes=1))


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


def _area_sums(error_MP: Array, weight_P: Array) -> Array:
    """Return the area means of one channel at one time: five sums, then M + 1 shares of rank."""
    mean_P = error_MP.mean(axis=0)
    squared_P = (error_MP**2).mean(axis=0)
    variance_P = error_MP.var(axis=0, ddof=1) if len(error_MP) > 1 else np.zeros_like(mean_P)
    fields_SP = np.stack([mean_P**2, squared_P, mean_P, fair_crps(error_MP), variance_P])
    return np.concatenate([fields_SP @ weight_P, rank_weights(error_MP, weight_P)])


class EnsembleScores:
    """Sums of scores over init times, for one forecast system.

    Holds a few numbers per lead time and channel; `add` works on a few rows of a channel at a time, so memory
    stays that of the fields handed in. A deterministic forecast is an ensemble of one member.

    Args:
        lead_times: J.
        members: M.
        weight_Y: area weight of each row, any scale.
        mask_CYX: True where a channel has a value; other points get no weight and may hold anything.
    """

    def __init__(self, lead_times: int, members: int, weight_Y: Array, mask_CYX: NDArray[np.bool_]) -> None:
        rows = mask_CYX.shape[1]
        if weight_Y.shape != (rows,):
            raise ValueError(f"{len(weight_Y)} latitude weights for fields of {rows} rows")
        if not mask_CYX.any(axis=(1, 2)).all():
            raise ValueError("a channel is masked everywhere and cannot be scored")
        self.members = members
        self._weight_Y = weight_Y
        self._mask_CYX = mask_CYX
        self._sums_JCS = np.zeros((lead_times, len(mask_CYX), 5 + members + 1))
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

        rows, cols = expected[2:]
        step = max(1, BLOCK_VALUES // (self.members * cols))

        def sums_of(channel: int) -> Array:
            mask_YX = self._mask_CYX[channel]
            weight_YX = np.where(mask_YX, self._weight_Y[:, None], 0.0)
            weight_YX /= weight_YX.sum()
            sums_S = np.zeros(self._sums_JCS.shape[-1])
            for first in range(0, rows, step):
                block = slice(first, first + step)
                inside = mask_YX[block]
                error_MP = forecast_MCYX[:, channel, block][:, inside].astype(np.float64)
                error_MP -= truth_CYX[channel, block][inside]
                sums_S += _area_sums(error_MP, weight_YX[block][inside])
            return sums_S

        run = map if executor is None else executor.map
        self._sums_JCS[lead] += np.stack(list(run(sums_of, range(expected[1]))))
        self._count_J[lead] += 1

    @property
    def _means_JCS(self) -> Array:
        if not self._count_J.all():
            raise ValueError(f"lead number {int(np.argmin(self._count_J))} has no forecast yet")
        return self._sums_JCS / self._count_J[:, None, None]

    def result(self) -> dict[str, Array]:
        """Return the scores so far, each [J, C], by their names in `SCORES`.

        rmse and bias are those of the ensemble mean; rmse_member is the RMSE of a single member (mean over
        members before the root); spread is the root of the mean ensemble variance. spread and ssr are NaN
        with one member.
        """
        squared, squared_member, bias, crps, variance = np.moveaxis(self._means_JCS[..., :5], -1, 0)
        spread = np.sqrt(variance) if self.members > 1 else np.full_like(variance, np.nan)
        ssr = unbiased_spread_skill(variance, squared, self.members)
        values = (np.sqrt(squared), np.sqrt(squared_member), bias, crps, spread, ssr)
        return dict(zip(SCORES, values))

    def ranks(self) -> Array:
        """Return the rank histogram [J, C, M + 1]: share of area and time with the truth at rank 0..M."""
        return self._means_JCS[..., 5:]


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
