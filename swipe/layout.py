"""The layout a model is handed: how this rank's window-major tokens move and attend.

A model never asks how many ranks there are. It calls `attend` inside blocks and `shift` on the edges between
layers, and the layout does what its shard needs: with one rank that is plain tensor code.

Shapes: B batch, N windows held, T tokens held of each, C channels, D width, H heads, K head dim, Y rows,
X columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swipe.collectives import ALONE, SHIFT_TAG, Group, Message, Policy, exchange
from swipe.groups import Groups
from swipe.shift import Mover, shift_plan
from swipe.ulysses import to_heads, to_tokens
from swipe.windows import WindowGrid, WindowShard


class WindowLayout:
    """The windows and tokens of one rank, among those that share an image on one pipeline stage.

    Args:
        shard: what this rank holds.
        wp: ranks along the rows and columns of the window grid.
        ranks: global ranks by place, (py * wp_x + px) * sp + sp_rank.
        place: this rank's.
        sequence: the ranks that share this rank's windows.
        policy: how the messages of a shift are posted.

    Attributes:
        shard: as given.
        positions_T2: int64 (row, column) of each local token inside its window, for rotary embeddings.
        tokens_NT: int64 global number, row * cols + col, of each local token in the unshifted tiling.
    """

    def __init__(
        self,
        shard: WindowShard,
        wp: tuple[int, int] = (1, 1),
        ranks: Sequence[int] = (0,),
        place: int = 0,
        sequence: Group = ALONE,
        policy: Policy = "async",
    ) -> None:
        """Precompute the token numbers and both directions of the shift.

        Raises:
            ValueError: the shard is not that of `place`.
        """
        expected = WindowShard.at_place(shard.grid, wp, shard.sp, place)
        if shard != expected or len(ranks) != wp[0] * wp[1] * shard.sp:
            raise ValueError(
                f"this layout needs the {len(expected.windows)} windows of place {place} of {wp[0]} x "
                f"{wp[1]} x {shard.sp} ranks in order, not {len(shard.windows)} others or {len(ranks)} ranks"
            )
        self.shard, self.wp, self.ranks, self.place, self.sequence = shard, wp, tuple(ranks), place, sequence
        self.policy = policy
        self.tokens_NT = torch.from_numpy(shard.token_index())
        self.positions_T2 = torch.from_numpy(shard.positions())
        self.movers = {
            sign: Mover(shard, shift_plan(shard.grid, wp, shard.sp, place, sign)) for sign in (-1, 0, 1)
        }
        grid = shard.grid
        # Those of the last row of windows come last: in the shifted tiling they straddle the row edge.
        self._inner = sum(wy < grid.windows_y - 1 for wy, _ in shard.windows)

    @classmethod
    def of(cls, grid: WindowGrid, groups: Groups | None = None) -> WindowLayout:
        """Lay a grid out over the ranks of `groups`, as this rank sees it; without groups on this rank alone.

        Raises:
            ValueError: the windows cannot be dealt evenly, or not cut into so many strips.
        """
        if groups is None:
            return cls(WindowShard.full(grid))
        dims, place = groups.dims, groups.dims.place(groups.rank)
        wp = (dims.wp_y, dims.wp_x)
        shard = WindowShard.at_place(grid, wp, dims.sp, place)
        return cls(shard, wp, groups.place_ranks, place, groups.sequence, groups.policy)

    def to_windows(self, x_BCYX: Tensor) -> Tensor:
        """Cut this rank's tokens out of images: [B, C, Y, X] -> [B, N, T, C]."""
        tokens = self.tokens_NT.to(x_BCYX.device)
        return x_BCYX.flatten(2)[:, :, tokens].permute(0, 2, 3, 1).contiguous()

    def from_windows(self, x_BNTC: Tensor) -> Tensor:
        """Put tokens back into images: [B, N, T, C] -> [B, C, Y, X], NaN where another rank's are."""
        grid = self.shard.grid
        tokens = self.tokens_NT.to(x_BNTC.device).flatten()
        x_BCS = x_BNTC.flatten(1, 2).transpose(1, 2)
        image = x_BCS.new_empty(*x_BCS.shape[:2], grid.rows * grid.cols)
        if len(tokens) < grid.rows * grid.cols:
            image.fill_(float("nan"))
        image[:, :, tokens] = x_BCS
        return image.unflatten(2, (grid.rows, grid.cols))

    def shift(self, x_BNTD: Tensor, sign: int) -> Tensor:
        """Move to the shifted tiling (`sign` +1), back from it (-1), or stay (0).

        Equals `torch.roll` of the image by half a window up and left (+1) or down and right (-1). What other
        ranks hold is exchanged over the window and sequence axes: one message each way if 4 divides sp.
        """
        return x_BNTD if sign == 0 else _Shift.apply(x_BNTD, self, sign)

    def move(self, x_BNTD: Tensor, sign: int) -> Tensor:
        """Do the shift, outside autograd."""
        mover, shape = self.movers[sign], x_BNTD.shape
        outgoing = mover.outgoing(x_BNTD)
        incoming = mover.buffers(shape, x_BNTD.dtype, x_BNTD.device)
        kept = next((tensor for place, tensor in outgoing if place == self.place), None)
        what = "half-window shift"
        sends, receives = (
            [Message(self.ranks[place], x, SHIFT_TAG) for place, x in side if place != self.place]
            for side in (outgoing, incoming)
        )
        exchange(sends, receives, what, policy=self.policy).wait()
        arrived = [kept if place == self.place and kept is not None else tensor for place, tensor in incoming]
        return mover.assemble(arrived, shape)

    def attend(self, q_BNHTK: Tensor, k_BNHTK: Tensor, v_BNHTK: Tensor, shifted: bool) -> Tensor:
        """Let the tokens of each window attend to each other: softmax(q k' / sqrt(K)) v, [B, N, H, T, K].

        Over the sequence axis tokens are exchanged for heads and back (swipe/ulysses.py).
        """
        q, k, v = to_heads(q_BNHTK, k_BNHTK, v_BNHTK, self.sequence)
        return to_tokens(self._attend_whole(q, k, v, shifted), self.sequence)

    def _attend_whole(self, q: Tensor, k: Tensor, v: Tensor, shifted: bool) -> Tensor:
        """Attend in whole windows [B, N, h, T, K].

        In the shifted tiling the last row of windows straddles the row edge; with `row_edge="separate"` its
        upper and lower halves attend apart. That needs no mask: quadrants lie one after the other, so each
        half is a run of T/2 tokens (or one run in every rank's part, if all four quadrants are shared out).
        """
        shard, inner = self.shard, self._inner
        if not (shifted and shard.grid.row_edge == "separate") or inner == q.shape[1]:
            return attention(q, k, v)
        runs = shard.strips if shard.sets == 1 else 1
        # [B, N, h, runs, 2, T/2/runs, K] -> [B, N, 2, h, T/2, K]
        halves = [x[:, inner:].unflatten(3, (runs, 2, -1)).movedim(4, 2).flatten(4, 5) for x in (q, k, v)]
        edge = attention(*halves).unflatten(4, (runs, -1)).movedim(2, 4).flatten(3, 5)
        return edge if inner == 0 else torch.cat((attention(*(x[:, :inner] for x in (q, k, v))), edge), dim=1)


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


class _Shift(torch.autograd.Function):
    """The shift; its gradient is the shift back."""

    @staticmethod
    def forward(ctx: Any, x_BNTD: Tensor, layout: WindowLayout, sign: int) -> Tensor:
        ctx.layout, ctx.sign = layout, sign
        return layout.move(x_BNTD, sign)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layout.move(grads[0], -ctx.sign), None, None
