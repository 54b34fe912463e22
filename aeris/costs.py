"""What a run costs before it is run: parameters, FLOPs and bytes, from formulas and the model on meta."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aeris.config import RunConfig
from aeris.flops import flops_per_sample, published_flops, work
from aeris.model.attention import Layout
from aeris.model.swin import Swin
from aeris.parallelize import build_model, make_layout
from aeris.restore import channel_counts

BYTES_PER_PARAMETER = {"weights": 4, "gradients": 4, "optimizer": 8, "ema": 4}
HOST_BYTES_PER_PARAMETER = 20  # with offload: optimizer and ema, master weights, a buffer for gradients


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
    plain = dataclasses.replace(config.model, compile=False)  # what counts bytes cannot be compiled
    model = build_model(plain, *counts, FusedLayout(make_layout(config.model)), "meta")
    parameters = sum(p.numel() for p in model.parameters())
    parts, passes = flops_per_sample(config.model, *counts), work(config.model, *counts).values()
    memory, host = {name: parameters * size for name, size in BYTES_PER_PARAMETER.items()}, 0
    if config.optimizer.offload != "none":
        memory |= {"optimizer": 0, "ema": 0}
        host = parameters * HOST_BYTES_PER_PARAMETER
    memory["activations"] = activation_bytes(model, counts[0], config.train.microbatch)
    memory["total"] = sum(memory.values())
    return {
        "parameters": parameters,
        "flops_per_sample": sum(parts.values()),
        "flops_by_part": parts,
        "forward_flops_per_sample": sum(part.forward for part in passes),
        "recompute_flops_per_sample": sum(part.recomputed for part in passes),
        "published_flops_per_sample": published_flops(config.model, *counts),
        "memory_bytes": memory,
        "host_bytes": host,
    }
