"""Ulysses sequence parallelism: tokens <-> heads around attention, one all-to-all in and one out.

Between them a rank holds all tokens of its windows for H / sp of the heads. Source: DeepSpeed Ulysses,
arXiv 2309.14509. q, k and v travel in one message.

Shapes: B batch, N windows, H heads, h = H / sp local heads, T tokens per window, t = T / sp local tokens, K
head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swipe.collectives import Group, all_to_all


def to_heads(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Give every rank whole windows of a part of the heads: three times [B, N, H, t, K] -> [B, N, h, T, K].

    Tokens arrive in the order of the ranks. Moves 3 (sp - 1) / sp of a local tensor's bytes over `sp`.

    Raises:
        ValueError: the heads do not divide by the ranks.
    """
    if group.size == 1:
        return q, k, v
    if q.shape[2] % group.size:
        raise ValueError(f"{q.shape[2]} heads cannot be divided over {group.size} ranks")
    out: tuple[Tensor, Tensor, Tensor] = _ToHeads.apply(group, q, k, v)
    return out


def to_tokens(o_BNhTK: Tensor, group: Group) -> Tensor:
    """Give every rank its tokens of all heads again: [B, N, h, T, K] -> [B, N, H, t, K].

    Moves (sp - 1) / sp of a local tensor's bytes over `sp`.
    """
    return o_BNhTK if group.size == 1 else _ToTokens.apply(group, o_BNhTK)


def _scatter_heads(xs: tuple[Tensor, ...], group: Group, what: str) -> list[Tensor]:
    """All-to-all from local tokens to local heads: each [B, N, H, t, K] -> [B, N, h, T, K]."""
    batch, windows, heads, tokens, head_dim = xs[0].shape
    ranks = group.size
    send = xs[0].new_empty(ranks, len(xs), batch, windows, heads // ranks, tokens, head_dim)
    for part, x in enumerate(xs):
        send[:, part].copy_(x.unflatten(2, (ranks, -1)).movedim(2, 0))
    received = all_to_all(send, group, what)
    return [
        received[:, part].movedim(0, 3).reshape(batch, windows, heads // ranks, ranks * tokens, head_dim)
        for part in range(len(xs))
    ]


def _gather_heads(xs: tuple[Tensor, ...], group: Group, what: str) -> list[Tensor]:
    """All-to-all from local heads to local tokens: each [B, N, h, T, K] -> [B, N, H, t, K].

    The result is a view of [B, N, t, H, K], the order in which features are wanted next.
    """
    batch, windows, heads, tokens, head_dim = xs[0].shape
    ranks = group.size
    send = xs[0].new_empty(ranks, len(xs), batch, windows, heads, tokens // ranks, head_dim)
    for part, x in enumerate(xs):
        send[:, part].copy_(x.unflatten(3, (ranks, -1)).movedim(3, 0))
    received = all_to_all(send, group, what)
    return [
        received[:, part]
        .permute(1, 2, 4, 0, 3, 5)
        .reshape(batch, windows, tokens // ranks, ranks * heads, head_dim)
        .transpose(2, 3)
        for part in range(len(xs))
    ]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_scatter_heads((q, k, v), group, "q, k, v"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gather_heads(grads, ctx.group, "gradients of q, k, v")


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, o: Tensor) -> Tensor:
        ctx.group = group
        return _gather_heads((o,), group, "attention")[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, _scatter_heads(grads, ctx.group, "gradient of attention")[0]
