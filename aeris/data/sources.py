"""Weather files of other projects, read as if all had one layout.

Whatever its names, order of dimensions, direction of latitude, start of longitude, order of levels, units or
packing, a source is read as float32 [time, level, latitude, longitude] in the order of `aeris.data.axes`,
under WeatherBench 2 names and in their units. Every change is listed in `mapping`, for the program to print.

Shapes: n times, L levels, Y rows, X cols.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from aeris.data.axes import LATITUDE, LEVEL, LONGITUDE, MEMBER, TIME, Axes, find_axes
from aeris.data.units import conversion
from aeris.data.variables import ALIASES, LEVELLED, STATIC, SURFACE

SAME_DEG = 1e-4  # coordinates kept in float32 and float64 differ by less

_UNITS = dict([*SURFACE.values(), *LEVELLED.values(), *STATIC.values()])
_LEVELLED_NAMES = {name for name, _ in LEVELLED.values()}


@dataclass(frozen=True)
class Variable:
    """How one variable of a source becomes ours: value * factor + offset."""

    raw: str
    dims: dict[str, str]
    """Role -> name of the dimension, for the dimensions this variable has."""
    factor: float
    offset: float


@dataclass(frozen=True)
class Source:
    """One opened file or Zarr store."""

    path: str
    raw: Any
    """The dataset as xarray decodes it, not yet loaded."""
    axes: Axes
    variables: dict[str, Variable]
    """WeatherBench 2 name -> how to read it."""
    mapping: list[tuple[str, str, str]]
    """(what, in the source, in the store), for printing."""

    def read(
        self, variable: str, start: int = 0, stop: int = 1, levels_hpa: Sequence[float] = ()
    ) -> NDArray[np.float32]:
        """Read times `start` to `stop` of a variable: float32 [n, L, Y, X]; a dim it does not have is 1."""
        plan = self.variables[variable]
        roles = {dim: role for role, dim in plan.dims.items()}
        picks: dict[str, Any] = {}
        inside = slice(None)
        for dim in self.raw[plan.raw].dims:
            role = roles.get(str(dim))
            if role == TIME:
                picks[dim] = slice(start, stop)
            elif role == LEVEL:
                places = self.axes.level_order[np.searchsorted(self.axes.levels_hpa, levels_hpa)]
                picks[dim] = slice(int(places.min()), int(places.max()) + 1)
                inside = places - places.min()
            elif role not in (LATITUDE, LONGITUDE):
                picks[dim] = self.axes.member if role == MEMBER else 0
        array = self.raw[plan.raw].isel(picks)
        left = [roles[str(dim)] for dim in array.dims]
        x = np.asarray(array.values).transpose(
            [left.index(r) for r in (TIME, LEVEL, LATITUDE, LONGITUDE) if r in left]
        )
        x = x if TIME in left else x[None]
        x = x if LEVEL in left else x[:, None]
        x = x[:, inside, :: -1 if self.axes.flipped else 1]
        if np.any(np.diff(self.axes.longitude_order) != 1):
            x = np.take(x, self.axes.longitude_order, axis=-1)
        if (plan.factor, plan.offset) != (1.0, 0.0):
            x = x.astype(np.float64) * plan.factor + plan.offset
        return np.ascontiguousarray(x, dtype=np.float32)


def open_source(path: str | Path, member: int | None = None, as_is: Sequence[str] = ()) -> Source:
    """Open NetCDF-4, NetCDF-3 or Zarr (a directory, or an address such as gs://...) and work out its layout.

    Args:
        member: which ensemble member to read; None where there is only one.
        as_is: variables without a name of ours that are read too, under their own and in their own units.

    Raises:
        ValueError: the file is not understood; names what, and what would be.
    """
    raw = _open(str(path))
    try:
        axes = find_axes(raw, member)
        variables, mapping = _find_variables(raw, axes.dims, as_is)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Source(str(path), raw, axes, variables, axes.mapping(raw) + mapping)


def _open(path: str) -> Any:
    """Open a file lazily with the engine that fits it."""
    if "://" in path:
        options = {"token": "anon"} if path.startswith("gs://") else None
        try:
            return xr.open_zarr(path, chunks=None, storage_options=options, decode_timedelta=False)
        except ImportError as error:  # fsspec names the package for that kind of address
            raise ValueError(f"{path} cannot be read here: {error}") from None
    where = Path(path)
    if not where.exists():
        raise ValueError(f"{path} does not exist")
    try:
        if where.is_dir():
            return xr.open_zarr(where, chunks=None, consolidated=_consolidated(where), decode_timedelta=False)
        return xr.open_dataset(where, engine=_engine(where), decode_timedelta=False)
    except OSError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    except ValueError as error:  # times in a calendar that is not ours, an engine that is not installed
        raise ValueError(f"{path} cannot be read: {error}") from None


def _engine(path: Path) -> Any:
    """Return xarray's engine for a file, from its first bytes."""
    with path.open("rb") as file:
        start = file.read(4)
    engine = {b"\x89HDF": "h5netcdf", b"CDF\x01": "scipy", b"CDF\x02": "scipy"}.get(start)
    if engine is None:
        hint = ": turn it into NetCDF first, with cfgrib" if start == b"GRIB" else ""
        raise ValueError(f"it is neither NetCDF nor Zarr{hint}")
    return engine


def _consolidated(path: Path) -> bool:
    """Say whether a Zarr directory keeps its metadata in one place; xarray warns if it has to find out."""
    new = path / "zarr.json"
    if new.exists():
        return bool(json.loads(new.read_text()).get("consolidated_metadata"))
    if not (path / ".zgroup").exists():
        raise ValueError("it is a directory but not a Zarr store; NetCDF files are given one by one")
    return (path / ".zmetadata").exists()


def _find_variables(
    raw: Any, dims: dict[str, str], as_is: Sequence[str]
) -> tuple[dict[str, Variable], list[tuple[str, str, str]]]:
    """Match the variables of a dataset with ours; the others are listed as left out."""
    found: dict[str, Variable] = {}
    mapping, left_out = [], []
    for key in raw.data_vars:
        array = raw[key]
        own = {role: dim for role, dim in dims.items() if dim in array.dims}
        name = ALIASES.get(str(key), str(key))
        if name == "geopotential" and LEVEL not in own:
            name = "geopotential_at_surface"
        strange = [dim for dim in array.dims if dim not in own.values() and array.sizes[dim] > 1]
        fits = LATITUDE in own and LONGITUDE in own and not strange
        if fits and name in as_is and name not in _UNITS:
            found[name] = Variable(str(key), own, 1.0, 0.0)
            mapping.append(("variable", f"{key} ({', '.join(map(str, array.dims))})", "taken as it is"))
            continue
        if name not in _UNITS or not fits or (name in _LEVELLED_NAMES) != (LEVEL in own):
            left_out.append(str(key))
            continue
        if name in found:
            raise ValueError(f"{found[name].raw} and {key} are both {name}: remove one of them")
        factor, offset, said = _unit(str(key), array.attrs.get("units"), _UNITS[name])
        found[name] = Variable(str(key), own, factor, offset)
        stored = array.encoding.get("dtype")
        packed = f", {stored}" if stored is not None and stored != np.float32 else ""
        mapping.append(("variable", f"{key} ({', '.join(map(str, array.dims))}){packed}", f"{name}, {said}"))
    if not found:
        raise ValueError(f"none of its variables is known: {', '.join(left_out) or 'it has none'}")
    if left_out:
        mapping.append(("left out", ", ".join(left_out), ""))
    return found, mapping


def _unit(key: str, given: object, wanted: str) -> tuple[float, float, str]:
    """Return factor, offset and what to say about them."""
    if given is None:
        return 1.0, 0.0, f"no unit given, taken as {wanted}"
    try:
        factor, offset = conversion(str(given), wanted)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return factor, offset, wanted if (factor, offset) == (1.0, 0.0) else f"{given} turned into {wanted}"


class Sources:
    """Several sources read as one: cut by time (a file per year), by variable (levels and surface), or both.

    Raises:
        ValueError: their grids differ.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0].axes
        for part in self.parts[1:]:
            for what in ("latitude_deg", "longitude_deg"):
                ours, theirs = getattr(first, what), getattr(part.axes, what)
                if ours.shape != theirs.shape or np.abs(ours - theirs).max() > SAME_DEG:
                    raise ValueError(f"{part.path} is on another grid than {self.parts[0].path} ({what})")
        self.latitude_deg, self.longitude_deg = first.latitude_deg, first.longitude_deg

    def times(self, variables: Iterable[str]) -> NDArray[np.datetime64]:
        """Return every time, rising, that a source of one of `variables` has; static fields bring none."""
        parts = {part.path: part.axes.times for variable in variables for part in self.having(variable)}
        return np.unique(np.concatenate(list(parts.values())))

    def having(self, variable: str) -> list[Source]:
        """Return the sources that have a variable."""
        return [part for part in self.parts if variable in part.variables]

    def levels_hpa(self, variable: str) -> list[float]:
        """Return the levels, in hPa and rising, at which every source that has it has a variable."""
        levels = [set(part.axes.levels_hpa.tolist()) for part in self.having(variable)]
        return sorted(set.intersection(*levels)) if levels else []

    def check_times(self, variable: str, times: NDArray[np.datetime64]) -> None:
        """Refuse a variable that is missing at one of `times`, or there twice.

        Raises:
            ValueError: names the variable and the first such time.
        """
        count = np.sum([np.isin(times, part.axes.times) for part in self.having(variable)], axis=0)
        for wrong, what in ((count == 0, "missing at"), (count > 1, "in two sources at")):
            if np.any(wrong):
                index = int(np.argmax(wrong))
                raise ValueError(f"{variable} is {what} {times[index]} (index {index})")

    def read(
        self, variable: str, times: NDArray[np.datetime64], levels_hpa: Sequence[float]
    ) -> NDArray[np.float32]:
        """Read a variable at `times` (rising): float32 [n, L, Y, X]; L is 1 without levels."""
        shape = (len(times), max(1, len(levels_hpa)), len(self.latitude_deg), len(self.longitude_deg))
        x_nLYX = np.empty(shape, dtype=np.float32)
        for part in self.having(variable):
            mine = np.isin(times, part.axes.times)
            if mine.any():
                local = np.searchsorted(part.axes.times, times[mine])
                start, stop = int(local[0]), int(local[-1]) + 1
                x_nLYX[mine] = part.read(variable, start, stop, levels_hpa)[local - start]
        return x_nLYX

    def read_static(self, variable: str) -> NDArray[np.float32]:
        """Read a field that does not change (its first time, if it has times): float32 [Y, X]."""
        return np.asarray(self.having(variable)[0].read(variable)[0, 0])
