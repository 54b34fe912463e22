"""The yearly HDF5 files of makani and PhysicsNeMo: `fields` [time, channel, lat, lon], metadata beside them.

Times, channel names and coordinates are scales of `fields` in newer files; in older ones they are only in
`metadata/data.json` (under `coord` or `coords`) and follow from the year in the name. Orography and land-sea
mask are in `invariants`. Times that `valid_data` calls imputed are left out.

Shapes: n times, C channels, L levels, Y rows, X cols.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from aeris.data.axes import grid_mapping, plain_axes
from aeris.data.layouts.channels import Rows, group_fields, levels_of, times_row
from aeris.data.layouts.collection import SAME_DEG, join
from aeris.data.layouts.hdf5 import Files, check_virtual, open_hdf5
from aeris.data.layouts.source import NO_TIMES, Source, Times, Variable, variable_unit
from aeris.data.variables import STATIC, field_called

LAYOUT, FIELDS = "makani HDF5", "fields"
HOUR_S = 3600


def is_makani(path: Path) -> bool:
    """Say whether a file has the layout."""
    with open_hdf5(path) as file:
        found = file.get(str(metadata_near(path).get("h5_path", FIELDS)))
        return isinstance(found, h5py.Dataset) and found.ndim == 4


def metadata_near(path: Path) -> dict[str, Any]:
    """Read `metadata/data.json` in the directory of a file or directory, or in one of the two above.

    Raises:
        ValueError: it is not JSON.
    """
    for folder in (path, *path.absolute().parents[:2]):
        file = folder / "metadata" / "data.json"
        if file.is_file():
            try:
                return dict(json.loads(file.read_text()))
            except ValueError as error:
                raise ValueError(f"{file} is not JSON: {error}") from None
    return {}


def coordinates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return channel, lat and lon of `data.json`; the documentation and the example disagree on the key."""
    return dict(metadata.get("coords") or metadata.get("coord") or {})


class Fields:
    """The fields of one file."""

    def __init__(self, path: Path, dataset: str, times: Times) -> None:
        self._path, self._dataset, self._times = path, dataset, times
        self._files = Files()

    def read(self, variable: Variable, start: int, stop: int, levels_hpa: Sequence[float]) -> NDArray[Any]:
        """Read times `start` to `stop` of a variable: [n, L, Y, X], rows and cols as in the source."""
        fields = self._files.get(self._path)[self._dataset]
        places = variable.at(levels_hpa)
        rows = np.zeros(1, np.int64)  # of what does not change, the first
        if variable.times.size:
            rows = np.searchsorted(self._times, variable.times[start:stop])
        x_nLYX = np.empty((len(rows), len(places), *fields.shape[2:]), dtype=fields.dtype)
        for number, place in enumerate(places):
            x_nLYX[:, number] = fields[rows[0] : rows[-1] + 1, place][rows - rows[0]]
        return x_nLYX


class Invariant:
    """One field without time or coordinates of its own."""

    def __init__(self, x_YX: NDArray[Any]) -> None:
        self._x_YX = x_YX

    def read(self, variable: Variable, start: int, stop: int, levels_hpa: Sequence[float]) -> NDArray[Any]:
        """Return the field: [1, 1, Y, X]."""
        return self._x_YX[None, None]


def open_makani(files: Sequence[Path], path: Path, told: Mapping[str, str]) -> Source:
    """Open the files of several years, and the invariants beside them.

    Args:
        path: what the user gave.

    Raises:
        ValueError: something is missing or contradicts itself; names the file.
    """
    parts = [_open_file(file, told) for file in files]
    parts += _invariants(files[0], parts[0], told)
    if len(parts) == 1:
        return replace(parts[0], path=str(path))
    return join(str(path), parts, f"{LAYOUT}, {len(files)} file{'s' * (len(files) > 1)}")


def _open_file(path: Path, told: Mapping[str, str]) -> Source:
    metadata = metadata_near(path)
    dataset = str(metadata.get("h5_path", FIELDS))
    with open_hdf5(path) as file:
        fields = file.get(dataset)
        if not isinstance(fields, h5py.Dataset) or fields.ndim != 4:
            raise ValueError(
                f"{path} has no dataset {dataset} [time, channel, lat, lon] like the files beside it"
            )
        check_virtual(fields, path)
        try:
            times = _times(file, fields, path.stem, metadata)
            names = _names(file, fields, metadata)
            lat, lon = (_coordinate(file, fields, metadata, *one) for one in (("lat", 2), ("lon", 3)))
            imputed = _imputed(file, times, len(names))
            axes = plain_axes(times, lat, lon)
            variables, mapping = group_fields(names, times, told, imputed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    axes = replace(axes, levels_hpa=np.array(levels_of(variables)))
    about = {"title": str(metadata["dataset_name"])} if "dataset_name" in metadata else {}
    mapping = [*grid_mapping(lat, axes, lon), times_row(times), *mapping]
    return Source(str(path), LAYOUT, axes, variables, mapping, Fields(path, dataset, times), about)


def _scale(file: Any, fields: Any, name: str, axis: int) -> Any:
    """Return a scale of `fields`, attached or only lying beside it; None if there is none."""
    attached = dict(fields.dims[axis].items())
    return attached[name] if name in attached else file.get(name)


def _times(file: Any, fields: Any, name: str, metadata: Mapping[str, Any]) -> Times:
    """Return the times of a file, from its scale or from the year in its name."""
    scale = _scale(file, fields, "timestamp", 0)
    if scale is not None:
        seconds = np.asarray(scale[:], dtype=np.float64)
        if len(seconds) != fields.shape[0] or not np.isfinite(seconds).all():
            raise ValueError(f"{len(seconds)} timestamps, some maybe missing, for {fields.shape[0]} times")
        return np.asarray(np.round(seconds).astype(np.int64).astype("datetime64[s]"))
    year = re.search(r"(\d{4})$", name)
    hours = metadata.get("dhours")
    if year is None or not hours:
        raise ValueError(
            "it has no scale timestamp: add dhours to metadata/data.json and name the file by its year"
        )
    start, end = (np.datetime64(f"{int(year[1]) + n}-01-01", "s") for n in (0, 1))
    times = np.arange(start, end, np.timedelta64(round(float(hours) * HOUR_S), "s"))
    if len(times) != fields.shape[0]:
        raise ValueError(
            f"it has no scale timestamp, and its {fields.shape[0]} times are not the {len(times)} of "
            f"{year[1]} every {hours} h: add a scale timestamp"
        )
    return np.asarray(times)


def _names(file: Any, fields: Any, metadata: Mapping[str, Any]) -> list[str]:
    scale = _scale(file, fields, "channel", 1)
    if scale is not None:
        names = [one.decode() if isinstance(one, bytes) else str(one) for one in scale[:]]
    else:
        names = [str(one) for one in coordinates(metadata).get("channel", [])]
    if not names:
        raise ValueError("it has no scale channel, and there is no metadata/data.json with coords: channel")
    if len(names) != fields.shape[1]:
        raise ValueError(f"{len(names)} channels are named, {FIELDS} has {fields.shape[1]}")
    return [name.strip().strip("\x00") for name in names]


def _coordinate(
    file: Any, fields: Any, metadata: Mapping[str, Any], name: str, axis: int
) -> NDArray[np.float64]:
    scale = _scale(file, fields, name, axis)
    values = scale[:] if scale is not None else coordinates(metadata).get(name, [])
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError(f"it has no scale {name}, and there is no metadata/data.json with coords: {name}")
    if len(values) != fields.shape[axis]:
        raise ValueError(f"{name} has {len(values)} values, {FIELDS} has {fields.shape[axis]}")
    return values


def _imputed(file: Any, times: Times, channels: int) -> dict[int, Times]:
    """Return channel -> times at which `valid_data` is zero."""
    if "valid_data" not in file:
        return {}
    valid = np.asarray(file["valid_data"][:]) != 0
    if valid.shape != (len(times), channels):
        raise ValueError(f"valid_data is {valid.shape}, not (time, channel) = {(len(times), channels)}")
    return {channel: times[~valid[:, channel]] for channel in range(channels) if not valid[:, channel].all()}


def _invariants(file: Path, like: Source, told: Mapping[str, str]) -> list[Source]:
    """Read orography and land-sea mask, on the grid of the fields."""
    folders = [folder / "invariants" for folder in file.absolute().parents[:2]]
    folder = next((one for one in folders if one.is_dir()), None)
    found: list[Source] = []
    wanted = {name for name, _ in STATIC.values()} - set(like.variables)
    for path in sorted(folder.glob("*.nc")) if folder else []:
        try:
            with xr.open_dataset(path, engine="h5netcdf", decode_times=False, phony_dims="sort") as raw:
                arrays = {str(k): (raw[k].values, raw[k].attrs.get("units")) for k in raw.data_vars}
                places = {str(k): raw[k].values for k in raw.variables if raw[k].ndim == 1}
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        _check_places(path, like, places)
        for key, (x, unit) in arrays.items():
            name = _invariant_name(key, path)
            if name not in wanted:
                continue
            found.append(_invariant(path, like, name, key, np.squeeze(x), unit, told))
            wanted.discard(name)
    return found


def _check_places(path: Path, like: Source, places: Mapping[str, NDArray[Any]]) -> None:
    """Refuse an invariant whose rows or cols, where it says them, are in another order than the fields'."""
    lat, lon = like.axes.latitude_deg, np.empty_like(like.axes.longitude_deg)
    lon[like.axes.longitude_order] = like.axes.longitude_deg
    for key, x in places.items():
        ours = {"lat": lat[:: -1 if like.axes.flipped else 1], "lon": lon}.get(key.lower()[:3])
        if ours is None or x.shape != ours.shape or x.dtype.kind != "f":
            continue
        off = (np.asarray(x, np.float64) - ours + 180.0) % 360.0 - 180.0
        if np.abs(off).max() > SAME_DEG:
            raise ValueError(
                f"{path}: its {key} runs from {x[0]:g} to {x[-1]:g}, that of the fields from {ours[0]:g} to "
                f"{ours[-1]:g}: bring it into their order"
            )


def _invariant_name(key: str, path: Path) -> str:
    """Return the WeatherBench 2 name of an invariant, from its own name or that of its file."""
    for spelled in (key, path.stem):
        field = field_called(spelled)
        if field is not None:
            return field[0]
    return ""


def _invariant(
    path: Path, like: Source, name: str, key: str, x_YX: NDArray[Any], unit: Any, told: Mapping[str, str]
) -> Source:
    shape = (len(like.axes.latitude_deg), len(like.axes.longitude_deg))
    if x_YX.shape != shape:
        raise ValueError(f"{path} has {key} on {x_YX.shape} points, the fields are on {shape}")
    factor, offset, by, said = variable_unit(name, key, None if unit is None else str(unit), told)
    axes = replace(like.axes, times=NO_TIMES, levels_hpa=np.zeros(0))
    variable = Variable(key, (), (0,), NO_TIMES, factor, offset, by)
    rows: Rows = [("variable", f"{key} of {path.parent.name}/{path.name}", said)]
    return Source(str(path), LAYOUT, axes, {name: variable}, rows, Invariant(x_YX))
