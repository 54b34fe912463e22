"""The layout of one rank against plain tensor code on images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swipe.layout import WindowLayout, attention, written_out
from swipe.windows import WindowGrid, WindowShard


def layout(row_edge: str = "cyclic", rows: int = 8, cols: int = 12, window: int = 4) -> WindowLayout:
    """Make a small layout."""
    return WindowLayout(WindowShard.full(WindowGrid(rows, cols, window, row_edge)))


def test_windows_and_back() -> None:
    """Cutting and putting back is the identity, and a window holds its pixels row by row."""
    lay = layout()
    x = torch.randn(2, 3, 8, 12)
    w = lay.to_windows(x)
    assert w.shape == (2, 6, 16, 3)
    assert torch.equal(w[1, 4], x[1, :, 4:8, 4:8].permute(1, 2, 0).reshape(16, 3))
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
    """This layout is for one rank: it says so instead of attending wrongly."""
    grid = WindowGrid(8, 12, 4)
    with pytest.raises(ValueError, match="all 6 windows"):
        WindowLayout(WindowShard(grid, ((0, 0), (1, 1))))
