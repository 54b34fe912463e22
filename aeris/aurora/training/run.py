"""The state of a training run of Aurora on one rank: model, optimizer, scores and replay buffers.

All ranks work on other images of the batch; weights and optimizer state are divided over them (FSDP2). Each
rank builds the whole model on its device first, in fp32, and keeps its part: 5 GB for the 1.3B model.
Everything random is keyed by the number of an image, the first of its microbatch, so a run does not depend on
the number of ranks or on restarts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aeris.aurora.config import AuroraConfig
from aeris.aurora.loss import LossWeights, loss_weights
from aeris.aurora.model import Aurora
from aeris.aurora.swin3d import compile_blocks
from aeris.aurora.training.config import FineTuneConfig
from aeris.aurora.training.reading import Data, Replay
from aeris.aurora.training.scores import Scores
from aeris.aurora.training.starting_weights import Start, build
from aeris.guards import Guards
from aeris.optim import make_optimizer, optimizer_tensors
from aeris.run import Run
from swipe import checkpoint
from swipe.groups import Groups, make_groups
from swipe.mesh import ParallelDims
from swipe.sharding import full, shard

UNTRAINABLE = ("wave", "v1.5", "v1.5-ensemble")
"""Variants that need more than the difference to the truth: densities, angles, output-only fields."""


@dataclass(frozen=True)
class Seat:
    """One rank of a run."""

    groups: Groups
    device: torch.device

    @property
    def rank(self) -> int:
        """Its number."""
        return self.groups.rank

    @property
    def world(self) -> int:
        """How many there are."""
        return self.groups.dims.world

    @property
    def lead(self) -> bool:
        """Whether this is the rank that speaks and writes what is written once."""
        return self.rank == 0


def take_seat(config: FineTuneConfig, world: int, rank: int, device: torch.device) -> Seat:
    """Make this rank's groups; a collective call over all ranks.

    Raises:
        ValueError: weights cannot be divided as asked.
    """
    parallel = config.parallel
    groups = make_groups(ParallelDims(dp=world), rank, device, parallel.shard, timeout_s=parallel.timeout_s)
    return Seat(groups, device)


def computed_in(config: FineTuneConfig, device: torch.device) -> tuple[AuroraConfig, torch.dtype]:
    """Return the model's settings with the autocast of `train.precision`, and the type of the weights."""
    precision = config.train.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    aurora = replace(config.aurora, autocast=precision == "bf16", autocast_dtype="bfloat16")
    return aurora, torch.float64 if precision == "fp64" else torch.float32


def make_loss_weights(config: FineTuneConfig, levels: Sequence[float] | None = None) -> LossWeights:
    """Make the weights of the loss for what the model predicts.

    Args:
        levels: of the data in hPa; None: not known yet.

    Raises:
        ValueError: a variable has none, or one is for nothing; says how to give one.
    """
    loss, names = config.loss, (config.aurora.surf_vars, config.aurora.atmos_vars)
    try:
        return loss_weights(loss.table, loss.dataset, *names, levels, dict(loss.weights), loss.default)
    except ValueError as error:
        raise ValueError(f"{error} (--loss.weights NAME WEIGHT ..., --loss.default WEIGHT)") from None


class FineTuning(Run):
    """A run in memory: this rank's part of model and optimizer, its scores and buffers.

    Attributes:
        forward_flops: of one model step of one sample, counted by who made the run.
    """

    forward_flops = 0
    config: FineTuneConfig
    model: Aurora

    def __init__(
        self,
        config: FineTuneConfig,
        run_dir: Path,
        data: Data,
        seat: Seat,
        start: Start | None = None,
        guards: Guards | None = None,
    ) -> None:
        """Build everything from the configuration.

        Args:
            start: weights to begin with; fresh ones without, and until `resume`.
            guards: of the program that trains; None: nothing is watched.
        """
        super().__init__(config, run_dir, seat.groups, seat.device, guards)
        self.data, self.seat = data, seat
        aurora, dtype = computed_in(config, seat.device)
        self.model = build(config.variant, aurora, seat.device, config.train.seed).to(dtype)
        if start is not None:
            start.load(self.model)
        self.surf_stats = self.model.surf_stats
        self.loss_weights = make_loss_weights(config, data.weather.levels)
        if config.rollout.train == "adapters":
            self.model.freeze_base()
        self.model.configure_activation_checkpointing(config.train.checkpointing)
        if config.train.compile:
            compile_blocks(self.model, fullgraph=True)  # rather an error than silent slowness
        shard(self.model, self.model.parts(), seat.groups.weights)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.scores = self.new_scores(config.rollout.steps)
        self.replay = Replay(config, data, dtype, seat.rank, seat.world) if config.replay.size else None

    def new_scores(self, steps: int) -> Scores:
        """Make sums for the scores of roll-outs of `steps`."""
        aurora = self.config.aurora
        return Scores(aurora.surf_vars, aurora.atmos_vars, self.data.weather.levels, steps, self.device)

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor of the run's state that this rank holds, or holds a part of."""
        state = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        state |= {f"optimizer.{n}": x for n, x in optimizer_tensors(self.model, self.optimizer).items()}
        state["scores.training"] = self.scores.total
        return state | (self.replay.tensors() if self.replay else {})

    def save(self) -> None:
        """Start to write a checkpoint of this moment; it is whole when `checkpoints.wait` returns.

        Until then all this rank's tensors are in memory once more, on the CPU; those of replay buffers too.
        """
        self.scores.fold(self.seat.groups.world)
        super().save()

    def about_data(self) -> dict[str, Any]:
        """Say by what a checkpoint's meta.json knows the data."""
        return {"data": self.data.fingerprint}

    def load(self, path: Path, meta: dict[str, Any]) -> None:
        """Load a checkpoint, after checking that the data are those of its `meta`; a collective call.

        Raises:
            ValueError: they are not.
        """
        before, now = meta["data"], self.data.fingerprint
        if different := [
            f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
        ]:
            raise ValueError(f"{self.run_dir} was trained on other data: {'; '.join(different)}")
        if self.replay:
            self.replay.make_room(meta["images_seen"])
        checkpoint.load(path, self.tensors())

    def export(self, path: Path) -> None:
        """Write the weights alone, as a state dict with the published names; a collective call.

        Raises:
            OSError: the file cannot be written; nothing of it is left.
        """
        state = {}
        for name, p in self.model.named_parameters():
            whole = full(p.detach()).cpu()
            if self.seat.lead:
                state[name] = whole.contiguous()
        if self.seat.lead:
            partial = path.with_name(path.name + ".partial")
            try:
                torch.save(state, partial)
                os.replace(partial, path)
            except (OSError, RuntimeError) as error:  # torch has words of its own for a full disk
                partial.unlink(missing_ok=True)
                reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
                raise OSError(f"cannot write {path} ({reason}): the same command tries again") from None
