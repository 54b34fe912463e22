"""Make ensemble forecasts with a trained run.

    python -m aeris.forecast runs/tiny --init 2000-05-31T00 --members 8 --lead-h 24 --out forecast.zarr

Every lead time of a few members is written when it is computed. After a stop, the same command goes on, on
any number of ranks: `mpiexec -n 4 python -m aeris.forecast ... --parallel.wp-y 2 --parallel.pp 2`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.table import Table
from torch import nn

from aeris import config as configs
from aeris.config import ParallelConfig
from aeris.data.forecasts import ForecastPlan, ForecastWriter
from aeris.data.store import Store
from aeris.diffusion.sampler import SamplerConfig, for_training
from aeris.ensemble import Ensemble, init_times
from aeris.log import console, progress_bar, run_program, speaker
from aeris.parallelize import choose_degrees, make_network, take_seat
from aeris.restore import Trained, check_fingerprint, find_trained, load_network, open_store
from aeris.rollout import Forecaster, lead_times
from launch.rank import discover, export, leave
from swipe import checkpoint
from swipe.backend import choose_device, describe, finish, keep_freed_memory, start
from swipe.collectives import Group, all_reduce, barrier, together


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
    batch: int = 4
    """Members computed at the same time by every replica (--parallel.dp); more need more memory."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How a sample is drawn; `python -m aeris.diffusion.sampler` shows what the choices do."""
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
    overwrite: bool = False
    """Replace another forecast at --out, once the new one is whole."""
    dry_run: bool = False
    """Check everything, print what would be computed, and stop."""
    json: bool = False
    """With --dry-run: print one JSON object and nothing else."""


def prepare(arguments: Arguments) -> Ensemble:
    """Load the run, join the other ranks, and look at the output; compute and write nothing.

    Raises:
        ValueError: a wrong run, checkpoint, store, init time, lead time, sampler, layout or output.
        OSError: the other ranks are not there.
    """
    if arguments.members < 1 or arguments.batch < 1:
        raise ValueError(f"--members {arguments.members} and --batch {arguments.batch} must be 1 or more")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trained, store = find_run(arguments, rank, world)
    config = trained.config
    interval_h, sampler = config.data.interval_h, for_training(arguments.sampler, config.diffusion)
    inits, lead_h = init_times(arguments.init, store), lead_times(arguments.lead_h, interval_h)
    dims = choose_degrees(config, world, arguments.members)
    device = choose_device(arguments.device)
    start(device, config.parallel.timeout_s)
    seat = take_seat(config, trained.counts, dims, rank, device)
    model = load_network(trained, seat.layout, device, seat.units, near=seat.at.pp / dims.pp)
    forecaster = Forecaster(
        make_network(model, seat, len(store.names)), seat.layout, store, interval_h, sampler,
        sigma_data=config.diffusion.sigma_data, seed=arguments.seed, device=device, groups=seat.groups,
    )  # fmt: skip
    plan = ForecastPlan(
        inits=inits,
        lead_h=lead_h,
        members=arguments.members,
        names=store.names,
        latitude_deg=tuple(store.latitude_deg.tolist()),
        longitude_deg=tuple(store.longitude_deg.tolist()),
        made={
            "weights_sha256": digest(model, seat.groups.chain),
            "data": store.fingerprint_id,
            "interval_h": interval_h,
            "seed": arguments.seed,
            **{f"sampler_{name}": plain(value) for name, value in dataclasses.asdict(sampler).items()},
        },
        about=about(arguments, store, trained.meta),
    )
    with together(seat.groups.world):
        writer = ForecastWriter(arguments.out, plan, arguments.overwrite) if seat.lead else None
    return Ensemble(forecaster, plan, writer, arguments.batch)


def find_run(arguments: Arguments, rank: int = 0, world: int = 1) -> tuple[Trained, Store]:
    """Find the run's checkpoint and the data; its configuration gets the layout and store of this forecast.

    Each of `world` ranks checks a share of the checkpoint's files.

    Raises:
        ValueError: they do not exist, are damaged, or do not belong together.
    """
    path = find_checkpoint(arguments.run, arguments.checkpoint)
    trained = find_trained(arguments.run, arguments.weights, path, rank, world)
    data = dataclasses.replace(trained.config.data, store=arguments.store or trained.config.data.store)
    config = dataclasses.replace(trained.config, data=data, parallel=arguments.parallel)
    configs.check(config)
    store = open_store(config)
    check_fingerprint(trained.meta["fingerprint"], store)
    return dataclasses.replace(trained, config=config), store


def find_checkpoint(run: Path, name: str) -> Path | None:
    """Return the checkpoint called `name`, or of so many images; None, the newest, if empty.

    Raises:
        ValueError: there is no such complete checkpoint; names those there are.
    """
    if not name:
        return None
    found = checkpoint.complete(run / "checkpoints")
    for path in found:
        if name == path.name or (name.isdigit() and path.name.endswith(f"_{int(name):012d}")):
            return path
    there = ", ".join(path.name for path in found) or "none"
    raise ValueError(f"{run} has no complete checkpoint {name}; there are: {there}")


def digest(model: nn.Module, chain: Group) -> str:
    """Return 16 hexadecimal digits that depend on every weight, and not on how the network is cut.

    They are the sum of a hash of every tensor; crosses pp with 32 bytes.
    """
    total = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        total += int.from_bytes(hashlib.sha256(name.encode() + values.tobytes()).digest()[:8], "big")
    words = torch.tensor([total >> shift & 0xFFFF for shift in range(0, 64, 16)])
    sums = all_reduce(words, chain, "digests of the weights").tolist()
    return f"{sum(word << shift for word, shift in zip(sums, range(0, 64, 16))) % 2**64:016x}"


def plain(value: Any) -> Any:
    """Return a setting as it may stand in a file: infinity is no JSON number."""
    return str(value) if value == float("inf") else value


def about(arguments: Arguments, store: Store, meta: dict[str, Any]) -> dict[str, Any]:
    """Say where the forecast comes from, for those who open the file."""
    sources = store.made.get("about") or [{}]
    data = sources[0].get("title") or store.path.name
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


def forecast(ensemble: Ensemble) -> None:
    """Compute everything that is missing, with a progress line in evaluations of the network."""
    per_step = ensemble.evaluations_per_step
    left = per_step * ensemble.steps_left
    total = max(left, per_step * ensemble.steps)
    started, made = time.perf_counter(), 0
    with progress_bar("rate") as bar:
        task = bar.add_task("evaluations", total=total, completed=total - left, rate="")

        def advance(evaluations: int) -> None:
            nonlocal made
            made += evaluations
            per_s = made / (time.perf_counter() - started)
            bar.update(task, advance=evaluations, rate=f"{per_s:.1f}/s, {per_s / per_step:.2f} steps/s")

        ensemble.run(advance)


def summary(arguments: Arguments, ensemble: Ensemble) -> dict[str, Any]:
    """Return what would be computed, as plain data."""
    plan, forecaster = ensemble.plan, ensemble.forecaster
    per_step = ensemble.evaluations_per_step
    return {
        "run": str(arguments.run),
        "images_seen": plan.about["images_seen"],
        "weights": arguments.weights,
        "store": str(forecaster.store.path),
        "device": str(forecaster.device),
        "ranks": ensemble.groups.dims.world,
        "layout": str(ensemble.groups.dims),
        "init_times": list(plan.inits),
        "members": plan.members,
        "batch": ensemble.batch,
        "lead_h": list(plan.lead_h),
        "channels": len(plan.names),
        "seed": arguments.seed,
        "sampler": {name: plain(value) for name, value in dataclasses.asdict(forecaster.sampler).items()},
        "evaluations_per_step": per_step,
        "evaluations": per_step * ensemble.steps,
        "evaluations_left": per_step * ensemble.steps_left,
        "output_bytes": plan.member_bytes * ensemble.steps,
        "out": str(arguments.out),
    }


def print_summary(values: dict[str, Any]) -> None:
    """Print what would be computed."""
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        if name == "sampler":
            levels = f"{value['levels']} levels from {value['sigma_max']:g} to {value['sigma_min']:g}"
            text = f"{value['solver']}, {levels}, {value['spacing']}"
        elif isinstance(value, list) and len(value) > 4:
            text = f"{len(value)}: {value[0]}, {value[1]} .. {value[-1]}"
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), text)
    console.print(table)


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
    ensemble = prepare(arguments)
    if not arguments.dry_run:
        make(arguments, ensemble)
    elif not arguments.json:
        print_summary(summary(arguments, ensemble))
    elif ranks.rank == 0:
        print(json.dumps(summary(arguments, ensemble)))
    barrier(ensemble.groups.world, "the end")
    finish()
    leave()


def make(arguments: Arguments, ensemble: Ensemble) -> None:
    """Make the forecast, or what is left of it, and say so."""
    plan, work, dims = ensemble.plan, ensemble.work, ensemble.groups.dims
    size = f"{len(plan.inits)} init times x {plan.members} members x {len(plan.lead_h)} lead times"
    if work.complete:
        console.print(f"{arguments.out} is there already ({size}); --overwrite makes it again")
        return
    done = f"; going on, {work.steps_done} of {ensemble.steps} are done" if work.steps_done else ""
    ranks = f" on {dims.world} ranks ({dims}), {describe()}" if dims.world > 1 else ""
    console.print(f"{arguments.out}: {size}{ranks}{done}")
    started = time.perf_counter()
    forecast(ensemble)
    console.print(f"finished in {time.perf_counter() - started:.0f} s; score it with")
    console.print(f"  python -m aeris.evaluate {arguments.out} --truth {ensemble.forecaster.store.path}")


if __name__ == "__main__":
    run_program(main)
