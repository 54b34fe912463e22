"""Weak scaling: images per second when the batch grows with the ranks.

    python -m benchmarks.weak_scaling --ranks 1,2,4,8 [--layout "pp 2 x sp 2"] [-- --model.width 64 ...]
    python -m benchmarks.weak_scaling --collect RUN_DIR RUN_DIR ... --csv FILE --plot FILE
    python -m benchmarks.weak_scaling --predict 40b --machine alcf-aurora --nodes 720,1440,3600,7200,10080

The first trains on this machine and tells what ranks lose to shared cores from what they lose to each other
(benchmarks/scaling.py); the second tabulates runs of `aeris.train` that have been made elsewhere, one per
number of nodes (pbs/weak_scaling.sh); the third plans them.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # started by its path, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from aeris.log import run_program
from benchmarks import scaling
from benchmarks.parallelism import read_layout
from benchmarks.records import Row, deliver, hardware
from benchmarks.scaling import Case
from benchmarks.scaling_picture import draw
from benchmarks.starting import counts, split
from swipe.mesh import ParallelDims


@dataclass(frozen=True)
class Options(scaling.Options):
    """Train on several numbers of ranks, the batch growing with them; or tabulate or plan such runs."""

    ranks: str = "1,2,4"
    """Numbers of ranks, with commas between."""
    layout: str = ""
    """How the ranks of one replica are laid out, such as "pp 2 x sp 2"; without, a replica is one rank, or
    that of the published layout with --predict."""
    batch: int = 0
    """Images per step of one replica; 0: 4 that are trained here, and 100 that are planned, as published for
    40B, or the preset's own batch where that is less."""


def problem(first: Row, row: Row) -> str:
    """Say why a run is no weak scaling of the first; "" if it is."""
    if row["batch"] * first["ranks"] == first["batch"] * row["ranks"]:
        return ""
    return (
        f"no weak scaling: batch {first['batch']} on {first['ranks']} ranks and {row['batch']} on "
        f"{row['ranks']}: {first['batch'] * row['ranks'] / first['ranks']:g} would be as much each"
    )


def cases(options: Options, replica: ParallelDims) -> tuple[list[Case], Case]:
    """Return the runs, and the run of one rank that does as much as a rank of theirs.

    Raises:
        ValueError: the ranks are no multiple of the replica's, or its ranks cannot share the batch.
    """
    numbers, batch = counts(options.ranks), options.batch or 4
    if replica.dp != 1:
        raise ValueError(f"--layout {options.layout}: leave dp out, it grows with the ranks")
    if other := [ranks for ranks in numbers if ranks % replica.world]:
        raise ValueError(
            f"--ranks {other[0]} is no multiple of the {replica.world} of --layout {options.layout}"
        )
    if batch % replica.world:
        above = (batch // replica.world + 1) * replica.world
        raise ValueError(
            f"a batch of {batch} is no multiple of the {replica.world} ranks of a replica, whose work one "
            f"rank shall do alone: --batch {above} would be"
        )
    replicas = [ranks // replica.world for ranks in numbers]
    found = [Case(dataclasses.replace(replica, dp=dp), batch * dp) for dp in replicas]
    return found, Case(ParallelDims(), batch // replica.world)


def beside_published(rows: list[Row], preset: str, machine: str) -> list[Row]:
    """Add the efficiency that was published for these nodes, against the fewest; "" where none was."""
    from aeris.planning.published import MODELS

    known = [model for model in MODELS if (model.preset, model.machine, model.sizes) == (preset, machine, {})]
    points = {nodes: eflops / nodes for model in known for nodes, eflops in model.points}
    first = points.get(rows[0]["nodes"])
    return [
        row | {"published": points[row["nodes"]] / first if first and row["nodes"] in points else ""}
        for row in rows
    ]


def find(options: Options, further: list[str]) -> tuple[list[Row], str]:
    """Return the rows, and on what they were measured."""
    if options.collect:
        return scaling.collect(options.collect, options.warm, problem), f"{len(options.collect)} runs"
    config = scaling.settings(options.predict or options.preset, further)
    if options.predict:
        batch = options.batch or min(100, config.train.batch)
        rows = scaling.predict(options, config, options.layout, lambda dp: batch * dp)
        rows = beside_published(rows, options.predict, options.machine)
        return rows, f"{options.predict} planned on {options.machine}"
    runs, alone = cases(options, read_layout(options.layout or "dp 1"))
    with tempfile.TemporaryDirectory(prefix="weak-scaling-") as directory:
        rows = scaling.measure(options, config, runs, alone, Path(directory))
    return rows, f"{options.preset}, {scaling.cores()} cores, {hardware()}"


def main() -> None:
    """Run the benchmark."""
    own, further = split(sys.argv[1:])
    options = tyro.cli(Options, args=own, description=Options.__doc__)
    rows, about = find(options, further)
    picture = partial(draw, what="weak scaling, the batch grows with the ranks")
    worse = deliver(rows, options.output, key=scaling.KEY, numbers=scaling.NUMBERS, draw=picture, about=about)
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
