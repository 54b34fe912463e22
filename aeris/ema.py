"""Exponential moving average of the weights, with a half-life in images.

Source: Karras et al. 2022, arXiv 2206.00364.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aeris.config import EMAConfig
from swipe.sharding import local


class EMA:
    """Averaged copies of a model's parameters.

    Attributes:
        weights: averaged parameters by name, in the parameters' type, divided over ranks as they are.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        """Start from the model's weights."""
        self.config = config
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch: int) -> None:
        """Move towards the weights: w_ema = beta w_ema + (1 - beta) w, beta = 0.5 ** (batch / half-life).

        The half-life is at most `rampup_ratio` of the images seen, so that the first weights are soon
        forgotten.
        """
        halflife = min(self.config.halflife_images, self.config.rampup_ratio * images_seen)
        beta = 0.5 ** (batch / max(halflife, 1e-8))
        average = [local(value) for value in self.weights.values()]
        torch._foreach_lerp_(average, [local(p.detach()) for p in model.parameters()], 1.0 - beta)
