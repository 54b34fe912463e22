"""Hours of day and days of year, and which times of a period count for them with which weight.

A *slot* is an hour of day and a day of year, 1 to 366. Its samples are the times of the period at the same
hour whose day of year lies within 30 days on a circle of 366, with weights that fall in a straight line from
1 on the day itself to 0 at 30 days: the window of 61 days of WeatherBench 2, whose end weights are zero
(Rasp et al. 2024). A period shorter than a year cannot tell the days of the year apart: its slots are hours
of day, day 0, and all times at that hour count the same.

Legend: S slots, D days, n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Period = tuple[np.datetime64, np.datetime64]

YEAR_DAYS = 366
HALF_WINDOW_DAYS = 30
_SHORTEST = np.timedelta64(364, "D")


class Slot(NamedTuple):
    """An hour of day, as seconds since midnight UTC, and a day of year from 1."""

    second: int
    day: int


def second_of_day(times: NDArray[np.datetime64]) -> NDArray[np.int64]:
    """Return the seconds since midnight UTC."""
    return (times.astype("datetime64[s]") - times.astype("datetime64[D]")).astype(np.int64)


def day_of_year(times: NDArray[np.datetime64]) -> NDArray[np.int64]:
    """Return the days of the year, 1 to 366; 1 March is 60, in a leap year 61."""
    return (times.astype("datetime64[D]") - times.astype("datetime64[Y]")).astype(np.int64) + 1


def slots_of(times: NDArray[np.datetime64]) -> list[Slot]:
    """Return the slot of every time."""
    flat = np.asarray(times).ravel()
    return [Slot(*pair) for pair in zip(second_of_day(flat).tolist(), day_of_year(flat).tolist())]


def needed_slots(valid_times: NDArray[np.datetime64]) -> tuple[Slot, ...]:
    """Return the slots a climatology must have for these valid times, each once, in order."""
    return tuple(sorted(set(slots_of(valid_times))))


def window_weight(days_apart: NDArray[np.int64]) -> Array:
    """Return the weight of samples so many days of the year from a slot, on a circle of 366 days."""
    around = np.abs((days_apart + YEAR_DAYS // 2) % YEAR_DAYS - YEAR_DAYS // 2)
    return np.maximum(0.0, 1.0 - around / HALF_WINDOW_DAYS)


@dataclass(frozen=True)
class Samples:
    """The times of a period as samples of slots.

    Args:
        times: all times of a store.
        period: first and last time, both included.
    """

    times: NDArray[np.datetime64]
    period: Period

    @property
    def seasonal(self) -> bool:
        """Whether the period is long enough to tell the days of the year apart."""
        return bool(self.period[1] - self.period[0] >= _SHORTEST)

    @cached_property
    def by_slot(self) -> dict[Slot, NDArray[np.intp]]:
        """Numbers of the times of each slot; day 0 for all days where the period is short."""
        inside = np.flatnonzero((self.times >= self.period[0]) & (self.times <= self.period[1]))
        groups: dict[Slot, list[int]] = {}
        for number, slot in zip(inside.tolist(), slots_of(self.times[inside])):
            groups.setdefault(slot if self.seasonal else Slot(slot.second, 0), []).append(number)
        return {slot: np.array(numbers) for slot, numbers in groups.items()}

    def days(self, second: int) -> NDArray[np.int64]:
        """Return the days of the year that have a sample at an hour of day.

        Raises:
            ValueError: the period has none at this hour.
        """
        days = np.array(sorted(slot.day for slot in self.by_slot if slot.second == second), dtype=np.int64)
        if not len(days):
            clock = f"{second // 3600:02d}:{second // 60 % 60:02d}"
            raise ValueError(f"no time at {clock} UTC in the period {self.period[0]} .. {self.period[1]}")
        return days

    def weights(self, slots: Sequence[Slot]) -> tuple[NDArray[np.int64], Array]:
        """Return the days [D] with a sample of any of these slots, and the weights [S, D] of one sample.

        Args:
            slots: slots of one hour of day.

        Raises:
            ValueError: a slot has no sample.
        """
        days = self.days(slots[0].second)
        if not self.seasonal:
            return days, np.ones((len(slots), 1))
        weight_SD = window_weight(days - np.array([slot.day for slot in slots])[:, None])
        empty = np.flatnonzero(~(weight_SD > 0).any(axis=1))
        if len(empty):
            raise ValueError(
                f"the period {self.period[0]} .. {self.period[1]} has no time within 30 days of day "
                f"{slots[empty[0]].day} of the year at {slots[0].second // 3600:02d} UTC"
            )
        used = (weight_SD > 0).any(axis=0)
        return days[used], weight_SD[:, used]

    def of(self, slot: Slot) -> tuple[NDArray[np.intp], Array]:
        """Return the numbers [n] of the times of a slot's window and their weights [n], all positive."""
        days, weight_SD = self.weights([slot])
        numbers = [self.by_slot[Slot(slot.second, int(day))] for day in days]
        weights = [np.full(len(group), weight) for group, weight in zip(numbers, weight_SD[0])]
        return np.concatenate(numbers), np.concatenate(weights)


def draw_times(samples: Samples, valid: np.datetime64, members: int, seed: int = 0) -> NDArray[np.intp]:
    """Return the numbers of times that make an ensemble of climatology for a valid time: [members].

    They are drawn without repetition from the samples of the slot of `valid`, by their weights, keyed by
    (seed, valid). Scored as an ensemble it has a spread/skill ratio near 1 where the period is many years of
    the same climate: a test of the whole chain, and the opponent of a probabilistic forecast.

    Raises:
        ValueError: the slot has fewer samples than members.
    """
    slot = slots_of(np.array([valid]))[0]
    numbers, weight_n = samples.of(slot if samples.seasonal else Slot(slot.second, 0))
    if len(numbers) < members:
        raise ValueError(
            f"{members} members of climatology from {len(numbers)} times in the window of {valid}"
        )
    moment = int(valid.astype("datetime64[s]").astype(np.int64))
    rng = np.random.default_rng([seed, moment & 0xFFFFFFFF, moment >> 32 & 0xFFFFFFFF])
    return np.asarray(rng.choice(numbers, members, replace=False, p=weight_n / weight_n.sum()))
