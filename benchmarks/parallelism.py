r"""One training step spread over the same ranks in several ways: memory, bytes sent and speed, side by side.

    python -m benchmarks.parallelism --ranks 8 --csv FILE --plot FILE --compare FILE
    mpiexec -n 96 python -m benchmarks.parallelism 1.3b-6h --data.store DIR --layouts "wp 4x4 x pp 6" \
        --csv FILE

The first starts its ranks on this machine. What is measured stands beside what formulas say, with `=` or `≠`
between (benchmarks/accounts.py). Ranks that share processors and talk inside one machine are no cluster:
their speeds compare with each other only.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from aeris import config as configs
from aeris.config import RunConfig
from aeris.data.loader import Sample
from aeris.data.store import Store
from aeris.log import console, run_program, speaker
from aeris.parallelize import limits, take_seat
from aeris.presets import PRESETS
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts, open_store
from aeris.step import Training, train_step
from benchmarks.accounts import (
    FORMULAS,
    KINDS,
    NUMBERS,
    Kept,
    Row,
    Weights,
    by_kind,
    draw,
    expected,
    tables,
    timeline,
)
from benchmarks.records import Better, Output, deliver, hardware
from launch.rank import discover, export, leave
from swipe.backend import choose_device, finish, keep_freed_memory, start
from swipe.collectives import all_reduce, barrier, byte_log
from swipe.mesh import ParallelDims


def small() -> RunConfig:
    """Tiny with 8 heads, so that sp 8 is possible; cyclic as published; fp32; 8 microbatches of one image."""
    tiny = PRESETS["tiny"]()
    model = replace(tiny.model, heads=8, poles="cyclic", precision="fp32")
    return replace(tiny, model=model, train=replace(tiny.train, batch=8, microbatch=1))


MODELS = {"small": small, **PRESETS}


@dataclass(frozen=True)
class Options:
    """Train the same model on the same ranks in several layouts; compare memory, messages and speed."""

    preset: Annotated[str, tyro.conf.Positional] = "small"
    """Model: small (tiny with 8 heads, cyclic, fp32, batch 8) or a preset of aeris.train."""
    ranks: int = 8
    """Processes to start here; under mpiexec or torchrun those that are there are used."""
    layouts: tuple[str, ...] = ()
    """Such as "dp 8" "wp 2x2 x sp 2"; without, all that are usual."""
    rounds: int = 5
    """Timed steps of each layout, in turn with the others."""
    device: str = "auto"
    """auto, cpu, cuda or xpu."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)
    """Where the rows go."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """Settings of the run."""


def parse(argv: list[str]) -> Options:
    """Read the command line over the preset it names; ValueError if there is no such preset."""
    preset = "small"
    while True:
        default = Options(preset=preset, config=MODELS[preset]())
        found = tyro.cli(Options, args=argv, default=default, description=Options.__doc__)
        if found.preset not in MODELS:
            raise ValueError(f"{found.preset!r} is no preset: choose from {', '.join(MODELS)}")
        if found.preset == preset:
            return found
        preset = found.preset


def name(dims: ParallelDims) -> str:
    """Write a layout without the axes of one rank: "wp 2x2 x sp 2"."""
    parts = [part for part in str(dims).split(" x ") if part.split()[1] not in ("1", "1x1")]
    return " x ".join(parts) or "1 rank"


def read_layout(text: str) -> ParallelDims:
    """Read a layout as `name` writes it; ValueError if it is written otherwise."""
    degrees: dict[str, int] = {}
    for part in text.split(" x "):
        match = re.fullmatch(r"(?:(dp|pp|sp) (\d+)|wp (\d+)x(\d+))", part)
        if match is None:
            raise ValueError(f"layout {text!r}: write parts of 'dp 2 x wp 2x2 x pp 2 x sp 2'")
        axis, degree, wp_y, wp_x = match.groups()
        degrees |= {axis: int(degree)} if axis else {"wp_y": int(wp_y), "wp_x": int(wp_x)}
    return ParallelDims(**degrees)


def choose_layouts(options: Options, ranks: int) -> list[ParallelDims]:
    """Return the layouts asked for; without, each axis alone and mixtures, as far as model and batch allow.

    Raises:
        ValueError: one that was asked for does not suit the ranks, the model or the batch.
    """
    bounds, half = limits(options.config), ranks // 2
    for dims in map(read_layout, options.layouts):
        bounds.check(dims, ranks)
    if options.layouts:
        return [read_layout(text) for text in options.layouts]
    usual = [{"dp": ranks}, {"dp": 2, "pp": half}, {"sp": ranks}, {"dp": 2, "sp": half}, {}, {"dp": 2}]
    usual += [{"sp": 2}, {"pp": 2, "sp": 2}, {"pp": half}]
    found = {}
    for degrees in usual:
        try:  # wp takes the ranks that they leave
            found[bounds.choose(ranks, fixed={"dp": 1, "pp": 1, "sp": 1, **degrees})] = None
        except ValueError:
            wanted = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items()) or "wp alone"
            console.print(f"left out, as {ranks} ranks, the model or the batch do not allow it: {wanted}")
    return list(found)


class Trial:
    """A run in one layout: what it kept and sent in its second step, and the times of later ones."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        dims: ParallelDims,
        device: torch.device,
        rank: int,
        rounds: int,
    ) -> None:
        """Build it, take a step to warm up and one to count; a collective call over all ranks."""
        seat = take_seat(config, channel_counts(len(store.names)), dims, rank, device)
        self.run = Training(config, Path("nothing is written"), store, seat)
        self.world, self.seconds, train = seat.groups.world, list[float](), config.train
        images = ImageOrder(0, (rounds + 2) * train.batch, train.microbatch, dims.dp, seat.at.dp)
        with byte_log() as read:  # before the steps, whose time is that of computing and sending
            self.samples: Iterator[Sample] = iter(list(read_samples(config, store, seat, images)))
        train_step(self.run, self.samples)
        kept, weights = Kept(self.run.model), Weights()
        with byte_log() as sent, kept.hooks, weights:
            train_step(self.run, self.samples)
        logged = [by_kind(sent, kind) for kind in KINDS[:3]]
        counted = [kept.peak, *logged, by_kind(read, "samples") // (rounds + 2), *weights.sent.values()]
        own = [*counted, *expected(self.run), self.run.pipeline.peak_in_flight]
        table = torch.zeros(dims.world, len(own), dtype=torch.float64)
        table[rank] = torch.tensor(own, dtype=torch.float64)
        self.ranks: list[list[int]] = all_reduce(table, self.world, "counts").long().tolist()

    def step(self) -> None:
        """Time one step; it ends with numbers of all ranks."""
        barrier(self.world, "the start of a step")
        begin = time.perf_counter()
        train_step(self.run, self.samples)
        self.seconds.append(time.perf_counter() - begin)

    def row(self) -> Row:
        """Return a row of the table."""
        dims, train, half = self.run.seat.dims, self.run.config.train, len(NUMBERS)
        fullest = max(self.ranks, key=lambda rank: rank[0])
        busiest = max(self.ranks, key=lambda rank: sum(rank[1:half]))
        row: Row = {"layout": name(dims), "ranks": dims.world, "batch": train.batch}
        row |= {"microbatch": train.microbatch, "smallest_batch": dims.dp}
        row |= {"in_flight": max(rank[-1] for rank in self.ranks)}
        row |= {"idle": timeline(self.run.config, dims).bubble}
        for column, kind in enumerate(NUMBERS):
            rank = busiest if column else fullest
            row |= {kind: rank[column], f"{kind}_formula": rank[half + column]}
        row["equal_on_all_ranks"] = all(rank[1:half] == rank[half + 1 : 2 * half] for rank in self.ranks)
        times = statistics.median(self.seconds), max(self.seconds), min(self.seconds)
        speeds = (train.batch / seconds for seconds in times)
        return row | dict(zip(("samples_per_s", "slowest", "fastest"), speeds))


def start_here(ranks: int) -> int:
    """Run this program again on several ranks of this machine; return its exit status."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "benchmarks.parallelism", *sys.argv[1:]]
    return subprocess.run(command, env={"OMP_NUM_THREADS": threads, **os.environ}, check=False).returncode


def compare(options: Options, layouts: list[ParallelDims], rank: int) -> list[Row]:
    """Build a run for every layout, then take steps of all in turn, so that a slow moment is shared."""
    device, store = choose_device(options.device), open_store(options.config)
    trials = []
    for dims in layouts:
        console.print(f"building {name(dims)}")
        trials.append(Trial(options.config, store, dims, device, rank, options.rounds))
    for number in range(options.rounds):
        console.print(f"round {number + 1} of {options.rounds}")
        for trial in trials:
            trial.step()
    return [trial.row() for trial in trials]


def report(options: Options, rows: list[Row], about: str) -> int:
    """Print the rows, and write, draw and compare them where asked; return how many numbers are worse."""
    numbers: dict[str, Better] = {"activations": "less", "samples_per_s": "more"}
    key = ("layout", "ranks")
    worse = deliver(rows, options.output, key=key, numbers=numbers, draw=draw, about=about, tables=tables)
    console.print(FORMULAS, markup=False)
    if not all(row["equal_on_all_ranks"] for row in rows):
        console.print("[red]Some ranks send other bytes than the formulas say: ≠")
    return worse


def main() -> None:
    """Run the benchmark, or start its ranks."""
    found = discover(os.environ)
    speaker.take_turn(found.rank)
    options = parse(sys.argv[1:])
    configs.check(options.config)
    ranks = options.ranks if found.launcher == "none" else found.world
    here = ranks == found.world
    console.quiet = console.quiet or not here  # its ranks will say it
    layouts = choose_layouts(options, ranks)
    if not here:
        sys.exit(start_here(ranks))
    keep_freed_memory()
    export(found)
    device = choose_device(options.device)
    start(device, options.config.parallel.timeout_s)
    speaker.together = ranks > 1
    rows, worse = compare(options, layouts, found.rank), 0
    if found.rank == 0:
        sizes = f"{options.preset}, width {options.config.model.width}, {options.config.model.layers} layers"
        worse = report(options, rows, f"{sizes}: {ranks} ranks of {hardware(device)}")
    finish()
    leave()
    if worse:
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
