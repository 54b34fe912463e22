"""The state of a run on one rank, and one optimizer step: noise, pipeline, clipping, AdamW, average.

Everything random is keyed by the number of the image, so a step does not depend on batch, rank or restart,
and first and last stage make the same noise without a message.

Shapes: B batch, N windows, T tokens per window, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from aeris.config import RunConfig
from aeris.data.loader import Sample
from aeris.data.store import Store
from aeris.diffusion.loss import loss_weights, weighted_mse
from aeris.diffusion.trigflow import add_noise, noise_times, velocity
from aeris.ema import EMA
from aeris.guards import Guards
from aeris.model.initialise import initialise
from aeris.model.swin import Swin
from aeris.offload import host_weights
from aeris.optim import learning_rate, make_optimizer, optimizer_tensors
from aeris.parallelize import Seat, build_model, make_pipeline, share_weights
from aeris.restore import channel_counts, check_fingerprint
from aeris.run import Record, Run
from swipe import checkpoint, noise
from swipe.collectives import waiting
from swipe.gradients import clip, global_norm
from swipe.pipeline import Microbatch
from swipe.sharding import replicas

TIME_STREAM, FIELD_STREAM = 0, 1  # which random numbers of an image: its noise time, its noise field


class Training(Run):
    """A run in memory: this rank's part of network, optimizer, average and data."""

    config: RunConfig
    model: Swin

    def __init__(
        self, config: RunConfig, run_dir: Path, store: Store, seat: Seat, guards: Guards | None = None
    ) -> None:
        """Build everything from the configuration; weights are fresh until `resume`.

        Args:
            guards: of the program that trains; None: nothing is watched.
        """
        super().__init__(config, run_dir, seat.groups, seat.device, guards)
        self.store, self.seat, self.layout = store, seat, seat.layout
        counts = channel_counts(len(store.names))
        self.model = build_model(config.model, *counts, seat.layout, seat.device, seat.units)
        initialise(self.model, config.train.seed)
        share_weights(self.model, seat)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.ema = EMA(self.model, config.ema, host_weights(self.optimizer))
        self.tokens_NT = self.layout.tokens_NT.to(self.device)
        self.valid_NTC: torch.Tensor | None = None
        if store.masks:
            self.valid_NTC = torch.from_numpy(store.valid_windows(self.layout.shard)).to(self.device)
        self.pipeline = make_pipeline(self.model, seat, self._loss(), config.parallel.schedule)
        self.pipeline.stopwatch = self.guards.stopwatch

    def _loss(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Make the loss of this rank's tokens; the mean over equally large shards is that of the grid."""
        store, diffusion = self.store, self.config.diffusion
        weight_NTC = loss_weights(
            store.names,
            store.latitude_deg,
            self.layout.tokens_NT,
            store.cols,
            channel_scheme=diffusion.channel_weights,
            weight_latitudes=diffusion.latitude_weights,
            mask_CYX=store.mask_CYX if store.masks else None,
        ).to(self.device)
        return lambda f, v: weighted_mse(diffusion.sigma_data * f, v, weight_NTC)[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name every tensor of the run's state that this rank holds, or holds a part of."""
        state = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        state |= {f"ema.{name}": value for name, value in self.ema.weights.items()}
        return state | {
            f"optimizer.{n}": value for n, value in optimizer_tensors(self.model, self.optimizer).items()
        }

    def about_data(self) -> dict[str, Any]:
        """Say by what a checkpoint's meta.json knows the data."""
        return {"channels": list(self.store.names), "fingerprint": self.store.fingerprint}

    def load(self, path: Path, meta: dict[str, Any]) -> None:
        """Load a checkpoint, after checking that the data are those of its `meta`; a collective call.

        Raises:
            ValueError: they are not.
        """
        check_fingerprint(meta["fingerprint"], self.store)
        checkpoint.load(path, self.tensors(), near=self.seat.at.pp / self.seat.dims.pp)


def noisy(run: Training, sample: Sample) -> Microbatch:
    """Make this stage's part of a microbatch: noise time; on the first stage input; on the last target.

    TrigFlow with time and noise keyed by the image, so no stage needs another's.
    """
    diffusion, seed = run.config.diffusion, run.config.train.seed
    images = sample.image_B.tolist()
    t_B = noise_times(
        noise.uniform([noise.key(seed, TIME_STREAM, image) for image in images], run.device), diffusion
    )
    if not (run.seat.first or run.seat.last):
        return Microbatch(None, (t_B,))
    state, residual, forcing = (x.to(run.device, non_blocking=True) for x in sample[:3])
    z = noise.normal(
        [noise.key(seed, FIELD_STREAM, image) for image in images], run.tokens_NT, residual.shape[-1]
    )
    if run.valid_NTC is not None:
        z = z * run.valid_NTC  # a hidden point is 0 in state, residual and noise alike, as in a forecast
    x, target = None, None
    if run.seat.first:
        x_t = add_noise(residual, z, t_B, diffusion.sigma_data)
        x = torch.cat((x_t / diffusion.sigma_data, state, forcing), dim=-1)
    if run.seat.last:
        target = velocity(residual, z, t_B, diffusion.sigma_data)
    return Microbatch(x, (t_B,), target)


def train_step(run: Training, samples: Iterator[Sample]) -> Record:
    """Take one optimizer step over the next `train.batch` images; return its record for the log."""
    train, dims, groups = run.config.train, run.seat.dims, run.seat.groups
    lr = learning_rate(run.images_seen, run.config.optimizer, train.images)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    count = train.batch // (train.microbatch * dims.dp)
    losses = run.pipeline.step((noisy(run, sample) for sample in islice(samples, count)), count)
    # Only the last stage has losses: their mean over its dp x wp x sp ranks is that of the batch.
    share = losses.double().mean() / (dims.dp * dims.places) if run.seat.last else losses.new_zeros(())
    wishes = [losses.new_full((), wish, dtype=torch.float64) for wish in run.guards.requests.wishes()]
    norm, sums = global_norm(run.model.parameters(), groups.world, replicas(groups.weights), [share, *wishes])
    # On a device, all waiting of a step happens here.
    with waiting("sum of gradient norm and loss", groups.world, computes=groups.world.size == 1):
        norm_value, loss, stop, save = torch.cat((norm[None], sums)).tolist()
    why = run.count(loss, norm_value, stop, save)
    if not why:
        with run.guards.stopwatch.computing():
            clip(run.model.parameters(), norm, train.clip)
            run.optimizer.step()
            run.ema.update(run.model, run.images_seen, train.batch)
    record = {
        "images_seen": run.images_seen,
        "loss": loss,
        "grad_norm": norm_value,
        "lr": lr,
        "skipped": run.skipped,
    }
    return record | ({"skip": why} if why else {})
