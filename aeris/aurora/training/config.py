"""What a training run of Aurora is: frozen dataclasses, and the setups that are known by name.

A configuration comes from a preset, the command line or a run directory's `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from aeris import config as configs
from aeris.aurora.config import AuroraConfig
from aeris.config import CheckpointConfig, FaultConfig, OptimizerConfig
from aeris.run_directory import Flags, Free, check_unchanged, flag
from swipe import checkpoint

Paths = Annotated[tuple[str, ...], tyro.conf.arg(name="data", prefix_name=False)]
Static = Annotated[str, tyro.conf.arg(prefix_name=False)]
Days = Annotated[tuple[str, str], tyro.conf.arg(prefix_name=False)]

Checkpointing = Literal[
    "none", "blocks", "lean-blocks", "layers", "encoder-decoder+blocks", "encoder-decoder+layers"
]  # the policies of aeris/aurora/checkpointing.py

FRESH = "fresh"
"""What `weights` says where a run starts from random ones."""

FLAGS: Flags = {
    "variant": "--model",
    "data.paths": "--data",
    "data.static": "--static",
    "data.train_period": "--train-period",
    "data.validate_period": "--validate-period",
}
"""Flags of the command line that are not named after their section, as the annotations below say."""


@dataclass(frozen=True)
class RolloutConfig:
    """How many model steps an update takes, and how far gradients go back."""

    steps: int = 1
    """Model steps of a training sample; the loss is the mean over them."""
    gradient: Literal["through", "push-forward"] = "through"
    """through: back through all steps; push-forward: a prediction is cut off where it is fed back."""
    train: Literal["all", "adapters"] = "all"
    """What is trained: all weights, or the LoRA adapters on a frozen base."""


@dataclass(frozen=True)
class ReplayConfig:
    """Long roll-outs, one step per update, from a buffer of states the model itself has made."""

    size: int = 0
    """States a buffer holds; there is one for every image of the batch. 0: no replay."""
    fresh_every: int = 10
    """Updates between fresh states from the data."""
    at_first: int = 0
    """Fresh states at the start; 0: the share they have later on, size / (fresh_every + 1)."""
    lead_h: int = 96
    """Longest lead time of a prediction at first, in hours."""
    later_lead_h: int = 240
    """Longest lead time from `later_from_images` on."""
    later_from_images: int = 5_000
    """Images after which the longer lead time holds."""


@dataclass(frozen=True)
class LossConfig:
    """The weights of the loss (aeris/aurora/loss.py)."""

    table: Literal["pretraining", "fine-tuning"] = "fine-tuning"
    """Published weights to start from."""
    dataset: Literal["era5", "gfs-t0", "hres-t0", "other"] = "hres-t0"
    """The data, which have a weight of their own."""
    weights: tuple[tuple[str, float], ...] = ()
    """Variables and their weights, in place of or beside those of the table; z_500 is z at 500 hPa."""
    default: float | None = None
    """Weight of variables that neither names; without, each must be named."""


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train."""

    images: int = 8_000
    """Stop after this many images (training samples); a larger number goes on from where a run was."""
    batch: int = 1
    """Images per update over all ranks."""
    microbatch: int = 1
    """Images per forward and backward pass; with the number of ranks it divides the batch. Random numbers, as
    for dropped paths, are drawn for all its images at once: where there are any, it belongs to the run."""
    clip: float = 1.0
    """Largest L2 norm of the gradient; 0: any."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """bf16: autocast over encoder, backbone and decoder, weights fp32; auto: bf16 but fp32 on CPUs."""
    checkpointing: Checkpointing = "none"
    """What is computed again in the backward pass: blocks or layers of the U-Net, encoder and decoder."""
    compile: bool = False
    """Compile the blocks of the U-Net with torch.compile."""
    nonfinite_limit: int = 10
    """Stop after more than this many non-finite updates in a row; each is skipped and counted."""
    seed: int = 0
    """Seed of weights, data order, dropped paths and drawn states."""
    log_every: int = 1
    """Updates per record in log.jsonl."""


@dataclass(frozen=True)
class ValidateConfig:
    """When and how the model is judged on data it is not trained on."""

    every_images: int = 1_000
    """Images between validations; the start and the end are always validated. 0: never."""
    samples: int = 64
    """States a validation starts from, evenly spread over the period; 0: all."""
    steps: int = 0
    """Model steps from each; 0: as many as in training."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over ranks: all of them work on other images of the batch."""

    shard: int = 0
    """Ranks over which weights and optimizer state are divided; 0 is all."""
    timeout_s: float = 900.0
    """A rank that waits longer than this for another in one exchange ends the run."""
    self_test: bool = True
    """Try every kind of communication the run uses, and check what arrives, before training starts."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    paths: Paths = ()
    """Weather data: NetCDF files, a Zarr or a store of aeris.data.convert."""
    static: Static = ""
    """File with static fields that the data lack."""
    train_period: Days = ("2020-01-01", "2021-12-31")
    """First and last day that training may touch."""
    validate_period: Days = ("2022-01-01", "2022-12-31")
    """First and last day that validation may touch."""
    workers: int = 1
    """Processes that read samples ahead of the training; 0: training waits for each."""


@dataclass(frozen=True)
class FineTuneConfig:
    """Everything that defines a run."""

    variant: Annotated[str, tyro.conf.arg(name="model")] = "small"
    """The model, a name of aeris.aurora.variants."""
    weights: str = ""
    """Checkpoint file, run directory or hub:NAME the weights come from; fresh: random ones."""
    partial: bool = False
    """Accept weights that lack variables of the model or have more; what is lacking starts fresh."""
    aurora: AuroraConfig = field(default_factory=AuroraConfig)
    """The model's settings: those of the variant, and what is changed."""
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)


AT_LEAST = {
    "rollout": {"steps": 1},
    "replay": {"size": 0, "fresh_every": 1, "at_first": 0, "later_from_images": 0},
    "train": {"images": 1, "batch": 1, "microbatch": 1, "clip": 0, "nonfinite_limit": 1, "log_every": 1},
    "validate": {"every_images": 0, "samples": 0, "steps": 0},
    "checkpoint": {"every_images": 1, "keep": 1},
    "parallel": {"shard": 0},
    "data": {"workers": 0},
}


def check(config: FineTuneConfig, world: int = 1) -> None:
    """Check what can be checked without data, weights or a device.

    Raises:
        ValueError: a number is out of range, or settings contradict each other; names what would do.
    """
    for section, limits in AT_LEAST.items():
        for name, least in limits.items():
            value = getattr(getattr(config, section), name)
            if not value >= least:
                raise ValueError(f"{flag(f'{section}.{name}')} is {value}: it must be at least {least}")
    configs.check_faults(config.faults, config.checkpoint)
    train, rollout, replay = config.train, config.rollout, config.replay
    if not config.parallel.timeout_s > 0:
        raise ValueError(f"--parallel.timeout-s is {config.parallel.timeout_s:g}: it must be positive")
    if train.batch % (train.microbatch * world):
        nearest = max(1, round(train.batch / (train.microbatch * world))) * train.microbatch * world
        raise ValueError(
            f"--train.batch {train.batch} is no multiple of {world} ranks x --train.microbatch "
            f"{train.microbatch}: {nearest} is"
        )
    if rollout.train == "adapters" and not config.aurora.use_lora:
        raise ValueError("--rollout.train adapters needs a model that has them: pass --aurora.use-lora")
    if not config.weights:
        raise ValueError(
            "no weights to start from: pass --weights FILE, a run's directory or hub:NAME, or --weights "
            f"{FRESH} to train random ones from scratch (preset pretrain)"
        )
    if rollout.train == "adapters" and config.weights == FRESH:
        raise ValueError(
            "adapters are trained on a frozen base that must come from somewhere: pass --weights FILE, a "
            "run's directory or hub:NAME"
        )
    if not config.data.paths:
        raise ValueError("no data to train on: pass --data PATH ...")
    _check_replay(config)
    if replay.size and (rollout.steps != 1 or train.microbatch != 1):
        raise ValueError(
            f"replay takes one step from one state at a time, not --rollout.steps {rollout.steps} and "
            f"--train.microbatch {train.microbatch}: pass 1 for both"
        )


def _check_replay(config: FineTuneConfig) -> None:
    replay, step_h = config.replay, config.aurora.timestep_h
    if not replay.size:
        return
    for name in ("lead_h", "later_lead_h"):
        if getattr(replay, name) < step_h:
            value = getattr(replay, name)
            raise ValueError(f"{flag(f'replay.{name}')} is {value}: a step alone takes {step_h:g} h")
    if replay.at_first > replay.size:
        raise ValueError(f"--replay.at-first {replay.at_first} is more than --replay.size {replay.size}")


def load(path: Path) -> FineTuneConfig:
    """Read the configuration of a run.

    Raises:
        ValueError: the file is missing or not a configuration of this version; names the first bad entry.
    """
    return configs.read(path, FineTuneConfig, "aeris.aurora.finetune")


FREE: Free = {
    "aurora": {"autocast", "autocast_dtype", "autocast_parts", "use_fp16_safe_attention", "level_chunk"},
    "data": {"paths", "static", "workers"},
    "train": {
        *("images", "batch", "microbatch", "clip", "precision", "checkpointing", "compile"),
        *("nonfinite_limit", "log_every"),
    },
    "optimizer": None,
    "validate": {"every_images", "samples"},
    "checkpoint": None,
    "parallel": None,
    "faults": None,
}  # settings a run may change when it goes on; None: every one of the section


def check_same_run(config: FineTuneConfig, run_dir: Path) -> None:
    """Refuse to go on in a directory with another run's checkpoints.

    Raises:
        ValueError: a setting that defines the run differs from `run_dir`/config.json; names the settings.
    """
    if not checkpoint.complete(run_dir / "checkpoints"):
        return
    fixed = set()
    if config.replay.size:  # its buffers belong to places in the batch
        fixed.add("batch")
    if draws_random_numbers(config.aurora):  # for a microbatch at once, keyed by its first image
        fixed.add("microbatch")
    free = {**FREE, "train": set(FREE["train"] or ()) - fixed}
    check_unchanged(load(run_dir / "config.json"), config, free, run_dir, FLAGS)


def draws_random_numbers(aurora: AuroraConfig) -> bool:
    """Whether a model in training draws random numbers: dropped paths or values, noise."""
    return bool(aurora.drop_path or aurora.drop_rate or aurora.stochastic)
