"""Attention inside windows whose tokens lie side by side: dense calls without a mask, one per size of block.

Shapes: B batch, N tokens, n tokens of a block, D width, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aeris.aurora.config import AuroraConfig
from aeris.aurora.lora import LoRARollout
from aeris.aurora.recompute import attend_blocks
from aeris.aurora.windows import Group

MOST_BLOCKS = 32_768
"""Blocks in one call of the attention kernel; CUDA kernels refuse more than 65,535."""


def fp16_safe_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [..., n, K] that survives scores beyond the range of float16.

    As in microsoft-aurora 2.0.1: the scale goes into the keys, and scores are kept inside the range.
    """
    scores = q @ (k * q.shape[-1] ** -0.5).transpose(-2, -1)
    if scores.dtype == torch.float16:
        bound = torch.finfo(torch.float16).max - 1000
        scores = scores.clamp(-bound, bound)
    return torch.softmax(scores, dim=-1) @ v


class WindowAttention(nn.Module):
    """Multi-head self-attention inside the blocks of a window plan."""

    def __init__(self, width: int, heads: int, config: AuroraConfig) -> None:
        """Make qkv [3D, D] (rows q, k, v; in each head by head) and proj [D, D] with bias, and adapters.

        Raises:
            ValueError: The heads do not divide the width.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads = heads
        self.fp16_safe = config.use_fp16_safe_attention
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.lora_proj: LoRARollout | None = None
        self.lora_qkv: LoRARollout | None = None
        if config.use_lora and "proj" in config.lora_targets:
            self.lora_proj = LoRARollout(width, width, config)
        if config.use_lora and "qkv" in config.lora_targets:
            self.lora_qkv = LoRARollout(width, 3 * width, config)

    def forward(self, x_BND: Tensor, groups: tuple[Group, ...], adapter: int | None) -> Tensor:
        """Attend inside blocks; `x_BND` is in the order of the plan of `groups`."""
        qkv = self.qkv(x_BND)
        if self.lora_qkv is not None:
            qkv = self.lora_qkv(x_BND, qkv, adapter)
        out = attend_blocks(qkv, self.qkv.bias, groups, self.heads, self._attend)
        y = self.proj(out)
        if self.lora_proj is not None:
            y = self.lora_proj(out, y, adapter)
        return nn.functional.dropout(y, self.drop_rate, self.training) if self.drop_rate else y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [blocks, H, n, K]."""
        if self.fp16_safe and q.dtype == torch.float16:
            return fp16_safe_attention(q, k, v)
        return _dense(q, k, v)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [blocks, H, n, K] in calls the kernels accept."""
    attend = nn.functional.scaled_dot_product_attention
    if q.shape[0] <= MOST_BLOCKS:
        return attend(q, k, v)
    return torch.cat([attend(*one) for one in zip(*(t.split(MOST_BLOCKS) for t in (q, k, v)))])
