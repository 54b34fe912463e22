"""Samples for one rank: which images, who reads them, and how they are handed on.

Only the first and the last stage need samples. Of the ranks that share windows one reads them whole, since a
window is a chunk on disk, and sends the others their tokens. Stages between get the numbers of the images.

Shapes: B batch, N windows, T tokens per window, C channels, F forcings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aeris.config import RunConfig
from aeris.data.forcing import FORCINGS
from aeris.data.loader import Sample, SampleDataset, make_loader
from aeris.data.store import Store
from aeris.parallelize import Seat
from swipe.collectives import DATA_TAG, Message, Pending, exchange
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


def read_samples(config: RunConfig, store: Store, seat: Seat, images: ImageOrder) -> Iterable[Sample]:
    """Give this rank its tokens of every microbatch, [B, N, T, C].

    Crosses the sp axis: a reader sends each other rank 1 / sp of what it reads.
    """
    if not (seat.first or seat.last):
        return _numbers_only(images)
    if seat.at.sp > 0:
        return _from_reader(seat, images, len(store.names))
    period = store.statistics.train_period
    shard, data = seat.layout.shard.whole, config.data
    dataset = SampleDataset(store.path, data.interval_h, shard, config.train.seed, period, data.roll)
    pin_memory = seat.device.type != "cpu"
    loader = make_loader(dataset, images, images.microbatch, data.workers, pin_memory)
    return loader if seat.dims.sp == 1 else _hand_on(loader, seat)


def _numbers_only(images: ImageOrder) -> Iterator[Sample]:
    nothing = torch.empty(0)
    numbers = iter(images)
    for _ in range(len(images) // images.microbatch):
        image_B = torch.tensor([next(numbers) for _ in range(images.microbatch)], dtype=torch.int64)
        yield Sample(nothing, nothing, nothing, image_B)


def _hand_on(loader: Iterable[Sample], seat: Seat) -> Iterator[Sample]:
    """Read samples, send the other ranks of the sp axis their tokens, and keep the first part.

    Between CPUs, whatever the ranks compute on: a message that is expected for long would occupy a device.
    """
    sending: list[Pending] = []
    for sample in loader:
        parts_RBNTC = split_tokens(torch.cat(sample[:3], dim=-1), seat.layout.shard)
        sends = [
            Message(rank, part, DATA_TAG)
            for rank, part in zip(seat.groups.reading.ranks[1:], parts_RBNTC[1:])
        ]
        for pending in sending:
            pending.wait()
        sending = [exchange(sends, [], "samples", group=seat.groups.reading)]
        yield _unpack(parts_RBNTC[0], sample.state_BNTC.shape[-1], sample.image_B)
    for pending in sending:
        pending.wait()


def split_tokens(x_BNTC: Tensor, shard: WindowShard) -> list[Tensor]:
    """Cut whole windows into the parts of the ranks that share them: sp times [B, N, T / sp, C]."""
    cut = x_BNTC.unflatten(2, shard.split(x_BNTC.shape[2]))  # [B, N, set, quadrant, strip, token, C]
    return [
        cut[:, :, rank // shard.strips, :, rank % shard.strips].flatten(2, 3).contiguous()
        for rank in range(shard.sp)
    ]


def _from_reader(seat: Seat, images: ImageOrder, channels: int) -> Iterator[Sample]:
    """Receive this rank's tokens from the reader; the next message is expected while the last one is used."""
    shape = (images.microbatch, *seat.layout.tokens_NT.shape, 2 * channels + len(FORCINGS))
    reader = seat.groups.reading.ranks[0]

    def expect() -> tuple[Tensor, Pending]:
        buffer = torch.empty(shape)
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
        yield _unpack(buffer, channels, numbered.image_B)


def _unpack(packed_BNTC: Tensor, channels: int, image_B: Tensor) -> Sample:
    state, residual, forcing = packed_BNTC.split(
        (channels, channels, packed_BNTC.shape[-1] - 2 * channels), dim=-1
    )
    return Sample(state, residual, forcing, image_B)
