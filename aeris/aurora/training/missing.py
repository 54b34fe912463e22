"""Values that data lack: filled with the mean of their variable where a model reads them, and counted.

A value that is not finite is missing. The location of a variable, zero in normalised units, says least about
it; zero in physical units would be 0 K or 0 Pa. In targets missing values stay: the loss leaves them out
(aeris/aurora/loss.py).

Shapes: B batch, T history, C levels, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aeris.aurora.batch import Batch
from aeris.aurora.normalisation import Stats, location


def fill(batch: Batch, surf_stats: Stats | None = None) -> Batch:
    """Return a batch whose missing values are the location of their variable, at their level.

    On the CPU, before the batch goes to a device: there it would wait to learn whether anything is missing.

    Args:
        surf_stats: location and scale of surface and static variables that replace the usual ones.

    Raises:
        ValueError: values are missing of a variable that has no location.
    """

    def surface(name: str, x: Tensor) -> Tensor:
        known = torch.isfinite(x)
        if bool(known.all()):
            return x
        return torch.where(
            known, x, surf_stats[name][0] if surf_stats and name in surf_stats else location(name)
        )

    def levelled(name: str, x_BTCHW: Tensor) -> Tensor:
        known = torch.isfinite(x_BTCHW)
        if bool(known.all()):
            return x_BTCHW
        found = [location(name, level) for level in batch.metadata.atmos_levels]
        return torch.where(known, x_BTCHW, x_BTCHW.new_tensor(found)[:, None, None])

    return replace(
        batch,
        surf_vars={name: surface(name, x) for name, x in batch.surf_vars.items()},
        static_vars={name: surface(name, x) for name, x in batch.static_vars.items()},
        atmos_vars={name: levelled(name, x) for name, x in batch.atmos_vars.items()},
    )


def count_missing(batch: Batch) -> tuple[int, int]:
    """Return how many values of a batch are missing, and how many it has; static variables not counted."""
    fields = [*batch.surf_vars.values(), *batch.atmos_vars.values()]
    return sum(int((~torch.isfinite(x)).sum()) for x in fields), sum(x.numel() for x in fields)
