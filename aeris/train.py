"""Train AERIS: `python -m aeris.train [PRESET] [--section.key value] --run-dir DIR`.

To resume, to go on with more images, or after a crash: the same command again, on any number of ranks:
`mpiexec -n 8 python -m aeris.train ...` or `torchrun --nproc-per-node 8 -m aeris.train ...`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from aeris import config as configs
from aeris.config import RunConfig
from aeris.dry_run import dry_run
from aeris.flops import flops_per_sample, measure_gemm_rate
from aeris.log import RunLog, console, progress_bar, run_program, speaker
from aeris.model.swin import DTYPES
from aeris.parallelize import Seat, build_model, choose_degrees, make_layout, take_seat
from aeris.presets import PRESETS
from aeris.rates import Rates
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts, check_same_run, open_store
from aeris.step import Training, check_finite, train_step
from launch.rank import discover, export, leave
from swipe.backend import choose_device, describe, finish, keep_freed_memory, start
from swipe.collectives import all_reduce, barrier, tell, together
from swipe.groups import choose_policy


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


def prepare(config: RunConfig, run_dir: Path, device_name: str = "auto") -> Training:
    """Check all that can be wrong, join the other ranks, build the run, and load its newest checkpoint.

    Raises:
        ValueError: settings that do not fit, another run in `run_dir`, other data than before.
        OSError: `run_dir` cannot be written, or the other ranks are not there.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    configs.check(config)
    store = open_store(config)
    counts = channel_counts(len(store.names))
    dims = choose_degrees(config, world)
    build_model(config.model, *counts, make_layout(config.model), "meta")
    check_same_run(config, run_dir)
    device = choose_device(device_name)
    choose_policy(config.parallel.p2p, device)
    start(device, config.parallel.timeout_s)
    seat = take_seat(config, counts, dims, rank, device)
    with together(seat.groups.world):
        check_same_command(config, seat)
        if seat.lead:
            make_directories(run_dir)
    run = Training(config, run_dir, store, seat)
    with together(seat.groups.world):
        resumed = run.resume()
        if seat.lead:
            configs.save(config, run_dir / "config.json")
    counted = torch.tensor(float(sum(p.numel() for p in run.model.parameters())) / (dims.dp * dims.places))
    parameters = int(all_reduce(counted.double(), seat.groups.world, "parameters").round())
    ranks = f"{world} ranks ({dims}), {device.type}" if world > 1 else str(device)
    console.print(f"{run_dir}: {parameters:,} parameters on {ranks}, {describe()}, data {store.path}")
    if resumed:
        console.print(f"resuming at image {run.images_seen:,} of {config.train.images:,}")
    return run


def check_same_command(config: RunConfig, seat: Seat) -> None:
    """Check that all ranks were started with the same settings; the path of the data may differ.

    Raises:
        ValueError: they were not; names a setting.
    """
    here = dataclasses.asdict(config)
    there = tell(seat.groups.world, here)
    for section, values in there.items():
        for name, value in values.items():
            if here[section][name] != value and (section, name) != ("data", "store"):
                raise ValueError(
                    f"rank {seat.groups.rank} was started with --{section}.{name.replace('_', '-')} "
                    f"{here[section][name]}, rank 0 with {value}"
                )


def make_directories(run_dir: Path) -> None:
    """Make the run directory.

    Raises:
        OSError: it cannot be written.
    """
    try:
        for directory in (run_dir, run_dir / "checkpoints", run_dir / "plots"):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write the run directory {run_dir} ({error}): choose another --run-dir"
        ) from None


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


def train(run: Training) -> None:
    """Train until `train.images` have been seen, saving checkpoints and one record per `log_every` steps.

    Raises:
        ValueError: too many non-finite steps in a row, or a sample that cannot be used.
        OSError: a checkpoint or record cannot be written, a sample cannot be read, or a rank is lost.
    """
    config, settings, seat = run.config, run.config.train, run.seat
    steps = max(0, -(-(settings.images - run.images_seen) // settings.batch))
    last = run.images_seen + steps * settings.batch
    images = ImageOrder(run.images_seen, last, settings.microbatch, seat.dims.dp, seat.at.dp)
    counts = channel_counts(len(run.store.names))
    flops = sum(flops_per_sample(config.model, *counts).values()) / seat.dims.world
    # Only rank 0 speaks of rates; the others would take the cores from it.
    gemm = measure_gemm_rate(run.device, DTYPES[config.model.precision]) if seat.lead else 1.0
    saved = run.images_seen
    display = Display(settings.images, run.images_seen)
    rates = Rates(run.images_seen, flops, gemm)
    samples = rates.samples(read_samples(config, run.store, seat, images))
    path = run.run_dir / "log.jsonl" if seat.lead else None
    with display.bar, RunLog(path, run.images_seen) as log:
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
            run.checkpoints.check()
        run.checkpoints.wait()


def plot(run_dir: Path) -> None:
    """Draw the training curve if matplotlib is there; say so if not."""
    try:
        from aeris.scores.plots import plot_training

        plot_training(run_dir / "log.jsonl", run_dir / "plots" / "training.png")
    except ImportError as error:
        console.print(f"no training curve: {error}")
        return
    console.print(f"training curve: {run_dir / 'plots' / 'training.png'}")


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
    ranks = discover(os.environ)
    speaker.take_turn(ranks.rank)
    with speaker.hush():
        arguments = parse(sys.argv[1:])
    if arguments.dry_run:
        dry_run(arguments.config, arguments.preset, ranks.world, arguments.json)
        return
    if arguments.json:
        raise ValueError("--json goes with --dry-run")
    keep_freed_memory()
    export(ranks)
    run = prepare(arguments.config, arguments.run_dir, arguments.device)
    train(run)
    if run.seat.lead:
        plot(arguments.run_dir)
    console.print(
        f"trained on {run.images_seen:,} images; checkpoints in {arguments.run_dir / 'checkpoints'}"
    )
    barrier(run.seat.groups.world, "the end")
    finish()
    leave()


if __name__ == "__main__":
    run_program(main)
