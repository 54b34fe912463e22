"""Mean and standard deviation of every channel, and of its changes, over the train period only.

One streaming pass in float64, a row of windows at a time, merged by Chan's parallel form of Welford's update:
memory stays that of a few bands, however many years there are. Points that a mask hides are left out. Every
grid point counts the same, as in the published statistics.

Shapes: C channels, Y rows, X cols, P points of one row of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aeris.data.yearfile import StoreError, Years

Values = NDArray[np.float64]
HOUR_S = 3600


@dataclass(frozen=True)
class Statistics:
    """Numbers that standardise states and residuals, in the units of each channel; intervals in hours."""

    mean_C: Values
    std_C: Values
    residual_mean: dict[int, Values]
    residual_std: dict[int, Values]
    train_period: tuple[np.datetime64, np.datetime64]
    """First and last time that were counted."""


class Moments:
    """Count, mean and sum of squared deviations per channel, updated block by block."""

    def __init__(self, channels: int) -> None:
        self.count_C = np.zeros(channels)
        self.mean_C = np.zeros(channels)
        self._square_C = np.zeros(channels)

    def update(self, x_CP: Values, valid_CP: NDArray[np.bool_] | None = None) -> None:
        """Add a block of values [C, P], those only where `valid_CP`."""
        if valid_CP is None:
            count_C = np.full(len(x_CP), float(x_CP.shape[1]))
            mean_C = x_CP.mean(axis=1)
            away_CP = x_CP - mean_C[:, None]
        else:
            count_C = valid_CP.sum(axis=1, dtype=np.float64)
            mean_C = np.where(valid_CP, x_CP, 0.0).sum(axis=1) / np.maximum(count_C, 1.0)
            away_CP = np.where(valid_CP, x_CP - mean_C[:, None], 0.0)
        square_C = np.einsum("cp,cp->c", away_CP, away_CP)
        total_C = np.maximum(self.count_C + count_C, 1.0)
        step_C = mean_C - self.mean_C
        self.mean_C = self.mean_C + step_C * (count_C / total_C)
        self._square_C = self._square_C + square_C + step_C**2 * (self.count_C * count_C / total_C)
        self.count_C = self.count_C + count_C

    @property
    def std_C(self) -> Values:
        """Standard deviation over all values so far (no Bessel correction)."""
        return np.asarray(np.sqrt(self._square_C / np.maximum(self.count_C, 1.0)))


def compute(
    years: Years,
    time_s: NDArray[np.int64],
    names: Sequence[str],
    train_s: tuple[int, int],
    intervals_h: Sequence[int],
    mask_CYX: NDArray[np.bool_] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Statistics:
    """Stream over the fields of the train period (seconds, both ends included) and return their statistics.

    Args:
        mask_CYX: True where a point is valid; None where all are.
        advance: called once per band and time, for a progress bar (`bands(years)` per time).

    Raises:
        StoreError: a channel, or its change over an interval, does not vary; an interval has no pair of
        times.
    """
    inside = np.flatnonzero((time_s >= train_s[0]) & (time_s <= train_s[1]))
    state = Moments(len(names))
    residual = {interval: Moments(len(names)) for interval in intervals_h}
    longest_s = max(intervals_h, default=0) * HOUR_S
    _, _, rows, cols = years.shape
    for top in range(0, rows, years.window):
        valid_CP = None if mask_CYX is None else mask_CYX[:, top : top + years.window].reshape(len(names), -1)
        recent: dict[int, Values] = {}
        for index in inside:
            now_s = int(time_s[index])
            x_CYX = years.read(int(index), (top, 0), (years.window, cols))
            x_CP = x_CYX.reshape(len(names), -1).astype(np.float64)
            state.update(x_CP, valid_CP)
            for interval, moments in residual.items():
                before_CP = recent.get(now_s - interval * HOUR_S)
                if before_CP is not None:
                    moments.update(x_CP - before_CP, valid_CP)
            recent = {then_s: x for then_s, x in recent.items() if then_s > now_s - longest_s}
            recent[now_s] = x_CP
            advance()
    statistics = Statistics(
        state.mean_C,
        state.std_C,
        {interval: moments.mean_C for interval, moments in residual.items()},
        {interval: moments.std_C for interval, moments in residual.items()},
        (np.datetime64(int(time_s[inside[0]]), "s"), np.datetime64(int(time_s[inside[-1]]), "s")),
    )
    check(statistics, names, {interval: moments.count_C for interval, moments in residual.items()})
    return statistics


def check(statistics: Statistics, names: Sequence[str], pairs: dict[int, Values]) -> None:
    """Refuse statistics that would divide by zero.

    Raises:
        StoreError: names the channel and the interval.
    """
    start, end = statistics.train_period
    # A constant float32 field may come out as a few float64 roundings, never as an exact zero.
    still = statistics.std_C <= 1e-12 * np.abs(statistics.mean_C)
    if still.any():
        first = int(np.argmax(still))
        raise StoreError(
            f"{names[first]} is {statistics.mean_C[first]:g} everywhere in the train period {start} to "
            f"{end}: its standard deviation is zero; leave it out with --channels"
        )
    for interval, std_C in statistics.residual_std.items():
        if not pairs[interval].any():
            raise StoreError(f"no two times of the train period {start} to {end} are {interval} h apart")
        still = std_C <= 1e-12 * statistics.std_C
        if still.any():
            first = int(np.argmax(still))
            raise StoreError(
                f"{names[first]} never changes over {interval} h in the train period {start} to {end}: "
                f"its residual standard deviation is zero; leave it out with --channels"
            )
