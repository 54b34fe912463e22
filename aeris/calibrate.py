"""Calibrate the ensembles of a trained run: find settings with which their spread fits their error.

    python -m aeris.calibrate runs/mine --init 2003-01-05T00:2003-12-20T00:672h --members 8 --lead-h 120

Forecasts of a validation period are made with one setting after the other (aeris/sweep.py says which, and by
what rule one is chosen), scored and forgotten. The choice is written to RUN/calibration.json, which
`aeris.forecast --calibrated` reads. After a stop the same command goes on, on any number of ranks.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich import box
from rich.table import Table

from aeris.calibration import calibrated
from aeris.calibration.picture import plot_calibration
from aeris.calibration.sweep import MOST_WORSE, Changes, Search, Settings, Trial, most_trials, read_sweep
from aeris.calibration.trials import Array, Trials
from aeris.config import ParallelConfig
from aeris.data.store import Store
from aeris.diffusion.sampler import SamplerConfig, nfe
from aeris.forecasting.boundary import BoundaryConfig
from aeris.forecasting.ensemble import init_times
from aeris.forecasting.opening import Opened, find_run, take_seats
from aeris.forecasting.perturbation import PerturbationConfig
from aeris.forecasting.rollout import lead_times
from aeris.log import console, progress_bar, run_program, speaker
from aeris.scores.display import headline_channels
from aeris.scores.plots.figure import NoMatplotlib
from launch.rank import discover, export, leave
from swipe.backend import finish, keep_freed_memory, start
from swipe.collectives import barrier, together

DIRECTORY, PICTURE = "calibration", "calibration.png"
MOST_CHANNELS = 4
RULE = (
    "least mean |SSR - target| of those whose mean CRPS change is at most one standard error, and at most "
    f"{MOST_WORSE:.1%}, above 0"
)


@dataclass(frozen=True)
class Arguments:
    """Find settings with which the spread of a run's ensembles fits their error. The same command goes on."""

    run: tyro.conf.Positional[Path]
    """Directory of a run of aeris.train."""
    init: tuple[str, ...]
    """Init times in a validation period: 2003-01-05T00 (several), or START:END:STEPh, both ends included."""
    members: int = 8
    """Members of an ensemble."""
    lead_h: int = 120
    """Last lead time in hours."""
    target_ssr: float = 1.0
    """The spread/skill ratio wanted: 1 where the truth is exact, below where it has errors of its own."""
    sweep: tuple[str, ...] = ()
    """What to try, such as churn=0,2.5,5 perturb=0,0.1,0.2; of churn, churn_noise, churn_min, initial_scale,
    sigma_min, sigma_max, levels, perturb (amplitude). Empty: churn, churn_noise, initial_scale, perturb and
    a lower sigma_max."""
    channels: tuple[str, ...] = ()
    """Channels to judge by, by short name; empty: up to four, z500 t850 q700 t2m first."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The baseline."""
    perturb: PerturbationConfig = field(default_factory=PerturbationConfig)
    """The baseline; --perturb.kind is that of the sweep's amplitudes too, noise if none."""
    batch: int = 4
    """Members computed at the same time; more need more memory."""
    seed: int = 0
    """Seed of all noise."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or xpu."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, or those of the last training step."""
    checkpoint: str = ""
    """Name of a checkpoint in RUN/checkpoints, or its images; empty takes the newest."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Shared out over dp are init times."""
    store: str = ""
    """Directory of a store with the validation period; empty takes the run's."""
    dry_run: bool = False
    """Check everything, print what would be computed, and stop."""
    json: bool = False
    """With --dry-run: print one JSON object and nothing else."""


@dataclass(frozen=True)
class Task:
    """What is to be done; every rank has one."""

    arguments: Arguments
    opened: Opened
    trials: Trials
    base: Settings
    factors: dict[str, tuple[float, ...]]

    @property
    def most_trials(self) -> int:
        """Trials at most."""
        return most_trials(self.factors, self.base.sampler.churn)

    @property
    def steps(self) -> int:
        """Steps of one member in a trial."""
        return len(self.trials.inits) * self.trials.members * len(self.trials.lead_h)

    @property
    def most_evaluations(self) -> int:
        """Network evaluations at most: of every trial with the most levels there are."""
        levels = (self.base.sampler.levels, *self.factors.get("levels", ()))
        per_step = max(nfe(self.base.changed({"levels": number}).sampler) for number in levels)
        return self.most_trials * self.steps * per_step


def prepare(arguments: Arguments) -> Task:
    """Load the run and join the other ranks; compute and write nothing.

    Raises:
        ValueError: a wrong run, store, init time, lead time, channel, sweep or layout.
        OSError: the other ranks are not there.
    """
    if arguments.members < 2 or arguments.batch < 1:
        raise ValueError(
            f"--members {arguments.members} must be 2 or more to have a spread, --batch {arguments.batch} 1"
        )
    if not arguments.target_ssr > 0:
        raise ValueError(f"--target-ssr {arguments.target_ssr:g} must be positive")
    trained, store = find_run(
        arguments.run, arguments.checkpoint, arguments.weights, arguments.parallel, arguments.store
    )
    interval_h, diffusion = trained.config.data.interval_h, trained.config.diffusion
    lead_times(arguments.lead_h, interval_h)
    inits = init_times(arguments.init, store)
    check_period(store, inits, arguments.lead_h, interval_h)
    channels = choose_channels(store.names, arguments.channels)
    base = Settings(arguments.sampler, arguments.perturb)
    factors = read_sweep(arguments.sweep, base, diffusion)
    opened = take_seats(
        trained, store, sampler=arguments.sampler, perturbation=PerturbationConfig(),
        boundary=BoundaryConfig(), seed=arguments.seed, members=len(inits), device=arguments.device,
        join=start,
    )  # fmt: skip
    trials = Trials(
        opened, arguments.run / DIRECTORY, inits, arguments.members, arguments.lead_h, channels,
        arguments.batch, arguments.seed,
    )  # fmt: skip
    return Task(arguments, opened, trials, base, factors)


def choose_channels(names: tuple[str, ...], asked: tuple[str, ...]) -> tuple[str, ...]:
    """Return the channels to judge by.

    Raises:
        ValueError: the store does not have one.
    """
    if unknown := [name for name in asked if name not in names]:
        raise ValueError(f"--channels {' '.join(unknown)}: the run has {' '.join(names)}")
    return asked or tuple(names[place] for place in headline_channels(names, MOST_CHANNELS))


def check_period(store: Store, inits: tuple[str, ...], lead_h: int, interval_h: int) -> None:
    """Refuse init times whose forecasts touch the training period, or whose truth the store lacks.

    Raises:
        ValueError: names the first.
    """
    start, end = store.statistics.train_period
    for init in inits:
        first = np.datetime64(init, "s")
        last = first + np.timedelta64(lead_h, "h")
        if first <= end and last >= start:
            raise ValueError(
                f"the forecast from {init} to {last} touches the training period, {start} to {end}, where "
                "the network knows the truth and its error is too small: take init times outside"
            )
        for hours in range(interval_h, lead_h + 1, interval_h):
            store.index_of(first + np.timedelta64(hours, "h"))


def calibrate(task: Task) -> tuple[Trial, list[Trial]]:
    """Make all trials; return the one chosen, and all, the baseline first. A collective call.

    Raises:
        ValueError: the baseline's forecasts do not stay finite, or an initial state cannot be made.
    """
    with progress_bar("trial") as bar:
        line = bar.add_task("evaluations", total=task.most_evaluations, trial="")

        def compute(changes: Changes) -> Array | str:
            trial = f"trial {len(search.trials) + 1} of at most {task.most_trials}"
            bar.update(line, trial=trial)
            settings = task.base.changed(changes)
            per_step = nfe(settings.sampler)
            return task.trials.run(settings, lambda n: bar.advance(line, n * per_step))

        search = Search(compute, task.trials.members, task.arguments.target_ssr)
        best = search.run(task.factors, task.base.sampler.churn)
        bar.update(line, total=bar.tasks[0].completed)
    return best, search.trials


def conclude(task: Task, best: Trial, trials: list[Trial]) -> None:
    """Write the choice and a picture of it, on one rank."""
    arguments, opened = task.arguments, task.opened
    chosen = task.base.changed(best.changes)
    about = {
        "checkpoint": calibrated.checkpoint_name(arguments.run, arguments.checkpoint),
        "weights": arguments.weights,
        "weights_sha256": opened.weights_sha256,
        "data": opened.store.fingerprint_id,
        "inits": [str(init) for init in task.trials.inits],
        "members": task.trials.members,
        "lead_h": list(task.trials.lead_h),
        "channels": list(task.trials.channels),
        "seed": arguments.seed,
        "target_ssr": arguments.target_ssr,
        "chosen": best.name,
        "rule": RULE,
        "trials": [record(trial) for trial in trials],
    }
    path = calibrated.write(arguments.run, chosen.sampler, chosen.perturb, about)
    print_trials(best, trials)
    console.print(f"{path}: {best.name}; forecast with it: python -m aeris.forecast ... --calibrated")
    try:
        picture = arguments.run / PICTURE
        plot_calibration(
            picture, best, trials, task.trials.lead_h, task.trials.channels, arguments.run.resolve().name
        )
        console.print(f"{picture}: spread and error before and after")
    except NoMatplotlib as error:
        console.print(str(error))


def record(trial: Trial) -> dict[str, Any]:
    """Return a trial as JSON values."""
    found: dict[str, Any] = {"changes": trial.changes, "allowed": trial.allowed}
    if trial.failed:
        return {**found, "failed": trial.failed}
    return {
        **found,
        "distance": trial.distance,
        "crps_change": trial.worse,
        "crps_change_error": trial.error,
        "ssr": [[None if np.isnan(x) else float(x) for x in row] for row in trial.ssr_JC],
        "crps": trial.crps_JC.tolist(),
    }


def print_trials(best: Trial, trials: list[Trial]) -> None:
    """Print all trials, the nearest to the target first."""
    title = "Trials: means over lead times and channels; off target is |SSR - target|"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("changes", "SSR", "off target", "CRPS change", ""):
        table.add_column(name, justify="left" if name in ("changes", "") else "right")
    for trial in sorted(trials, key=lambda trial: trial.distance):
        if trial.failed:
            table.add_row(trial.name, "", "", "", f"failed: {trial.failed}")
            continue
        note = "chosen" if trial is best else "" if trial.allowed else "CRPS worse"
        change = "" if trial is trials[0] else f"{trial.worse:+.2%} ± {trial.error:.2%}"
        mean = f"{np.nanmean(trial.ssr_JC):.3f}"
        table.add_row(trial.name, mean, f"{trial.distance:.3f}", change, note)
    console.print(table)


def summary(task: Task) -> dict[str, Any]:
    """Return what would be computed, as plain data."""
    return {
        "run": str(task.arguments.run),
        "store": str(task.opened.store.path),
        "init_times": [str(init) for init in task.trials.inits],
        "members": task.trials.members,
        "lead_h": list(task.trials.lead_h),
        "channels": list(task.trials.channels),
        "sweep": {name: list(values) for name, values in task.factors.items()},
        "trials_at_most": task.most_trials,
        "steps_of_a_member_in_a_trial": task.steps,
        "evaluations_at_most": task.most_evaluations,
        "ranks": task.opened.seat.groups.dims.world,
        "replicas": task.opened.replicas,
    }


def print_summary(values: dict[str, Any]) -> None:
    """Print what will be computed."""
    for name, value in values.items():
        if isinstance(value, dict):
            shown = "; ".join(
                f"{key} {', '.join(f'{x:g}' for x in several)}" for key, several in value.items()
            )
        elif isinstance(value, list) and len(value) > 4:
            shown = f"{len(value)}: {value[0]} .. {value[-1]}"
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"
        console.print(f"{name.replace('_', ' ')}: {shown}", markup=False)


def parse(argv: list[str]) -> Arguments:
    """Read the command line."""
    return tyro.cli(Arguments, args=argv, prog="python -m aeris.calibrate", description=Arguments.__doc__)


def main() -> None:
    """Run the program."""
    ranks = discover(os.environ)
    speaker.take_turn(ranks.rank, ranks.world)
    with speaker.hush():
        arguments = parse(sys.argv[1:])
    if arguments.json and not arguments.dry_run:
        raise ValueError("--json goes with --dry-run")
    keep_freed_memory()
    export(ranks)
    task = prepare(arguments)
    world = task.opened.seat.groups.world
    if not arguments.json:
        print_summary(summary(task))
    elif ranks.rank == 0:
        print(json.dumps(summary(task)))
    if not arguments.dry_run:
        best, trials = calibrate(task)
        with together(world):
            if task.opened.seat.lead:
                conclude(task, best, trials)
    barrier(world, "the end")
    finish()
    leave()


if __name__ == "__main__":
    run_program(main)
