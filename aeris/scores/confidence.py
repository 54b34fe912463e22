"""How sure a ratio of two scores is, given few init times: a paired bootstrap of blocks of init times.

Both scores of the ratio are means over the same init times, which are drawn anew with replacement, in blocks
of neighbours (round the end of the list), as forecasts that overlap in time err alike. The interval holds the
middle 95 % of the ratios found.

Legend: I init times, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 1000
FEWEST = 5
"""Init times below which there is no interval."""
ENDS = (0.025, 0.975)


def block_length(inits: NDArray[np.datetime64], lead_h: Sequence[int]) -> int:
    """Return how many neighbouring init times overlap within the longest lead time, at most a quarter."""
    if len(inits) < 2:
        return 1
    apart_h = float(np.median(np.diff(np.sort(inits)).astype("timedelta64[s]").astype(float))) / 3600
    return int(np.clip(np.ceil(max(lead_h) / max(apart_h, 1e-9)), 1, max(1, len(inits) // 4)))


def draw_counts(inits: int, block: int, draws: int = DRAWS, seed: int = 0) -> Array:
    """Return how often each init time is drawn: [B, I], rows with the sum I."""
    rng = np.random.default_rng(seed)
    blocks = -(-inits // block)
    starts = rng.integers(0, inits, (draws, blocks))
    chosen = (starts[:, :, None] + np.arange(block)).reshape(draws, -1)[:, :inits] % inits
    counts = np.zeros((draws, inits))
    np.add.at(counts, (np.arange(draws)[:, None], chosen), 1.0)
    return counts


def ratio_interval(counts_BI: Array, above_I: Array, below_I: Array, root: bool = False) -> Array:
    """Return the ends of the interval of sum(above) / sum(below): [2, ...].

    Args:
        counts_BI: of `draw_counts`.
        above_I: score of each init time, [I, ...]; NaN is left out, in both.
        below_I: the other score, of the same shape.
        root: the ratio is of roots of the means (RMSE from squared errors).
    """
    used = np.isfinite(above_I) & np.isfinite(below_I)
    total = [
        np.einsum("bi,i...->b...", counts_BI, np.where(used, one, 0.0), optimize=False)
        for one in (above_I, below_I)
    ]
    ratio = np.divide(total[0], total[1], out=np.full_like(total[0], np.nan), where=total[1] > 0)
    ratio = np.sqrt(ratio) if root else ratio
    known = np.isfinite(ratio).all(axis=0) & (used.sum(axis=0) >= FEWEST)
    ends = np.quantile(np.where(known, ratio, 0.0), ENDS, axis=0)
    return np.where(known, ends, np.nan)
