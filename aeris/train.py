"""Train AERIS: `python -m aeris.train [PRESET] [--section.key value] --run-dir DIR`.

To resume, to go on with more images, or after a crash: the same command again, on any number of ranks:
`mpiexec -n 8 python -m aeris.train ...` or `torchrun --nproc-per-node 8 -m aeris.train ...`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from aeris import config as configs
from aeris.config import RunConfig
from aeris.dry_run import dry_run
from aeris.dumps import directory, dump_step
from aeris.flops import flops_per_sample, measure_gemm_rate, recompute_flops
from aeris.guards import Guards
from aeris.log import RunLog, TrainingLine, console, run_program, speaker
from aeris.model.swin import DTYPES
from aeris.parallelize import build_model, choose_degrees, make_layout, take_seat
from aeris.presets import PRESETS
from aeris.rates import Rates, Yardstick, short
from aeris.reading import ImageOrder, read_samples, start_reading
from aeris.restore import channel_counts, check_same_run, open_store
from aeris.run import Record, carry_through, claim, meet
from aeris.startup import clock
from aeris.step import Training, train_step
from launch.rank import discover
from swipe.backend import choose_device, describe
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
    world_size: int = 0
    """With --dry-run: go through a step of so many ranks, all in this process, and match every message."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """Settings of the run."""


def prepare(
    config: RunConfig, run_dir: Path, device_name: str = "auto", guards: Guards | None = None
) -> Training:
    """Check all that can be wrong, join the other ranks, build the run, and load its newest checkpoint.

    Args:
        guards: of the program that trains; None: nothing is watched.

    Raises:
        ValueError: settings that do not fit, another run in `run_dir`, other data than before.
        OSError: `run_dir` cannot be written, or the other ranks are not there.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    configs.check(config)
    store = open_store(config)
    counts = channel_counts(len(store.names))
    dims = choose_degrees(config, world)
    whole = build_model(config.model, *counts, make_layout(config.model), "meta")
    parameters = sum(p.numel() for p in whole.parameters())
    check_same_run(config, run_dir)
    device = choose_device(device_name)
    choose_policy(config.parallel.p2p, device)
    meet(device, config.parallel.timeout_s, guards)
    seat = take_seat(config, counts, dims, rank, device)
    start_reading(config, seat)
    claim(config, run_dir, seat.groups, ("data.store",))
    run = Training(config, run_dir, store, seat, guards)
    ranks = f"{world} ranks ({dims}), {device.type}" if world > 1 else str(device)
    line = f"{run_dir}: {parameters:,} parameters on {ranks}, {describe()}, data {store.path}"
    run.begin([line], pipeline=run.pipeline)
    return run


def train(run: Training) -> None:
    """Train until `train.images` have been seen, saving checkpoints and one record per `log_every` steps.

    Raises:
        Stopped: the run was asked to stop, and has saved.
        ValueError: too many skipped steps, or a sample that cannot be used.
        OSError: a checkpoint or record cannot be written, a sample cannot be read, or a rank is lost.
    """
    config, settings, seat = run.config, run.config.train, run.seat
    steps, last = run.left()
    images = ImageOrder(run.images_seen, last, settings.microbatch, seat.dims.dp, seat.at.dp)
    line = TrainingLine(settings.images, run.images_seen, keep=0.98, digits=3)
    rates = make_rates(run)
    read = rates.samples(read_samples(config, run.store, seat, images))
    samples = clock.first(run.guards.reading(read), "first batch")
    path = run.run_dir / "log.jsonl" if seat.lead else None
    with line.bar, RunLog(path, run.images_seen) as log:
        for step in range(1, steps + 1):
            record = train_step(run, samples)
            rates.end_step(run.images_seen, taken="skip" not in record)
            clock.finish("first step", run.run_dir, seat.dims.world, seat.lead)
            run.report(record, keep_skipped(run, record))
            regular = step % settings.log_every == 0 or step == steps
            run.note(record, rates.since_last() if regular else {}, log, line, short)
            due = run.images_seen - run.saved_at >= config.checkpoint.every_images or step == steps
            if run.end_step(due):
                break
        run.close(last, rates)


def make_rates(run: Training) -> Rates:
    """Start the clock of the run's rates."""
    model, counts = run.config.model, channel_counts(len(run.store.names))
    flops, again = sum(flops_per_sample(model, *counts).values()), recompute_flops(model, *counts)
    # Only rank 0 speaks of rates; the others would take the cores from it.
    gemm = measure_gemm_rate(run.device, DTYPES[model.precision]) if run.seat.lead else 1.0
    clock.mark("rate of a GEMM")
    return Rates(run.images_seen, Yardstick(flops, again, run.seat.dims.world, gemm))


def keep_skipped(run: Training, record: Record) -> str:
    """Keep a skipped step for replay; return where such steps are, "" if none are kept; a collective call."""
    if "skip" in record:
        run.guards.phase("save")
        dump_step(run, record)
    return str(directory(run.run_dir)) if run.config.faults.dumps else ""


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
    clock.begin("imports")
    ranks = discover(os.environ)
    speaker.take_turn(ranks.rank, ranks.world)
    with speaker.hush():
        arguments = parse(sys.argv[1:])
    if arguments.dry_run:
        dry_run(arguments.config, arguments.preset, ranks.world, arguments.json, arguments.world_size)
        return
    if arguments.json or arguments.world_size:
        raise ValueError(f"--{'json' if arguments.json else 'world-size'} goes with --dry-run")
    config, run_dir = arguments.config, arguments.run_dir

    def work(run: Training) -> None:
        train(run)
        if run.seat.lead:
            plot(run_dir)
        console.print(f"trained on {run.images_seen:,} images; checkpoints in {run_dir / 'checkpoints'}")

    carry_through(
        ranks, config, run_dir, lambda guards: prepare(config, run_dir, arguments.device, guards), work
    )


if __name__ == "__main__":
    run_program(main)
