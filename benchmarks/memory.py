r"""Memory of a training step by part, planned (aeris/planning/memory.py) against measured, layout by layout.

    python -m benchmarks.memory --csv FILE --plot FILE
    python -m benchmarks.memory --stack 1.3b-6h --blocks 4 --device cuda

The first starts the ranks of every layout on this machine and takes real training steps; measured is the most
that the tensors of the fullest rank took at once, from before the run was built. The second trains a stack of
blocks on one device and asks its allocator.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aeris.config import RunConfig
from aeris.data.forcing import FORCINGS
from aeris.data.loader import Sample
from aeris.log import console, run_program
from aeris.parallelize import Seat, take_seat
from aeris.planning.memory import PARTS, host_memory, memory
from aeris.presets import PRESETS
from aeris.restore import channel_counts
from aeris.step import Training, train_step
from benchmarks.parallelism import read_layout
from benchmarks.records import Output, Row, deliver, hardware
from launch.rank import discover, export, leave
from swipe.backend import choose_device, finish, start
from swipe.collectives import Group, all_gather
from swipe.mesh import ParallelDims

CHANNELS = 24
STATE = ("weights", "gradients", "optimizer", "ema")
"""Parts that are there all the time, shown as one."""
DRAWN = ("state", "host", *(part for part in PARTS if part not in STATE))
LAYOUTS = (
    "dp 8",
    "wp 2x4",
    "sp 8",
    "dp 2 x pp 4",
    "dp 2 x pp 4, gpipe",
    "wp 2x2 x sp 2",
    "wp 1x2 x pp 4",
    "pp 4 x sp 2",
    "dp 2 x wp 2x1 x pp 2",
    "dp 2 x wp 2x2, recomputed",
    "wp 2x2 x pp 2, offloaded",
    "dp 2 x sp 4, separate poles",
)
"""A layout, and what else is different."""
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gpipe": {"parallel": {"schedule": "gpipe"}},
    "recomputed": {"model": {"checkpointing": "block"}},
    "offloaded": {"optimizer": {"offload": "cpu-torch"}},
    # Half a window is as large as fused attention likes, too.
    "separate poles": {"model": {"poles": "separate", "rows": 48, "cols": 96, "window": 24}},
}


def small() -> RunConfig:
    """Choose a network of tensors large beside all else, and windows large enough for fused attention."""
    base = PRESETS["40b"]()
    model = replace(
        base.model, rows=40, cols=80, window=20, layers=4, blocks=1, width=128, heads=8, hidden=512
    )
    parallel = replace(base.parallel, p2p="async")
    return replace(base, model=model, parallel=parallel, train=replace(base.train, microbatch=1))


def varied(layout: str) -> tuple[ParallelDims, RunConfig]:
    """Read a layout and what else is different: "dp 2 x wp 2x2, recomputed"."""
    degrees, _, variant = layout.partition(", ")
    config = small()
    for section, changes in VARIANTS.get(variant, {}).items():
        config = replace(config, **{section: replace(getattr(config, section), **changes)})
    dims = read_layout(degrees)
    return dims, replace(config, train=replace(config.train, batch=dims.dp * max(2, dims.pp + 1)))


@dataclass(frozen=True)
class Options:
    """Train small networks in several layouts; compare the memory of a step with the plan."""

    layouts: tuple[str, ...] = LAYOUTS
    """Such as "dp 8" or "dp 2 x pp 4, gpipe"; their ranks are started on this machine."""
    steps: int = 2
    """Steps of each: from the second on weights are gathered at the start of a step."""
    stack: str = ""
    """Instead train a stack of blocks of this preset on one device."""
    blocks: int = 4
    """How many, with --stack."""
    device: str = "auto"
    """auto, cpu, cuda or xpu, with --stack; ranks that are started here are CPU ranks."""
    measured: Path | None = None
    """Given by this program to the ranks it starts: where they write what they found."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)
    """Where the rows go."""


class Tensors(TorchDispatchMode):
    """Follows the memory of all CPU tensors that operations make, on whichever thread it is freed.

    What lives inside one operation is not seen.

    Attributes:
        peak: most bytes at once.
    """

    def __init__(self, but: Iterable[Tensor]) -> None:
        """Leave out the memory of the tensors in `but`."""
        super().__init__()
        self.peak = 0
        self._but = {tensor.untyped_storage()._cdata for tensor in but}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation of torch, and do it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes operations on plain tensors, which come here again
        out, new = func(*args, **(kwargs or {})), False
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage, address = tensor.untyped_storage(), tensor.untyped_storage()._cdata
                # Those of meta tensors, and of the fake ones that DTensor plans with, take nothing.
                if storage.device.type == "cpu" and address not in self._but and address not in self._alive:
                    self._alive[address] = weakref.ref(storage, partial(self._gone, address))
                    new = True
        if new:  # add all up: a storage can change its size, as those of gathered weights do
            storages = [found() for found in list(self._alive.values())]
            self.peak = max(self.peak, sum(storage.nbytes() for storage in storages if storage is not None))
        return out

    def _gone(self, address: int, _: Any) -> None:
        self._alive.pop(address, None)


@contextmanager
def followed(found: list[int], device: torch.device, but: Iterable[Tensor]) -> Iterator[None]:
    """Put the most bytes that tensors had at once while this was open in `found`, those in `but` left out."""
    if device.type == "cpu":
        with Tensors(but) as tensors:
            yield
        found.append(tensors.peak)
        return
    kind = getattr(torch, device.type)
    kind.reset_peak_memory_stats()
    before = kind.memory_allocated()
    yield
    found.append(kind.max_memory_allocated() - before)


def samples(config: RunConfig, seat: Seat) -> list[Sample]:
    """Make the samples of one step: random numbers."""
    shape = (config.train.microbatch, *seat.layout.tokens_NT.shape)
    state, residual, forcing = (torch.randn(*shape, c) for c in (CHANNELS, CHANNELS, len(FORCINGS)))
    one = Sample(state, residual, forcing, torch.zeros(config.train.microbatch, dtype=torch.int64))
    return [one] * (config.train.batch // (config.train.microbatch * seat.dims.dp))


def measure(config: RunConfig, dims: ParallelDims, rank: int, device: torch.device, steps: int) -> int:
    """Build a run on made-up data and take some steps; return the most bytes allocated on this rank."""
    seat = take_seat(config, channel_counts(CHANNELS), dims, rank, device)
    latitude = torch.linspace(90, -90, config.model.rows).double().numpy()
    names = config.data.channels[:CHANNELS]
    store: Any = SimpleNamespace(names=names, latitude_deg=latitude, cols=config.model.cols, masks=False)
    given, found = samples(config, seat), list[int]()
    gc.collect()
    # Samples are not counted: those of a loader are on the host.
    with followed(found, device, given[0][:3]):
        run = Training(config, Path("nothing is written"), store, seat)
        for _ in range(steps):
            train_step(run, iter(given))
    return found[0]


def row(layout: str, config: RunConfig, dims: ParallelDims, measured: list[int]) -> Row:
    """Set the plan of the fullest rank beside what was measured on it, in MB of 10^6 bytes.

    On CPU the host is the device: what is offloaded is measured as well.
    """
    plans = [memory(config, CHANNELS, dims, stage) for stage in range(dims.pp)]
    hosts = [host_memory(config, CHANNELS, dims, stage) for stage in range(dims.pp)]
    stages = [dims.coordinate(rank).pp for rank in range(dims.world)]
    planned = [sum(plans[stage].values()) + hosts[stage] for stage in stages]
    rank = max(range(dims.world), key=measured.__getitem__)
    parts = plans[stages[rank]]
    shown = {"state": sum(parts[part] for part in STATE), **{p: parts[p] for p in PARTS if p not in STATE}}
    shown |= {"host": hosts[stages[rank]], "planned": planned[rank], "measured": measured[rank]}
    return {
        "layout": layout,
        "stage": stages[rank],
        **{f"{name}_MB": round(size / 1e6, 2) for name, size in shown.items()},
        "ratio": round(planned[rank] / measured[rank], 3),
        "off": round(max(abs(plan / most - 1) for plan, most in zip(planned, measured)), 3),
    }


def stack(options: Options) -> list[Row]:
    """Train a stack of blocks on one device, on as many tokens as a rank of a published layout has.

    Raises:
        ValueError: there is no such preset.
    """
    if options.stack not in PRESETS:
        raise ValueError(f"--stack {options.stack!r} is no preset: choose from {', '.join(PRESETS)}")
    base, device = PRESETS[options.stack](), choose_device(options.device)
    side = base.model.window
    model = replace(base.model, rows=2 * side, cols=4 * side, layers=options.blocks, blocks=1)
    config = replace(base, model=model, train=replace(base.train, batch=2, microbatch=1))
    dims = ParallelDims()
    most = measure(config, dims, 0, device, options.steps)
    return [row(f"{options.blocks} blocks of {options.stack}", config, dims, [most])]


def start_ranks(layouts: Sequence[str], options: Options) -> list[Row]:
    """Run this program on as many ranks as these layouts have, on this machine; return their rows.

    Raises:
        ValueError: it failed.
    """
    ranks = varied(layouts[0])[0].world
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory(prefix="memory-") as directory:
        words = ["--steps", str(options.steps), "--measured", f"{directory}/measured", "--layouts", *layouts]
        command = [*torchrun, "--nproc-per-node", str(ranks), "-m", "benchmarks.memory", *words]
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{ranks} ranks failed: {done.stderr[-2000:]}")
        measured = json.loads(Path(directory, "measured").read_text())
    return [row(layout, varied(layout)[1], varied(layout)[0], measured[layout]) for layout in layouts]


def be_rank(options: Options, measured: Path) -> None:
    """Measure every layout as one of its ranks, and write what all of them found."""
    found, device, peaks = discover(os.environ), torch.device("cpu"), dict[str, list[int]]()
    export(found)
    start(device, small().parallel.timeout_s)
    world = Group("all ranks", tuple(range(found.world)), found.rank, torch.distributed.group.WORLD)
    for layout in options.layouts:
        dims, config = varied(layout)
        most = measure(config, dims, found.rank, device, options.steps)
        peaks[layout] = all_gather(torch.tensor([most]), world, "peaks").flatten().tolist()
    if found.rank == 0:
        measured.write_text(json.dumps(peaks))
    finish()
    leave()


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the parts stacked, and what was measured beside them; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes, places = figure.subplots(), range(len(rows))
    left = [0.0] * len(rows)
    for number, part in enumerate(DRAWN):
        values = [row[f"{part}_MB"] for row in rows]
        axes.barh(places, values, 0.55, left, label=part, color=f"C{number}")
        left = [a + b for a, b in zip(left, values)]
    measured = [row["measured_MB"] for row in rows]
    axes.plot(measured, places, "k|", markersize=20, markeredgewidth=2.5, label="measured")
    for place, row_ in zip(places, rows):
        end = max(row_["planned_MB"], row_["measured_MB"])
        axes.text(end, place, f"  {row_['ratio']:.3f}", va="center", fontsize=8)
    axes.set_yticks(places, [row["layout"] for row in rows])
    axes.invert_yaxis()
    axes.set(
        xlabel="MB on the fullest rank at the fullest moment of a step; planned / measured", xlim=(0, None)
    )
    axes.margins(x=0.1)
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark, or be one of its ranks."""
    options = tyro.cli(Options, description=Options.__doc__)
    if options.measured:
        be_rank(options, options.measured)
        return
    if options.stack:
        rows, about = stack(options), hardware(choose_device(options.device))
    else:
        alike = defaultdict[int, list[str]](list)
        for layout in options.layouts:
            alike[varied(layout)[0].world].append(layout)
        rows, about = [], hardware()
        for ranks, layouts in alike.items():
            console.print(f"{len(layouts)} layouts on {ranks} ranks")
            rows += start_ranks(layouts, options)
    worse = deliver(
        rows, options.output, key=("layout",), numbers={"measured_MB": "less"}, draw=draw, about=about
    )
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
