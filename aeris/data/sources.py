"""Weather files of other projects, read as if all had one layout.

Whatever its names, order of dimensions, direction of latitude, start of longitude, order of levels, units or
packing, a source is read as float32 [time, level, latitude, longitude] in the order of `aeris.data.axes`,
under WeatherBench 2 names and in their units. Every change is listed in `mapping`, for the program to print.

Shapes: n times, L levels, Y rows, X cols.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aeris.data.layouts import anemoi, grib, makani, netcdf, samples, shards, zarrs
from aeris.data.layouts.collection import SAME_DEG, check_grids, join, read_times
from aeris.data.layouts.placeholders import find_placeholder, without_placeholder
from aeris.data.layouts.source import NO_TIMES, Source, Variable, units_told

__all__ = ["SAME_DEG", "Source", "Sources", "Variable", "open_source"]

SUFFIXES = (".nc", ".nc4", ".h5", ".h5v", ".hdf5", ".grib", ".grib2", ".grb", ".zarr")
PERIODS = ("train", "val", "valid", "test", "out_of_sample")  # directories makani and Swift cut data into
HDF5, STORE = b"\x89HDF", "store.h5"


def open_source(
    path: str | Path,
    member: int | None = None,
    as_is: Sequence[str] = (),
    units: Mapping[str, str] | None = None,
) -> Source:
    """Open weather and work out its layout.

    Args:
        path: a file, a directory (Zarr, or one of files cut by time or variable), a pattern such as
            `era5_*.nc`, or an address (gs://...).
        member: which ensemble member to read; None where there is only one.
        as_is: variables without a name of ours that are read too, under their own and in their own units
            (NetCDF and Zarr only).
        units: name of a variable -> the unit it is in, whatever the file says.

    Raises:
        ValueError: it is not understood, names what, and what would be; or values contradict an assumed unit.
    """
    told = units_told(units or {})
    try:
        source = _open(str(path), member, as_is, told)
    except OSError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path}: {said}") from None
    source.check_assumed_units()
    return source


def _open(path: str, member: int | None, as_is: Sequence[str], told: Mapping[str, str]) -> Source:
    where = Path(path)
    if "://" in path:
        return _zarr(path, member, as_is, told)
    if not where.exists():
        found = [Path(one) for one in glob.glob(path)] if glob.has_magic(path) else []
        if not found:
            raise ValueError(f"{path} does not exist")
        return _collection(path, found, member, as_is, told)
    if not where.is_dir():
        return _file(where, member, as_is, told)
    if (where / STORE).exists():
        raise ValueError("it is a store of aeris.data already, not a source")
    if zarrs.is_zarr(where):
        return _zarr(path, member, as_is, told)
    if shards.is_shards(where):
        _refuse_member(member)
        return shards.open_shards(where, told)
    periods = [where / name for name in PERIODS if (where / name).is_dir()]
    files = [file for folder in (periods or [where]) for file in folder.iterdir() if file.suffix in SUFFIXES]
    return _collection(path, files, member, as_is, told)


def _zarr(path: str, member: int | None, as_is: Sequence[str], told: Mapping[str, str]) -> Source:
    if anemoi.is_anemoi(path):
        return anemoi.open_anemoi(path, member, told)
    return zarrs.open_zarr(path, member, as_is, told)


def _file(path: Path, member: int | None, as_is: Sequence[str], told: Mapping[str, str]) -> Source:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GRIB":
        return grib.open_grib(path, member, told)
    if start == HDF5:
        kind = _hdf5_kind(path)
        if kind in ("makani", "samples"):
            _refuse_member(member)
        if kind == "makani":
            return makani.open_makani([path], path, told)
        if kind == "samples":
            return samples.open_samples([path], path, told)
        if kind == "shards":
            raise ValueError(f"it is one shard of several: give the directory, {path.parent}")
    return netcdf.open_netcdf(path, start, member, as_is, told)


def _collection(
    path: str, files: Sequence[Path], member: int | None, as_is: Sequence[str], told: Mapping[str, str]
) -> Source:
    """Open the files of a directory or a pattern as one source."""
    files = sorted(files, key=natural)
    if not files:
        raise ValueError(
            f"it holds neither Zarr nor files that end in {' '.join(SUFFIXES)}: is it another directory?"
        )
    first = files[0]
    if first.is_file() and first.suffix in (".h5", ".h5v", ".hdf5"):
        kind = _hdf5_kind(first)
        if kind in ("makani", "samples"):
            _refuse_member(member)
        if kind == "makani":
            return makani.open_makani(files, Path(path), told)
        if kind == "samples":
            return samples.open_samples(files, Path(path), told)
    parts = []
    for file in files:
        try:
            parts.append(_open(str(file), member, as_is, told))
        except OSError as error:
            raise ValueError(f"{file} is truncated or damaged: {error}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return join(path, parts)


def _refuse_member(member: int | None) -> None:
    """Refuse the choice of a member in a layout that has none."""
    if member is not None:
        raise ValueError(f"--member {member} was given, but there is no ensemble dimension")


def _hdf5_kind(path: Path) -> str:
    """Say which layout an HDF5 file has: makani, samples, shards or netcdf."""
    if makani.is_makani(path):
        return "makani"
    return samples.kind(path)


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Return a key that sorts numbers in names by value: 1979_2 before 1979_10."""
    pieces = re.split(r"(\d+)", path.name)
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in pieces if piece]


class Sources:
    """Several sources read as one: cut by time (a file per year), by variable (levels and surface), or both.

    Raises:
        ValueError: their grids differ.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        check_grids(self.parts)
        first = self.parts[0].axes
        self.latitude_deg, self.longitude_deg = first.latitude_deg, first.longitude_deg
        self._placeholder: dict[str, float | None] = {}
        self._land: NDArray[np.float32] | None = None

    def times(self, variables: Iterable[str]) -> NDArray[np.datetime64]:
        """Return every time, rising, that a source of one of `variables` has; static fields bring none.

        Times at which the values of one of them were made up are left out.
        """
        wanted = list(variables)
        every = [part.variables[one].times for one in wanted for part in self.having(one)]
        times = np.unique(np.concatenate([NO_TIMES, *every]))
        return np.asarray(times[~np.isin(times, self.imputed(wanted))])

    def imputed(self, variables: Iterable[str]) -> NDArray[np.datetime64]:
        """Return the times, rising, at which a source says that values of one of `variables` were made up."""
        every = [part.variables[one].imputed for one in variables for part in self.having(one)]
        return np.unique(np.concatenate([NO_TIMES, *every]))

    def having(self, variable: str) -> list[Source]:
        """Return the sources that have a variable."""
        return [part for part in self.parts if variable in part.variables]

    def levels_hpa(self, variable: str) -> list[float]:
        """Return the levels, in hPa and rising, at which every source that has it has a variable."""
        levels = [set(part.variables[variable].levels_hpa) for part in self.having(variable)]
        return sorted(set.intersection(*levels)) if levels else []

    def check_times(self, variable: str, times: NDArray[np.datetime64]) -> None:
        """Refuse a variable that is missing at one of `times`, or there twice.

        Raises:
            ValueError: names the variable and the first such time.
        """
        count = np.sum(
            [np.isin(times, part.variables[variable].times) for part in self.having(variable)], axis=0
        )
        for wrong, what in ((count == 0, "missing at"), (count > 1, "in two sources at")):
            if np.any(wrong):
                index = int(np.argmax(wrong))
                raise ValueError(f"{variable} is {what} {times[index]} (index {index})")

    def read(
        self, variable: str, times: NDArray[np.datetime64], levels_hpa: Sequence[float]
    ) -> NDArray[np.float32]:
        """Read a variable at `times` (rising): float32 [n, L, Y, X]; L is 1 without levels."""
        x_nLYX = read_times(self.having(variable), variable, times, levels_hpa)
        value = self.placeholders([variable]).get(variable)
        return x_nLYX if value is None else without_placeholder(x_nLYX, value, self._land_YX())

    def read_static(self, variable: str) -> NDArray[np.float32]:
        """Read a field that does not change (its first time, if it has times): float32 [Y, X]."""
        return np.asarray(self.having(variable)[0].read(variable)[0, 0])

    def placeholders(self, variables: Iterable[str]) -> dict[str, float]:
        """Find values that stand for missing ones over land: variable -> value (HRES-T0 has one for SST)."""
        found = {}
        for name in variables:
            if name not in self._placeholder:
                self._placeholder[name] = find_placeholder(name, self.having(name), self._land_YX)
            value = self._placeholder[name]
            if value is not None:
                found[name] = value
        return found

    def _land_YX(self) -> NDArray[np.float32] | None:
        if self._land is None and self.having("land_sea_mask"):
            self._land = self.read_static("land_sea_mask")
        return self._land
