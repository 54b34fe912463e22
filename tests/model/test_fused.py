"""The fused chains against their one-line equivalents, value and gradient, in float64 and bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from aeris.model.fused import modulated_norm, split_heads, swiglu_down
from aeris.model.rope import rope_tables


def same(ours: Callable, naive: Callable, inputs: list[torch.Tensor]) -> None:
    """Compare outputs and all input gradients to 1e-12."""
    results = []
    for function in (ours, naive):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out = torch.stack(out) if isinstance(out, tuple) else out
        weight = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).sin()
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_modulated_norm() -> None:
    """(x / rms) scale + shift."""
    x, scale, shift = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 4, 6), (2, 6), (2, 6)))

    def naive(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (6,), None, 1e-3) * scale[:, None, None] + shift[:, None, None]

    same(lambda *a: modulated_norm(*a, 1e-3, torch.float64), naive, [x, scale, shift])


def test_modulated_norm_accumulates_in_fp32() -> None:
    """A bf16 norm over many features is as exact as bf16 can say."""
    x = (torch.randn(1, 1, 50, 4096) * 3).bfloat16()
    one, zero = torch.ones(1, 4096), torch.zeros(1, 4096)
    y = modulated_norm(x, one, zero, 1e-6, torch.bfloat16)
    expected = F.rms_norm(x.double(), (4096,), None, 1e-6)
    assert ((y.double() - expected).abs() / expected.abs().clamp_min(1e-3)).max() < 2**-6
    assert y.dtype == torch.bfloat16


def test_swiglu_down() -> None:
    """(silu(gate) up) W'."""

    def naive(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(x[..., :5]) * x[..., 5:], weight)

    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 4, 10), (7, 5))]
    same(swiglu_down, naive, inputs)
    x, weight = inputs
    frozen = swiglu_down(x.requires_grad_(), weight.requires_grad_(False))
    assert torch.autograd.grad(frozen.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("rotated", [True, False])
def test_split_heads(rotated: bool) -> None:
    """Heads come first, q and k are rotated as complex numbers, v is not."""
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    rope = rope_tables(positions, 8, 100.0) if rotated else None

    def naive(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [p.reshape(2, 4, 6, 3, 8).transpose(2, 3) for p in x.chunk(3, dim=-1)]
        if rope is not None:
            turn = torch.complex(*rope)
            for n in (0, 1):
                z = torch.complex(parts[n][..., :4], parts[n][..., 4:]) * turn
                parts[n] = torch.cat((z.real, z.imag), dim=-1)
        return tuple(parts)

    same(lambda x: split_heads(x, 3, rope), naive, [torch.randn(2, 4, 6, 72, dtype=torch.float64)])


def test_rotary_scores_depend_on_the_distance_only() -> None:
    """q at p and k at p + d have the same product wherever p is: what a rotary embedding is for."""
    positions = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    q, k = torch.randn(2, 16, dtype=torch.float64)
    qkv = torch.cat((q, k, q)).expand(1, 1, 36, 48)
    rq, rk, _ = split_heads(qkv, 1, rope_tables(positions, 16, 100.0))
    scores = (rq[0, 0, 0] @ rk[0, 0, 0].T).reshape(6, 6, 6, 6)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[3, 2, 5, 5])
    torch.testing.assert_close(scores[4, 1, 2, 3], scores[3, 0, 1, 2])
    assert (scores[0, 0, 2, 3] - scores[0, 0, 3, 2]).abs() > 1e-3  # rows and columns turn apart


def test_a_head_that_cannot_be_rotated_is_refused() -> None:
    """Two axes need pairs of pairs."""
    with pytest.raises(ValueError, match="divisible by 4"):
        rope_tables(torch.zeros(1, 2), 6, 100.0)
