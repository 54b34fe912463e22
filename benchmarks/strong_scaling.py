"""Strong scaling: images per second when more ranks share a batch of the same size.

    python -m benchmarks.strong_scaling --ranks 1,2,4 [--layouts "dp 4" "wp 2x2"] [-- --model.width 64 ...]
    python -m benchmarks.strong_scaling --collect RUN_DIR RUN_DIR ... --csv FILE --plot FILE
    python -m benchmarks.strong_scaling --predict 40b --machine alcf-aurora --nodes 720,1440,3600,7200,10080

The first trains on this machine, along every axis of the mesh alone, and tells what ranks lose to shared
cores from what they lose to each other (benchmarks/scaling.py); the second tabulates runs of `aeris.train`
that have been made elsewhere (pbs/strong_scaling.sh); the third plans them, dp growing with the nodes.
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

from aeris.config import RunConfig
from aeris.log import console, run_program
from aeris.parallelize import limits
from benchmarks import scaling
from benchmarks.parallelism import read_layout
from benchmarks.records import Row, deliver, hardware
from benchmarks.scaling import Case
from benchmarks.scaling_picture import draw
from benchmarks.starting import counts, split
from swipe.mesh import ParallelDims

ALONG = {"dp": ("dp",), "wp": ("wp_y", "wp_x"), "pp": ("pp",), "sp": ("sp",)}
"""Degrees that take all ranks, by axis."""


@dataclass(frozen=True)
class Options(scaling.Options):
    """Train on several numbers of ranks, always the same batch; or tabulate or plan such runs."""

    ranks: str = "1,2,4"
    """Numbers of ranks, with commas between; each is laid out along dp, wp, pp and sp in turn, as far as
    model and batch allow."""
    layouts: tuple[str, ...] = ()
    """Train these instead, such as "dp 4" "pp 2 x sp 2"; with --predict the first is a replica."""
    batch: int = 0
    """Images per step; 0: 8 that are trained here, the preset's own batch that is planned."""
    microbatch: int = 1
    """Images per forward and backward pass, of what is trained here."""


def problem(first: Row, row: Row) -> str:
    """Say why a run is no strong scaling of the first; "" if it is."""
    if row["batch"] == first["batch"]:
        return ""
    return (
        f"no strong scaling: batch {first['batch']} on {first['ranks']} ranks and {row['batch']} on "
        f"{row['ranks']}: it must be the same"
    )


def layouts(options: Options, config: RunConfig) -> list[ParallelDims]:
    """Return what is trained: the layouts asked for, or each axis alone on every number of ranks.

    Args:
        options: what is asked for.
        config: with the batch and the microbatch of the benchmark.

    Raises:
        ValueError: one that was asked for does not suit the model or the batch.
    """
    bounds, asked = limits(config), [read_layout(text) for text in options.layouts]
    for dims in asked:
        bounds.check(dims, dims.world)
    if asked:
        return list(dict.fromkeys(asked))
    found: dict[ParallelDims, None] = {}
    for ranks in counts(options.ranks):
        for axis, degrees in ALONG.items():
            fixed = {other: 1 for others in ALONG.values() for other in others if other not in degrees}
            try:
                found[bounds.choose(ranks, fixed=fixed)] = None
            except ValueError:
                console.print(f"left out, as model or batch do not allow it: {axis} on {ranks} ranks")
    if not found:
        raise ValueError(f"--ranks {options.ranks}: neither dp, wp, pp nor sp takes that many; try --layouts")
    return list(found)


def find(options: Options, further: list[str]) -> tuple[list[Row], str]:
    """Return the rows, and on what they were measured."""
    if options.collect:
        return scaling.collect(options.collect, options.warm, problem), f"{len(options.collect)} runs"
    config = scaling.settings(options.predict or options.preset, further)
    if options.predict:
        batch = options.batch or config.train.batch
        layout = options.layouts[0] if options.layouts else ""
        rows = scaling.predict(options, config, layout, lambda dp: batch)
        return rows, f"{options.predict} planned on {options.machine}"
    train = dataclasses.replace(config.train, batch=options.batch or 8, microbatch=options.microbatch)
    config = dataclasses.replace(config, train=train)
    runs = [Case(dims, train.batch) for dims in layouts(options, config)]
    with tempfile.TemporaryDirectory(prefix="strong-scaling-") as directory:
        rows = scaling.measure(options, config, runs, Case(ParallelDims(), train.batch), Path(directory))
    return rows, f"{options.preset}, {scaling.cores()} cores, {hardware()}"


def main() -> None:
    """Run the benchmark."""
    own, further = split(sys.argv[1:])
    options = tyro.cli(Options, args=own, description=Options.__doc__)
    rows, about = find(options, further)
    picture = partial(draw, what="strong scaling, all ranks share one batch")
    worse = deliver(rows, options.output, key=scaling.KEY, numbers=scaling.NUMBERS, draw=picture, about=about)
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
