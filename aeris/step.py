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
from aeris.interruption import Settled
from aeris.log import console
from aeris.model.initialise import initialise
from aeris.model.swin import Swin
from aeris.offload import host_weights
from aeris.optim import learning_rate, make_optimizer, optimizer_tensors
from aeris.parallelize import Seat, build_model, make_pipeline, share_weights
from aeris.restore import channel_counts, check_fingerprint
from aeris.spikes import Spikes
from swipe import checkpoint, noise
from swipe.gradients import clip, global_norm
from swipe.pipeline import Microbatch
from swipe.resume import newest
from swipe.sharding import replicas

TIME_STREAM, FIELD_STREAM = 0, 1  # which random numbers of an image: its noise time, its noise field


class Training:
    """A run in memory: this rank's part of network, optimizer, average and data, and the images seen."""

    def __init__(
        self, config: RunConfig, run_dir: Path, store: Store, seat: Seat, guards: Guards | None = None
    ) -> None:
        """Build everything from the configuration; weights are fresh until `resume`.

        Args:
            guards: of the program that trains; None: nothing is watched.
        """
        self.config, self.run_dir, self.store, self.seat = config, run_dir, store, seat
        self.device, self.layout = seat.device, seat.layout
        counts = channel_counts(len(store.names))
        self.model: Swin = build_model(config.model, *counts, seat.layout, seat.device, seat.units)
        initialise(self.model, config.train.seed)
        share_weights(self.model, seat)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.ema = EMA(self.model, config.ema, host_weights(self.optimizer))
        self.tokens_NT = self.layout.tokens_NT.to(self.device)
        self.valid_NTC: torch.Tensor | None = None
        if store.masks:
            self.valid_NTC = torch.from_numpy(store.valid_windows(self.layout.shard)).to(self.device)
        self.pipeline = make_pipeline(self.model, seat, self._loss(), config.parallel.schedule)
        self.checkpoints = checkpoint.Checkpoints(
            run_dir / "checkpoints", config.checkpoint.keep, seat.groups
        )
        self.images_seen = 0
        self.skipped = 0  # non-finite steps and spikes so far
        self.skipped_in_a_row = 0  # non-finite ones
        self.spikes = Spikes(config.faults, config.train.batch)
        self.guards = guards or Guards(run_dir, config.checkpoint.every_minutes, seat.lead)
        self.guards.join(seat.groups, seat.device, config.faults)
        self.pipeline.stopwatch = self.guards.stopwatch
        self.settled = Settled()  # what all ranks do after the last step

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

    def save(self) -> None:
        """Start to write a checkpoint of this moment; it is whole when `checkpoints.wait` returns."""
        meta = {
            "images_seen": self.images_seen,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes": self.spikes.state(),
            "channels": list(self.store.names),
            "fingerprint": self.store.fingerprint,
        }
        self.checkpoints.save(self.images_seen, self.tensors(), meta)
        self.guards.requests.saved()

    def resume(self) -> bool:
        """Load the newest good checkpoint, if there is one, after checking that the data are still the same.

        It may have been saved by any number of ranks in any layout. A collective call over all ranks.

        Raises:
            ValueError: every checkpoint is damaged, or the data are others than before.
        """
        path, remarks = newest(self.run_dir / "checkpoints", self.seat.groups.saving[1])
        for remark in remarks:
            console.print(remark, markup=False)
        if path is None:
            return False
        meta = checkpoint.read_meta(path)
        check_fingerprint(meta["fingerprint"], self.store)
        checkpoint.load(path, self.tensors(), near=self.seat.at.pp / self.seat.dims.pp)
        self.images_seen, self.skipped = meta["images_seen"], meta["skipped"]
        self.skipped_in_a_row = meta["skipped_in_a_row"]
        self.spikes.load_state(meta.get("spikes"))
        return True


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


def train_step(run: Training, samples: Iterator[Sample]) -> dict[str, Any]:
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
    norm_value, loss, stop, save = torch.cat((norm[None], sums)).tolist()
    run.settled = run.guards.requests.settle(stop, save)
    why = run.spikes.judge(loss, norm_value)  # of numbers that are the same on all ranks
    run.images_seen += train.batch
    if not why:
        with run.guards.stopwatch.computing():
            clip(run.model.parameters(), norm, train.clip)
            run.optimizer.step()
            run.ema.update(run.model, run.images_seen, train.batch)
    run.skipped += bool(why)
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if why == "non-finite" else 0
    record = {
        "images_seen": run.images_seen,
        "loss": loss,
        "grad_norm": norm_value,
        "lr": lr,
        "skipped": run.skipped,
    }
    return record | ({"skip": why} if why else {})
