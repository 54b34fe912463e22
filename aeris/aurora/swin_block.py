"""A block of Aurora's U-Net: attention inside windows, then an MLP, each followed by a norm the context sets.

    x = x + AdaLN(attention(x), c);   x = x + AdaLN(MLP(x), c);   AdaLN(y) = LN(y) scale(c) + shift(c)

Scale and shift are zero at the start, so a new block is the identity. Tokens stay in window order throughout.
Source: Bodnar et al. 2025 (Aurora); microsoft-aurora 2.0.1.
Shapes: B batch, N tokens, D width, E width of the context.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aeris.aurora import checkpointing
from aeris.aurora.attention import WindowAttention
from aeris.aurora.config import AuroraConfig
from aeris.aurora.recompute import add_norm, gelu_linear
from aeris.aurora.windows import Group

MOST_TOKENS = 16_384
"""Without gradients, the hidden layer (four times as wide as a token) exists for so many tokens at a time."""


class AdaptiveNorm(nn.Module):
    """Layer norm whose shift and scale (in this order) are a linear map of the context."""

    def __init__(self, width: int, context_width: int) -> None:
        """Make `ln_modulation`, zero."""
        super().__init__()
        self.ln_modulation = nn.Sequential(nn.SiLU(), nn.Linear(context_width, 2 * width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros: the branch adds nothing yet."""
        for parameter in self.ln_modulation.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BND: Tensor, y_BND: Tensor, active: Tensor, keep_B: Tensor | None) -> Tensor:
        """x + keep AdaLN(y); `active`: SiLU(context) [B, E] or [B, N, E], `keep_B`: one factor per sample."""
        modulation = self.ln_modulation[1](active)
        if keep_B is not None:
            modulation = modulation * keep_B.view(-1, *[1] * (modulation.ndim - 1)).to(modulation.dtype)
        shift, scale = modulation.chunk(2, dim=-1)
        return add_norm(x_BND, y_BND, scale, shift)


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int, drop_rate: float) -> None:
        """Make fc1 [hidden, D] and fc2 [D, hidden]."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop_rate = drop_rate

    def forward(self, x_BND: Tensor, checkpointed: bool = False) -> Tensor:
        """The MLP of each token; `checkpointed`: the caller computes it again, and may stop before fc2."""
        if x_BND.shape[1] > MOST_TOKENS and not torch.is_grad_enabled():
            return torch.cat([self(part) for part in x_BND.split(MOST_TOKENS, dim=1)], dim=1)
        if not (self.drop_rate or checkpointed):
            return gelu_linear(self.fc1(x_BND), self.fc2.weight, self.fc2.bias)
        hidden = F.gelu(self.fc1(x_BND))
        if not self.drop_rate:
            y: Tensor = self.fc2(hidden)
            return y
        hidden = F.dropout(hidden, self.drop_rate, self.training)
        return F.dropout(self.fc2(hidden), self.drop_rate, self.training)


class Block(nn.Module):
    """One block; its tokens are in the order of a window plan."""

    region: ClassVar[str] = "block"

    def __init__(self, width: int, heads: int, drop_path: float, config: AuroraConfig) -> None:
        """Make a block; `drop_path` is the probability that a sample skips a branch in training."""
        super().__init__()
        self.checkpointing = False
        self.tail = False  # whether the last norm is computed again too
        self.drop_path = drop_path
        self.norm1 = AdaptiveNorm(width, config.embed_dim)
        self.attn = WindowAttention(width, heads, config)
        self.norm2 = AdaptiveNorm(width, config.embed_dim)
        self.mlp = MLP(width, int(width * config.mlp_ratio), config.drop_rate)

    def forward(
        self, x_BND: Tensor, active: Tensor, groups: tuple[Group, ...], adapter: int | None
    ) -> Tensor:
        """Run the block.

        Args:
            x_BND: Tokens in the order of the plan of `groups`.
            active: SiLU(context), [B, E] or in the same order [B, N, E].
            groups: The blocks of tokens that attend to each other.
            adapter: Number of the LoRA adapter in use; None: none.
        """
        # Drawn outside of what is computed again: drawn inside, torch.compile fails (torch 2.13).
        keep1_B, keep2_B = self._keep(x_BND), self._keep(x_BND)
        if self.tail:
            return checkpointing.run(self, self._whole, x_BND, active, groups, adapter, keep1_B, keep2_B)
        x_BND, y_BND = checkpointing.run(self, self._branches, x_BND, active, groups, adapter, keep1_B)
        x: Tensor = self.norm2(x_BND, y_BND, active, keep2_B)
        return x

    def _whole(
        self,
        x_BND: Tensor,
        active: Tensor,
        groups: tuple[Group, ...],
        adapter: int | None,
        keep1_B: Tensor | None,
        keep2_B: Tensor | None,
    ) -> Tensor:
        x_BND, y_BND = self._branches(x_BND, active, groups, adapter, keep1_B)
        x: Tensor = self.norm2(x_BND, y_BND, active, keep2_B)
        return x

    def _branches(
        self,
        x_BND: Tensor,
        active: Tensor,
        groups: tuple[Group, ...],
        adapter: int | None,
        keep_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens after attention, and the MLP's output for them."""
        x_BND = self.norm1(x_BND, self.attn(x_BND, groups, adapter), active, keep_B)
        return x_BND, self.mlp(x_BND, self.checkpointing)

    def _keep(self, x_BND: Tensor) -> Tensor | None:
        """A factor for each sample's branch: 0 to skip it, or 1 / (probability of keeping it)."""
        if not (self.training and self.drop_path > 0):
            return None
        keep = 1 - self.drop_path
        return x_BND.new_empty(x_BND.shape[0]).bernoulli_(keep).div_(keep)
