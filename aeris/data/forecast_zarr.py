"""A forecast as Zarr in the layout of WeatherBench 2, readable by its tools and by `xarray.open_zarr`.

    2m_temperature  [time, number, prediction_timedelta, latitude, longitude]        time is the init time
    geopotential    [time, number, prediction_timedelta, level, latitude, longitude]

A chunk is one field of one member at one init and lead time, with all its levels. The format is Zarr 2, which
zarr 2.18 and zarr 3 both read and write, through the few calls they have in common.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numcodecs
import numpy as np
import zarr

from aeris.data.forecast_plan import STANDARD_NAMES, Field, ForecastError, ForecastPlan

# zarr 3 writes format 3 unless told otherwise; zarr 2.18 knows no such argument.
FORMAT_2: dict[str, Any] = {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) >= 3 else {}
PLAN = "aeris_forecast"  # attribute with the plan as JSON

_AXES = ("time", "number", "prediction_timedelta")


class ZarrFiles:
    """The files of one forecast."""

    restartable = True
    """A lead time that is written can be read back, so a stopped member goes on where it was."""

    def __init__(self, directory: Path, plan: ForecastPlan) -> None:
        self.directory, self.plan = directory, plan
        self._arrays: dict[tuple[str, str], Any] = {}

    @staticmethod
    def recognise(directory: Path) -> bool:
        """Tell whether a directory is a Zarr group."""
        return (directory / ".zgroup").exists()

    @staticmethod
    def read_plan(directory: Path) -> ForecastPlan:
        """Read what the forecast in a directory is.

        Raises:
            ForecastError: it was not written by this program, or is damaged.
        """
        try:
            group: Any = zarr.open_group(str(directory), mode="r", **FORMAT_2)
            values = json.loads(group.attrs[PLAN])
        except (KeyError, ValueError, OSError) as error:
            raise ForecastError(f"{directory} is not a forecast of aeris.forecast ({error!r})") from None
        return ForecastPlan.from_json(values)

    def create(self) -> None:
        """Write all coordinates and describe all variables; no field takes space before it is written."""
        plan = self.plan
        zarr.open_group(str(self.directory), mode="a", **FORMAT_2).attrs.update(
            {**simple(plan), PLAN: json.dumps(plan.as_json())}
        )
        seconds = np.array(plan.inits, dtype="datetime64[s]").astype(np.int64)
        epoch = {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"}
        self._coordinate("time", seconds, {"standard_name": "forecast_reference_time", **epoch})
        self._coordinate("number", np.arange(plan.members), {"standard_name": "realization"})
        lead = {"standard_name": "forecast_period", "units": "hours", "dtype": "timedelta64[ns]"}
        self._coordinate("prediction_timedelta", np.array(plan.lead_h, dtype=np.int64), lead)
        if plan.levels_hpa:
            levels_hpa = np.array(plan.levels_hpa)
            whole = bool((levels_hpa == levels_hpa.round()).all())
            level = {"standard_name": "air_pressure", "units": "hPa", "positive": "down"}
            self._coordinate("level", levels_hpa.astype(np.int64) if whole else levels_hpa, level)
        for name, values, units in (
            ("latitude", plan.latitude_deg, "degrees_north"),
            ("longitude", plan.longitude_deg, "degrees_east"),
        ):
            self._coordinate(name, np.array(values), {"standard_name": name, "units": units})
        self._describe_variables()

    def _describe_variables(self) -> None:
        plan = self.plan
        cases = (len(plan.inits), plan.members, len(plan.lead_h))
        grid = (len(plan.latitude_deg), len(plan.longitude_deg))
        for variable in plan.variables:
            field = (len(plan.levels_hpa), *grid) if variable.levels else grid
            axes = (*_AXES, *(("level",) if variable.levels else ()), "latitude", "longitude")
            attrs = {"units": variable.units, "short_name": variable.short}
            if variable.name in STANDARD_NAMES:
                attrs["standard_name"] = STANDARD_NAMES[variable.name]
            self._array(variable.name, (*cases, *field), (1, 1, 1, *field), "<f4", float("nan"), axes, attrs)

    def _coordinate(self, name: str, values: Any, attrs: dict[str, str]) -> None:
        kind = "<i8" if np.issubdtype(values.dtype, np.integer) else "<f8"
        self._array(name, values.shape, values.shape, kind, None, (name,), attrs)[:] = values

    def _array(
        self,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        kind: str,
        fill: float | None,
        axes: tuple[str, ...],
        attrs: dict[str, str],
    ) -> Any:
        compressor = numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.SHUFFLE)
        where = {"store": str(self.directory), "path": name, "overwrite": True, **FORMAT_2}
        array = zarr.create(
            shape=shape, chunks=chunks, dtype=kind, fill_value=fill, compressor=compressor, **where
        )
        array.attrs.update({"_ARRAY_DIMENSIONS": list(axes), **attrs})
        return array

    def _open(self, name: str, mode: Literal["r", "r+"]) -> Any:
        if (name, mode) not in self._arrays:
            self._arrays[name, mode] = zarr.open_group(str(self.directory), mode=mode, **FORMAT_2)[name]
        return self._arrays[name, mode]

    def write(self, init: int, members: range, lead: int, x_MCYX: Field) -> None:
        """Write consecutive members at one init and lead time."""
        for variable in self.plan.variables:
            field = self.plan.gather(x_MCYX, variable)
            self._open(variable.name, "r+")[init, members.start : members.stop, lead] = field

    def read(self, init: int, members: range, lead: int) -> Field:
        """Read consecutive members at one init and lead time: float32 [M, C, Y, X], NaN where not written."""
        plan = self.plan
        grid = (len(plan.latitude_deg), len(plan.longitude_deg))
        x_MCYX = np.empty((len(members), len(plan.names), *grid), dtype=np.float32)
        for variable in plan.variables:
            field = self._open(variable.name, "r")[init, members.start : members.stop, lead]
            plan.scatter(field, variable, x_MCYX)
        return x_MCYX

    def close(self) -> None:
        """Do nothing: no file stays open between two writes."""

    def finish(self) -> None:
        """Gather the metadata in one file, for readers that open it from far away."""
        zarr.consolidate_metadata(str(self.directory), **FORMAT_2)


def simple(plan: ForecastPlan) -> dict[str, Any]:
    """Return the attributes of a file that any reader understands: text and numbers."""
    return {"Conventions": "CF-1.11", **plan.about, **plan.made}
