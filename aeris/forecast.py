"""Make ensemble forecasts with a trained run.

    python -m aeris.forecast runs/tiny --init 2000-05-31T00 --members 8 --lead-h 24 --out forecast.zarr

Every lead time of a few members is written when it is computed. After a stop, the same command goes on, on
any number of ranks: `mpiexec -n 4 python -m aeris.forecast ... --parallel.wp-y 2 --parallel.pp 2`. Replicas
of the network (dp) make different members and init times. SIGTERM, or the file OUT.job/stop, ends it after a
step.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from aeris.calibration import calibrated
from aeris.config import ParallelConfig
from aeris.data.forecasts import ForecastPlan, ForecastWriter
from aeris.data.store import Store
from aeris.diffusion.sampler import SamplerConfig
from aeris.forecasting.boundary import BoundaryConfig
from aeris.forecasting.ensemble import Ensemble, init_times
from aeris.forecasting.opening import find_run, take_seats
from aeris.forecasting.perturbation import PerturbationConfig
from aeris.forecasting.portions import choose_batch
from aeris.forecasting.report import Progress, print_summary, record, settings, summary
from aeris.forecasting.rollout import Forecaster, lead_times
from aeris.forecasting.throughput import in_words
from aeris.interruption import Requests
from aeris.log import RunLog, console, progress_bar, run_program, speaker
from aeris.run_directory import ending, parting
from launch.rank import discover, export, leave
from swipe.backend import describe, finish, keep_freed_memory, start
from swipe.collectives import barrier, together


@dataclass(frozen=True)
class Arguments:
    """Make ensemble forecasts with a trained run. After a stop, the same command goes on."""

    run: tyro.conf.Positional[Path]
    """Directory of a run of aeris.train."""
    init: tuple[str, ...]
    """Init times, UTC, in the store: 2000-05-31T00 (several), or START:END:STEPh, both ends included."""
    lead_h: int
    """Last lead time in hours; a multiple of the run's interval. Every interval up to it is written."""
    out: Path
    """Where to: a name ending in .zarr (WeatherBench 2 layout), or a directory for CF NetCDF files."""
    members: int = 8
    """Members of the ensemble, numbered from 0; a member is the same in any size of ensemble."""
    batch: int = 0
    """Members every replica (--parallel.dp) computes at the same time; more need more memory. 0: up to 4, and
    fewer if replicas would be idle. With a number the bits do not depend on how many replicas there are."""
    keep_every_h: int = 0
    """Hours between lead times that are written; a multiple of the run's interval. 0: every step."""
    keep_channels: tuple[str, ...] = ()
    """Channels that are written; empty: all. Then a whole state of each member lies beside, to go on from."""
    keep_initial: bool = False
    """Also write the members' initial states, as lead time 0."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How a sample is drawn; `python -m aeris.diffusion.sampler` shows what the choices do."""
    perturb: PerturbationConfig = field(default_factory=PerturbationConfig)
    """What the members start from."""
    boundary: BoundaryConfig = field(default_factory=BoundaryConfig)
    """Where sea temperature and ice come from after the init time."""
    calibrated: bool = False
    """Take sampler and perturbation from RUN/calibration.json, which aeris.calibrate writes."""
    seed: int = 0
    """Seed of all noise."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or xpu."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, or those of the last training step."""
    checkpoint: str = ""
    """Name of a checkpoint in RUN/checkpoints, or its images; empty takes the newest."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Shared out over dp are members. Weights are not: shard and schedule are for training."""
    store: str = ""
    """Directory of a store with the init times; empty takes the run's."""
    run_dir: Path | None = None
    """Directory of this forecast's log.jsonl and ended.json, and of the file `stop`; by default OUT.job."""
    overwrite: bool = False
    """Replace another forecast at --out, once the new one is whole."""
    dry_run: bool = False
    """Check everything, print what would be computed, and stop."""
    json: bool = False
    """With --dry-run: print one JSON object and nothing else."""


def prepare(arguments: Arguments, requests: Requests | None = None) -> Ensemble:
    """Load the run, join the other ranks, and look at the output; compute and write nothing.

    Args:
        requests: who may ask the program to stop; nobody by default.

    Raises:
        ValueError: a wrong run, checkpoint, store, init time, lead time, sampler, layout or output.
        OSError: the other ranks are not there.
    """
    if arguments.members < 1 or arguments.batch < 0:
        raise ValueError(
            f"--members {arguments.members} must be 1 or more, --batch {arguments.batch} 0 (chosen) or more"
        )
    sampler, perturb = chosen(arguments)
    trained, store = find_run(
        arguments.run, arguments.checkpoint, arguments.weights, arguments.parallel, arguments.store
    )
    inits = init_times(arguments.init, store)
    leads = kept_leads(arguments, trained.config.data.interval_h)
    names = kept_channels(arguments.keep_channels, store.names)

    def join(device: torch.device, timeout_s: float) -> None:
        start(device, timeout_s)
        if requests is not None:
            requests.begin()

    opened = take_seats(
        trained, store, sampler=sampler, perturbation=perturb, boundary=arguments.boundary,
        seed=arguments.seed, members=len(inits) * arguments.members, device=arguments.device, join=join,
    )  # fmt: skip
    check_fields(opened.forecaster, inits, arguments.members, arguments.lead_h)
    plan = ForecastPlan(
        inits=inits,
        lead_h=leads,
        members=arguments.members,
        names=names,
        latitude_deg=tuple(store.latitude_deg.tolist()),
        longitude_deg=tuple(store.longitude_deg.tolist()),
        made={
            "weights_sha256": opened.weights_sha256,
            "data": store.fingerprint_id,
            "interval_h": trained.config.data.interval_h,
            "seed": arguments.seed,
            **settings("sampler", opened.sampler),
            **(settings("perturb", perturb) if perturb.kind != "none" else {}),
            **(settings("boundary", arguments.boundary) if arguments.boundary != BoundaryConfig() else {}),
        },
        about=about(arguments, store, trained.meta),
    )
    with together(opened.seat.groups.world):
        writer = ForecastWriter(arguments.out, plan, arguments.overwrite) if opened.seat.lead else None
    batch = arguments.batch or choose_batch(len(inits), arguments.members, opened.replicas)
    return Ensemble(opened.forecaster, plan, writer, batch, requests)


def chosen(arguments: Arguments) -> tuple[SamplerConfig, PerturbationConfig]:
    """Return sampler and perturbation: as asked for, or as calibrated.

    Raises:
        ValueError: both are asked for, or the run was not calibrated.
    """
    if not arguments.calibrated:
        return arguments.sampler, arguments.perturb
    if (arguments.sampler, arguments.perturb) != (SamplerConfig(), PerturbationConfig()):
        raise ValueError("--calibrated takes sampler and perturbation from the run: leave out their flags")
    return calibrated.read(arguments.run, arguments.checkpoint, arguments.weights)


def kept_leads(arguments: Arguments, interval_h: int) -> tuple[int, ...]:
    """Return the lead times that are written, in hours.

    Raises:
        ValueError: they are no multiples of the interval, or the last is not among them.
    """
    last_h, every_h = arguments.lead_h, arguments.keep_every_h or interval_h
    lead_times(last_h, interval_h)
    if every_h < 0 or every_h % interval_h or last_h % every_h:
        raise ValueError(
            f"--keep-every-h {every_h} must be a multiple of the model's {interval_h} h and divide "
            f"--lead-h {last_h}"
        )
    return tuple(range(0 if arguments.keep_initial else every_h, last_h + 1, every_h))


def kept_channels(asked: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the channels that are written, in the order of the store.

    Raises:
        ValueError: the store does not have one of them.
    """
    if unknown := [name for name in asked if name not in names]:
        raise ValueError(f"--keep-channels {' '.join(unknown)}: the run has {' '.join(names)}")
    return tuple(name for name in names if not asked or name in asked)


def check_fields(forecaster: Forecaster, inits: tuple[str, ...], members: int, last_h: int) -> None:
    """Check that perturbations and boundary fields of all init times can be made.

    Raises:
        ValueError: names the first that cannot.
    """
    times = [np.datetime64(init, "s") for init in inits]
    if forecaster.perturbation is not None:
        forecaster.perturbation.check(times, members)
    if forecaster.boundary is not None:
        forecaster.boundary.check(times, lead_times(last_h, forecaster.interval_h))


def about(arguments: Arguments, store: Store, meta: dict[str, Any]) -> dict[str, Any]:
    """Say where the forecast comes from, for those who open the file."""
    sources = store.made.get("about") or [{}]
    data = sources[0].get("title") or sources[0].get("source") or store.path.name
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "title": f"AERIS ensemble forecast on {data}",
        "source": f"AERIS diffusion model, torch {torch.__version__}",
        "history": f"{now} python -m aeris.forecast {shlex.join(sys.argv[1:])}",
        "run": str(arguments.run),
        "weights": arguments.weights,
        "images_seen": meta["images_seen"],
        "store": str(store.path),
    }


def parse(argv: list[str]) -> Arguments:
    """Read the command line."""
    return tyro.cli(Arguments, args=argv, prog="python -m aeris.forecast", description=Arguments.__doc__)


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
    if arguments.dry_run:
        show(arguments, ranks.rank == 0)
        return
    lead, run_dir = ranks.rank == 0, run_dir_of(arguments)
    with ending(run_dir, lead) as end, Requests(run_dir, lead=lead) as requests:
        end.run = ensemble = prepare(arguments, requests)
        with parting(ensemble.groups.world, end):
            make(arguments, ensemble)


def run_dir_of(arguments: Arguments) -> Path:
    """Return where the forecast says how it goes."""
    return arguments.run_dir or arguments.out.with_name(arguments.out.name + ".job")


def show(arguments: Arguments, lead: bool) -> None:
    """Print what would be computed; a collective call."""
    ensemble = prepare(arguments)
    values = {"run": str(arguments.run), "weights": arguments.weights, **summary(ensemble)}
    values |= {"out": str(arguments.out), "run_dir": str(run_dir_of(arguments))}
    if not arguments.json:
        print_summary(values)
    elif lead:
        print(json.dumps(values))
    barrier(ensemble.groups.world, "the end")
    finish()
    leave()


def make(arguments: Arguments, ensemble: Ensemble) -> None:
    """Make the forecast, or what is left of it, and say so.

    Raises:
        Stopped: it was asked to stop, and has written what it had.
    """
    plan, work, dims = ensemble.plan, ensemble.work, ensemble.groups.dims
    size = f"{len(plan.inits)} init times x {plan.members} members x {len(plan.lead_h)} lead times"
    if work.complete:
        console.print(f"{arguments.out} is there already ({size}); --overwrite makes it again")
        return
    there = ensemble.steps - ensemble.steps_left
    done = f"; going on, {there:,} of {ensemble.steps:,} steps of a member are done" if there else ""
    ranks = f" on {dims.world} ranks ({dims}), {describe()}" if dims.world > 1 else ""
    console.print(f"{arguments.out}: {size}{ranks}{done}", markup=False)
    log_file = None
    with together(ensemble.groups.world):
        if ensemble.writer is not None:
            run_dir_of(arguments).mkdir(parents=True, exist_ok=True)
            log_file = run_dir_of(arguments) / "log.jsonl"
    with progress_bar("rate") as bar, RunLog(log_file, ensemble.images_seen) as log:
        ensemble.run(Progress(ensemble, bar, log).advance)
        shares = ensemble.throughput.shares(ensemble.groups.world) if work.portions else {}
        log.write(record(ensemble) | {f"share_{kind}": share for kind, share in shares.items()})
    account = ensemble.throughput
    speed = f"{account.member_days_per_h:.3g} member-days/h; {in_words(shares)}" if shares else ""
    console.print(f"finished in {account.elapsed_s:.0f} s, {speed}; score it with", markup=False)
    console.print(f"  python -m aeris.evaluate {arguments.out} --truth {ensemble.forecaster.store.path}")


if __name__ == "__main__":
    run_program(main)
