"""Initial weights, keyed by seed and parameter name, so that any cut of the model starts equal."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from aeris.model.swin import Swin


def initialise(model: Swin, seed: int) -> None:
    """Fill every parameter of `model` (which must not be on the meta device) from `seed`.

    Normal distributions are cut at two standard deviations. d is the width, B the number of blocks.

    | parameter                                  | "zero" (24-hour run) | "spike-no-more" (6-hour run) |
    | ------------------------------------------ | -------------------- | ---------------------------- |
    | qkv, gate_up                               | s = sqrt(2 / (5 d))  | s                            |
    | attention.out, mlp.down (residual branches) | s                    | s / sqrt(2 B)                |
    | modulation.hidden (first of two)           | s                    | 0.03                         |
    | modulation.out (last)                      | 0                    | 1e-6                         |
    | head.out                                   | 0                    | 1e-6                         |
    | embed.proj, C its input channels           | 1 / sqrt(3 C)        | 0.3                          |
    | norm weights                               | 1                    | 1                            |
    | biases                                     | 0                    | 0                            |

    "zero" starts every block as the identity by its gates alone. The published 24-hour configuration also
    zeroes the branches, but then neither gate nor branch gets a gradient: with zero biases such a block never
    learns. Its embedding starts at 0.3; with a smaller one the blocks count for more from the start.

    Sources: the published training configurations; "Spike No More", Takase et al. 2023, arXiv 2312.16903.
    """
    small = math.sqrt(2.0 / (5.0 * model.config.width))
    blocks = model.config.layers * model.config.blocks
    zero = model.config.init == "zero"
    stds = {
        "qkv.weight": small,
        "gate_up.weight": small,
        "attention.out.weight": small if zero else small / math.sqrt(2 * blocks),
        "mlp.down.weight": small if zero else small / math.sqrt(2 * blocks),
        "modulation.hidden.weight": small if zero else 0.03,
        "modulation.out.weight": 0.0 if zero else 1e-6,
        "head.out.weight": 0.0 if zero else 1e-6,
        "embed.proj.weight": 1.0 / math.sqrt(3.0 * model.in_channels) if zero else 0.3,
    }
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            (std,) = {value for ending, value in stds.items() if name.endswith(ending)}
            _truncated_normal(parameter, std, seed, name)


@torch.no_grad()
def _truncated_normal(parameter: nn.Parameter, std: float, seed: int, name: str) -> None:
    """Fill with a normal of `std` cut at 2 std, drawn on CPU in fp32 from a generator of (seed, name)."""
    if std == 0.0:
        parameter.zero_()
        return
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    values = torch.empty(parameter.shape)
    nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=generator)
    parameter.copy_(values)
