"""The state of a run and one optimizer step: noise and target, pipeline, clipping, AdamW, average.

Everything random is keyed by the number of the image, so a step does not depend on batch, rank or restart.

Shapes: B batch, N windows, T tokens per window, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from aeris.model.initialise import initialise
from aeris.model.swin import Swin
from aeris.optim import learning_rate, make_optimizer, optimizer_tensors
from aeris.parallelize import build_model, make_layout
from aeris.restore import channel_counts, check_fingerprint
from swipe import checkpoint, noise
from swipe.layout import WindowLayout
from swipe.pipeline import Microbatch, Pipeline

TIME_STREAM, FIELD_STREAM = 0, 1  # which random numbers of an image: its noise time, its noise field


class Training:
    """A run in memory: network, optimizer, average, data, and how many images it has seen."""

    def __init__(self, config: RunConfig, run_dir: Path, store: Store, device: torch.device) -> None:
        """Build everything from the configuration; weights are fresh until `resume`."""
        self.config, self.run_dir, self.store, self.device = config, run_dir, store, device
        self.layout: WindowLayout = make_layout(config.model)
        self.model: Swin = build_model(config.model, *channel_counts(len(store.names)), self.layout, device)
        initialise(self.model, config.train.seed)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.ema = EMA(self.model, config.ema)
        self.tokens_NT = self.layout.tokens_NT.to(device)
        self.valid_NTC: torch.Tensor | None = None
        if store.masks:
            self.valid_NTC = torch.from_numpy(store.valid_windows(self.layout.shard)).to(device)
        weight_NTC = loss_weights(
            store.names,
            store.latitude_deg,
            self.layout.tokens_NT,
            store.cols,
            channel_scheme=config.diffusion.channel_weights,
            weight_latitudes=config.diffusion.latitude_weights,
            mask_CYX=store.mask_CYX if store.masks else None,
        ).to(device)
        sigma_data = config.diffusion.sigma_data
        self.pipeline = Pipeline(self.model, lambda f, v: weighted_mse(sigma_data * f, v, weight_NTC)[0])
        self.images_seen = 0
        self.skipped = 0  # non-finite steps so far
        self.skipped_in_a_row = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name every tensor of the run's state."""
        state = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        state |= {f"ema.{name}": value for name, value in self.ema.weights.items()}
        return state | {
            f"optimizer.{n}": value for n, value in optimizer_tensors(self.model, self.optimizer).items()
        }

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        meta = {
            "images_seen": self.images_seen,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "channels": list(self.store.names),
            "fingerprint": self.store.fingerprint,
        }
        checkpoint.save(
            self.run_dir / "checkpoints", self.images_seen, self.tensors(), meta, self.config.checkpoint.keep
        )

    def resume(self) -> bool:
        """Load the newest checkpoint, if there is one, after checking that the data are still the same."""
        found = checkpoint.complete(self.run_dir / "checkpoints")
        if not found:
            return False
        meta = checkpoint.read_meta(found[-1])
        check_fingerprint(meta["fingerprint"], self.store)
        checkpoint.load(found[-1], self.tensors())
        self.images_seen, self.skipped = meta["images_seen"], meta["skipped"]
        self.skipped_in_a_row = meta["skipped_in_a_row"]
        return True


def noisy(run: Training, sample: Sample) -> Microbatch:
    """Make the network's input and target of a sample: TrigFlow with time and noise keyed by the image."""
    diffusion, seed = run.config.diffusion, run.config.train.seed
    state, residual, forcing = (x.to(run.device, non_blocking=True) for x in sample[:3])
    images = sample.image_B.tolist()
    t_B = noise_times(
        noise.uniform([noise.key(seed, TIME_STREAM, image) for image in images], run.device), diffusion
    )
    z = noise.normal(
        [noise.key(seed, FIELD_STREAM, image) for image in images], run.tokens_NT, residual.shape[-1]
    )
    if run.valid_NTC is not None:
        z = z * run.valid_NTC  # a hidden point is 0 in state, residual and noise alike, as in a forecast
    x_t = add_noise(residual, z, t_B, diffusion.sigma_data)
    inputs = torch.cat((x_t / diffusion.sigma_data, state, forcing), dim=-1)
    return Microbatch((inputs, t_B), velocity(residual, z, t_B, diffusion.sigma_data))


def train_step(run: Training, samples: Iterator[Sample]) -> dict[str, Any]:
    """Take one optimizer step over the next `train.batch` images; return its record for the log."""
    train = run.config.train
    lr = learning_rate(run.images_seen, run.config.optimizer, train.images)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    count = train.batch // train.microbatch
    losses = run.pipeline.step((noisy(run, sample) for sample in islice(samples, count)), count)
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    loss, norm_value = torch.stack((losses.mean(), norm)).tolist()
    finite = math.isfinite(loss) and math.isfinite(norm_value)
    run.images_seen += train.batch
    if finite:
        torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), train.clip, norm)
        run.optimizer.step()
        run.ema.update(run.model, run.images_seen, train.batch)
    run.skipped += not finite
    run.skipped_in_a_row = 0 if finite else run.skipped_in_a_row + 1
    return {
        "images_seen": run.images_seen,
        "loss": loss,
        "grad_norm": norm_value,
        "lr": lr,
        "skipped": run.skipped,
    }


def check_finite(run: Training) -> None:
    """Stop a run that no longer learns.

    Raises:
        ValueError: more non-finite steps in a row than allowed; names the first bad tensor.
    """
    if run.skipped_in_a_row <= run.config.train.nonfinite_limit:
        return
    for kind in ("weight", "gradient"):
        for name, p in run.model.named_parameters():
            tensor = p if kind == "weight" else p.grad
            if tensor is not None and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise ValueError(
                    f"{run.skipped_in_a_row} non-finite steps in a row up to image {run.images_seen}; the "
                    f"first bad tensor is the {kind} of {name} ({bad} of {tensor.numel()} values). Lower "
                    "--optimizer.lr or --train.clip and run the same command: it goes on from the last "
                    "checkpoint"
                )
    raise ValueError(f"{run.skipped_in_a_row} steps in a row had a non-finite loss with finite gradients")
