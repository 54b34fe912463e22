"""What tests on a mesh share: layouts, images put together from the tokens of all ranks, small stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from swipe.groups import Groups
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.pipeline import Pipeline
from swipe.windows import WindowGrid, WindowShard


def layout_at(grid: WindowGrid, dims: ParallelDims, place: int) -> WindowLayout:
    """Make the layout of a place, on ranks numbered by place; it needs no process and cannot communicate."""
    wp, (wp_rank, sp_rank) = (dims.wp_y, dims.wp_x), divmod(place, dims.sp)
    shard = WindowShard.dealt(grid, wp, divmod(wp_rank, dims.wp_x), dims.sp, sp_rank)
    return WindowLayout(shard, wp, range(dims.places), place)


def linked(model: nn.Module, grid: WindowGrid, groups: Groups, shifts: Sequence[int], **how: Any) -> Pipeline:
    """Make this rank's pipeline, with the shift on each of the edges between stages."""
    stage = groups.dims.coordinate(groups.rank).pp
    around = (0, *shifts, 0)[stage], (0, *shifts, 0)[stage + 1]
    return Pipeline.linked(model, mse_loss, WindowLayout.of(grid, groups), groups, around, **how)


def gather_tokens(parts: Sequence[tuple[Tensor, Tensor]], grid: WindowGrid) -> Tensor:
    """Put tokens (numbers [N, T], values [B, N, T, C]) of all ranks into an image [B, C, Y, X].

    NaN where no rank has a token; a token that two ranks hold is an error.
    """
    numbers = np.concatenate([tokens.flatten().numpy() for tokens, _ in parts])
    assert len(set(numbers.tolist())) == len(numbers), "every token is held once"
    batch, *_, width = parts[0][1].shape
    image = torch.full((batch, width, grid.rows * grid.cols), float("nan"), dtype=parts[0][1].dtype)
    for tokens, x in parts:
        image[:, :, tokens.flatten()] = x.reshape(batch, -1, width).transpose(1, 2)
    return image.unflatten(2, (grid.rows, grid.cols))


def rolled(image: Tensor, grid: WindowGrid, sign: int) -> Tensor:
    """Move an image [..., Y, X] to the shifted tiling (+1) or back (-1), by torch.roll."""
    half = sign * grid.window // 2
    return torch.roll(image, (-half, -half), (-2, -1))


# A pipeline of small stages

CHANNELS, WIDTH = 3, 5
GRID = WindowGrid(8, 8, 4)


class Stage(nn.Module):
    """One layer, with a condition per sample; counts what is between its forward and its backward pass."""

    def __init__(self, stage: int, stages: int, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(stage)
        ins, outs = (CHANNELS if end else width for end in (stage == 0, stage == stages - 1))
        self.linear = nn.Linear(ins, outs, dtype=torch.float64)
        self.alive = self.peak_alive = 0

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        self.alive += torch.is_grad_enabled()
        self.peak_alive = max(self.peak_alive, self.alive)
        return _Backward.apply(torch.tanh(self.linear(x) + condition[:, None, None, None]), self)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, stage: Stage) -> Tensor:
        ctx.stage = stage
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.stage.alive -= 1
        return grads[0], None


def draw(microbatch: int, samples: int, grid: WindowGrid = GRID) -> tuple[Tensor, Tensor, Tensor]:
    """Make a microbatch of images: input and target [B, C, Y, X], condition [B]."""
    source = torch.Generator().manual_seed(1000 + microbatch)
    shape = 2, samples, CHANNELS, grid.rows, grid.cols
    x, target = torch.randn(shape, generator=source, dtype=torch.float64)
    return x, target, torch.randn(samples, generator=source, dtype=torch.float64)
