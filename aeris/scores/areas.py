"""Area means of the points of a channel that have a value.

Sums go along rows first and then over rows, never through a matrix product, so that their last bits depend
neither on the number of threads nor on how many rows are worked on at a time.

Legend: C channels, Y rows, X cols.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class AreaMean:
    """Area-weighted means over the valid points of each channel.

    Args:
        weight_Y: area weight of each row, any scale.
        mask_CYX: True where a channel has a value.
    """

    def __init__(self, weight_Y: Array, mask_CYX: NDArray[np.bool_]) -> None:
        self._mask_CYX = mask_CYX
        self._whole = tuple(bool(mask_YX.all()) for mask_YX in mask_CYX)
        total_C = (mask_CYX.sum(axis=-1) * weight_Y).sum(axis=-1)
        self._weight_CY = weight_Y / np.where(total_C > 0, total_C, np.nan)[:, None]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self._mask_CYX)

    def valid(self, channel: int) -> NDArray[np.bool_]:
        """Return where the channel has a value, [Y, X]."""
        return self._mask_CYX[channel]

    def points(self, channel: int) -> Array:
        """Return the weight of every point [Y, X], 0 where the channel has no value; the sum is 1."""
        return np.where(self._mask_CYX[channel], self._weight_CY[channel][:, None], 0.0)

    def of(self, channel: int, field: NDArray[np.floating]) -> Array:
        """Return the mean of `field` [..., Y, X] over the area where the channel has a value."""
        if not self._whole[channel]:
            field = np.where(self._mask_CYX[channel], field, 0.0)
        return np.asarray((field.sum(axis=-1, dtype=np.float64) * self._weight_CY[channel]).sum(axis=-1))
