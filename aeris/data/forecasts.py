"""Forecasts on disk: written lead by lead, continued after a stop, read for scoring.

A forecast is made in PATH.partial/forecast and moved to PATH when it is whole, so nothing unfinished looks
finished; PATH.partial/progress.json says how far it is. `PATH.zarr` is Zarr as WeatherBench 2 lays it out
(aeris/data/forecast_zarr.py); any other PATH becomes a directory of CF NetCDF files (forecast_netcdf.py).

Shapes: I init times, J lead times, M members, C channels, Y rows, X columns.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.forecast_netcdf import NetcdfFiles
from aeris.data.forecast_plan import Field, ForecastError, ForecastPlan
from aeris.data.forecast_zarr import ZarrFiles

__all__ = ["Forecast", "ForecastError", "ForecastPlan", "ForecastWriter", "open_forecast"]

PROGRESS, CONTENTS = "progress.json", "forecast"  # in PATH.partial
FILE_SUFFIXES = (".nc", ".nc4", ".h5", ".grib", ".grib2", ".grb", ".partial")


class ForecastWriter:
    """Writes a forecast, or goes on with one that was stopped.

    Attributes:
        complete: the forecast is on disk already; there is nothing to write.

    Raises:
        ForecastError: another forecast is in the way, or something that is none; says what differs.
    """

    def __init__(self, path: str | Path, plan: ForecastPlan, overwrite: bool = False) -> None:
        """Look at what is on disk; nothing is written before `write`.

        Args:
            overwrite: replace another forecast at `path`, once the new one is whole.
        """
        self.path, self.plan = Path(path), plan
        if self.path.suffix in FILE_SUFFIXES:
            raise ForecastError(
                f"--out {path}: a forecast is a directory; name it {self.path.stem}.zarr for Zarr, "
                f"or {self.path.stem} for a directory of NetCDF files"
            )
        self.partial = _partial(self.path)
        self.complete = self._is_there(overwrite)
        self._done_IM = np.zeros((len(plan.inits), plan.members), dtype=np.int64)
        self._fresh = True  # nothing of use on disk yet
        if not self.complete and self.partial.exists():
            self._look_at_partial(overwrite)
        kind = ZarrFiles if self.path.suffix == ".zarr" else NetcdfFiles
        self._files: ZarrFiles | NetcdfFiles = kind(self.partial / CONTENTS, plan)
        if not self._files.restartable:
            self._done_IM[self._done_IM < len(plan.lead_h)] = 0

    def _is_there(self, overwrite: bool) -> bool:
        """Tell whether the wanted forecast is whole and need not be made."""
        if not self.path.exists():
            return False
        there = read_plan(self.path)  # refuses, also to overwrite, what is no forecast
        if overwrite:
            return False
        _refuse_another(self.path, there, self.plan)
        return True

    def _look_at_partial(self, overwrite: bool) -> None:
        """Take over the progress of a stopped forecast, or forget about it."""
        if not any(self.partial.iterdir()):
            return  # stopped before anything happened
        there, done_IM = read_progress(self.partial)
        if not there.differences(self.plan):
            if done_IM.any() and (self.partial / CONTENTS).exists():
                self._done_IM, self._fresh = done_IM, False
        elif not overwrite:
            _refuse_another(self.partial, there, self.plan)

    @property
    def steps_done(self) -> int:
        """Number of (init, member, lead) that are on disk already."""
        return self._done_IM.size * len(self.plan.lead_h) if self.complete else int(self._done_IM.sum())

    def leads_done(self, init: int, members: range) -> int:
        """Return how many lead times all of `members` have on disk."""
        return int(self._done_IM[init, members.start : members.stop].min())

    def read(self, init: int, members: range, lead: int) -> Field:
        """Read back what was written: float32 [M, C, Y, X]."""
        return self._files.read(init, members, lead)

    def write(self, init: int, members: range, lead: int, x_MCYX: Field) -> None:
        """Write one lead time of consecutive members; those that have it already are left alone.

        Raises:
            OSError: the disk is full or cannot be written; what was written before stays good.
        """
        if self._fresh:
            self._create()
        behind = [member for member in members if self._done_IM[init, member] == lead]
        for group in _runs(behind):
            place = slice(group.start - members.start, group.stop - members.start)
            self._files.write(init, group, lead, x_MCYX[place])
        self._done_IM[init, behind] = lead + 1
        self._save_progress()

    def _create(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        (self.partial / CONTENTS).mkdir(parents=True)
        self._save_progress()  # first, so that an interrupted creation is recognised
        self._files.create()
        self._fresh = False

    def _save_progress(self) -> None:
        temporary = self.partial / (PROGRESS + ".partial")
        values = {"plan": self.plan.as_json(), "leads_done": self._done_IM.tolist()}
        temporary.write_text(json.dumps(values) + "\n")
        temporary.replace(self.partial / PROGRESS)

    def finish(self) -> None:
        """Give the forecast its name, which replaces an older one; only now does it look finished.

        Raises:
            ForecastError: something is missing.
        """
        if self.complete:
            return
        missing = self._done_IM.size * len(self.plan.lead_h) - self.steps_done
        if missing:
            raise ForecastError(f"{self.partial} still lacks {missing} lead times of members: go on first")
        self._files.finish()
        old = self.path.with_name(self.path.name + ".old")
        if self.path.exists():
            shutil.rmtree(old, ignore_errors=True)  # left by a kill between the next lines
            self.path.replace(old)
        (self.partial / CONTENTS).replace(self.path)
        shutil.rmtree(self.partial)
        shutil.rmtree(old, ignore_errors=True)
        self.complete = True


class Forecast:
    """A forecast on disk, opened for reading.

    Attributes:
        inits: init times, datetime64[s] [I].
        lead_h: lead times in hours, int64 [J].
        members: number of members M.
        names: channels, by the short names of aeris/data/variables.py.
        latitude_deg: latitude of every row, falling [Y].
        longitude_deg: longitude of every column [X].
        attrs: how it was made (weights, seed, sampler ...) and the `units` by channel.
    """

    def __init__(self, files: ZarrFiles | NetcdfFiles, done_IM: NDArray[np.int64] | None = None) -> None:
        """Wrap the files; `done_IM` says how many lead times each member of an unfinished forecast has."""
        plan = files.plan
        self._files, self._done_IM = files, done_IM
        self.inits: NDArray[np.datetime64] = np.array(plan.inits, dtype="datetime64[s]")
        self.lead_h: NDArray[np.int64] = np.array(plan.lead_h, dtype=np.int64)
        self.members = plan.members
        self.names = plan.names
        self.latitude_deg: NDArray[np.float64] = np.array(plan.latitude_deg)
        self.longitude_deg: NDArray[np.float64] = np.array(plan.longitude_deg)
        self.attrs: dict[str, Any] = plan.attrs

    def read(self, init_index: int, lead_index: int) -> Field:
        """Read all members at one init and lead time: float32 [M, C, Y, X], NaN where a channel has no value.

        Members an unfinished forecast lacks are NaN.
        """
        if self._done_IM is None:
            return self._files.read(init_index, range(self.members), lead_index)
        grid = (len(self.latitude_deg), len(self.longitude_deg))
        x_MCYX = np.full((self.members, len(self.names), *grid), np.nan, dtype=np.float32)
        there = np.flatnonzero(self._done_IM[init_index] > lead_index).tolist()
        for group in _runs(there):
            x_MCYX[group.start : group.stop] = self._files.read(init_index, group, lead_index)
        return x_MCYX


def open_forecast(path: str | Path, partial: bool = False) -> Forecast:
    """Open a forecast written by `aeris.forecast`.

    Args:
        partial: open an unfinished one too; what it lacks is NaN.

    Raises:
        ForecastError: missing, unfinished (says how far it is), damaged, or not a forecast.
    """
    path = Path(path)
    if path.exists() and path.suffix != ".partial":
        kind = _kind(path)
        return Forecast(kind(path, kind.read_plan(path)))
    unfinished = path if path.suffix == ".partial" else _partial(path)
    if not unfinished.exists():
        raise ForecastError(f"{path} does not exist: make a forecast with python -m aeris.forecast")
    plan, done_IM = read_progress(unfinished)
    if not partial:
        total = done_IM.size * len(plan.lead_h)
        raise ForecastError(
            f"the forecast {path} is not finished: {int(done_IM.sum())} of {total} lead times of members are "
            f"written; the same aeris.forecast command finishes it"
        )
    kind = _kind(unfinished / CONTENTS)
    if not kind.restartable:
        done_IM[done_IM < len(plan.lead_h)] = 0
    return Forecast(kind(unfinished / CONTENTS, plan), done_IM)


def read_plan(path: Path) -> ForecastPlan:
    """Read what the forecast at `path` is.

    Raises:
        ForecastError: it is none, or damaged.
    """
    return _kind(path).read_plan(path)


def read_progress(partial: Path) -> tuple[ForecastPlan, NDArray[np.int64]]:
    """Read what an unfinished forecast will be, and how many lead times each init and member has: [I, M].

    Raises:
        ForecastError: it is none, or damaged.
    """
    try:
        values = json.loads((partial / PROGRESS).read_text())
        plan = ForecastPlan.from_json(values["plan"])
        done_IM = np.array(values["leads_done"], dtype=np.int64).reshape(len(plan.inits), plan.members)
    except (OSError, ValueError, KeyError) as error:
        raise ForecastError(
            f"{partial} is in the way and no forecast in the making ({error}): remove it, or change --out"
        ) from None
    return plan, done_IM


def _kind(path: Path) -> type[ZarrFiles] | type[NetcdfFiles]:
    for kind in (ZarrFiles, NetcdfFiles):
        if path.is_dir() and kind.recognise(path):
            return kind
    raise ForecastError(f"{path} is not a forecast of aeris.forecast: choose another path")


def _refuse_another(path: Path, there: ForecastPlan, now: ForecastPlan) -> None:
    """Refuse to mix two forecasts."""
    different = there.differences(now)
    if different:
        raise ForecastError(
            f"{path} holds another forecast ({'; '.join(different)}): choose another --out, or --overwrite it"
        )


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _runs(numbers: list[int]) -> list[range]:
    """Group rising integers into runs without gaps."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
