"""Which values a variable can have on Earth: finds data whose unit is not what is said, or assumed.

Limits are generous enough for reanalyses, forecasts and simple models such as SPEEDY. A mean outside its
limits alone proves nothing (a dry box, a flat one); it does where another known unit would bring it inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aeris.data.units import GRAVITY_M_S2, alternatives, conversion
from aeris.data.variables import UNITS


@dataclass(frozen=True)
class Limits:
    """Of single values, and of what a field of them has, in our units."""

    low: float
    high: float
    mean_low: float = -math.inf
    mean_high: float = math.inf
    spread: float = 0.0
    """Smallest standard deviation of a field that is believed to be in another unit than it is said to be."""


TEMPERATURE = Limits(120.0, 350.0, spread=2.0)
WIND = Limits(-250.0, 250.0)
COVER = Limits(-0.1, 1.1, spread=0.03)
CLOUD = Limits(-0.1, 1.1, mean_low=0.02, spread=0.03)
RAIN = Limits(-0.001, 2.0, mean_low=1e-5, mean_high=0.05)
LIMITS: dict[str, Limits] = {
    "2m_temperature": TEMPERATURE,
    "2m_dewpoint_temperature": TEMPERATURE,
    "sea_surface_temperature": Limits(250.0, 330.0, spread=2.0),
    "temperature": TEMPERATURE,
    "10m_u_component_of_wind": WIND,
    "10m_v_component_of_wind": WIND,
    "u_component_of_wind": WIND,
    "v_component_of_wind": WIND,
    "vertical_velocity": Limits(-100.0, 100.0),
    "mean_sea_level_pressure": Limits(80e3, 120e3, spread=100.0),
    "surface_pressure": Limits(30e3, 120e3, spread=100.0),
    "total_column_water_vapour": Limits(-1.0, 200.0),
    "total_cloud_cover": CLOUD,
    "total_precipitation_6hr": RAIN,
    "total_precipitation_24hr": RAIN,
    "sea_ice_cover": COVER,
    "land_sea_mask": COVER,
    "relative_humidity": Limits(-0.5, 3.0, mean_low=0.03, spread=0.03),
    "specific_humidity": Limits(-1e-3, 0.06),
    "specific_cloud_liquid_water_content": Limits(-1e-3, 0.06),
    "specific_cloud_ice_water_content": Limits(-1e-3, 0.06),
    "geopotential_at_surface": Limits(-6e3, 90e3),
}
HUMID_HPA, HUMID_MEAN = 700.0, 5e-5  # below this level air is nowhere as dry as this, kg kg-1
HIGHEST_LAND = 10e3  # m2 s-2; the highest point of a global field is above it, even at T21


def expected_geopotential(level_hpa: float) -> float:
    """Return the geopotential (m2 s-2) of a pressure level in the standard atmosphere (ICAO, to 226 hPa)."""
    if level_hpa > 226.32:
        return GRAVITY_M_S2 * 44330.8 * (1.0 - (level_hpa / 1013.25) ** 0.190263)
    return GRAVITY_M_S2 * (11000.0 + 6341.6 * math.log(226.32 / level_hpa))


def complaint(
    variable: str, level_hpa: float | None, x: NDArray[np.floating], is_global: bool = False
) -> str | None:
    """Say what is not plausible about values in our units; None where nothing is, or there are none.

    Args:
        level_hpa: of a variable on levels.
        x: any shape; missing values are left out.
        is_global: the field covers the Earth.
    """
    x = x[np.isfinite(x)]
    if not x.size:
        return None
    low, high, mean = float(x.min()), float(x.max()), float(x.mean(dtype=np.float64))
    said = f"{low:.4g} to {high:.4g} with a mean of {mean:.4g}"
    if variable == "geopotential" and level_hpa:
        expected = expected_geopotential(level_hpa)
        off = abs(mean - expected) > max(4000.0, 0.15 * expected)
        return f"{said}, where a mean near {expected:.4g} is expected" if off else None
    limits = LIMITS.get(variable)
    if limits is None:
        return None
    if low < limits.low or high > limits.high:
        return f"{said}, where {limits.low:g} to {limits.high:g} is expected"
    mean_low = HUMID_MEAN if variable == "specific_humidity" and (level_hpa or 0) >= HUMID_HPA else None
    mean_low = limits.mean_low if mean_low is None else mean_low
    if not mean_low <= mean <= limits.mean_high:
        return f"{said}, where a mean of {mean_low:g} to {limits.mean_high:g} is expected"
    if variable == "geopotential_at_surface" and is_global and 0 < high < HIGHEST_LAND:
        return f"{said}, where the highest point is expected above {HIGHEST_LAND:g}"
    return None


def is_impossible(variable: str, level_hpa: float | None, x: NDArray[np.floating]) -> bool:
    """Say whether single values are beyond what can be, whatever the place or the weather."""
    x = x[np.isfinite(x)]
    if variable == "geopotential":
        return complaint(variable, level_hpa, x) is not None
    limits = LIMITS.get(variable)
    return bool(limits is not None and x.size and (x.min() < limits.low or x.max() > limits.high))


def likely_unit(
    variable: str, level_hpa: float | None, raw: NDArray[np.floating], is_global: bool = False
) -> str | None:
    """Return the unit in which raw values are plausible, the first that is; None if none is."""
    wanted, limits = UNITS[variable], LIMITS.get(variable, Limits(-math.inf, math.inf))
    for unit in (wanted, *alternatives(wanted)):
        factor, offset = conversion(unit, wanted)
        x = raw.astype(np.float64) * factor + offset
        if complaint(variable, level_hpa, x, is_global) is None and np.nanstd(x) >= limits.spread:
            return unit
    return None


def best_level(variable: str, levels_hpa: tuple[float, ...]) -> float | None:
    """Return the level at which a wrong unit shows best; None without levels."""
    if not levels_hpa:
        return None
    return min(levels_hpa) if variable == "geopotential" else max(levels_hpa)
