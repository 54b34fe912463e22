"""What a forecast on disk holds and how it was made: plain data, the same for every file format.

Two forecasts are the same if their plans are: then a stopped one may go on, and
a finished one need not be repeated.

Shapes: I init times, J lead times, M members, C channels, Y rows, X columns, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel, channel

Field = NDArray[np.float32]

# CF standard names (version 86 of the table) by WeatherBench 2 name.
STANDARD_NAMES: dict[str, str] = {
    "2m_temperature": "air_temperature",
    "10m_u_component_of_wind": "eastward_wind",
    "10m_v_component_of_wind": "northward_wind",
    "mean_sea_level_pressure": "air_pressure_at_mean_sea_level",
    "surface_pressure": "surface_air_pressure",
    "total_column_water_vapour": "atmosphere_mass_content_of_water_vapor",
    "2m_dewpoint_temperature": "dew_point_temperature",
    "total_cloud_cover": "cloud_area_fraction",
    "total_precipitation_6hr": "lwe_thickness_of_precipitation_amount",
    "total_precipitation_24hr": "lwe_thickness_of_precipitation_amount",
    "sea_ice_cover": "sea_ice_area_fraction",
    "sea_surface_temperature": "sea_surface_temperature",
    "geopotential": "geopotential",
    "u_component_of_wind": "eastward_wind",
    "v_component_of_wind": "northward_wind",
    "temperature": "air_temperature",
    "specific_humidity": "specific_humidity",
    "vertical_velocity": "lagrangian_tendency_of_air_pressure",
    "relative_humidity": "relative_humidity",
    "specific_cloud_liquid_water_content": "mass_fraction_of_cloud_liquid_water_in_air",
    "specific_cloud_ice_water_content": "mass_fraction_of_cloud_ice_in_air",
}


class ForecastError(ValueError):
    """A forecast on disk is missing, unfinished, damaged, or another one than wanted."""


@dataclass(frozen=True)
class Variable:
    """One variable of a file: a channel, or the channels of all levels of one name."""

    name: str
    """WeatherBench 2 name."""
    short: str
    """Short name without a level: z, t2m."""
    units: str
    channels: tuple[int, ...]
    """Numbers of its channels."""
    levels: tuple[int, ...]
    """Places of its channels on the level axis; empty at the surface."""


@dataclass(frozen=True)
class ForecastPlan:
    """The contents of a forecast."""

    inits: tuple[str, ...]
    """Init times, ISO to the second, rising."""
    lead_h: tuple[int, ...]
    """Lead times in hours, rising."""
    members: int
    names: tuple[str, ...]
    """Channels, by the short names of aeris/data/variables.py."""
    latitude_deg: tuple[float, ...]
    longitude_deg: tuple[float, ...]
    made: Mapping[str, Any]
    """Everything else the numbers depend on (weights, seed, sampler ...), as text and numbers."""
    about: Mapping[str, Any]
    """What a reader wants to know beside that; no part of what makes two forecasts the same."""

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The channels in full."""
        return tuple(channel(name) for name in self.names)

    @property
    def levels_hpa(self) -> tuple[float, ...]:
        """Levels of any channel, rising."""
        return tuple(sorted({one.level_hpa for one in self.channels if one.level_hpa is not None}))

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Channels gathered into variables, in order of first appearance."""
        found: dict[str, list[int]] = {}
        for number, one in enumerate(self.channels):
            found.setdefault(one.variable, []).append(number)
        return tuple(self._variable(name, numbers) for name, numbers in found.items())

    def _variable(self, name: str, numbers: list[int]) -> Variable:
        first = self.channels[numbers[0]]
        levels_hpa = [self.channels[number].level_hpa for number in numbers]
        levels = tuple(self.levels_hpa.index(level) for level in levels_hpa if level is not None)
        short = first.name if not levels else first.name.removesuffix("hpa").rstrip("0123456789.")
        return Variable(name, short, first.units, tuple(numbers), levels)

    @property
    def member_bytes(self) -> int:
        """Bytes of one member at one init and lead time, uncompressed."""
        return 4 * len(self.names) * len(self.latitude_deg) * len(self.longitude_deg)

    @property
    def attrs(self) -> dict[str, Any]:
        """Everything a reader is told, with the units by channel."""
        return {**self.about, **self.made, "units": {one.name: one.units for one in self.channels}}

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "inits": list(self.inits),
            "lead_h": list(self.lead_h),
            "members": self.members,
            "channels": list(self.names),
            "latitude_deg": list(self.latitude_deg),
            "longitude_deg": list(self.longitude_deg),
            "made": dict(self.made),
            "about": dict(self.about),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ForecastPlan:
        """Read what `as_json` returned."""
        try:
            return cls(
                inits=tuple(values["inits"]),
                lead_h=tuple(values["lead_h"]),
                members=int(values["members"]),
                names=tuple(values["channels"]),
                latitude_deg=tuple(values["latitude_deg"]),
                longitude_deg=tuple(values["longitude_deg"]),
                made=values["made"],
                about=values["about"],
            )
        except (KeyError, TypeError) as error:
            raise ForecastError(f"its description lacks {error}") from None

    def differences(self, other: ForecastPlan) -> list[str]:
        """Say in what another plan differs: "seed: 0 there, 1 now" for each thing."""
        there, now = self.as_json(), other.as_json()
        pairs = {name: (there[name], now[name]) for name in there if name not in ("made", "about")}
        names = dict.fromkeys([*self.made, *other.made])
        pairs |= {name: (self.made.get(name), other.made.get(name)) for name in names}
        return [f"{name}: {_short(a)} there, {_short(b)} now" for name, (a, b) in pairs.items() if a != b]

    def gather(self, x_MCYX: Field, variable: Variable) -> Field:
        """Take one variable from all channels: [M, Y, X], or [M, L, Y, X] with NaN on levels it lacks."""
        if not variable.levels:
            return x_MCYX[:, variable.channels[0]]
        members, _, rows, cols = x_MCYX.shape
        field = np.full((members, len(self.levels_hpa), rows, cols), np.nan, dtype=np.float32)
        field[:, list(variable.levels)] = x_MCYX[:, list(variable.channels)]
        return field

    def scatter(self, field: Field, variable: Variable, x_MCYX: Field) -> None:
        """Put one variable, as `gather` returns it, back among all channels."""
        if variable.levels:
            x_MCYX[:, list(variable.channels)] = field[:, list(variable.levels)]
        else:
            x_MCYX[:, variable.channels[0]] = field


def _short(value: object, limit: int = 60) -> str:
    """Show a value; of a long list its length and ends."""
    if isinstance(value, list) and len(value) > 3:
        return f"{len(value)} from {value[0]} to {value[-1]}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
