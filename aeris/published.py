"""Make a run directory of published AERIS weights, so that they forecast like any run.

    python -m aeris.published CHECKPOINTS --config config.yaml --statistics STATS --run-dir runs/aeris

The weights are converted once, on one process or on several (`mpiexec -n 10 ...`: each writes its stages), or
with --raw read from their files at every start. Nothing of the authors' files is executed.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.table import Table

from aeris import config as configs
from aeris.config import DataConfig, DiffusionConfig, ModelConfig, RunConfig, TrainConfig
from aeris.data.standards import Standards, fingerprint, write_standards
from aeris.data.variables import channel
from aeris.log import console, progress_bar, run_program, speaker
from aeris.model import published
from aeris.model.published import PublishedError, Sizes
from aeris.parallelize import cut, window_grid
from aeris.published_settings import Settings, choose_channels, read_numbers, read_settings
from aeris.restore import POINTER
from aeris.run_directory import make_directories
from launch.rank import discover, export, leave
from swipe import checkpoint
from swipe.backend import finish, start
from swipe.collectives import AgreedError, agree, barrier, together
from swipe.groups import Groups, make_groups
from swipe.mesh import ParallelDims

STANDARDS, CONFIG = "standards.json", "config.json"


@dataclass(frozen=True)
class Arguments:
    """Make a run directory of published AERIS weights."""

    checkpoints: tyro.conf.Positional[Path]
    """Directory with checkpoint_PP0.pth and so on, one file per stage."""
    config: Path
    """The configuration they came with: the authors' config.yaml, or the same names in a .json file."""
    statistics: Path
    """Directory with normalize_mean.npz, normalize_std.npz, normalize_diff_{mean,std}_<hours>.npz."""
    run_dir: Path
    """Directory to make."""
    store: str = "era5"
    """Store that forecasts start from; aeris.forecast --store takes another."""
    raw: bool = False
    """Leave the weights in their files and read them at every start, in place of converting them."""
    rows: int = 720
    """Rows of the grid without the pole's."""
    cols: int = 1440
    """Columns of the grid."""
    norm_eps: float = 2.0**-23
    """Epsilon of the norms: torch's present default in their runs; before January 2025 it was 2^-7."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of products and tokens: bf16 as published."""
    train_period: tuple[str, str] = ("1979-01-01T00", "2018-12-31T18")
    """First and last time they were trained on."""
    dry_run: bool = False
    """Check every file and stop."""
    json: bool = False
    """With --dry-run: print one JSON object and nothing else."""


@dataclass(frozen=True)
class Plan:
    """What is to be made."""

    config: RunConfig
    standards: Standards
    sizes: Sizes
    images: int
    """Images the averages have seen."""
    used: int
    """Parameters of the network."""
    left: dict[str, int]
    """Keys that are not part of it, and how many numbers they have."""

    def meta(self, directory: Path) -> dict[str, Any]:
        """Return what a checkpoint of these weights says."""
        model = self.config.model
        latitude_deg, longitude_deg = grid_deg(model.rows, model.cols)
        channels = [channel(name) for name in self.standards.channels]
        return {
            "images_seen": self.images,
            "channels": list(self.standards.channels),
            "fingerprint": fingerprint(
                channels, latitude_deg, longitude_deg, model.row_offset, self.standards
            ),
            "published": str(directory),
        }


def grid_deg(rows: int, cols: int) -> tuple[Any, Any]:
    """Return latitudes (falling) and longitudes of a grid with both poles whose first row was dropped."""
    return 90.0 - 180.0 / rows * np.arange(1, rows + 1), 360.0 / cols * np.arange(cols)


def prepare(arguments: Arguments) -> Plan:
    """Read the configuration and statistics, and check every file and key of the weights; write nothing.

    Raises:
        ValueError: one of them is missing, damaged, or does not belong to the others.
    """
    settings = read_settings(arguments.config)
    sizes = published.measure(arguments.checkpoints)
    for name, claimed in settings.sizes.items():
        if claimed != getattr(sizes, name):
            raise ValueError(
                f"{arguments.config} says {name} {claimed}, the weights in {arguments.checkpoints} have "
                f"{getattr(sizes, name)}: take the configuration they came with"
            )
    names = choose_channels(settings, sizes, arguments.config)
    images, used, left = 0, 0, dict[str, int]()
    for stage, path in enumerate(published.stage_files(arguments.checkpoints)):
        tensors, leftovers, images = published.stage_tensors(path, sizes, stage)
        used += sum(value.numel() for value in tensors.values())
        if leftovers:
            weights, _ = published.read_stage(path)
            left |= {f"{path.name}: {name}": weights[name].numel() for name in leftovers}
    try:
        start_time, end_time = (np.datetime64(time, "s") for time in arguments.train_period)
    except ValueError:
        raise ValueError(f"--train-period {' '.join(arguments.train_period)} are not two times") from None
    standards = read_numbers(arguments.statistics, names, settings.interval_h, (start_time, end_time))
    return Plan(run_config(arguments, settings, sizes, names), standards, sizes, images, used, left)


def run_config(arguments: Arguments, settings: Settings, sizes: Sizes, names: tuple[str, ...]) -> RunConfig:
    """Return the configuration of the run.

    Raises:
        ValueError: width and heads, or grid and window, do not fit together.
    """
    if sizes.width % settings.head_dim:
        raise ValueError(
            f"{arguments.config}: heads of {settings.head_dim} do not divide a width of {sizes.width}"
        )
    model = ModelConfig(
        rows=arguments.rows, cols=arguments.cols, row_offset=1, window=settings.window, layers=sizes.layers,
        blocks=sizes.blocks, width=sizes.width, heads=sizes.width // settings.head_dim, hidden=sizes.hidden,
        rope=False, rope_base=10_000.0, poles="cyclic", norm_order="modulate-norm", modulation_layers=2,
        norm_eps=arguments.norm_eps, time_rounding="bf16", precision=arguments.precision,
        residual=arguments.precision,
    )  # fmt: skip
    config = RunConfig(
        model=model,
        data=DataConfig(
            store=arguments.store, channels=names, interval_h=settings.interval_h, standards=STANDARDS
        ),
        diffusion=DiffusionConfig(
            sigma_data=settings.sigma_data,
            sigma_min=settings.sigma_min,
            sigma_max=settings.sigma_max,
            channel_weights="pressure",
        ),
        train=TrainConfig(images=1),
    )
    configs.check(config)
    window_grid(model)
    return config


def summary(arguments: Arguments, plan: Plan) -> dict[str, Any]:
    """Return what was found, as plain data."""
    model, diffusion = plan.config.model, plan.config.diffusion
    files = published.stage_files(arguments.checkpoints)
    return {
        "weights": str(arguments.checkpoints),
        "files": len(files),
        "images_seen": plan.images,
        "parameters": plan.used,
        "left_over": sum(plan.left.values()),
        "left_over_keys": len(plan.left),
        "interval_h": plan.config.data.interval_h,
        "channels": len(plan.standards.channels),
        "inputs": plan.sizes.in_channels,
        "grid": f"{model.rows} x {model.cols}",
        "window": model.window,
        "layers": f"{model.layers} x {model.blocks} blocks",
        "width": model.width,
        "heads": model.heads,
        "hidden": model.hidden,
        "sigma": [diffusion.sigma_min, diffusion.sigma_max],
        "forcings": {name: list(pair) for name, pair in plan.standards.forcing.items()},
        "run_dir": str(arguments.run_dir),
        "written_bytes": 0 if arguments.raw else 4 * plan.used,
    }


def print_summary(values: dict[str, Any]) -> None:
    """Print what was found."""
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        if isinstance(value, dict):
            text = "; ".join(f"{key} {mean:g} +- {std:g}" for key, (mean, std) in value.items())
        elif isinstance(value, list):
            text = " to ".join(f"{number:g}" for number in value)
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), text)
    console.print(table)


def make(arguments: Arguments, plan: Plan, rank: int, world: int) -> None:
    """Write the run directory; a collective call over all ranks, each of which converts a part.

    Raises:
        ValueError: there are more ranks than stages, a weight is no number, or the directory has another run.
        OSError: it cannot be written.
    """
    stages, run_dir = plan.sizes.layers + 2, arguments.run_dir
    groups = make_groups(ParallelDims(pp=world), rank, torch.device("cpu"))
    meta = plan.meta(arguments.checkpoints.resolve())
    with together(groups.world):
        if rank == 0:
            if world > stages:
                raise ValueError(
                    f"{world} ranks are more than the weights' {stages} stages: take 1 to {stages}"
                )
            check_free(run_dir, plan.config)
            make_directories(run_dir)
            write_standards(run_dir / STANDARDS, plan.standards)
            if arguments.raw:
                write_pointer(run_dir / POINTER, arguments.checkpoints.resolve(), meta)
    if not arguments.raw:
        weights = read_share(arguments.checkpoints, plan, groups)
        saver = checkpoint.Checkpoints(run_dir / "checkpoints", keep=1, groups=groups, asynchronous=False)
        saver.save(plan.images, weights, meta)
    with together(groups.world):
        if rank == 0:
            if not arguments.raw:
                (run_dir / POINTER).unlink(missing_ok=True)  # of a run that was made with --raw before
            configs.save(plan.config, run_dir / CONFIG)
    barrier(groups.world, "the end")


def read_share(directory: Path, plan: Plan, groups: Groups) -> dict[str, torch.Tensor]:
    """Map the weights of this rank's stages into memory, and look at every number; a collective call.

    Raises:
        AgreedError: some rank's are damaged.
    """
    sizes, weights, error = plan.sizes, dict[str, torch.Tensor](), None
    units = cut(plan.config.model, sizes.in_channels, sizes.channels, groups.dims.pp)[groups.rank]
    names = [ours for stage in units for ours, _ in published.expected(sizes, stage).values()]
    try:
        with progress_bar() as bar:
            task = bar.add_task("checking weights", total=len(names))
            for name, value in published.tensors(directory, sizes, names):
                weights[f"ema.{name}"] = value
                bar.update(task, advance=1)
    except PublishedError as caught:
        error = str(caught)
    if (said := agree(groups.world, error)) is not None:
        raise AgreedError(said)
    return weights


def check_free(run_dir: Path, config: RunConfig) -> None:
    """Refuse to write over another run.

    Raises:
        ValueError: the directory has one.
    """
    if not (run_dir / CONFIG).exists():
        found = checkpoint.complete(run_dir / "checkpoints")
        if found and not (run_dir / STANDARDS).exists():
            raise ValueError(f"{run_dir} has checkpoints of another run: choose another --run-dir")
        return
    there = configs.load(run_dir / CONFIG)
    if replace(there, data=replace(there.data, store=config.data.store)) != config:
        raise ValueError(f"{run_dir} holds another run: choose another --run-dir, or remove it")


def write_pointer(path: Path, directory: Path, meta: dict[str, Any]) -> None:
    """Write where the files are, and how large, atomically."""
    sizes = {file.name: file.stat().st_size for file in published.stage_files(directory)}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        json.dumps({"directory": str(directory), "bytes": sizes, "meta": meta}, indent=1) + "\n"
    )
    partial.replace(path)


def parse(argv: list[str]) -> Arguments:
    """Read the command line."""
    return tyro.cli(Arguments, args=argv, prog="python -m aeris.published", description=Arguments.__doc__)


def main() -> None:
    """Run the program."""
    ranks = discover(os.environ)
    speaker.take_turn(ranks.rank, ranks.world)
    with speaker.hush():
        arguments = parse(sys.argv[1:])
    if arguments.json and not arguments.dry_run:
        raise ValueError("--json goes with --dry-run")
    export(ranks)
    plan = prepare(arguments)
    values = summary(arguments, plan)
    if arguments.json:
        if ranks.rank == 0:
            print(json.dumps(values))
    else:
        print_summary(values)
    if not arguments.dry_run:
        start(torch.device("cpu"), plan.config.parallel.timeout_s)
        make(arguments, plan, ranks.rank, ranks.world)
        console.print(f"{arguments.run_dir} is a run; forecast as published with")
        console.print(
            f"  python -m aeris.forecast {arguments.run_dir} --init ... --lead-h 240 --out forecast.zarr "
            "--sampler.solver heun --sampler.levels 10 --sampler.spacing power --sampler.rho 10 "
            "--sampler.last-step euler"
        )
    finish()
    leave()


if __name__ == "__main__":
    run_program(main)
