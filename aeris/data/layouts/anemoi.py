"""The Zarr of anemoi: `data` [date, variable, member, cell], a list of names, coordinates per cell.

A regular grid is recovered from `field_shape`, or from the coordinates; a reduced one (o96, n320) has rows
of different lengths and is refused. Dates listed as missing are left out; computed forcings are ignored.

Shapes: n times, L levels, Y rows, X cols.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aeris.data.axes import grid_mapping, plain_axes
from aeris.data.layouts.channels import group_fields, levels_of, times_row
from aeris.data.layouts.gridded import ABOUT
from aeris.data.layouts.source import Source, Variable, some_times
from aeris.data.layouts.zarrs import out_of_reach, storage_options

LAYOUT = "anemoi Zarr"
CACHE_BYTES = 512 * 2**20  # of one block of times; a chunk holds all variables of a date
SAME_DEG = 1e-3


def open_group(path: str) -> Any:
    """Open a Zarr group, of version 2 or 3, for reading.

    Raises:
        ValueError: it cannot be reached or read.
    """
    if "://" not in path:
        try:
            return zarr.open_group(path, mode="r")
        except Exception as error:  # versions of zarr differ
            raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from None
    try:
        return zarr.open_group(path, mode="r", storage_options=storage_options(path))
    except Exception as error:
        raise out_of_reach(path, error) from None


def is_anemoi(path: str) -> bool:
    """Say whether a Zarr group has the layout."""
    if "://" in path:
        return "variables" in open_group(path).attrs
    for name, key in ((".zattrs", ""), ("zarr.json", "attributes")):
        file = Path(path) / name
        if file.is_file():
            attributes = json.loads(file.read_text())
            return "variables" in (attributes.get(key, {}) if key else attributes)
    return False


class Fields:
    """The fields of a group. The last block that was read is kept: its chunks hold all variables."""

    def __init__(
        self, path: str, places: NDArray[np.int64], used: Sequence[int], member: int, rows: int
    ) -> None:
        self._path, self._places, self._used = path, places, list(used)
        self._member, self._rows = member, rows
        self._group: Any = None
        self._block: tuple[int, int, NDArray[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open group and the block behind."""
        return {**self.__dict__, "_group": None, "_block": None}

    def read(self, variable: Variable, start: int, stop: int, levels_hpa: Sequence[float]) -> NDArray[Any]:
        """Read times `start` to `stop` of a variable: [n, L, Y, X], rows and cols as in the source."""
        stop = stop if variable.times.size else start + 1
        columns = [self._used.index(place) for place in variable.at(levels_hpa)]
        kept = self._block
        if kept is None or not kept[0] <= start < stop <= kept[1]:
            kept = (start, stop, self._read(start, stop, self._used))
            self._block = kept if kept[2].nbytes <= CACHE_BYTES else None
        x = kept[2][start - kept[0] : stop - kept[0], columns]
        return x.reshape(*x.shape[:2], self._rows, -1)

    def _read(self, start: int, stop: int, columns: list[int]) -> NDArray[Any]:
        if self._group is None:
            self._group = open_group(self._path)
        data = self._group["data"]
        low, high = int(self._places[start]), int(self._places[stop - 1]) + 1
        x = np.asarray(data[low:high, :, self._member])
        return x[self._places[start:stop] - low][:, columns]


def open_anemoi(path: str, member: int | None, told: Mapping[str, str]) -> Source:
    """Open a data set of anemoi.

    Raises:
        ValueError: its grid is reduced, or something is missing or contradicts itself.
    """
    group = open_group(path)
    attributes = dict(group.attrs)
    missing = [name for name in ("data", "dates", "latitudes", "longitudes") if name not in group]
    if missing:
        raise ValueError(f"it looks like a data set of anemoi, but has no {', '.join(missing)}")
    names = [str(name) for name in attributes["variables"]]
    data = group["data"]
    dates = np.asarray(group["dates"][:]).astype("datetime64[s]")
    if data.shape[:2] != (len(dates), len(names)):
        raise ValueError(f"data is {data.shape}, for {len(dates)} dates and {len(names)} variables")
    gone = np.array(attributes.get("missing_dates") or [], dtype="datetime64[s]")
    places = np.flatnonzero(~np.isin(dates, gone))
    times = dates[places]
    lat, lon = _grid(
        attributes, *(np.asarray(group[f"{one}itudes"][:], np.float64) for one in ("lat", "long"))
    )
    chosen = _member(member, data.shape[2])
    axes = plain_axes(times, lat, lon, member=chosen)
    variables, mapping = group_fields(names, times, told)
    axes = replace(axes, levels_hpa=np.array(levels_of(variables)))
    rows = [*grid_mapping(lat, axes, lon), times_row(times)]
    rows += [("missing dates", some_times(gone), "left out")] if gone.size else []
    rows += [("member", f"{data.shape[2]} of them", str(chosen))] if data.shape[2] > 1 else []
    used = [place for one in variables.values() for place in one.places]
    about = {key: str(attributes[key]) for key in (*ABOUT, "attribution", "licence") if key in attributes}
    fields = Fields(path, places, used, chosen, len(lat))
    return Source(path, LAYOUT, axes, variables, [*rows, *mapping], fields, about)


def _member(wanted: int | None, count: int) -> int:
    if wanted is None and count > 1:
        raise ValueError(f"choose one ensemble member with --member: there are 0 to {count - 1}")
    if wanted is not None and not 0 <= wanted < count:
        raise ValueError(f"--member {wanted} was given; the members are 0 to {count - 1}")
    return wanted or 0


def _grid(
    attributes: Mapping[str, Any], lat: NDArray[np.float64], lon: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recover latitudes [Y] and longitudes [X] of a regular grid from those of every cell.

    Raises:
        ValueError: the grid is not regular; names it.
    """
    shape = [int(n) for n in attributes.get("field_shape") or []]
    if len(shape) != 2:
        shape = [np.unique(np.round(x, 4)).size for x in (lat, lon)]
    name = attributes.get("resolution", "the grid")
    if shape[0] * shape[1] == lat.size:
        lat_YX, lon_YX = lat.reshape(shape), lon.reshape(shape)
        if np.ptp(lat_YX, axis=1).max() < SAME_DEG and np.ptp(lon_YX, axis=0).max() < SAME_DEG:
            return lat_YX[:, 0], lon_YX[0]
    raise ValueError(
        f"{name} is no regular grid of latitudes and longitudes ({lat.size} cells): interpolate it first, or "
        "take a data set on a regular grid"
    )
