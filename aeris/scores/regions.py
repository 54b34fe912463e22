"""Belts of latitude that scores are also given for: those of WeatherBench 2 (Rasp et al. 2024).

Legend: Y rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GLOBAL = "global"
REGIONS: dict[str, tuple[float, float]] = {
    GLOBAL: (-90.0, 90.0),
    "n-hem": (20.0, 90.0),
    "tropics": (-20.0, 20.0),
    "s-hem": (-90.0, -20.0),
}
"""Lowest and highest latitude of each, in degrees; rows on the ends belong to it."""


def rows_between(latitude_deg: Array, ends_deg: tuple[float, float]) -> NDArray[np.bool_]:
    """Return which rows [Y] lie between two latitudes, ends included (to 1e-6 degrees)."""
    low, high = ends_deg
    return np.asarray((latitude_deg >= low - 1e-6) & (latitude_deg <= high + 1e-6))


def region_weights(latitude_deg: Array, weight_Y: Array) -> dict[str, Array]:
    """Return the weight of each row [Y] by region: as given inside it, 0 elsewhere.

    The global one comes first and is always there; another is left out where the grid has no row in it.
    """
    found = {GLOBAL: weight_Y}
    for name, ends_deg in REGIONS.items():
        inside_Y = rows_between(latitude_deg, ends_deg)
        if name != GLOBAL and (weight_Y[inside_Y] > 0).any():
            found[name] = np.where(inside_Y, weight_Y, 0.0)
    return found
