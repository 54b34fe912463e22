"""Axial 2-D rotary position embedding inside a window.

Half of a head's pairs turn with the column, half with the row: angle = position * base^(-2k / (K/2)) for pair
k of its axis (Heo et al. 2024, arXiv 2403.13298). A pair is (i, i + K/2); the AERIS snapshot pairs neighbours
(2i, 2i + 1), which is the same map up to the order of a head's features, and it never applied it.

The rotation itself is in `fused.split_heads`. Shapes: T tokens per window, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions_T2: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Tabulate cos and sin of every token's angles: float64 [T, K/2], column angles first.

    Args:
        positions_T2: (row, column) of each token in its window.
        head_dim: K, divisible by 4.
        base: base of the frequencies.

    Raises:
        ValueError: K is not divisible by 4.
    """
    if head_dim % 4:
        raise ValueError(
            f"a head of {head_dim} features cannot be rotated on two axes: it must be divisible by 4"
        )
    k = torch.arange(head_dim // 4, dtype=torch.float64, device=positions_T2.device)
    frequency = base ** (-4.0 * k / head_dim)
    row, column = positions_T2.double().unbind(-1)
    angle = torch.cat((column[:, None] * frequency, row[:, None] * frequency), dim=-1)
    return angle.cos(), angle.sin()
