"""Means and standard deviations that other projects publish with their data or weights.

makani's `stats/*.npy` (by channel, names in `metadata/data.json`), the `normalize_*.npz` of Swift and AERIS
(by name of the field), and the arrays of an anemoi Zarr (by variable). Nothing says their units: they are
taken to be ours, and the means are compared with what can be on Earth.

Shapes: C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aeris.data.layouts.anemoi import is_anemoi, open_group
from aeris.data.layouts.makani import coordinates, metadata_near
from aeris.data.plausible import complaint
from aeris.data.statistics import Statistics
from aeris.data.variables import channel, channel_of, field_called

Values = NDArray[np.float64]
UNKNOWN = np.datetime64("NaT", "s")
_FREQUENCY = re.compile(r"statistics_tendencies_(\d+)(h|d)_(?:mean|stdev)")


@dataclass
class Table:
    """What was found: channel -> number."""

    mean: dict[str, float]
    std: dict[str, float]
    residual_mean: dict[int, dict[str, float]] = field(default_factory=dict)
    """By interval in hours. Where only the std is published, the mean that was taken off is zero."""
    residual_std: dict[int, dict[str, float]] = field(default_factory=dict)
    period: tuple[np.datetime64, np.datetime64] = (UNKNOWN, UNKNOWN)


def is_foreign(path: str | Path) -> bool:
    """Say whether a directory holds statistics of another project."""
    where = Path(path)
    if "://" in str(path):
        return is_anemoi(str(path))
    names = ("global_means.npy", "stats/global_means.npy", "normalize_mean.npz")
    return where.is_dir() and (any((where / name).exists() for name in names) or is_anemoi(str(where)))


def read_statistics(path: str | Path, names: Sequence[str], intervals_h: Sequence[int]) -> Statistics:
    """Read the statistics of another project for some channels of ours.

    Args:
        path: makani's root or `stats` directory, a directory of `normalize_*.npz`, or an anemoi Zarr.
        names: our channels, such as t2m z500, in their order.
        intervals_h: of the changes that are needed, hours.

    Returns:
        Their train period, where they do not say it, is NaT to NaT.

    Raises:
        ValueError: a file, a channel or an interval is missing, or a number cannot be meant in our units.
    """
    where = Path(path)
    folder = where if (where / "global_means.npy").exists() else where / "stats"
    if "://" in str(path) or (where.is_dir() and is_anemoi(str(where))):
        table = _anemoi(str(path))
    elif (folder / "global_means.npy").exists():
        table = _makani(folder)
    elif (where / "normalize_mean.npz").exists():
        table = _normalize(where)
    else:
        raise ValueError(
            f"{path} holds no statistics: neither normalize_mean.npz (Swift, AERIS), stats/global_means.npy "
            "(makani) nor an anemoi Zarr"
        )
    return _chosen(table, str(path), names, intervals_h)


def _chosen(table: Table, path: str, names: Sequence[str], intervals_h: Sequence[int]) -> Statistics:
    """Take some channels and intervals of a table, in order, and check the numbers."""
    missing = [hours for hours in intervals_h if hours not in table.residual_std]
    if missing:
        there = " ".join(f"{hours} h" for hours in sorted(table.residual_std)) or "none"
        raise ValueError(f"{path} has no changes over {missing[0]} h; its intervals: {there}")
    columns = {"mean": table.mean, "std": table.std}
    for hours in intervals_h:
        columns[f"mean change over {hours} h"] = table.residual_mean.get(hours) or dict.fromkeys(names, 0.0)
        columns[f"std of the change over {hours} h"] = table.residual_std[hours]
    arrays: dict[str, Values] = {}
    for what, column in columns.items():
        gone = [name for name in names if name not in column]
        if gone:
            there = ", ".join(column) or "none"
            raise ValueError(f"{path} has no {what} of {', '.join(gone)}; it has {there}")
        arrays[what] = np.array([column[name] for name in names], dtype=np.float64)
        _check(path, what, arrays[what], names)
    means, stds = [], []
    for hours in intervals_h:
        means.append(arrays[f"mean change over {hours} h"])
        stds.append(arrays[f"std of the change over {hours} h"])
    residuals = (dict(zip(intervals_h, means)), dict(zip(intervals_h, stds)))
    return Statistics(arrays["mean"], arrays["std"], *residuals, table.period)


def _check(path: str, what: str, value_C: Values, names: Sequence[str]) -> None:
    """Refuse numbers that cannot be meant."""
    for name, value in zip(names, value_C):
        if not np.isfinite(value) or (what.startswith("std") and value <= 0):
            raise ValueError(f"{path}: the {what} of {name} is {value:g}")
        one = channel(name)
        if what == "mean" and (wrong := complaint(one.variable, one.level_hpa, np.array([value]))):
            raise ValueError(f"{path}: the mean of {name} is {wrong} ({one.units}): it is in another unit")


def _by_channel(values: Mapping[str, float]) -> dict[str, float]:
    """Translate names of fields into our channels; leave out what we do not know."""
    found = {}
    for spelled, value in values.items():
        known = field_called(spelled)
        if known is not None and known[0] not in ("geopotential_at_surface", "land_sea_mask"):
            found[channel_of(*known).name] = float(value)
    return found


def _normalize(folder: Path) -> Table:
    """Read `normalize_mean.npz`, `normalize_std.npz` and `normalize_diff_{mean,std}_<hours>.npz`."""
    table = Table(_npz(folder / "normalize_mean.npz"), _npz(folder / "normalize_std.npz"))
    for path in sorted(folder.glob("normalize_diff_*_*.npz")):
        match = re.fullmatch(r"normalize_diff_(mean|std)_(\d+)", path.stem)
        if match:
            part = table.residual_mean if match[1] == "mean" else table.residual_std
            part[int(match[2])] = _npz(path)
    return table


def _npz(path: Path) -> dict[str, float]:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            values = {name: np.asarray(arrays[name]).reshape(-1) for name in arrays.files}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Exception as error:  # a damaged zip makes numpy raise several kinds
        raise ValueError(f"{path} is damaged: {error}") from None
    long = [name for name, value in values.items() if value.size != 1]
    if long:
        raise ValueError(f"{path} has {values[long[0]].size} numbers for {long[0]}, not one")
    return _by_channel({name: value[0] for name, value in values.items()})


def _makani(folder: Path) -> Table:
    """Read `global_means.npy`, `global_stds.npy` and `time_diff_{means,stds}_dt<steps>.npy`."""
    metadata = metadata_near(folder.parent)
    names = [str(name) for name in coordinates(metadata).get("channel", [])]
    if not names:
        raise ValueError(f"{folder.parent}/metadata/data.json does not name the channels (coords: channel)")
    table = Table(_npy(folder / "global_means.npy", names), _npy(folder / "global_stds.npy", names))
    for path in sorted(folder.glob("time_diff_*_dt*.npy")):
        match = re.fullmatch(r"time_diff_(means|stds)_dt(\d+)", path.stem)
        if match is None:
            continue
        if "dhours" not in metadata:
            raise ValueError(f"{folder.parent}/metadata/data.json has no dhours, the step of {path.name}")
        part = table.residual_mean if match[1] == "means" else table.residual_std
        part[round(int(match[2]) * float(metadata["dhours"]))] = _npy(path, names)
    return table


def _npy(path: Path, names: Sequence[str]) -> dict[str, float]:
    try:
        values = np.load(path).reshape(-1)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if values.size != len(names):
        raise ValueError(f"{path} has {values.size} numbers, metadata/data.json names {len(names)} channels")
    return _by_channel(dict(zip(names, values)))


def _anemoi(path: str) -> Table:
    """Read mean, stdev and statistics_tendencies_<frequency>_{mean,stdev} of a Zarr group."""
    group = open_group(path)
    names = [str(name) for name in group.attrs["variables"]]

    def column(key: str) -> dict[str, float]:
        if key not in group:
            raise ValueError(f"{path} has no array {key}")
        return _by_channel(dict(zip(names, np.asarray(group[key][:]).reshape(-1))))

    table = Table(column("mean"), column("stdev"))
    for key in sorted(group.array_keys()):
        match = _FREQUENCY.fullmatch(key)
        if match:
            hours = int(match[1]) * (24 if match[2] == "d" else 1)
            part = table.residual_mean if key.endswith("_mean") else table.residual_std
            part[hours] = column(key)
    dates = [str(group.attrs.get(f"statistics_{end}_date") or "") for end in ("start", "end")]
    if all(dates):
        start, end = (np.datetime64(date.removesuffix("Z"), "s") for date in dates)
        table.period = (start, end)
    return table
