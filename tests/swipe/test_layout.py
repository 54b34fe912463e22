"""The layout of one rank, and those of many ranks together, against plain tensor code on images."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from swipe.collectives import Policy
from swipe.groups import make_groups
from swipe.layout import WindowLayout, attention, written_out
from swipe.mesh import ParallelDims
from swipe.windows import WindowGrid, WindowShard
from tests.harness import run_distributed
from tests.swipe.meshes import gather_tokens, rolled


def layout(row_edge: str = "cyclic", rows: int = 8, cols: int = 12, window: int = 4) -> WindowLayout:
    """Make a small layout."""
    return WindowLayout(WindowShard.full(WindowGrid(rows, cols, window, row_edge)))


def test_windows_and_back() -> None:
    """Cutting and putting back is the identity, and a window holds its quadrants one after the other."""
    lay = layout()
    x = torch.randn(2, 3, 8, 12)
    w = lay.to_windows(x)
    assert w.shape == (2, 6, 16, 3)
    assert torch.equal(w[1, 4, 4:8], x[1, :, 4:6, 6:8].permute(1, 2, 0).reshape(4, 3))
    assert torch.equal(lay.from_windows(w), x)


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_shift_and_its_gradient_are_a_roll(sign: int) -> None:
    """Forward and backward equal torch.roll on the image, bit for bit."""
    lay = layout()
    x = torch.randn(2, 3, 8, 12, requires_grad=True)
    g = torch.randn(2, 3, 8, 12)
    y = lay.from_windows(lay.shift(lay.to_windows(x), sign))
    y.backward(g)
    expected = torch.roll(x, (-2 * sign, -2 * sign), (2, 3))
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, torch.roll(g, (2 * sign, 2 * sign), (2, 3)))
    tokens = x.detach()[:, :, :4, :4].reshape(2, 6, 8, 1).repeat(1, 1, 2, 1)
    assert torch.equal(lay.shift(lay.shift(tokens, 1), -1), tokens)


@pytest.mark.parametrize("rows", [4, 8])
def test_separate_row_edge_splits_the_last_windows(rows: int) -> None:
    """Equals attention with an explicit mask between the halves of the windows on the edge, gradients too."""
    lay = layout("separate", rows=rows)
    q, k, v = (
        torch.randn(2, lay.shard.grid.windows, 2, 16, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    mask = torch.ones(lay.shard.grid.windows, 1, 16, 16, dtype=torch.bool)
    mask[-3:, :, :8, 8:] = mask[-3:, :, 8:, :8] = False
    g = torch.randn(q.shape, dtype=torch.float64)
    results = []
    for out in (lay.attend(q, k, v, shifted=True), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)):
        results.append((out, *torch.autograd.grad(out, (q, k, v), g)))
    for ours, masked in zip(*results):
        torch.testing.assert_close(ours, masked, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lay.attend(q, k, v, shifted=False), attention(q, k, v))


def test_both_ways_to_attend_are_the_same() -> None:
    """Written out and fused, with a batch of windows and of half windows, exact and in bf16."""
    for shape in ((2, 3, 2, 16, 8), (2, 3, 2, 2, 8, 8)):
        q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        exact = written_out(q, k, v)
        torch.testing.assert_close(attention(q, k, v), exact, rtol=1e-12, atol=1e-12)
        rough = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert (rough.double() - exact).norm() < 0.02 * exact.norm()


def test_a_part_of_the_windows_is_refused() -> None:
    """A layout without other ranks needs every window: it says so instead of attending wrongly."""
    grid = WindowGrid(8, 12, 4)
    with pytest.raises(ValueError, match="needs the 6 windows of place 0 of 1 x 1 x 1 ranks"):
        WindowLayout(WindowShard(grid, ((0, 0), (1, 1))))


# Many ranks. Cases by number of ranks: (grid, mesh, policy).

Case = tuple[WindowGrid, ParallelDims, Policy]
SHIFTS: list[Case] = [
    (WindowGrid(8, 16, 4), ParallelDims(wp_y=2, wp_x=2), "async"),
    (WindowGrid(8, 8, 4), ParallelDims(wp_y=2, wp_x=2), "parity"),
    (WindowGrid(8, 16, 4), ParallelDims(wp_x=4), "batched"),
    (WindowGrid(12, 8, 4), ParallelDims(wp_y=3), "parity"),
    (WindowGrid(8, 12, 4), ParallelDims(wp_y=2, sp=2), "async"),
    (WindowGrid(8, 12, 4), ParallelDims(wp_x=3), "batched"),
    (WindowGrid(8, 12, 4), ParallelDims(wp_x=3, sp=2), "parity"),
    (WindowGrid(8, 12, 4), ParallelDims(sp=2), "batched"),
    (WindowGrid(12, 6, 6), ParallelDims(sp=3), "async"),
    (WindowGrid(12, 24, 6), ParallelDims(wp_y=2, sp=3), "parity"),
    (WindowGrid(8, 12, 4), ParallelDims(sp=4), "batched"),
    (WindowGrid(4, 4, 4), ParallelDims(sp=4), "parity"),
    (WindowGrid(12, 12, 6), ParallelDims(wp_y=2, wp_x=2, sp=3), "async"),
    (WindowGrid(12, 12, 6), ParallelDims(wp_x=2, sp=6), "batched"),
    (WindowGrid(24, 12, 6), ParallelDims(sp=12), "parity"),
    (WindowGrid(16, 8, 4), ParallelDims(wp_y=2, wp_x=2, sp=4), "async"),
]


def image(grid: WindowGrid, channels: int, seed: int) -> Tensor:
    """Make the image every rank knows, [2, C, Y, X] fp64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, grid.rows, grid.cols, generator=draw, dtype=torch.float64)


def shift_both_ways(cases: list[Case]) -> list[dict[str, Any]]:
    """Shift this rank's tokens; return their numbers, what they became, and the gradient."""
    results = []
    for grid, dims, policy in cases:
        lay = WindowLayout.of(grid, make_groups(dims, dist.get_rank(), torch.device("cpu"), policy=policy))
        out: dict[str, Any] = {"tokens": lay.tokens_NT}
        for sign in (1, -1, 0):
            x = lay.to_windows(image(grid, 3, 0)).requires_grad_()
            y = lay.shift(x, sign)
            y.backward(lay.to_windows(image(grid, 3, 1)))
            out[f"y{sign}"], out[f"g{sign}"] = y.detach(), x.grad
        whole = lay.from_windows(out["y0"])
        out["own"] = torch.equal(lay.to_windows(whole), out["y0"])
        out["others"] = int(whole[0, 0].isnan().sum())
        results.append(out)
    return results


@cache
def shifted(world: int) -> list[list[dict[str, Any]]]:
    """Run all cases of a number of ranks at once; results by rank, then by case."""
    return run_distributed(shift_both_ways, world, [case for case in SHIFTS if case[1].world == world])


@pytest.mark.parametrize(
    "case", SHIFTS, ids=lambda case: f"{case[0].windows_y}x{case[0].windows_x}, {case[1]}"
)
def test_ranks_together_shift_like_roll(case: Case) -> None:
    """The tokens of all ranks, put together, are torch.roll of the image, and so is the gradient: bitwise."""
    grid, dims, _ = case
    number = [other for other in SHIFTS if other[1].world == dims.world].index(case)
    ranks = [results[number] for results in shifted(dims.world)]
    for sign in (1, -1, 0):
        for name, seed, way in (("y", 0, sign), ("g", 1, -sign)):
            together = gather_tokens([(out["tokens"], out[f"{name}{sign}"]) for out in ranks], grid)
            assert torch.equal(together, rolled(image(grid, 3, seed), grid, way)), f"{name} of {sign}"
    tokens = grid.rows * grid.cols
    assert all(out["own"] and out["others"] == tokens - tokens // dims.world for out in ranks)


# Attention

HEADS, HEAD_DIM = 12, 4
ATTENDING = [
    (WindowGrid(12, 12, 6, "separate"), ParallelDims()),
    (WindowGrid(12, 12, 6, "separate"), ParallelDims(sp=2)),
    (WindowGrid(12, 12, 6, "separate"), ParallelDims(sp=3)),
    (WindowGrid(18, 6, 6, "separate"), ParallelDims(wp_y=3)),
    (WindowGrid(12, 12, 6, "separate"), ParallelDims(sp=4)),
    (WindowGrid(12, 12, 6, "separate"), ParallelDims(wp_y=2, sp=2)),
    (WindowGrid(6, 12, 6, "separate"), ParallelDims(wp_x=2, sp=2)),
    (WindowGrid(12, 12, 6, "cyclic"), ParallelDims(wp_x=2, sp=2)),
    (WindowGrid(12, 12, 6, "separate"), ParallelDims(sp=12)),
    (WindowGrid(12, 12, 6, "separate"), ParallelDims(wp_y=2, sp=6)),
]


def attend(cases: list[tuple[WindowGrid, ParallelDims]]) -> list[dict[str, Any]]:
    """Attend in the shifted tiling and in the other; return token numbers, results and gradients."""
    results = []
    for grid, dims in cases:
        groups = make_groups(dims, dist.get_rank() if dist.is_initialized() else 0, torch.device("cpu"))
        lay = WindowLayout.of(grid, groups)
        out: dict[str, Any] = {"tokens": lay.tokens_NT}
        *qkv, g = (lay.to_windows(image(grid, HEADS * HEAD_DIM, seed)) for seed in range(4))
        for tiling in ("shifted", "straight"):
            leaves = [x.clone().requires_grad_() for x in qkv]
            heads = (x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(2, 3) for x in leaves)
            y = lay.attend(*heads, shifted=tiling == "shifted").transpose(2, 3).flatten(3)
            out[tiling] = [y.detach(), *torch.autograd.grad(y, leaves, g)]
        results.append(out)
    return results


@cache
def attended(world: int) -> list[list[dict[str, Any]]]:
    """Run all cases of a number of ranks at once; results by rank, then by case."""
    cases = [case for case in ATTENDING if case[1].world == world]
    return [attend(cases)] if world == 1 else run_distributed(attend, world, cases)


def masked(grid: WindowGrid, tiling: str) -> list[Tensor]:
    """Attend pixel by pixel: window after window, a mask in the last row of windows; [2, C, Y, X]."""
    *leaves, g = (image(grid, HEADS * HEAD_DIM, seed) for seed in range(4))
    leaves = [x.requires_grad_() for x in leaves]
    y, side = torch.zeros_like(g), grid.window
    upper = torch.arange(side * side) < side * side // 2
    apart = upper[:, None] != upper
    for row in range(0, grid.rows, side):
        for col in range(0, grid.cols, side):
            at = (..., slice(row, row + side), slice(col, col + side))
            q, k, v = (x[at].flatten(2).unflatten(1, (HEADS, HEAD_DIM)) for x in leaves)
            scores = torch.einsum("bhkq,bhkt->bhqt", q, k) / HEAD_DIM**0.5
            if tiling == "shifted" and grid.row_edge == "separate" and row + side == grid.rows:
                scores = scores.masked_fill(apart, float("-inf"))
            window = torch.einsum("bhqt,bhkt->bhkq", torch.softmax(scores, -1), v)
            y = torch.index_put(
                y,
                (
                    torch.arange(2)[:, None, None, None],
                    torch.arange(y.shape[1])[:, None, None],
                    torch.arange(row, row + side)[:, None],
                    torch.arange(col, col + side),
                ),
                window.flatten(1, 2).unflatten(2, (side, side)),
            )
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize(
    "case",
    ATTENDING,
    ids=lambda case: f"{case[0].windows_y}x{case[0].windows_x} {case[0].row_edge}, {case[1]}",
)
def test_ranks_together_attend_like_pixels_with_a_mask(case: tuple[WindowGrid, ParallelDims]) -> None:
    """Output and the gradients of q, k, v equal a naive masked attention (fp64: sums in another order)."""
    grid, dims = case
    number = [other for other in ATTENDING if other[1].world == dims.world].index(case)
    ranks = [results[number] for results in attended(dims.world)]
    for tiling in ("shifted", "straight"):
        for part, right in enumerate(masked(grid, tiling)):
            together = gather_tokens([(out["tokens"], out[tiling][part]) for out in ranks], grid)
            torch.testing.assert_close(together, right, rtol=1e-12, atol=1e-12)
