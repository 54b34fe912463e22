"""Values that data lack: filled with the mean of their variable where a model reads them, and counted.

A value that is not finite is missing. The location of a variable, zero in normalised units, says least about
it; zero in physical units would be 0 K or 0 Pa. In targets missing values stay: the loss leaves them out
(aeris/aurora/loss.py).

Shapes: B batch, T history, C levels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aeris.aurora.batch import Batch
from aeris.aurora.normalisation import Stats, location


def fill(batch: Batch, surf_stats: Stats | None = None, keep: Collection[str] = ()) -> Batch:
    """Return a batch whose missing values are the location of their variable, at their level.

    On the CPU, before the batch goes to a device: there it would wait to learn whether anything is missing.

    Args:
        surf_stats: location and scale of surface and static variables that replace the usual ones.
        keep: surface variables that stay as they are: to a model that `reads_missing` of waves, the mean in
            place of a missing value would be a wave.

    Raises:
        ValueError: values are missing of a variable that has no location.
    """
    return replace(
        batch,
        surf_vars={n: x if n in keep else fill_surface(n, x, surf_stats) for n, x in batch.surf_vars.items()},
        static_vars={name: fill_surface(name, x, surf_stats) for name, x in batch.static_vars.items()},
        atmos_vars={n: fill_levels(n, x, batch.metadata.atmos_levels) for n, x in batch.atmos_vars.items()},
    )


def fill_surface(name: str, x: Tensor, surf_stats: Stats | None = None) -> Tensor:
    """Fill a surface or static variable [..., H, W]; the same tensor comes back if nothing is missing."""
    if _is_whole(x):
        return x
    mean = surf_stats[name][0] if surf_stats and name in surf_stats else location(name)
    return torch.where(torch.isfinite(x), x, mean)


def fill_levels(name: str, x: Tensor, levels: Sequence[float]) -> Tensor:
    """Fill a variable on levels [..., C, H, W]; the same tensor comes back if nothing is missing."""
    if _is_whole(x):
        return x
    means = x.new_tensor([location(name, level) for level in levels])
    return torch.where(torch.isfinite(x), x, means[:, None, None])


def count_missing(fields: Iterable[Tensor]) -> tuple[int, int]:
    """Return how many values of fields are missing, and how many there are."""
    missing = values = 0
    for x in fields:
        values += x.numel()
        missing += 0 if _is_whole(x) else x.numel() - int(torch.isfinite(x).count_nonzero())
    return missing, values


def _is_whole(x: Tensor) -> bool:
    """Say whether every value is finite; where the sum is (one fast pass), all are."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
