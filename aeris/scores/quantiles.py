"""Quantiles of weighted samples.

With weights w that sum to 1 and the effective number of samples n = 1 / sum(w^2) (Kish), a quantile is the
mean of the sorted samples over the cumulated weight, taken under a box from ((n - 1) q) / n that is 1 / n
wide: type 7 of Hyndman and Fan (1996) where all weights are equal, as in numpy and xarray; for other
weights Akinshin (2023), arXiv 2304.07265.

Legend: n samples, P points, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def weighted_quantiles(
    values_nP: NDArray[np.floating], weight_n: Array, quantiles: Sequence[float]
) -> NDArray[np.float64]:
    """Return the quantiles [Q, P] of the samples at every point.

    Args:
        values_nP: samples, finite.
        weight_n: positive weights, any scale.
        quantiles: between 0 and 1.

    Raises:
        ValueError: a quantile outside 0 to 1, a weight that is not positive, or no sample.
    """
    if not len(values_nP) or not (weight_n > 0).all():
        raise ValueError(f"{len(values_nP)} samples whose weights must be positive")
    if not all(0 <= quantile <= 1 for quantile in quantiles):
        raise ValueError(f"quantiles {list(quantiles)} must lie between 0 and 1")
    weight = weight_n / weight_n.sum()
    count = 1.0 / (weight**2).sum()
    x_Pn = np.ascontiguousarray(values_nP.T)  # along samples everything is in one piece
    order_Pn = np.argsort(x_Pn, axis=1)
    x_Pn = np.take_along_axis(x_Pn, order_Pn, axis=1)
    step_Pn = np.diff(x_Pn, axis=1)
    edge_Pn = np.cumsum(weight[order_Pn], axis=1)[:, :-1]
    found = np.empty((len(quantiles), len(x_Pn)))
    for place, quantile in enumerate(quantiles):
        # the weight at or below each sample, as seen through the box; summed by parts
        below_Pn = np.clip((edge_Pn - (count - 1.0) * quantile / count) * count, 0.0, 1.0)
        found[place] = x_Pn[:, -1] - (step_Pn * below_Pn).sum(axis=1)
    return found
