"""The small parts of the network: linear maps, modulated RMSNorm, SwiGLU, time and place encodings.

Parameters are fp32; products run in the type of the tokens, so a weight is cast where it is used: once for
all microbatches of a step in training.

Shapes: B batch, N windows, T tokens per window, C channels, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aeris.model.fused import modulated_norm, product, swiglu_down


class Linear(nn.Linear):
    """A linear map whose weight follows the type of its input.

    Attributes:
        keeps_cast: keep the weight in the type of the products until `drop_cast`, for whoever promises that
            the weight does not change till then and that gradients are taken by `backward`.
        cast: what is kept, outside of autograd.
    """

    keeps_cast = False
    cast: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply x W' + b in the type of `x`: [..., in] -> [..., out]."""
        cast = self.weight_in(x.dtype)
        if self.adds_gradient(cast):
            y = product(x, self.weight, cast)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        return F.linear(x, cast, None if self.bias is None else self.bias.to(x.dtype))

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in another type; microbatches that are in flight together share what is kept."""
        # A compiled block casts inside its own kernels, and makes the copy again in its backward pass.
        if dtype == self.weight.dtype or not self.keeps_cast or torch.compiler.is_compiling():
            return self.weight.to(dtype)
        if self.cast is None or self.cast.dtype != dtype:
            self.cast = self.weight.detach().to(dtype)
        return self.cast

    def adds_gradient(self, cast: Tensor) -> bool:
        """Tell whether `cast` is what is kept, so that autograd does not know whose gradient it has."""
        return cast is self.cast

    def drop_cast(self) -> None:
        """Free what is kept, before the weight changes.

        A block that is compiled keeps nothing, and an assignment would have it compiled again.
        """
        if self.cast is not None:
            self.cast = None


class ModulatedNorm(nn.Module):
    """RMSNorm and modulation in either order: modulate(RMSNorm(x)) or RMSNorm(modulate(x)).

    modulate(x) = x (1 + scale) + shift.
    """

    def __init__(self, width: int, eps: float, order: str) -> None:
        """Make the norm's weight [D]; `order` is "norm-modulate" or "modulate-norm"."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.order = order

    def forward(self, x_BNTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, out: torch.dtype) -> Tensor:
        """Return the normalised, modulated tokens in type `out`."""
        if self.order == "norm-modulate":
            # w (1 + scale) is one vector per sample: the norm's weight costs no pass over the tokens.
            return modulated_norm(x_BNTD, self.weight * (1.0 + scale_BD), shift_BD, self.eps, out)
        shift, scale = (v.to(x_BNTD.dtype)[:, None, None] for v in (shift_BD, 1.0 + scale_BD))
        weight_BD = self.weight.expand_as(scale_BD)
        x_BNTD = torch.addcmul(shift, x_BNTD, scale)
        return modulated_norm(x_BNTD, weight_BD, torch.zeros_like(weight_BD), self.eps, out)


class SwiGLU(nn.Module):
    """W2 (silu(gate) * up), where (gate, up) = W1 x: [..., D] -> [..., D] through `hidden` features."""

    def __init__(self, width: int, hidden: int) -> None:
        """Make the gate-and-up matrix [2 hidden, D] and the down matrix [D, hidden], without biases."""
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gated MLP token by token."""
        cast = self.down.weight_in(x.dtype)
        weight = self.down.weight if self.down.adds_gradient(cast) else None
        return swiglu_down(self.gate_up(x), cast, weight)


class Modulation(nn.Module):
    """From the time embedding to `vectors` vectors [D] per sample, through one or two linear layers."""

    def __init__(self, width: int, vectors: int, layers: int) -> None:
        """With 2 `layers`: Linear(D, D), SiLU, Linear(D, vectors D); with 1: SiLU, Linear(D, vectors D)."""
        super().__init__()
        self.hidden = Linear(width, width) if layers == 2 else None
        self.out = Linear(width, vectors * width)
        self.vectors = vectors

    def forward(self, time_BD: Tensor) -> tuple[Tensor, ...]:
        """Return vectors [B, D] in the order shift, scale(, gate) for attention, then for the MLP."""
        time_BD = time_BD.to(self.out.weight.dtype)
        if self.hidden is not None:
            time_BD = self.hidden(time_BD)
        return self.out(F.silu(time_BD)).chunk(self.vectors, dim=-1)


def time_embedding(t_B: Tensor, width: int) -> Tensor:
    """Embed noise times [B] (radians): [sin(t f_k) | cos(t f_k)], f_k = 10000^(-2k / D), k < D/2: [B, D]."""
    half = width // 2
    frequency = torch.exp(
        torch.arange(half, dtype=t_B.dtype, device=t_B.device) * (-math.log(10_000.0) / half)
    )
    angle = t_B[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def absolute_encoding(tokens_NT: Tensor, cols: int, row_offset: int, channels: int) -> Tensor:
    """Fixed 2-D sinusoid added to the input channels: float64 [N, T, C].

    With c = 2 ceil(C/4): c row channels, then c column channels, each interleaved sin, cos with frequencies
    10000^(-2k/c), cropped to C. Rows count from `row_offset` (AERIS numbers them on the 721-row grid).
    """
    count = 2 * math.ceil(channels / 4)
    k = torch.arange(count // 2, dtype=torch.float64, device=tokens_NT.device)
    frequency = 10_000.0 ** (-2.0 * k / count)
    parts = []
    for place in (tokens_NT // cols + row_offset, tokens_NT % cols):
        angle = place.double()[..., None] * frequency
        parts.append(torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2))
    return torch.cat(parts, dim=-1)[..., :channels]
