"""Weights, gradients and optimizer state divided over the ranks that share a stage: torch's FSDP2 and HSDP.

The ranks of a stage (dp x wp x sp) hold the same weights and different tokens. Each keeps 1/shard of them in
fp32; a stage's weights are gathered once per step, at its beginning, and stay until its last backward pass,
whose gradients are averaged over all ranks of the stage in fp32 (or fp64) while the rest of it is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(
    model: nn.Module,
    parts: Iterable[nn.Module],
    mesh: DeviceMesh | None,
    narrow: Iterable[Sequence[nn.Module]] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Divide the weights of `model` over `mesh`, in place; without a mesh nothing happens.

    Args:
        parts: modules whose weights travel together, in the order of the forward pass: large enough for good
            messages, small enough that one is reduced while the next is computed. What is in none of them
            travels with the model itself.
        mesh: (shard,) or (replicate, shard) ranks.
        narrow: further modules, those that travel together in one entry, whose weights are used in `dtype`
            only: they are gathered in it, and are whole in no other type while a step runs.
        dtype: a type narrower than that of the weights.

    Gradients come out as the mean over all ranks of the mesh. Moves each step, for W bytes of weights and s
    shards: W (s - 1) / s gathered (half of it where the type is half as wide), W (s - 1) / s reduced in fp32,
    and 2 W / s times (r - 1) / r over r replicas.
    """
    if mesh is None:
        return
    # It warns that an output is a view. Nothing here works on tokens in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    own = next(model.parameters()).dtype
    wide = MixedPrecisionPolicy(
        reduce_dtype=torch.promote_types(own, torch.float32), cast_forward_inputs=False
    )
    travelling = [(list(modules), replace(wide, param_dtype=dtype)) for modules in narrow]
    travelling += [([module], wide) for module in (*parts, model)]
    for modules, policy in travelling:
        fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        module = modules[0]  # which speaks for all of them
        assert isinstance(module, FSDPModule), "fully_shard has made it one"
        # Weights stay gathered until their gradient is there. Left alone, the last backward pass would
        # prefetch some that an earlier microbatch's pass order names, after they were given back.
        module.set_modules_to_backward_prefetch([module])
        # Sum, then divide: gloo of torch 2.8 returns the sum when it is asked for an average.
        module.set_force_sum_reduction_for_comms(True)


def gather_ahead(model: nn.Module) -> None:
    """Begin to gather all weights of a stage that has run before; its passes wait for them where they come.

    Left to its first pass, a stage would wait for the input and only then gather, stage after stage.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard(async_op=True)


def last_backward(model: nn.Module, last: bool) -> None:
    """Say whether the next backward pass is the last of the step: only then are gradients reduced."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def drop_gathered(model: nn.Module) -> None:
    """Give gathered weights back to their shards, so that the next pass gathers what they are by then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a divided tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return a divided tensor whole; all ranks that share it must call it. Gathers over its mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicas(mesh: DeviceMesh | None) -> int:
    """Count the ranks that hold the same part of the weights."""
    return 1 if mesh is None or mesh.ndim == 1 else mesh.size(0)
