"""A forecast as CF-1.11 NetCDF: a directory with one file per init time and member.

    20000531T0000_m003.nc: z [realization, forecast_reference_time, forecast_period, level, lat., lon.]

A file grows lead by lead under the name `.partial` and is renamed when whole; `forecast.json` says what the
directory holds. `xarray.open_mfdataset` joins the files along both first dims.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np

from aeris.data.forecast_plan import STANDARD_NAMES, Field, ForecastError, ForecastPlan, Variable
from aeris.data.forecast_zarr import simple

DESCRIPTION = "forecast.json"
SURFACE_AXES = ("realization", "forecast_reference_time", "forecast_period", "latitude", "longitude")
LEVEL_AXES = (*SURFACE_AXES[:3], "level", *SURFACE_AXES[3:])
HEIGHTS_M = {"t2m": 2.0, "d2m": 2.0, "u10": 10.0, "v10": 10.0}


class NetcdfFiles:
    """The files of one forecast."""

    restartable = False
    """A file that was being written when the program stopped may be damaged: its member starts again."""

    def __init__(self, directory: Path, plan: ForecastPlan) -> None:
        self.directory, self.plan = directory, plan
        self._open: dict[tuple[int, int], Any] = {}

    @staticmethod
    def recognise(directory: Path) -> bool:
        """Tell whether a directory holds a forecast of this kind."""
        return (directory / DESCRIPTION).exists()

    @staticmethod
    def read_plan(directory: Path) -> ForecastPlan:
        """Read what the forecast in a directory is.

        Raises:
            ForecastError: the description is damaged.
        """
        try:
            values = json.loads((directory / DESCRIPTION).read_text())
        except (ValueError, OSError) as error:
            raise ForecastError(f"{directory / DESCRIPTION} is damaged ({error})") from None
        return ForecastPlan.from_json(values)

    def path(self, init: int, member: int) -> Path:
        """Return the file of one member."""
        time = self.plan.inits[init].replace("-", "").replace(":", "")
        return self.directory / f"{time.removesuffix('00')}_m{member:03d}.nc"

    def create(self) -> None:
        """Write the description; remove what a stopped program left half written."""
        for left in self.directory.glob("*.nc.partial"):
            left.unlink()
        (self.directory / DESCRIPTION).write_text(json.dumps(self.plan.as_json(), indent=1) + "\n")

    def write(self, init: int, members: range, lead: int, x_MCYX: Field) -> None:
        """Write consecutive members at one init and lead time; the last lead time completes their files."""
        fields = [(variable, self.plan.gather(x_MCYX, variable)) for variable in self.plan.variables]
        for place, member in enumerate(members):
            if (init, member) not in self._open:
                self._open[init, member] = self._start(init, member)
            file = self._open[init, member]
            for variable, field in fields:
                file[variable.short][0, 0, lead] = field[place]
            if lead == len(self.plan.lead_h) - 1:
                file.close()
                del self._open[init, member]
                partial(self.path(init, member)).replace(self.path(init, member))

    def close(self) -> None:
        """Close the files of members that are not complete; what goes on makes them anew."""
        for file in self._open.values():
            with suppress(OSError, RuntimeError):  # a full disk, which was the first error
                file.close()
        self._open.clear()

    def _start(self, init: int, member: int) -> Any:
        """Create the file of a member with its coordinates and empty variables."""
        plan = self.plan
        file = h5netcdf.File(partial(self.path(init, member)), "w")
        file.dimensions = {
            "realization": 1,
            "forecast_reference_time": 1,
            "forecast_period": len(plan.lead_h),
            **({"level": len(plan.levels_hpa)} if plan.levels_hpa else {}),
            "latitude": len(plan.latitude_deg),
            "longitude": len(plan.longitude_deg),
        }
        file.attrs.update(simple(plan))
        start_s = int(np.datetime64(plan.inits[init], "s").astype(np.int64))
        for name, (axes, values, attrs) in coordinates(plan, start_s, member).items():
            file.create_variable(name, axes, data=values).attrs.update(attrs)
        for variable in plan.variables:
            self._describe(file, variable)
        return file

    def _describe(self, file: Any, variable: Variable) -> None:
        axes = LEVEL_AXES if variable.levels else SURFACE_AXES
        chunks = (1, 1, 1, *(file.dimensions[axis].size for axis in axes[3:]))
        array = file.create_variable(
            variable.short, axes, dtype="f4", fillvalue=np.float32("nan"), chunks=chunks
        )
        # kg/kg is a pure number, which CF writes as 1
        attrs = {
            "units": variable.units.replace("kg kg-1", "1"),
            "coordinates": "time",
            "long_name": variable.name.replace("_", " "),
        }
        if variable.name in STANDARD_NAMES:
            attrs["standard_name"] = STANDARD_NAMES[variable.name]
        if variable.short in HEIGHTS_M:
            attrs["coordinates"] += f" height_{HEIGHTS_M[variable.short]:.0f}m"
        array.attrs.update(attrs)

    def read(self, init: int, members: range, lead: int) -> Field:
        """Read consecutive members at one init and lead time: float32 [M, C, Y, X].

        Raises:
            ForecastError: a file is missing or damaged.
        """
        plan = self.plan
        grid = (len(plan.latitude_deg), len(plan.longitude_deg))
        x_MCYX = np.empty((len(members), len(plan.names), *grid), dtype=np.float32)
        for place, member in enumerate(members):
            path = self.path(init, member)
            try:
                with h5netcdf.File(path, "r") as file:
                    for variable in plan.variables:
                        field = file[variable.short][0, 0, lead]
                        plan.scatter(field[None], variable, x_MCYX[place : place + 1])
            except (OSError, KeyError) as error:
                raise ForecastError(f"{path} is missing or damaged ({error})") from None
        return x_MCYX

    def finish(self) -> None:
        """Nothing is left to do: every file is whole."""


def partial(path: Path) -> Path:
    """Return the name of a file while it is being written."""
    return path.with_name(path.name + ".partial")


Coordinate = tuple[tuple[str, ...], Any, dict[str, str]]


def coordinates(plan: ForecastPlan, start_s: int, member: int) -> dict[str, Coordinate]:
    """Return dims, values and attributes of every coordinate of one member's file, as CF wants them."""
    epoch = {"units": "seconds since 1970-01-01 00:00:00", "calendar": "standard"}
    lead_h = np.array(plan.lead_h, dtype=np.int64)
    period = {"standard_name": "forecast_period", "units": "hours"}
    found: dict[str, Coordinate] = {
        "realization": (("realization",), np.array([member]), {"standard_name": "realization", "units": "1"}),
        "forecast_reference_time": (
            ("forecast_reference_time",),
            np.array([start_s]),
            {"standard_name": "forecast_reference_time", **epoch},
        ),
        "forecast_period": (("forecast_period",), lead_h, period),
        "time": (
            ("forecast_reference_time", "forecast_period"),
            (start_s + 3600 * lead_h)[None],
            {"standard_name": "time", **epoch},
        ),
    }
    if plan.levels_hpa:
        level = {"standard_name": "air_pressure", "units": "hPa", "positive": "down", "axis": "Z"}
        found["level"] = (("level",), np.array(plan.levels_hpa), level)
    for name, values, units, axis in (
        ("latitude", plan.latitude_deg, "degrees_north", "Y"),
        ("longitude", plan.longitude_deg, "degrees_east", "X"),
    ):
        attrs = {"standard_name": name, "units": units, "axis": axis}
        found[name] = ((name,), np.array(values), attrs)
    for height_m in sorted({HEIGHTS_M[one.short] for one in plan.variables if one.short in HEIGHTS_M}):
        height = {"standard_name": "height", "units": "m", "positive": "up"}
        found[f"height_{height_m:.0f}m"] = ((), np.float64(height_m), height)
    return found
