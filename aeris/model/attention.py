"""Window self-attention: a fused qkv matrix, rotary positions, the layout's `attend`, an output matrix.

Shapes: B batch, N windows, T tokens per window, D width, H heads, K head dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from aeris.model.fused import split_heads
from aeris.model.layers import Linear


class Layout(Protocol):
    """What the network needs to know of how its tokens lie; `swipe.layout.WindowLayout` is one."""

    positions_T2: Tensor
    tokens_NT: Tensor

    def shift(self, x_BNTD: Tensor, sign: int) -> Tensor:
        """Move tokens to the shifted tiling (+1), back (-1), or not at all (0)."""
        ...

    def attend(self, q_BNHTK: Tensor, k_BNHTK: Tensor, v_BNHTK: Tensor, shifted: bool) -> Tensor:
        """Attend inside windows: [B, N, H, T, K]."""
        ...


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window."""

    def __init__(self, width: int, heads: int, layout: Layout, shifted: bool) -> None:
        """Make qkv [3D, D] (rows q, k, v; inside each head by head) and out [D, D], without biases."""
        super().__init__()
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.heads = heads
        self.layout = layout
        self.shifted = shifted

    def forward(self, x_BNTD: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend; `rope` is the cos and sin tables [T, K/2] in the tokens' type, or None for no rotation."""
        q, k, v = split_heads(self.qkv(x_BNTD), self.heads, rope)
        o_BNHTK = self.layout.attend(q, k, v, self.shifted)
        return self.out(o_BNHTK.transpose(2, 3).flatten(3))
