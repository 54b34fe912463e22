"""Forecasts on disk: written lead by lead, continued after a stop, read for scoring.

A forecast is made in PATH.partial/forecast and moved to PATH when it is whole, so nothing unfinished looks
finished; aeris/data/forecast_members.py says what else is there meanwhile. `PATH.zarr` is Zarr as
WeatherBench 2 lays it out (aeris/data/forecast_zarr.py); any other PATH becomes a directory of CF NetCDF
files (forecast_netcdf.py).

Shapes: I init times, J lead times, M members, C channels, Y rows, X columns.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.forecast_members import (
    CONTENTS,
    Files,
    MemberWriter,
    files_of,
    partial_of,
    read_progress,
    runs,
    write_progress,
)
from aeris.data.forecast_netcdf import NetcdfFiles
from aeris.data.forecast_plan import Field, ForecastError, ForecastPlan
from aeris.data.forecast_zarr import ZarrFiles

__all__ = ["Forecast", "ForecastError", "ForecastPlan", "ForecastWriter", "MemberWriter", "open_forecast"]

LOCK = "lock"  # in PATH.partial
FILE_SUFFIXES = (".nc", ".nc4", ".h5", ".grib", ".grib2", ".grb", ".partial")


class ForecastWriter:
    """Begins, writes and finishes a forecast, or goes on with one that was stopped.

    One process has it. Others may write members beside it, once it has begun: `MemberWriter`.

    Attributes:
        complete: the forecast is on disk already; there is nothing to write.
        release: lets other programs write it again.

    Raises:
        ForecastError: another forecast is in the way, or something that is none; says what differs.
    """

    def __init__(self, path: str | Path, plan: ForecastPlan, overwrite: bool = False) -> None:
        """Look at what is on disk; nothing is written before `begin` or `write`.

        Args:
            overwrite: replace another forecast at `path`, once the new one is whole.
        """
        self.path, self.plan = Path(path), plan
        if self.path.suffix in FILE_SUFFIXES:
            raise ForecastError(
                f"--out {path}: a forecast is a directory; name it {self.path.stem}.zarr for Zarr, "
                f"or {self.path.stem} for a directory of NetCDF files"
            )
        self.partial = partial_of(self.path)
        self.complete = self._is_there(overwrite)
        self._done_IM = np.zeros((len(plan.inits), plan.members), dtype=np.int64)
        self._fresh = True  # nothing of use on disk yet
        if not self.complete and self.partial.exists():
            self._look_at_partial(overwrite)
        self._files: Files = files_of(self.path, plan)
        if not self._files.restartable:
            self._done_IM[self._done_IM < len(plan.lead_h)] = 0
        self._members: MemberWriter | None = None
        self.release: Callable[[], Any] = lambda: None

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
        if not {path.name for path in self.partial.iterdir()} - {LOCK}:
            return  # stopped before anything happened
        there, done_IM = read_progress(self.partial)
        if not there.differences(self.plan):
            if done_IM.any() and (self.partial / CONTENTS).exists():
                self._done_IM, self._fresh = done_IM, False
        elif not overwrite:
            _refuse_another(self.partial, there, self.plan)

    @property
    def restartable(self) -> bool:
        """Whether a member that was stopped goes on where it was; else it starts again."""
        return self._files.restartable

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

    def begin(self) -> None:
        """Make the files, if there are none to go on with; from now on members may be written.

        Raises:
            ForecastError: another program is making this forecast.
        """
        self._keep_others_out()
        if self._fresh:
            for path in self.partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            (self.partial / CONTENTS).mkdir()
        write_progress(self.partial, self.plan, self._done_IM)
        if self._fresh:  # only now, so that an interrupted creation is recognised
            self._files.create()
            self._fresh = False

    def _keep_others_out(self) -> None:
        """Hold a lock until `release`, or while this object lives, where the file system knows locks."""
        self.partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.partial / LOCK, os.O_RDWR | os.O_CREAT)
        self.release()
        self.release = weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ForecastError(
                f"another program is making {self.path}: wait for its end, or choose another --out"
            ) from None
        except OSError:  # no locks here: two at once would write the same numbers, and one fail in the end
            pass

    def write(self, init: int, members: range, lead: int, x_MCYX: Field) -> None:
        """Write one lead time of consecutive members; those that have it already are left alone.

        Raises:
            OSError: the disk is full or cannot be written; what was written before stays good.
        """
        if self._members is None:
            self.begin()
            self._members = MemberWriter(self.path, self.plan, done_IM=self._done_IM)
        self._members.write(init, members, lead, x_MCYX)

    def finish(self) -> None:
        """Give the forecast its name, which replaces an older one; only now does it look finished.

        Raises:
            ForecastError: something is missing.
        """
        if self.complete:
            return
        done_IM = self._done_IM if self._fresh else read_progress(self.partial)[1]
        missing = done_IM.size * len(self.plan.lead_h) - int(done_IM.sum())
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
        self.release()
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

    def __init__(self, files: Files, done_IM: NDArray[np.int64] | None = None) -> None:
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

    def read(self, init_index: int, lead_index: int, members: range | None = None) -> Field:
        """Read members at one init and lead time: float32 [M, C, Y, X], NaN where a channel has no value.

        Members an unfinished forecast lacks are NaN.

        Args:
            members: consecutive members; all by default.
        """
        wanted = range(self.members) if members is None else members
        if self._done_IM is None:
            return self._files.read(init_index, wanted, lead_index)
        grid = (len(self.latitude_deg), len(self.longitude_deg))
        x_MCYX = np.full((len(wanted), len(self.names), *grid), np.nan, dtype=np.float32)
        for group in runs([one for one in wanted if self._done_IM[init_index, one] > lead_index]):
            place = slice(group.start - wanted.start, group.stop - wanted.start)
            x_MCYX[place] = self._files.read(init_index, group, lead_index)
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
    unfinished = path if path.suffix == ".partial" else partial_of(path)
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
