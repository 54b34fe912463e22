"""The norm of the gradient over all stages, and clipping by it.

Gradients are already means over the ranks of a stage (swipe/sharding.py). One small sum over all ranks gives
every rank the same bits, so all of them take the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from swipe.collectives import Group, all_reduce
from swipe.sharding import local


def global_norm(
    parameters: Iterable[nn.Parameter], world: Group, replicas: int, numbers: Iterable[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Return the L2 norm of the whole model's gradient, and the sums of `numbers` over all ranks.

    Crosses all axes, with one message of 8 bytes per number.

    Args:
        replicas: ranks that hold the same part of the weights, each of which counts it.
        numbers: scalars to be added over all ranks in the same message.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    squares = torch._foreach_norm(gradients) if gradients else []
    device = gradients[0].device if gradients else torch.device("cpu")
    own = (
        torch.stack([norm.double() for norm in squares]).square().sum()
        if squares
        else torch.zeros((), device=device)
    )
    packed = torch.stack([own.double() / replicas, *(number.double().to(device) for number in numbers)])
    summed = all_reduce(packed, world, "gradient norm and loss")
    return summed[0].sqrt(), summed[1:]


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale gradients so that their global norm is at most `largest`; moves nothing."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
