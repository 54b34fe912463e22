"""FLOPs and memory of a training step, from formulas and from the model on the meta device.

F = 6 {B (4 T d^2 + 2 T L d + 3 T d m) + T C d} per sample is the published count (6 = 2 per multiply-add,
times 3 for forward and backward; T tokens, L tokens per window, B blocks, d width, m hidden, C input + output
channels). Here the parts are kept apart, what has no input gradient counts 4 instead of 6, and modulation is
included.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from aeris.config import ModelConfig, RunConfig
from aeris.model.attention import Layout
from aeris.model.swin import Swin
from aeris.parallelize import build_model, make_layout
from aeris.restore import channel_counts

BYTES_PER_PARAMETER = {"weights": 4, "gradients": 4, "optimizer": 8, "ema": 4}


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


class FusedLayout:
    """A layout for counting: attention that keeps what a fused kernel keeps, and computes nothing."""

    def __init__(self, layout: Layout) -> None:
        """Take the tokens and the shift of `layout`."""
        self.positions_T2, self.tokens_NT, self.shift = layout.positions_T2, layout.tokens_NT, layout.shift

    def attend(self, q_BNHTK: Tensor, k_BNHTK: Tensor, v_BNHTK: Tensor, shifted: bool) -> Tensor:
        """Return a tensor of the right shape; q, k, v, it and the log-sums are saved for a backward pass."""
        out: Tensor = _Kept.apply(q_BNHTK, k_BNHTK, v_BNHTK)
        return out


class _Kept(torch.autograd.Function):
    """What fused attention saves: its inputs, its output, and one number per query and head in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Save without computing."""
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out


def activation_bytes(model: Swin, in_channels: int, microbatch: int) -> int:
    """Add up what autograd keeps of one microbatch for the backward pass, by a forward pass on meta.

    With block checkpointing the one block that is being computed again comes on top.
    """
    tokens_NT = model.layout.tokens_NT
    seen: dict[int, tuple[Any, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            seen[storage._cdata] = (storage, storage.nbytes())  # holding it keeps its address unique
        return tensor

    x = torch.empty(microbatch, *tokens_NT.shape, in_channels, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x, torch.empty(microbatch, device="meta"))
    del y
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(size for address, (_, size) in seen.items() if address not in parameters)


def costs(config: RunConfig, channels: int) -> dict[str, Any]:
    """Say what training a state of `channels` costs: parameters, FLOPs and, on one device, bytes by part."""
    counts = channel_counts(channels)
    model = build_model(config.model, *counts, FusedLayout(make_layout(config.model)), "meta")
    parameters = sum(p.numel() for p in model.parameters())
    parts = flops_per_sample(config.model, *counts)
    memory = {name: parameters * size for name, size in BYTES_PER_PARAMETER.items()}
    memory["activations"] = activation_bytes(model, counts[0], config.train.microbatch)
    memory["total"] = sum(memory.values())
    return {
        "parameters": parameters,
        "flops_per_sample": sum(parts.values()),
        "flops_by_part": parts,
        "recompute_flops_per_sample": recompute_flops(config.model, *counts),
        "memory_bytes": memory,
    }


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
