"""What weak and strong scaling share: how rows come about, and how they are drawn.

A row is a run on some ranks. It was trained here (`measure`), left by `aeris.train` elsewhere (`collect`), or
is planned only (`predict`).

On one machine the ranks share cores. So beside the N ranks that train one model (R images/s) there is one
rank alone (A), and N of it at the same time that know nothing of each other (I in all):
efficiency R / (N A) = shared cores I / (N A) x communication R / I.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from aeris.config import RunConfig
from aeris.log import console
from aeris.parallelize import limits
from aeris.restore import open_store
from aeris.train import parse
from benchmarks.forked import train_at_once
from benchmarks.parallelism import name, read_layout
from benchmarks.records import Better, Output, Row
from benchmarks.starting import counts
from launch.layouts import LAYOUTS
from swipe.mesh import AXES, ParallelDims

KEY = ("layout", "ranks")
NUMBERS: dict[str, Better] = {"images_per_s": "more", "efficiency": "more"}
CHOSEN = ("--run-dir", "--train.batch", "--train.images", "--train.log-every", "--checkpoint.every-images")
"""Flags of aeris.train that a benchmark sets itself."""
UNSTEADY = 1.5
UNLIKELY = 1.1
"""Ranks that share a model save a little of the optimizer's work, not more."""
"""A rank alone whose fastest step is so many times as fast as its slowest has no core to itself."""


@dataclass(frozen=True)
class Options:
    """Settings of both."""

    preset: str = "tiny"
    """Model to train, on the CPU."""
    steps: int = 12
    """Steps of a run."""
    warm: int = 3
    """Records of a run's log that are not counted."""
    rounds: int = 1
    """Runs of each size, in turn with the others; the median counts."""
    collect: tuple[str, ...] = ()
    """Run directories to tabulate; nothing is trained. N:DIR gives the number of ranks of one that does not
    know it (no startup.json)."""
    predict: str = ""
    """Preset whose rows are planned for --machine and --nodes; nothing is trained."""
    machine: str = "alcf-aurora"
    """With --predict: a machine of aeris.plan, or a file that describes one."""
    nodes: str = ""
    """With --predict: numbers of nodes, with commas between."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)
    """Where the rows go."""


@dataclass(frozen=True)
class Case:
    """A run: its degrees and its images per step."""

    dims: ParallelDims
    batch: int

    def config(self, config: RunConfig, steps: int) -> RunConfig:
        """Return the settings of such a run, one record a step and one checkpoint at the end."""
        images = self.batch * steps
        return dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, batch=self.batch, images=images, log_every=1),
            checkpoint=dataclasses.replace(config.checkpoint, every_images=images),
            parallel=dataclasses.replace(
                config.parallel, self_test=False, **{axis: getattr(self.dims, axis) for axis in AXES}
            ),
        )


def settings(preset: str, further: list[str]) -> RunConfig:
    """Return a preset with a user's further flags of `aeris.train` over it.

    Raises:
        ValueError: a flag is one that the benchmark sets.
    """
    if taken := [word for word in further if word.startswith(CHOSEN)]:
        raise ValueError(f"{taken[0]} is chosen by the benchmark: use --batch and --steps")
    return parse([preset, *further]).config


def read_run(text: str, warm: int) -> tuple[Row, dict[str, Any]]:
    """Read a finished run.

    Args:
        text: its directory, or "N:DIR" with its number of ranks.
        warm: records at the beginning that are left out.

    Returns:
        its row, without layout and efficiency, and its configuration.

    Raises:
        ValueError: it is no run, its number of ranks is not known, or it has too few records.
    """
    given, colon, path = text.partition(":")
    directory = Path(path) if colon and given.isdigit() else Path(text)
    try:
        config = json.loads((directory / "config.json").read_text())
        lines = (directory / "log.jsonl").read_text().splitlines()
        ranks = int(given) if colon and given.isdigit() else None
        ranks = ranks or json.loads((directory / "startup.json").read_text())["ranks"]
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        how = f"; say how many ranks it had: N:{directory}" if missing == "startup.json" else ""
        raise ValueError(f"{directory} is no finished run of aeris.train: no {missing}{how}") from None
    rates = [record for record in map(json.loads, lines) if "images_per_s" in record]
    if len(rates) <= warm:
        raise ValueError(
            f"{directory} has {len(rates)} records, and --warm {warm} are not counted: train longer"
        )
    speeds = [record["images_per_s"] for record in rates[warm:]]
    row = {
        "ranks": ranks,
        "batch": config["train"]["batch"],
        "images_per_s": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "tflops": rates[-1].get("tflops_sustained", ""),
        "tflops_peak": rates[-1].get("tflops_peak", ""),
        "data_wait": statistics.median(record["data_wait"] for record in rates[warm:]),
    }
    return row, config


def complete(row: Row, layout: str, per_rank: float, shared: float | None = None) -> Row:
    """Put a row's columns in order, with its efficiency.

    Args:
        row: as of `read_run`.
        layout: its name.
        per_rank: images per second of a rank that loses nothing.
        shared: share of it that is left to ranks that only share the cores; None: not known.
    """
    efficiency = row["images_per_s"] / row["ranks"] / per_rank
    parts: Row = {"shared_cores": "", "communication": ""}
    if shared is not None:
        parts = {"shared_cores": shared, "communication": efficiency / shared}
    head = ("ranks", "batch", "images_per_s", "slowest", "fastest")
    tail = ("tflops", "tflops_peak", "data_wait")
    found: Row = {"layout": layout} | {column: row[column] for column in head}
    return found | {"efficiency": efficiency} | parts | {column: row[column] for column in tail}


def collect(texts: Sequence[str], warm: int, problem: Callable[[Row, Row], str]) -> list[Row]:
    """Read runs and compare them with the one of fewest ranks.

    Args:
        texts: see `read_run`.
        warm: see `read_run`.
        problem: says why a row cannot be compared with the first; "" if it can.

    Raises:
        ValueError: a run cannot be read, or they differ in more than what scales.
    """
    found = sorted((read_run(text, warm) for text in texts), key=lambda pair: pair[0]["ranks"])
    (first, config), rows = found[0], []
    for row, other in found:
        if (other["model"], other["train"]["microbatch"]) != (config["model"], config["train"]["microbatch"]):
            raise ValueError(f"the runs of {first['ranks']} and {row['ranks']} ranks train different models")
        if why := problem(first, row):
            raise ValueError(why)
        degrees = {axis: other.get("parallel", {}).get(axis, 0) for axis in AXES}
        layout = name(ParallelDims(**degrees)) if all(degrees.values()) else "chosen"
        rows.append(complete(row, layout, first["images_per_s"] / first["ranks"]))
    return rows


def measure(
    options: Options, config: RunConfig, cases: Sequence[Case], alone: Case, directory: Path
) -> list[Row]:
    """Train every case on this machine, and as many runs of one rank at the same time as it has ranks.

    Args:
        options: number of steps and rounds.
        config: of the model.
        cases: at least one.
        alone: the run of one rank that they are compared with.
        directory: gets the runs.

    Raises:
        ValueError: too few steps, or a run failed.
    """
    if options.steps <= options.warm:
        raise ValueError(
            f"--steps {options.steps}, of which --warm {options.warm} are not counted: take more"
        )
    sizes = sorted({case.dims.world for case in cases} | {1})
    threads = max(1, cores() // sizes[-1])
    apart: dict[int, list[float]] = {ranks: [] for ranks in sizes}
    ours: dict[Case, list[Row]] = {case: [] for case in cases}
    lonely: list[Row] = []

    def train(case: Case, copies: int, what: str, number: int) -> list[Row]:
        place, world = directory / f"{number} {what}".replace(" ", "_"), case.dims.world
        settings = case.config(config, options.steps)
        runs = train_at_once(settings, place, ranks=world, copies=copies, threads=threads)
        rows = [read_run(f"{world}:{run}", options.warm)[0] for run in runs]
        speed = sum(row["images_per_s"] for row in rows)
        console.print(f"{what}, batch {case.batch}: {speed:.4g} images/s", markup=False)
        return rows

    for number in range(options.rounds):
        for ranks in sizes:
            whose = "1 rank alone" if ranks == 1 else f"{ranks} times 1 rank at once"
            rows = train(alone, ranks, whose, number)
            apart[ranks].append(sum(row["images_per_s"] for row in rows))
            lonely += rows if ranks == 1 else []
            for case in (case for case in cases if case.dims.world == ranks):
                what = f"{ranks} as {name(case.dims)}"
                ours[case] += rows if case == alone else train(case, 1, what, number)
    if any(row["fastest"] > UNSTEADY * row["slowest"] for row in lonely):
        console.print("[red]The steps of a rank alone differ much: is something else running here?")
    single, found = statistics.median(apart[1]), []
    for case in cases:
        middle = sorted(ours[case], key=lambda row: row["images_per_s"])[options.rounds // 2]
        shared = statistics.median(apart[case.dims.world]) / single / case.dims.world
        found.append(complete(middle, name(case.dims), single, shared))
    if any(row["communication"] > UNLIKELY for row in found if row["communication"] != ""):
        console.print(
            "[red]Ranks that wait for each other were faster than ranks that do not: repeat it alone."
        )
    return found


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def predict(options: Options, config: RunConfig, layout: str, batch: Callable[[int], int]) -> list[Row]:
    """Plan a step on every number of nodes, and say what a device loses against the fewest.

    The seconds that an image takes of a device are the sum of the step's parts (aeris/planning/estimate.py),
    so that a loss is shared out to them: `lost_*` and `efficiency` add up to 1.

    Args:
        options: machine and numbers of nodes.
        config: of the model.
        layout: of a replica; "": the published one of the preset on the machine.
        batch: images per step of so many replicas.

    Raises:
        ValueError: the nodes make no whole replicas, or the batch does not suit them.
    """
    # Here, because a benchmark that trains needs no planner.
    from aeris.planning.estimate import breakdown, estimate
    from aeris.planning.hardware import load

    hardware, rows, first = load(options.machine), list[Row](), dict[str, float]()
    replica = read_layout(layout) if layout else published_replica(options.predict, hardware.name)
    channels = len(config.data.channels) or len(open_store(config).names)
    for nodes in counts(options.nodes, "--nodes"):
        devices = nodes * hardware.devices_per_node
        if devices % replica.world:
            step = replica.world // math.gcd(replica.world, hardware.devices_per_node)
            near = " or ".join(f"{n:,}" for n in (nodes // step * step, (nodes // step + 1) * step) if n)
            raise ValueError(
                f"--nodes {nodes}: {devices:,} devices make no whole replicas of {replica.world:,} "
                f"({name(replica)}); {near} would"
            )
        dims = dataclasses.replace(replica, dp=devices // replica.world)
        case = Case(dims, batch(dims.dp))
        settings = case.config(config, 1)
        limits(settings).check(dims, devices)
        plan = estimate(settings, channels, dims, hardware)
        if plan.problem:
            console.print(f"{nodes:,} nodes: {plan.problem}", markup=False)
        of_image = {part: s * devices / case.batch for part, s in breakdown(plan).items()}
        first = first or of_image
        whole = sum(of_image.values())
        lost = {part: round((s - first[part]) / whole, 6) for part, s in of_image.items()}
        waiting, weights = lost.pop("waiting"), lost.pop("weights") + lost.pop("gradients")
        row: Row = {"layout": name(dims), "ranks": devices, "nodes": nodes, "batch": case.batch}
        row |= {"step_s": plan.step_s, "images_per_s": plan.images_per_s}
        row |= {"efficiency": sum(first.values()) / whole, "lost_pipeline": waiting, "lost_weights": weights}
        row |= {"lost_other": sum(lost.values()), "tflops": plan.flops_per_s / devices / 1e12}
        row |= {"eflops": plan.flops_per_s / 1e18, "mfu": plan.mfu, "fits": "no" if plan.problem else "yes"}
        rows.append(row)
    return rows


def published_replica(preset: str, machine: str) -> ParallelDims:
    """Return the published degrees of a replica (launch/layouts.py).

    Raises:
        ValueError: none are known for the preset on the machine.
    """
    known = LAYOUTS.get(machine, {})
    if preset not in known:
        raise ValueError(f"no published layout of {preset} on {machine}: give one with --layout")
    return ParallelDims(*(max(1, degree) for degree in known[preset].degrees._replace(dp=1)))
