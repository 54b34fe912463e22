"""Aurora for ocean waves: weather and HRES-WAM waves at 0.25 degrees, in steps of 6 hours.

Waves are absent on land, under ice and where there is no swell, and directions are angles. The network sees

    wind, dwi        → 10u_wave = −wind sin dwi, 10v_wave = −wind cos dwi     neutral wind over the sea
    height < 10⁻⁴ m  → NaN, with the period and the direction of that wave    no wave
    x                → x with 0 for NaN, and x_density = 1 where there is a value, 0 elsewhere
    angle            → angle_sin, angle_cos

and what it predicts is turned back: atan2, and NaN off the sea mask `wmb` or where sigmoid(density) < 1/2.
Source: microsoft/aurora 2.0.1, `AuroraWave`. Shapes: B batch, T history, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aeris.aurora.batch import Batch
from aeris.aurora.config import AuroraConfig, Published
from aeris.aurora.model import Aurora

COMPONENTS = {
    "swh": ("mwd", "mwp", "pp1d"),
    "shww": ("mdww", "mpww"),
    "shts": ("mdts", "mpts"),
    "swh1": ("mwd1", "mwp1"),
    "swh2": ("mwd2", "mwp2"),
}
"""Significant height of each kind of wave (all, wind sea, swell, two swells) and what is absent with it."""
WAVE_VARS = (
    *("swh", "mwd", "mwp", "pp1d", "shww", "mdww", "mpww", "shts", "mdts", "mpts"),
    *("swh1", "mwd1", "mwp1", "swh2", "mwd2", "mwp2", "wind", "10u_wave", "10v_wave"),
)
ANGLES = ("mwd", "mdww", "mdts", "mwd1", "mwd2")  # degrees, where the waves come from
SMALLEST_HEIGHT_M = 1e-4


def embedded_surf_vars(names: tuple[str, ...]) -> tuple[str, ...]:
    """List the channels that the network has for surface variables, in the order of the published model."""
    found: list[str] = []
    for name in names:
        found += [f"{name}_sin", f"{name}_cos"] if name in ANGLES else [name]
        if name in WAVE_VARS:
            found.append(f"{name}_density")
    return tuple(found)


def split_wind(surf_vars: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the direction `dwi` in degrees by the eastward and northward wind; `wind`, the speed, stays."""
    if "dwi" not in surf_vars or "wind" not in surf_vars:
        return surf_vars
    fields = dict(surf_vars)
    direction = torch.deg2rad(fields.pop("dwi"))
    fields["10u_wave"] = -fields["wind"] * torch.sin(direction)
    fields["10v_wave"] = -fields["wind"] * torch.cos(direction)
    return fields


def mark_absent(surf_vars: dict[str, Tensor], keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Put NaN where a kind of wave has no height, but not into the variables `keep`."""
    fields = dict(surf_vars)
    for height, others in COMPONENTS.items():
        if height in surf_vars:
            absent = surf_vars[height] < SMALLEST_HEIGHT_M
            for name in (height, *others):
                if name in fields and name not in keep:
                    fields[name] = fields[name].masked_fill(absent, math.nan)
    return fields


def embed(surf_vars: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make channels without NaN of normalised fields: densities, sines and cosines."""
    fields = dict(surf_vars)
    for name, x in surf_vars.items():
        if name in WAVE_VARS and f"{name}_density" not in surf_vars:
            fields[f"{name}_density"] = (~torch.isnan(x)).to(x.dtype)
            fields[name] = x.nan_to_num(0)
        if name in ANGLES and not (f"{name}_sin" in surf_vars and f"{name}_cos" in surf_vars):
            angle = torch.deg2rad(x)
            fields[f"{name}_sin"] = torch.sin(angle).nan_to_num(0)
            fields[f"{name}_cos"] = torch.cos(angle).nan_to_num(0)
            del fields[name]
    return fields


def unembed(channels: dict[str, Tensor], sea: Tensor) -> dict[str, Tensor]:
    """Undo `embed` on predictions.

    Args:
        channels: (B, 1, H, W) each.
        sea: True where there can be waves, (H, W).
    """
    fields = dict(channels)
    for name in ANGLES:
        if f"{name}_sin" in fields and f"{name}_cos" in fields:
            sine, cosine = fields.pop(f"{name}_sin"), fields.pop(f"{name}_cos")
            fields[name] = torch.rad2deg(torch.atan2(sine, cosine)) % 360
    for name in WAVE_VARS:
        if name in fields and f"{name}_density" in fields:
            # sigmoid(x) < 1/2
            absent = (fields.pop(f"{name}_density") < 0) | ~sea
            fields[name] = fields[name].masked_fill(absent, math.nan)
    return fields


class AuroraWave(Aurora):
    """Aurora fine-tuned on HRES-WAM waves, 721 x 1440, 6-hour steps.

    Batches hold NaN or a height of zero where there are no waves, and beside `wind` its direction `dwi`
    or its parts `10u_wave` and `10v_wave`. `config.surf_vars` has these names, the network has
    `embedded_surf_vars` of them.

    Args:
        config: What the model is made of; `default` if left out.
        keep_mpts: Keep the period of swell that is absent, as the official package does, which lists the
            swell's direction twice. Matters only where data have a period without swell.
        **changes: Fields of the configuration to replace.
    """

    default = AuroraConfig(
        surf_vars=("2t", "10u", "10v", "msl", *WAVE_VARS),
        static_vars=("lsm", "z", "slt", "wmb", "lat_mask"),
        use_lora=True,
        lora_mode="from_second",
        stabilise_level_agg=True,
    )
    published = Published("aurora-0.25-wave.ckpt", "74598e8c65d53a96077c08bb91acdfa5525340c9")
    reads_missing = (*WAVE_VARS, "dwi")

    def __init__(
        self, config: AuroraConfig | None = None, *, keep_mpts: bool = False, **changes: Any
    ) -> None:
        super().__init__(config, **changes)
        self.keep_mpts = keep_mpts

    def _network_config(self) -> AuroraConfig:
        return replace(self.config, surf_vars=embedded_surf_vars(self.config.surf_vars))

    def batch_transform_hook(self, batch: Batch) -> Batch:
        """Split the wind; in data, but not in predictions, mark waves of no height as absent. Idempotent."""
        surf_vars = split_wind(batch.surf_vars)
        if batch.metadata.rollout_step == 0:
            surf_vars = mark_absent(surf_vars, keep=("mpts",) if self.keep_mpts else ())
        return replace(batch, surf_vars=surf_vars)

    def _pre_encoder_hook(self, batch: Batch) -> Batch:
        """Feed densities, sines and cosines."""
        if "wmb" not in batch.static_vars:
            raise ValueError(
                "the wave model needs the static variable wmb, its sea mask; "
                f"the batch has {sorted(batch.static_vars)}"
            )
        return replace(batch, surf_vars=embed(batch.surf_vars))

    def _post_decoder_hook(self, batch: Batch, pred: Batch) -> Batch:
        """Turn channels back into variables, NaN where there are no waves."""
        return replace(pred, surf_vars=unembed(pred.surf_vars, pred.static_vars["wmb"] > 0))
