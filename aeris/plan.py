"""Plan a training run: `python -m aeris.plan [PRESET] --machine MACHINE --nodes N [--section.key value]`.

Searches the layouts of the run on a machine and says of the best what it takes: memory, messages, seconds.
Nothing is built; a laptop will do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from aeris import config as configs
from aeris.config import RunConfig
from aeris.log import console, run_program, speaker
from aeris.parallelize import limits
from aeris.planning import published, report
from aeris.planning.estimate import HEADROOM, Plan, estimate
from aeris.planning.explain import explain
from aeris.planning.hardware import Hardware, load
from aeris.planning.search import Candidate, Planner, Search
from aeris.presets import PRESETS
from aeris.restore import open_store
from launch import layouts
from launch.hosts import counted
from launch.rank import discover
from swipe.mesh import AXES, ParallelDims

DOUBLINGS = 4
"""How often the nodes are doubled to find out how many a run needs that does not fit."""
CHOSEN = {("parallel", name) for name in (*AXES, "shard")} | {("train", "batch"), ("train", "microbatch")}
"""Settings that `Plan.flags` gives."""


@dataclass(frozen=True)
class Arguments:
    """Find the best layouts of a training run on a machine, and what they take.

    Degrees that --parallel.* gives are kept, the others are searched, and so is --train.microbatch unless it
    is given. Every other setting of aeris.train counts as there.
    """

    preset: Annotated[Literal["tiny", "1.3b-6h", "1.3b-24h", "13b", "40b", "80b"], tyro.conf.Positional] = (
        "tiny"
    )
    """Named configuration to start from; every setting below overrides it."""
    machine: str = "cpu"
    """alcf-aurora, lumi, h200, a100, cpu, or a .json file that describes one (docs/planning.md)."""
    nodes: int = 1
    """Nodes of the machine."""
    ranks_per_node: int = 0
    """Devices of each node that are used; 0: all."""
    batch_per_replica: int = 0
    """Images of a step on each replica, so that the batch is this times dp; 0: the batch is --train.batch."""
    headroom: float = HEADROOM
    """Share of a device's memory that tensors must leave free."""
    top: int = 8
    """Layouts to print."""
    explain: bool = False
    """Also print every formula with its numbers, for the best layout."""
    published: bool = False
    """Print instead the published scaling runs of AERIS, predicted and published."""
    json: bool = False
    """Print one JSON object and nothing else."""
    csv: Path | None = None
    """Also write the printed layouts to this file."""
    plot: Path | None = None
    """Also draw them (PNG; needs matplotlib)."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """Settings of the run."""


def machine_of(arguments: Arguments) -> Hardware:
    """Return the machine that is asked for, with as many devices on a node as are used.

    Raises:
        ValueError: there is no such machine, or it is smaller than that.
    """
    hardware, nodes, ranks = load(arguments.machine), arguments.nodes, arguments.ranks_per_node
    if nodes < 1 or 0 < hardware.nodes < nodes:
        most = f"{hardware.name} has {hardware.nodes:,}" if hardware.nodes else "take 1 or more"
        raise ValueError(f"--nodes {nodes}: {most}")
    if not 0 <= ranks <= hardware.devices_per_node:
        raise ValueError(
            f"--ranks-per-node {ranks}: a node of {hardware.name} has {hardware.devices_per_node} devices; 0 "
            "takes all"
        )
    return dataclasses.replace(hardware, devices_per_node=ranks or hardware.devices_per_node)


def published_layout(arguments: Arguments, planner: Planner) -> tuple[Plan | None, str]:
    """Return the layout that `launch` starts this preset with on this machine, or why there is none."""
    known = layouts.LAYOUTS.get(planner.hardware.name, {}).get(arguments.preset)
    if known is None or 0 in known.degrees[1:]:
        return None, ""
    config, each = arguments.config, planner.hardware.devices_per_node
    try:
        degrees = layouts.check(arguments.nodes, each, known.degrees)
        size = arguments.batch_per_replica * degrees.dp or config.train.batch
        train = dataclasses.replace(config.train, batch=size, microbatch=1)
        config = dataclasses.replace(config, train=train)
        dims = ParallelDims(*degrees)
        limits(config).check(dims, planner.devices)
        return estimate(config, planner.channels, dims, planner.hardware, planner.headroom), ""
    except ValueError as error:
        return None, f"the layout of the published runs ({known.degrees}) does not suit this: {error}"


def variants(config: RunConfig) -> list[tuple[str, str, RunConfig]]:
    """List settings that trade time for memory, or give it back: name, value, the run with it."""
    model, optimizer = config.model, config.optimizer
    other: Literal["none", "block"] = "none" if model.checkpointing == "block" else "block"
    recompute = dataclasses.replace(model, checkpointing=other)
    elsewhere: Literal["none", "cpu-torch"] = "none" if optimizer.offload != "none" else "cpu-torch"
    offload = dataclasses.replace(optimizer, offload=elsewhere)
    return [
        ("--model.checkpointing", other, dataclasses.replace(config, model=recompute)),
        ("--optimizer.offload", elsewhere, dataclasses.replace(config, optimizer=offload)),
    ]


@dataclass(frozen=True)
class Found:
    """All that is said of a run on a machine.

    Attributes:
        published: the layout of the published runs, if there is one for this preset, machine and nodes.
        remark: why there is none; "" if nobody would expect one.
        changes: what is changed, its value, and the search with it.
    """

    search: Search
    published: Plan | None
    remark: str
    changes: list[tuple[str, str, Search]]

    @property
    def named(self) -> list[tuple[str, Plan]]:
        """The best layouts and the published one, each with what to call it."""
        rows = [(str(number), plan) for number, plan in enumerate(self.search.plans, 1)]
        return rows + ([("published", self.published)] if self.published else [])


def find(arguments: Arguments, channels: int, microbatches: Sequence[int] = ()) -> Found:
    """Search the layouts of a run.

    Args:
        microbatches: images of a microbatch to try; empty: all.

    Raises:
        ValueError: no layout suits the run and the machine, or none fits its memory; says what would.
    """
    hardware = machine_of(arguments)

    def ask(config: RunConfig, nodes: int, top: int) -> tuple[Planner, list[Candidate], Search]:
        devices = nodes * hardware.devices_per_node
        planner = Planner(config, channels, hardware, devices, arguments.headroom)
        candidates = planner.candidates(microbatches, arguments.batch_per_replica)
        return planner, candidates, planner.best(candidates, top)

    def enough() -> int:
        """Find a number of nodes on which something fits, by doubling; 0 if there is none."""
        nodes = arguments.nodes
        for _ in range(DOUBLINGS):
            nodes *= 2
            if 0 < hardware.nodes < nodes:
                return 0
            with suppress(ValueError):  # no layout of so many devices
                if ask(arguments.config, nodes, 1)[2].plans:
                    return nodes
        return 0

    planner, candidates, result = ask(arguments.config, arguments.nodes, arguments.top)
    others = [
        (name, value, ask(config, arguments.nodes, 1)[2])
        for name, value, config in variants(arguments.config)
    ]
    if not result.plans:
        raise ValueError(nothing_fits(arguments, planner, result, others, enough()))
    known, remark = published_layout(arguments, planner)
    near = planner.neighbours(result.plans[0], candidates, known)
    return Found(result, known, remark, [(n, str(v), s) for n, v, s in near] + others)


def nothing_fits(
    arguments: Arguments,
    planner: Planner,
    result: Search,
    others: Sequence[tuple[str, str, Search]],
    nodes: int,
) -> str:
    """Say in one line that no layout fits, which is nearest to it, and what would help."""
    near = min(result.rejected, key=lambda one: one.need)
    helps = [f"{name} {value}" for name, value, search in others if search.plans]
    helps += [f"--nodes {nodes}"] if nodes else []
    advice = f"{' or '.join(helps)} would do" if helps else "take more devices or a smaller model"
    remark = published_layout(arguments, planner)[1]
    advice += f"; {remark}" if remark else ""
    return (
        f"none of {result.layouts:,} layouts of {arguments.preset} fits on "
        f"{counted(arguments.nodes, 'node')} of {planner.hardware.name}: the nearest, {near.dims} with "
        f"microbatches of {near.config.train.microbatch}, {near.problem}; {advice}"
    )


def flags(arguments: Arguments, plan: Plan) -> str:
    """Write what to add to `aeris.train PRESET` to run it so: the layout, and what else was asked for."""
    start, words = dataclasses.asdict(PRESETS[arguments.preset]()), [plan.flags]
    for section, values in dataclasses.asdict(arguments.config).items():
        for name, value in values.items():
            if (section, name) in CHOSEN or value == start[section][name]:
                continue
            word = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{section}.{word}" if value else f"--{section}.no-{word}")
            else:
                each = value if isinstance(value, list | tuple) else (value,)
                words += [f"--{section}.{word}", *(shlex.quote(str(one)) for one in each)]
    return " ".join(words)


def say(arguments: Arguments, found: Found) -> None:
    """Print what was found."""
    plans, best = found.search.plans, found.search.plans[0]
    hardware = best.hardware
    size = f"a batch of {best.config.train.batch:,}"
    if arguments.batch_per_replica:
        size = f"{arguments.batch_per_replica:,} images of a step on each replica"
    console.print(
        f"{arguments.preset}, {best.parameters:,} parameters, on {arguments.nodes:,} x "
        f"{hardware.devices_per_node} devices of {hardware.name}, {size}: the best {len(plans)} of "
        f"{found.search.layouts:,} layouts"
    )
    console.print(report.table(found.named))
    console.print(report.COLUMNS, style="dim")
    if found.remark:
        console.print(found.remark, markup=False)
    console.print("\n[bold]the best[/]  python -m aeris.train ", end="")
    console.print(f"{arguments.preset} {flags(arguments, best)}\n", soft_wrap=True, markup=False)
    for table in report.details(best):
        console.print(table)
        console.print()
    if found.published:
        console.print(report.difference(best, found.published, "the published layout"))
        if found.published.problem:
            console.print(f"the published layout does not fit: it {found.published.problem}", style="red")
        console.print()
    console.print(report.changes(best, found.changes))
    if found.search.rejected:
        console.print()
        console.print(report.reasons(found.search.rejected))
    console.print()
    for line in report.assumptions(best):
        console.print(f"- {line}", markup=False)


def as_json(arguments: Arguments, found: Found) -> dict[str, Any]:
    """Return what was found as plain values."""
    return {
        "preset": arguments.preset,
        "machine": dataclasses.asdict(found.search.plans[0].hardware),
        "nodes": arguments.nodes,
        "layouts": found.search.layouts,
        "best": [report.row(plan) | {"flags": flags(arguments, plan)} for plan in found.search.plans],
        "published": report.row(found.published) if found.published else None,
        "changes": [
            {"name": name, "value": value, "best": report.row(search.plans[0]) if search.plans else None}
            for name, value, search in found.changes
        ],
        "rejected": [
            {
                "layout": dataclasses.asdict(one.dims),
                "microbatch": one.config.train.microbatch,
                "shard": one.config.parallel.shard,
                "why": one.problem,
            }
            for one in found.search.rejected
        ],
    }


def parse(argv: list[str]) -> Arguments:
    """Read the command line over the preset it names (tiny if none)."""
    preset = "tiny"
    while True:
        default = Arguments(preset=preset, config=PRESETS[preset]())  # type: ignore[arg-type]
        found = tyro.cli(
            Arguments, args=argv, default=default, prog="python -m aeris.plan", description=Arguments.__doc__
        )
        if found.preset == preset:
            return found
        preset = found.preset  # read again, now over the settings of the preset that was named


def main() -> None:
    """Run the program."""
    ranks = discover(os.environ)
    speaker.work_alone("planning", ranks.rank, ranks.world)
    arguments = parse(sys.argv[1:])
    if arguments.published:
        say_published(arguments)
        return
    check(arguments)
    for path in filter(None, (arguments.csv, arguments.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # what cannot be written is known before the search
    given = layouts.flag(sys.argv[1:], "train.microbatch") is not None
    channels = len(arguments.config.data.channels) or len(open_store(arguments.config).names)
    found = find(arguments, channels, (arguments.config.train.microbatch,) if given else ())
    if arguments.json:
        print(json.dumps(as_json(arguments, found)))
    else:
        say(arguments, found)
        if arguments.explain:
            for title, lines in explain(found.search.plans[0]):
                console.print(f"\n[bold]{title}[/]")
                for line in lines:
                    console.print(str(line), markup=False, soft_wrap=True)
    if arguments.csv:
        report.write([{"name": name} | report.row(plan) for name, plan in found.named], arguments.csv)
    if arguments.plot:
        from aeris.planning.pictures import draw

        nodes = counted(arguments.nodes, "node")
        title = f"{arguments.preset} on {nodes} of {found.search.plans[0].hardware.name}"
        draw(found.named, arguments.plot, title)


def say_published(arguments: Arguments) -> None:
    """Print the published scaling runs beside what is predicted for them."""
    rows = published.table()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) | {"residual": row.residual} for row in rows]))
    else:
        console.print(report.residuals(rows))
    if arguments.csv:
        report.write([dataclasses.asdict(row) | {"residual": row.residual} for row in rows], arguments.csv)
    if arguments.plot:
        from aeris.planning.published_picture import draw

        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, arguments.plot)


def check(arguments: Arguments) -> None:
    """Check what can be checked before anything is computed.

    Raises:
        ValueError: a number cannot be, or settings contradict each other.
    """
    configs.check(arguments.config)
    if arguments.top < 1:
        raise ValueError(f"--top {arguments.top}: it must be 1 or more")
    if not 0 <= arguments.headroom < 1:
        raise ValueError(f"--headroom {arguments.headroom:g}: it is a share of the memory, from 0 to below 1")
    if arguments.batch_per_replica < 0:
        raise ValueError(f"--batch-per-replica {arguments.batch_per_replica}: it must be 1 or more, or 0")


if __name__ == "__main__":
    run_program(main)
