"""One HDF5 file per time, as Swift and AERIS have: `input/<variable[_level]>` [lat, lon] and `input/time`.

Latitude and longitude are in `lat.npy` and `lon.npy`. With tens of thousands of files not every one is
opened first: if those that are lie on one regular axis, the others are taken to lie between, and each is
checked when it is read.

Shapes: n times, L levels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from aeris.data.axes import grid_mapping, plain_axes
from aeris.data.layouts.channels import group_fields, levels_of, times_row
from aeris.data.layouts.hdf5 import Files, open_hdf5
from aeris.data.layouts.source import Source, Times, Variable

LAYOUT, GROUP, TIME = "HDF5 per time (Swift, AERIS)", "input", "time"
PROBES = 64  # files opened to see whether times are regular


def kind(path: Path) -> str:
    """Say what an HDF5 file is: `samples`, `shards` (one of them) or `netcdf`."""
    with open_hdf5(path) as file:
        found = file.get(GROUP)
        if isinstance(found, h5py.Group) and TIME in found:
            return "samples"
        return "shards" if isinstance(found, h5py.Dataset) and found.ndim == 4 else "netcdf"


def grid_near(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Read lat.npy and lon.npy in the directory of a file or directory, or in one of the two above."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "lat.npy").is_file() and (folder / "lon.npy").is_file():
            lat, lon = (np.load(folder / f"{name}.npy").astype(np.float64) for name in ("lat", "lon"))
            return (lat[:, 0] if lat.ndim == 2 else lat), (lon[0] if lon.ndim == 2 else lon)
    return None


class Fields:
    """The fields of all files."""

    def __init__(self, files: Sequence[Path], times: Times, names: Sequence[str]) -> None:
        self._files, self._times, self._names = files, times, names
        self._open = Files()

    def read(self, variable: Variable, start: int, stop: int, levels_hpa: Sequence[float]) -> NDArray[Any]:
        """Read times `start` to `stop` of a variable: [n, L, Y, X], rows and cols as in the source."""
        names = [self._names[place] for place in variable.at(levels_hpa)]
        fields = []
        for number in range(start, stop):
            path = self._files[number]
            group = self._open.get(path)[GROUP]
            time = _time(group, path)
            if variable.times.size and time != self._times[number]:
                raise ValueError(
                    f"{path} is of {time}, its place among the files says {self._times[number]}: a file is "
                    "missing or misplaced"
                )
            missing = [name for name in names if name not in group]
            if missing:
                raise ValueError(f"{path} has no {GROUP}/{missing[0]}, which {self._files[0]} has")
            fields.append(np.stack([group[name][...] for name in names]))
        return np.stack(fields)


def open_samples(files: Sequence[Path], path: Path, told: Mapping[str, str]) -> Source:
    """Open a directory of such files, in the order of their names.

    Args:
        path: what the user gave.

    Raises:
        ValueError: something is missing or contradicts itself; names the file.
    """
    names, shape = _fields(files[0])
    grid = grid_near(files[0])
    if grid is None:
        raise ValueError(f"{path}: lat.npy and lon.npy are missing, in its directory or one of the two above")
    lat, lon = grid
    if (len(lat), len(lon)) != shape:
        raise ValueError(
            f"{path}: lat.npy and lon.npy are {len(lat)} x {len(lon)}, the fields {shape[0]} x {shape[1]}"
        )
    order, times, opened = find_times(files)
    ordered = [files[number] for number in order]
    _check_rising(ordered, times)
    variables, mapping = group_fields(names, times, told)
    axes = replace(plain_axes(times, lat, lon), levels_hpa=np.array(levels_of(variables)))
    read = (
        "every file" if opened == len(files) else f"{opened} files, regular; the others are checked when read"
    )
    what, source, count = times_row(times)
    rows = [("files", f"{len(files)} in {path}", ""), (what, f"{source}, read from {read}", count)]
    fields = Fields(ordered, times, names)
    return Source(
        str(path), LAYOUT, axes, variables, [*grid_mapping(lat, axes, lon), *rows, *mapping], fields
    )


def _fields(path: Path) -> tuple[list[str], tuple[int, int]]:
    """Return the names of the two-dimensional fields of a file and their shape."""
    with open_hdf5(path) as file:
        shapes = {name: x.shape for name, x in file[GROUP].items() if getattr(x, "ndim", 0) == 2}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"{path} has fields of {len(set(shapes.values()))} shapes in {GROUP}, not of one")
    return list(shapes), next(iter(shapes.values()))


def _time(group: Any, path: Path) -> np.datetime64:
    """Return the time of an opened file."""
    if TIME not in group:
        raise ValueError(f"{path} has no {GROUP}/{TIME}")
    value = np.asarray(group[TIME][()]).reshape(-1)[0]
    text = value.decode() if isinstance(value, bytes) else str(value)
    try:
        return np.datetime64(text.strip().removesuffix("Z").removesuffix("+00:00").replace(" ", "T"), "s")
    except ValueError:
        raise ValueError(f"{path} has the time {text!r}, which is no date such as 2000-01-01T06:00") from None


def _read_time(path: Path) -> np.datetime64:
    with open_hdf5(path) as file:
        if GROUP not in file:
            raise ValueError(f"{path} has no group {GROUP}, which the files beside it have")
        return _time(file[GROUP], path)


def find_times(files: Sequence[Path]) -> tuple[NDArray[np.int64], Times, int]:
    """Find the time of every file: the order of the files by time, the times, and how many were opened.

    If the times of some are those of a regular axis over all files, the others are taken to be so too.
    """
    count = len(files)
    if count > PROBES:
        places = np.unique(np.linspace(0, count - 1, PROBES).astype(np.int64))
        places = np.unique(np.concatenate([[1], places]))
        probes = np.array([_read_time(files[place]) for place in places], dtype="datetime64[s]")
        step = probes[1] - probes[0]
        if step > np.timedelta64(0, "s") and np.array_equal(probes[0] + places * step, probes):
            return np.arange(count), probes[0] + np.arange(count) * step, len(places)
    times = np.array([_read_time(file) for file in files], dtype="datetime64[s]")
    order = np.argsort(times, kind="stable")
    return order, times[order], count


def _check_rising(files: Sequence[Path], times: Times) -> None:
    """Refuse two files of one time."""
    twice = np.flatnonzero(np.diff(times) == np.timedelta64(0, "s"))
    if twice.size:
        first = int(twice[0])
        raise ValueError(
            f"{files[first]} and {files[first + 1]} are both of {times[first]}: remove one of them"
        )
