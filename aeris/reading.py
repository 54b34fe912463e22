"""Samples for one rank: which images, who reads them, and how they are handed on.

Only the first and the last stage need samples. Of the ranks that share windows one reads them whole, since a
window is a chunk on disk, and sends the others their tokens. Stages between get the numbers of the images.

Shapes: B batch, N windows, T tokens per window, C channels, F forcings, X = 2 C + F.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aeris.config import RunConfig
from aeris.data.forcing import FORCINGS
from aeris.data.loader import Packed, Sample, SampleDataset, read_packed, start_workers, unpack
from aeris.data.store import Store
from aeris.data.yearfile import FIELD_BYTES
from aeris.parallelize import Seat
from swipe.backend import keep_freed_memory
from swipe.collectives import DATA_TAG, Message, Pending, exchange
from swipe.mesh import ParallelDims
from swipe.windows import WindowShard


@dataclass(frozen=True)
class ImageOrder:
    """The images of one data-parallel rank, in order: microbatch j of a step is dealt to rank j modulo dp.

    Iterates over the numbers of single images, so a loader can batch them.
    """

    first: int
    last: int
    microbatch: int
    dp: int = 1
    dp_rank: int = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return (self.last - self.first) // self.dp

    def __iter__(self) -> Iterator[int]:
        """List them."""
        stride = self.microbatch * self.dp
        for start in range(self.first + self.dp_rank * self.microbatch, self.last, stride):
            yield from range(start, start + self.microbatch)


class StepReading(NamedTuple):
    """What a step reads from the file system."""

    readers: int
    """Ranks that read: sp 0 of the first and of the last stage."""
    bytes_each: int
    """Bytes every one of them reads in a step."""

    @property
    def total(self) -> int:
        """Bytes of a step, all ranks together."""
        return self.readers * self.bytes_each


def states_read(config: RunConfig) -> int:
    """Return how many states are read for an image: two, and two for the error of a state."""
    return 4 if config.diffusion.state_error else 2


def read_bytes(config: RunConfig, channels: int, dims: ParallelDims) -> StepReading:
    """Count what a step reads: the states of each of its images, on the first and again on the last stage.

    Windows are taken to be chunks of the store, so nothing else is read. A turned globe (`data.roll`) has
    windows across two chunks; where a rank does not hold all windows of a row, that is twice the bytes.
    """
    model, wp = config.model, dims.wp_y * dims.wp_x
    chunks = 2 if config.data.roll and dims.wp_x > 1 else 1
    state_bytes = channels * (model.rows * model.cols // wp) * FIELD_BYTES
    states = config.train.batch // dims.dp * states_read(config)
    return StepReading(dims.dp * wp * min(dims.pp, 2), states * chunks * state_bytes)


def start_reading(config: RunConfig, seat: Seat) -> None:
    """Let data workers get ready, on ranks that have any, while the run is built; may be left out."""
    if config.data.workers and seat.at.sp == 0 and (seat.first or seat.last):
        start_workers()


class Part(NamedTuple):
    """A rank's tokens of a microbatch: state, residual and forcings side by side."""

    tokens_BNTX: Tensor
    image_B: Tensor
    """Numbers of the images, int64, always on the host."""


def open_samples(config: RunConfig, store: Store, shard: WindowShard) -> SampleDataset:
    """Open a run's samples on the windows of a shard.

    Raises:
        ValueError: the store has no such pairs or statistics, or cannot be rolled.
    """
    return SampleDataset(
        store.path,
        config.data.interval_h,
        shard,
        config.train.seed,
        store.statistics.train_period,
        roll=config.data.roll,
        state_error=config.diffusion.state_error,
    )


def read_samples(config: RunConfig, store: Store, seat: Seat, images: ImageOrder) -> Iterable[Sample]:
    """Give this rank its tokens of every microbatch, [B, N, T, C], on its device.

    Crosses the sp axis: a reader sends each other rank 1 / sp of what it reads.
    """
    if not (seat.first or seat.last):
        return _numbers_only(images)
    channels, sp = len(store.names), seat.dims.sp
    pin_memory = seat.device.type != "cpu"
    if seat.at.sp > 0:
        parts = _from_reader(seat, images, channels, pin_memory)
    else:
        dataset = open_samples(config, store, seat.layout.shard.whole)
        # A worker frees and allocates the same large tensors for every image.
        packed = read_packed(
            dataset, images, images.microbatch, sp, config.data.workers, pin_memory, keep_freed_memory
        )
        parts = _hand_on(packed, seat)
    return (unpack(part, channels, image_B) for part, image_B in copy_ahead(parts, seat.device))


def _numbers_only(images: ImageOrder) -> Iterator[Sample]:
    nothing = torch.empty(0)
    numbers = iter(images)
    for _ in range(len(images) // images.microbatch):
        image_B = torch.tensor([next(numbers) for _ in range(images.microbatch)], dtype=torch.int64)
        yield Sample(nothing, nothing, nothing, image_B)


def copy_ahead(parts: Iterable[Part], device: torch.device) -> Iterator[Part]:
    """Bring tokens to the device; on an accelerator a microbatch ahead, beside what is computed.

    The copy has a stream of its own, and the stream that computes waits for it; the host waits for neither.
    """
    if device.type == "cpu":
        yield from parts
        return
    streams = torch.get_device_module(device)
    copying = streams.Stream(device=device)
    ready: tuple[Part, Any] | None = None
    for part in parts:
        with streams.stream(copying):
            there = part.tokens_BNTX.to(device, non_blocking=True)
        coming = Part(there, part.image_B), copying.record_event()
        if ready is not None:
            yield _claimed(*ready, streams.current_stream(device))
        ready = coming
    if ready is not None:
        yield _claimed(*ready, streams.current_stream(device))


def _claimed(part: Part, copied: Any, computing: Any) -> Part:
    """Let the computing stream wait for a copy, and keep its memory until that stream is done with it."""
    computing.wait_event(copied)
    part.tokens_BNTX.record_stream(computing)
    return part


def _hand_on(samples: Iterable[Packed], seat: Seat) -> Iterator[Part]:
    """Read samples, send the other ranks of the sp axis their tokens, and keep the first part.

    Between CPUs, whatever the ranks compute on: a message that is expected for long would occupy a device.
    """
    others, group = (seat.groups.reading.ranks[1:], seat.groups.reading) if seat.dims.sp > 1 else ((), None)
    sending: list[Pending] = []
    for packed in samples:
        own, *rest = (part.contiguous() for part in packed.values_BRNTX.unbind(1))
        sends = [Message(rank, part, DATA_TAG) for rank, part in zip(others, rest)]
        for pending in sending:
            pending.wait()
        sending = [exchange(sends, [], "samples", group=group)] if sends else []
        yield Part(own, packed.image_B)
    for pending in sending:
        pending.wait()


def _from_reader(seat: Seat, images: ImageOrder, channels: int, pin_memory: bool) -> Iterator[Part]:
    """Receive this rank's tokens from the reader; the next message is expected while the last one is used."""
    shape = (images.microbatch, *seat.layout.tokens_NT.shape, 2 * channels + len(FORCINGS))
    reader = seat.groups.reading.ranks[0]

    def expect() -> tuple[Tensor, Pending]:
        buffer = torch.empty(shape, pin_memory=pin_memory)
        message = Message(reader, buffer, DATA_TAG)
        return buffer, exchange([], [message], "samples", group=seat.groups.reading)

    left = len(images) // images.microbatch
    coming = expect() if left else None
    for numbered in _numbers_only(images):
        assert coming is not None, "as many messages as microbatches"
        buffer, pending = coming
        pending.wait()
        left -= 1
        coming = expect() if left else None
        yield Part(buffer, numbered.image_B)
