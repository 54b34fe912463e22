"""How far forecasts are from the truth: area-weighted scores of fields, and the channels they are made of.

RMSE, MAE and bias weigh a row by the cosine of its latitude (or another scheme of aeris.data.variables) and
leave out points at which either field is missing. Fields are in physical units and have Aurora's names.

Legend: C channels, Y rows, X cols.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeris.aurora import normalisation
from aeris.aurora.batch import Batch
from aeris.data.variables import ALIASES, LEVELLED, SURFACE, Channel, latitude_weights

Array = NDArray[np.float64]
Values = NDArray[np.floating[Any]]

SAME_DEG = 1e-4  # coordinates kept in float32 and float64 differ by less
_UNITS = dict((*SURFACE.values(), *LEVELLED.values()))
_LEVEL_AT_END = re.compile(r"(.*[^\d_.]|.*\d(?=_))_?(\d+(?:\.\d+)?)")


def channel(name: str, level_hpa: float | None = None) -> Channel:
    """Return Aurora's variable `name` (at a level) as a channel: 2t, z500; one we do not know has no unit."""
    variable = ALIASES.get(name, name)
    if level_hpa is not None and name in LEVELLED:
        variable = LEVELLED[name][0]
    between = "_" if name[-1].isdigit() else ""  # so2_850
    spelled = name if level_hpa is None else f"{name}{between}{level_hpa:g}"
    return Channel(spelled, variable, level_hpa, _UNITS.get(variable, ""))


def split_name(name: str) -> tuple[str, float | None]:
    """Split the name `channel` gives into variable and level: (z, 5) of z5, (so2, 850) of so2_850.

    A name with statistics of its own is of a surface variable: (pm10, None), (swh1, None). Of a variable that
    nobody knows, two digits or more at the end are a level.
    """
    match = _LEVEL_AT_END.fullmatch(name)
    if match is None:
        return name, None
    variable, level_hpa = match[1], float(match[2])
    if variable[-1].isdigit() or variable in LEVELLED:
        return variable, level_hpa
    if name in normalisation.scales:
        return name, None
    known = any(key.startswith(f"{variable}_") for key in normalisation.scales)
    return (variable, level_hpa) if known or level_hpa >= 10 else (name, None)


def variable_name(one: Channel) -> str:
    """Return Aurora's name of a channel's variable: z of z500."""
    return one.name if one.level_hpa is None else one.name.removesuffix(f"{one.level_hpa:g}").rstrip("_")


@dataclass(frozen=True)
class ChannelFields:
    """Everything a Batch says about one sample at one time, as plain arrays."""

    channels: tuple[Channel, ...]
    """Named as Aurora does: 2t, z500."""
    values_CYX: Values
    latitude_deg: Array
    """[Y], or [Y, X]."""
    longitude_deg: Array
    """[X], or [Y, X]."""
    time: np.datetime64

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the channels."""
        return tuple(one.name for one in self.channels)

    def select(self, names: Sequence[str]) -> ChannelFields:
        """Return the channels `names`, in that order."""
        places = [self.names.index(name) for name in names]
        kept = tuple(self.channels[place] for place in places)
        return replace(self, channels=kept, values_CYX=self.values_CYX[places])

    def rows(self, latitude_deg: Array) -> ChannelFields:
        """Return the rows at `latitude_deg`: a model whose patches do not tile the grid gives fewer.

        Raises:
            ValueError: there are no such rows.
        """
        have = self.latitude_deg
        count = len(latitude_deg)
        for first in range(len(have) - count + 1):
            part = slice(first, first + count)
            if have[part].shape == latitude_deg.shape and _same(have[part], latitude_deg):
                longitude = self.longitude_deg if self.longitude_deg.ndim == 1 else self.longitude_deg[part]
                cut = replace(self, values_CYX=self.values_CYX[:, part])
                return replace(cut, latitude_deg=have[part], longitude_deg=longitude)
        raise ValueError(
            f"fields on different grids: {count} rows of latitude from {_ends(latitude_deg)} "
            f"are not among {len(have)} rows from {_ends(have)}"
        )


def _same(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=0, atol=SAME_DEG))


def _ends(coordinate: Array) -> str:
    return f"{coordinate.flat[0]:g} to {coordinate.flat[-1]:g}"


def _array(x: Tensor) -> Values:
    """Return a tensor as float64 if it is that, else as float32."""
    return x.detach().to("cpu", x.dtype if x.dtype == torch.float64 else torch.float32).numpy()


def fields_of(batch: Batch, sample: int = 0) -> ChannelFields:
    """Return the newest time of sample number `sample` of a batch: every variable but the static ones."""
    levels = batch.metadata.atmos_levels
    channels, values = [], []
    for name, x_BTYX in batch.surf_vars.items():
        channels.append(channel(name))
        values.append(_array(x_BTYX[sample, -1]))
    for name, x_BTLYX in batch.atmos_vars.items():
        for place, level_hpa in enumerate(levels):
            channels.append(channel(name, float(level_hpa)))
            values.append(_array(x_BTLYX[sample, -1, place]))
    latitude, longitude = batch.metadata.lat.numpy(), batch.metadata.lon.numpy()
    time = np.datetime64(batch.metadata.time[sample], "s")
    return ChannelFields(tuple(channels), np.stack(values), latitude, longitude, time)


def matched(*fields: ChannelFields) -> tuple[ChannelFields, ...]:
    """Cut fields to the channels and rows that all have, channels in the order of the first.

    Raises:
        ValueError: no common channel, different times, or grids that are not one within the other.
    """
    first = fields[0]
    common = [name for name in first.names if all(name in other.names for other in fields)]
    if not common:
        raise ValueError("no variable in common: " + " | ".join(" ".join(one.names) for one in fields))
    fewest = min(fields, key=lambda one: len(one.latitude_deg)).latitude_deg
    cut = tuple(one.select(common).rows(fewest) for one in fields)
    for other in cut[1:]:
        if other.time != first.time:
            raise ValueError(f"fields of different times: {first.time} and {other.time}")
        if not _same(cut[0].longitude_deg, other.longitude_deg):
            ends = " and ".join(_ends(one.longitude_deg) for one in (cut[0], other))
            raise ValueError(f"fields on different grids: longitudes from {ends}")
    return cut


@overload
def area_weights(latitude_deg: Array, scheme: str = "cos") -> Array: ...


@overload
def area_weights(latitude_deg: Tensor, scheme: str = "cos") -> Tensor: ...


def area_weights(latitude_deg: Array | Tensor, scheme: str = "cos") -> Array | Tensor:
    """Return the weight of every row [Y, 1], or of every point [Y, X] of a grid without rows; mean 1.

    Float64; of a tensor a tensor, where it is.

    Raises:
        ValueError: an unknown scheme, or one that needs rows on a grid without them.
    """
    if isinstance(latitude_deg, Tensor):
        found = area_weights(latitude_deg.detach().to("cpu", torch.float64).numpy(), scheme)
        return torch.from_numpy(found).to(latitude_deg.device)
    if latitude_deg.ndim == 1:
        return latitude_weights(latitude_deg, scheme)[:, None]
    if scheme != "cos":
        raise ValueError(f"area weights {scheme!r} need rows of equal latitude: choose cos")
    weight_YX = np.cos(np.deg2rad(latitude_deg))
    return np.asarray(weight_YX / weight_YX.mean())


@dataclass(frozen=True)
class Errors:
    """Area means of one forecast's error, one number per channel [C], NaN where nothing is known."""

    mse: Array
    mae: Array
    bias: Array


def errors(forecast_CYX: Values, truth_CYX: Values, weight_YX: Array) -> Errors:
    """Return mean squared, mean absolute and mean error, weighted by area over the points both have."""
    sums = np.full((3, len(truth_CYX)), np.nan)
    for place, (forecast, truth) in enumerate(zip(forecast_CYX, truth_CYX, strict=True)):
        error_YX = forecast.astype(np.float64) - truth
        known_YX = np.isfinite(error_YX)
        weights = np.where(known_YX, weight_YX, 0.0)
        if known_YX.any():
            error_YX = np.where(known_YX, error_YX, 0.0)
            means = (error_YX**2, np.abs(error_YX), error_YX)
            sums[:, place] = [np.sum(weights * one) / weights.sum() for one in means]
    return Errors(*sums)
