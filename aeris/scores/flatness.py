"""How far a rank histogram is from flat, in one number.

A test by chi squared is not among them: it takes counts that do not depend on each other, and the points of a
field do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rank_outliers(ranks_S: Array) -> Array:
    """Return the share of truths outside the ensemble over that of a flat histogram, 2 / (M + 1).

    1 is right; more says that the ensemble is too narrow (or biased), less that it is too wide.

    Args:
        ranks_S: shares of the ranks 0..M along the last dim, with the sum 1.
    """
    return np.asarray((ranks_S[..., 0] + ranks_S[..., -1]) * ranks_S.shape[-1] / 2)


def rank_deviation(ranks_S: Array) -> Array:
    """Return the sum of |share - 1 / (M + 1)| over the ranks: 0 is flat (Delle Monache et al. 2006).

    With few init times it is above 0 for a calibrated ensemble too.
    """
    return np.asarray(np.abs(ranks_S - 1.0 / ranks_S.shape[-1]).sum(axis=-1))
