"""Activation checkpointing: store less in the forward pass, compute it again in the backward pass.

A module that can be a region of recomputation has a class attribute `region` and an attribute
`checkpointing`, and calls `run` in its own forward. Nothing is wrapped: names and types of modules stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

POLICIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "blocks": ("block",),
    "lean-blocks": ("block", "tail"),
    "layers": ("layer",),
    "encoder-decoder+blocks": ("encoder", "decoder", "block"),
    "encoder-decoder+layers": ("encoder", "decoder", "layer"),
}
"""Regions that are computed again; a tail belongs to its block, otherwise none lies inside another."""

Result = TypeVar("Result")


def apply(model: nn.Module, policy: str) -> nn.Module:
    """Set what a model stores for its backward pass; give the model.

    Args:
        model: A model, or a part of one.
        policy: "none": store everything. "blocks": of each block of the U-Net store its input and the output
            of its MLP, so that the last and largest product is not done again. "lean-blocks": the input
            alone, for 9% more FLOPs. "layers": the input of each U-Net layer; less stored before the
            backward pass, more during it. With "encoder-decoder+" encoder and decoder are computed again
            too, part by part.

    Raises:
        ValueError: The policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown checkpointing policy {policy!r}; choose one of {', '.join(POLICIES)}")
    for module in model.modules():
        region = getattr(module, "region", None)
        if isinstance(region, str) and hasattr(module, "checkpointing"):
            vars(module)["checkpointing"] = region in POLICIES[policy]
            if hasattr(module, "tail"):
                vars(module)["tail"] = "tail" in POLICIES[policy]
    return model


def run(module: nn.Module, forward: Callable[..., Result], *args: Any) -> Result:
    """`forward(*args)`, computed again in the backward pass if the module's flag `checkpointing` asks for it.

    Recomputation ends as soon as the backward pass has what it needs (torch's early stop), and repeats the
    random numbers of the first time.
    """
    if not (getattr(module, "checkpointing", False) and torch.is_grad_enabled()):
        return forward(*args)
    result: Result = checkpoint(forward, *args, use_reentrant=False)
    return result
