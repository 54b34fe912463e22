"""Chains of element-wise operations with hand-written gradients.

With them a block passes over its tokens as few times as it can. Each computes what its one-line naive
equivalent does (`tests/model/test_fused.py` holds them against it); plain tensor code through autograd would
save more tensors and walk over them twice as often. No kernels: any device, any type.

Shapes: B batch, N windows, T tokens per window, D width, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_norm(
    x_BNTD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float, out: torch.dtype
) -> Tensor:
    """Normalise, scale and shift: (x / sqrt(mean_D x^2 + eps)) * scale + shift, returned in type `out`.

    The mean is taken and the sums of the gradient are made in the type of `x_BNTD` (bf16 accumulates in
    fp32).
    """
    return _ModulatedNorm.apply(x_BNTD, scale_BD, shift_BD, eps, out)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float, out: torch.dtype
    ) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).to(
            torch.promote_types(x.dtype, torch.float32)
        )
        inverse = torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)
        scale = scale_BD.to(x.dtype)[:, None, None]
        ctx.save_for_backward(x, inverse, scale)
        ctx.vector_dtype = scale_BD.dtype
        return torch.addcmul(shift_BD.to(x.dtype)[:, None, None], x * inverse, scale).to(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, scale = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        unit = x * inverse
        product = grad * unit
        d_shift = grad.sum((1, 2)).to(ctx.vector_dtype)
        d_scale = product.sum((1, 2)).to(ctx.vector_dtype)
        # d/dx of x / rms(x) removes the part of the gradient along x.
        along = (
            torch.bmm(product.flatten(1, 2), scale.flatten(1).unsqueeze(-1)).view_as(inverse) / x.shape[-1]
        )
        d_x = (grad * scale).addcmul_(unit, along, value=-1).mul_(inverse)
        return d_x, d_scale, d_shift, None, None


def product(x: Tensor, weight: Tensor, cast: Tensor) -> Tensor:
    """Return x W', [..., in] -> [..., out], by a copy of the weight; the gradient goes to the weight itself.

    Args:
        x: features in the type of the copy.
        weight: W [out, in], a leaf in a wider type. Its gradient is added to its `.grad` in one pass.
        cast: the copy, which many microbatches share.
    """
    return _Product.apply(x, cast, weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, cast)
        ctx.weight = weight
        return F.linear(x, cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cast = ctx.saved_tensors
        d_x = grads[0] @ cast if ctx.needs_input_grad[0] else None
        d_weight = _outer(grads[0], x) if ctx.needs_input_grad[2] else None
        return d_x, None, _add(d_weight, ctx.weight)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight from those of its outputs and from its inputs: grad' x."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _add(gradient: Tensor | None, weight: Tensor) -> Tensor | None:
    """Add to the gradient a weight has, in its type; if it has none, return what autograd makes its first."""
    if gradient is None or weight.grad is None:
        return None if gradient is None else gradient.to(weight.dtype)
    weight.grad.add_(gradient)
    return None


def swiglu_down(gate_up: Tensor, cast: Tensor, weight: Tensor | None = None) -> Tensor:
    """Gate half of the features by the other half, and map down: (silu(gate) up) W', [..., 2m] -> [..., D].

    Only `gate_up` is kept for the backward pass, which makes the m gated features again: two passes over them
    for half of what a block would keep of its MLP.

    Args:
        gate_up: features, first those of the gate.
        cast: W [D, m] in their type.
        weight: whose copy `cast` is, if it is one outside of autograd: see `product`.
    """
    return _SwiGLUDown.apply(gate_up, cast, weight)


class _SwiGLUDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, cast: Tensor, weight: Tensor | None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up, cast)
        ctx.weight = weight
        return F.linear(F.silu(gate).mul_(up), cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, cast = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gated = grads[0] @ cast
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        if torch.compiler.is_compiling():  # `out` in a part of a tensor would break a compiled block in two
            d_up.copy_(d_gated * active)
        else:
            torch.mul(d_gated, active, out=d_up)
        d_weight = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_weight = _outer(grads[0], active.mul_(up))
        d_gate.copy_(torch.ops.aten.silu_backward(d_gated.mul_(up), gate))
        if ctx.weight is None:
            return d_gate_up, d_weight, None
        return d_gate_up, None, _add(d_weight, ctx.weight)


def split_heads(
    qkv_BNTE: Tensor, heads: int, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Take q, k, v apart, heads first, and rotate q and k: [B, N, T, 3 H K] -> three times [B, N, H, T, K].

    Args:
        qkv_BNTE: features in the order (q, k, v), head, feature.
        heads: H.
        rope: cos and sin [T, K/2] of `aeris.model.rope.rope_tables` in the type of `qkv_BNTE`, or None for no
            rotation.
    """
    if rope is None:
        q, k, v = qkv_BNTE.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).contiguous()
        return q, k, v
    cos, sin = torch.cat((rope[0], rope[0]), dim=-1), torch.cat((-rope[1], rope[1]), dim=-1)
    q, k, v = _SplitAndRotate.apply(qkv_BNTE, heads, cos, sin)
    return q, k, v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + K/2): x cos + swapped(x) sin, with full-width tables [T, K]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = (x.contiguous() for x in qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5))
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        d_q, d_k, d_v = grads
        batch, windows, heads, tokens, head_dim = d_q.shape
        d_qkv = d_q.new_empty(batch, windows, tokens, 3, heads, head_dim)
        # A rotation's gradient is the rotation by the opposite angle.
        for part, grad in enumerate((_rotate(d_q, cos, -sin), _rotate(d_k, cos, -sin), d_v)):
            d_qkv[:, :, :, part].copy_(grad.transpose(2, 3))
        return d_qkv.flatten(3), None, None, None
