"""From maps to tokens: every variable has its own kernel, so variables may be left out or added.

The published form is a convolution whose kernel equals its stride; here it is one matrix product on patches.
Shapes: B batch, T history, C levels, V variables, H rows, W columns, P patch, h = H/P, w = W/P, D width,
F = V T P² numbers of a patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from aeris.aurora.normalisation import level_name


def patches(fields: Iterable[Tensor], patch: int) -> Tensor:
    """Cut maps into patches.

    Args:
        fields: One tensor per variable, (B, T, H, W) or all (B, T, C, H, W).
        patch: P.

    Returns:
        (B, h, w, F) or (B, h, w, C, F), F in the order variable, time, row, column.
    """
    cut = []
    for field in fields:
        x = field.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
        # (B, T, [C,] h, P, w, P) -> (B, h, w, [C,] T, P, P)
        cut.append(x.permute(0, 2, 4, 1, 3, 5) if x.dim() == 6 else x.permute(0, 3, 5, 2, 1, 4, 6))
    return torch.stack(cut, dim=-4).flatten(-4)


class PatchEmbedding(nn.Module):
    """Kernels of the variables and one bias."""

    def __init__(self, names: Iterable[str], patch: int, width: int, history: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(width))
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(width, 1, history, patch, patch)) for name in sorted(names)}
        )

    def kernel(self, names: Sequence[str], history: int) -> tuple[Tensor, Tensor]:
        """Put the kernels of some variables side by side.

        Args:
            names: Variables, in the order of the patches.
            history: T; where the kernels have more times, the first (trained as the oldest) are taken.

        Returns:
            Weight (D, F) and bias (D,).
        """
        weight = torch.cat([self.weights[name][:, :, :history] for name in names], dim=1)
        return weight.flatten(1), self.bias


class LevelPatchEmbedding(nn.Module):
    """A patch embedding per level."""

    def __init__(
        self, names: Iterable[str], levels: Sequence[float], patch: int, width: int, history: int
    ) -> None:
        super().__init__()
        names = tuple(names)
        self.layers = nn.ModuleDict(
            {key: PatchEmbedding(names, patch, width, history) for key in sorted(map(level_name, levels))}
        )

    def kernel(self, names: Sequence[str], history: int, levels: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Stack the kernels of some levels: weight (C, D, F) and bias (C, D)."""
        embeddings = [cast(PatchEmbedding, self.layers[level_name(level)]) for level in levels]
        weights, biases = zip(*(one.kernel(names, history) for one in embeddings))
        return torch.stack(weights), torch.stack(biases)


def uncast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, where it can be on at all."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply one linear map, or one per level, in the precision of its weights even under autocast.

    What goes in or comes out are weather fields, whose last digits matter more than those of tokens, and the
    maps are small.

    Args:
        x: (..., C, F).
        weight: (D, F), or (C, D, F).
        bias: (D,), or (C, D).

    Returns:
        (..., C, D).
    """
    with uncast(x.device):
        x = x.to(weight.dtype)
        if weight.dim() == 2:
            return nn.functional.linear(x, weight, bias)
        x_CNF = x.flatten(0, -3).transpose(0, 1)
        out_CND = torch.baddbmm(bias[:, None], x_CNF, weight.transpose(1, 2))
        return out_CND.transpose(0, 1).unflatten(0, x.shape[:-2])
