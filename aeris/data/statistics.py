"""Mean and standard deviation of every channel, and of its changes, over the train period only.

One streaming pass in float64, a row of windows at a time, merged by Chan's parallel form of Welford's update:
memory stays that of a few bands, however many years there are. Points that a mask hides are left out. Every
grid point counts the same, as in the published statistics.

Shapes: S series, C channels, Y rows, X cols, P points of one row of windows.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.yearfile import StoreError, Years
from aeris.data.yearwriter import publish

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
class Band:
    """The work on one row of windows, for a process of its own; intervals in hours, times in s."""

    years: Years
    top: int
    time_s: NDArray[np.int64]
    inside: NDArray[np.int64]
    intervals_h: tuple[int, ...]
    valid_P: dict[int, NDArray[np.bool_]]
    """Channel with a mask -> which points of the band count."""

    def moments(self, advance: Callable[[], None] = lambda: None) -> Moments:
        """Stream over the times; series 0 is the state, the others are the changes over each interval."""
        _, channels, _, cols = self.years.shape
        moments = Moments(1 + len(self.intervals_h), channels)
        recent: dict[int, NDArray[np.float32]] = {}
        longest_s = max(self.intervals_h) * HOUR_S
        for index in self.inside:
            now_s = int(self.time_s[index])
            x_CYX = self.years.read(int(index), (self.top, 0), (self.years.window, cols))
            before = [recent.get(now_s - hours * HOUR_S) for hours in self.intervals_h]
            for channel in range(channels):
                valid_P = self.valid_P.get(channel, slice(None))
                x_P = x_CYX[channel].ravel()[valid_P].astype(np.float64)
                for series, then_CYX in enumerate(before, 1):
                    if then_CYX is not None:
                        moments.add(series, channel, x_P - then_CYX[channel].ravel()[valid_P])
                moments.add(0, channel, x_P)
            recent = {then_s: x for then_s, x in recent.items() if then_s > now_s - longest_s}
            recent[now_s] = x_CYX
            advance()
        return moments


def compute(
    years: Years,
    time_s: NDArray[np.int64],
    names: Sequence[str],
    train_s: tuple[int, int],
    intervals_h: Sequence[int],
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    advance: Callable[[], None] = lambda: None,
    processes: int = 1,
    keep: Path | None = None,
) -> Statistics:
    """Stream over the fields of the train period (seconds, both ends included) and return their statistics.

    Args:
        masks: channel with missing points -> [Y, X], True where a point is valid.
        advance: called once per band and time, for a progress bar.
        processes: how many bands are worked on at once; the result does not depend on it.
        keep: directory where finished bands are kept, for a run that is killed to go on.

    Raises:
        StoreError: a channel or its change over an interval does not vary; an interval has no pair of times.
    """
    inside = np.flatnonzero((time_s >= train_s[0]) & (time_s <= train_s[1]))
    total = Moments(1 + len(intervals_h), len(names))
    bands = []
    for top in range(0, years.shape[2], years.window):
        rows = slice(top, top + years.window)
        valid_P = {names.index(name): valid_YX[rows].ravel() for name, valid_YX in (masks or {}).items()}
        bands.append(Band(years, top, time_s, inside, tuple(intervals_h), valid_P))
    for moments in _work(bands, advance, processes, keep):
        total.merge(moments)
    statistics = Statistics(
        total.mean_SC[0],
        total.std_SC[0],
        dict(zip(intervals_h, total.mean_SC[1:])),
        dict(zip(intervals_h, total.std_SC[1:])),
        (np.datetime64(int(time_s[inside[0]]), "s"), np.datetime64(int(time_s[inside[-1]]), "s")),
    )
    check(statistics, names, dict(zip(intervals_h, total.count_SC[1:])))
    return statistics


def _work(
    bands: list[Band], advance: Callable[[], None], processes: int, keep: Path | None
) -> Iterator[Moments]:
    """Do the bands in order, or several at once, and skip those that are kept from before."""
    done = {band.top: keep / f"band{band.top}.npz" for band in bands} if keep else {}
    left = [band for band in bands if not (keep and done[band.top].exists())]
    bands[0].years.close()  # no open file goes to another process
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(processes, context) if processes > 1 else nullcontext() as pool:
        futures = {band.top: pool.submit(band.moments) for band in left} if pool else {}
        for band in bands:
            if band not in left:
                moments = _load(done[band.top])
            elif pool:
                moments = futures[band.top].result()
            else:
                moments = band.moments(advance)
            if band not in left or pool:
                for _ in band.inside:
                    advance()
            if keep and band in left:
                _save(done[band.top], moments)
            yield moments


def _save(path: Path, moments: Moments) -> None:
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        np.savez(file, count=moments.count_SC, mean=moments.mean_SC, square=moments.square_SC)
    publish(temporary, path)


def _load(path: Path) -> Moments:
    with np.load(path) as kept:
        moments = Moments(*kept["count"].shape)
        moments.count_SC, moments.mean_SC, moments.square_SC = kept["count"], kept["mean"], kept["square"]
    return moments


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
