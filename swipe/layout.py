"""The layout a model is handed: how window-major tokens move and attend.

On one rank it is plain tensor code. A model never asks how many ranks there are. It calls `attend` inside
blocks and `shift` on the edges between layers, and the layout does what its shard needs.

Shapes: B batch, N windows, T tokens per window, C channels, D width, H heads, K head dim, Y rows, X columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swipe.windows import WindowShard, shift_permutation


class WindowLayout:
    """All windows of an image on one rank, in row-major order.

    Attributes:
        shard: the windows this rank owns.
        positions_T2: int64 (row, column) of each token inside its window, what a rotary embedding needs.
        tokens_NT: int64 global number, row * cols + col, of each token in the unshifted tiling.
    """

    def __init__(self, shard: WindowShard) -> None:
        """Precompute the token numbers and the shift of `shard`.

        Raises:
            ValueError: the shard does not own every window.
        """
        grid = shard.grid
        if shard.windows != WindowShard.full(grid).windows:
            raise ValueError(
                f"this layout needs all {grid.windows} windows in order, not {len(shard.windows)} of them"
            )
        self.shard = shard
        self.tokens_NT = torch.from_numpy(shard.token_index())
        side = torch.arange(grid.window)
        self.positions_T2 = torch.cartesian_prod(side, side)
        forward = torch.from_numpy(shift_permutation(grid))
        self._shifts = {1: forward, -1: torch.argsort(forward)}

    def to_windows(self, x_BCYX: Tensor) -> Tensor:
        """Cut images into windows: [B, C, Y, X] -> [B, N, T, C]."""
        tokens = self.tokens_NT.to(x_BCYX.device)
        return x_BCYX.flatten(2)[:, :, tokens].permute(0, 2, 3, 1).contiguous()

    def from_windows(self, x_BNTC: Tensor) -> Tensor:
        """Put windows back into images: [B, N, T, C] -> [B, C, Y, X]."""
        grid = self.shard.grid
        tokens = self.tokens_NT.to(x_BNTC.device).flatten()
        x_BCS = x_BNTC.flatten(1, 2).transpose(1, 2)
        image = torch.empty_like(x_BCS, memory_format=torch.contiguous_format)
        image[:, :, tokens] = x_BCS
        return image.unflatten(2, (grid.rows, grid.cols))

    def shift(self, x_BNTD: Tensor, sign: int) -> Tensor:
        """Move to the shifted tiling (`sign` +1), back from it (-1), or stay (0).

        Equals `torch.roll` of the image by half a window up and left (+1) or down and right (-1).
        """
        if sign == 0:
            return x_BNTD
        device = x_BNTD.device
        for direction, index in self._shifts.items():
            if index.device != device:
                self._shifts[direction] = index.to(device)
        return _Permute.apply(x_BNTD.flatten(1, 2), self._shifts[sign], self._shifts[-sign]).view_as(x_BNTD)

    def attend(self, q_BNHTK: Tensor, k_BNHTK: Tensor, v_BNHTK: Tensor, shifted: bool) -> Tensor:
        """Let the tokens of each window attend to each other: softmax(q k' / sqrt(K)) v, [B, N, H, T, K].

        In the shifted tiling the last row of windows straddles the row edge; with `row_edge="separate"` its
        upper and lower halves attend apart. That needs no mask: tokens are row-major, so each half is a run
        of T/2 tokens.
        """
        grid = self.shard.grid
        if not (shifted and grid.row_edge == "separate"):
            return attention(q_BNHTK, k_BNHTK, v_BNHTK)
        inner = grid.windows - grid.windows_x
        whole = [x[:, :inner] for x in (q_BNHTK, k_BNHTK, v_BNHTK)]
        halves = [x[:, inner:].unflatten(3, (2, -1)).transpose(2, 3) for x in (q_BNHTK, k_BNHTK, v_BNHTK)]
        edge = attention(*halves).transpose(2, 3).flatten(3, 4)
        return edge if inner == 0 else torch.cat((attention(*whole), edge), dim=1)


SMALL_WINDOW = 256  # tokens; in larger windows the fused kernel is faster on CPU too


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full softmax attention over the last two dims [..., T, K], scaled by 1/sqrt(K).

    torch's fused kernel, but for bf16 in small windows on CPU the product is written out: both passes
    together are about three times faster there (benchmarks/attention.py, docs/log.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= SMALL_WINDOW:
        return written_out(q, k, v)
    batch = q.shape[:-3]
    out = F.scaled_dot_product_attention(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4))
    return out.unflatten(0, batch)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as two matrix products and a softmax."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, dim=-1), v)


class _Permute(torch.autograd.Function):
    """Reorder tokens by a permutation; the gradient is gathered by the inverse instead of scattered."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """Gather: y[:, i] = x[:, index[i]]."""
        ctx.save_for_backward(inverse)
        return x_BSD.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, *grad_BSD: Tensor) -> tuple[Tensor, None, None]:
        """Gather the gradient with the inverse permutation."""
        (inverse,) = ctx.saved_tensors
        return grad_BSD[0].index_select(1, inverse), None, None
