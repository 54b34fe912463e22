"""The window shards of AERIS: `y_{WPY}_x_{WPX}/y_i_x_j.hdf5`, each with `input` [time, channel, rows, cols].

The shards hold numbers only. Names of the channels and times come from files beside them, `channels.txt` and
`times.txt` (one name or date a line), or `times.npy` (dates, or seconds since 1970). Rows are those of a grid
with poles without the north pole's, unless `lat.npy` and `lon.npy` say otherwise.

Shapes: n times, C channels, L levels, Y rows, X cols.
"""

from __future__ import annotations

import re
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
from aeris.data.layouts.samples import grid_near
from aeris.data.layouts.source import Source, Times, Variable

LAYOUT, DATASET = "AERIS window shards", "input"
_FOLDER, _FILE = re.compile(r"y_(\d+)_x_(\d+)"), re.compile(r"y_(\d+)_x_(\d+)\.(?:hdf5|h5)")


def is_shards(path: Path) -> bool:
    """Say whether a directory holds shards, or directories of them."""
    return bool(_shards(path)) or any(_FOLDER.fullmatch(one.name) for one in path.iterdir() if one.is_dir())


def _shards(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in folder.iterdir():
        match = _FILE.fullmatch(path.name)
        if match and path.is_file():
            found[int(match[1]), int(match[2])] = path
    return found


class Fields:
    """The fields of all shards, put together."""

    def __init__(self, tiles: dict[tuple[int, int], tuple[Path, int, int]], shape: tuple[int, int]) -> None:
        self._tiles, self._shape, self._files = tiles, shape, Files()

    def read(self, variable: Variable, start: int, stop: int, levels_hpa: Sequence[float]) -> NDArray[Any]:
        """Read times `start` to `stop` of a variable: [n, L, Y, X], rows and cols as in the source."""
        places = variable.at(levels_hpa)
        stop = stop if variable.times.size else start + 1
        x_nLYX = np.empty((stop - start, len(places), *self._shape), dtype=np.float32)
        for path, top, left in self._tiles.values():
            shard = self._files.get(path)[DATASET]
            rows, cols = slice(top, top + shard.shape[2]), slice(left, left + shard.shape[3])
            for number, place in enumerate(places):
                x_nLYX[:, number, rows, cols] = shard[start:stop, place]
        return x_nLYX


def open_shards(path: Path, told: Mapping[str, str]) -> Source:
    """Open a directory of shards.

    Raises:
        ValueError: a shard, the channels or the times are missing; says which file would bring them.
    """
    folder = path
    if not _shards(path):
        cuts = sorted(one for one in path.iterdir() if one.is_dir() and _FOLDER.fullmatch(one.name))
        if len(cuts) > 1:
            ways = ", ".join(one.name for one in cuts)
            raise ValueError(f"the same data are cut in {len(cuts)} ways: give one of {ways} in {path}")
        folder = cuts[0]
    tiles, (count, channels), (rows, cols) = _tiles(folder)
    names = _read_lines(folder, "channels.txt", "the name of every channel")
    if len(names) != channels:
        raise ValueError(f"channels.txt has {len(names)} names, the shards have {channels} channels")
    times = _times(folder)
    if len(times) != count:
        raise ValueError(f"{len(times)} times are given, the shards have {count}")
    lat, lon = grid_near(folder) or dropped_row_grid(rows, cols)
    if (len(lat), len(lon)) != (rows, cols):
        raise ValueError(f"lat.npy and lon.npy are {len(lat)} x {len(lon)}, the shards make {rows} x {cols}")
    axes = plain_axes(times, lat, lon)
    variables, mapping = group_fields(names, times, told)
    axes = replace(axes, levels_hpa=np.array(levels_of(variables)))
    files = [("files", f"{len(tiles)} shards in {folder}", "")]
    mapping = [*grid_mapping(lat, axes, lon), *files, times_row(times), *mapping]
    return Source(str(path), LAYOUT, axes, variables, mapping, Fields(tiles, (rows, cols)))


def _tiles(
    folder: Path,
) -> tuple[dict[tuple[int, int], tuple[Path, int, int]], tuple[int, int], tuple[int, int]]:
    """Return place -> (file, first row, first col); times and channels; rows and cols."""
    shards = _shards(folder)
    if not shards:
        raise ValueError(f"{folder} holds no shard y_0_x_0.hdf5")
    ys, xs = (sorted({place[axis] for place in shards}) for axis in (0, 1))
    named = _FOLDER.fullmatch(folder.name)
    want = (int(named[1]), int(named[2])) if named else (len(ys), len(xs))
    first = (ys[0], xs[0])
    for y in range(first[0], first[0] + want[0]):
        for x in range(first[1], first[1] + want[1]):
            if (y, x) not in shards:
                raise ValueError(f"y_{y}_x_{x}.hdf5 of {want[0]} x {want[1]} shards is missing in {folder}")
    shape = _shape(shards[first])
    tiles = {}
    for (y, x), file in sorted(shards.items()):
        if _shape(file) != shape:
            raise ValueError(f"{file} is {_shape(file)}, {shards[first].name} is {shape}")
        tiles[y, x] = (file, (y - first[0]) * shape[2], (x - first[1]) * shape[3])
    return tiles, (shape[0], shape[1]), (want[0] * shape[2], want[1] * shape[3])


def _shape(path: Path) -> tuple[int, ...]:
    with open_hdf5(path) as file:
        shard = file.get(DATASET)
        if not isinstance(shard, h5py.Dataset) or shard.ndim != 4:
            raise ValueError(f"{path} has no dataset {DATASET} [time, channel, rows, cols]")
        return tuple(int(n) for n in shard.shape)


def dropped_row_grid(rows: int, cols: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the coordinates of a grid with both poles whose first row was dropped: 720 rows of 721."""
    lat, lon = 90.0 - 180.0 / rows * np.arange(1, rows + 1), 360.0 / cols * np.arange(cols)
    return lat.astype(np.float64), lon.astype(np.float64)


def _find(folder: Path, name: str) -> Path | None:
    return next((one / name for one in (folder, folder.parent) if (one / name).is_file()), None)


def _read_lines(folder: Path, name: str, what: str) -> list[str]:
    path = _find(folder, name)
    if path is None:
        raise ValueError(
            f"shards say neither channels nor times: put {name} ({what}, one a line) into {folder}"
        )
    return path.read_text().split()


def _times(folder: Path) -> Times:
    arrays = _find(folder, "times.npy")
    if arrays is not None:
        values = np.load(arrays)
        values = values if values.dtype.kind == "M" else np.round(values).astype(np.int64)
        return np.asarray(values.astype("datetime64[s]"))
    lines = _read_lines(folder, "times.txt", "the date of every time")
    try:
        return np.array([line.removesuffix("Z") for line in lines], dtype="datetime64[s]")
    except ValueError as error:
        raise ValueError(f"times.txt: {error}") from None
