"""RMSE and MAE of every variable and level at every step of a roll-out, summed up while a run goes on.

Both weigh points by the cosine of latitude. RMSE is the root of the mean square over samples and points, MAE
the mean. Points where the truth is missing are left out; so is, of its variable and level, a sample without
any known point, or with a prediction that is not finite: one diverged sample must not hide all others.

Shapes: B batch, K steps, C channels (a variable, at a level if it has levels), H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.training.errors import area_weights, channel
from swipe.collectives import Group, all_reduce


class Scores:
    """Sums of squared and absolute errors, added up sample by sample on each rank.

    Attributes:
        names: of the channels, 2t or z500.
        total: [K, C, 3] float64, equal on all ranks: squares, absolutes, samples. Up to the last `fold`.
    """

    def __init__(
        self,
        surf_vars: Sequence[str],
        atmos_vars: Sequence[str],
        levels: Sequence[float],
        steps: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start at zero."""
        self.names = [*surf_vars, *(channel(name, p).name for name in atmos_vars for p in levels)]
        self.surf_vars, self.atmos_vars = tuple(surf_vars), tuple(atmos_vars)
        self.total = torch.zeros(steps, len(self.names), 3, dtype=torch.float64, device=device)
        self._own = torch.zeros_like(self.total)  # of this rank since the last fold
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, step: int, prediction: Batch, target: Batch) -> None:
        """Add the errors of a prediction of the step number `step`; nothing waits for the device."""
        weight = self._area(prediction.metadata)
        rows = [
            _errors(getattr(prediction, kind)[name], getattr(target, kind)[name], weight)
            for kind in ("surf_vars", "atmos_vars")
            for name in getattr(self, kind)
        ]
        self._own[step] += torch.cat(rows)

    def fold(self, group: Group) -> None:
        """Add what all ranks have added since the last time to `total`; a collective call."""
        self.total += all_reduce(self._own, group, "scores")
        self._own = torch.zeros_like(self.total)

    def clear(self) -> None:
        """Start again."""
        self.total.zero_()
        self._own.zero_()

    def result(self) -> dict[str, dict[str, list[float | None]]]:
        """Return {"rmse" | "mae": {channel: a number per step}} of `total`; None where nothing is known."""
        squares, absolutes, count = self.total.cpu().unbind(-1)
        numbers = {"rmse": (squares / count).sqrt(), "mae": absolutes / count}
        return {
            kind: {
                name: [x if math.isfinite(x) else None for x in values_KC[:, place].tolist()]
                for place, name in enumerate(self.names)
            }
            for kind, values_KC in numbers.items()
        }

    def _area(self, where: Metadata) -> Tensor:
        """Return the weights of points, [H, 1] or [H, W]: made once for a grid."""
        key = where.grid_key
        if key not in self._weights:
            weight = torch.from_numpy(area_weights(where.lat.numpy()))
            self._weights = {key: weight.to(self.total.device, torch.float32)}
        return self._weights[key]


def _errors(x: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Return the sums of a variable [C, 3] of x, truth [B, 1, H, W] or [B, 1, C, H, W].

    What `aeris.aurora.training.errors.errors` says of one field, of many and where they are.
    """
    known = torch.isfinite(truth)
    apart = torch.where(known, x - torch.where(known, truth.to(x.dtype), 0.0), 0.0)
    weight = (weight * known).to(x.dtype)
    area = weight.sum((-2, -1))
    means = torch.stack([(weight * x).sum((-2, -1)) / area for x in (apart.square(), apart.abs())], dim=-1)
    found = torch.isfinite(means).all(-1, keepdim=True)  # not: nothing known (0 / 0), or a bad prediction
    sums = torch.cat((torch.where(found, means, 0.0), found.to(x.dtype)), dim=-1)  # [B, 1, 3] or [B, 1, C, 3]
    return sums.double().sum(0).reshape(-1, 3)
