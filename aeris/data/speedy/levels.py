"""From the levels of a simulation to pressure levels, WeatherBench 2 names and our order of axes.

Shapes: n times, S sigma levels (top first), L pressure levels, Y rows (north first), X cols.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from aeris.data.variables import LEVELLED, STATIC, SURFACE

Floats = NDArray[Any]

GRAVITY = 9.81  # m s-2, and dry air below, as the model has them
GAS_CONSTANT = 287.0  # J kg-1 K-1
LAPSE_RATE = 0.0065  # K m-1, below the lowest level of the model [weather centres' usual reduction]
REFERENCE_PA = 1e5  # normalized_surface_pressure is in units of it
COMMENT = (
    "Simulation, not a reanalysis: results on it are a perfect-model experiment. Linear in ln p between "
    "sigma levels; below the lowest, 6.5 K/km for temperature and geopotential, others held constant."
)


def on_pressure_levels(
    raw: xr.Dataset, statics: dict[str, Floats], levels_hpa: tuple[int, ...]
) -> xr.Dataset:
    """Bring states of the model to pressure levels, our order of axes and WeatherBench 2 names, float32.

    Between sigma levels every variable is linear in ln p. Below the lowest one temperature rises by 6.5 K/km
    and geopotential follows hydrostatically (extrapolating their slope gave 129 K); above the highest the air
    is isothermal. Wind and humidity stay constant beyond both ends. Sea level pressure is reduced with the
    same lapse rate from the temperature at the surface.

    Args:
        raw: as `Simulation.advance` returns it.
        statics: as `Simulation.statics` returns it.
    """
    x = raw.sortby("level").sortby("lat", ascending=False).transpose("time", "level", "lat", "lon", ...)
    surface_YX = [np.asarray(statics[name], dtype=np.float64).T for name in statics]
    surface_YX = [field[:: -1 if raw.lat.values[0] < raw.lat.values[-1] else 1] for field in surface_YX]
    static = dict(zip(statics, surface_YX, strict=True))
    column = {
        name: x[key].values.astype(np.float64)
        for name, key in (
            *(("geopotential", "geopotential"), ("temperature", "temperature")),
            *(("u_component_of_wind", "u_wind"), ("v_component_of_wind", "v_wind")),
            ("specific_humidity", "specific_humidity"),
        )
    }
    column["specific_humidity"] = np.maximum(column["specific_humidity"], 0.0)
    log_sigma_S = np.log(x.level.values.astype(np.float64))
    ps_nYX = x["normalized_surface_pressure"].values.astype(np.float64) * REFERENCE_PA
    fields: dict[str, tuple[tuple[str, ...], Floats]] = {}
    levelled = interpolate(column, log_sigma_S, ps_nYX, levels_hpa)
    for name, x_nLYX in levelled.items():
        fields[name] = (("time", "level", "latitude", "longitude"), x_nLYX)
    lowest_t_nYX = column["temperature"][:, -1]
    surface = {
        "2m_temperature": x["surface_flux.t0"].values,
        "10m_u_component_of_wind": x["surface_flux.u0"].values,
        "10m_v_component_of_wind": x["surface_flux.v0"].values,
        "mean_sea_level_pressure": sea_level_pressure(
            ps_nYX, lowest_t_nYX, log_sigma_S[-1], static["geopotential_at_surface"]
        ),
        "surface_pressure": ps_nYX,
    }
    fields.update({name: (("time", "latitude", "longitude"), x_nYX) for name, x_nYX in surface.items()})
    fields.update({name: (("latitude", "longitude"), x_YX) for name, x_YX in static.items()})
    units = dict([*LEVELLED.values(), *SURFACE.values(), *STATIC.values()])
    return xr.Dataset(
        {name: (dims, v.astype(np.float32), {"units": units[name]}) for name, (dims, v) in fields.items()},
        {
            "time": x.time.values.astype("datetime64[ns]"),
            "level": ("level", np.array(levels_hpa, np.int32), {"units": "hPa"}),
            "latitude": ("latitude", x.lat.values, {"units": "degrees_north"}),
            "longitude": ("longitude", x.lon.values, {"units": "degrees_east"}),
        },
        {
            "Conventions": "CF-1.8",
            "title": "SPEEDY perfect-model experiment",
            "source": "SPEEDY (jcm 3.0.0), T31",
            "comment": COMMENT,
        },
    )


def interpolate(
    column: dict[str, Floats], log_sigma_S: Floats, ps_nYX: Floats, levels_hpa: tuple[int, ...]
) -> dict[str, Floats]:
    """Interpolate columns [n, S, Y, X] to pressure levels: float64 [n, L, Y, X] by variable, SI units.

    Args:
        column: needs `temperature`; `geopotential` too where it is to be extrapolated.
        log_sigma_S: logarithm of sigma = p / surface pressure, rising.
    """
    n, rows, cols = ps_nYX.shape
    found = {name: np.empty((n, len(levels_hpa), rows, cols)) for name in column}
    for place, level in enumerate(levels_hpa):
        at_nYX = np.log(level * 100.0 / ps_nYX)
        inside_nYX = np.clip(at_nYX, log_sigma_S[0], log_sigma_S[-1])
        above_nYX = np.clip(np.searchsorted(log_sigma_S, inside_nYX, "right") - 1, 0, len(log_sigma_S) - 2)
        width_nYX = np.diff(log_sigma_S)[above_nYX]
        share_nYX = (inside_nYX - log_sigma_S[above_nYX]) / width_nYX
        for name, x_nSYX in column.items():
            upper = np.take_along_axis(x_nSYX, above_nYX[:, None], 1)[:, 0]
            lower = np.take_along_axis(x_nSYX, above_nYX[:, None] + 1, 1)[:, 0]
            found[name][:, place] = upper + share_nYX * (lower - upper)
        beyond_nYX = at_nYX - inside_nYX  # positive below ground, negative above the top
        t_nYX = found["temperature"][:, place]
        warmer_nYX = t_nYX * np.exp(np.maximum(beyond_nYX, 0) * GAS_CONSTANT * LAPSE_RATE / GRAVITY)
        if "geopotential" in found:
            fall_nYX = (warmer_nYX - t_nYX) / LAPSE_RATE * GRAVITY
            rise_nYX = np.maximum(-beyond_nYX, 0) * GAS_CONSTANT * t_nYX
            found["geopotential"][:, place] += rise_nYX - fall_nYX
        found["temperature"][:, place] = warmer_nYX
    return found


def sea_level_pressure(ps_nYX: Floats, t_nYX: Floats, log_sigma: float, geopotential_YX: Floats) -> Floats:
    """Reduce surface pressure (Pa) to sea level with 6.5 K/km: float64 [n, Y, X], Pa.

    Args:
        t_nYX: temperature (K) at the lowest level of the model.
        log_sigma: ln(p / surface pressure) of that level.
        geopotential_YX: of the surface, m2 s-2.
    """
    power = GAS_CONSTANT * LAPSE_RATE / GRAVITY
    surface_t_nYX = t_nYX * np.exp(-log_sigma * power)
    warmer = 1 + LAPSE_RATE * geopotential_YX / GRAVITY / surface_t_nYX
    return np.asarray(ps_nYX * warmer ** (1 / power))
