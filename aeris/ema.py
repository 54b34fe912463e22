"""Exponential moving average of the weights, with a half-life in images.

Source: Karras et al. 2022, arXiv 2206.00364.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from aeris.config import EMAConfig
from swipe.sharding import local


class EMA:
    """Averaged copies of a model's parameters.

    Attributes:
        weights: averaged parameters by name, in the parameters' type, divided over ranks as they are; in host
            memory with offload.
    """

    def __init__(
        self, model: nn.Module, config: EMAConfig, host: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Start from the model's weights.

        Args:
            host: copies of parameters in host memory that are current when `update` is called (those of
                `aeris.offload`): the averages of these are kept and computed there.
        """
        self.config, self._host = config, host or {}
        self.weights: dict[str, Tensor] = {
            name: p.detach().to("cpu", copy=True) if p in self._host else p.detach().clone()
            for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch: int) -> None:
        """Move towards the weights: w_ema = beta w_ema + (1 - beta) w, beta = 0.5 ** (batch / half-life).

        The half-life is at most `rampup_ratio` of the images seen, so that the first weights are soon
        forgotten.
        """
        halflife = min(self.config.halflife_images, self.config.rampup_ratio * images_seen)
        beta = 0.5 ** (batch / max(halflife, 1e-8))
        average = [local(value) for value in self.weights.values()]
        now = [self._host[p] if p in self._host else local(p.detach()) for p in model.parameters()]
        torch._foreach_lerp_(average, now, 1.0 - beta)
