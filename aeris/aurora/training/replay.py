"""A buffer of states the model has made itself, from which long roll-outs are learned one step at a time.

Every update draws a state (it stays), predicts one step from it, and puts the prediction back as a new state;
now and then a fresh one from the data joins, and when the buffer is full the oldest leaves. So the model
trains on its own states of all lead times at the cost of one step each (Bodnar et al. 2025).

Which state is drawn, replaced or fresh depends on seed and number of the update alone: a `Ledger` says it
without any field, so targets are read ahead, and a resumed run knows what its buffer held. Every place in the
batch has a buffer of its own, on whichever rank works there: a run does not depend on the number of ranks.

Shapes: T history, C levels, H rows, W columns; the batch dim of a state is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

import torch
from torch import Tensor

from aeris.aurora.batch import Batch
from aeris.aurora.training.config import ReplayConfig
from swipe import noise

DRAW_STREAM = 3  # which random numbers of an image: the state it draws


class State(NamedTuple):
    """What a slot of a buffer holds, without its fields."""

    time: int
    """Number of its newest time in the data."""
    steps: int
    """Model steps that made it; 0 for data."""


class Fresh(NamedTuple):
    """A state from the data, to be put into a slot."""

    slot: int
    time: int


class Draw(NamedTuple):
    """What one image of an update does with its buffer, in this order."""

    image: int
    fresh: tuple[Fresh, ...]
    """States that join before the draw."""
    slot: int
    """The state the step starts from."""
    state: State
    target: int
    """Number of the time that is predicted."""
    put: int | None
    """Slot for the prediction; None: it is dropped, as too far ahead or without a next target."""


@dataclass(frozen=True)
class Calendar:
    """What a ledger must know of the data.

    Attributes:
        sample_at: number of the newest input time of a training sample, for any number of an image.
        next_of: number of the time one model step after a time; None if the training data end there.
        step_h: hours of a model step.
    """

    sample_at: Callable[[int], int]
    next_of: Callable[[int], int | None]
    step_h: float


class Ledger:
    """The history of one buffer as plain numbers.

    Args:
        config: sizes and lead times.
        calendar: of the data.
        seed: of the run.
        place: of the batch this buffer belongs to.
        batch: images of an update.
    """

    def __init__(self, config: ReplayConfig, calendar: Calendar, seed: int, place: int, batch: int) -> None:
        """Start empty."""
        self.config, self.calendar, self.seed = config, calendar, seed
        self.place, self.batch = place, batch
        self.states: list[State] = []
        self._next_slot = 0
        self._fresh = 0  # states taken from the data so far
        self._updates = 0

    def advance(self) -> Draw:
        """Take one update."""
        image = self._updates * self.batch + self.place
        fresh = tuple(self._take_fresh() for _ in range(self._joining()))
        slot = noise.key(self.seed, DRAW_STREAM, image) % len(self.states)
        state = self.states[slot]
        target = self.calendar.next_of(state.time)
        assert target is not None, "a state without a target is not put"
        put, made = None, State(target, state.steps + 1)
        if (made.steps + 1) * self.calendar.step_h <= self._lead_h(image) and self._continues(target):
            put = self._put(made)
        self._updates += 1
        return Draw(image, fresh, slot, state, target, put)

    def _joining(self) -> int:
        """Count the fresh states of this update."""
        config = self.config
        if self._updates == 0:
            return config.at_first or max(1, round(config.size / (config.fresh_every + 1)))
        return int(self._updates % config.fresh_every == 0)

    def _lead_h(self, image: int) -> int:
        config = self.config
        return config.lead_h if image < config.later_from_images else config.later_lead_h

    def _continues(self, time: int) -> bool:
        return self.calendar.next_of(time) is not None

    def _take_fresh(self) -> Fresh:
        time = self.calendar.sample_at(self._fresh * self.batch + self.place)
        self._fresh += 1
        return Fresh(self._put(State(time, 0)), time)

    def _put(self, state: State) -> int:
        """Give a state a slot: a new one, or that of the oldest."""
        slot = self._next_slot
        self._next_slot = (slot + 1) % self.config.size
        if slot == len(self.states):
            self.states.append(state)
        else:
            self.states[slot] = state
        return slot


class Buffer:
    """The fields of one buffer, on the CPU, in memory of its own.

    While a checkpoint is written, its copy of all slots is in memory beside them: twice the fields.

    Args:
        ledger: says what is in it; drawn from here only.
        like: any input of the model, from which grid, levels, static fields, shapes and types are taken.
        clock: the time that a number stands for.
    """

    def __init__(self, ledger: Ledger, like: Batch, clock: Callable[[int], datetime]) -> None:
        """Make it empty."""
        self.ledger, self.clock = ledger, clock
        self.like = _on_cpu(like)
        self.slots: list[dict[str, Tensor]] = []

    def put(self, slot: int, batch: Batch) -> None:
        """Keep a copy of the fields of a state."""
        self._keep(slot, _fields(_on_cpu(batch)))

    def _keep(self, slot: int, fields: dict[str, Tensor]) -> None:
        types = _fields(self.like)
        # Copied: what a worker read is memory it shares or has pinned, and there is little of either.
        fields = {name: x.to(types[name].dtype, copy=True) for name, x in fields.items()}
        if slot == len(self.slots):
            self.slots.append(fields)
        else:
            self.slots[slot] = fields

    def state(self, draw: Draw) -> Batch:
        """Return the state of a draw as input of the model."""
        return _batch(self.like, self.slots[draw.slot], self.clock(draw.state.time), draw.state.steps)

    def put_prediction(self, draw: Draw, batch: Batch, truth: Batch) -> None:
        """Keep the prediction of a draw, as the next input; where it is not finite, the truth instead.

        A poisoned state would poison every later one; where the truth is missing too, the newest input stays.
        """
        if draw.put is None:
            return
        old, new, known = (_fields(one) for one in (self.state(draw), _on_cpu(batch), _on_cpu(truth)))
        for name, x in new.items():
            last = x[:, -1:]
            if not bool(torch.isfinite(last).all()):
                better = known.get(name, last).to(last.dtype)
                better = torch.where(torch.isfinite(better), better, old[name][:, -1:])
                new[name] = torch.cat((x[:, :-1], torch.where(torch.isfinite(last), last, better)), dim=1)
        self._keep(draw.put, new)

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor of the buffer, as `replay.<place>.<slot>.<variable>`."""
        place = self.ledger.place
        return {
            f"replay.{place}.{slot}.{name}": x
            for slot, fields in enumerate(self.slots)
            for name, x in fields.items()
        }

    def make_room(self, updates: int) -> None:
        """Bring an empty buffer to where it was after `updates`, with fields to be loaded into `tensors`."""
        for _ in range(updates):
            self.ledger.advance()
        shapes = _fields(self.like)
        self.slots = [{name: torch.empty_like(x) for name, x in shapes.items()} for _ in self.ledger.states]


def advance(ledgers: list[Ledger], updates: int) -> Iterator[Draw]:
    """List what the buffers of a rank do in the next updates, image by image."""
    for _ in range(updates):
        for ledger in ledgers:
            yield ledger.advance()


def _on_cpu(batch: Batch) -> Batch:
    return batch.to("cpu")


def _fields(batch: Batch) -> dict[str, Tensor]:
    surface = {f"surf.{name}": x for name, x in batch.surf_vars.items()}
    return surface | {f"atmos.{name}": x for name, x in batch.atmos_vars.items()}


def _batch(like: Batch, fields: dict[str, Tensor], time: datetime, steps: int) -> Batch:
    return replace(
        like,
        surf_vars={name: fields[f"surf.{name}"] for name in like.surf_vars},
        atmos_vars={name: fields[f"atmos.{name}"] for name in like.atmos_vars},
        metadata=replace(like.metadata, time=(time,), rollout_step=steps),
    )
