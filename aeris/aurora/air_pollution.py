"""Aurora for air pollution: weather and 8 + 5 pollutants at 0.4 degrees, in steps of 12 hours.

Pollutants are spiky. What goes in is a learned mixture of the normalised value and its logarithm; what comes
out is a change of the value 12 or 24 hours before, so that a plume which stays is easy to predict:

    input(x)   = w₀ clamp(x, 0, 2.5) + w₁ (ln max(x, ε) − ln ε) / (−ln ε) + b,   ε = 10⁻⁴
    prediction = head + (1 + mod) · previous

All of it in normalised units. Source: microsoft/aurora 2.0.1, `AuroraAirPollution`; Bodnar et al. 2025.
Shapes: B batch, T history, C levels, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aeris.aurora.batch import Batch
from aeris.aurora.config import (
    ATMOS,
    ATMOS_POLLUTANTS,
    EMISSIONS,
    LEVELS_HPA,
    STATIC,
    SURF,
    SURF_POLLUTANTS,
    AuroraConfig,
    Published,
)
from aeris.aurora.model import Aurora

STEPS_BACK = {
    **dict.fromkeys(("pm1", "pm2p5", "pm10", "no", "tc_no", "no2", "tcno2"), 2),
    **dict.fromkeys(("co", "tcco", "so2", "tcso2", "go3", "gtco3"), 1),
}
"""How many steps of 12 hours before the prediction the state lies that it is a change of."""
SMALLEST, LARGEST = 1e-4, 2.5  # normalised; below and above it the input no longer follows the value
SO2_BOTTOM_HPA, SO2_LARGEST = 850, 1.0  # so2 blows up near the ground when adapters are on; normalised


class FeatureCombiner(nn.Module):
    """Learned mixture of a normalised pollutant and of its logarithm.

    `weight` (1, 2) and `bias` (1,) have the names and shapes of the published checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 2))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with the mean of both."""
        nn.init.constant_(self.weight, 0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a normalised field of any shape."""
        logarithm = 1 + x.clamp(min=SMALLEST).log() / -math.log(SMALLEST)
        return self.weight[0, 0] * x.clamp(0, LARGEST) + self.weight[0, 1] * logarithm + self.bias


def combiners(names: tuple[str, ...]) -> nn.ModuleDict:
    """Make a combiner for each variable, in the order of the published checkpoint."""
    return nn.ModuleDict({name: FeatureCombiner() for name in sorted(names)})


def add_previous(predicted: dict[str, Tensor], previous: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn changes into values and drop the modulations.

    Args:
        predicted: Heads, (B, 1, ...) each; a pollutant `<name>` comes with `<name>_mod`.
        previous: The model's normalised input, (B, T, ...) each.

    Returns:
        (B, 1, ...) each, in the order of `previous`.

    Raises:
        ValueError: If the history is too short.
    """
    values = {}
    for name, past in previous.items():
        values[name] = predicted[name]
        if name in STEPS_BACK and f"{name}_mod" in predicted:
            back = STEPS_BACK[name]
            if past.shape[1] < back:
                raise ValueError(
                    f"{name} is predicted as a change of the state {back} steps before, the history has "
                    f"{past.shape[1]}: give {back} states"
                )
            state = past[:, past.shape[1] - back].unsqueeze(1)
            values[name] = values[name] + (1 + predicted[f"{name}_mod"]) * state
    return values


class AuroraAirPollution(Aurora):
    """Aurora fine-tuned on CAMS analyses, 451 x 900, 13 levels, 12-hour steps.

    Takes any number of samples at once; the official package is right for one only.
    """

    default = AuroraConfig(
        surf_vars=(*SURF, *SURF_POLLUTANTS),
        static_vars=(*STATIC, *EMISSIONS),
        atmos_vars=(*ATMOS, *ATMOS_POLLUTANTS),
        patch_size=3,
        timestep_h=12.0,
        use_lora=True,
        level_condition=LEVELS_HPA,
        dynamic_vars=True,
        atmos_static_vars=True,
        separate_perceiver=ATMOS_POLLUTANTS,
        modulation_heads=(*SURF_POLLUTANTS, *ATMOS_POLLUTANTS),
        positive_surf_vars=SURF_POLLUTANTS,
        positive_atmos_vars=ATMOS_POLLUTANTS,
        simulate_indexing_bug=True,
    )
    published = Published("aurora-0.4-air-pollution.ckpt", "1764d5630a53d3d7a7d169ca335236fc343e4bfc")

    def __init__(self, config: AuroraConfig | None = None, **changes: Any) -> None:
        super().__init__(config, **changes)
        self.surf_feature_combiner = combiners(self.config.positive_surf_vars)
        self.atmos_feature_combiner = combiners(self.config.positive_atmos_vars)

    def _pre_encoder_hook(self, batch: Batch) -> Batch:
        """Feed mixtures of pollutants and their logarithms."""
        return replace(
            batch,
            surf_vars=_combined(batch.surf_vars, self.surf_feature_combiner),
            atmos_vars=_combined(batch.atmos_vars, self.atmos_feature_combiner),
        )

    def _post_decoder_hook(self, batch: Batch, pred: Batch) -> Batch:
        """Add the state before; with adapters on, keep so2 near the ground from blowing up."""
        surf_vars = add_previous(pred.surf_vars, batch.surf_vars)
        atmos_vars = add_previous(pred.atmos_vars, batch.atmos_vars)
        if self.config.use_lora and "so2" in atmos_vars:
            so2 = atmos_vars["so2"]
            near_ground = [level >= SO2_BOTTOM_HPA for level in pred.metadata.atmos_levels]
            limits = [SO2_LARGEST if low else math.inf for low in near_ground]
            atmos_vars["so2"] = torch.minimum(so2, so2.new_tensor(limits)[:, None, None])
        return replace(pred, surf_vars=surf_vars, atmos_vars=atmos_vars)


def _combined(fields: dict[str, Tensor], combiner: nn.ModuleDict) -> dict[str, Tensor]:
    return {name: combiner[name](x) if name in combiner else x for name, x in fields.items()}
