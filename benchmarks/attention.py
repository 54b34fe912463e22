"""Window attention written out against torch's fused kernel: `python -m benchmarks.attention`.

Times forward and backward of both in turn, for the window sizes of the presets, and prints the median ratio.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from rich.table import Table
from torch import Tensor

from aeris.log import console, run_program
from aeris.model.swin import DTYPES
from benchmarks.step import describe, seconds
from swipe.backend import choose_device
from swipe.layout import written_out


@dataclass(frozen=True)
class Options:
    """Time attention inside windows, written out and fused."""

    sides: tuple[int, ...] = (8, 12, 30)
    """Window sides."""
    tokens: int = 2_304
    """About how many tokens in all."""
    heads: int = 4
    """Heads."""
    head_dim: int = 32
    """Features of a head."""
    rounds: int = 10
    """Timed pairs, after two that are not counted."""
    device: str = "auto"
    """auto, cpu, cuda or xpu."""


def both_passes(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> None:
    """Attend, and take the gradients of q, k and v."""
    torch.autograd.grad(function(*leaves), leaves, grad)


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    device = choose_device(options.device)
    console.print(f"{describe(device)}: {' '.join(sys.argv[1:])}")
    table = Table("window", "type", "written out, ms", "fused, ms", "fused / written out")
    for side in options.sides:
        for precision in ("bf16", "fp32"):
            windows = max(1, round(options.tokens / side**2))
            shape = (windows, options.heads, side**2, options.head_dim)
            q, k, v, grad = (torch.randn(shape, device=device).to(DTYPES[precision]) for _ in range(4))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            ways = [
                partial(both_passes, f, leaves, grad) for f in (written_out, F.scaled_dot_product_attention)
            ]
            pairs = [[seconds(way, device) for way in ways] for _ in range(options.rounds + 2)][2:]
            ours, fused = (statistics.median(column) * 1e3 for column in zip(*pairs))
            ratio = statistics.median(b / a for a, b in pairs)
            table.add_row(str(side), precision, f"{ours:.2f}", f"{fused:.2f}", f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    run_program(main)
