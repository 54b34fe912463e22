"""Steps of a block that store less for their backward pass than autograd would, and compute it again.

Per token of width D and hidden width 4D, a block stores 12 D numbers instead of 18: the GELU's output (4D) is
made again from its input, a norm and its product with the scale store their common input once, and in mixed
precision that input in its own 16 bits. Windows of several sizes are written to and read from one tensor,
without joining and splitting. Under torch.compile the plain formulas are used: the compiler chooses itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from aeris.aurora.windows import Group

EPS = 1e-5
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(gelu(h)), storing `h` alone."""
    if torch.compiler.is_compiling():
        return F.linear(F.gelu(h), weight, bias)
    result: Tensor = _GeluLinear.apply(h, weight, bias)
    return result


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        h, weight = ctx.saved_tensors
        needs_h, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.to(h.dtype)
        flat = grad.flatten(0, -2)
        to_bias = flat.sum(0).to(weight.dtype) if needs_bias else None
        # One wide tensor after the other: the hidden layer is the largest of a block.
        to_weight = (flat.t() @ F.gelu(h).flatten(0, -2)).to(weight.dtype) if needs_weight else None
        to_h = torch.ops.aten.gelu_backward(grad @ weight.to(h.dtype), h) if needs_h else None
        return to_h, to_weight, to_bias


def add_norm(x_BND: Tensor, y_BND: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x + layer_norm(y) scale + shift in the type of `x`; scale and shift [B, D], or by token [B, N, D]."""
    if scale.ndim == 2 and not torch.compiler.is_compiling():
        result: Tensor = _AddNorm.apply(x_BND, y_BND, scale.to(x_BND.dtype), shift.to(x_BND.dtype))
        return result
    if scale.ndim == 2:
        scale, shift = scale.unsqueeze(1), shift.unsqueeze(1)
    normed = F.layer_norm(y_BND.to(x_BND.dtype), (y_BND.shape[-1],), eps=EPS)
    return x_BND + (normed * scale + shift)


class _AddNorm(torch.autograd.Function):
    """One kernel norms, scales and shifts a sample; y is stored as it came."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, y_BND: Tensor, scale_BD: Tensor, shift_BD: Tensor) -> Tensor:
        width = [y_BND.shape[-1]]
        out, means, deviations = torch.empty_like(x_BND), [], []
        for i, y in enumerate(y_BND.to(x_BND.dtype)):
            normed, mean, deviation = torch.native_layer_norm(y, width, scale_BD[i], shift_BD[i], EPS)
            torch.add(x_BND[i], normed, out=out[i])
            means.append(mean)
            deviations.append(deviation)
        ctx.save_for_backward(y_BND, scale_BD, shift_BD, *means, *deviations)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y_BND, scale_BD, shift_BD, *statistics = ctx.saved_tensors
        batch, width = len(y_BND), [y_BND.shape[-1]]
        to_y, to_scale, to_shift = (
            torch.empty_like(y_BND),
            torch.empty_like(scale_BD),
            torch.empty_like(shift_BD),
        )
        for i in range(batch):
            to_y[i], to_scale[i], to_shift[i] = torch.ops.aten.native_layer_norm_backward(
                grad[i].contiguous(),
                y_BND[i].to(grad.dtype),
                width,
                statistics[i],
                statistics[batch + i],
                scale_BD[i],
                shift_BD[i],
                [True, True, True],
            )
        return grad, to_y, to_scale, to_shift


def attend_blocks(
    qkv_BNE: Tensor, bias_E: Tensor, groups: tuple[Group, ...], heads: int, attend: Attend
) -> Tensor:
    """Attention inside blocks that lie side by side: [B, N, D].

    Args:
        qkv_BNE: Queries, keys and values (E = 3 D), in the order of the plan of `groups`.
        bias_E: Query, key and value of a token of padding.
        groups: The blocks.
        heads: Heads; head by head inside each of the three.
        attend: (q, k, v) [blocks, H, n, K] -> [blocks, H, n, K].
    """
    if len(groups) > 1 and not torch.compiler.is_compiling():
        result: Tensor = _AttendBlocks.apply(qkv_BNE, bias_E, groups, heads, attend)
        return result
    sizes = [group.blocks * group.tokens for group in groups]
    outs = []
    for part, group in zip(qkv_BNE.split(sizes, dim=1), groups):
        out = attend(*_queries_keys_values(part, bias_E, group, heads))
        outs.append(out.transpose(1, 2).reshape(qkv_BNE.shape[0], part.shape[1], -1))
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]


def _queries_keys_values(
    qkv_BNE: Tensor, bias_E: Tensor, group: Group, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [blocks, H, tokens, K] of one group; keys and values with those of padding at the end."""
    blocks = qkv_BNE.shape[0] * group.blocks
    q, k, v = qkv_BNE.reshape(blocks, group.tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    if group.padding:
        _, k_pad, v_pad = bias_E.to(k.dtype).view(3, heads, 1, -1).expand(3, heads, group.padding, -1)
        k = torch.cat((k, k_pad.expand(blocks, -1, -1, -1)), dim=2)
        v = torch.cat((v, v_pad.expand(blocks, -1, -1, -1)), dim=2)
    return q, k, v


class _AttendBlocks(torch.autograd.Function):
    """Attention proper is a few percent of a block's work, so it is done again rather than kept."""

    @staticmethod
    def forward(
        ctx: Any, qkv_BNE: Tensor, bias_E: Tensor, groups: tuple[Group, ...], heads: int, attend: Attend
    ) -> Tensor:
        ctx.save_for_backward(qkv_BNE, bias_E)
        ctx.rest = groups, heads, attend
        batch, tokens, width = qkv_BNE.shape
        out = qkv_BNE.new_empty(batch, tokens, width // 3)
        start = 0
        for group in groups:
            stop = start + group.blocks * group.tokens
            one = attend(*_queries_keys_values(qkv_BNE[:, start:stop], bias_E, group, heads))
            _by_block(out[:, start:stop], group, heads).copy_(one.unflatten(0, (batch, -1)))
            start = stop
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        qkv_BNE, bias_E = ctx.saved_tensors
        groups, heads, attend = ctx.rest
        batch, _, width = qkv_BNE.shape
        result, to_bias = torch.empty_like(qkv_BNE), None
        start = 0
        for group in groups:
            stop = start + group.blocks * group.tokens
            with torch.enable_grad():
                parts = _queries_keys_values(qkv_BNE[:, start:stop].detach(), bias_E.detach(), group, heads)
                leaves = [part.detach().requires_grad_() for part in parts]
                out = attend(*leaves)
            out_grad = (
                grad[:, start:stop].reshape(-1, group.tokens, heads, width // 3 // heads).transpose(1, 2)
            )
            grads = torch.autograd.grad(out, leaves, out_grad)
            for which, one in zip(result[:, start:stop].chunk(3, dim=-1), grads):
                _by_block(which, group, heads).copy_(one[:, :, : group.tokens].unflatten(0, (batch, -1)))
            if group.padding and ctx.needs_input_grad[1]:
                pads = [one[:, :, group.tokens :].sum((0, 2)).flatten() for one in grads]
                to_bias = torch.cat(pads) + (0 if to_bias is None else to_bias)
            start = stop
        return result, None if to_bias is None else to_bias.to(bias_E.dtype), None, None, None


def _by_block(x_BND: Tensor, group: Group, heads: int) -> Tensor:
    """A view [B, blocks, H, tokens, K] of the tokens of one group."""
    return x_BND.unflatten(1, (group.blocks, group.tokens)).unflatten(-1, (heads, -1)).transpose(2, 3)
