"""Ensemble forecasts: members x days in an hour, and what share of the time is evaluations of the network.

    python -m benchmarks.forecast --ranks 1 2 --batches 1 4
    torchrun --nproc-per-node 4 -m benchmarks.forecast --model 1.3b-6h --store era5 --device cuda --members 8

An untrained network forecasts from a store (the packaged sample by default) and writes every channel of every
step, as aeris.forecast does, into a directory that is deleted. The first step is not counted: it begins with
a forecast of one step that is thrown away.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro

from aeris.config import ParallelConfig, RunConfig
from aeris.data.forecasts import ForecastPlan, ForecastWriter
from aeris.data.store import Store
from aeris.diffusion.sampler import SamplerConfig, for_training
from aeris.forecasting.ensemble import Ensemble
from aeris.forecasting.rollout import Forecaster, lead_times
from aeris.forecasting.throughput import KINDS
from aeris.log import console, run_program
from aeris.model.initialise import initialise
from aeris.parallelize import Seat, build_model, choose_degrees, limits, make_network, take_seat
from aeris.presets import PRESETS
from aeris.restore import channel_counts, open_store
from benchmarks.parallelism import name, read_layout
from benchmarks.ranks import rows_of
from benchmarks.records import Better, Output, Row, deliver, hardware
from swipe.backend import choose_device
from swipe.collectives import barrier, tell

BETTER: dict[str, Better] = {"member_days_per_h": "more", "network": "more"}


@dataclass(frozen=True)
class Options:
    """Forecast with an untrained network; say how fast, and what the time goes to."""

    ranks: tuple[int, ...] = (1, 2)
    """Processes to start here; under mpiexec or torchrun those that are there are used."""
    layouts: tuple[str, ...] = ()
    """Such as "dp 2" or "wp 1x2 x sp 2"; without, replicas alone and windows alone."""
    batches: tuple[int, ...] = (1, 4)
    """Members a replica computes at a time, a row for each."""
    model: str = "tiny"
    """Preset whose network it is."""
    store: str = ""
    """Store it starts from; empty: that of the preset."""
    members: int = 8
    """Of the forecast, over all replicas."""
    steps: int = 2
    """Of the model, after one that is not counted."""
    levels: int = 8
    """Noise levels of the sampler: evaluations of a step."""
    directory: Path = Path(tempfile.gettempdir())
    """Where the forecasts are written: the file system counts."""
    device: str = "cpu"
    """cpu, or auto, cuda, xpu with a device for every rank."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)
    """Where the rows go."""


def configuration(options: Options) -> RunConfig:
    """Return the preset with the store asked for."""
    if options.model not in PRESETS:
        raise ValueError(f"--model {options.model} is no preset: choose from {', '.join(PRESETS)}")
    config = PRESETS[options.model]()
    data = dataclasses.replace(config.data, store=options.store or config.data.store)
    return dataclasses.replace(config, data=data)


def parallels(options: Options, config: RunConfig, ranks: int) -> list[ParallelConfig]:
    """Return the degrees of the layouts asked for; without, members alone, and windows alone on more ranks.

    Raises:
        ValueError: one that was asked for does not suit the ranks or the network.
    """
    bounds = limits(config, options.members)
    asked = [read_layout(text) for text in options.layouts]
    for dims in asked:
        bounds.check(dims, ranks)
    if not asked:
        asked = [bounds.choose(ranks, fixed={"wp_y": 1, "wp_x": 1, "pp": 1, "sp": 1})]
        asked += [bounds.choose(ranks, fixed={"dp": 1, "pp": 1, "sp": 1})] if ranks > 1 else []
    return [ParallelConfig(**dataclasses.asdict(dims)) for dims in asked]


def make_forecaster(config: RunConfig, seat: Seat, store: Store, levels: int) -> Forecaster:
    """Make a forecaster with an untrained network."""
    model = build_model(config.model, *channel_counts(len(store.names)), seat.layout, seat.device, seat.units)
    initialise(model, 0)
    network = make_network(model.eval().requires_grad_(False), seat, len(store.names))
    sampler = for_training(SamplerConfig(levels=levels), config.diffusion)
    every_h = config.data.interval_h
    return Forecaster(network, seat.layout, store, every_h, sampler, device=seat.device, groups=seat.groups)


def forecast(forecaster: Forecaster, members: int, steps: int, batch: int, path: Path) -> Ensemble:
    """Make and write a forecast from the store's first time; a collective call."""
    store = forecaster.store
    plan = ForecastPlan(
        inits=(str(store.times[0]),),
        lead_h=lead_times(steps * forecaster.interval_h, forecaster.interval_h),
        members=members,
        names=store.names,
        latitude_deg=tuple(store.latitude_deg.tolist()),
        longitude_deg=tuple(store.longitude_deg.tolist()),
        made={},
        about={},
    )
    lead = forecaster.groups.rank == 0
    made = Ensemble(forecaster, plan, ForecastWriter(path, plan) if lead else None, batch)
    made.run()
    return made


def measure(device: torch.device, options: Options) -> list[Row]:
    """Measure all layouts and batches on the ranks that are there; a collective call, rows on rank 0."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    config, rows = configuration(options), []
    store = open_store(config)
    for parallel in parallels(options, config, ranks):
        here = dataclasses.replace(config, parallel=parallel)
        dims = choose_degrees(here, ranks, options.members)
        seat = take_seat(here, channel_counts(len(store.names)), dims, rank, device)
        forecaster = make_forecaster(here, seat, store, options.levels)
        for batch in options.batches:
            own = tempfile.mkdtemp(dir=options.directory) if rank == 0 else ""
            path = Path(tell(seat.groups.world, own))
            forecast(forecaster, dims.dp * batch, 1, batch, path / "first.zarr")
            made = forecast(forecaster, options.members, options.steps, batch, path / "f.zarr")
            rows.append(_row(options, made, name(dims), ranks))
            barrier(seat.groups.world, "a row")
            if rank == 0:
                shutil.rmtree(path)
            console.print(
                f"  {rows[-1]['layout']}, batch {batch}: {rows[-1]['member_days_per_h']:.3g} member-days/h, "
                f"network {rows[-1]['network']:.1%}"
            )
    return rows


def _row(options: Options, made: Ensemble, layout: str, ranks: int) -> Row:
    account = made.throughput
    shares = account.shares(made.groups.world)
    evaluations = account.steps * made.evaluations_per_step
    return {
        "layout": layout,
        "ranks": ranks,
        "batch": made.batch,
        "model": options.model,
        "members": options.members,
        "steps": options.steps,
        "levels": options.levels,
        "seconds": account.elapsed_s,
        "member_days_per_h": account.member_days_per_h,
        "evaluations_per_s": evaluations / account.elapsed_s,
        **{kind: shares[kind] for kind in (*KINDS, "rest")},
    }


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw what the time of each row goes to, with its member-days an hour; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['layout']}, batch {row['batch']}" for row in rows]
    left = [0.0] * len(rows)
    for kind in (*KINDS, "rest"):
        shares = [100 * row[kind] for row in rows]
        axes.barh(names, shares, left=left, label=kind)
        left = [before + share for before, share in zip(left, shares)]
    for place, row in enumerate(rows):
        axes.text(101, place, f"{row['member_days_per_h']:.3g} member-days/h", va="center", fontsize=8)
    axes.axvline(90, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="% of the time", xlim=(0, 130))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    rows = rows_of(measure, options.ranks, options.device, options)
    if rows:
        worse = deliver(
            rows,
            options.output,
            key=("layout", "ranks", "batch", "model"),
            numbers=BETTER,
            draw=draw,
            about=hardware(choose_device(options.device)),
        )
        sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
