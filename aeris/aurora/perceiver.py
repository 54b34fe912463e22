"""Perceiver: a few queries read from a context by cross-attention; no order among the context's tokens.

Shapes: N patches, Q queries, S tokens of context, D width, E heads, K head dim.
Source: Perceiver IO, Jaegle et al. 2021, arXiv 2107.14795, in the post-norm form of the official package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aeris.aurora.attention import fp16_safe_attention


class MLP(nn.Module):
    """Linear, exact GELU, linear, dropout."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.net(x)
        return out


class CrossAttention(nn.Module):
    """Attention of queries over a context, without biases."""

    def __init__(self, width: int, heads: int, normalised: bool, fp16_safe: bool) -> None:
        super().__init__()
        self.heads, self.fp16_safe = heads, fp16_safe
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.ln_k = nn.LayerNorm(width) if normalised else None
        self.ln_q = nn.LayerNorm(width) if normalised else None

    def forward(self, queries: Tensor, context_NSD: Tensor) -> Tensor:
        """Read from the context.

        Args:
            queries: (N, Q, D), or (Q, D) where all patches ask the same.
            context_NSD: What is read.

        Returns:
            (N, Q, D).
        """
        shared = queries.dim() == 2 and self.ln_k is None
        read = self._read_shared if shared else self._read
        result: Tensor = self.to_out(read(self.to_q(queries), context_NSD))
        return result

    def _read(self, q: Tensor, context_NSD: Tensor) -> Tensor:
        """Attend in the usual way."""
        k_NSD, v_NSD = self.to_kv(context_NSD).chunk(2, dim=-1)
        if self.ln_q is not None and self.ln_k is not None:
            q, k_NSD = self.ln_q(q), self.ln_k(k_NSD)
        q_NQD = q.expand(context_NSD.shape[0], -1, -1)
        # Under autocast a layer norm returns float32.
        parts = (q_NQD.to(v_NSD.dtype), k_NSD.to(v_NSD.dtype), v_NSD)
        q_NEQK, k_NESK, v_NESK = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        if self.fp16_safe and v_NSD.dtype == torch.float16:
            out_NEQK = fp16_safe_attention(q_NEQK, k_NESK, v_NESK)
        else:
            out_NEQK = F.scaled_dot_product_attention(q_NEQK, k_NESK, v_NESK)
        return out_NEQK.transpose(1, 2).flatten(2)

    def _read_shared(self, q_QD: Tensor, context_NSD: Tensor) -> Tensor:
        """Attend with queries that all patches share, without making keys.

        A score is q · (W_k x) = (W_kᵀ q) · x, so the queries are taken into the space of the context once:
        E Q numbers per token of context instead of D.
        """
        key_EKD, value_DD = self.to_kv.weight.chunk(2)
        key_EKD = key_EKD.unflatten(0, (self.heads, -1))
        q_EQK = q_QD.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        asked_EQD = torch.matmul(q_EQK * key_EKD.shape[1] ** -0.5, key_EKD)
        scores_NSX = F.linear(context_NSD, asked_EQD.flatten(0, 1))
        if self.fp16_safe:
            limit = torch.finfo(torch.float16).max - 1000
            scores_NSX = scores_NSX.clamp(-limit, limit) if scores_NSX.dtype == torch.float16 else scores_NSX
        v_NSD = F.linear(context_NSD, value_DD)
        weights_NSX = torch.softmax(scores_NSX, dim=1).to(v_NSD.dtype)
        weights_NEQS = weights_NSX.unflatten(-1, q_EQK.shape[:2]).permute(0, 2, 3, 1)
        v_NESK = v_NSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return torch.matmul(weights_NEQS, v_NESK).transpose(1, 2).flatten(2)


class Perceiver(nn.Module):
    """Blocks of cross-attention and MLP, each normalised and then added to the queries."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        mlp_ratio: float,
        *,
        eps: float = 1e-5,
        dropout: float = 0.0,
        stabilised: bool = False,
        fp16_safe: bool = False,
    ) -> None:
        """Build the blocks.

        Args:
            width: D.
            heads: Attention heads.
            depth: Blocks.
            mlp_ratio: Hidden width of the MLP over D.
            eps: Epsilon of the layer norms after attention and MLP.
            dropout: Dropout after the MLP.
            stabilised: Normalise keys and queries of the first block.
            fp16_safe: Keep scores of float16 tensors within the range of float16.
        """
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    CrossAttention(width, heads, stabilised and block == 0, fp16_safe),
                    MLP(width, int(width * mlp_ratio), dropout),
                    nn.LayerNorm(width, eps=eps),
                    nn.LayerNorm(width, eps=eps),
                ]
            )
            for block in range(depth)
        )

    def forward(self, queries: Tensor, context_NSD: Tensor) -> Tensor:
        """Read from the context.

        Args:
            queries: (N, Q, D) or, shared by all patches, (Q, D).
            context_NSD: What is read.

        Returns:
            (N, Q, D).
        """
        blocks = cast("Iterable[Iterable[nn.Module]]", self.layers)
        for attention, mlp, norm_attention, norm_mlp in blocks:
            queries = norm_attention(attention(queries, context_NSD)) + queries
            queries = norm_mlp(mlp(queries)) + queries
        return queries
