"""Train Aurora: `python -m aeris.aurora.finetune [PRESET] --model NAME --weights FROM --data PATH`.

To resume, to go on with more images, or after a crash: the same command again, on any number of ranks:
`mpiexec -n 8 python -m aeris.aurora.finetune ...`, or torchrun with `-m aeris.aurora.finetune ...`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from aeris.aurora.rollout import lead_times
from aeris.aurora.training import config as configs
from aeris.aurora.training.config import FineTuneConfig
from aeris.aurora.training.presets import PRESETS
from aeris.aurora.training.reading import Data, open_data, read_samples
from aeris.aurora.training.run import (
    UNTRAINABLE,
    FineTuning,
    computed_in,
    make_loss_weights,
    take_seat,
)
from aeris.aurora.training.starting_weights import Start, build, find_start
from aeris.aurora.training.step import train_step, training_scores, validate
from aeris.aurora.variants import VARIANTS
from aeris.flops import measure_gemm_rate
from aeris.guards import Guards
from aeris.log import RunLog, TrainingLine, console, run_program, speaker
from aeris.rates import Rates, Yardstick, short
from aeris.reading import ImageOrder
from aeris.run import carry_through, claim, meet
from aeris.startup import clock
from launch.rank import discover
from swipe import checkpoint
from swipe.backend import choose_device, describe
from swipe.collectives import together
from swipe.groups import check_shard
from swipe.mesh import ParallelDims


@dataclass(frozen=True)
class Arguments:
    """Train an Aurora model. Run the same command again to resume."""

    preset: Annotated[
        Literal["pretrain", "one-step", "two-step", "lora-three-step", "lora-replay"], tyro.conf.Positional
    ] = "one-step"
    """Named training to start from; every setting below overrides it."""
    run_dir: Path = Path("runs/one-step")
    """Directory of the run: config.json, log.jsonl, checkpoints/, plots/, weights.pt."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda or xpu."""
    dry_run: bool = False
    """Check settings, data and weights, print the resolved configuration as JSON, and stop."""
    config: Annotated[FineTuneConfig, tyro.conf.arg(name="")] = field(default_factory=FineTuneConfig)
    """Settings of the run."""


@dataclass(frozen=True)
class Checked:
    """What was found to fit together before any rank meets another."""

    data: Data
    start: Start | None
    parameters: int
    trained: int
    forward_flops: int
    """Of one model step of one sample."""


def check_all(config: FineTuneConfig, run_dir: Path, world: int = 1) -> Checked:
    """Check all that can be wrong, and open data and weights.

    Raises:
        ValueError: settings, data and weights that do not fit each other, or another run in `run_dir`.
    """
    configs.check(config, world)
    check_shard(ParallelDims(dp=world), config.parallel.shard)
    if config.variant in UNTRAINABLE:
        known = ", ".join(name for name in VARIANTS if name not in UNTRAINABLE)
        raise ValueError(f"training of {config.variant} is not built; models that can be trained: {known}")
    make_loss_weights(config)
    model = build(config.variant, config.aurora, "meta")
    parameters = sum(p.numel() for p in model.parameters())
    if config.rollout.train == "adapters":
        model.freeze_base()
    configs.check_same_run(config, run_dir)
    resumes = bool(checkpoint.complete(run_dir / "checkpoints"))
    from_scratch = config.weights == configs.FRESH
    found = None if from_scratch or resumes else find_start(config.weights, model, config.partial)
    data = open_data(config)
    make_loss_weights(config, data.weather.levels)
    # Shapes alone: says what does not fit of grid, variables and levels. Autocast knows no "meta".
    plain = dataclasses.replace(config.aurora, use_lora=False, autocast=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes = build(config.variant, plain, "meta").eval()
        shapes(data.training[0].input.to("meta"), **lead_times(shapes, 1))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Checked(data, found, parameters, trained, counter.get_total_flops())


def prepare(
    config: FineTuneConfig, run_dir: Path, device_name: str = "auto", guards: Guards | None = None
) -> FineTuning:
    """Check all that can be wrong, join the other ranks, build the run, and load its newest checkpoint.

    Args:
        guards: of the program that trains; None: nothing is watched.

    Raises:
        ValueError: see `check_all`; or ranks were started with other settings.
        OSError: `run_dir` cannot be written, or the other ranks are not there.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    checked = check_all(config, run_dir, world)
    device = choose_device(device_name)
    meet(device, config.parallel.timeout_s, guards)
    seat = take_seat(config, world, rank, device)
    claim(config, run_dir, seat.groups, ("data.paths", "data.static", "weights"), configs.FLAGS)
    run = FineTuning(config, run_dir, checked.data, seat, checked.start, guards)
    run.forward_flops = checked.forward_flops
    run.begin(introduction(run, checked), otherwise=f"starting from {checked.start or 'fresh weights'}")
    return run


def introduction(run: FineTuning, checked: Checked) -> list[str]:
    """Say what is trained, and on what."""
    config, world, device = run.config, run.seat.world, run.device
    ranks = f"{world} ranks, {device.type}" if world > 1 else str(device)
    aurora, dtype = computed_in(config, device)
    precision = "bf16 autocast" if aurora.autocast else str(dtype).removeprefix("torch.")
    lines = [
        f"{run.run_dir}: {config.variant}, {checked.trained:,} of {checked.parameters:,} parameters trained, "
        f"{precision}, {ranks}, {describe()}",
        f"{len(checked.data.training):,} samples of {' '.join(config.data.paths)}",
    ]
    if left_out := checked.data.weather.left_out:
        lines.append(f"{left_out:,} times are left out: a variable is missing there")
    return lines


def due(run: FineTuning, every: int, end: int) -> bool:
    """Whether something that happens every so many images does so after this update, or at the end."""
    before = run.images_seen - run.config.train.batch
    return run.images_seen >= end or run.images_seen // every > before // every


def train(run: FineTuning) -> None:
    """Train until `train.images` have been seen, with validations, checkpoints and records.

    Raises:
        Stopped: the run was asked to stop, and has saved.
        ValueError: too many skipped updates, or data that cannot be used.
        OSError: a checkpoint or record cannot be written, data cannot be read, or a rank is lost.
    """
    config, settings, seat = run.config, run.config.train, run.seat
    updates, end = run.left()
    images = ImageOrder(run.images_seen, end, settings.microbatch, seat.world, seat.rank)
    pin_memory = run.device.type != "cpu"
    if run.replay:
        items = run.replay.read(updates, pin_memory)
    else:
        items = read_samples(config, run.data, images, pin_memory)
    line = TrainingLine(settings.images, run.images_seen, keep=0.95, digits=4)
    rates = make_rates(run)
    samples = clock.first(run.guards.reading(rates.samples(items)), "first batch")
    path = run.run_dir / "log.jsonl" if seat.lead else None
    with line.bar, RunLog(path, run.images_seen or -1) as log:
        if run.images_seen == 0:
            log_validation(run, log)
            clock.mark("validation")
        for update in range(1, updates + 1):
            record = train_step(run, samples)
            rates.end_step(run.images_seen, taken="skip" not in record)
            clock.finish("first step", run.run_dir, seat.world, seat.lead)
            run.report(record)
            regular = update % settings.log_every == 0 or update == updates
            run.note(record, rates.since_last() if regular else {}, log, line, short)
            if config.validate.every_images and due(run, config.validate.every_images, end):
                log_validation(run, log)
            if run.end_step(due(run, config.checkpoint.every_images, end)):
                break
        run.close(end, rates)


def make_rates(run: FineTuning) -> Rates:
    """Start the clock of the run's rates.

    A backward pass counts as twice the forward pass (torch counts 2.01 times as much). With a frozen base it
    is less, by how far the adapters reach: FLOPs are not known then.
    """
    config, device = run.config, run.device
    if config.rollout.train == "adapters":
        return Rates(run.images_seen)
    aurora, dtype = computed_in(config, device)
    # Only rank 0 speaks of rates; the others would take the cores from it.
    products = torch.bfloat16 if aurora.autocast else dtype
    gemm = measure_gemm_rate(device, products) if run.seat.lead else 1.0
    clock.mark("rate of a GEMM")
    flops = 3 * config.rollout.steps * run.forward_flops
    return Rates(run.images_seen, Yardstick(flops, devices=run.seat.world, gemm_flops_per_s=gemm))


def log_validation(run: FineTuning, log: RunLog) -> None:
    """Validate, and write the scores of validation and of the training since the last time."""
    if run.data.validation is None:
        return
    found = {"training": training_scores(run), "validation": validate(run)}
    log.write({"images_seen": run.images_seen, "scores": {part: x for part, x in found.items() if x}})
    losses = ", ".join("-" if x is None else f"{x:.4f}" for x in found["validation"]["loss"])
    console.print(f"image {run.images_seen:,}: validation loss {losses}")
    rmse = found["validation"]["rmse"]
    if unknown := [name for name, values in rmse.items() if None in values]:
        console.print(f"no score of {', '.join(unknown)}: missing in the data, or not finite")


def plot(run_dir: Path) -> None:
    """Draw the curves if matplotlib is there; say so if not."""
    try:
        from aeris.aurora.training.curves import plot_curves
        from aeris.scores.plots import plot_training

        plot_training(run_dir / "log.jsonl", run_dir / "plots" / "training.png")
        plot_curves(run_dir / "log.jsonl", run_dir / "plots" / "curves.png")
    except (ImportError, ValueError) as error:
        console.print(f"not all curves: {error}")
        return
    console.print(f"curves: {run_dir / 'plots' / 'training.png'}, {run_dir / 'plots' / 'curves.png'}")


def parse(argv: list[str]) -> Arguments:
    """Read the command line over the preset and the model it names; the run directory is named after both."""
    preset, variant = "one-step", "small"
    while True:
        config = PRESETS[preset]().of(variant, VARIANTS[variant].default)
        name = Path("runs") / f"{variant}-{preset}"
        default = Arguments(preset=cast(Any, preset), run_dir=name, config=config)
        prog = "python -m aeris.aurora.finetune"
        found = tyro.cli(Arguments, args=argv, default=default, prog=prog, description=Arguments.__doc__)
        if (found.preset, found.config.variant) == (preset, variant):
            return found
        preset, variant = found.preset, found.config.variant  # read again, now over their settings
        if variant not in VARIANTS:
            raise ValueError(f"--model {variant} is not known: choose one of {', '.join(VARIANTS)}")


def main() -> None:
    """Run the program."""
    clock.begin("imports")
    ranks = discover(os.environ)
    speaker.take_turn(ranks.rank, ranks.world)
    with speaker.hush():
        arguments = parse(sys.argv[1:])
    if arguments.dry_run:
        checked = check_all(arguments.config, arguments.run_dir, ranks.world)
        about: dict[str, Any] = {"parameters": checked.parameters, "trained": checked.trained}
        about |= {"samples": len(checked.data.training), "config": dataclasses.asdict(arguments.config)}
        if speaker.rank == 0:
            print(json.dumps(about, indent=1))
        return
    config, run_dir = arguments.config, arguments.run_dir

    def work(run: FineTuning) -> None:
        train(run)
        with together(run.groups.world):
            run.export(run_dir / "weights.pt")
        if run.seat.lead:
            plot(run_dir)
        console.print(f"trained on {run.images_seen:,} images; weights in {run_dir / 'weights.pt'}")

    carry_through(
        ranks, config, run_dir, lambda guards: prepare(config, run_dir, arguments.device, guards), work
    )


if __name__ == "__main__":
    run_program(main)
