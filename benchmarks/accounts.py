"""What a rank keeps in memory and sends in a training step: counted, by formula, and side by side.

Activations are counted where autograd saves and drops them, bytes where swipe logs them or, for weights and
gradients, where torch's FSDP2 calls its collectives. Formulas of bytes are the planner's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from aeris.config import RunConfig
from aeris.costs import FusedLayout, activation_bytes
from aeris.model.swin import Swin
from aeris.parallelize import Seat, build_model, make_layout
from aeris.planning.traffic import KINDS, microbatches, traffic
from aeris.restore import channel_counts
from aeris.step import Training
from swipe.collectives import Sent
from swipe.mesh import ParallelDims
from swipe.schedule import SCHEDULES, Timeline, simulate
from swipe.sharding import local

Row = dict[str, Any]
"""A layout: its name, settings, and what was measured, each of `NUMBERS` beside "<name>_formula"."""
NUMBERS = ("activations", *KINDS)
"""What is counted on every rank and has a formula, in bytes."""
FORMULAS = """\
M: bytes of a microbatch's tokens [T, D]. Sent: in one step, by the rank that sends most.
activations  most bytes autograd holds at once, on the rank with most: distinct storages, without weights and
             without what lives inside one operation. Formula: one microbatch of the stage on one rank
             (aeris/costs.py; with fused attention, without the loss) / (WP SP) x microbatches in flight
all-to-all   4 (SP-1)/SP M/(SP WP) forward (q, k, v, out) + the same backward, per block and microbatch
shift        M/(SP WP) each way per microbatch and shifted edge inside a stage; with odd SP a part stays where
             it is: 1/(min(2, WP_Y) min(2, WP_X))
pipeline     M/(SP WP) each way per microbatch and edge between stages, shifted or not
samples      from the rank that reads to the others of its sp axis, on the first and the last stage
weights      FSDP gathers them: (S-1)/S W, W bytes of a stage on S = DP WP SP ranks, those of products in
             their type
gradients    FSDP reduces them in fp32, as weights
Smallest batch: DP images. In flight: most microbatches between forward and backward, on the first stage.
Idle: share of a step a pipeline waits, by its schedule."""


class Kept:
    """Counts what autograd holds for backward passes: bytes of distinct storages, weights left out.

    Attributes:
        peak: most bytes at once.
        hooks: the context to count in.
    """

    def __init__(self, model: Swin) -> None:
        self._model, self._holders, self._now, self.peak = model, Counter[int](), 0, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        weights = (*map(local, self._model.parameters()), *self._model.casts())
        known = {weight.untyped_storage().data_ptr() for weight in weights}
        size = 0 if storage.data_ptr() in known else storage.nbytes()
        held = _Held(self, tensor.detach(), storage.data_ptr(), size)  # not detached, it would hold itself
        self.change(held, 1)
        return held

    def change(self, held: _Held, by: int) -> None:
        """Count one holder more or less of a storage."""
        self._holders[held.address] += by
        if self._holders[held.address] == (by > 0):  # the first one came or the last one went
            self._now += by * held.size
            self.peak = max(self.peak, self._now)


@dataclass(eq=False)
class _Held:
    """A saved tensor, until autograd drops it after its backward pass; `address` stays its own till then."""

    kept: Kept
    tensor: Tensor
    address: int
    size: int

    def __del__(self) -> None:
        self.kept.change(self, -1)


class Weights(TorchDispatchMode):
    """Adds up what this rank sends when FSDP gathers weights and reduces gradients, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = {"weights": 0, "gradients": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation of torch, and do it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes operations on plain tensors, which come here again
        for call, kind in (("allgather_base", "weights"), ("reduce_scatter_base", "gradients")):
            if func.namespace == "c10d" and call in str(func):
                output, given = args[:2]
                self.sent[kind] += abs(output.nbytes - given.nbytes)
        return func(*args, **(kwargs or {}))


def by_kind(log: list[Sent], kind: str) -> int:
    """Add up what was sent for one of `KINDS`."""
    return sum(entry.bytes for entry in log if kind in f"{entry.operation} {entry.group}")


def expected(run: Training) -> list[int]:
    """Return what formulas say of `NUMBERS` for this rank and one step."""
    seat, channels = run.seat, len(run.store.names)
    sent = traffic(run.config, channels, seat.dims, seat.groups.rank, seat.dims.world).total
    return [kept_by_formula(run.config, channels, seat), *(sent[kind] for kind in KINDS)]


def kept_by_formula(config: RunConfig, channels: int, seat: Seat) -> int:
    """Say what autograd keeps on a rank at most; see `FORMULAS`."""
    counts = channel_counts(channels)
    layout = FusedLayout(make_layout(config.model))
    stage = build_model(config.model, *counts, layout, "meta", seat.units)
    width = counts[0] if seat.first else config.model.width
    one = activation_bytes(stage, width, config.train.microbatch)
    return one * timeline(config, seat.dims).in_flight[seat.at.pp] // seat.dims.places


def timeline(config: RunConfig, dims: ParallelDims) -> Timeline:
    """Return the pipeline of a step on a clock."""
    return simulate(SCHEDULES[config.parallel.schedule](dims.pp, microbatches(config, dims)))


def tables(rows: list[Row]) -> list[Table]:
    """Lay the rows out for the screen; MB are 10^6 bytes."""
    heads = ("smallest\nbatch", "in\nflight", "measured", "formula", "ratio", "idle", "samples/s")
    memory = _table("activations held, MB, and speed", *heads)
    sent = _table("sent in a step, MB: measured = formula", *KINDS, "all\nranks")
    for row in rows:
        kept, formula = row["activations"], row["activations_formula"]
        memory.add_row(
            row["layout"],
            str(row["smallest_batch"]),
            str(row["in_flight"]),
            f"{kept / 1e6:.3f}",
            f"{formula / 1e6:.3f}",
            f"{kept / formula:.3f}",
            f"{row['idle']:.0%}",
            f"{row['samples_per_s']:.2f}",
        )
        cells = [_compared(row[kind], row[f"{kind}_formula"]) for kind in KINDS]
        sent.add_row(row["layout"], *cells, "=" if row["equal_on_all_ranks"] else "[red]≠[/]")
    return [memory, sent]


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), show_edge=False)
    table.add_column("layout")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _compared(measured: int, formula: int) -> str:
    """Write two numbers of bytes in two lines, with `=` between them only if they are equal to the byte."""
    if measured == formula == 0:
        return "-"
    return f"{measured / 1e6:.3f}\n{'=' if measured == formula else '[red]≠[/]'} {formula / 1e6:.3f}"


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Draw memory, bytes and speed of every layout side by side; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.8 + 0.4 * len(rows)), layout="constrained")
    memory, sent, speed = panels = figure.subplots(1, 3, sharey=True)
    places, names = range(len(rows)), [row["layout"] for row in rows]
    memory.barh(places, [row["activations"] / 1e6 for row in rows], color="tab:gray", label="measured")
    formula = [row["activations_formula"] / 1e6 for row in rows]
    memory.plot(formula, places, "k|", markersize=14, markeredgewidth=2, label="formula")
    left = [0.0] * len(rows)
    for kind in KINDS:
        values = [row[kind] / 1e6 for row in rows]
        sent.barh(places, values, left=left, label=kind)
        left = [before + value for before, value in zip(left, values)]
    formula = [sum(row[f"{kind}_formula"] for kind in KINDS) / 1e6 for row in rows]
    sent.plot(formula, places, "k|", markersize=14, markeredgewidth=2, label="formula")
    middle = [row["samples_per_s"] for row in rows]
    spread = [[abs(row[end] - row["samples_per_s"]) for row in rows] for end in ("slowest", "fastest")]
    speed.barh(places, middle, xerr=spread, color="tab:gray", ecolor="black", capsize=2)
    titles = (
        "activations held by a rank, MB",
        "sent by a rank in a step, MB",
        "samples/s, slowest to fastest",
    )
    for axes, text in zip(panels, titles):
        axes.set_xlabel(text)
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_yticks(places, names)
    memory.invert_yaxis()
    for axes in (memory, sent):
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
