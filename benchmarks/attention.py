"""Window attention written out, fused, and as the run does it, against matrix products of the same FLOPs.

    python -m benchmarks.attention --windows 12 30
    python -m benchmarks.attention --device cuda --csv FILE --plot FILE

All ways are timed in turn, forward and backward, so that a machine whose speed drifts does not change ratios.
`swipe.layout.attention` must be the fastest of them or near it: `of_fastest` is what is to be watched.

Shapes: N windows, H heads, T tokens per window, K head dim.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aeris.log import console, run_program
from aeris.model.swin import DTYPES
from benchmarks.parts import seconds
from benchmarks.records import Output, Row, deliver, hardware
from swipe.backend import choose_device, keep_freed_memory
from swipe.layout import attention, written_out

Precision = Literal["bf16", "fp32"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "as run"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Kernels that torch can be told to take, where a device has them."""
WARM_UP = 2


@dataclass(frozen=True)
class Options:
    """Time attention inside windows, done in several ways."""

    windows: tuple[int, ...] = ()
    """Window sides; without: 8, 12 and 30 on the CPU, else 30 and 60."""
    precision: tuple[Precision, ...] = ("bf16", "fp32")
    """Types of q, k and v."""
    tokens: int = 0
    """About how many tokens in all; 0: 2,304 on the CPU, else 28,800: 32 windows of 30."""
    heads: int = 4
    """Heads: 4 are what a rank has of 48 with sp 12."""
    head_dim: int = 0
    """Features of a head; 0: those of the presets, 32 in windows below 30 and 128 in others."""
    rounds: int = 4
    """Timed turns, after two that are not counted."""
    device: str = "auto"
    """auto, cpu, cuda or xpu."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)


def by_kernel(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with one of torch's kernels; RuntimeError where it cannot."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def ways(device: torch.device) -> dict[str, Attention]:
    """Name what there is to compare on a device."""
    found: dict[str, Attention] = {OURS: attention, "written out": written_out}
    found["fused"] = F.scaled_dot_product_attention
    if device.type != "cpu":
        found |= {name: partial(by_kernel, backend) for name, backend in KERNELS.items()}
    return found


def both_passes(way: Attention, leaves: list[Tensor], grad: Tensor) -> None:
    """Attend, and take the gradients of q, k and v."""
    torch.autograd.grad(way(*leaves), leaves, grad)


def works(way: Attention, leaves: list[Tensor], grad: Tensor) -> bool:
    """Try a way once: kernels refuse types, sizes and devices that they do not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            both_passes(way, leaves, grad)
        except RuntimeError:
            return False
    return True


def measure(options: Options, side: int, precision: Precision, device: torch.device) -> Iterator[Row]:
    """Time all ways in turn for one window; yield their rows."""
    tokens = options.tokens or (2_304 if device.type == "cpu" else 28_800)
    count, size = max(1, round(tokens / side**2)), options.head_dim or (32 if side < 30 else 128)
    shape = (count, options.heads, side**2, size)
    q, k, v, grad = (torch.randn(shape, device=device).to(DTYPES[precision]) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    # Two products forward and four backward; what a fused kernel computes again is not counted.
    flops = 12.0 * count * options.heads * side**4 * size
    n = round((flops / 2) ** (1 / 3))
    a, b = (torch.randn(n, n, device=device).to(DTYPES[precision]) for _ in range(2))
    calls: dict[str, Callable[[], object]] = {"gemm": partial(torch.matmul, a, b)}
    for name, way in ways(device).items():
        if works(way, leaves, grad):
            calls[name] = partial(both_passes, way, leaves, grad)
        else:
            console.print(f"left out, as it cannot do it: {name}, window {side}, {precision}")
    turns = [{name: seconds(call, device) for name, call in calls.items()}]
    turns += [{n: seconds(call, device) for n, call in calls.items()} for _ in range(options.rounds + 1)]
    turns = turns[WARM_UP:]
    fastest = min(statistics.median(turn[name] for turn in turns) for name in calls if name != "gemm")
    with torch.no_grad():
        ahead = {
            name: seconds(partial(way, *leaves), device)
            for name, way in ways(device).items()
            if name in calls
        }
    for name in calls:
        if name != "gemm":
            own = statistics.median(turn[name] for turn in turns)
            yield {
                "window": side,
                "head_dim": size,
                "precision": precision,
                "way": name,
                "tokens": count * side**2,
                "forward_ms": ahead[name] * 1e3,
                "ms": own * 1e3,
                "tflops": flops / own / 1e12,
                "fraction_of_gemm": statistics.median(turn["gemm"] / turn[name] for turn in turns),
                "of_fastest": fastest / own,
            }


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the share of the GEMM rate by window and way, a panel for each type; needs matplotlib."""
    from matplotlib.figure import Figure

    types = list(dict.fromkeys(row["precision"] for row in rows))
    names = list(dict.fromkeys(row["way"] for row in rows))
    figure = Figure(figsize=(5.5 * len(types), 4), layout="constrained")
    for axes, precision in zip(figure.subplots(1, len(types), squeeze=False, sharey=True)[0], types):
        here = [row for row in rows if row["precision"] == precision]
        sides = list(dict.fromkeys((row["window"], row["head_dim"]) for row in here))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            found = {(row["window"], row["head_dim"]): row for row in here if row["way"] == name}
            at = [index + (number - (len(names) - 1) / 2) * width for index, _ in enumerate(sides)]
            heights = [found[side]["fraction_of_gemm"] if side in found else 0.0 for side in sides]
            bars = axes.bar(at, heights, width, label=name)
            labels = [f"{found[side]['ms']:,.4g}" if side in found else "" for side in sides]
            axes.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
        axes.set_xticks(range(len(sides)), [f"window {side}\nhead of {size}" for side, size in sides])
        axes.set_title(precision)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
        axes.legend(fontsize=7, frameon=False)
    figure.supylabel("share of the GEMM rate (numbers: ms, both passes)", fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    device = choose_device(options.device)
    keep_freed_memory()
    windows = (8, 12, 30) if device.type == "cpu" else (30, 60)
    rows: list[Row] = []
    for side, precision in product(options.windows or windows, options.precision):
        rows += measure(options, side, precision, device)
    worse = deliver(
        rows,
        options.output,
        key=("window", "head_dim", "precision", "way", "tokens"),
        numbers={"fraction_of_gemm": "more", "of_fastest": "more"},
        draw=draw,
        about=f"{options.heads} heads; {hardware(device)}",
    )
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
