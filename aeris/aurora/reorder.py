"""Moving tokens from one order to another: a gather whose backward is a gather too.

The backward of an ordinary index is a scatter with additions: slow, and on a GPU not repeatable. Every index
here uses a token at most once, so the backward is the inverse index.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aeris.aurora.windows import Ints, WindowPlan, halved, inverse, merging, reordering

Index = tuple[Tensor, Tensor | None]
"""Places to take tokens from, and the places of the result that have none (zeros), if any."""


def reorder(x_BND: Tensor, source: WindowPlan, target: WindowPlan) -> Tensor:
    """Tokens in the order of `source` put into the order of `target`."""
    if source is target:
        return x_BND
    result: Tensor = _Gather.apply(x_BND, *_moves("reorder", source, target, x_BND.device))
    return result


def merge(x_BND: Tensor, source: WindowPlan, target: WindowPlan) -> Tensor:
    """The four tokens below each token of the coarser target grid: [B, N / 4, 4 D], zeros where none is."""
    x: Tensor = _Gather.apply(x_BND, *_moves("merge", source, target, x_BND.device))
    return x.unflatten(1, (-1, 4)).flatten(2)


def split(x_BND: Tensor, source: WindowPlan, target: WindowPlan) -> Tensor:
    """Each token cut into the four below it on the finer target grid: [B, about 4 N, D / 4]."""
    x = x_BND.unflatten(2, (4, -1)).flatten(1, 2)
    result: Tensor = _Gather.apply(x, *_moves("split", source, target, x.device))
    return result


class _Gather(torch.autograd.Function):
    """out[:, i] = x[:, index[i]], zero where index has none."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, forward: Index, backward: Index) -> Tensor:
        ctx.moves = backward, forward
        return _take(x_BND, forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        result: Tensor = _Gather.apply(grads[0], *ctx.moves)
        return result, None, None


def _take(x_BND: Tensor, index: Index) -> Tensor:
    places, missing = index
    taken = x_BND.index_select(1, places)
    return taken if missing is None else taken.index_fill_(1, missing, 0.0)


@lru_cache(maxsize=256)
def _moves(kind: str, source: WindowPlan, target: WindowPlan, device: torch.device) -> tuple[Index, Index]:
    """Index of a move and of its backward on a device."""
    if kind == "split":
        back, length = merging(target, source), len(target.order)
        there = inverse(back, length)
    else:
        there = reordering(source, target) if kind == "reorder" else merging(source, target)
        back = inverse(there, len(source.order))
    with torch.inference_mode(False):
        return _on(device, there), _on(device, back)


def _on(device: torch.device, index: Ints) -> Index:
    missing = (index < 0).nonzero()[0]
    places = torch.from_numpy(index.clip(0)).to(device)
    return places, torch.from_numpy(missing).to(device) if len(missing) else None


def coarser(res: tuple[int, int, int], times: int) -> list[tuple[int, int, int]]:
    """The grids of a U-Net from the finest on, `times` of them."""
    grids = [res]
    for _ in range(times - 1):
        grids.append(halved(grids[-1]))
    return grids
