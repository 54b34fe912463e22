"""How far fields are from each other: area-weighted scores against the truth, and point-wise differences.

RMSE, MAE and bias weigh a row by the cosine of its latitude (or another scheme of aeris.data.variables) and
leave out points at which either field is missing. Fields are in physical units and have Aurora's names.

Legend: C channels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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


def channel(name: str, level_hpa: float | None = None) -> Channel:
    """Return Aurora's variable `name` (at a level) as a channel: 2t, z500; one we do not know has no unit."""
    variable = ALIASES.get(name, name)
    if level_hpa is not None and name in LEVELLED:
        variable = LEVELLED[name][0]
    between = "_" if name[-1].isdigit() else ""  # so2_850
    spelled = name if level_hpa is None else f"{name}{between}{level_hpa:g}"
    return Channel(spelled, variable, level_hpa, _UNITS.get(variable, ""))


def variable_name(one: Channel) -> str:
    """Return Aurora's name of a channel's variable: z of z500."""
    return one.name if one.level_hpa is None else one.name.removesuffix(f"{one.level_hpa:g}").rstrip("_")


@dataclass(frozen=True)
class Fields:
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

    def select(self, names: Sequence[str]) -> Fields:
        """Return the channels `names`, in that order."""
        places = [self.names.index(name) for name in names]
        kept = tuple(self.channels[place] for place in places)
        return replace(self, channels=kept, values_CYX=self.values_CYX[places])

    def rows(self, latitude_deg: Array) -> Fields:
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


def fields_of(batch: Batch, sample: int = 0) -> Fields:
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
    return Fields(tuple(channels), np.stack(values), latitude, longitude, time)


def matched(*fields: Fields) -> tuple[Fields, ...]:
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


def area_weights(latitude_deg: Array, scheme: str = "cos") -> Array:
    """Return the weight of every row [Y, 1], or of every point [Y, X] of a grid without rows; mean 1.

    Raises:
        ValueError: an unknown scheme, or one that needs rows on a grid without them.
    """
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


@dataclass(frozen=True)
class Difference:
    """How two fields differ point by point, one number per channel [C]; not weighted by area."""

    largest: Array
    """Greatest absolute difference."""
    mean: Array
    """Mean absolute difference."""
    relative: Array
    """Mean absolute difference over the mean absolute value of the second."""
    normalised: Array
    """Greatest absolute difference over the scale the model normalises the variable with."""
    latitude_deg: Array
    """Where the difference is greatest."""
    longitude_deg: Array
    missing: NDArray[np.int64]
    """Points that exactly one of the two lacks."""


def scales(channels: Sequence[Channel], surf_stats: dict[str, tuple[float, float]]) -> Array:
    """Return what a variable is divided by in a model [C]; NaN where there are no statistics."""
    found = []
    for one in channels:
        name = variable_name(one)
        if one.level_hpa is None and name in surf_stats:
            found.append(surf_stats[name][1])
            continue
        try:
            found.append(normalisation.scale(name, one.level_hpa))
        except ValueError:
            found.append(np.nan)
    return np.array(found, dtype=np.float64)


def difference(one: Fields, other: Fields, scale_C: Array) -> Difference:
    """Compare matched fields point by point; `scale_C` is of `scales`."""
    count = len(one.channels)
    numbers = np.full((6, count), np.nan)
    missing = np.zeros(count, dtype=np.int64)
    shape = one.values_CYX.shape[1:]
    latitude, longitude = one.latitude_deg, one.longitude_deg
    if latitude.ndim == 1:
        latitude, longitude = np.broadcast_to(latitude[:, None], shape), np.broadcast_to(longitude, shape)
    for place in range(count):
        a_YX, b_YX = (x.values_CYX[place].astype(np.float64) for x in (one, other))
        apart_YX = np.abs(a_YX - b_YX)
        missing[place] = int((np.isfinite(a_YX) != np.isfinite(b_YX)).sum())
        if not np.isfinite(apart_YX).any():
            continue
        worst = np.unravel_index(int(np.nanargmax(apart_YX)), shape)
        most, mean = float(apart_YX[worst]), float(np.nanmean(apart_YX))
        size = float(np.nanmean(np.abs(b_YX)))
        relative = mean / size if size else (0.0 if not mean else np.inf)
        numbers[:, place] = (most, mean, relative, most / scale_C[place], latitude[worst], longitude[worst])
    return Difference(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], missing)
