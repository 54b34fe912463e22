"""An input of made-up fields, for checks that need no data: smooth in space, in the range of the variables.

It is no weather. Two implementations of one model must still make the same of it.
"""

from __future__ import annotations

import zlib
from datetime import datetime

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from aeris.aurora import normalisation
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.config import LEVELS_HPA, AuroraConfig


def _smooth(name: str, seed: int, shape: tuple[int, ...], rows: int, cols: int) -> Tensor:
    """Return noise of about unit size [..., rows, cols] that varies over an eighth of the grid."""
    numbers = np.random.default_rng([seed, zlib.crc32(name.encode())])
    count = int(np.prod(shape))
    coarse = torch.from_numpy(numbers.standard_normal((1, count, 9, 17)))
    fine = interpolate(coarse, size=(rows, cols), mode="bicubic", align_corners=True)
    return fine.reshape(*shape, rows, cols)


def made_up_batch(config: AuroraConfig, rows: int, cols: int, time: datetime, seed: int = 0) -> Batch:
    """Return an input of a model: two times of every variable on a global grid with both poles.

    Variables that cannot be negative are moved to be positive. History: the second time is near the first.

    Raises:
        ValueError: a variable has no statistics.
    """
    levels = config.level_condition or LEVELS_HPA
    stats = config.stats
    surf, atmos = {}, {}
    history = config.max_history_size

    def field(name: str, shape: tuple[int, ...]) -> Tensor:
        now, change = (_smooth(name + word, seed, shape, rows, cols) for word in ("", "'"))
        return torch.stack([now + 0.1 * change * (number - history + 1) for number in range(history)], dim=1)

    for name in config.surf_vars:
        if name not in config.output_only_surf_vars:
            surf[name] = normalisation.unnormalise_surf(name, field(name, (1,)), stats).float()
    for name in config.atmos_vars:
        if name not in config.output_only_atmos_vars:
            x = normalisation.unnormalise_atmos(name, field(name, (1, len(levels))), levels).float()
            atmos[name] = x.clamp(min=0) if name in ("q", *config.positive_atmos_vars) else x
    static = {}
    for name in config.static_vars:
        x = _smooth(name, seed, (), rows, cols)
        static[name] = (
            torch.sigmoid(4 * x) if name == "lsm" else normalisation.unnormalise_surf(name, x, stats)
        ).float()
    lat = torch.linspace(90, -90, rows, dtype=torch.float64)
    lon = torch.arange(cols, dtype=torch.float64) * 360 / cols
    return Batch(surf, static, atmos, Metadata(lat, lon, (time,), tuple(levels)))
