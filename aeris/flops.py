"""FLOPs of a training step, from formulas.

F = 6 {B (4 T d^2 + 2 T L d + 3 T d m) + T C d} per sample is the published count (6 = 2 per multiply-add,
times 3 for forward and backward; T tokens, L tokens per window, B blocks, d width, m hidden, C input + output
channels). Here the parts are kept apart, what has no input gradient counts 4 instead of 6, and modulation is
included.
"""

from __future__ import annotations

import time

import torch

from aeris.config import ModelConfig


def flops_per_sample(config: ModelConfig, in_channels: int, out_channels: int) -> dict[str, int]:
    """Count the FLOPs of one sample's forward and backward pass, by part; the values add up to the whole."""
    tokens = config.rows * config.cols
    blocks = config.layers * config.blocks
    d, window_tokens = config.width, config.window**2
    pairs = tokens * window_tokens  # query-key pairs of one block
    # Those that `poles="separate"` saves in a shifted block.
    edge_pairs = config.cols * config.window * window_tokens // 2
    shifted = config.layers // 2 * config.blocks if config.poles == "separate" else 0
    vectors = 6 * blocks + 2
    return {
        "attention_projections": 6 * blocks * tokens * 4 * d * d,
        "attention_windows": 6 * 2 * d * (blocks * pairs - shifted * edge_pairs),
        "mlp": 6 * blocks * tokens * 3 * d * config.hidden,
        "embedding": 4 * tokens * in_channels * d,
        "head": 6 * tokens * out_channels * d,
        "modulation": (6 if config.modulation_layers == 2 else 4) * vectors * d * d
        + (4 * (blocks + 1) * d * d if config.modulation_layers == 2 else 0),
    }


def recompute_flops(config: ModelConfig, in_channels: int, out_channels: int) -> int:
    """Count the FLOPs that activation checkpointing repeats per sample: work, but not useful work."""
    if config.checkpointing == "none":
        return 0
    parts = flops_per_sample(config, in_channels, out_channels)
    return sum(parts[name] for name in ("attention_projections", "attention_windows", "mlp")) // 3


def unit_flops(config: ModelConfig, in_channels: int, out_channels: int) -> list[float]:
    """Share the FLOPs of `flops_per_sample` out over the units of the network: embedding, layers, head."""
    parts = flops_per_sample(config, in_channels, out_channels)
    inside = sum(parts[name] for name in ("attention_projections", "attention_windows", "mlp", "modulation"))
    return [float(parts["embedding"]), *[inside / config.layers] * config.layers, float(parts["head"])]


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
