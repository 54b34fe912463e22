"""A number in place of missing values: operational sea surface temperature has one over land.

ERA5 marks land with missing values; HRES-T0 holds one constant there. It is found where nothing else can be
meant: one single impossible value, or one value on all land of the land-sea mask and hardly anywhere at sea
(sea ice makes a constant too, but at sea).

Shapes: n times, L levels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from aeris.data.layouts.source import Source
from aeris.data.plausible import LIMITS
from aeris.data.variables import MASKED, SURFACE

Field = NDArray[np.float32]
MAY_MISS = tuple(SURFACE[name][0] for name in MASKED)
ALL_LAND, ALL_SEA = 0.99, 0.01  # of the land-sea mask
NEARLY_ALL, HARDLY_ANY = 0.99, 0.01  # shares of points
FEW = 8  # land points that prove nothing


def find_placeholder(name: str, having: Sequence[Source], land: Callable[[], Field | None]) -> float | None:
    """Return the value that stands for missing ones in the first field; None where there is none.

    Args:
        land: reads the land-sea mask [Y, X], None if there is none.
    """
    if name not in MAY_MISS or not having:
        return None
    x_YX = having[0].read(name)[0, 0]
    if np.isnan(x_YX).any():
        return None
    limits = LIMITS[name]
    impossible = np.unique(x_YX[(x_YX < limits.low) | (x_YX > limits.high)])
    if impossible.size:
        return float(impossible[0]) if impossible.size == 1 else None
    land_YX = land() if name == "sea_surface_temperature" else None
    if land_YX is None or (land_YX > ALL_LAND).sum() < FEW:
        return None
    values, counts = np.unique(x_YX[land_YX > ALL_LAND], return_counts=True)
    value = values[np.argmax(counts)]
    on_land, at_sea = x_YX[land_YX > ALL_LAND] == value, x_YX[land_YX < ALL_SEA] == value
    found = on_land.mean() >= NEARLY_ALL and (not at_sea.size or at_sea.mean() <= HARDLY_ANY)
    return float(value) if found else None


def without_placeholder(x_nLYX: Field, value: float, land_YX: Field | None) -> Field:
    """Turn a placeholder into missing values, at sea only if no value there can be real."""
    missing = x_nLYX == np.float32(value)
    limits = LIMITS["sea_surface_temperature"]
    if land_YX is not None and limits.low <= value <= limits.high:
        missing &= land_YX > 0.0
    return np.where(missing, np.float32(np.nan), x_nLYX)
