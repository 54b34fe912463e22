"""One rank of a training run, compared with the oracle: what the tests of parity run in every process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from aeris.config import RunConfig
from aeris.data.loader import Sample
from aeris.data.store import Store, packaged_sample
from aeris.parallelize import choose_degrees, take_seat
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts
from aeris.step import Training, train_step
from swipe.sharding import local
from swipe.windows import WindowShard
from tests.parity.comparison import deviations, part_of
from tests.parity.oracle import Images, Step, Weights


class ImageStore:
    """As much of a store as a run asks for, made of images."""

    def __init__(self, images: Images) -> None:
        """Take names, grid and masks from the images."""
        self.names, self.latitude_deg = images.names, images.latitude_deg
        self.rows, self.cols = images.state_ICYX.shape[2:]
        self.masks, self.mask_CYX = {}, images.valid_CYX
        if images.valid_CYX is not None:
            self.masks = {name: valid for name, valid in zip(self.names, images.valid_CYX) if not valid.all()}

    def valid_windows(self, shard: WindowShard) -> np.ndarray:
        """Return the mask of a rank's tokens [N, T, C]."""
        return np.moveaxis(self.mask_CYX.reshape(len(self.names), -1)[:, shard.token_index()], 0, -1)


def compare(
    config: RunConfig, images: Images | None, initial: Weights, expected: list[Step]
) -> dict[str, float]:
    """Train this rank's part of a run and return how far each of its numbers is from the oracle's.

    The data are `images`, cut to the tokens of this rank, or without them the packaged sample as it is read.
    """
    store = Store(packaged_sample()) if images is None else ImageStore(images)
    counts = channel_counts(len(store.names))
    dims = choose_degrees(config, dist.get_world_size())
    seat = take_seat(config, counts, dims, dist.get_rank(), torch.device("cpu"))
    apart = {}
    with tempfile.TemporaryDirectory() as directory:
        run = Training(config, Path(directory), store, seat)  # type: ignore[arg-type]
        load(run, initial)
        last = len(expected) * config.train.batch
        order = ImageOrder(0, last, config.train.microbatch, dims.dp, seat.at.dp)
        samples = cut(run, images, order) if images else read(run, order)
        for number, there in enumerate(expected):
            step = train(run, samples)
            apart |= {f"step {number}: {key}": far for key, far in deviations(step, there).items()}
    return apart


def train(run: Training, samples: Iterator[Sample]) -> Step:
    """Take one step as the program does; return this rank's parts of it.

    The gradient before clipping is the clipped one over the factor, which follows from the norm.
    """
    record = train_step(run, samples)
    clip = min(1.0, run.config.train.clip / (record["grad_norm"] + 1e-6))
    parameters = dict(run.model.named_parameters())
    gradients = {name: p.grad / clip for name, p in parameters.items() if p.grad is not None}
    weights = {name: p.detach() for name, p in parameters.items()}
    return Step(record["loss"], record["grad_norm"], gradients, weights, run.ema.weights)


@torch.no_grad()
def load(run: Training, initial: Weights) -> None:
    """Start the weights and their average from `initial`."""
    for tensors in (dict(run.model.named_parameters()), run.ema.weights):
        for name, p in tensors.items():
            local(p).copy_(part_of(initial[name], p))


def cut(run: Training, images: Images, order: ImageOrder) -> Iterator[Sample]:
    """Cut this rank's tokens out of its images, microbatch by microbatch."""
    for numbers in torch.tensor(list(order)).split(order.microbatch):
        fields: list[Tensor] = [x[numbers % len(x)] for x in images[:3]]
        yield Sample(*map(run.layout.to_windows, fields), numbers)


def read(run: Training, order: ImageOrder) -> Iterator[Sample]:
    """Read this rank's samples as the program does, then go on in float64."""
    for sample in read_samples(run.config, run.store, run.seat, order):
        yield Sample(*(x.double() for x in sample[:3]), sample.image_B)
