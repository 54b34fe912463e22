"""The half-window shift: how fast a rank's tokens change tiling, inside a stage and on the way to the next.

    python -m benchmarks.shift --ranks 8 --plot FILE
    mpiexec -n 24 python -m benchmarks.shift --layouts "wp 2x1 x sp 12" "wp 2x2 x sp 6" --device auto

Inside a stage the shift is an exchange, timed in turn with bare messages of the same bytes to the same peers.
Between two stages the tokens must be sent anyway: a shifted edge is timed in turn with one without a shift.
On one rank the shift is a copy, timed in turn with `torch.roll` of the image.

Shapes: B batch, N windows, T tokens per window, D width, Y rows, X columns.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from aeris.log import console, run_program
from aeris.model.swin import DTYPES
from benchmarks.parallelism import name, read_layout
from benchmarks.parts import seconds
from benchmarks.ranks import rows_of
from benchmarks.records import Output, Row, deliver, hardware
from swipe.backend import choose_device
from swipe.collectives import DATA_TAG, Message, all_gather, barrier, byte_log, exchange
from swipe.edge import Edge
from swipe.groups import Groups, make_groups
from swipe.layout import WindowLayout
from swipe.mesh import Limits, ParallelDims
from swipe.windows import WindowGrid

Precision = Literal["bf16", "fp32"]
WARM_UP = 2


@dataclass(frozen=True)
class Options:
    """Time the half-window shift of a rank's tokens against bare messages of the same bytes."""

    ranks: tuple[int, ...] = (1, 4, 8)
    """Processes to start here; under mpiexec or torchrun those that are there are used."""
    layouts: tuple[str, ...] = ()
    """Such as "wp 2x2 x sp 2" or "pp 2 x sp 4"; without, all that the ranks and the windows allow."""
    rows: int = 48
    """Rows of the image."""
    cols: int = 96
    """Columns of the image."""
    window: int = 12
    """Side of a window."""
    width: int = 2048
    """Features of a token."""
    precision: Precision = "bf16"
    """Type of the tokens."""
    rounds: int = 10
    """Timed turns, after two that are not counted."""
    device: str = "cpu"
    """cpu, or auto, cuda, xpu with a device for every rank."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)


class Trial(NamedTuple):
    """Calls to time in turn, and what they move on this rank."""

    how: str
    ours: Callable[[], object]
    other: Callable[[], object]
    against: str
    """What `other` is."""
    local: Callable[[], object]
    """The copies in `ours`: what it does without messages."""
    peers: int
    bytes: int
    """Bytes of this rank's tensor."""


def layouts(options: Options, ranks: int) -> list[ParallelDims]:
    """Return the layouts asked for; without, ways to share an image among the ranks, in one stage and in two.

    Raises:
        ValueError: one that was asked for does not suit the ranks or the windows.
    """
    grid = WindowGrid(options.rows, options.cols, options.window)
    bounds = Limits(grid.windows_y, grid.windows_x, grid.window, heads=ranks, units=ranks, samples=1)
    asked = [read_layout(text) for text in options.layouts]
    for dims in asked:
        bounds.check(dims, ranks)
    if asked:
        return asked
    found: dict[ParallelDims, None] = {}
    for pp in (1, 2):
        for sp in (1, 2, 4, 8, 12):
            if ranks % (pp * sp) == 0:
                try:
                    found[bounds.choose(ranks, fixed={"dp": 1, "pp": pp, "sp": sp})] = None
                except ValueError:
                    console.print(f"  left out, as the windows do not allow it: pp {pp} x sp {sp}")
    return list(found)


def inside(layout: WindowLayout, groups: Groups, x_BNTD: Tensor) -> Trial:
    """Shift inside a stage, against bare messages of the same bytes to the same peers."""
    mover = layout.movers[1]
    sends = [(place, x.clone()) for place, x in mover.outgoing(x_BNTD) if place != layout.place]
    buffers = mover.buffers(x_BNTD.shape, x_BNTD.dtype, x_BNTD.device)
    receives = [(place, x) for place, x in buffers if place != layout.place]
    sent, arrived = (
        [Message(layout.ranks[place], x, DATA_TAG) for place, x in side] for side in (sends, receives)
    )

    def bare() -> None:
        exchange(sent, arrived, "bare messages", policy=groups.policy).wait()

    def local() -> None:
        mover.outgoing(x_BNTD)
        mover.assemble([tensor for _, tensor in buffers], x_BNTD.shape)

    peers, size = len(sends), x_BNTD.nbytes
    return Trial("in a stage", lambda: layout.move(x_BNTD, 1), bare, "bare messages", local, peers, size)


def between(layout: WindowLayout, groups: Groups, x_BNTD: Tensor) -> Trial:
    """Send to the next stage shifted, against not shifted."""
    dims = groups.dims
    stage = dims.coordinate(groups.rank).pp
    first = stage % 2 == 0
    other = groups.ranks_of_stage(stage + 1 if first else stage - 1)

    def send(edge: Edge) -> None:
        if first:
            exchange(edge.outgoing(x_BNTD), [], "tokens", policy=groups.policy).wait()
        else:
            arriving = edge.expect(x_BNTD.shape, x_BNTD.dtype, x_BNTD.device)
            arriving.pending = exchange([], arriving.messages, "tokens", policy=groups.policy)
            arriving.take()

    def local() -> None:
        if first:
            mover.outgoing(x_BNTD)
        else:
            mover.assemble(buffers, x_BNTD.shape)

    mover = layout.movers[1]
    buffers = [tensor for _, tensor in mover.buffers(x_BNTD.shape, x_BNTD.dtype, x_BNTD.device)]
    shifted, straight = (Edge(layout, shift, other, after=first) for shift in (1, 0))
    ours, theirs = (partial(send, edge) for edge in (shifted, straight))
    peers = len(shifted.outgoing(x_BNTD)) if first else 0
    return Trial("between stages", ours, theirs, "not shifted", local, peers, x_BNTD.nbytes)


def alone(layout: WindowLayout, x_BNTD: Tensor) -> Trial:
    """Shift on one rank, against torch.roll of the image."""
    grid = layout.shard.grid
    half, image_BYXD = grid.window // 2, x_BNTD.view(1, grid.rows, grid.cols, -1)

    def roll() -> Tensor:
        return torch.roll(image_BYXD, (-half, -half), (1, 2))

    shift = partial(layout.move, x_BNTD, 1)
    return Trial("on one rank", shift, roll, "torch.roll", shift, 0, x_BNTD.nbytes)


def measure(device: torch.device, options: Options) -> list[Row]:
    """Measure all layouts on the ranks that are there; a collective call, rows on rank 0."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    grid = WindowGrid(options.rows, options.cols, options.window)
    rows = []
    for dims in layouts(options, ranks):
        groups = make_groups(dims, rank, device)
        layout = WindowLayout.of(grid, groups)
        shape = 1, *layout.tokens_NT.shape, options.width
        x_BNTD = torch.randn(shape, device=device).to(DTYPES[options.precision])
        if dims.pp > 1:
            trial = between(layout, groups, x_BNTD)
        else:
            trial = inside(layout, groups, x_BNTD) if ranks > 1 else alone(layout, x_BNTD)
        rows.append(_row(trial, groups, options, device))
        console.print(f"  {rows[-1]['layout']}, {trial.how}: {rows[-1]['ms']:.3g} ms")
    return rows


def _row(trial: Trial, groups: Groups, options: Options, device: torch.device) -> Row:
    """Time both calls in turn on all ranks together; a call takes as long as on the slowest rank."""
    with byte_log() as log:
        trial.ours()
    sent = sum(entry.bytes for entry in log)
    turns = []
    for number in range(options.rounds + WARM_UP):
        calls = list(enumerate((trial.ours, trial.other, trial.local)))
        own = [0.0] * len(calls)
        for which, call in calls if number % 2 else reversed(calls):
            barrier(groups.world, "the start of a call")
            own[which] = seconds(call, device)
        turns.append(own)
    mine = torch.tensor([*turns[WARM_UP:], [trial.peers, sent, 0]], dtype=torch.float64)
    everyone = all_gather(mine, groups.world, "times")  # [ranks, rounds + 1, calls]
    slowest = everyone[:, :-1].amax(0)
    peers, busiest, _ = everyone[:, -1].amax(0).tolist()
    own_s, other_s, local_s = slowest.median(0).values.tolist()
    moved = busiest if groups.world.size > 1 else trial.bytes
    return {
        "how": trial.how,
        "layout": name(groups.dims),
        "ranks": groups.world.size,
        "width": options.width,
        "tensor_mb": trial.bytes / 1e6,
        "sent_mb": busiest / 1e6,
        "peers": int(peers),
        "ms": own_s * 1e3,
        "local_ms": local_s * 1e3,
        "against": trial.against,
        "against_ms": other_s * 1e3,
        "gb_per_s": moved / own_s / 1e9,
        "ratio": statistics.median((slowest[:, 1] / slowest[:, 0]).tolist()),
    }


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw what each shift takes beside what it is compared with; needs matplotlib."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["how"] for row in rows))
    counts = [sum(row["how"] == kind for row in rows) for kind in kinds]
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=[count + 1 for count in counts])[
        :, 0
    ]
    for axes, kind in zip(panels, kinds):
        here = [row for row in rows if row["how"] == kind]
        names = [f"{row['layout']} ({row['tensor_mb']:.3g} MB a rank)" for row in here]
        middles = range(len(here))
        for column, label, offset in (("ms", "shift", -0.2), ("against_ms", here[0]["against"], 0.2)):
            bars = axes.barh([y + offset for y in middles], [row[column] for row in here], 0.38, label=label)
            labels = [
                f"{row['ms']:.3g} ms, {row['gb_per_s']:.3g} GB/s"
                if column == "ms"
                else f"{row[column]:.3g} ms"
                for row in here
            ]
            axes.bar_label(bars, labels, fontsize=7, padding=3)
        copies = [row["local_ms"] for row in here]
        axes.barh([y - 0.2 for y in middles], copies, 0.38, fill=False, hatch="///", label="of it, copies")
        axes.set_yticks(middles, names, fontsize=8)
        axes.set_title(f"{kind}, ms", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    rows = rows_of(measure, options.ranks, options.device, options)
    if rows:
        image = f"{options.rows} x {options.cols} tokens, windows of {options.window}, {options.precision}"
        worse = deliver(
            rows,
            options.output,
            key=("how", "layout", "ranks", "width"),
            numbers={"ratio": "more"},
            draw=draw,
            about=f"{image}; {hardware(choose_device(options.device))}",
        )
        sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
