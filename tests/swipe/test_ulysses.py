"""Attention shared by many ranks against attention in whole windows on one, and against DeepSpeed's."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from swipe.collectives import ALONE, Group, byte_log
from swipe.groups import make_groups
from swipe.layout import attention
from swipe.mesh import ParallelDims
from swipe.ulysses import to_heads, to_tokens
from tests.harness import run_distributed

BATCH, WINDOWS, HEADS, TOKENS, HEAD_DIM = 2, 3, 12, 24, 5
WORLDS = {1: 1, 2: 6, 3: 6, 4: 4, 6: 6}  # sp: how many ranks the test has; more are other groups


def whole() -> list[Tensor]:
    """Make q, k, v and a gradient of the output for whole windows, [B, N, H, T, K] fp64."""
    draw = torch.Generator().manual_seed(1)
    shape = BATCH, WINDOWS, HEADS, TOKENS, HEAD_DIM
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(4)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Write the formula down."""
    weights = torch.softmax(torch.einsum("...qk,...tk->...qt", q, k) / HEAD_DIM**0.5, dim=-1)
    return torch.einsum("...qt,...tk->...qk", weights, v)


# How a tensor [B, N, H, T, K] may lie in memory: as it is, by tokens, cut out of q k v, last dim first.
STRIDES = {
    "contiguous": lambda x: x.clone(),
    "by tokens": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part of qkv": lambda x: torch.cat((x, x + 1), dim=-1)[..., :HEAD_DIM],
    "last dim first": lambda x: x.movedim(4, 0).contiguous().movedim(0, 4),
}


def attend(sp: int) -> dict[str, Any]:
    """Attend with this rank's tokens; return outputs, gradients, bytes sent."""
    if sp == 1:
        group = ALONE
    else:
        dims = ParallelDims(dp=dist.get_world_size() // sp, sp=sp)
        group = make_groups(dims, dist.get_rank(), torch.device("cpu")).sequence
    *qkv, g = (x.tensor_split(sp, dim=3)[group.rank] for x in whole())
    out: dict[str, Any] = {"rank": group.rank}
    for name, lay in STRIDES.items():
        leaves = [lay(x).requires_grad_() for x in qkv]
        with byte_log() as log:
            heads = to_heads(*leaves, group)
            y = to_tokens(attention(*heads), group)
            grads = torch.autograd.grad(y, leaves, lay(g))
        out[name] = [y.detach(), *grads], sum(entry.bytes for entry in log if entry.operation == "all-to-all")
        out["heads"] = [x.detach() for x in heads]
    total = to_tokens(to_heads(*leaves, group)[0], group).sum()  # its gradient has no strides at all
    out["expanded"] = torch.autograd.grad(total, leaves[0])[0]
    return out


@cache
def attended(sp: int) -> list[dict[str, Any]]:
    """The ranks of the first group."""
    return [attend(1)] if sp == 1 else run_distributed(attend, WORLDS[sp], sp)


@pytest.mark.parametrize("sp", WORLDS)
def test_heads_are_dealt_and_tokens_collected(sp: int) -> None:
    """Rank r gets heads r H / sp and following of all tokens, bit for bit."""
    results = attended(sp)
    assert [out["rank"] for out in results] == list(range(sp)) * (max(WORLDS[sp], sp) // sp)
    for out in results:
        for part, full in zip(out["heads"], whole()):
            assert torch.equal(part, full.tensor_split(sp, dim=2)[out["rank"]])
        assert torch.equal(out["expanded"], torch.ones_like(out["expanded"]))


@pytest.mark.parametrize("sp", WORLDS)
@pytest.mark.parametrize("strides", STRIDES)
def test_attention_equals_that_of_one_rank(sp: int, strides: str) -> None:
    """Output and the gradients of q, k, v, whatever the strides (fp64: 1e-12, sums in another order)."""
    *qkv, g = whole()
    qkv = [x.requires_grad_() for x in qkv]
    y = plain(*qkv)
    expected = [y, *torch.autograd.grad(y, qkv, g)]
    results = attended(sp)
    for first in range(0, len(results), sp):
        parts = [out[strides][0] for out in results[first : first + sp]]
        for name, ours, right in zip("yqkv", zip(*parts), expected):
            torch.testing.assert_close(
                torch.cat(ours, dim=3), right, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("sp", WORLDS)
def test_bytes_are_four_tensors_each_way(sp: int) -> None:
    """q, k, v and the result forward, their gradients backward: 8 (sp - 1) / sp of a local tensor."""
    local = 8 * BATCH * WINDOWS * HEADS * TOKENS * HEAD_DIM // sp
    for out in attended(sp):
        assert {out[strides][1] for strides in STRIDES} == {8 * local * (sp - 1) // sp}


def test_heads_that_do_not_divide_are_refused() -> None:
    """The numbers are named."""
    q = torch.zeros(1, 1, 6, 2, 2)
    with pytest.raises(ValueError, match="6 heads cannot be divided over 4 ranks"):
        to_heads(q, q, q, Group("sp", (0, 1, 2, 3), 0))


# The original


def attend_both_ways() -> tuple[list[Tensor], list[Tensor]]:
    """Attend with DeepSpeed's layer and with ours; return output and gradients of each, [B, N, H, t, K]."""
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed("gloo")  # takes over what torch has set up
    sp = dist.get_world_size()
    group = Group("sp", tuple(range(sp)), dist.get_rank(), dist.group.WORLD)
    *qkv, g = (x.tensor_split(sp, dim=3)[group.rank] for x in whole())

    def in_windows(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    def theirs(*leaves: Tensor) -> Tensor:
        shared = DistributedAttention(in_windows, group.handle, scatter_idx=2, gather_idx=1)
        y_BTHK = shared(*(x.flatten(0, 1).transpose(1, 2).contiguous() for x in leaves), batch_dim_idx=0)
        return y_BTHK.transpose(1, 2).unflatten(0, (BATCH, WINDOWS))

    results = []
    for way in (theirs, lambda *leaves: to_tokens(attention(*to_heads(*leaves, group)), group)):
        leaves = [x.clone().requires_grad_() for x in qkv]
        y = way(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
    return results[0], results[1]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_the_original_does_the_same() -> None:
    """DeepSpeed's DistributedAttention on 4 ranks gives the same output and gradients (fp64, 1e-12).

    Its first start compiles something for a minute.
    """
    for theirs, ours in run_distributed(attend_both_ways, 4, timeout_s=300):
        for a, b in zip(theirs, ours):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
