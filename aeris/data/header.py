"""The file about a store: its channels, grid, times, files, static fields, masks, statistics and origin.

It is written last, under a temporary name: a directory that has it is whole.

Shapes: C channels, Y rows, X cols, n times.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from aeris.data.statistics import Statistics
from aeris.data.variables import Channel
from aeris.data.yearfile import FIELD_BYTES, Field, StoreError, damaged
from aeris.data.yearwriter import METADATA_BYTES, check_room, publish, tagged

FORMAT, VERSION = "aeris-store", 1
HEADER = "store.h5"
PLAN = "plan.json"  # what an unfinished conversion has in place of it


@dataclass(frozen=True)
class Header:
    """All of a store but its fields."""

    channels: tuple[Channel, ...]
    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    time_s: NDArray[np.int64]
    files: list[tuple[str, int, int]]
    """Name, number of times and bytes of every year file."""
    static: dict[str, Field]
    """WeatherBench 2 name -> [Y, X]."""
    masks: dict[str, NDArray[np.bool_]]
    """Channel with missing points -> [Y, X], True where valid."""
    statistics: Statistics
    window: int
    """Side of a chunk, points."""
    row_offset: int
    """Rows of the source north of the first row of the store."""
    made: dict[str, Any]
    """Sources and settings of the conversion."""


def write_header(path: Path, header: Header) -> None:
    """Write the file in one go; it has its name only when it is whole."""
    temporary = tagged(path)
    points = (len(header.static) + len(header.masks)) * len(header.latitude_deg) * len(header.longitude_deg)
    length = METADATA_BYTES + points * FIELD_BYTES + header.time_s.nbytes
    check_room(temporary, length, length)
    with h5py.File(temporary, "w", libver=("v110", "v110"), locking=False) as file:
        file.attrs.update(format=FORMAT, version=VERSION, made=json.dumps(header.made))
        file.attrs.update(window=header.window, row_offset=header.row_offset)
        levels_hpa = [np.nan if one.level_hpa is None else one.level_hpa for one in header.channels]
        file["channel/name"] = [one.name for one in header.channels]
        file["channel/variable"] = [one.variable for one in header.channels]
        file["channel/units"] = [one.units for one in header.channels]
        file["channel/level_hpa"] = np.array(levels_hpa, dtype=np.float64)
        file["latitude"], file["longitude"] = header.latitude_deg, header.longitude_deg
        file["time"] = header.time_s
        file["files/name"] = [name for name, _, _ in header.files]
        file["files/count"] = np.array([count for _, count, _ in header.files], dtype=np.int64)
        file["files/bytes"] = np.array([size for _, _, size in header.files], dtype=np.int64)
        static, mask = file.create_group("static"), file.create_group("mask")
        for name, field in header.static.items():
            static[name] = field
        for name, valid_YX in header.masks.items():
            mask[name] = valid_YX.astype(np.uint8)
        _write_statistics(file.create_group("statistics"), header.statistics)
    publish(temporary, path)


def _write_statistics(group: Any, statistics: Statistics) -> None:
    group["mean"], group["std"] = statistics.mean_C, statistics.std_C
    group["intervals_h"] = np.array(sorted(statistics.residual_std), dtype=np.int64)
    for hours in statistics.residual_std:
        group[f"residual_mean_{hours}h"] = statistics.residual_mean[hours]
        group[f"residual_std_{hours}h"] = statistics.residual_std[hours]
    group["train_period"] = np.array(statistics.train_period, dtype="datetime64[s]").astype(np.int64)


def read_header(path: Path) -> Header:
    """Read the file.

    Raises:
        StoreError: it is truncated, of another version, or its times do not rise; says what to do.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != FORMAT or file.attrs.get("version") != VERSION:
                raise StoreError(f"{path} is not a store of version {VERSION}: convert the data again")
            header = _header(file)
    except (OSError, KeyError) as error:
        raise damaged(path, error) from None
    wrong = np.flatnonzero(np.diff(header.time_s) <= 0)
    if wrong.size:
        first = int(wrong[0]) + 1
        time, before = header.time_s[[first, first - 1]].astype("datetime64[s]")
        raise StoreError(f"{path}: time {time} (index {first}) does not come after {before}: convert again")
    return header


def _header(file: Any) -> Header:
    channels, files = file["channel"], file["files"]
    columns = (channels[key].asstr()[:] for key in ("name", "variable", "units"))
    return Header(
        channels=tuple(
            Channel(name, variable, None if np.isnan(level_hpa) else float(level_hpa), units)
            for name, variable, units, level_hpa in zip(*columns, channels["level_hpa"][:])
        ),
        latitude_deg=file["latitude"][:],
        longitude_deg=file["longitude"][:],
        time_s=file["time"][:],
        files=list(zip(files["name"].asstr()[:], files["count"][:].tolist(), files["bytes"][:].tolist())),
        static={name: field[:] for name, field in file["static"].items()},
        masks={name: valid[:] != 0 for name, valid in file["mask"].items()},
        statistics=_read_statistics(file["statistics"]),
        window=int(file.attrs["window"]),
        row_offset=int(file.attrs["row_offset"]),
        made=json.loads(file.attrs["made"]),
    )


def _read_statistics(group: Any) -> Statistics:
    intervals = [int(hours) for hours in group["intervals_h"][:]]
    period = group["train_period"][:].astype("datetime64[s]")
    return Statistics(
        group["mean"][:],
        group["std"][:],
        {hours: group[f"residual_mean_{hours}h"][:] for hours in intervals},
        {hours: group[f"residual_std_{hours}h"][:] for hours in intervals},
        (period[0], period[1]),
    )
