"""AdamW with decay on matrices only, the learning rate by images seen, a stop where nothing is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aeris.config import OptimizerConfig
from aeris.offload import Offloaded
from swipe.collectives import AgreedError, Group, agree
from swipe.sharding import local


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make AdamW whose state exists from the start, so that a checkpoint loads in place.

    Matrices are decayed, vectors (norm weights, biases) are not. With `offload` it works in host memory.

    Raises:
        ValueError: it shall be DeepSpeed's, which is not there or cannot be used.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.offload != "none":
        return Offloaded(groups, config)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name the optimizer's tensors `<parameter>.<state>`: flat, so any cut of the model can load them."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()
    }


def learning_rate(images_seen: int, config: OptimizerConfig, images: int) -> float:
    """Return the learning rate of the step that starts at `images_seen` in a run of `images`.

    Linear warm-up from the floor; then constant or a cosine to the floor at `cosine_images` (0: at the end of
    the run); over the last `rampdown_images` a linear drop to the floor.
    """
    floor = config.lr_floor
    if images_seen < config.warmup_images:
        share = floor + (1.0 - floor) * (images_seen + 1) / (config.warmup_images + 1)
    elif config.shape == "constant":
        share = 1.0
    else:
        progress = min(1.0, images_seen / max(1, config.cosine_images or images))
        share = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    left = images - images_seen
    if left < config.rampdown_images:
        share = floor + (share - floor) * max(0, left) / config.rampdown_images
    return config.lr * share


def check_finite(model: nn.Module, world: Group, skipped_in_a_row: int, limit: int) -> None:
    """Stop a run that no longer learns; a collective call where more than `limit` steps were skipped.

    Raises:
        ValueError: more non-finite steps in a row than allowed; names the first bad tensor.
    """
    if skipped_in_a_row <= limit:
        return
    found = agree(world, first_bad_tensor(model))
    if found is None:
        raise AgreedError(f"{skipped_in_a_row} steps in a row had a non-finite loss with finite gradients")
    raise AgreedError(
        f"{skipped_in_a_row} non-finite steps in a row; the first bad tensor is {found}. Lower "
        "--optimizer.lr or --train.clip and run the same command: it goes on from the last checkpoint"
    )


def first_bad_tensor(model: nn.Module) -> str | None:
    """Name the first weight or gradient of this rank that is not finite."""
    for kind in ("weight", "gradient"):
        for name, p in model.named_parameters():
            tensor = p.detach() if kind == "weight" else p.grad
            bad = 0 if tensor is None else int((~torch.isfinite(local(tensor))).sum())
            if bad and tensor is not None:
                return f"the {kind} of {name} ({bad} of {local(tensor).numel()} values)"
    return None
