"""Forecasts as files that others read: NetCDF or Zarr, CF-1.11, names and layout of WeatherBench 2.

    2m_temperature  [time, prediction_timedelta, latitude, longitude]         time is when the forecast starts
    geopotential    [time, prediction_timedelta, level, latitude, longitude]

Lead times are appended as they come, so no more than one is in memory. The file has the name `.partial` until
it is whole. `Batch.to_netcdf` writes single batches as the official package does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeris.aurora import cf_names
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.cf_formats import ATTRS, LEAD, Netcdf, Sink, Zarr
from aeris.aurora.times import utc

if TYPE_CHECKING:
    import xarray

CASES = ("time", LEAD)
GRID = ("latitude", "longitude")
SINKS: dict[str, type[Netcdf] | type[Zarr]] = {".nc": Netcdf, ".zarr": Zarr}
EPOCH = {"units": "seconds since 1970-01-01 00:00:00", "calendar": "proleptic_gregorian"}


def to_cf(batches: Iterable[Batch], path: str | Path, start: datetime | Sequence[datetime]) -> int:
    """Write the predictions of one roll-out.

    Args:
        batches: predictions, one lead time each, rising; with several samples, forecasts of several starts.
            May be a roll-out itself, which then runs as it is written.
        path: ends in .nc or .zarr; a file of this name, or a Zarr directory that `to_cf` wrote, is replaced
            once the new one is whole.
        start: when the forecast of every sample starts: the `metadata.time` of its first input.

    Returns:
        How many lead times were written.

    Raises:
        ValueError: another ending; something else has this name; no batch; lat and lon are [H, W]; a batch
            has other variables, another grid or another number of samples than the first; lead times fall or
            differ between samples.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    path = Path(path)
    if path.suffix not in SINKS:
        raise ValueError(f"a forecast is written to a name that ends in .nc or .zarr, not {path.name}")
    starts = tuple(map(utc, (start,) if isinstance(start, datetime) else start))
    partial = path.with_name(path.name + ".partial")
    _check_replaceable(path)
    _check_unfinished(partial)
    _remove(partial)
    writer: _Writer | None = None
    try:
        for batch in batches:
            if writer is None:
                writer = _Writer(SINKS[path.suffix](partial), batch, starts)
            writer.append(batch)
        if writer is None:
            raise ValueError(f"no prediction to write to {path}")
        writer.sink.close()
    except BaseException:
        if writer is not None:
            writer.sink.abandon()
        _remove(partial)
        raise
    if path.is_dir():  # a directory cannot be replaced in one go
        _check_replaceable(path)
        shutil.rmtree(path)
    partial.replace(path)
    return len(writer.leads_s)


def _check_replaceable(path: Path) -> None:
    """Refuse to put a forecast in the place of a directory, or of anything under a Zarr name, that is none.

    Raises:
        ValueError: it is something else.
    """
    if path.suffix == ".nc":
        if path.is_dir():
            raise ValueError(f"{path} is a directory: give another name, or remove it")
    elif path.is_dir() and not path.is_symlink():
        try:
            open_cf(path).close()
        except ValueError as error:
            raise ValueError(f"{error}: it is not replaced; give another name, or remove it") from None
    elif path.exists() or path.is_symlink():
        raise ValueError(f"{path} is no directory of Zarr: give another name, or remove it")


def _check_unfinished(partial: Path) -> None:
    """Refuse to remove a directory that is not what an earlier `to_cf`, cut off, left.

    Raises:
        ValueError: it is something else.
    """
    if not partial.is_dir():
        return
    try:
        attrs = json.loads((partial / ".zattrs").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        attrs = {}
    if attrs.get("source") != ATTRS["source"]:
        raise ValueError(f"{partial} is no unfinished forecast of aeris.aurora: rename it, or remove it")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _numpy(x: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = x.detach().float().cpu().numpy()
    return values


_Field = tuple[tuple[str, ...], dict[str, str], Tensor]


def _fields(batch: Batch) -> dict[str, _Field]:
    """Return (dims, attributes, newest values) of every variable by its name in the file."""
    found: dict[str, _Field] = {}
    for table, variables, dims in (
        (cf_names.SURFACE, batch.surf_vars, (*CASES, *GRID)),
        (cf_names.LEVELLED, batch.atmos_vars, (*CASES, "level", *GRID)),
        (cf_names.STATIC, batch.static_vars, GRID),
    ):
        for short, x in variables.items():
            name, attrs = cf_names.describe(table, short)
            if name in found:
                raise ValueError(f"{short!r} would be the second variable {name!r} of the file: rename one")
            static = dims == GRID
            found[name] = (dims, attrs, (x if x.dim() == 2 else x[0, -1]) if static else x[:, -1])
    return found


class _Writer:
    """Knows what the first batch holds and holds the others to it."""

    def __init__(self, sink: Sink, first: Batch, starts: tuple[datetime, ...]) -> None:
        where = first.metadata
        if where.lat.dim() != 1:
            raise ValueError("a forecast file needs lat (H,) and lon (W,): regrid, or use Batch.to_netcdf")
        if len(starts) != len(where.time):
            raise ValueError(f"{len(starts)} start times for {len(where.time)} samples: give one for each")
        self.sink, self.starts, self.leads_s = sink, starts, list[int]()
        self._like = (where.grid_key, where.atmos_levels, list(_fields(first)))
        seconds = np.array(starts, dtype="datetime64[s]").astype(np.int64)
        sink.create("time", ("time",), seconds, {"standard_name": "forecast_reference_time", **EPOCH})
        none = np.empty(0, dtype=np.int64)
        lead = {"standard_name": "forecast_period", "units": "seconds", "dtype": "timedelta64[ns]"}
        sink.create(LEAD, (LEAD,), none, lead)
        sink.create("rollout_step", (LEAD,), none, {"long_name": "model steps since the start"})
        if where.atmos_levels:
            levels = np.array(where.atmos_levels)
            sink.create("level", ("level",), levels, {"standard_name": "air_pressure", "units": "hPa"})
        for name, values, units in zip(GRID, (where.lat, where.lon), ("degrees_north", "degrees_east")):
            sink.create(name, (name,), values.numpy(), {"standard_name": name, "units": units})
        for name, (dims, attrs, x) in _fields(first).items():
            sink.create(name, dims, _numpy(x if LEAD not in dims else x[:, None]), attrs)

    def append(self, batch: Batch) -> None:
        """Write the next lead time."""
        where, fields = batch.metadata, _fields(batch)
        if (where.grid_key, where.atmos_levels, list(fields)) != self._like:
            raise ValueError(
                f"the prediction for {where.time[0]} has other variables, levels or another grid than the "
                f"first: {', '.join(fields)}"
            )
        leads = {(time - start) // timedelta(seconds=1) for time, start in zip(where.time, self.starts)}
        if len(where.time) != len(self.starts) or len(leads) != 1:
            raise ValueError(f"predictions for {where.time} from {self.starts}: lead times must be equal")
        lead_s = leads.pop()
        if self.leads_s and lead_s <= self.leads_s[-1]:
            raise ValueError(f"a lead time of {lead_s} s after one of {self.leads_s[-1]} s: they must rise")
        count = len(self.leads_s)
        self.leads_s.append(lead_s)
        self.sink.append(LEAD, np.array(lead_s), count)
        self.sink.append("rollout_step", np.array(where.rollout_step), count)
        for name, (dims, _, x) in fields.items():
            if LEAD in dims:
                self.sink.append(name, _numpy(x), count)


@dataclass(frozen=True)
class Predictions:
    """A forecast in a file, opened for reading."""

    path: Path
    starts: tuple[datetime, ...]
    """When the forecasts start, UTC."""
    leads: tuple[timedelta, ...]
    """Lead times, rising."""
    _data: xarray.Dataset

    def read(self, start: int, lead: int) -> Batch:
        """Read one state as a batch of one sample and one time.

        Args:
            start: number of the start.
            lead: number of the lead time.
        """
        data = self._data.isel({CASES[0]: start, LEAD: lead}).load()
        kinds: dict[str, dict[str, Tensor]] = {"surf": {}, "static": {}, "atmos": {}}
        for name, values in data.data_vars.items():
            if name == "rollout_step":
                continue
            short = str(values.attrs.get("short_name", name))
            static = LEAD not in self._data[name].dims
            x = torch.from_numpy(np.array(values.values, dtype=np.float32))
            kind = "static" if static else ("atmos" if "level" in values.dims else "surf")
            kinds[kind][short] = x if static else x[None, None]
        where = Metadata(
            lat=torch.from_numpy(np.array(data["latitude"].values)),
            lon=torch.from_numpy(np.array(data["longitude"].values)),
            time=(self.starts[start] + self.leads[lead],),
            atmos_levels=tuple(data["level"].values.tolist()) if "level" in data else (),
            rollout_step=int(data["rollout_step"]),
        )
        return Batch(kinds["surf"], kinds["static"], kinds["atmos"], where)

    def close(self) -> None:
        """Close the file."""
        self._data.close()


def open_cf(path: str | Path) -> Predictions:
    """Open what `to_cf` wrote.

    Raises:
        FileNotFoundError: there is nothing of this name.
        ValueError: it is something else.
    """
    import xarray

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no forecast {path}")
    try:
        engine = "zarr" if path.is_dir() else "h5netcdf"
        data = xarray.open_dataset(path, engine=engine, decode_timedelta=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is neither NetCDF nor Zarr, or damaged ({error})") from None
    lacks = [name for name in (*CASES, "rollout_step", *GRID) if name not in data.variables]
    if lacks:
        data.close()
        raise ValueError(f"{path} is no forecast of aeris.aurora: it lacks {', '.join(lacks)}")
    starts = tuple(data["time"].values.astype("datetime64[s]").tolist())
    leads = tuple(timedelta(seconds=int(lead)) for lead in data[LEAD].values)
    return Predictions(path, starts, leads, data)
