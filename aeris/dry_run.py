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
from aeris.parallelize import choose_degrees, cut
from aeris.restore import channel_counts, open_store
from swipe.mesh import AXES
from swipe.schedule import SCHEDULES, render, simulate


def layout_of(config: RunConfig, channels: int, world: int) -> dict[str, Any]:
    """Say how a run would be spread over `world` ranks; alone, over as many as its degrees make."""
    degrees = [getattr(config.parallel, axis) or 1 for axis in AXES]
    dims = choose_degrees(config, math.prod(degrees) if world == 1 else world)
    stages = cut(config.model, *channel_counts(channels), dims.pp)
    count = config.train.batch // (config.train.microbatch * dims.dp)
    timeline = simulate(SCHEDULES[config.parallel.schedule](dims.pp, count))
    return {
        "layout": str(dims),
        "world": dims.world,
        "stages": [[units.start, units.stop] for units in stages],
        "microbatches": count,
        "bubble": timeline.bubble,
    }


def dry_run(config: RunConfig, preset: str, world: int, as_json: bool) -> None:
    """Print the resolved configuration, the layout and what a step costs; build nothing but shapes.

    Raises:
        ValueError: the settings do not fit each other, the data or the number of ranks.
    """
    configs.check(config)
    channels = len(config.data.channels) or len(open_store(config).names)
    found, parallel = costs(config, channels), layout_of(config, channels, world)
    if as_json:
        about = {"preset": preset, "config": dataclasses.asdict(config), "parallel": parallel}
        if speaker.rank == 0:
            print(json.dumps({**found, **about}))
        return
    for section, values in dataclasses.asdict(config).items():
        table = Table(title=section, title_justify="left", show_header=False, box=None)
        for name, value in values.items():
            table.add_row(f"--{section}.{name.replace('_', '-')}", str(value))
        console.print(table)
    table = Table(title="what it costs", title_justify="left", show_header=False, box=None)
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("FLOPs per sample, forward + backward", f"{found['flops_per_sample']:.4g}")
    for name, value in found["flops_by_part"].items():
        table.add_row(f"  {name.replace('_', ' ')}", f"{value / found['flops_per_sample']:.2%}")
    table.add_row("FLOPs per sample, repeated by checkpointing", f"{found['recompute_flops_per_sample']:.4g}")
    for name, value in found["memory_bytes"].items():
        table.add_row(f"memory if one device held all, {name}", f"{value / 2**30:.3f} GiB")
    if found["host_bytes"]:
        table.add_row("memory of its host, offloaded", f"{found['host_bytes'] / 2**30:.3f} GiB")
    console.print(table)
    print_layout(config, parallel)


def print_layout(config: RunConfig, parallel: dict[str, Any]) -> None:
    """Print how the run is spread over ranks, and its pipeline as long as that fits a screen."""
    table = Table(title="how it is spread", title_justify="left", show_header=False, box=None)
    table.add_row("ranks", f"{parallel['world']:,} as {parallel['layout']}")
    for number, units in enumerate(parallel["stages"]):
        names = [unit_name(unit, config.model.layers) for unit in range(*units)]
        table.add_row(f"stage {number}", ", ".join(names))
    stages, count = len(parallel["stages"]), parallel["microbatches"]
    table.add_row("microbatches per step and replica", str(count))
    table.add_row("pipeline idle", f"{parallel['bubble']:.1%}")
    console.print(table)
    if 1 < stages <= 8 and count <= 12:
        console.print(render(SCHEDULES[config.parallel.schedule](stages, count)))


def unit_name(unit: int, layers: int) -> str:
    """Name a unit of the network (`Swin`)."""
    return "embedding" if unit == 0 else "head" if unit == layers + 1 else f"layer {unit - 1}"
