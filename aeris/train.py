"""Train AERIS: `python -m aeris.train [PRESET] [--section.key value] --run-dir DIR`.

To resume, to go on with more images, or after a crash: the same command again, on any number of ranks:
`mpiexec -n 8 python -m aeris.train ...` or `torchrun --nproc-per-node 8 -m aeris.train ...`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from aeris import config as configs
from aeris.config import RunConfig
from aeris.dry_run import dry_run
from aeris.dumps import directory, dump_step
from aeris.flops import flops_per_sample, measure_gemm_rate
from aeris.guards import Guards
from aeris.log import RunLog, TrainingLine, console, run_program, speaker
from aeris.model.swin import DTYPES
from aeris.optim import check_finite
from aeris.parallelize import build_model, choose_degrees, make_layout, take_seat
from aeris.presets import PRESETS
from aeris.rates import Rates
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts, check_same_run, open_store
from aeris.run_directory import check_same_command, ending, make_directories, parting
from aeris.startup import clock
from aeris.step import Training, train_step
from launch.rank import discover, export
from swipe.backend import choose_device, describe, keep_freed_memory, start
from swipe.collectives import all_reduce, together
from swipe.groups import choose_policy
from swipe.selftest import self_test


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
    build_model(config.model, *counts, make_layout(config.model), "meta")
    check_same_run(config, run_dir)
    device = choose_device(device_name)
    choose_policy(config.parallel.p2p, device)
    clock.mark("settings")
    start(device, config.parallel.timeout_s)
    if guards is not None:
        guards.requests.begin()
    clock.mark("rendezvous")
    seat = take_seat(config, counts, dims, rank, device)
    clock.mark("groups")
    with together(seat.groups.world):
        check_same_command(config, seat.groups.world, rank, ("data.store",))
        if seat.lead:
            make_directories(run_dir)
    run = Training(config, run_dir, store, seat, guards)
    clock.mark("model")
    tested = self_test(seat.groups, device, run.pipeline) if config.parallel.self_test else ""
    clock.mark("self test")
    with together(seat.groups.world):
        resumed = run.resume()
        if seat.lead:
            configs.save(config, run_dir / "config.json")
    clock.mark("checkpoint")
    counted = torch.tensor(float(sum(p.numel() for p in run.model.parameters())) / (dims.dp * dims.places))
    parameters = int(all_reduce(counted.double(), seat.groups.world, "parameters").round())
    ranks = f"{world} ranks ({dims}), {device.type}" if world > 1 else str(device)
    console.print(f"{run_dir}: {parameters:,} parameters on {ranks}, {describe()}, data {store.path}")
    if tested:
        console.print(tested)
    if config.optimizer.offload != "none":
        console.print(f"AdamW: {run.optimizer}")
    if resumed:
        done = "trained already" if run.images_seen >= config.train.images else "resuming"
        console.print(f"{done} at image {run.images_seen:,} of {config.train.images:,}")
    return run


def said(record: dict[str, Any]) -> str:
    """Put the rates of a record into words."""
    return (
        f"{record['images_per_s']:.1f} img/s {record['tflops']:.2f} TFLOP/s MFU {record['mfu']:.0%} "
        f"data {record['data_wait']:.0%}"
    )


def train(run: Training) -> None:
    """Train until `train.images` have been seen, saving checkpoints and one record per `log_every` steps.

    Raises:
        Stopped: the run was asked to stop, and has saved.
        ValueError: too many skipped steps, or a sample that cannot be used.
        OSError: a checkpoint or record cannot be written, a sample cannot be read, or a rank is lost.
    """
    config, settings, seat = run.config, run.config.train, run.seat
    steps = max(0, -(-(settings.images - run.images_seen) // settings.batch))
    last = run.images_seen + steps * settings.batch
    images = ImageOrder(run.images_seen, last, settings.microbatch, seat.dims.dp, seat.at.dp)
    saved = run.images_seen
    line = TrainingLine(settings.images, run.images_seen, keep=0.98, digits=3)
    rates = make_rates(run)
    read = rates.samples(read_samples(config, run.store, seat, images))
    samples = clock.first(run.guards.reading(read), "first batch")
    path = run.run_dir / "log.jsonl" if seat.lead else None
    with line.bar, RunLog(path, run.images_seen) as log:
        for step in range(1, steps + 1):
            record = train_step(run, samples)
            clock.finish("first step", run.run_dir, seat.dims.world, seat.lead)
            judge(run, record)
            run.guards.compare(record)
            if "skip" not in record:
                line.smooth(record["loss"])
            if step % settings.log_every == 0 or step == steps:
                record |= rates.since_last(run.images_seen)
                log.write(record)
                line.show(run.images_seen, said(record))
            elif "skip" in record or "slow" in record:
                log.write(record)
            due = run.images_seen - saved >= config.checkpoint.every_images or step == steps
            if due or run.settled.save or run.settled.stop:
                run.guards.phase("save")
                run.save()
                saved = run.images_seen
            run.checkpoints.check()
            if run.settled.stop:
                break
            run.guards.phase("step")
        run.guards.phase("save")
        run.checkpoints.wait()
    if run.images_seen < last:
        raise run.guards.requests.obeyed(run.images_seen)


def make_rates(run: Training) -> Rates:
    """Start the clock of the run's rates."""
    counts = channel_counts(len(run.store.names))
    flops = sum(flops_per_sample(run.config.model, *counts).values()) / run.seat.dims.world
    # Only rank 0 speaks of rates; the others would take the cores from it.
    gemm = measure_gemm_rate(run.device, DTYPES[run.config.model.precision]) if run.seat.lead else 1.0
    clock.mark("rate of a GEMM")
    return Rates(run.images_seen, flops, gemm)


def judge(run: Training, record: dict[str, Any]) -> None:
    """Keep a skipped step for replay, and stop a run in which too many are; a collective call.

    Raises:
        ValueError: too many steps were skipped.
    """
    if "skip" in record:
        run.guards.phase("save")
        dump_step(run, record)
    limit = run.config.train.nonfinite_limit
    check_finite(run.model, run.seat.groups.world, run.skipped_in_a_row, limit)
    run.spikes.report(record, str(directory(run.run_dir)) if run.config.faults.dumps else "")


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
    config, run_dir, lead = arguments.config, arguments.run_dir, ranks.rank == 0
    guards = Guards(run_dir, config.checkpoint.every_minutes, lead)
    with ending(run_dir, lead) as end, guards.on_duty(config.faults, ranks.rank, ranks.world):
        end.run = run = prepare(config, run_dir, arguments.device, guards)
        with parting(run.seat.groups.world, end):
            train(run)
            if lead:
                plot(run_dir)
            console.print(f"trained on {run.images_seen:,} images; checkpoints in {run_dir / 'checkpoints'}")


if __name__ == "__main__":
    run_program(main)
