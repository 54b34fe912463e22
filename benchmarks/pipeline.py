"""The idle share of real pipeline steps against (P - 1) / (M + P - 1) and against the simulated schedule.

    python -m benchmarks.pipeline --stages 2 4 8 --plot FILE
    mpiexec -n 24 python -m benchmarks.pipeline --csv FILE

A pass of a stage is a sleep here: it occupies nobody's processor, so what is measured is the schedule and its
messages, on however few cores. Everything else is the run's: `Pipeline.step`, its edges, its process group.

Shapes: B batch, N windows, T tokens per window, D width.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

from aeris.log import console, run_program
from benchmarks.parts import synchronize
from benchmarks.ranks import rows_of
from benchmarks.records import Output, Row, deliver, hardware
from swipe.collectives import all_gather, barrier
from swipe.groups import choose_policy, make_groups
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.pipeline import Microbatch, Pipeline
from swipe.schedule import SCHEDULES, simulate
from swipe.windows import WindowGrid

Schedule = Literal["1f1b", "gpipe"]
Policy = Literal["auto", "async", "batched", "parity"]
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
MARKERS = {"1f1b": "o", "gpipe": "s"}


@dataclass(frozen=True)
class Options:
    """Measure the idle share of a pipeline whose stages sleep instead of computing."""

    stages: tuple[int, ...] = (2, 4, 8)
    """Ranks to start here, a stage each; under mpiexec or torchrun those that are there are the stages."""
    microbatches: tuple[int, ...] = (1, 2, 4)
    """Microbatches of a step, in multiples of the stages."""
    schedules: tuple[Schedule, ...] = ("1f1b", "gpipe")
    """Orders of the passes."""
    policies: tuple[Policy, ...] = ("auto",)
    """How messages are posted; auto is async between CPUs and batched between devices."""
    forward_ms: float = 10.0
    """Length of a forward pass."""
    backward_ms: float = 20.0
    """Length of a backward pass."""
    tokens: int = 64
    """Tokens that a microbatch sends between two stages."""
    width: int = 256
    """Features of a token, in fp32."""
    rounds: int = 3
    """Timed steps, after one that is not counted; the fastest counts."""
    device: str = "cpu"
    """Where the messages are: cpu, or auto, cuda, xpu with a device for every stage."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)


class Sleeper(nn.Module):
    """A stage that sleeps for the length of each pass.

    Attributes:
        busy_s: how long it has slept: no sleep is exact.
    """

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.forward_s, self.backward_s, self.busy_s = forward_s, backward_s, 0.0

    def sleep(self, length_s: float) -> None:
        """Sleep, once the input is there: on a device only the stream has waited for it."""
        device = self.scale.device
        if device.type != "cpu":
            torch.get_device_module(device).current_stream(device).synchronize()
        start = time.perf_counter()
        time.sleep(length_s)
        self.busy_s += time.perf_counter() - start

    def forward(self, x: Tensor) -> Tensor:
        """Do nothing for a while: [B, N, T, D] -> the same."""
        return _Sleep.apply(x * self.scale, self)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Sleeper) -> Tensor:
        ctx.stage = stage
        stage.sleep(stage.forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.stage.sleep(ctx.stage.backward_s)
        return grads[0], None


def measure(device: torch.device, options: Options) -> list[Row]:
    """Measure all cases on the ranks that are there, a stage each; a collective call, rows on rank 0."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    groups = make_groups(ParallelDims(pp=ranks), dist.get_rank() if ranks > 1 else 0, device)
    layout = WindowLayout.of(WindowGrid(2, 2, 2), groups)
    x = torch.ones(options.tokens // 4 or 1, 1, 4, options.width, device=device)
    stage = Sleeper(options.forward_ms / 1e3, options.backward_ms / 1e3).to(device)
    rows = []
    for policy, schedule, times in product(options.policies, options.schedules, options.microbatches):
        posted = choose_policy(policy, device)
        pipeline = Pipeline.linked(
            stage, lambda y, _: y.mean(), layout, replace(groups, policy=posted), schedule=schedule
        )
        found = []
        for _ in range(options.rounds + 1):
            stage.busy_s = 0.0
            microbatches = (Microbatch(x if groups.rank == 0 else None) for _ in range(ranks * times))
            barrier(groups.world, "the start of a step")
            start = time.perf_counter()
            pipeline.step(microbatches, ranks * times)
            synchronize(device)
            own = [time.perf_counter() - start, stage.busy_s, pipeline.peak_in_flight]
            found.append(all_gather(torch.tensor(own, dtype=torch.float64), groups.world, "times"))
        rows.append(_row(options, schedule, posted, ranks, times, found[1:]))
        console.print(f"  {schedule}, {ranks * times} microbatches: idle {rows[-1]['idle']:.3f}")
    return rows


def _row(
    options: Options, schedule: str, policy: str, stages: int, times: int, found: Sequence[Tensor]
) -> Row:
    """Make a row from the rounds' [stages, 3]: seconds of the step, seconds asleep, most in flight."""
    microbatches = stages * times
    # The fastest: others' work on the machine only adds.
    step_s, asleep_s = min((float(ranks[:, 0].max()), float(ranks[:, 1].sum())) for ranks in found)
    idle = 1 - asleep_s / (stages * step_s)
    table = SCHEDULES[schedule](stages, microbatches)
    planned = simulate(table, policy, options.forward_ms, options.backward_ms)
    in_flight = [int(most) for most in found[0][:, 2]]
    return {
        "schedule": schedule,
        "policy": policy,
        "stages": stages,
        "microbatches": microbatches,
        "step_ms": step_s * 1e3,
        "idle": idle,
        "simulated": planned.bubble,
        "formula": (stages - 1) / (microbatches + stages - 1),
        "busy": 1 - idle,
        "in_flight": " ".join(map(str, in_flight)),
        "as_planned": in_flight == planned.in_flight,
    }


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw idle shares against microbatches, and what is in flight on every stage; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    idle, flying = figure.subplots(1, 2)
    many = max(row["stages"] for row in rows)
    for color, stages in zip(cycle(COLORS), sorted({row["stages"] for row in rows})):
        here = [row for row in rows if row["stages"] == stages]
        counts = sorted({row["microbatches"] for row in here})
        formula = [(stages - 1) / (count + stages - 1) for count in counts]
        idle.plot(counts, formula, color=color, label=f"P = {stages}: (P - 1) / (M + P - 1)")
        for kind, marker in MARKERS.items():
            found = [row for row in here if row["schedule"] == kind]
            points = [row["microbatches"] for row in found], [row["idle"] for row in found]
            idle.plot(*points, marker, color=color, markersize=8, fillstyle="none")
    for kind, marker in MARKERS.items():
        idle.plot([], [], marker, color="tab:gray", fillstyle="none", label=f"measured, {kind}")
        found = [row for row in rows if row["stages"] == many and row["schedule"] == kind]
        for row in found[-1:]:
            counts = [int(word) for word in row["in_flight"].split()]
            about = f"measured, {kind}, M = {row['microbatches']}"
            flying.plot(range(many), counts, marker, color="tab:gray", markersize=8, label=about)
    flying.plot(range(many), range(many, 0, -1), color=COLORS[0], label="P - stage")
    ticks = sorted({row["microbatches"] for row in rows})
    idle.set(
        xscale="log", xlabel="microbatches M of a step", ylabel="idle share of all stages", ylim=(0, None)
    )
    idle.set_xticks(ticks, map(str, ticks))
    idle.minorticks_off()
    flying.set(xlabel=f"stage, of P = {many}", ylabel="microbatches in flight", ylim=(0, None))
    for axes in (idle, flying):
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    rows = rows_of(measure, options.stages, options.device, options)
    if rows:
        worse = deliver(
            rows,
            options.output,
            key=("schedule", "policy", "stages", "microbatches"),
            numbers={"busy": "more"},
            draw=draw,
            about=f"passes of {options.forward_ms:g} and {options.backward_ms:g} ms asleep; {hardware()}",
        )
        sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
