"""Standardise states and residuals, and undo it: what a model sees has mean 0 and standard deviation 1.

    state     (x - mean) / std
    residual  (x(t + interval) - x(t) - residual mean) / residual std      (AERIS, arXiv 2509.13523)

Channels are the last dim of every array; numpy arrays and torch tensors both serve, in their own precision.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from aeris.data.statistics import Statistics

Array = TypeVar("Array", NDArray[np.float32], NDArray[np.float64], torch.Tensor)


class Normalizer:
    """The statistics of one interval, applied.

    Raises:
        ValueError: there are no residual statistics for the interval; names those there are.
    """

    def __init__(self, statistics: Statistics, interval_h: int) -> None:
        if interval_h not in statistics.residual_std:
            there = ", ".join(f"{hours} h" for hours in sorted(statistics.residual_std))
            raise ValueError(f"the store has no residual statistics for {interval_h} h, only for {there}")
        self.interval_h = interval_h
        self._mean_C = statistics.mean_C
        self._std_C = statistics.std_C
        self._residual_mean_C = statistics.residual_mean[interval_h]
        self._residual_std_C = statistics.residual_std[interval_h]

    def standardise(self, x: Array) -> Array:
        """Turn states in physical units into standardised ones: [..., C]."""
        return (x - _like(self._mean_C, x)) / _like(self._std_C, x)

    def destandardise(self, x: Array) -> Array:
        """Turn standardised states into physical units: [..., C]."""
        return x * _like(self._std_C, x) + _like(self._mean_C, x)

    def standardise_residual(self, before: Array, after: Array) -> Array:
        """Return the standardised change between two states in physical units: [..., C]."""
        return self.departure(before, after) / _like(self._residual_std_C, before)

    def departure(self, before: Array, after: Array) -> Array:
        """Return how much more a state changed than on average, in physical units: [..., C]."""
        return after - before - _like(self._residual_mean_C, before)

    def standardise_pair(
        self, before: torch.Tensor, after: torch.Tensor, state: torch.Tensor, residual: torch.Tensor
    ) -> None:
        """Write `standardise(before)` and `standardise_residual(before, after)` to where they are wanted.

        The same numbers, without a temporary per operation; every tensor is [..., C].
        """
        torch.sub(before, _like(self._mean_C, before), out=state).div_(_like(self._std_C, before))
        torch.sub(after, before, out=residual)
        residual.sub_(_like(self._residual_mean_C, before)).div_(_like(self._residual_std_C, before))

    def apply_residual(self, before: Array, residual: Array) -> Array:
        """Add a standardised residual to a state in physical units: [..., C].

        Masked points do not stay at their fill value; a forecast sets them back.
        """
        return before + (
            residual * _like(self._residual_std_C, before) + _like(self._residual_mean_C, before)
        )


def _like(values_C: NDArray[np.float64], x: Array) -> Array:
    """Bring statistics to the kind, precision and device of `x`."""
    if isinstance(x, torch.Tensor):
        return torch.from_numpy(values_C).to(device=x.device, dtype=x.dtype)
    return values_C.astype(x.dtype)
