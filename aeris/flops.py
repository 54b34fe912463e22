"""FLOPs of a training step, from formulas: by part; forward, backward and repeated work apart.

A multiply-add is two FLOPs. A matrix product costs as much again for each gradient it passes on: to its
weight and, where one is needed, to its input. Only matrix products are counted, as in the published formula

    F = 6 {B (4 T d^2 + 2 T L d + 3 T d m) + T C d}

per sample (6: a multiply-add, forward and twice backward; T tokens, L tokens per window, B blocks, d width, m
hidden, C input + output channels). `compare` says where ours differs and why.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from aeris.config import ModelConfig


class Work(NamedTuple):
    """FLOPs of one sample."""

    forward: int
    backward: int
    recomputed: int = 0
    """What activation checkpointing repeats of the forward pass: work of the device, but not useful."""

    @property
    def useful(self) -> int:
        """What the result needs: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What is computed: the numerator of HFU."""
        return self.useful + self.recomputed


def work(
    config: ModelConfig, in_channels: int, out_channels: int, units: range | None = None
) -> dict[str, Work]:
    """Count the FLOPs of one sample by part: of the whole network, or of some units (`Swin`), as on a stage.

    The ranks that share a sample on a stage divide all parts but modulation, which each computes alone.
    """
    units = range(config.layers + 2) if units is None else units
    layers = [unit - 1 for unit in units if 0 < unit <= config.layers]
    head, blocks = config.layers + 1 in units, len(layers) * config.blocks
    tokens, d, window_tokens = config.rows * config.cols, config.width, config.window**2
    pairs = blocks * tokens * window_tokens  # of a query and a key
    if config.poles == "separate":  # halves of the last row of windows attend apart in a shifted block
        shifted = sum(layer % 2 for layer in layers) * config.blocks
        pairs -= shifted * config.cols * config.window * window_tokens // 2
    products = {
        "attention_projections": 2 * blocks * tokens * 4 * d * d,
        "attention_windows": 2 * 2 * pairs * d,
        "mlp": 2 * blocks * tokens * 3 * d * config.hidden,
    }
    again = config.checkpointing == "block"
    found = {name: Work(flops, 2 * flops, again * flops) for name, flops in products.items()}
    found["embedding"] = _no_input_gradient(2 * tokens * in_channels * d if 0 in units else 0)
    flops = 2 * tokens * out_channels * d if head else 0
    found["head"] = Work(flops, 2 * flops)
    in_blocks, in_head = _modulation(config, 6 * blocks, blocks), _modulation(config, 2 * head, int(head))
    found["modulation"] = Work(
        in_blocks.forward + in_head.forward,
        in_blocks.backward + in_head.backward,
        again * in_blocks.forward,
    )
    return found


def _no_input_gradient(flops: int) -> Work:
    """Return the work of a product whose input is data."""
    return Work(flops, flops)


def _modulation(config: ModelConfig, vectors: int, modules: int) -> Work:
    """Count the products from the time embedding, which has no gradient, to so many vectors in all."""
    square = 2 * config.width**2
    if config.modulation_layers == 1:
        return _no_input_gradient(vectors * square)
    hidden, out = modules * square, vectors * square
    return Work(hidden + out, hidden + 2 * out)


def flops_per_sample(config: ModelConfig, in_channels: int, out_channels: int) -> dict[str, int]:
    """Count the useful FLOPs of one sample, forward and backward, by part; the values add up to the whole."""
    return {name: found.useful for name, found in work(config, in_channels, out_channels).items()}


def recompute_flops(config: ModelConfig, in_channels: int, out_channels: int) -> int:
    """Count the FLOPs that activation checkpointing repeats per sample: work, but not useful work."""
    return sum(found.recomputed for found in work(config, in_channels, out_channels).values())


def unit_flops(config: ModelConfig, in_channels: int, out_channels: int) -> list[int]:
    """Return the useful FLOPs of every unit of the network: embedding, layers, head."""
    units = range(config.layers + 2)
    parts = (work(config, in_channels, out_channels, range(unit, unit + 1)) for unit in units)
    return [sum(found.useful for found in one.values()) for one in parts]


def published_parts(config: ModelConfig, in_channels: int, out_channels: int) -> dict[str, int]:
    """Return the terms of the published formula (AERIS, arXiv 2509.13523) by part, FLOPs of one sample."""
    blocks, tokens, d = config.layers * config.blocks, config.rows * config.cols, config.width
    return {
        "attention_projections": 6 * blocks * 4 * tokens * d * d,
        "attention_windows": 6 * blocks * 2 * tokens * config.window**2 * d,
        "mlp": 6 * blocks * 3 * tokens * d * config.hidden,
        "embedding": 6 * tokens * in_channels * d,
        "head": 6 * tokens * out_channels * d,
        "modulation": 0,
    }


def published_flops(config: ModelConfig, in_channels: int, out_channels: int) -> int:
    """Return the FLOPs of one sample by the published formula: what the published EFLOP/s count.

    Args:
        in_channels: 69 in the published scaling runs, whose network takes a state alone; and `out_channels`.
    """
    return sum(published_parts(config, in_channels, out_channels).values())


class Difference(NamedTuple):
    """A part as published and as counted here, in FLOPs of one sample."""

    part: str
    published: int
    ours: int
    why: str
    """Why they differ; "" where they do not."""


def compare(config: ModelConfig, in_channels: int, out_channels: int) -> list[Difference]:
    """List published and own FLOPs of every part, and after them what neither counts."""
    ours = work(config, in_channels, out_channels)
    published = published_parts(config, in_channels, out_channels)
    reasons = {
        "attention_windows": "the halves of windows across the pole attend apart (poles separate)",
        "embedding": "its input is data, so no gradient of it is computed: 4 FLOPs per multiply-add, not 6",
        "modulation": "once per sample, not per token: the published formula leaves it out",
    }
    rows = [
        Difference(name, count, ours[name].useful, reasons[name] if count != ours[name].useful else "")
        for name, count in published.items()
    ]
    again = sum(found.recomputed for found in ours.values())
    if again:
        rows.append(Difference("recomputed", 0, 0, f"{again:.3g} by checkpointing: in HFU, not in MFU"))
    scores = ours["attention_windows"].forward // 2
    rows.append(Difference("scores again", 0, 0, f"{scores:.3g} in the backward pass of fused attention"))
    rows.append(
        Difference("norms, gates, loss, optimizer", 0, 0, "element by element: time, but no products")
    )
    return rows


UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"))


def in_words(flops_per_s: float) -> str:
    """Write FLOP/s with three digits and a prefix: 10.2 EFLOP/s."""
    scale, prefix = next((unit for unit in UNITS if flops_per_s >= 0.9995 * unit[0]), UNITS[-1])
    return f"{flops_per_s / scale:#.3g} {prefix}FLOP/s".replace(". ", " ")


def measure_gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """Measure the FLOP/s of a square matrix product in `dtype` on `device`: the best of eight.

    Args:
        size: side of the matrices; 0 chooses 1024 on CPU and 8192 elsewhere.
    """
    size = size or (1024 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
