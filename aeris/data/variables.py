"""The names of weather variables, their units, and the weights that depend on them.

A *variable* has its WeatherBench 2 name (`geopotential`); a *channel* is one field of the model, a variable
at a level or at the surface, with a short name (`z500`, `t2m`). Units are those of WeatherBench 2, which are
SI. In short names `u10` and `v10` are the wind at 10 m; a level of 10 hPa is written `u10hpa`.

Shapes: C channels, Y rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Short name -> (WeatherBench 2 name, unit), in the order of channels in a store; `LAST` come at its end.
SURFACE: dict[str, tuple[str, str]] = {
    "t2m": ("2m_temperature", "K"),
    "u10": ("10m_u_component_of_wind", "m s-1"),
    "v10": ("10m_v_component_of_wind", "m s-1"),
    "msl": ("mean_sea_level_pressure", "Pa"),
    "sp": ("surface_pressure", "Pa"),
    "tcwv": ("total_column_water_vapour", "kg m-2"),
    "d2m": ("2m_dewpoint_temperature", "K"),
    "tcc": ("total_cloud_cover", "1"),
    "tp6h": ("total_precipitation_6hr", "m"),
    "tp24h": ("total_precipitation_24hr", "m"),
    "sic": ("sea_ice_cover", "1"),
    "sst": ("sea_surface_temperature", "K"),
}
LAST = ("sic", "sst")
LEVELLED: dict[str, tuple[str, str]] = {
    "z": ("geopotential", "m2 s-2"),
    "u": ("u_component_of_wind", "m s-1"),
    "v": ("v_component_of_wind", "m s-1"),
    "t": ("temperature", "K"),
    "q": ("specific_humidity", "kg kg-1"),
    "w": ("vertical_velocity", "Pa s-1"),
    "r": ("relative_humidity", "1"),
    "clwc": ("specific_cloud_liquid_water_content", "kg kg-1"),
    "ciwc": ("specific_cloud_ice_water_content", "kg kg-1"),
}
STATIC: dict[str, tuple[str, str]] = {
    "zs": ("geopotential_at_surface", "m2 s-2"),
    "lsm": ("land_sea_mask", "1"),
}
UNITS: dict[str, str] = dict([*SURFACE.values(), *LEVELLED.values(), *STATIC.values()])
"""WeatherBench 2 name -> unit."""
MASKED = ("sst", "sic")
"""Channels that may be missing on some points (land); everywhere else a missing value is an error."""

# Other names in use (GRIB short names, CDS, makani, anemoi) -> WeatherBench 2 name. `z` without levels is the
# surface's.
ALIASES: dict[str, str] = {
    **{short: name for short, (name, _) in {**SURFACE, **LEVELLED, **STATIC}.items()},
    "2t": "2m_temperature",
    "10u": "10m_u_component_of_wind",
    "10v": "10m_v_component_of_wind",
    "u10m": "10m_u_component_of_wind",
    "v10m": "10m_v_component_of_wind",
    "mslp": "mean_sea_level_pressure",
    "sea_level_pressure": "mean_sea_level_pressure",
    "2d": "2m_dewpoint_temperature",
    "siconc": "sea_ice_cover",
    "ci": "sea_ice_cover",
    "gh": "geopotential",
    "geopotential_height": "geopotential",
    "orography": "geopotential_at_surface",
    "surface_geopotential": "geopotential_at_surface",
    "total_column_water_vapor": "total_column_water_vapour",
    "total_precipitation_24h": "total_precipitation_24hr",
    "total_precipitation_6h": "total_precipitation_6hr",
}

AERIS_LEVELS_HPA = (50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000)
CHANNEL_SCHEMES = ("uniform", "pressure")
LATITUDE_SCHEMES = ("cell", "wb2", "cos", "train")

_LEVEL_NAME = re.compile(r"([a-z]+)_?(\d+(?:\.\d+)?)(hpa)?")
_FOREIGN_LEVEL_NAME = re.compile(r"(.+?)_?(\d+(?:\.\d+)?)(?:hpa)?", re.IGNORECASE)
_LEVELLED_NAMES = frozenset(name for name, _ in LEVELLED.values())


@dataclass(frozen=True)
class Channel:
    """One field of the model: a variable at a pressure level, or at the surface (`level_hpa` is None)."""

    name: str
    variable: str
    level_hpa: float | None
    units: str


def channel(name: str) -> Channel:
    """Look up a channel by its short name, such as `t2m` or `z500`.

    Raises:
        ValueError: no such channel; lists the names there are.
    """
    if name in SURFACE:
        return Channel(name, SURFACE[name][0], None, SURFACE[name][1])
    match = _LEVEL_NAME.fullmatch(name)
    if match and match[1] in LEVELLED:
        return channel_of(LEVELLED[match[1]][0], float(match[2]))
    raise ValueError(
        f"no channel is called {name!r}: surface channels are {' '.join(SURFACE)}; "
        f"the others are one of {' '.join(LEVELLED)} and a level in hPa, such as z500"
    )


def channel_of(variable: str, level_hpa: float | None) -> Channel:
    """Return the channel of a WeatherBench 2 variable at a level in hPa, or at the surface with None.

    Raises:
        ValueError: the variable is not known at a level, or not at the surface.
    """
    table = SURFACE if level_hpa is None else LEVELLED
    for short, (name, units) in table.items():
        if name == variable:
            if level_hpa is None:
                return Channel(short, variable, None, units)
            spelled = f"{short}{level_hpa:g}"
            return Channel(spelled + "hpa" * (spelled in SURFACE), variable, float(level_hpa), units)
    where = "at the surface" if level_hpa is None else "on pressure levels"
    raise ValueError(
        f"no variable {where} is called {variable!r}: known are {', '.join(n for n, _ in table.values())}"
    )


def field_called(spelled: str) -> tuple[str, float | None] | None:
    """Read another project's name of one field: (WeatherBench 2 name, level in hPa or None); None if unknown.

    `2t`, `t2m` and `2m_temperature` are one; `q_500`, `q500` and `specific_humidity_500` too. `z` without a
    level is the surface's.
    """
    name = ALIASES.get(spelled.lower(), spelled.lower())
    if name == "geopotential":
        return "geopotential_at_surface", None
    if name in UNITS:
        return None if name in _LEVELLED_NAMES else (name, None)
    match = _FOREIGN_LEVEL_NAME.fullmatch(spelled.lower())
    name = ALIASES.get(match[1], match[1]) if match else ""
    return (name, float(match[2])) if match and name in _LEVELLED_NAMES else None


def in_order(channels: Iterable[Channel]) -> tuple[Channel, ...]:
    """Sort channels into the order of a store: surface, then by variable with rising level, then `LAST`."""
    surface, levelled = list(SURFACE), [name for name, _ in LEVELLED.values()]

    def place(one: Channel) -> tuple[int, int, float]:
        if one.level_hpa is None:
            return (2 if one.name in LAST else 0, surface.index(one.name), 0.0)
        return (1, levelled.index(one.variable), one.level_hpa)

    return tuple(sorted(channels, key=place))


def aeris_channels(sst: bool) -> tuple[str, ...]:
    """Name the channels of the published models in order: 69 (6 h), or 70 with sea temperature (24 h)."""
    levelled = [f"{short}{level}" for short in ("z", "u", "v", "t", "q") for level in AERIS_LEVELS_HPA]
    return ("t2m", "u10", "v10", "msl", *levelled, *(("sst",) if sst else ()))


def channel_weights(names: Sequence[str], scheme: str = "uniform") -> NDArray[np.float64]:
    """Return the loss weight of every channel: float64 [C], sum 1.

    `uniform` gives every channel 1/C. `pressure` gives t2m 1, other surface channels 0.1 and a level p its
    share p / sum(p) of the levels of its variable, all divided by the total (GenCast, arXiv 2312.15796;
    AERIS, 2509.13523).

    Raises:
        ValueError: an unknown scheme or channel.
    """
    if scheme not in CHANNEL_SCHEMES:
        raise ValueError(
            f"channel weights {scheme!r} are not known: choose one of {', '.join(CHANNEL_SCHEMES)}"
        )
    channels = [channel(name) for name in names]
    if scheme == "uniform":
        return np.full(len(channels), 1.0 / len(channels))
    sum_hpa: dict[str, float] = {}
    for one in channels:
        sum_hpa[one.variable] = sum_hpa.get(one.variable, 0.0) + (one.level_hpa or 0.0)
    weight_C = np.array(
        [
            one.level_hpa / sum_hpa[one.variable]
            if one.level_hpa is not None
            else (1.0 if one.name == "t2m" else 0.1)
            for one in channels
        ]
    )
    return np.asarray(weight_C / weight_C.sum())


def latitude_weights(latitude_deg: NDArray[np.float64], scheme: str = "cell") -> NDArray[np.float64]:
    """Return the weight of every row: float64 [Y], mean 1, in the order of `latitude_deg`.

    `cell` is the true area of a row's cells and serves boxes as well as the globe. `wb2` stretches the end
    rows to the poles (WeatherBench 2). `cos` is cos(latitude); `train` is cos(latitude) + 0.01, the published
    training weight.

    Raises:
        ValueError: an unknown scheme, or latitudes that neither rise nor fall throughout.
    """
    if scheme not in LATITUDE_SCHEMES:
        raise ValueError(
            f"latitude weights {scheme!r} are not known: choose one of {', '.join(LATITUDE_SCHEMES)}"
        )
    phi = np.deg2rad(np.asarray(latitude_deg, dtype=np.float64))
    if scheme in ("cos", "train"):
        weight_Y = np.cos(phi) + (0.01 if scheme == "train" else 0.0)
        return np.asarray(weight_Y / weight_Y.mean())
    falling = phi.size > 1 and phi[0] > phi[1]
    phi = phi[::-1] if falling else phi
    if np.any(np.diff(phi) <= 0):
        raise ValueError("latitudes must rise or fall throughout to be weighted by cell area")
    inner = (phi[:-1] + phi[1:]) / 2
    south, north = -np.pi / 2, np.pi / 2
    if scheme == "cell" and phi.size > 1:
        south = max(south, phi[0] - (phi[1] - phi[0]) / 2)
        north = min(north, phi[-1] + (phi[-1] - phi[-2]) / 2)
    weight_Y = np.diff(np.sin(np.concatenate([[south], inner, [north]])))
    weight_Y = weight_Y[::-1] if falling else weight_Y
    return np.asarray(weight_Y / weight_Y.mean())
