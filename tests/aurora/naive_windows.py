"""Attention in shifted windows as it is usually written, with roll, pad and mask: a slow oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aeris.aurora.attention import WindowAttention
from aeris.aurora.windows import Res, fitted


def naive(x_BND: Tensor, attention: WindowAttention, res: Res, window: Res, shift: Res, wrap: bool) -> Tensor:
    """Roll, pad, cut into windows, attend under a mask, and back; as slow and plain as it gets."""
    window, shift = fitted(res, window, shift)
    pads = [-r % w for r, w in zip(res, window)]
    fronts = [p // 2 for p in pads]
    region = torch.zeros(res, dtype=torch.int64)
    for dim, (r, w, s) in enumerate(zip(res, window, shift)):
        place = torch.arange(r)
        ids = (place >= r - w).long() + (place >= r - s).long() if s else torch.zeros(r, dtype=torch.int64)
        if dim == 2 and wrap:
            ids = ids.clamp(max=1)
        region = region * 3 + ids.view([-1 if dim == axis else 1 for axis in range(3)])
    padding = [q for f, p in reversed(list(zip(fronts, pads))) for q in (f, p - f)]
    region = F.pad(region, padding, value=99)

    def cut(t: Tensor) -> Tensor:
        for dim, w in enumerate(window):
            t = t.unflatten(1 + 2 * dim, (-1, w))
        return t.permute(0, 1, 3, 5, 2, 4, 6, *range(7, t.ndim)).flatten(4, 6).flatten(1, 3)

    x = x_BND.unflatten(1, res).roll([-s for s in shift], (1, 2, 3))
    x = cut(F.pad(x, [0, 0, *padding]))
    ids = cut(region[None])[0]
    seen = (ids[:, :, None] == ids[:, None, :]) | torch.tensor(not any(shift))
    qkv = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = qkv[0] @ qkv[1].transpose(-1, -2) * qkv.shape[-1] ** -0.5
    y = scores.masked_fill(~seen[None, :, None], -torch.inf).softmax(-1) @ qkv[2]
    y = attention.proj(y.transpose(2, 3).flatten(3))
    counts = [(r + p) // w for r, p, w in zip(res, pads, window)]
    y = y.unflatten(1, counts).unflatten(4, window).permute(0, 1, 4, 2, 5, 3, 6, 7)
    y = y.flatten(1, 2).flatten(2, 3).flatten(3, 4)
    y = y[:, fronts[0] :, fronts[1] :, fronts[2] :][:, : res[0], : res[1], : res[2]]
    return y.roll(shift, (1, 2, 3)).flatten(1, 3)
