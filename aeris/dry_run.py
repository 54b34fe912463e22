"""What a training run would be: its settings, its layout over ranks, its costs. Only shapes are built."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from rich.table import Table

from aeris import config as configs
from aeris.config import RunConfig
from aeris.costs import costs
from aeris.log import console, speaker
from aeris.parallelize import choose_degrees, cut, limits
from aeris.planning.estimate import HEADROOM
from aeris.planning.hardware import HARDWARE
from aeris.planning.memory import host_memory, memory
from aeris.planning.traffic import microbatches
from aeris.restore import channel_counts, open_store
from launch.layouts import LAYOUTS
from swipe.groups import check_shard
from swipe.mesh import AXES, ParallelDims
from swipe.schedule import SCHEDULES, render, simulate


def dry_run(config: RunConfig, preset: str, world: int, as_json: bool, rehearsed: int = 0) -> None:
    """Print the resolved configuration, the layout and what a step costs; build nothing but shapes.

    Args:
        preset: what the configuration was made from.
        world: ranks that were started; 1: as many as the degrees make.
        as_json: one JSON object in place of tables.
        rehearsed: ranks to go through a step of; 0: none, and nothing is gone through.

    Raises:
        ValueError: the settings do not fit each other, the data or the number of ranks; or ranks would send
            what nobody expects, or wait for each other.
    """
    if rehearsed and world > 1:
        raise ValueError("--world-size speaks for all ranks: start it in one process, without a launcher")
    configs.check(config)
    channels = len(config.data.channels) or len(open_store(config).names)
    dims, origin = spread(config, preset, rehearsed) if rehearsed else (_chosen(config, world), "")
    found = costs(config, channels) | per_device(config, channels, dims)
    parallel = layout_of(config, channels, dims)
    if not as_json:
        print_settings(config)
        print_costs(found)
        print_layout(config, parallel, origin)
    if rehearsed > 1:
        found["rehearsal"] = rehearse_all(config, channels, dims, as_json)
    if as_json and speaker.rank == 0:
        about = {"preset": preset, "config": dataclasses.asdict(config), "parallel": parallel}
        print(json.dumps({**found, **about}))


def _chosen(config: RunConfig, world: int) -> ParallelDims:
    """Choose degrees for `world` ranks; alone, for as many as the given ones make."""
    degrees = [getattr(config.parallel, axis) or 1 for axis in AXES]
    return choose_degrees(config, math.prod(degrees) if world == 1 else world)


def spread(config: RunConfig, preset: str, world: int) -> tuple[ParallelDims, str]:
    """Lay `world` ranks out: as asked; else as published for the preset, if that fits; else as chosen.

    Returns:
        The degrees, and where they are from.

    Raises:
        ValueError: there is no such number of ranks, or no layout of it.
    """
    if world < 1:
        raise ValueError(f"--world-size {world}: it is a number of ranks, 1 or more")
    asked = [axis for axis in AXES if getattr(config.parallel, axis)]
    for machine, layouts in LAYOUTS.items() if not asked else ():
        degrees = layouts[preset].degrees if preset in layouts else None
        if degrees is None or not all(degrees[1:]) or world % degrees.known:
            continue
        dims = ParallelDims(world // degrees.known, *degrees[1:])
        if not limits(config).problems(dims, world):
            check_shard(dims, config.parallel.shard)
            return dims, f"published for {preset} on {machine} (launch/layouts.py)"
    dims = choose_degrees(config, world)
    return dims, "as asked" if len(asked) == len(AXES) else "chosen" if not asked else "completed"


def layout_of(config: RunConfig, channels: int, dims: ParallelDims) -> dict[str, Any]:
    """Say how a run is spread over ranks."""
    stages = cut(config.model, *channel_counts(channels), dims.pp)
    count = microbatches(config, dims)
    timeline = simulate(SCHEDULES[config.parallel.schedule](dims.pp, count))
    return {
        "layout": str(dims),
        "flags": dims.flags("--parallel."),
        "world": dims.world,
        "stages": [[units.start, units.stop] for units in stages],
        "microbatches": count,
        "bubble": timeline.bubble,
    }


def fitting(device_bytes: float) -> str:
    """Name the machines of `aeris.plan` whose devices hold so much, a share left free."""
    known = [machine for machine in HARDWARE.values() if machine.name != "cpu"]
    room = {machine.name: (1 - HEADROOM) * machine.memory_bytes for machine in known}
    fits = [name for name, most in room.items() if device_bytes <= most]
    largest = max(known, key=lambda machine: machine.memory_bytes)
    none = (
        f"none: the largest known, of {largest.name}, has {largest.memory_bytes / 1e9:.0f} GB; see aeris.plan"
    )
    return ", ".join(fits) or f"[red]{none}[/]"


def per_device(config: RunConfig, channels: int, dims: ParallelDims) -> dict[str, Any]:
    """Say what a device of the fullest stage holds, by part, in bytes, and with offload a host, at most."""
    stages = [memory(config, channels, dims, stage) for stage in range(dims.pp)]
    fullest = max(range(dims.pp), key=lambda stage: sum(stages[stage].values()))
    return {
        "device_bytes": stages[fullest],
        "fullest_stage": fullest,
        "host_bytes_per_rank": max(host_memory(config, channels, dims, stage) for stage in range(dims.pp)),
    }


def print_settings(config: RunConfig) -> None:
    """Print every setting as the flag that sets it."""
    for section, values in dataclasses.asdict(config).items():
        table = _table(section)
        for name, value in values.items():
            table.add_row(f"--{section}.{name.replace('_', '-')}", str(value))
        console.print(table)


def print_costs(found: dict[str, Any]) -> None:
    """Print parameters, FLOPs and memory."""
    table = _table("what it costs")
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("FLOPs per sample, forward + backward", f"{found['flops_per_sample']:.4g}")
    for name, value in found["flops_by_part"].items():
        table.add_row(f"  {name.replace('_', ' ')}", f"{value / found['flops_per_sample']:.2%}")
    table.add_row("FLOPs per sample, repeated by checkpointing", f"{found['recompute_flops_per_sample']:.4g}")
    held, stage = found["device_bytes"], found["fullest_stage"]
    table.add_row(f"memory of a device, on stage {stage}", f"{sum(held.values()) / 1e9:.3f} GB")
    for name, value in held.items():
        table.add_row(f"  {name}", f"{value / 1e9:.3f} GB")
    table.add_row("fits a device of", fitting(sum(held.values())))
    if found["host_bytes_per_rank"]:
        table.add_row("memory of a host, for each rank", f"{found['host_bytes_per_rank'] / 1e9:.3f} GB")
    console.print(table)


def print_layout(config: RunConfig, parallel: dict[str, Any], origin: str = "") -> None:
    """Print how the run is spread over ranks, and its pipeline as long as that fits a screen."""
    table = _table("how it is spread")
    table.add_row("ranks", f"{parallel['world']:,} as {parallel['layout']}")
    if origin:
        table.add_row("degrees", f"{origin}: {parallel['flags']}")
    for number, units in enumerate(parallel["stages"]):
        names = [unit_name(unit, config.model.layers) for unit in range(*units)]
        table.add_row(f"stage {number}", ", ".join(names))
    stages, count = len(parallel["stages"]), parallel["microbatches"]
    table.add_row("microbatches per step and replica", str(count))
    table.add_row("pipeline idle, were all stages equal", f"{parallel['bubble']:.1%}")
    console.print(table)
    if 1 < stages <= 8 and count <= 12:
        console.print(render(SCHEDULES[config.parallel.schedule](stages, count)))


def rehearse_all(config: RunConfig, channels: int, dims: ParallelDims, as_json: bool) -> dict[str, Any]:
    """Go through a step of all ranks, saying what is done as it is done; return what it was."""
    from aeris.rehearse import rehearse  # it costs half a second that a dry run without it need not wait

    def say(name: str, what: str, seconds: float) -> None:
        if not as_json:
            console.print(f"{name:<18} {what} ({seconds:.1f} s)", markup=False)

    say_title = f"a step of {dims.world:,} ranks, gone through"
    if not as_json:
        console.print(say_title)
    found = dataclasses.asdict(rehearse(config, channels, dims, say))
    if not as_json:
        print_rehearsal(found, dims)
    return found


def print_rehearsal(found: dict[str, Any], dims: ParallelDims) -> None:
    """Print what a rehearsal came to."""
    table = _table("what all ranks do in a step")
    table.add_row("ranks", f"{dims.world:,}")
    table.add_row("forward and backward passes", f"{found['actions']:,}")
    table.add_row("messages", f"{found['messages']:,}, each sent and received once")
    for kind, size in found["sent"].items():
        if size:
            table.add_row(
                f"sent, {kind}", f"{size:.4g} bytes, {size / dims.world / 1e9:.3f} GB a rank on average"
            )
    table.add_row("this took", f"{found['seconds']:.0f} s, {found['peak_bytes'] / 1e9:.2f} GB at most")
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False, box=None)


def unit_name(unit: int, layers: int) -> str:
    """Name a unit of the network (`Swin`)."""
    return "embedding" if unit == 0 else "head" if unit == layers + 1 else f"layer {unit - 1}"
