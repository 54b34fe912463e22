"""Samples of training: a state with its past, and the states that follow it.

Sample i of a period has its last input at the i-th time whose past and future are all there; gaps are never
bridged. Image k of a run is a sample drawn by (seed, k) alone: place k modulo n of permutation k div n. So a
run that goes on at image k sees what it would have seen without a stop, whatever its batch, workers or ranks.

Shapes: B batch, T history, K targets, C levels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.normalisation import Stats
from aeris.aurora.training.missing import count_missing, fill_levels, fill_surface
from aeris.aurora.training.sources import Weather
from aeris.data.loader import permutation, read_ahead
from aeris.data.plan import read_period

PREFETCH = 2  # microbatches each worker has ready; a sample of 0.25 degrees and two targets is 1.1 GB


@dataclass(frozen=True)
class Sequence:
    """One microbatch."""

    input: Batch
    """Fields [B, T, H, W] and [B, T, C, H, W]; its times are those of the last inputs."""
    targets: tuple[Batch, ...]
    """The K states that follow, a step apart, each with a history of 1. Missing values are NaN."""
    images: tuple[int, ...]
    """Numbers of the images, [B]."""
    missing: tuple[int, int] = (0, 0)
    """Values of input and targets that the data lack, and all there are; counted where inputs are filled."""

    def to(self, device: str | torch.device) -> Sequence:
        """Move the fields to a device."""
        return replace(self, input=self.input.to(device), targets=tuple(b.to(device) for b in self.targets))

    def pin_memory(self) -> Sequence:
        """Copy the fields to memory that a GPU reads from without waiting."""
        return replace(
            self, input=self.input.pin_memory(), targets=tuple(b.pin_memory() for b in self.targets)
        )


class Sequences:
    """All samples of a period.

    Args:
        weather: where they are read from.
        period: first and last time a sample may touch, such as ("2020", "2021") or datetime64: the end of
            "2021" is its last second, and an empty text is the end of the weather.
        history: input states T.
        targets: states to predict K.
        step_h: hours from one state to the next, of the past as of the future.
        filling: location and scale of surface variables that replace the usual ones, where missing values of
            inputs and static variables are to be filled and counted as they are read; None: they stay.

    Attributes:
        starts: index in the weather of the last input of every sample, int64, rising.

    Raises:
        ValueError: the period is none, or no sample lies in it.
    """

    def __init__(
        self,
        weather: Weather,
        period: tuple[str | np.datetime64, str | np.datetime64] = ("", ""),
        history: int = 2,
        targets: int = 1,
        step_h: float = 6.0,
        filling: Stats | None = None,
    ) -> None:
        if history < 1 or targets < 0 or step_h <= 0:
            raise ValueError(
                f"a sample needs a history and a step above zero, not {history} states, {targets} targets "
                f"and {step_h} h"
            )
        self.weather, self.history, self.targets, self.filling = weather, history, targets, filling
        self._static = _static_of(weather)
        if filling is not None:
            self._static = {name: fill_surface(name, x, filling) for name, x in self._static.items()}
        self._step = np.timedelta64(round(step_h * 3600), "s")
        self._places = self._find(*read_period(period, weather.times))
        self.starts: NDArray[np.int64] = self._places[:, history - 1]

    def _find(self, start: np.datetime64, end: np.datetime64) -> NDArray[np.int64]:
        """Return the indices of every sample's times, int64 [n, T + K]."""
        times = self.weather.times
        first = np.flatnonzero((times >= start) & (times <= end))
        ahead = np.arange(self.history + self.targets) * self._step
        wanted = times[first][:, None] + ahead
        places = np.minimum(np.searchsorted(times, wanted), len(times) - 1)
        whole = ((times[places] == wanted) & (wanted <= end)).all(axis=1)
        if not len(first):
            raise ValueError(
                f"there are no data from {start} to {end}: the weather has {times[0]} to {times[-1]}"
            )
        if not whole.any():
            raise ValueError(
                f"from {start} to {end} no {self.history + self.targets} times are "
                f"{self._step.astype(int) / 3600:g} h apart: the weather has {len(times)} times, "
                f"{times[0]} to {times[-1]}"
            )
        return places[whole].astype(np.int64)

    @property
    def span(self) -> tuple[np.datetime64, np.datetime64]:
        """The first and the last time that samples touch, as input or target."""
        return self.weather.times[self._places.min()], self.weather.times[self._places.max()]

    def __len__(self) -> int:
        """Return the number of samples, the length of an epoch."""
        return len(self.starts)

    def sample_at(self, image: int, seed: int) -> int:
        """Return the sample that an image is, 0 <= i < len(self)."""
        epoch, place = divmod(image, len(self))
        return int(permutation(seed, epoch, len(self))[place])

    def indices(self, sample: int) -> tuple[int, ...]:
        """Return the numbers of the times of a sample in the weather, [T + K]."""
        return tuple(int(i) for i in self._places[sample])

    def __getitem__(self, sample: int) -> Sequence:
        """Read one sample as a microbatch of one; its image number is that of the sample."""
        return self.collate([self.read(sample, sample)])

    def read(self, sample: int, image: int) -> Read:
        """Read the fields of a sample, and fill its input if that is asked for."""
        fields = self.weather.read_many(self.indices(sample))
        surf, atmos = ({k: torch.from_numpy(x) for k, x in part.items()} for part in fields)
        counts = (0, 0)
        if self.filling is not None:
            counts = count_missing((*surf.values(), *atmos.values()))
        if self.filling is not None and counts[0]:
            past, levels = slice(self.history), self.weather.levels
            for name, x in surf.items():
                x[past] = fill_surface(name, x[past], self.filling)
            for name, x in atmos.items():
                x[past] = fill_levels(name, x[past], levels)
        return Read(surf, atmos, torch.tensor(sample), torch.tensor(image), torch.tensor(counts))

    def collate(self, samples: Several[Read]) -> Sequence:
        """Make a microbatch of samples read."""
        stacked: Read = default_collate(list(samples))
        return self.assemble(stacked)

    def assemble(self, read: Read) -> Sequence:
        """Cut what was read into input and targets; nothing is copied."""
        samples = [int(i) for i in read.sample]

        def cut(first: int, last: int) -> Batch:
            moments = self.weather.times[self._places[samples, last - 1]]
            surf = {name: x[:, first:last] for name, x in read.surf.items()}
            atmos = {name: x[:, first:last] for name, x in read.atmos.items()}
            return make_batch(self.weather, surf, atmos, list(moments), self._static)

        last = [self.history + k for k in range(self.targets + 1)]
        images = tuple(int(i) for i in read.image)
        missing, values = (int(n) for n in read.missing.sum(dim=0))
        targets = tuple(cut(one - 1, one) for one in last[1:])
        return Sequence(cut(0, last[0]), targets, images, (missing, values))


class Read(NamedTuple):
    """Samples as workers hand them on: no coordinates or static fields, which the reader has anyway."""

    surf: dict[str, Tensor]
    """[T + K, H, W] by name, with B in front once stacked."""
    atmos: dict[str, Tensor]
    """[T + K, C, H, W] by name, likewise."""
    sample: Tensor
    """int64, [B] once stacked."""
    image: Tensor
    """int64, [B] once stacked."""
    missing: Tensor
    """Values that the data lack, and all there are: int64 [2], [B, 2] once stacked."""


def make_batch(
    weather: Weather,
    surf: dict[str, Tensor],
    atmos: dict[str, Tensor],
    times: Several[np.datetime64],
    static: dict[str, Tensor] | None = None,
) -> Batch:
    """Add place, time and static fields (the weather's) to fields [B, T, H, W] and [B, T, C, H, W]."""
    moments = tuple(time.astype("datetime64[us]").item() for time in times)
    lat, lon = torch.from_numpy(weather.lat), torch.from_numpy(weather.lon)
    static = _static_of(weather) if static is None else dict(static)
    return Batch(surf, static, atmos, Metadata(lat, lon, moments, weather.levels))


def _static_of(weather: Weather) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in weather.statics.items()}


def read_batch(weather: Weather, indices: Several[int]) -> Batch:
    """Read states at rising times as one sample with a history, B = 1; its time is that of the last."""
    fields = weather.read_many(indices)
    surf, atmos = ({k: torch.from_numpy(x)[None] for k, x in part.items()} for part in fields)
    return make_batch(weather, surf, atmos, [weather.times[indices[-1]]])


def first_batch(weather: Weather, time: str | np.datetime64, history: int = 2, step_h: float = 6.0) -> Batch:
    """Read what a forecast from `time` starts from, B = 1.

    Raises:
        ValueError: that time, or one of the history before it, is not there.
    """
    ahead = np.arange(1 - history, 1) * np.timedelta64(round(step_h * 3600), "s")
    moments = np.datetime64(time).astype("datetime64[s]") + ahead
    found = [weather.index(moment) for moment in moments]
    places = [place for place in found if place is not None]
    if len(places) < history:
        lost = ", ".join(str(moment) for moment, place in zip(moments, found, strict=True) if place is None)
        raise ValueError(
            f"a forecast from {moments[-1]} needs {lost}, which is not there: the weather has "
            f"{len(weather)} times, {weather.times[0]} to {weather.times[-1]}"
        )
    return read_batch(weather, places)


def loader(
    sequences: Sequences,
    images: Iterable[int],
    microbatch: int,
    seed: int | None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Sequence]:
    """Read images in the order given, `microbatch` at a time.

    Args:
        sequences: the samples.
        images: numbers of the images of this rank, from any on.
        microbatch: samples B of one.
        seed: of the permutations; None: an image is the sample of its number.
        workers: processes that read ahead, each opening the weather for itself; 0 reads when asked.
        pin_memory: hand on fields in memory that a GPU reads from without waiting.
    """
    dataset = _Images(sequences, seed)
    for one in read_ahead(dataset, images, microbatch, workers, pin_memory, PREFETCH):
        yield sequences.assemble(one)


class _Images(Dataset[Read]):
    """Samples by the number of the image, any integer from 0; without a seed by their own number."""

    def __init__(self, sequences: Sequences, seed: int | None) -> None:
        self.sequences, self.seed = sequences, seed

    def __getitem__(self, image: int) -> Read:
        sample = image if self.seed is None else self.sequences.sample_at(image, self.seed)
        return self.sequences.read(sample, image)
