"""The network: embedding, layers of window blocks, head. Written once, as serial code over a layout.

    x_BNTC -> + encoding -> Linear -> [edge, layer] x layers -> edge -> RMSNorm, modulate, Linear -> y_BNTC

A layer is several blocks on one tiling; odd layers (counting from 0) work on windows shifted by half a
window, and the edge between two layers is where tokens change tiling. Source: AERIS, arXiv 2509.13523.

Shapes: B batch, N windows, T tokens per window, C channels, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aeris.config import ModelConfig
from aeris.model.attention import Layout, WindowAttention
from aeris.model.layers import Linear, ModulatedNorm, Modulation, SwiGLU, absolute_encoding, time_embedding
from aeris.model.rope import rope_tables

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Block(nn.Module):
    """x += gate Attention(norm x); x += gate SwiGLU(norm x); norms and gates follow the noise time."""

    def __init__(self, config: ModelConfig, layout: Layout, shifted: bool) -> None:
        """Build from the configuration; `shifted` says on which tiling the block works."""
        super().__init__()
        self.modulation = Modulation(config.width, 6, config.modulation_layers)
        self.norm1 = ModulatedNorm(config.width, config.norm_eps, config.norm_order)
        self.attention = WindowAttention(config.width, config.heads, layout, shifted)
        self.norm2 = ModulatedNorm(config.width, config.norm_eps, config.norm_order)
        self.mlp = SwiGLU(config.width, config.hidden)
        self.products = DTYPES[config.precision]

    def forward(self, x_BNTD: Tensor, time_BD: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Apply the block: [B, N, T, D] -> [B, N, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time_BD)
        x_BNTD = gated_add(
            x_BNTD, gate1, self.attention(self.norm1(x_BNTD, shift1, scale1, self.products), rope)
        )
        return gated_add(x_BNTD, gate2, self.mlp(self.norm2(x_BNTD, shift2, scale2, self.products)))


def gated_add(x_BNTD: Tensor, gate_BD: Tensor, branch_BNTD: Tensor) -> Tensor:
    """Add a residual branch: x + gate * branch."""
    return torch.addcmul(x_BNTD, gate_BD.to(x_BNTD.dtype)[:, None, None], branch_BNTD.to(x_BNTD.dtype))


class Layer(nn.ModuleList):
    """The blocks of one layer, all on the same tiling."""

    def forward(
        self, x: Tensor, time_BD: Tensor, rope: tuple[Tensor, Tensor] | None, recompute: bool
    ) -> Tensor:
        """Apply the blocks in turn, [B, N, T, D]; `recompute` runs each again in the backward pass."""
        for block in self:
            if recompute:
                x = checkpoint(block, x, time_BD, rope, use_reentrant=False)
            else:
                x = block(x, time_BD, rope)
        return x


class Embedding(nn.Module):
    """Input channels plus the absolute encoding, then a linear map: [B, N, T, C] -> [B, N, T, D], in fp32."""

    def __init__(self, config: ModelConfig, channels: int, layout: Layout) -> None:
        """Make the matrix [D, C] and its bias."""
        super().__init__()
        self.proj = Linear(channels, config.width)
        self.config = config
        self.layout = layout
        self._encoding: Tensor | None = None

    def forward(self, x_BNTC: Tensor) -> Tensor:
        """Embed the tokens."""
        if (
            self._encoding is None
            or self._encoding.device != x_BNTC.device
            or self._encoding.dtype != x_BNTC.dtype
        ):
            tokens = self.layout.tokens_NT.to(x_BNTC.device)
            encoding = absolute_encoding(tokens, self.config.cols, self.config.row_offset, x_BNTC.shape[-1])
            self._encoding = encoding.to(x_BNTC.dtype)
        return self.proj(x_BNTC + self._encoding)


class Head(nn.Module):
    """RMSNorm, then modulation (in this order in every variant), then a linear map without bias, in fp32."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        """Make the norm, the modulation (shift, scale) and the matrix [C, D]."""
        super().__init__()
        self.modulation = Modulation(config.width, 2, config.modulation_layers)
        self.norm = ModulatedNorm(config.width, config.norm_eps, "norm-modulate")
        self.out = Linear(config.width, channels, bias=False)

    def forward(self, x_BNTD: Tensor, time_BD: Tensor) -> Tensor:
        """Read the answer off the tokens: [B, N, T, D] -> [B, N, T, C]."""
        return self.out(self.norm(x_BNTD, *self.modulation(time_BD), x_BNTD.dtype))


class Swin(nn.Module):
    """The AERIS network F(x, t), or a part of it: one pipeline stage.

    The network is a row of *units*: the embedding (0), the layers (1 to `layers`), the head (`layers` + 1). A
    stage holds some that follow each other; parameters have the same names wherever they are.

    Args:
        config: sizes and choices.
        in_channels: channels of the input (noisy residual, state, forcings).
        out_channels: channels of the output.
        layout: how window-major tokens move and attend.
        units: the units of this stage; all by default.

    Raises:
        ValueError: the width does not divide by the heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        in_channels: int,
        out_channels: int,
        layout: Layout,
        units: range | None = None,
    ) -> None:
        """Build the modules; parameters are uninitialised until `initialise` (aeris/model/initialise.py)."""
        super().__init__()
        if config.width % config.heads or config.width % 2:
            raise ValueError(f"width {config.width} must be even and a multiple of the {config.heads} heads")
        self.config, self.layout = config, layout
        self.in_channels = in_channels
        self.units = range(config.layers + 2) if units is None else units
        self.embed = Embedding(config, in_channels, layout) if 0 in self.units else None
        self.layers = nn.ModuleDict(
            {
                str(unit - 1): Layer(
                    Block(config, layout, bool((unit - 1) % 2)) for _ in range(config.blocks)
                )
                for unit in self.units
                if 0 < unit <= config.layers
            }
        )
        self.head = Head(config, out_channels) if config.layers + 1 in self.units else None
        self._rope: tuple[Tensor, Tensor] | None = None
        if config.compile:
            for module in self.modules():
                if isinstance(module, Block):
                    module.compile()

    def forward(self, x: Tensor, t_B: Tensor) -> Tensor:
        """Run the units of this stage.

        Args:
            x: with the embedding, the input [B, N, T, C_in]; without, tokens [B, N, T, D] as the stage before
                left them, already on the tiling of the first unit.
            t_B: noise times (rad).

        Returns:
            With the head, y [B, N, T, C_out] in fp32 (or fp64); without, tokens [B, N, T, D].
        """
        config = self.config
        outer = torch.float64 if config.precision == "fp64" else torch.float32
        time_BD = time_embedding(t_B.to(outer), config.width)
        if config.time_rounding == "bf16":
            time_BD = time_BD.bfloat16().to(outer)
        if self.embed is not None:
            x = self.embed(x.to(outer)).to(DTYPES[config.residual])
        rope = self.rotary_tables(x.device)
        recompute = config.checkpointing == "block" and torch.is_grad_enabled()
        for name, layer in self.layers.items():
            unit = int(name) + 1
            x = layer(self.layout.shift(x, self.inner_edge(unit)), time_BD, rope, recompute)
        if self.head is None:
            return x
        return self.head(self.layout.shift(x, self.inner_edge(config.layers + 1)).to(outer), time_BD)

    def inner_edge(self, unit: int) -> int:
        """Return the shift on the edge into `unit`; 0 into this stage's first, where the pipeline shifts."""
        return 0 if unit == self.units.start else edge(unit, self.config.layers)

    def keep_casts(self) -> None:
        """Keep weights in the type of the products from their first use until `drop_casts` (see `Linear`)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.keeps_cast = True

    def casts(self) -> list[Tensor]:
        """List the weights that are kept in the type of the products."""
        linears = (module for module in self.modules() if isinstance(module, Linear))
        return [linear.cast for linear in linears if linear.cast is not None]

    def drop_casts(self) -> None:
        """Free them, before the weights change."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.drop_cast()

    def parts(self) -> list[nn.Module]:
        """List modules whose weights travel together, in the order of the forward pass.

        In bf16 runs those whose weights are used in fp32 only; `products` has the others.
        """
        blocks: list[nn.Module] = [] if self.products() else [*self.blocks()]
        return [*([self.embed] if self.embed else []), *blocks, *([self.head] if self.head else [])]

    def products(self) -> list[list[nn.Module]]:
        """List, block by block, the modules whose weights are used in bf16 only; none in other runs."""
        if self.config.precision != "bf16":
            return []
        return [[block.attention, block.mlp] for block in self.blocks()]

    def blocks(self) -> list[Block]:
        """List the blocks of all layers."""
        modules = (block for layer in self.layers.values() for block in layer.children())
        return [block for block in modules if isinstance(block, Block)]

    def rotary_tables(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return the rotary tables on `device` in the type of the products, computed once."""
        if not self.config.rope:
            return None
        if self._rope is None or self._rope[0].device != device:
            head_dim = self.config.width // self.config.heads
            cos, sin = rope_tables(self.layout.positions_T2.to(device), head_dim, self.config.rope_base)
            dtype = DTYPES[self.config.precision]
            self._rope = (cos.to(dtype), sin.to(dtype))
        return self._rope


def edge(unit: int, layers: int) -> int:
    """Return the shift on the edge into a unit: +1 into odd layers, -1 into even ones and to the head.

    Layers count from 0. Nothing moves into the embedding and the first layer, and to the head only if the
    last layer is an odd one.
    """
    if unit <= 1 or unit > layers + 1:
        return 0
    if unit == layers + 1:
        return -1 if layers % 2 == 0 else 0
    return 1 if (unit - 1) % 2 else -1
