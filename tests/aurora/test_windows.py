"""Windows without masks equal the usual roll - pad - mask - attend, on every kind of grid."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from aeris.aurora.attention import WindowAttention, fp16_safe_attention
from aeris.aurora.config import AuroraConfig
from aeris.aurora.reorder import merge, reorder, split
from aeris.aurora.windows import Group, Res, halved, natural, plan, plan_of_block
from tests.aurora.naive_windows import naive

WINDOW = (2, 6, 12)
GRIDS = [
    *((4, 8, 16), (4, 12, 24), (4, 9, 15), (4, 13, 31), (4, 5, 9), (4, 7, 12), (4, 6, 30), (2, 7, 14)),
    *((3, 8, 16), (5, 11, 25), (1, 18, 13)),
]


def make_attention(width: int = 16, heads: int = 2) -> WindowAttention:
    torch.manual_seed(0)
    return WindowAttention(width, heads, AuroraConfig(embed_dim=width)).double()


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 3, 6)])
@pytest.mark.parametrize("res", GRIDS)
def test_blocks_equal_masked_windows(res: Res, shift: Res, wrap: bool) -> None:
    attention, here = make_attention(), plan(res, WINDOW, shift, wrap)
    x = torch.randn(2, int(np.prod(res)), 16, dtype=torch.float64, requires_grad=True)
    expected = naive(x, attention, res, WINDOW, shift, wrap)
    y = attention(reorder(x, natural(res), here), here.groups, None)
    y = reorder(y, here, natural(res))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(y)
    inputs = [x, attention.qkv.weight, attention.qkv.bias, attention.proj.weight]
    grads = [torch.autograd.grad((one * weight).sum(), inputs) for one in (y, expected)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * float(theirs.abs().max()))


@pytest.mark.parametrize("res", [*GRIDS, (4, 45, 90)])
@pytest.mark.parametrize("block", [0, 1])
def test_plan_holds_every_token_once(res: Res, block: int) -> None:
    here = plan_of_block(res, WINDOW, block)
    assert sorted(here.order.tolist()) == list(range(int(np.prod(res))))
    assert sum(group.blocks * group.tokens for group in here.groups) == np.prod(res)
    assert [g.tokens for g in here.groups] == sorted((g.tokens for g in here.groups), reverse=True)
    assert here is plan_of_block(res, WINDOW, block)


def test_groups_of_the_quarter_degree_grid() -> None:
    assert plan((4, 180, 360), WINDOW, (0, 0, 0)).groups == (Group(1800, 144, 0),)
    shifted = plan((4, 180, 360), WINDOW, (1, 3, 6))
    assert {group.tokens for group in shifted.groups} == {144, 72, 36}  # inside; pole or latent edge; both
    assert not any(group.padding for group in shifted.groups)
    coarsest = plan((4, 45, 90), WINDOW, (0, 0, 0))
    assert all(group.tokens + group.padding == 144 for group in coarsest.groups)
    assert sum(group.blocks for group in coarsest.groups) == 2 * 8 * 8


def test_small_grid_is_one_window_without_padding() -> None:
    assert plan((4, 6, 12), WINDOW, (1, 3, 6)).groups[0].tokens <= 2 * 6 * 12
    assert plan((2, 5, 9), WINDOW, (1, 3, 6)).groups == (Group(1, 90, 0),)


@pytest.mark.parametrize(
    ("res", "window", "shift"),
    [((0, 4, 4), WINDOW, (0, 0, 0)), ((4, 8, 8), (2, 0, 4), (0, 0, 0)), ((4, 8, 8), (2, 4, 4), (0, 4, 0))],
)
def test_sizes_that_make_no_windows_are_refused(res: Res, window: Res, shift: Res) -> None:
    with pytest.raises(ValueError, match="sizes must be positive"):
        plan(res, window, shift)


@pytest.mark.parametrize("res", [(4, 8, 16), (4, 9, 15), (2, 7, 14)])
def test_merging_and_splitting_take_2_x_2_neighbours(res: Res) -> None:
    fine, coarse = plan(res, WINDOW, (1, 3, 6)), plan(halved(res), WINDOW, (0, 0, 0))
    x = torch.randn(2, int(np.prod(res)), 3, dtype=torch.float64, requires_grad=True)
    merged = reorder(merge(reorder(x, natural(res), fine), fine, coarse), coarse, natural(halved(res)))
    image = F.pad(x.unflatten(1, res), (0, 0, 0, res[2] % 2, 0, res[1] % 2))
    expected = image.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 3, 5, 6)
    assert torch.equal(merged, expected.flatten(4).flatten(1, 3))
    back = split(merge(x, natural(res), coarse), coarse, fine)
    assert torch.equal(reorder(back, fine, natural(res)), x)
    torch.autograd.gradcheck(lambda t: split(merge(t, natural(res), coarse), coarse, fine)[:, ::17], x[:1])


def test_reorder_moves_no_number_and_no_copy_within_one_order() -> None:
    here = plan((4, 8, 16), WINDOW, (1, 3, 6))
    x = torch.randn(1, 512, 4)
    assert reorder(x, here, here) is x
    assert torch.equal(reorder(x, natural((4, 8, 16)), here)[0], x[0, torch.from_numpy(here.order.copy())])


def test_fp16_safe_attention_survives_large_scores() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(fp16_safe_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    large = fp16_safe_attention((300 * q).half(), (300 * k).half(), v.half())
    assert large.isfinite().all()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        make_attention(16, 3)
