"""How much of a plain matrix product's speed a block reaches.

    python -m benchmarks.step --presets tiny 1.3b-6h

A block's forward and backward pass is timed in turn with one square matrix product of the same FLOPs and
type, pair by pair in one run, so that a machine whose speed drifts does not change the ratio. The median
ratio is what counts.
"""

from __future__ import annotations

import csv
import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.table import Table

from aeris.config import ModelConfig
from aeris.flops import flops_per_sample
from aeris.log import console, run_program
from aeris.model.initialise import initialise
from aeris.model.layers import time_embedding
from aeris.model.swin import DTYPES
from aeris.parallelize import build_model, make_layout
from aeris.presets import PRESETS
from swipe.backend import choose_device, keep_freed_memory

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Options:
    """Time a block's forward and backward pass against a matrix product of the same FLOPs."""

    presets: tuple[str, ...] = ("tiny", "1.3b-6h")
    """Which blocks."""
    precision: tuple[Precision, ...] = ("bf16", "fp32")
    """Types of the products."""
    windows: int = 0
    """Windows in the batch; 0 chooses about 2,000 tokens on CPU and 16,000 elsewhere."""
    rounds: int = 10
    """Timed pairs, after two that are not counted."""
    compile: bool = False
    """Compile the block with torch.compile."""
    device: str = "auto"
    """auto, cpu, cuda or xpu."""
    csv: Path | None = None
    """Also write the rows to this file."""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call of `work`, to the end of its work on the device."""
    synchronize = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def describe(device: torch.device) -> str:
    """Name the hardware and software of a measurement."""
    if device.type != "cpu":
        return f"{getattr(torch, device.type).get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def block_config(preset: str, precision: Precision, windows: int, compiled: bool) -> ModelConfig:
    """Return the preset's model cut down to one block over one row of `windows` windows."""
    model = PRESETS[preset]().model
    residual = model.residual if precision == "bf16" else precision
    return dataclasses.replace(
        model, rows=model.window, cols=windows * model.window, layers=1, blocks=1, precision=precision,
        residual=residual, compile=compiled,
    )  # fmt: skip


def measure(options: Options, preset: str, precision: Precision, device: torch.device) -> dict[str, object]:
    """Time one block; return a row of the table."""
    tokens_wanted = 2_000 if device.type == "cpu" else 16_000
    side = PRESETS[preset]().model.window
    windows = options.windows or max(1, round(tokens_wanted / side**2))
    config = block_config(preset, precision, windows, options.compile)
    model = build_model(config, 8, 8, make_layout(config), device)
    initialise(model, 0)
    (block,) = model.layers["0"].children()
    rope = model.rotary_tables(device)
    tokens = windows * side**2
    x = (
        torch.randn(1, windows, side**2, config.width, device=device)
        .to(DTYPES[config.residual])
        .requires_grad_()
    )
    grad = torch.randn_like(x)
    t = time_embedding(torch.tensor([0.7], device=device), config.width)
    parts = flops_per_sample(config, 8, 8)
    flops = parts["attention_projections"] + parts["attention_windows"] + parts["mlp"]
    n = round((flops / 2) ** (1 / 3))
    a, b = (torch.randn(n, n, device=device).to(DTYPES[precision]) for _ in range(2))

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x, t, rope).backward(grad)

    pairs = [(seconds(step, device), seconds(lambda: a @ b, device)) for _ in range(options.rounds + 2)][2:]
    block_s, gemm_s = (statistics.median(column) for column in zip(*pairs))
    return {
        "preset": preset,
        "precision": precision,
        "tokens": tokens,
        "gflop": flops / 1e9,
        "block_ms": block_s * 1e3,
        "gemm_ms": gemm_s * 1e3,
        "block_tflops": flops / block_s / 1e12,
        "fraction_of_gemm": statistics.median(gemm / block for block, gemm in pairs),
    }


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    unknown = sorted({*options.presets} - {*PRESETS})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no preset: choose from {', '.join(PRESETS)}")
    device = choose_device(options.device)
    keep_freed_memory()
    console.print(f"{describe(device)}: {' '.join(sys.argv[1:])}")
    rows = [
        measure(options, preset, precision, device)
        for preset in options.presets
        for precision in options.precision
    ]
    table = Table()
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    run_program(main)
