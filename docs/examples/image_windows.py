"""Train a small window transformer that cleans noisy pictures, with swipe, on any layout of ranks.

    python docs/examples/image_windows.py
    torchrun --nproc-per-node 4 docs/examples/image_windows.py --pp 2 --wp-x 2

print the same losses. The model is serial code over a layout; `train` has all the wiring there is.

Shapes: B batch, N windows held, T tokens held of each, C channels, D width, H heads, K head dim.
"""

import argparse
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swipe

SIZE, WINDOW, CHANNELS, WIDTH, HEADS = 32, 8, 3, 32, 4
BATCH, MICROBATCH = 16, 2  # pictures of a step, and of one forward pass
GRID = swipe.WindowGrid(SIZE, SIZE, WINDOW)
# What stages are cut from, embedding, four blocks and head: which works on windows shifted by half a window?
SHIFTED = (False, False, True, False, True, False)


def shift_into(unit: int) -> int:
    """Return the shift between a unit and the one before: +1 to the shifted windows, -1 back, 0 none."""
    return SHIFTED[unit] - SHIFTED[unit - 1] if 0 < unit < len(SHIFTED) else 0


class Block(nn.Module):
    """Attention inside windows, then an MLP. Every rank runs it on its own tokens."""

    def __init__(self, layout: swipe.WindowLayout, shifted: bool) -> None:
        super().__init__()
        self.layout, self.shifted, D = layout, shifted, WIDTH
        self.place = nn.Embedding(WINDOW * WINDOW, D)
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x_BNTD: Tensor) -> Tensor:
        """Return the tokens after the block, [B, N, T, D]."""
        row_T, col_T = self.layout.positions_T2.unbind(1)  # inside the window
        qkv = self.qkv(self.norm(x_BNTD) + self.place(row_T * WINDOW + col_T))
        q, k, v = qkv.unflatten(3, (3, HEADS, -1)).permute(3, 0, 1, 4, 2, 5)  # each [B, N, H, T, K]
        x_BNTD = x_BNTD + self.out(self.layout.attend(q, k, v, self.shifted).transpose(2, 3).flatten(3))
        return x_BNTD + self.mlp(x_BNTD)


class Stage(nn.Module):
    """Units of the model that follow each other; all of them if there is one stage."""

    def __init__(self, layout: swipe.WindowLayout, units: range) -> None:
        super().__init__()
        self.layout, self.units, self.parts = layout, units, nn.ModuleDict()
        ends = {0: (CHANNELS, WIDTH), len(SHIFTED) - 1: (WIDTH, CHANNELS)}
        for unit in units:
            torch.manual_seed(unit)  # the same name and the same first weights on whatever stage
            linear = nn.Linear(*ends[unit], bias=False) if unit in ends else None
            self.parts[str(unit)] = linear or Block(layout, SHIFTED[unit])

    def forward(self, x: Tensor) -> Tensor:
        """Run the units. Between two of them tokens may change windows; between stages the edge does it."""
        for unit, part in zip(self.units, self.parts.values()):
            x = part(x if unit == self.units.start else self.layout.shift(x, shift_into(unit)))
        return x


def microbatches(layout: swipe.WindowLayout, step: int, dp_rank: int, dp: int) -> Iterator[swipe.Microbatch]:
    """Make a dp rank's share of a step from the numbers of the pictures; a real program reads its windows."""
    for first in range(step * BATCH, (step + 1) * BATCH, MICROBATCH)[dp_rank::dp]:
        random = torch.Generator().manual_seed(first)
        clean = F.interpolate(torch.randn(MICROBATCH, CHANNELS, 5, 5, generator=random), SIZE, mode="bicubic")
        noisy = clean + torch.randn(clean.shape, generator=random)
        yield swipe.Microbatch(layout.to_windows(noisy), target=layout.to_windows(clean))


def train(degrees: dict[str, int], steps: int) -> None:
    """Train on this process and on those torchrun started with it; the first prints the losses."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    limits = swipe.Limits(GRID.windows_y, GRID.windows_x, WINDOW, HEADS, len(SHIFTED), BATCH // MICROBATCH)
    dims = limits.choose(world, fixed=degrees)  # an error names the layouts that work
    device, at = swipe.choose_device("cpu"), dims.coordinate(rank)
    swipe.start(device, timeout_s=60)
    groups = swipe.make_groups(dims, rank, device)
    # What this rank holds: some windows of an image, some tokens of each, some units of the model.
    layout = swipe.WindowLayout.of(GRID, groups)
    units = swipe.balanced_cut([1, 8, 8, 8, 8, 1], dims.pp)[at.pp]
    model = Stage(layout, units)
    swipe.shard(model, model.parts.values(), groups.weights)
    # The links to the stages before and after; tokens change windows on the way if the next unit wants that.
    shifts = shift_into(units.start), shift_into(units.stop)
    pipeline = swipe.Pipeline.linked(model, F.mse_loss, layout, groups, shifts)
    optimizer, count = torch.optim.AdamW(model.parameters(), lr=3e-3), limits.samples // dims.dp
    for step in range(steps):
        optimizer.zero_grad()
        losses = pipeline.step(microbatches(layout, step, at.dp, dims.dp), count)
        share = losses.sum() / (count * dims.dp * dims.places)  # only the last stage has losses
        replicas = swipe.replicas(groups.weights)
        norm, (loss,) = swipe.global_norm(model.parameters(), groups.world, replicas, [share])
        swipe.clip(model.parameters(), norm, largest=1.0)
        optimizer.step()
        if rank == 0:
            print(f"step {step}  loss {loss.item():.6f}")
    swipe.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Clean noisy pictures with a window transformer.")
    for axis in ("dp", "wp_y", "wp_x", "pp", "sp"):
        parser.add_argument("--" + axis.replace("_", "-"), type=int, default=0, help="ranks; 0: chosen")
    train(vars(parser.parse_args()), steps=8)
