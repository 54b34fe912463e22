"""From the grid of a source to the grid of a store: leaving out a pole row, averaging boxes.

Shapes: Y rows, X cols, K side of an averaging box.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import latitude_weights

POLE_DEG = 90.0


def rows_to_drop(latitude_deg: NDArray[np.float64]) -> int:
    """Return how many rows are dropped at the north: 1 for an odd number of rows with both poles, else 0.

    721 rows become 720, as for the published models, which drop row 0 (the north pole).
    """
    both_poles = bool(np.all(np.abs(np.abs(latitude_deg[[0, -1]]) - POLE_DEG) < 1e-3))
    return int(both_poles and len(latitude_deg) % 2 == 1)


def rows_gone(latitude_deg: NDArray[np.float64]) -> int:
    """Return how many rows a source left out at the north: 1 where just the pole is missing, else 0.

    AERIS's own files are so: even steps from 89.75 to -90 degrees.
    """
    steps = -np.diff(latitude_deg)
    even = bool(len(steps) and np.ptp(steps) < 1e-3)
    ends = np.array([latitude_deg[0] + steps.mean(), -latitude_deg[-1]]) if even else np.zeros(2)
    return int(np.all(np.abs(ends - POLE_DEG) < 1e-3))


def check_coarsening(rows: int, cols: int, factor: int) -> None:
    """Refuse boxes that do not tile the grid.

    Raises:
        ValueError: names the factors that would.
    """
    if factor < 1 or rows % factor or cols % factor:
        fits = [k for k in range(1, min(rows, cols) + 1) if rows % k == 0 and cols % k == 0]
        raise ValueError(
            f"boxes of {factor} x {factor} do not tile {rows} x {cols} points: "
            f"--coarsen can be {', '.join(map(str, fits))}"
        )


def coarsen(x_YX: NDArray[np.float32], latitude_deg: NDArray[np.float64], factor: int) -> NDArray[np.float32]:
    """Average boxes of K x K points (`factor`), weighted by the area of their cells.

    Float32 [..., Y, X] to [..., Y/K, X/K]. A box with a missing point is missing.
    """
    if factor == 1:
        return x_YX
    *lead, rows, cols = x_YX.shape
    weight_YK = latitude_weights(latitude_deg).reshape(rows // factor, factor)
    weight_YK = weight_YK / weight_YK.sum(axis=1, keepdims=True) / factor
    boxes = x_YX.reshape(*lead, rows // factor, factor, cols // factor, factor)
    return np.asarray(np.einsum("...ykxl,yk->...yx", boxes, weight_YK, dtype=np.float64), dtype=np.float32)


def coarsen_axis(degrees: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    """Return the middles of boxes of `factor` coordinates."""
    return np.asarray(degrees.reshape(-1, factor).mean(axis=1))
