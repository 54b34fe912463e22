"""Climatology as WeatherBench 2 defines it: mean, spread and quantiles by hour of day and day of year.

Every slot is the weighted mean of the samples in its window of 61 days (aeris/scores/slots.py). A period
shorter than a year has no annual cycle: every slot is then the plain mean of its hour of day, and says so.

Legend: S slots, D days, C channels, Y rows, X cols, n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aeris.scores.quantiles import weighted_quantiles
from aeris.scores.slots import Period, Samples, Slot, needed_slots, slots_of

__all__ = ["About", "Build", "Climatology", "build", "needed_slots"]

Fields = NDArray[np.float32]
Array = NDArray[np.float64]

MEMORY_BYTES = 2 * 2**30
"""What a build may hold at a time by default; with less, fields are read more than once."""


class Readable(Protocol):
    """What is needed of a store: its times and its fields."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def times(self) -> NDArray[np.datetime64]: ...

    def read(self, index: int) -> Fields: ...


@dataclass(frozen=True)
class About:
    """What a climatology is the mean of."""

    period: Period | None
    """First and last time, both included; None where a file does not say."""
    times_used: int
    seasonal: bool
    """Whether it goes by day of year; if not, by hour of day alone."""
    origin: str
    """Store or file it comes from."""

    def text(self) -> str:
        """Say what it is, for a table."""
        span = "period not stated"
        if self.period is not None:
            start, end = (str(time.astype("datetime64[D]")) for time in self.period)
            span = f"{start} .. {end}"
        if not self.seasonal:
            return (
                f"mean by hour of day, {span}, {self.times_used} times (shorter than a year: no annual cycle)"
            )
        used = f", {self.times_used} times" if self.times_used else ""
        return f"by hour and day of year, 61-day triangular window, {span}{used}"

    def inside(self, valid_times: NDArray[np.datetime64]) -> int:
        """Return how many of the times lie in the period, where the climatology knows the answer."""
        if self.period is None:
            return 0
        return int(((valid_times >= self.period[0]) & (valid_times <= self.period[1])).sum())


class Climatology:
    """Mean, standard deviation and quantiles [C, Y, X] by slot; fields come from memory or from a file.

    Args:
        about: what it is the mean of.
        names: channels, in the order of the fields.
        slots: the slots it has.
        quantiles: the quantiles it has, 0 to 1.
        fields: returns a field [C, Y, X] by kind (`mean`, `std`, or `q` and the quantile as %g) and slot.
    """

    def __init__(
        self,
        about: About,
        names: Sequence[str],
        slots: Sequence[Slot],
        quantiles: Sequence[float],
        fields: Callable[[str, Slot], Fields],
    ) -> None:
        self.about, self.names = about, tuple(names)
        self.slots, self.quantiles = frozenset(slots), tuple(quantiles)
        self._fields = fields

    def describe(self) -> str:
        """Say what this climatology is, for a table."""
        return self.about.text()

    def at(self, time: np.datetime64) -> Fields:
        """Return the mean field [C, Y, X] of a time.

        Raises:
            ValueError: the climatology has no such slot.
        """
        return self._at("mean", time)

    def std_at(self, time: np.datetime64) -> Fields:
        """Return the standard deviation [C, Y, X] of single times about the mean; see `at`."""
        return self._at("std", time)

    def quantile_at(self, time: np.datetime64, quantile: float) -> Fields:
        """Return a quantile [C, Y, X], NaN for channels it was not built for; see `at`.

        Raises:
            ValueError: the climatology has no such slot or quantile.
        """
        if not any(np.isclose(quantile, known) for known in self.quantiles):
            known_text = " ".join(f"{known:g}" for known in self.quantiles) or "none"
            raise ValueError(f"the climatology has no quantile {quantile:g}; it has {known_text}")
        return self._at(f"q{quantile:g}", time)

    def _at(self, kind: str, time: np.datetime64) -> Fields:
        slot = slots_of(np.array([time]))[0]
        if slot not in self.slots:
            raise ValueError(
                f"the climatology has no day {slot.day} of the year at {slot.second // 3600:02d} UTC, "
                f"which {time} needs; it has {len(self.slots)} slots"
            )
        return self._fields(kind, slot)

    def field(self, kind: str, slot: Slot) -> Fields:
        """Return the field of a slot: `mean`, `std`, or `q` and the quantile as %g."""
        return self._fields(kind, slot)

    def without(self, valid_times: NDArray[np.datetime64]) -> list[Slot]:
        """Return the slots of these times it does not have."""
        return [slot for slot in needed_slots(valid_times) if slot not in self.slots]

    def widened(self, names: Sequence[str]) -> Climatology:
        """Return it for the channels `names`, with NaN for those it lacks, such as wind speeds."""
        places = [self.names.index(name) if name in self.names else -1 for name in names]

        def fields(kind: str, slot: Slot) -> Fields:
            x_CYX = self._fields(kind, slot)
            wide_CYX = np.full((len(places), *x_CYX.shape[1:]), np.nan, dtype=np.float32)
            for number, place in enumerate(places):
                if place >= 0:
                    wide_CYX[number] = x_CYX[place]
            return wide_CYX

        return Climatology(self.about, names, tuple(self.slots), self.quantiles, fields)


@dataclass(frozen=True)
class Build:
    """How a climatology is made: what is read how often, and what that takes.

    Args:
        store: where to read.
        period: first and last time to use, both included: the training period, as a rule.
        slots: what to make; see `needed_slots`.
        channels: channels of the store to keep, in order.
        quantiles: quantiles to make beside mean and standard deviation.
        quantile_channels: the ones of `channels` (by place in it) that get quantiles; none means all.
        memory_bytes: what sums and samples may take at a time.
    """

    store: Readable
    period: Period
    slots: tuple[Slot, ...]
    channels: tuple[int, ...]
    quantiles: tuple[float, ...] = ()
    quantile_channels: tuple[int, ...] = ()
    memory_bytes: int = MEMORY_BYTES

    @cached_property
    def samples(self) -> Samples:
        """The times of the period by slot."""
        return Samples(self.store.times, self.period)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and cols of a field."""
        _, rows, cols = self.store.read(0).shape
        return len(self.channels), rows, cols

    @cached_property
    def _kinds(self) -> tuple[Slot, ...]:
        """The slots that differ: of a short period, one for each hour of day."""
        if self.samples.seasonal:
            return tuple(sorted(set(self.slots)))
        return tuple(sorted({Slot(slot.second, 0) for slot in self.slots}))

    def kind(self, slot: Slot) -> Slot:
        """Return the slot whose fields serve for a slot."""
        return slot if self.samples.seasonal else Slot(slot.second, 0)

    def groups(self) -> list[list[Slot]]:
        """Return the slots whose sums are kept at a time: of one hour of day, as many as memory holds."""
        most = max(1, self.memory_bytes // (2 * 8 * int(np.prod(self.shape))))
        found: list[list[Slot]] = []
        for slot in self._kinds:
            if not found or len(found[-1]) == most or found[-1][0].second != slot.second:
                found.append([])
            found[-1].append(slot)
        return found

    @property
    def quantile_places(self) -> tuple[int, ...]:
        """Places in `channels` of those that get quantiles."""
        return self.quantile_channels or tuple(range(len(self.channels)))

    def bands(self) -> list[slice]:
        """Return the rows whose samples are kept at a time for quantiles."""
        most = max(len(self.samples.of(slot)[0]) for slot in self._kinds)
        # the samples of a window; of one channel their order, weights and shares
        row_bytes = most * self.shape[2] * (4 * len(self.quantile_places) + 48)
        rows = max(1, self.memory_bytes // row_bytes)
        return [slice(first, first + rows) for first in range(0, self.shape[1], rows)]

    @cached_property
    def times_used(self) -> int:
        """Number of times of the period that enter."""
        return len({int(n) for slot in self._kinds for n in self.samples.of(slot)[0]})

    @cached_property
    def reads(self) -> int:
        """Number of fields to read: each time once for every group of slots and band of rows it serves."""
        count = 0
        for group in self.groups():
            days, _ = self.samples.weights(group)
            count += sum(len(self.samples.by_slot[Slot(group[0].second, int(day))]) for day in days)
        return count + (self.times_used * len(self.bands()) if self.quantiles else 0)

    @property
    def result_bytes(self) -> int:
        """Size of the climatology in memory."""
        points = self.shape[1] * self.shape[2]
        fields = 2 * len(self.channels) + len(self.quantiles) * len(self.quantile_places)
        return 4 * points * fields * len(self._kinds)

    def run(self, advance: Callable[[], None] = lambda: None) -> Climatology:
        """Read and reduce; `advance` is called after every field, `reads` times.

        Raises:
            ValueError: the period has no sample for a slot.
        """
        fields: dict[tuple[str, Slot], Fields] = {}
        for group in self.groups():
            fields |= self._moments(group, advance)
        if self.quantiles:
            fields |= self._quantiles(advance)
        about = About(
            self.period, self.times_used, self.samples.seasonal, str(getattr(self.store, "path", ""))
        )
        names = [self.store.names[channel] for channel in self.channels]
        return Climatology(
            about, names, self.slots, self.quantiles, lambda kind, slot: fields[kind, self.kind(slot)]
        )

    def _moments(self, group: Sequence[Slot], advance: Callable[[], None]) -> dict[tuple[str, Slot], Fields]:
        """Return mean and standard deviation of slots of one hour of day, every time read once."""
        second = group[0].second
        days, weight_SD = self.samples.weights(group)
        numbers_D = [self.samples.by_slot[Slot(second, int(day))] for day in days]
        total_S = np.zeros(len(group))
        # in order of days and point by point: which slots are made together does not change a bit
        sums_S2CYX = np.zeros((len(group), 2, *self.shape))
        share_2CYX = np.empty((2, *self.shape))
        for numbers, weight_S in zip(numbers_D, weight_SD.T):
            day_2CYX = np.zeros((2, *self.shape))
            for number in numbers:
                x_CYX = self._read(int(number))
                day_2CYX[0] += x_CYX
                day_2CYX[1] += x_CYX**2
                advance()
            total_S += weight_S * len(numbers)
            for place in np.flatnonzero(weight_S > 0):
                sums_S2CYX[place] += np.multiply(day_2CYX, weight_S[place], out=share_2CYX)
        fields: dict[tuple[str, Slot], Fields] = {}
        for sums_2CYX, total, slot in zip(sums_S2CYX, total_S, group):
            mean_CYX, square_CYX = sums_2CYX / total
            fields["mean", slot] = mean_CYX.astype(np.float32)
            fields["std", slot] = np.sqrt(np.maximum(square_CYX - mean_CYX**2, 0.0)).astype(np.float32)
        return fields

    def _read(self, number: int) -> Array:
        return self.store.read(number)[list(self.channels)].astype(np.float64)

    def _quantiles(self, advance: Callable[[], None]) -> dict[tuple[str, Slot], Fields]:
        """Return the quantiles of all slots; the samples of one window are in memory for a band of rows."""
        places = list(self.quantile_places)
        wanted = [self.channels[place] for place in places]
        fields = {
            (f"q{quantile:g}", slot): np.full(self.shape, np.nan, dtype=np.float32)
            for quantile in self.quantiles
            for slot in self._kinds
        }
        for rows in self.bands():
            held: dict[int, Fields] = {}
            left = self._last_use()
            for slot in self._kinds:
                numbers, weight_n = self.samples.of(slot)
                for number in numbers.tolist():
                    if number not in held:
                        held[number] = self.store.read(number)[wanted, rows].copy()
                        advance()
                found = self._of_window([held[number] for number in numbers.tolist()], weight_n)
                for quantile, field in zip(self.quantiles, found):
                    fields[f"q{quantile:g}", slot][places, rows] = field
                for number in numbers.tolist():
                    if left[number] == slot:
                        del held[number]
        return fields

    def _last_use(self) -> dict[int, Slot]:
        """Return the last slot every time is a sample of."""
        return {number: slot for slot in self._kinds for number in self.samples.of(slot)[0].tolist()}

    def _of_window(self, samples: Sequence[Fields], weight_n: Array) -> Fields:
        """Return the quantiles [Q, c, y, x] of the samples [c, y, x] of one window."""
        found_QcP = np.stack(
            [
                weighted_quantiles(np.stack([x[c].ravel() for x in samples]), weight_n, self.quantiles)
                for c in range(len(samples[0]))
            ],
            axis=1,
        )
        return found_QcP.reshape(len(self.quantiles), *samples[0].shape).astype(np.float32)


def build(
    store: Readable,
    period: Period,
    slots: Sequence[Slot],
    channels: Sequence[int],
    quantiles: Sequence[float] = (),
    advance: Callable[[], None] = lambda: None,
) -> Climatology:
    """Make a climatology; see `Build`, which also tells the reads and the memory beforehand."""
    return Build(store, period, tuple(slots), tuple(channels), tuple(quantiles)).run(advance)
