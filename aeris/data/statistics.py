"""Mean and standard deviation of every channel, and of its changes, over the train period only.

One streaming pass in float64, a block of times and a row of windows at a time, merged by Chan's parallel form
of Welford's update: memory stays that of a few rows of windows, however many years there are, and the blocks
may be counted anywhere. Points that a mask hides are left out. Every grid point counts the same, as in the
published statistics.

Shapes: S series, C channels, Y rows, X cols, P points of one row of windows.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

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
    """Count, mean and sum of squared deviations of S series of C channels each, updated block by block."""

    def __init__(self, series: int, channels: int) -> None:
        self.count_SC = np.zeros((series, channels))
        self.mean_SC = np.zeros((series, channels))
        self.square_SC = np.zeros((series, channels))

    def add(self, series: int, channel: int, x_P: Values) -> None:
        """Count the values of a block; `x_P` is used up."""
        if x_P.size:
            mean = x_P.mean()
            x_P -= mean
            self._merge((series, channel), x_P.size, mean, x_P @ x_P)

    @classmethod
    def restored(cls, arrays: Mapping[str, Values]) -> Moments:
        """Make them from what `arrays` returned."""
        moments = cls(*arrays["count"].shape)
        moments.count_SC, moments.mean_SC, moments.square_SC = (
            arrays[k] for k in ("count", "mean", "square")
        )
        return moments

    @property
    def arrays(self) -> dict[str, Values]:
        """All there is, to be kept on disk."""
        return {"count": self.count_SC, "mean": self.mean_SC, "square": self.square_SC}

    def merge(self, other: Moments) -> None:
        """Count what another has counted."""
        self._merge(..., other.count_SC, other.mean_SC, other.square_SC)

    def _merge(self, at: Any, count: Any, mean: Any, square: Any) -> None:
        """Join two parts: Chan, Golub and LeVeque 1983, The American Statistician 37, 242."""
        before, step = self.count_SC[at], mean - self.mean_SC[at]
        share = count / np.maximum(before + count, 1.0)
        self.square_SC[at] += square + step**2 * before * share
        self.mean_SC[at] += step * share
        self.count_SC[at] += count

    @property
    def std_SC(self) -> Values:
        """Standard deviation over all values so far (no Bessel correction)."""
        return np.asarray(np.sqrt(self.square_SC / np.maximum(self.count_SC, 1.0)))


@dataclass(frozen=True)
class Train:
    """The train period of some years, to be counted block by block; intervals in hours, times in s."""

    years: Years
    time_s: NDArray[np.int64]
    train_s: tuple[int, int]
    """First and last time that count."""
    intervals_h: tuple[int, ...]
    valid_CYX: dict[int, NDArray[np.bool_]]
    """Channel with a mask -> which points [Y, X] count."""

    @property
    def counts(self) -> NDArray[np.bool_]:
        """Which times are inside."""
        return (self.time_s >= self.train_s[0]) & (self.time_s <= self.train_s[1])

    def moments(self, start: int, stop: int, beat: Callable[[], None] = lambda: None) -> Moments:
        """Count times `start` to `stop`, and their changes since earlier times, from other blocks too.

        Series 0 is the state, the others are the changes over each interval.

        Args:
            beat: called after every time of a row of windows.
        """
        total = Moments(1 + len(self.intervals_h), self.years.shape[1])
        inside = [n for n in range(start, stop) if self.counts[n]]
        starts_s = np.unique([self.time_s[inside] - hours * HOUR_S for hours in self.intervals_h])
        before = np.flatnonzero(self.counts[:start] & np.isin(self.time_s[:start], starts_s)).tolist()
        for top in range(0, self.years.shape[2], self.years.window):
            total.merge(self._band(top, before, inside, beat))
        return total

    def _band(
        self, top: int, before: Sequence[int], inside: Sequence[int], beat: Callable[[], None]
    ) -> Moments:
        """Count one row of windows."""
        _, channels, _, cols = self.years.shape
        moments = Moments(1 + len(self.intervals_h), channels)
        rows = slice(top, top + self.years.window)
        valid = {channel: valid_YX[rows].ravel() for channel, valid_YX in self.valid_CYX.items()}
        recent: dict[int, NDArray[np.float32]] = {}
        longest_s = max(self.intervals_h) * HOUR_S
        for index in (*before, *inside):
            now_s = int(self.time_s[index])
            x_CYX = self.years.read(index, (top, 0), (self.years.window, cols))
            then = [recent.get(now_s - hours * HOUR_S) for hours in self.intervals_h]
            for channel in range(channels) if index not in before else ():
                valid_P = valid.get(channel, slice(None))
                x_P = x_CYX[channel].ravel()[valid_P].astype(np.float64)
                for series, then_CYX in enumerate(then, 1):
                    if then_CYX is not None:
                        moments.add(series, channel, x_P - then_CYX[channel].ravel()[valid_P])
                moments.add(0, channel, x_P)
            recent = {then_s: x for then_s, x in recent.items() if then_s > now_s - longest_s}
            recent[now_s] = x_CYX
            beat()
        return moments

    def statistics(self, parts: Iterable[Moments], names: Sequence[str]) -> Statistics:
        """Join the blocks, in their order, to the statistics.

        Raises:
            StoreError: a channel or its change over an interval does not vary; an interval has no pair.
        """
        total = Moments(1 + len(self.intervals_h), len(names))
        for moments in parts:
            total.merge(moments)
        first, last = self.time_s[self.counts][[0, -1]].tolist()
        statistics = Statistics(
            total.mean_SC[0],
            total.std_SC[0],
            dict(zip(self.intervals_h, total.mean_SC[1:])),
            dict(zip(self.intervals_h, total.std_SC[1:])),
            (np.datetime64(first, "s"), np.datetime64(last, "s")),
        )
        check(statistics, names, dict(zip(self.intervals_h, total.count_SC[1:])))
        return statistics


def compute(
    train: Train,
    names: Sequence[str],
    blocks: Sequence[tuple[int, int]],
    processes: int = 1,
    advance: Callable[[int], None] = lambda times: None,
) -> Statistics:
    """Stream over the fields of the train period and return their statistics.

    Args:
        blocks: first and one past the last number of the times of every block.
        processes: how many blocks are worked on at once; the result does not depend on it.
        advance: called with the times done after every block, for a progress bar.

    Raises:
        StoreError: as `Train.statistics`.
    """
    train.years.close()  # no open file goes to another process
    context = multiprocessing.get_context("forkserver")
    parts = []
    with ProcessPoolExecutor(processes, context) if processes > 1 else nullcontext() as pool:
        results = (pool.map if pool else map)(train.moments, *zip(*blocks))
        for (start, stop), moments in zip(blocks, results):
            parts.append(moments)
            advance(stop - start)
    return train.statistics(parts, names)


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
