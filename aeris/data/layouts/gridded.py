"""Whatever xarray opens with named dimensions: NetCDF, Zarr in WeatherBench 2 layout, GRIB.

Shapes: n times, L levels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.axes import LATITUDE, LEAD, LEVEL, LONGITUDE, MEMBER, TIME, Axes, find_axes
from aeris.data.layouts.source import NO_TIMES, Source, Times, Variable, variable_unit
from aeris.data.variables import ALIASES, LEVELLED, UNITS

ABOUT = ("title", "source", "institution", "license", "comment")
_LEVELLED_NAMES = {name for name, _ in LEVELLED.values()}


class Dataset:
    """Fields of an xarray dataset, not yet loaded."""

    def __init__(self, raw: Any, axes: Axes, times: slice) -> None:
        self._raw, self._axes, self._times = raw, axes, times

    def read(self, variable: Variable, start: int, stop: int, levels_hpa: Sequence[float]) -> NDArray[Any]:
        """Read times `start` to `stop` of a variable: [n, L, Y, X], rows and cols as in the source."""
        array = self._raw[variable.raw]
        roles = {dim: role for role, dim in self._axes.dims.items()}
        leads = len(self._axes.leads_s) if self._axes.dims.get(LEAD) in array.dims else 1
        if variable.times.size:
            start, stop = start + self._times.start, stop + self._times.start
        first = start // leads
        picks: dict[Any, Any] = {}
        inside: Any = slice(None)
        for dim in array.dims:
            role = roles.get(str(dim))
            if role == TIME:
                picks[dim] = slice(first, -(-stop // leads))
            elif role == LEVEL:
                places = np.array(variable.at(levels_hpa), dtype=np.int64)
                picks[dim] = slice(int(places.min()), int(places.max()) + 1)
                inside = places - places.min()
            elif role == LEAD and TIME in self._axes.dims and self._axes.dims[TIME] in array.dims:
                picks[dim] = slice(None)
            elif role not in (LATITUDE, LONGITUDE):
                picks[dim] = self._axes.member if role == MEMBER else 0
        array = array.isel(picks)
        left = [roles[str(dim)] for dim in array.dims]
        order = [left.index(role) for role in (TIME, LEAD, LEVEL, LATITUDE, LONGITUDE) if role in left]
        x = np.asarray(array.values).transpose(order)
        if LEAD in left:
            x = x.reshape(-1, *x.shape[2:])[start - first * leads :][: stop - start]
        x = x if TIME in left else x[None]
        x = x if LEVEL in left else x[:, None]
        return x[:, inside]


def gridded(
    path: str,
    layout: str,
    raw: Any,
    member: int | None = None,
    as_is: Sequence[str] = (),
    told: Mapping[str, str] | None = None,
) -> Source:
    """Make a source of an opened dataset.

    Args:
        member: which ensemble member to read; None where there is only one.
        as_is: variables without a name of ours that are read too, under their own and in their own units.
        told: units the user states, by WeatherBench 2 name.

    Raises:
        ValueError: the dataset is not understood; names what, and what would be.
    """
    if "dayofyear" in raw.sizes:
        hours = " and hour" if "hour" in raw.sizes else ""
        raise ValueError(
            f"it is a climatology (by dayofyear{hours}), not weather at times: "
            "give it to aeris.evaluate --climatology"
        )
    axes = find_axes(raw, member)
    times, trimmed = _trim(raw, axes)
    variables, mapping = _find_variables(raw, axes, axes.times[times], as_is, told or {})
    about = {key: str(raw.attrs[key]) for key in ABOUT if key in raw.attrs}
    return Source(
        path, layout, axes, variables, axes.mapping(raw) + trimmed + mapping, Dataset(raw, axes, times), about
    )


def _trim(raw: Any, axes: Axes) -> tuple[slice, list[tuple[str, str, str]]]:
    """Leave out the times that ARCO ERA5 announces and does not hold: its axis runs from 1900 to 2050."""
    ends = [str(raw.attrs.get(f"valid_time_{end}", "")) for end in ("start", "stop")]
    if not all(ends) or not axes.times.size:
        return slice(0, len(axes.times)), []
    first = np.datetime64(ends[0]).astype("datetime64[s]")
    after = (np.datetime64(ends[1], "D") + 1).astype("datetime64[s]")
    start, stop = (int(n) for n in np.searchsorted(axes.times, [first, after]))
    if start == stop:
        raise ValueError(f"it has no time between valid_time_start {ends[0]} and valid_time_stop {ends[1]}")
    return slice(start, stop), [("valid times", f"{ends[0]} to {ends[1]}", f"{stop - start}")]


def _find_variables(
    raw: Any, axes: Axes, times: Times, as_is: Sequence[str], told: Mapping[str, str]
) -> tuple[dict[str, Variable], list[tuple[str, str, str]]]:
    """Match the variables of a dataset with ours; the others are listed as left out."""
    found: dict[str, Variable] = {}
    mapping, left_out = [], []
    for key in raw.data_vars:
        array = raw[key]
        own = {role: dim for role, dim in axes.dims.items() if dim in array.dims}
        name = _name(str(key), LEVEL in own)
        strange = [dim for dim in array.dims if dim not in own.values() and array.sizes[dim] > 1]
        leadless = len(axes.leads_s) > 1 and TIME in own and LEAD not in own
        fits = LATITUDE in own and LONGITUDE in own and not strange and not leadless
        taken = name in as_is and name not in UNITS
        if not fits or (not taken and (name not in UNITS or (name in _LEVELLED_NAMES) != (LEVEL in own))):
            left_out.append(str(key))
            continue
        if name in found:
            raise ValueError(f"{found[name].raw} and {key} are both {name}: remove one of them")
        levels_hpa = tuple(axes.levels_hpa.tolist()) if LEVEL in own else ()
        places = tuple(axes.level_order.tolist()) if LEVEL in own else (0,)
        moving = times if TIME in own or TIME not in axes.dims else NO_TIMES
        given = array.attrs.get("units")
        kept = f"{key} ({', '.join(map(str, array.dims))})"
        if taken:
            found[name] = Variable(str(key), levels_hpa, places, moving)
            mapping.append(("variable", kept, "taken as it is"))
            continue
        unit = variable_unit(name, str(key), None if given is None else str(given), told)
        found[name] = Variable(str(key), levels_hpa, places, moving, *unit[:3])
        stored = array.encoding.get("dtype")
        packed = f", {stored}" if stored is not None and stored != np.float32 else ""
        mapping.append(("variable", kept + packed, unit[3]))
    if not found:
        raise ValueError(f"none of its variables is known: {', '.join(left_out) or 'it has none'}")
    if left_out:
        mapping.append(("left out", ", ".join(left_out), ""))
    return found, mapping


def _name(key: str, on_levels: bool) -> str:
    """Translate a name into that of WeatherBench 2, or leave it."""
    name = ALIASES.get(key, ALIASES.get(key.lower(), key))
    return "geopotential_at_surface" if name == "geopotential" and not on_levels else name
