"""What a run is: frozen dataclasses, from a preset, the command line or a run directory's `config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of the network (AERIS, arXiv 2509.13523, section 2 of the model)."""

    rows: int = 24
    """Rows of the grid the network sees; 720 for a 721-row grid, whose north pole row is dropped."""
    cols: int = 48
    """Columns of the grid."""
    row_offset: int = 0
    """Number of the first kept row on the original grid, for the absolute encoding: 1 after the crop."""
    window: int = 12
    """Side of an attention window in grid points; even, divides rows and columns."""
    layers: int = 4
    """Layers; every other one, the second first, works on windows shifted by half a window."""
    blocks: int = 1
    """Blocks (attention + MLP) per layer; they share the layer's tiling."""
    width: int = 128
    """Features per token d."""
    heads: int = 4
    """Attention heads; divides the width."""
    hidden: int = 320
    """Hidden features m of the SwiGLU."""
    rope: bool = True
    """Rotate queries and keys by position (axial 2-D RoPE). The published weights were trained without."""
    rope_base: float = 100.0
    """Base of the rotary frequencies: 10,000 in the paper; small windows want a small base."""
    poles: Literal["cyclic", "separate"] = "separate"
    """cyclic: first and last row attend to each other, as published; separate: none across the pole."""
    norm_order: Literal["norm-modulate", "modulate-norm"] = "norm-modulate"
    """norm-modulate: modulate(RMSNorm(x)), the paper's; modulate-norm: RMSNorm(modulate(x)), the runs'."""
    modulation_layers: Literal[1, 2] = 2
    """Linear layers from the time embedding to a block's six vectors: 2 in the 1.3B runs, 1 in the 40B."""
    init: Literal["zero", "spike-no-more"] = "zero"
    """Start blocks as the identity, or nearly, as in "spike no more"; see aeris/model/initialise.py."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm; given explicitly because torch's default depends on its version."""
    time_rounding: Literal["none", "bf16"] = "none"
    """Round the embedding of the noise time to bf16, as the released runs did."""
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Type of the matrix products in the blocks; embedding and head are fp32 (fp64 with fp64)."""
    residual: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Type of the tokens between blocks: bf16 as published; fp32 is exacter and faster on CPU."""
    checkpointing: Literal["none", "block"] = "none"
    """Activation checkpointing: keep everything, or recompute each block in the backward pass."""
    compile: bool = False
    """Compile each block with torch.compile; needs a C++ compiler on CPU."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    store: str = "sample"
    """Directory of the store made by `python -m aeris.data.convert`; `sample` is the packaged atmosphere."""
    channels: tuple[str, ...] = ()
    """Channels the store must have, in order; empty takes the store's."""
    interval_h: int = 6
    """Hours from a state to the next; the store needs residual statistics for it."""
    standards: str = ""
    """File of means and deviations that replace the store's: of published weights (`python -m
    aeris.published`), which forecast and are not trained on. Relative to the run directory."""
    roll: bool = False
    """Turn the globe by a random number of columns for every training image, so that a short record lasts."""
    workers: int = 0
    """Processes that read samples beside the training; 0 reads in the training process."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The TrigFlow objective."""

    sigma_data: float = 1.0
    """Standard deviation of the standardised residual."""
    noise_times: Literal["log-uniform", "log-normal"] = "log-uniform"
    """Distribution of the noise level sigma in training."""
    sigma_min: float = 0.02
    """Smallest noise level; modes with a smaller standard deviation are lost (docs/diffusion.md)."""
    sigma_max: float = 200.0
    """Largest noise level."""
    log_mean: float = -1.2
    """Mean of ln sigma with log-normal noise times."""
    log_std: float = 1.2
    """Standard deviation of ln sigma with log-normal noise times."""
    channel_weights: Literal["uniform", "pressure"] = "uniform"
    """Loss weights of channels: equal, or t2m 1, other surface 0.1, levels by pressure as published."""
    latitude_weights: bool = True
    """Weight the loss by (cos latitude + 0.01), as published."""
    state_error: float = 0.0
    """Largest error put on the state a step starts from, which the step learns to take out: a share of the
    change at a random other date. For long forecasts (docs/diffusion.md); 0: none, as published."""


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train."""

    images: int = 1_000_000
    """Stop after this many images (training pairs); a run with a larger number goes on from where it was."""
    batch: int = 20
    """Images per optimizer step over the whole run."""
    microbatch: int = 1
    """Images per forward and backward pass; divides the batch."""
    clip: float = 1.0
    """Largest L2 norm of the true-mean gradient."""
    nonfinite_limit: int = 10
    """Stop after more than this many non-finite steps in a row; each is skipped and counted."""
    seed: int = 0
    """Seed of weights, data order, noise and noise times."""
    log_every: int = 1
    """Optimizer steps per record in log.jsonl."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with the learning rate as a function of images seen."""

    lr: float = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.85, 0.9)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decay of weight matrices; vectors (norms, biases) are not decayed."""
    warmup_images: int = 20_000
    """Linear warm-up from `lr_floor`."""
    shape: Literal["cosine", "constant"] = "cosine"
    """Learning rate between warm-up and ramp-down."""
    cosine_images: int = 25_000_000
    """Images at which the cosine reaches the floor; 0 means the end of the run."""
    rampdown_images: int = 50_000
    """Linear drop to the floor over the last images of the run."""
    lr_floor: float = 0.01
    """Lowest learning rate as a share of the peak."""
    offload: Literal["none", "cpu", "cpu-torch"] = "none"
    """Where fp32 master weights, moments and average are: none, on the device; cpu, in host memory, updated
    by DeepSpeed's CPU Adam; cpu-torch, there too, updated by torch's own."""


@dataclass(frozen=True)
class EMAConfig:
    """Moving average of the weights, used in forecasts: beta = 0.5 ** (batch / halflife)."""

    halflife_images: int = 100_000
    """Half-life in images."""
    rampup_ratio: float = 0.05
    """The half-life is at most this share of the images seen, so that the start is forgotten."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_images: int = 2_000
    """Images between checkpoints; the last step is always saved."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, whichever comes first; 0: images alone count."""
    keep: int = 3
    """Newest checkpoints that stay; older ones are removed."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over ranks (docs/swipe.md); 0 leaves a degree to be chosen."""

    dp: int = 0
    """Data parallelism: ranks that work on other images of the batch."""
    wp_y: int = 0
    """Window parallelism: ranks the rows of windows are dealt to."""
    wp_x: int = 0
    """Window parallelism: ranks the columns of windows are dealt to."""
    pp: int = 0
    """Pipeline parallelism: stages the network is cut into."""
    sp: int = 0
    """Sequence parallelism: ranks that share each window; divides the heads."""
    shard: int = 0
    """Ranks over which weights and optimizer state of a stage are divided; 0 is all that hold the stage."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    p2p: Literal["auto", "async", "batched", "parity"] = "auto"
    """How stages post messages: async, each by itself (gloo); batched, sends first (NCCL, XCCL); or parity,
    blocking in turn over groups of two ranks."""
    timeout_s: float = 900.0
    """A rank that waits longer than this for another in one exchange ends the run."""
    self_test: bool = True
    """Try every kind of communication the run uses, and check what arrives, before training starts."""


@dataclass(frozen=True)
class FaultConfig:
    """What a run takes for a fault, and what it does then (docs/faults.md)."""

    start_s: float = 1800.0
    """The longest that building the run and its first step may take. Past a limit the late rank is named."""
    step_s: float = 600.0
    """The longest a step may take, reading its samples apart."""
    read_s: float = 600.0
    """The longest a step may wait for its samples."""
    save_s: float = 3600.0
    """The longest a checkpoint may hold up a step, or the end."""
    spike: float = 0.0
    """Skip a step whose log loss is so many standard deviations above its running mean; 0: never."""
    limit: int = 20
    """Stop after so many skipped steps, non-finite or spikes, within the last thousand."""
    slow_pct: float = 8.0
    """Say so when a rank computes so much longer than the median of its stage; 0: never."""
    slow_every: int = 100
    """Steps between two looks at how long every rank computes."""


@dataclass(frozen=True)
class TrainFaults(FaultConfig):
    """Faults of `aeris.train`, whose skipped steps can be taken again."""

    dumps: int = 3
    """Skipped steps that are kept for `aeris.replay`, with the weights of that moment."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    faults: TrainFaults = field(default_factory=TrainFaults)


AT_LEAST_ONE = {
    "model": ("rows", "cols", "window", "layers", "blocks", "width", "heads", "hidden"),
    "data": ("interval_h",),
    "train": ("images", "batch", "microbatch", "nonfinite_limit", "log_every"),
    "checkpoint": ("every_images", "keep"),
}


def check(config: RunConfig) -> None:
    """Check what can be checked without data or a device.

    Raises:
        ValueError: a number that must be positive is not, or two settings contradict each other.
    """
    for section, names in AT_LEAST_ONE.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 1:
                raise ValueError(f"--{section}.{name.replace('_', '-')} is {value}: it must be at least 1")
    if not config.parallel.timeout_s > 0:
        raise ValueError(f"--parallel.timeout-s is {config.parallel.timeout_s:g}: it must be positive")
    check_faults(config.faults, config.checkpoint)
    if config.faults.dumps < 0:
        raise ValueError(f"--faults.dumps is {config.faults.dumps}: it must be 0 (never) or more")
    for name in ("dp", "wp_y", "wp_x", "pp", "sp", "shard"):
        if getattr(config.parallel, name) < 0:
            flag = f"--parallel.{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {getattr(config.parallel, name)}: it counts ranks; 0 lets it be chosen"
            )
    train, model, diffusion = config.train, config.model, config.diffusion
    if train.batch % train.microbatch:
        raise ValueError(f"--train.microbatch {train.microbatch} does not divide --train.batch {train.batch}")
    if (model.precision == "fp64") != (model.residual == "fp64"):
        raise ValueError(
            f"--model.precision {model.precision} with --model.residual {model.residual}: fp64 needs both"
        )
    if not 0 < diffusion.sigma_min < diffusion.sigma_max or diffusion.sigma_data <= 0:
        raise ValueError(
            f"noise levels from --diffusion.sigma-min {diffusion.sigma_min:g} to --diffusion.sigma-max "
            f"{diffusion.sigma_max:g}: they must be positive and rise, and sigma_data too"
        )
    if not 0 <= diffusion.state_error < math.inf:
        raise ValueError(f"--diffusion.state-error is {diffusion.state_error:g}: it must be 0 or more")


def check_faults(faults: FaultConfig, checkpoint: CheckpointConfig) -> None:
    """Check the limits of time and number.

    Raises:
        ValueError: one of them cannot be.
    """
    for name in ("start_s", "step_s", "read_s", "save_s", "limit", "slow_every"):
        if not getattr(faults, name) > 0:
            raise ValueError(
                f"--faults.{name.replace('_', '-')} is {getattr(faults, name):g}: it must be positive"
            )
    for section, name, value in (
        ("faults", "spike", faults.spike),
        ("faults", "slow-pct", faults.slow_pct),
        ("checkpoint", "every-minutes", checkpoint.every_minutes),
    ):
        if not value >= 0:
            raise ValueError(f"--{section}.{name} is {value:g}: it must be 0 (never) or more")


def save(config: Any, path: Path) -> None:
    """Write a configuration as JSON, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    partial.replace(path)


def load(path: Path) -> RunConfig:
    """Read the configuration of a run of aeris.train; see `read`."""
    return read(path, RunConfig, "aeris.train")


def read(path: Path, kind: type[Settings], program: str) -> Settings:
    """Read a configuration written by `save`.

    Args:
        kind: the dataclass it is.
        program: that wrote it.

    Raises:
        ValueError: the file is missing or not a configuration of this version; names the first bad entry.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: {path.parent} is not a run directory of {program}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); restore it from the command that started the run"
        ) from None
    known = set(get_type_hints(kind))
    if isinstance(values, dict) and (len(set(values) - known) > 1 or not known & set(values)):
        raise ValueError(f"{path.parent} is a run of another program, not of {program}")
    config: Settings = from_dict(kind, values, str(path))
    return config


def from_dict(cls: Any, values: Any, where: str) -> Any:
    """Build a dataclass from plain values, checking names and types; `where` names the place in errors."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a section of settings, found {values!r}")
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(hints)}")
    return cls(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against its type and turn lists into tuples."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} is {value!r}; choose one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; expected a list")
        return _tuples(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, (type, types.UnionType)) and not isinstance(value, hint):
        raise ValueError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")
    return value


def _tuples(value: Any) -> Any:
    """Turn lists into tuples, at any depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
