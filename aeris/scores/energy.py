"""The energy score: the CRPS of whole fields (Gneiting and Raftery 2007), which also sees their pattern.

    ES = mean_i ||x_i - y|| - 1/(2 M (M-1)) sum_ij ||x_i - x_j||

over all pairs of members (fair; WeatherBench 2 takes adjacent pairs only). The norm of a channel is the root
of the area mean of the square, in the unit of the channel: one member's energy score is its RMSE at that
time. The norm over all channels is the root of the mean over channels of these squares, each divided by the
square of the channel's standard deviation: a number without a unit.

Legend: M members, C channels, Y rows, X cols, J lead times.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from aeris.scores.areas import AreaMean
from aeris.scores.collecting import Fields, LeadSums, Part

Array = NDArray[np.float64]

_BLOCK_VALUES = 2**18


def energy_score(squared_error_M: Array, squared_apart_MM: Array) -> float:
    """Return the fair energy score from squared norms.

    Args:
        squared_error_M: ||x_i - y||^2.
        squared_apart_MM: ||x_i - x_j||^2.
    """
    members = len(squared_error_M)
    skill = float(np.sqrt(squared_error_M).mean())
    if members == 1:
        return skill
    apart = float(np.sqrt(squared_apart_MM).sum())
    return skill - apart / (2 * members * (members - 1))


class EnergyScores(LeadSums):
    """Gathers energy scores of each channel and of all together (aeris/scores/collecting.py).

    Args:
        lead_times: J.
        area: area means.
        std_C: standard deviation of each channel, for the score over all; NaN leaves a channel out of it.
        executor: scores channels side by side.
    """

    def __init__(
        self, lead_times: int, area: AreaMean, std_C: Array, executor: Executor | None = None
    ) -> None:
        self._area, self._std_C, self._executor = area, std_C, executor
        super().__init__((lead_times, area.channels + 1))

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        """Add a lead time."""
        assert y_CYX is not None
        truth_CYX = y_CYX

        def products_of(channel: int) -> Array:
            return self._products_of(channel, x_MCYX[:, channel], truth_CYX[channel])

        run = map if self._executor is None else self._executor.map
        used = np.flatnonzero(np.isfinite(self._std_C) & (self._std_C > 0))
        together_MM = np.zeros((len(x_MCYX),) * 2)
        for channel, product_MM in enumerate(run(products_of, range(self._area.channels))):
            self._sums[lead, channel] += energy_score(*_norms(product_MM))
            if channel in used:
                together_MM += product_MM / (self._std_C[channel] ** 2 * len(used))
        self._sums[lead, -1] += energy_score(*_norms(together_MM)) if len(used) else np.nan
        self._counted(lead)

    def _products_of(self, channel: int, x_MYX: Fields, y_YX: Fields) -> Array:
        """Return the area means of the products of the errors of two members: [M, M]."""
        members, rows, cols = x_MYX.shape
        weight_YX = np.sqrt(self._area.points(channel))
        step = max(1, _BLOCK_VALUES // (members * cols))
        product_MM = np.zeros((members, members))
        for first in range(0, rows, step):
            block = slice(first, first + step)
            valid_YX = self._area.valid(channel)[block]
            error_MYX = np.where(valid_YX, x_MYX[:, block].astype(np.float64) - y_YX[block], 0.0)
            error_MP = (error_MYX * weight_YX[block]).reshape(members, -1)
            product_MM += error_MP @ error_MP.T
        return product_MM

    def combine(self, parts: Sequence[Part]) -> tuple[Array, Array]:
        """Return the energy score of each channel [J, C], and that of all channels together [J]."""
        means_JC = self._mean(parts)
        return means_JC[:, :-1], means_JC[:, -1]


def _norms(product_MM: Array) -> tuple[Array, Array]:
    """Return the squared norms of errors and of differences, from the products of errors."""
    square_M = np.diagonal(product_MM)
    apart_MM = np.maximum(square_M[:, None] + square_M[None] - 2 * product_MM, 0.0)
    np.fill_diagonal(apart_MM, 0.0)
    return square_M, apart_MM
