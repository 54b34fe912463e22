"""Climatologies as files: our own, and those of WeatherBench 2.

Ours is one HDF5 file: `mean`, `std` and `quantile/<q>` are [slot, channel, lat, lon], beside the slots, the
channels and the grid. Those of WeatherBench 2 (`1990-2019_6h_<grid>.zarr`, or NetCDF of the same layout) have
a variable for each mean, `<name>_std` where there are deviations (else they are NaN), with dims hour,
dayofyear, [level], lat and lon in any order and either direction. Both are read one slot at a time.

Legend: C channels, Y rows, X cols.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel, channel
from aeris.scores.climatology import About, Climatology
from aeris.scores.slots import YEAR_DAYS, Slot

Fields = NDArray[np.float32]
Array = NDArray[np.float64]

FORMAT, VERSION = "aeris-climatology", 1
_SAME_DEG = 1e-3


class Grid(Protocol):
    """What is needed of a store to lay a climatology beside it."""

    @property
    def latitude_deg(self) -> Array: ...  # noqa: D102

    @property
    def longitude_deg(self) -> Array: ...  # noqa: D102


def save(
    climatology: Climatology, path: Path, grid: Grid, advance: Callable[[], None] = lambda: None
) -> None:
    """Write a climatology in one go; it has its name only when it is whole.

    Args:
        climatology: what to write.
        path: HDF5 file; its directory is made.
        grid: where its points are.
        advance: called after every slot.
    """
    about, slots = climatology.about, sorted(climatology.slots)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.partial")
    shape = (len(slots), len(climatology.names), len(grid.latitude_deg), len(grid.longitude_deg))
    kinds = {"mean": "mean", "std": "std"} | {f"q{q:g}": f"quantile/{q:g}" for q in climatology.quantiles}
    with h5py.File(part, "w", locking=False) as file:
        file.attrs.update(format=FORMAT, version=VERSION, origin=about.origin)
        file.attrs.update(seasonal=about.seasonal, times_used=about.times_used)
        if about.period is not None:
            file.attrs["period"] = [str(time) for time in about.period]
        file["channel"] = list(climatology.names)
        file["latitude"], file["longitude"] = grid.latitude_deg, grid.longitude_deg
        file["slot"] = np.array(slots, dtype=np.int64)
        file["quantiles"] = np.array(climatology.quantiles, dtype=np.float64)
        for name in kinds.values():
            file.create_dataset(name, shape, "f4", chunks=(1, *shape[1:]))
        for place, slot in enumerate(slots):
            for kind, name in kinds.items():
                file[name][place] = climatology.field(kind, slot)
            advance()
    os.replace(part, path)


def open_climatology(path: str, truth: Grid, names: Sequence[str]) -> Climatology:
    """Open a climatology for the channels `names` on the grid of `truth`.

    Args:
        path: our file, or a Zarr store or NetCDF file in the layout of WeatherBench 2.
        truth: grid the fields are wanted on; rows the file has beside them are left out.
        names: short names of the channels, in the order wanted.

    Raises:
        ValueError: not a climatology, another grid, or a channel is missing; names it.
    """
    if not path.startswith("gs://") and not Path(path).exists():
        raise ValueError(f"there is no climatology {path}")
    file = _ours(path)
    return _open_wb2(path, truth, names) if file is None else _open_ours(file, path, truth, names)


def _ours(path: str) -> Any:
    """Return the file opened if it is one of ours, else None."""
    if not Path(path).is_file():
        return None
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError:  # not HDF5, truncated, or held open as NetCDF: xarray will say
        return None
    if file.attrs.get("format") == FORMAT:
        return file
    file.close()
    return None


def _open_ours(file: Any, path: str, truth: Grid, names: Sequence[str]) -> Climatology:
    if file.attrs["version"] != VERSION:
        raise ValueError(f"{path} is a climatology of version {file.attrs['version']}: build it again")
    there = list(file["channel"].asstr()[:])
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(f"the climatology {path} has no channel {missing[0]}; it has {' '.join(there)}")
    rows, cols = _places(path, file["latitude"][:], file["longitude"][:], truth)
    channels = [there.index(name) for name in names]
    slots = [Slot(*pair) for pair in file["slot"][:].tolist()]
    place = {slot: number for number, slot in enumerate(slots)}
    period = None
    if "period" in file.attrs:
        first, last = (np.datetime64(str(text), "s") for text in file.attrs["period"])
        period = (first, last)
    about = About(period, int(file.attrs["times_used"]), bool(file.attrs["seasonal"]), path)

    def fields(kind: str, slot: Slot) -> Fields:
        name = kind if kind in ("mean", "std") else f"quantile/{kind[1:]}"
        x_CYX: Fields = file[name][place[slot]]
        return x_CYX[channels][:, rows][:, :, cols]

    return Climatology(about, names, slots, file["quantiles"][:].tolist(), fields)


def _places(
    path: str, latitude_deg: Array, longitude_deg: Array, truth: Grid
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the numbers of the rows and cols of a file that are those of the truth."""
    found = []
    for what, there, wanted, circle in (
        ("latitude", latitude_deg, truth.latitude_deg, False),
        ("longitude", longitude_deg, truth.longitude_deg, True),
    ):
        apart = np.abs(wanted[:, None] - np.asarray(there, dtype=np.float64)[None])
        if circle:
            apart = np.minimum(apart % 360.0, 360.0 - apart % 360.0)
        nearest = apart.argmin(axis=1)
        off = apart[np.arange(len(wanted)), nearest] > _SAME_DEG
        if off.any():
            raise ValueError(
                f"the climatology {path} has no {what} {wanted[np.argmax(off)]:g}: it has {len(there)} from "
                f"{there[0]:g} to {there[-1]:g}, the truth {len(wanted)} from {wanted[0]:g} to {wanted[-1]:g}"
            )
        found.append(nearest)
    return found[0], found[1]


def _open_wb2(path: str, truth: Grid, names: Sequence[str]) -> Climatology:
    import xarray

    try:
        if path.startswith("gs://"):
            data = xarray.open_zarr(path, chunks=None)
        elif Path(path).is_dir():
            data = xarray.open_zarr(path, chunks=None, consolidated=(Path(path) / ".zmetadata").exists())
        else:
            data = xarray.open_dataset(path)
    except ImportError:
        raise ValueError(f"{path} needs gcsfs: pip install gcsfs") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a climatology that can be read: {reason}") from None
    absent = [name for name in ("hour", "dayofyear") if name not in data.dims]
    if absent or len(data["dayofyear"]) not in (YEAR_DAYS - 1, YEAR_DAYS):
        sizes = ", ".join(f"{name} {size}" for name, size in data.sizes.items())
        raise ValueError(f"{path} is not a climatology by hour and day of year: it has the dims {sizes}")
    lat, lon = _name_of(data, path, "latitude", "lat"), _name_of(data, path, "longitude", "lon")
    rows, cols = _places(path, data[lat].values, data[lon].values, truth)
    columns = [_select(data, path, channel(name)) for name in names]
    hours, days = data["hour"].values.tolist(), data["dayofyear"].values.tolist()
    slots = [Slot(int(hour) * 3600, int(day)) for hour in hours for day in days]

    def fields(kind: str, slot: Slot) -> Fields:
        at = {"hour": slot.second // 3600, "dayofyear": slot.day}
        found = []
        for column in columns:
            if kind in column:
                found.append(column[kind].sel(at).transpose(lat, lon).values[rows][:, cols])
            else:
                found.append(np.full((len(rows), len(cols)), np.nan))
        return np.stack(found).astype(np.float32)

    origin = str(data.attrs.get("title", path))
    about = About(_period(path), 0, True, origin)
    return Climatology(about, names, slots, (), fields)


def _name_of(data: Any, path: str, *names: str) -> str:
    for name in names:
        if name in data.dims:
            return name
    raise ValueError(f"{path} has no dim {names[0]}: it has {', '.join(map(str, data.dims))}")


def _select(data: Any, path: str, one: Channel) -> dict[str, Any]:
    """Return the variables of a channel by kind, at its level."""
    other = {"mean_sea_level_pressure": "sea_level_pressure"}.get(one.variable, one.variable)
    name = one.variable if one.variable in data else other
    if name not in data:
        raise ValueError(f"the climatology {path} has no variable {one.variable}; it has {', '.join(data)}")
    found = {"mean": data[name]}
    if f"{name}_std" in data:
        found["std"] = data[f"{name}_std"]
    if one.level_hpa is None:
        return found
    level = np.asarray(data["level"].values if "level" in data else [], dtype=np.float64)
    if not (level == one.level_hpa).any():
        raise ValueError(f"the climatology {path} has no level {one.level_hpa:g} hPa for {one.name}")
    return {kind: field.isel(level=int(np.argmax(level == one.level_hpa))) for kind, field in found.items()}


def _period(path: str) -> tuple[np.datetime64, np.datetime64] | None:
    """Return the years that the name of a WeatherBench 2 climatology begins with, such as 1990-2019."""
    years = Path(path.rstrip("/")).name[:9].split("-")
    if len(years) == 2 and all(len(year) == 4 and year.isdigit() for year in years):
        first, last = np.datetime64(f"{years[0]}-01-01T00", "s"), np.datetime64(f"{years[1]}-12-31T23", "s")
        return first, last
    return None
