"""Train AERIS: `python -m aeris.train [PRESET] [--section.key value] --run-dir DIR`.

To resume, to go on with more images, or after a crash: the same command again. One process for now.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table
from torch.utils.data import DataLoader

from aeris import config as configs
from aeris.config import RunConfig
from aeris.data.loader import Sample, SampleDataset, make_loader
from aeris.flops import costs, measure_gemm_rate
from aeris.log import RunLog, console, progress_bar, run_program
from aeris.model.swin import DTYPES
from aeris.parallelize import build_model, make_layout
from aeris.presets import PRESETS
from aeris.rates import Rates
from aeris.restore import channel_counts, check_same_run, open_store
from aeris.step import Training, check_finite, train_step
from swipe.backend import choose_device, keep_freed_memory


@dataclass(frozen=True)
class Arguments:
    """Train an AERIS diffusion model. Run the same command again to resume."""

    preset: Annotated[Literal["tiny", "1.3b-6h", "1.3b-24h", "13b", "40b", "80b"], tyro.conf.Positional] = (
        "tiny"
    )
    """Named configuration to start from; every setting below overrides it."""
    run_dir: Path = Path("runs/tiny")
    """Directory of the run: config.json, log.jsonl, checkpoints/, plots/."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda or xpu."""
    dry_run: bool = False
    """Print the resolved configuration, parameters, memory and FLOPs, and stop."""
    json: bool = False
    """With --dry-run: print one JSON object and nothing else."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """Settings of the run."""


def prepare(config: RunConfig, run_dir: Path, device: torch.device) -> Training:
    """Check all that can be wrong, write config.json, build the run, and load its newest checkpoint.

    Raises:
        ValueError: settings that do not fit, another run in `run_dir`, other data than before.
        OSError: `run_dir` cannot be written.
    """
    configs.check(config)
    store = open_store(config)
    build_model(config.model, *channel_counts(len(store.names)), make_layout(config.model), "meta")
    check_same_run(config, run_dir)
    try:
        for directory in (run_dir, run_dir / "checkpoints", run_dir / "plots"):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write the run directory {run_dir} ({error}): choose another --run-dir"
        ) from None
    run = Training(config, run_dir, store, device)
    resumed = run.resume()
    configs.save(config, run_dir / "config.json")
    parameters = sum(p.numel() for p in run.model.parameters())
    console.print(
        f"{run_dir}: {parameters:,} parameters on {device}, torch {torch.__version__}, data {store.path}"
    )
    if resumed:
        console.print(f"resuming at image {run.images_seen:,} of {config.train.images:,}")
    return run


class Display:
    """The live line of a run: images done, smoothed loss, rates; without a terminal, a line every 30 s."""

    EVERY_S = 30.0

    def __init__(self, images: int, images_seen: int) -> None:
        """Make the line; it shows while `bar` is open as a context."""
        self.bar = progress_bar("numbers")
        self._task = self.bar.add_task("", total=images, completed=images_seen, numbers="")
        self._loss: float | None = None
        self._said = time.monotonic()

    def smooth(self, loss: float) -> None:
        """Take in the loss of a step: a moving average over about 50 of them, skipped steps left out."""
        if not math.isfinite(loss):
            return
        self._loss = loss if self._loss is None else 0.98 * self._loss + 0.02 * loss

    def show(self, record: dict[str, Any]) -> None:
        """Show a record."""
        loss = math.nan if self._loss is None else self._loss
        numbers = (
            f"loss {loss:.3f} {record['images_per_s']:.1f} img/s {record['tflops']:.2f} TFLOP/s "
            f"MFU {record['mfu']:.0%} data {record['data_wait']:.0%}"
        )
        self.bar.update(self._task, completed=record["images_seen"], numbers=numbers)
        if not console.is_terminal and time.monotonic() - self._said > self.EVERY_S:
            self._said = time.monotonic()
            console.print(f"image {record['images_seen']:,}: {numbers}")


def load(run: Training, steps: int) -> DataLoader[Sample]:
    """Read the run's next `steps` batches, one microbatch at a time."""
    config, train = run.config, run.config.train
    period = run.store.statistics.train_period
    data = config.data
    dataset = SampleDataset(run.store.path, data.interval_h, run.layout.shard, train.seed, period, data.roll)
    return make_loader(
        dataset,
        run.images_seen,
        run.images_seen + steps * train.batch,
        train.microbatch,
        config.data.workers,
        pin_memory=run.device.type != "cpu",
    )


def train(run: Training) -> None:
    """Train until `train.images` have been seen, saving checkpoints and one record per `log_every` steps.

    Raises:
        ValueError: too many non-finite steps in a row, or a sample that cannot be used.
        OSError: a checkpoint or record cannot be written, or a sample cannot be read.
    """
    config, settings = run.config, run.config.train
    steps = max(0, -(-(settings.images - run.images_seen) // settings.batch))
    loader = load(run, steps)
    flops = costs(config, len(run.store.names))["flops_per_sample"]
    gemm = measure_gemm_rate(run.device, DTYPES[config.model.precision])
    saved = run.images_seen
    display = Display(settings.images, run.images_seen)
    rates = Rates(run.images_seen, flops, gemm)
    samples = rates.samples(loader)
    with display.bar, RunLog(run.run_dir / "log.jsonl", run.images_seen) as log:
        for step in range(1, steps + 1):
            record = train_step(run, samples)
            check_finite(run)
            display.smooth(record["loss"])
            if step % settings.log_every == 0 or step == steps:
                record |= rates.since_last(run.images_seen)
                log.write(record)
                display.show(record)
            if run.images_seen - saved >= config.checkpoint.every_images or step == steps:
                run.save()
                saved = run.images_seen


def plot(run_dir: Path) -> None:
    """Draw the training curve if matplotlib is there; say so if not."""
    try:
        from aeris.scores.plots import plot_training

        plot_training(run_dir / "log.jsonl", run_dir / "plots" / "training.png")
    except ImportError as error:
        console.print(f"no training curve: {error}")
        return
    console.print(f"training curve: {run_dir / 'plots' / 'training.png'}")


def dry_run(arguments: Arguments) -> None:
    """Print the resolved configuration and what a step costs; build nothing but shapes."""
    config = arguments.config
    configs.check(config)
    channels = len(config.data.channels) or len(open_store(config).names)
    found = costs(config, channels)
    if arguments.json:
        print(json.dumps({**found, "preset": arguments.preset, "config": dataclasses.asdict(config)}))
        return
    for section, values in dataclasses.asdict(config).items():
        table = Table(title=section, title_justify="left", show_header=False, box=None)
        for name, value in values.items():
            table.add_row(f"--{section}.{name.replace('_', '-')}", str(value))
        console.print(table)
    table = Table(title="what it costs", title_justify="left", show_header=False, box=None)
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("FLOPs per sample, forward + backward", f"{found['flops_per_sample']:.4g}")
    for name, value in found["flops_by_part"].items():
        table.add_row(f"  {name.replace('_', ' ')}", f"{value / found['flops_per_sample']:.2%}")
    table.add_row("FLOPs per sample, repeated by checkpointing", f"{found['recompute_flops_per_sample']:.4g}")
    for name, value in found["memory_bytes"].items():
        table.add_row(f"memory, {name}", f"{value / 2**30:.3f} GiB")
    console.print(table)


def parse(argv: list[str]) -> Arguments:
    """Read the command line over the preset it names (tiny if none); the run directory is named after it."""
    preset = "tiny"
    while True:
        default = Arguments(preset=preset, run_dir=Path("runs") / preset, config=PRESETS[preset]())  # type: ignore[arg-type]
        found = tyro.cli(
            Arguments, args=argv, default=default, prog="python -m aeris.train", description=Arguments.__doc__
        )
        if found.preset == preset:
            return found
        preset = found.preset  # read again, now over the settings of the preset that was named


def main() -> None:
    """Run the program."""
    arguments = parse(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this version trains in one process: "
            "start it without torchrun"
        )
    if arguments.dry_run:
        dry_run(arguments)
        return
    if arguments.json:
        raise ValueError("--json goes with --dry-run")
    keep_freed_memory()
    run = prepare(arguments.config, arguments.run_dir, choose_device(arguments.device))
    train(run)
    plot(arguments.run_dir)
    console.print(
        f"trained on {run.images_seen:,} images; checkpoints in {arguments.run_dir / 'checkpoints'}"
    )


if __name__ == "__main__":
    run_program(main)
