"""Samples for one rank: sequences of the data in a fixed order, or states of the replay buffers.

Every image is read by the rank that trains on it. A replay buffer is drawn from when its image's turn comes,
so that the prediction before it is there; what comes from disk is read ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from aeris.aurora.batch import Batch
from aeris.aurora.normalisation import Stats
from aeris.aurora.training.config import FineTuneConfig
from aeris.aurora.training.missing import count_missing, fill
from aeris.aurora.training.replay import Buffer, Calendar, Draw, Ledger, advance
from aeris.aurora.training.sequences import Sequences, first_batch, loader, read_batch
from aeris.aurora.training.sources import Weather, open_weather
from aeris.data.loader import read_ahead
from aeris.reading import ImageOrder


class Item(NamedTuple):
    """What one forward and backward pass works on, on the CPU or in pinned memory."""

    images: tuple[int, ...]
    """Numbers of the images."""
    input: Batch
    """Nothing is missing: it was filled where it was read."""
    targets: tuple[Batch, ...]
    """The truth at every step."""
    missing: tuple[int, int] = (0, 0)
    """Values that the data lack of what was read for this, and all that were read."""
    draw: Draw | None = None
    """Where the input comes from, in replay."""


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    weather: Weather
    training: Sequences
    validation: Sequences | None
    """None: nothing is validated."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a run that goes on must find again."""
        weather = self.weather
        return {
            "rows": len(weather.lat),
            "cols": len(weather.lon),
            "levels": [float(level) for level in weather.levels],
            "samples": len(self.training),
            "first sample": str(weather.times[self.training.starts[0]]),
        }


def open_data(config: FineTuneConfig) -> Data:
    """Open the data of a run.

    Raises:
        ValueError: they lack variables, levels or static fields of the model, a period has no sample, or
            training and validation share times.
    """
    data, steps = config.data, config.rollout.steps
    weather = open_weather(list(data.paths), config.aurora, data.static or None)
    history, step_h = config.aurora.max_history_size, config.aurora.timestep_h
    stats = _stats(config)
    training = Sequences(weather, data.train_period, history, steps, step_h, stats)
    validation = None
    if config.validate.every_images:
        judged = config.validate.steps or steps
        validation = Sequences(weather, data.validate_period, history, judged, step_h, stats)
        _check_apart(training, validation)
    return Data(weather, training, validation)


def _stats(config: FineTuneConfig) -> Stats:
    return config.aurora.stats


def _check_apart(training: Sequences, validation: Sequences) -> None:
    """Refuse to validate on times that are trained on."""
    (first, last), (start, end) = training.span, validation.span
    if start <= last and first <= end:
        raise ValueError(
            f"training, {first} to {last}, and validation, {start} to {end}, share times: move "
            "--train-period or --validate-period"
        )


def read_samples(config: FineTuneConfig, data: Data, images: ImageOrder, pin_memory: bool) -> Iterator[Item]:
    """Read the sequences of this rank."""
    train, workers = config.train, config.data.workers
    for sample in loader(data.training, images, train.microbatch, train.seed, workers, pin_memory):
        yield Item(sample.images, sample.input, sample.targets, sample.missing)


def read_validation(
    config: FineTuneConfig, data: Data, samples: Iterable[int], pin_memory: bool
) -> Iterator[Item]:
    """Read the validation samples of these numbers, one by one."""
    assert data.validation is not None, "asked for"
    for sample in loader(data.validation, samples, 1, None, config.data.workers, pin_memory):
        yield Item(sample.images, sample.input, sample.targets, sample.missing)


class Replay:
    """The replay buffers of a rank, one for each of its places in the batch."""

    def __init__(
        self, config: FineTuneConfig, data: Data, dtype: torch.dtype, rank: int = 0, world: int = 1
    ) -> None:
        """Start with empty buffers of fields of a type, that of the weights."""
        self.config, self.data = config, data
        batch, seed = config.train.batch, config.train.seed
        self.places = range(rank, batch, world)
        like = _inputs(config, data, int(data.training.starts[0]))[0].type(dtype)
        calendar = make_calendar(config, data)
        self.buffers = {
            place: Buffer(Ledger(config.replay, calendar, seed, place, batch), like, self._clock)
            for place in self.places
        }

    def make_room(self, images_seen: int) -> None:
        """Bring the buffers to where they were after some images, for `tensors` to be loaded into."""
        for buffer in self.buffers.values():
            buffer.make_room(images_seen // self.config.train.batch)

    def tensors(self) -> dict[str, Any]:
        """Name the tensors of this rank's buffers."""
        return {name: x for buffer in self.buffers.values() for name, x in buffer.tensors().items()}

    def read(self, updates: int, pin_memory: bool) -> Iterator[Item]:
        """Give the images of the next updates; between two, `keep` is called."""
        reads = _Reads(self.config, self.data)
        order = advance([buffer.ledger for buffer in self.buffers.values()], updates)
        workers = self.config.data.workers
        for draw, fresh, target, missing in read_ahead(reads, order, None, workers, pin_memory):
            buffer = self.buffers[draw.image % self.config.train.batch]
            for place, batch in zip(draw.fresh, fresh):
                buffer.put(place.slot, batch)
            yield Item((draw.image,), buffer.state(draw), (target,), missing, draw)

    def keep(self, draw: Draw, batch: Batch, truth: Batch) -> None:
        """Put a prediction, as the next input, into the buffer it was drawn from."""
        self.buffers[draw.image % self.config.train.batch].put_prediction(draw, batch, truth)

    def _clock(self, time: int) -> datetime:
        seconds = self.data.weather.times[time].astype("datetime64[s]").astype(int)
        return datetime.fromtimestamp(int(seconds), timezone.utc).replace(tzinfo=None)


def make_calendar(config: FineTuneConfig, data: Data) -> Calendar:
    """Tell a replay ledger which times there are; none behind the last target of the training samples."""
    training, times = data.training, data.weather.times
    step_h, seed = config.aurora.timestep_h, config.train.seed
    step = np.timedelta64(round(step_h * 3600), "s")
    last = times[training.starts].max() + step

    def next_of(time: int) -> int | None:
        after = times[time] + step
        return data.weather.index(after) if after <= last else None

    def sample_at(image: int) -> int:
        return int(training.starts[training.sample_at(image, seed)])

    return Calendar(sample_at, next_of, step_h)


class _Reads(Dataset[Any]):
    """What a draw needs from disk: (the draw, its fresh states, its target, missing values and all)."""

    def __init__(self, config: FineTuneConfig, data: Data) -> None:
        self.config, self.data = config, data

    def __getitem__(self, draw: Draw) -> tuple[Draw, tuple[Batch, ...], Batch, tuple[int, int]]:
        fresh = [_inputs(self.config, self.data, one.time) for one in draw.fresh]
        target = read_batch(self.data.weather, [draw.target])
        counts = (_count(target), *(counted for _, counted in fresh))
        missing, values = (sum(numbers) for numbers in zip(*counts))
        return draw, tuple(batch for batch, _ in fresh), target, (missing, values)


def _inputs(config: FineTuneConfig, data: Data, newest: int) -> tuple[Batch, tuple[int, int]]:
    """Read the input whose newest time is number `newest`, as a buffer keeps it; count what it lacked."""
    aurora = config.aurora
    time = data.weather.times[newest]
    batch = first_batch(data.weather, time, aurora.max_history_size, aurora.timestep_h)
    return fill(batch, _stats(config)).crop(aurora.patch_size), _count(batch)


def _count(batch: Batch) -> tuple[int, int]:
    return count_missing((*batch.surf_vars.values(), *batch.atmos_vars.values()))


def evenly(count: int, wanted: int) -> Sequence[int]:
    """Choose `wanted` of `count` places, evenly spread; all of them if 0 or too many are wanted."""
    if not wanted or wanted >= count:
        return range(count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
