"""Anomaly correlation and activity: how well the departure from climatology is forecast, and how large it is.

    ACC      = mean_T [ <f'o'> / sqrt(<f'^2> <o'^2>) ]
    activity = sqrt( mean_T <(f' - <f'>)^2> )

with <.> the area mean, primes departures from the climatology at the valid time, T the init times, as in
WeatherBench 2 (Rasp et al. 2024); WeatherBench-X averages the three moments over T before it divides.

Legend: M members, C channels, Y rows, X cols, J lead times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from aeris.scores.areas import AreaMean
from aeris.scores.collecting import Fields, LeadSums, Part

Array = NDArray[np.float64]

_SUMS = ("acc", "activity", "activity_member", "activity_truth")


class AnomalyScores(LeadSums):
    """Gathers ACC and activity (aeris/scores/collecting.py).

    Args:
        lead_times: J.
        area: area means.
        climatology: returns the mean field [C, Y, X] at a valid time; NaN for a channel without one.
        executor: scores channels side by side.
    """

    def __init__(
        self,
        lead_times: int,
        area: AreaMean,
        climatology: Callable[[np.datetime64], Fields],
        executor: Executor | None = None,
    ) -> None:
        self._area, self._climatology, self._executor = area, climatology, executor
        super().__init__((lead_times, area.channels, len(_SUMS)))

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        """Add a lead time."""
        assert y_CYX is not None
        usual_CYX = self._climatology(valid)
        truth_CYX = y_CYX

        def sums_of(channel: int) -> Array:
            usual_YX = usual_CYX[channel].astype(np.float64)
            return self._sums_of(channel, x_MCYX[:, channel] - usual_YX, truth_CYX[channel] - usual_YX)

        run = map if self._executor is None else self._executor.map
        self._sums[lead] += np.stack(list(run(sums_of, range(self._shape[1]))))
        self._counted(lead)

    def _sums_of(self, channel: int, x_MYX: Array, y_YX: Array) -> Array:
        """Return the correlation and the squares of the activities of one channel: [S]."""
        mean_YX = x_MYX.mean(axis=0)
        moments = [self._area.of(channel, field) for field in (mean_YX * y_YX, mean_YX**2, y_YX**2)]
        scale = np.sqrt(moments[1] * moments[2])
        correlation = moments[0] / scale if scale > 0 else np.nan
        variance, variance_truth = (
            square - self._area.of(channel, field) ** 2
            for square, field in ((moments[1], mean_YX), (moments[2], y_YX))
        )
        members = [self._area.of(channel, x_YX**2) - self._area.of(channel, x_YX) ** 2 for x_YX in x_MYX]
        return np.array([correlation, variance, np.mean(members), variance_truth])

    def combine(self, parts: Sequence[Part]) -> dict[str, Array]:
        """Return `acc`, `activity`, `activity_member` and `activity_truth`, each [J, C]."""
        values = dict(zip(_SUMS, np.moveaxis(self._mean(parts), -1, 0)))
        return {
            name: value if name == "acc" else np.sqrt(np.maximum(value, 0.0))
            for name, value in values.items()
        }
