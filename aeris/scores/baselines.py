"""Two forecasts anybody can make, to measure a real one against.

*Persistence* says that the weather stays as it is at the init time; read from the truth, it needs no code.
*Climatology* says that the weather is the mean of the training period at this grid point and hour of day.
It has no seasonal cycle: over a long period it is a weaker opponent than the 1990-2019 climatology by day of
year of WeatherBench 2, over a short one it knows the season of that period only. Tables say which it is.

Legend: C channels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Fields = NDArray[np.float32]


class Readable(Protocol):
    """What is needed of a store: its times and its fields."""

    @property
    def times(self) -> NDArray[np.datetime64]: ...  # noqa: D102

    def read(self, index: int) -> Fields: ...  # noqa: D102


def second_of_day(times: NDArray[np.datetime64]) -> NDArray[np.int64]:
    """Return the seconds since midnight UTC."""
    return (times.astype("datetime64[s]") - times.astype("datetime64[D]")).astype(np.int64)


@dataclass(frozen=True)
class Climatology:
    """Mean fields [C, Y, X] of a period by second of day."""

    period: tuple[np.datetime64, np.datetime64]
    times_used: int
    fields: Mapping[int, Fields]

    def at(self, time: np.datetime64) -> Fields:
        """Return the mean field for the hour of day of `time`."""
        return self.fields[int(second_of_day(np.array([time]))[0])]

    def describe(self) -> str:
        """Say what this climatology is, for a table."""
        start, end = (str(time.astype("datetime64[D]")) for time in self.period)
        return f"training-period mean by hour of day, {start} .. {end}, {self.times_used} times"


def climatology_times(
    times: NDArray[np.datetime64],
    period: tuple[np.datetime64, np.datetime64],
    seconds: Sequence[int],
    stride: int,
) -> dict[int, NDArray[np.intp]]:
    """Return, for every second of day asked for, the numbers of the times in `period` to average.

    Args:
        times: all times of the store.
        period: first and last time, both included.
        seconds: seconds of day a climatology is needed for.
        stride: take every stride-th time of each hour of day.

    Raises:
        ValueError: the period has no time at one of the hours.
    """
    inside = (times >= period[0]) & (times <= period[1])
    of_day = second_of_day(times)
    chosen = {}
    for second in sorted(set(seconds)):
        numbers = np.flatnonzero(inside & (of_day == second))[::stride]
        if not len(numbers):
            hour = f"{second // 3600:02d}:{second // 60 % 60:02d}"
            raise ValueError(f"no time at {hour} UTC in the training period {period[0]} .. {period[1]}")
        chosen[second] = numbers
    return chosen


def climatology(
    store: Readable,
    period: tuple[np.datetime64, np.datetime64],
    chosen: Mapping[int, NDArray[np.intp]],
    channels: Sequence[int],
    advance: Callable[[], None],
) -> Climatology:
    """Average the fields at the times of `climatology_times`, one field in memory beside the means.

    Args:
        store: where to read.
        period: the training period, for the description.
        chosen: numbers of times by second of day.
        channels: channels of the store to keep, in order.
        advance: called after every field.
    """
    fields: dict[int, Fields] = {}
    for second, numbers in chosen.items():
        total: Any = 0.0
        for number in numbers:
            total = total + store.read(int(number))[list(channels)].astype(np.float64)
            advance()
        fields[second] = np.asarray(total / len(numbers), dtype=np.float32)
    return Climatology(period, sum(map(len, chosen.values())), fields)
