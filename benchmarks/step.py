"""How much of a plain matrix product's speed a block reaches, and where the rest of its time goes.

    python -m benchmarks.step --presets tiny 1.3b-6h
    python -m benchmarks.step --device cuda --csv FILE --plot FILE

A block's forward and backward pass is timed in turn with one square matrix product of the same FLOPs and
type, pair by pair in one run, so that a machine whose speed drifts does not change the ratio. The block's own
products are timed alone as well. Tokens are those of one rank: what it would send is not sent.

Shapes: B batch, N windows, T tokens per window, D width, H heads, K head dim, n rows of a product.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from aeris.config import ModelConfig, RunConfig
from aeris.flops import flops_per_sample
from aeris.log import console, run_program
from aeris.model.initialise import initialise
from aeris.model.swin import DTYPES
from aeris.parallelize import build_model, take_seat
from aeris.presets import PRESETS
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts, open_store
from aeris.step import Training, train_step
from benchmarks.parts import PARTS, seconds, split
from benchmarks.records import Output, Row, deliver, hardware
from launch.layouts import LAYOUTS
from swipe.backend import choose_device, keep_freed_memory
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.windows import WindowGrid, WindowShard

Precision = Literal["bf16", "fp32"]
Mode = Literal["eager", "compiled"]
IN_BLOCK = ("attention_projections", "attention_windows", "mlp")
CPU_TOKENS = 1_200
WARM_UP = 2


@dataclass(frozen=True)
class Options:
    """Time blocks, and whole training steps, against matrix products of the same FLOPs.

    What is left empty is chosen by the device: on the CPU few and small ones, else the full table.
    """

    presets: tuple[str, ...] = ()
    """Blocks; without: tiny and 1.3b-6h on the CPU, else 1.3b-6h, 13b and 40b."""
    windows: tuple[int, ...] = ()
    """Sides of windows; without: the preset's on the CPU, else 30 and 60."""
    precision: tuple[Precision, ...] = ()
    """Types of the products; without: bf16."""
    modes: tuple[Mode, ...] = ()
    """As written, or compiled with torch.compile; without: eager on the CPU, else both."""
    steps: tuple[str, ...] = ("tiny",)
    """Presets of which a whole step on one rank is timed, with the optimizer; the sample store is enough."""
    tokens: int = 0
    """Tokens of a block, in whole windows; 0: those of a rank of the published layout, on the CPU 1,200."""
    microbatches: int = 0
    """Passes of a block between two steps, which share bf16 copies of weights; 0: 2 on the CPU, else 8."""
    rounds: int = 5
    """Timed pairs, after two that are not counted."""
    device: str = "auto"
    """auto, cpu, cuda or xpu."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)


class Case(NamedTuple):
    """What is timed, and how it is computed."""

    what: str
    preset: str
    window: int
    precision: Precision
    mode: Mode

    def config(self) -> RunConfig:
        """Return the preset with these settings."""
        run = PRESETS[self.preset]()
        model = dataclasses.replace(
            run.model,
            window=self.window,
            precision=self.precision,
            residual=run.model.residual if self.precision == "bf16" else self.precision,
            compile=self.mode == "compiled",
            checkpointing="none",
        )
        return dataclasses.replace(run, model=model)


class Timing(NamedTuple):
    """A call to time: `passes` passes of `flops` FLOPs each, over `tokens` tokens."""

    call: Callable[[], object]
    passes: int
    flops: float
    tokens: int


def cases(options: Options, device: torch.device) -> list[Case]:
    """List what is to be timed.

    Raises:
        ValueError: a preset that does not exist.
    """
    cpu = device.type == "cpu"
    presets = options.presets or (("tiny", "1.3b-6h") if cpu else ("1.3b-6h", "13b", "40b"))
    unknown = sorted({*presets, *options.steps} - {*PRESETS})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no preset: choose from {', '.join(PRESETS)}")
    precisions: Sequence[Precision] = options.precision or ("bf16",)
    modes: Sequence[Mode] = options.modes or (("eager",) if cpu else ("eager", "compiled"))
    found = []
    for preset in presets:
        own = PRESETS[preset]().model.window
        sides = options.windows or ((own,) if cpu or preset == "tiny" else (30, 60))
        found += [Case("block", preset, *rest) for rest in product(sides, precisions, modes)]
    for preset in options.steps:
        own = PRESETS[preset]().model.window
        found += [
            Case("training step", preset, own, precision, mode)
            for precision in precisions[:1]
            for mode in modes
        ]
    return found


class OneRank(WindowLayout):
    """The layout of rank 0 of some, which attends without the others: its own tokens stand for theirs.

    Heads and tokens have the sizes that they have on a real rank after the all-to-all.
    """

    def attend(self, q_BNHTK: Tensor, k_BNHTK: Tensor, v_BNHTK: Tensor, shifted: bool) -> Tensor:
        """Attend with H / sp heads of whole windows: [B, N, H, t, K] -> the same."""
        batch, windows, heads, tokens, size = q_BNHTK.shape
        sp = self.shard.sp
        whole = batch, windows, heads // sp, sp * tokens, size
        q, k, v = (x.reshape(whole) for x in (q_BNHTK, k_BNHTK, v_BNHTK))
        return super().attend(q, k, v, shifted).reshape(q_BNHTK.shape)


def block_layout(case: Case, tokens: int) -> OneRank:
    """Lay out about `tokens` tokens in whole windows; 0: those of a rank of the published layout."""
    model, side = case.config().model, case.window
    if tokens:
        grid = WindowGrid(side, max(1, round(tokens / side**2)) * side, side)
        return OneRank(WindowShard.full(grid))
    degrees = LAYOUTS["alcf-aurora"][case.preset].degrees
    wp, sp = (max(1, degrees.wp_y), max(1, degrees.wp_x)), max(1, degrees.sp)
    shard = WindowShard.at_place(WindowGrid(model.rows, model.cols, side, model.poles), wp, sp, 0)
    return OneRank(shard, wp, range(math.prod(wp) * sp))


def time_block(case: Case, options: Options, device: torch.device) -> Timing:
    """Make the passes of one block. Gradients add up, as over the microbatches of a step."""
    cpu = device.type == "cpu"
    layout = block_layout(case, options.tokens or (CPU_TOKENS if cpu else 0))
    config = dataclasses.replace(case.config().model, layers=1, blocks=1)
    model = build_model(config, 8, 8, layout, device, range(1, 2))
    initialise(model, 0)
    model.keep_casts()
    windows, held = layout.tokens_NT.shape
    x = torch.randn(1, windows, held, config.width, device=device).to(DTYPES[config.residual])
    x.requires_grad_()
    grad, t_B = torch.randn_like(x), torch.tensor([0.7], device=device)
    passes = options.microbatches or (2 if cpu else 8)

    def call() -> None:
        for _ in range(passes):
            x.grad = None
            model(x, t_B).backward(grad)
        model.drop_casts()

    return Timing(call, passes, block_flops(config, windows * held), windows * held)


def block_flops(config: ModelConfig, tokens: int) -> float:
    """Count the FLOPs of both passes of a block over `tokens` tokens, as `aeris.flops` counts them."""
    one = dataclasses.replace(config, rows=config.window, cols=config.window, layers=1, blocks=1)
    parts = flops_per_sample(one, 8, 8)
    return sum(parts[name] for name in IN_BLOCK) * tokens / config.window**2


def time_step(case: Case, device: torch.device) -> Timing:
    """Make an optimizer step of the whole network on one rank, on samples that have been read."""
    config = case.config()
    store, train = open_store(config), config.train
    counts = channel_counts(len(store.names))
    run = Training(config, Path("unwritten"), store, take_seat(config, counts, ParallelDims(), 0, device))
    images = ImageOrder(0, train.batch, train.microbatch, 1, 0)
    samples = cycle(list(read_samples(config, store, run.seat, images)))
    flops = float(sum(flops_per_sample(config.model, *counts).values()) * train.batch)
    tokens = config.model.rows * config.model.cols * train.microbatch
    return Timing(partial(train_step, run, samples), 1, flops, tokens)


def products(config: ModelConfig, n: int) -> Iterator[tuple[int, int, int]]:
    """List the products [n, k] x [k, m] of a block over n tokens, forward and backward."""
    d, hidden = config.width, config.hidden
    for k, m in ((d, 3 * d), (d, d), (d, 2 * hidden), (hidden, d)):
        yield from ((n, k, m), (n, m, k), (k, n, m))


def rate(shape: tuple[int, int, int], precision: Precision, device: torch.device, rounds: int) -> float:
    """Measure the FLOP/s of one product, the median of `rounds`."""
    n, k, m = shape
    a = torch.randn(n, k, device=device).to(DTYPES[precision])
    b = torch.randn(k, m, device=device).to(DTYPES[precision])
    times = [seconds(lambda: a @ b, device) for _ in range(rounds + 1)][1:]
    return 2.0 * n * k * m / statistics.median(times)


def against_square(
    timing: Timing, precision: Precision, rounds: int, device: torch.device
) -> list[tuple[float, float]]:
    """Time a pass and a square product of the same FLOPs in turn: pairs in s."""
    side = round((timing.flops / 2) ** (1 / 3))
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))

    def square() -> Tensor:
        return a @ b

    pairs = []
    for _ in range(rounds + WARM_UP):
        pairs.append((seconds(timing.call, device) / timing.passes, seconds(square, device)))
    return pairs[WARM_UP:]


def measure(case: Case, options: Options, device: torch.device) -> Row:
    """Time one case; return its row."""
    timing = time_block(case, options, device) if case.what == "block" else time_step(case, device)
    pairs = against_square(timing, case.precision, options.rounds, device)
    own_s, square_s = (statistics.median(column) for column in zip(*pairs))
    parts = split(timing.call, device, own_s * timing.passes * 1e3)
    shapes = set(products(case.config().model, timing.tokens))
    best = max(timing.flops / square_s, *(rate(shape, case.precision, device, 3) for shape in shapes))
    row: Row = {**case._asdict(), "tokens": timing.tokens, "gflop": timing.flops / 1e9, "ms": own_s * 1e3}
    row |= {f"{name}_ms": parts[name] / timing.passes for name in PARTS}
    return row | {
        "tflops": timing.flops / own_s / 1e12,
        "square_tflops": timing.flops / square_s / 1e12,
        "best_tflops": best / 1e12,
        "fraction_of_gemm": statistics.median(square / own for own, square in pairs),
        "fraction_of_best": timing.flops / own_s / best,
    }


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the parts of the time, and the shares of two GEMM rates; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.4 * len(rows)), layout="constrained")
    shares, fractions = figure.subplots(1, 2, sharey=True)
    names = [f"{r['preset']} {r['what']}, window {r['window']}, {r['precision']}, {r['mode']}" for r in rows]
    left = [0.0] * len(rows)
    for part, color in zip(PARTS, ("tab:blue", "tab:green", "tab:orange", "lightgray")):
        widths = [row[f"{part}_ms"] / row["ms"] for row in rows]
        bars = shares.barh(names, widths, left=left, color=color, label=part)
        labels = [f"{row[f'{part}_ms']:,.4g}" if width > 0.06 else "" for row, width in zip(rows, widths)]
        shares.bar_label(bars, labels, label_type="center", fontsize=7)
        left = [a + b for a, b in zip(left, widths)]
    shares.set(xlabel="share of the time (numbers: ms of one pass)", xlim=(0, 1.02))
    shares.invert_yaxis()
    about = {
        "fraction_of_gemm": "of a square product of the same FLOPs",
        "fraction_of_best": "of the best product",
    }
    for (column, label), marker in zip(about.items(), "os"):
        fractions.plot(
            [row[column] for row in rows], names, marker, color="tab:blue", fillstyle="none", label=label
        )
    fractions.set(
        xlabel="speed, as a share", xlim=(0, max(1.05, *(1.1 * row["fraction_of_gemm"] for row in rows)))
    )
    fractions.grid(axis="x", alpha=0.4)
    for axes in (shares, fractions):
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(len(rows) - 0.4, -1.1)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    device = choose_device(options.device)
    keep_freed_memory()
    rows = []
    for case in cases(options, device):
        console.print(" ".join(map(str, case)))
        rows.append(measure(case, options, device))
    worse = deliver(
        rows,
        options.output,
        key=("what", "preset", "window", "precision", "mode", "tokens"),
        numbers={"fraction_of_gemm": "more"},
        draw=draw,
        about=hardware(device),
    )
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
