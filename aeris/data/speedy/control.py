"""The control run: years of one simulated atmosphere, a NetCDF file per month, and states to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from aeris.data.speedy import restarts
from aeris.data.speedy.levels import on_pressure_levels
from aeris.data.speedy.model import Simulation, time_of

CHUNK_DAYS = 10
DAY = np.timedelta64(1, "D")
MADE = "speedy.json"
STATE_BYTES = 4e6


@dataclass(frozen=True)
class Options:
    """Simulate an atmosphere with SPEEDY and write it in the WeatherBench 2 layout, a NetCDF file per month.

    A year takes 5 to 10 minutes on two cores and 1.2 GB, and 150 MB of restarts. After a stop, the same
    command goes on from the newest restart. `ensemble` as the first word makes true ensemble forecasts from
    the restarts: python -m aeris.data.speedy ensemble --help.
    """

    out: Path
    """Directory of the files."""
    days: int = 0
    """Days to write; 365 if neither days nor years are given."""
    years: int = 0
    """Years to write, in place of days: to the same date so many years on, leap days included."""
    spin_up_days: int = 365
    """Days the model runs before; the stratosphere drifts with less than a year."""
    start: str = "2001-01-01"
    """First day, in the calendar of the model."""
    step_h: int = 6
    """Hours between the times written; must divide 24."""
    levels_hpa: tuple[int, ...] = (50, 100, 200, 300, 500, 700, 850, 925)
    """Pressure levels."""
    restart_days: int = CHUNK_DAYS
    """Days between the states kept in OUT/restarts, a multiple of 10; 0 keeps none."""

    def __post_init__(self) -> None:
        if self.days < 0 or self.years < 0 or self.spin_up_days < 1:
            raise ValueError(
                f"--days {self.days}, --years {self.years} and --spin-up-days {self.spin_up_days} must be at "
                "least 1"
            )
        if self.days and self.years:
            raise ValueError(f"--days {self.days} and --years {self.years}: give one of them")
        if self.step_h not in (1, 2, 3, 4, 6, 8, 12, 24):
            raise ValueError(f"--step-h {self.step_h} does not divide 24: choose 1, 2, 3, 4, 6, 8, 12 or 24")
        if (
            not self.levels_hpa
            or min(self.levels_hpa) < 1
            or list(self.levels_hpa) != sorted({*self.levels_hpa})
        ):
            raise ValueError(f"--levels-hpa {self.levels_hpa} must be positive and rising")
        if self.restart_days < 0 or self.restart_days % CHUNK_DAYS:
            raise ValueError(f"--restart-days {self.restart_days} must be a multiple of {CHUNK_DAYS}, or 0")
        try:
            np.datetime64(self.start, "D")
        except ValueError:
            raise ValueError(f"--start {self.start!r} is no day: write it like 2001-01-01") from None

    @property
    def length_days(self) -> int:
        """Days to write."""
        if not self.years:
            return self.days or 365
        first = np.datetime64(self.start, "D")
        month = first.astype("datetime64[M]")
        past = first - month.astype("datetime64[D]")
        return int(((month + 12 * self.years).astype("datetime64[D]") + past - first) / DAY)

    @property
    def times(self) -> NDArray[np.datetime64]:
        """Every time that is written."""
        first = np.datetime64(self.start, "D").astype("datetime64[s]")
        count = self.length_days * 24 // self.step_h
        return np.asarray(first + np.arange(count) * np.timedelta64(self.step_h, "h"))

    @property
    def began(self) -> np.datetime64:
        """When the simulation begins, spin-up included."""
        return np.datetime64(self.times[0] - self.spin_up_days * DAY)

    @property
    def made(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON values."""
        return {
            "days": self.length_days,
            "spin_up_days": self.spin_up_days,
            "start": self.start,
            "step_h": self.step_h,
            "levels_hpa": list(self.levels_hpa),
        }


def read_options(out: Path) -> Options:
    """Return the options a control run was made with.

    Raises:
        ValueError: the directory holds none.
    """
    try:
        made = json.loads((out / MADE).read_text())
        return Options(out, **{**made, "levels_hpa": tuple(made["levels_hpa"])})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{out} is no control run ({error}): make one with python -m aeris.data.speedy --out {out}"
        ) from None


def is_done(options: Options) -> bool:
    """Say whether every file is there.

    Raises:
        ValueError: the directory holds other data.
    """
    made = options.out / MADE
    if not made.exists():
        found = sorted(options.out.glob("*.nc"))
        if found:
            raise ValueError(f"{options.out} holds other files ({found[0].name}): choose another --out")
        return False
    before, now = json.loads(made.read_text()), options.made
    if before != now:
        raise ValueError(
            f"{options.out} was made with {before}, not {now}: repeat that or choose another --out"
        )
    return not _missing_months(options).size


def _missing_months(options: Options) -> NDArray[np.datetime64]:
    months = np.unique(options.times.astype("datetime64[M]"))
    return np.asarray([month for month in months if not (options.out / file_name(month)).exists()])


def begin(options: Options, model: Simulation) -> int:
    """Spin up, or take the newest restart before the first month that is missing; return the days done."""
    step = np.timedelta64(options.step_h, "h")
    options.out.mkdir(parents=True, exist_ok=True)
    missing = _missing_months(options)
    if (options.out / MADE).exists() and missing.size:
        first = max(missing[0].astype("datetime64[s]"), options.times[0])
        path = restarts.newest(options.out, first - step)
        if path is not None:
            model.restore(restarts.load(path))
            return int((time_of(model.state()) + step - options.times[0]) / DAY)
    spin_up = options.spin_up_days - options.step_h / 24  # the first state written is that of `start`
    model.advance(spin_up, spin_up)
    (options.out / MADE).write_text(json.dumps(options.made))
    if options.restart_days:
        restarts.save(options.out, model.state())
    return 0


def generate(options: Options, model: Simulation) -> Iterator[tuple[Path | None, int, int]]:
    """Spin up or go on, run and write; yields (file just finished or None, its times, days done).

    Raises:
        ValueError: the disk is too small, or the model left the range of real weather.
    """
    statics, pending, checked = model.statics(), [], False
    first = begin(options, model)
    missing = _missing_months(options)
    if first:
        yield None, 0, first
    for done in range(first, options.length_days, CHUNK_DAYS):
        days = min(CHUNK_DAYS, options.length_days - done)
        weather = on_pressure_levels(model.advance(days, options.step_h / 24), statics, options.levels_hpa)
        if not checked:
            _check_room(options, weather, missing)
            checked = True
        _check(weather)
        if options.restart_days and (done + days) % options.restart_days == 0:
            restarts.save(options.out, model.state())
        pending.append(weather)
        together = xr.concat(
            pending, "time", data_vars="minimal", coords="minimal", compat="override", join="exact"
        )
        months = together.time.values.astype("datetime64[M]")
        last = done + days == options.length_days
        for month in np.unique(months)[: None if last else -1]:
            if month in missing:
                whole = together.isel(time=np.flatnonzero(months == month))
                yield write(options.out / file_name(month), whole), whole.sizes["time"], done + days
        pending = [together.isel(time=np.flatnonzero(months == months[-1]))]
        yield None, 0, done + days


def file_name(month: np.datetime64) -> str:
    """Name the file of a month."""
    return f"speedy_{month.astype('datetime64[M]')}.nc"


def write(path: Path, weather: xr.Dataset) -> Path:
    """Write one file, chunked by time, under another name until it is whole; return its path."""
    partial = path.with_name(path.name + ".partial")
    sizes = {**weather.sizes, "time": 1}
    encoding: dict[str, dict[str, Any]] = {
        str(name): {"_FillValue": None, "chunksizes": tuple(sizes[str(dim)] for dim in weather[name].dims)}
        for name in weather.data_vars
    }
    encoding["time"] = {
        "units": "hours since 1900-01-01",
        "dtype": "int64",
        "calendar": "proleptic_gregorian",
    }
    weather.to_netcdf(partial, engine="h5netcdf", encoding=encoding)
    partial.replace(path)
    return path


def _check(weather: xr.Dataset) -> None:
    """Refuse a simulation that blew up."""
    for name in weather.data_vars:
        if not np.isfinite(weather[name].values).all():
            raise ValueError(f"the simulation blew up: {name} is not finite after {weather.time.values[0]}")


def _check_room(options: Options, weather: xr.Dataset, missing: NDArray[np.datetime64]) -> None:
    """Refuse to begin what the disk cannot hold."""
    times = int(np.isin(options.times.astype("datetime64[M]"), missing).sum())
    need = weather.nbytes / weather.sizes["time"] * times
    if options.restart_days:
        need += STATE_BYTES * times * options.step_h / 24 / options.restart_days
    free = shutil.disk_usage(options.out).free
    if need > free:
        raise ValueError(f"{options.out} needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
