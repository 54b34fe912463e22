"""Low-rank adapters (LoRA) on linear maps, one for all roll-out steps or one per step.

y += (x A' B') alpha / rank, with A [rank, in] and B [out, rank] = 0 at the start.
Source: Hu et al. 2021 (arXiv 2106.09685); modes as in microsoft-aurora 2.0.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aeris.aurora.config import AuroraConfig


class LoRA(nn.Module):
    """One adapter: lora_A [rank, in], lora_B [out, rank]."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        """Make an adapter that adds nothing yet."""
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        self.lora_B = nn.Parameter(torch.empty(outputs, rank))
        self.scaling = alpha / rank
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as torch initialises a Linear, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """Add the adapter's output for `x` to `base`, the output of the linear map it adapts."""
        low = nn.functional.linear(x, self.lora_A)
        if x.dtype != base.dtype or x.dtype != low.dtype:  # under autocast
            return base + nn.functional.linear(low, self.lora_B) * self.scaling
        flat = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), self.lora_B.t(), alpha=self.scaling)
        return flat.unflatten(0, base.shape[:-1])


class LoRARollout(nn.Module):
    """The adapters of one linear map, `loras`: one, or one per roll-out step in mode "all"."""

    def __init__(self, inputs: int, outputs: int, config: AuroraConfig) -> None:
        """Make the adapters a configuration asks for."""
        super().__init__()
        count = config.lora_steps if config.lora_mode == "all" else 1
        self.loras = nn.ModuleList(
            LoRA(inputs, outputs, config.lora_rank, config.lora_alpha) for _ in range(count)
        )

    def forward(self, x: Tensor, base: Tensor, adapter: int | None) -> Tensor:
        """`base` plus the output of the adapter of this number; None: `base` itself."""
        if adapter is None:
            return base
        result: Tensor = self.loras[adapter](x, base)
        return result


def check(config: AuroraConfig) -> None:
    """Refuse a configuration of adapters that cannot be built.

    Raises:
        ValueError: The rank or the number of steps is not positive, or a target or mode is unknown.
    """
    if config.lora_rank < 1 or config.lora_steps < 1:
        raise ValueError(
            f"lora_rank {config.lora_rank} and lora_steps {config.lora_steps} must be at least 1"
        )
    unknown = sorted(set(config.lora_targets) - {"qkv", "proj"})
    if unknown or (config.use_lora and not config.lora_targets):
        raise ValueError(f"lora_targets {config.lora_targets}: choose from 'qkv' and 'proj', at least one")
    if config.lora_mode not in ("single", "from_second", "all"):
        raise ValueError(f"lora_mode {config.lora_mode!r}: choose 'single', 'from_second' or 'all'")


def adapter_of(config: AuroraConfig, rollout_step: int) -> int | None:
    """The number of the adapter in use at a roll-out step (0 is the first); None when all are off.

    Raises:
        ValueError: The step is negative.
    """
    if rollout_step < 0:
        raise ValueError(f"rollout_step is {rollout_step}, but the first step of a roll-out is 0")
    if not config.use_lora or rollout_step >= config.lora_steps:
        return None
    if config.lora_mode == "from_second" and rollout_step == 0:
        return None
    return rollout_step if config.lora_mode == "all" else 0


def freeze_base(model: nn.Module) -> list[nn.Parameter]:
    """Leave only the adapters trainable; give them.

    Raises:
        ValueError: The model has no adapters.
    """
    adapters = [p for module in model.modules() if isinstance(module, LoRA) for p in module.parameters()]
    if not adapters:
        raise ValueError("the model has no adapters to train; build it with use_lora=True")
    model.requires_grad_(False)
    for parameter in adapters:
        parameter.requires_grad_(True)
    return adapters
