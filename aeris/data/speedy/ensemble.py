"""True ensemble forecasts: the simulation itself, started again from perturbed states.

One step before the init time the analysis is the truth plus an error e_0, and member i is the analysis plus
an error e_i; all errors are independent draws of one symmetric distribution. So the truth, which is the
analysis less e_0, is statistically one of the members, and they are the true distribution of the weather
given the analysis. Around the truth itself the mean of the members would nearly be the truth.

Shapes: J lead times, C channels, Y rows, X cols.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import xarray as xr
from numpy.typing import NDArray

from aeris.data.forecasts import ForecastPlan, ForecastWriter, MemberWriter
from aeris.data.grid import coarsen, coarsen_axis
from aeris.data.init_times import read_init_times
from aeris.data.speedy import restarts
from aeris.data.speedy.control import DAY, MADE, Options, file_name, read_options
from aeris.data.speedy.errors import Errors, add, check_season, run_to
from aeris.data.speedy.levels import on_pressure_levels
from aeris.data.speedy.model import Simulation, Speedy
from aeris.data.store import Store
from aeris.data.variables import LEVELLED, SURFACE, channel, channel_of, in_order

Field = NDArray[np.float32]

DIFFERENT = 0.01  # of the spread of a field: more is another run


@dataclass(frozen=True)
class EnsembleOptions:
    """Make true ensemble forecasts with the simulation that made DIR. The same command goes on after a stop.

    The output is a forecast like those of aeris.forecast, with lead time 0, the perturbed states, in it.
    """

    control: tyro.conf.Positional[Path]
    """Directory of a simulation, with restarts."""
    out: Path
    """Where to: a name ending in .zarr, or a directory for NetCDF files."""
    init: tuple[str, ...]
    """Init times: 2004-01-10T00 (several), or START:END:STEPh, both ends included."""
    members: int = 10
    """Members; a member is the same in any size of ensemble."""
    lead_h: int = 240
    """Last lead time in hours."""
    step_h: int = 24
    """Hours between lead times."""
    store: str = ""
    """Store whose channels and grid the forecast gets; empty takes those of the simulation."""
    amplitude: float = 0.1
    """Size of an error of the analysis: share of the climatological standard deviation of temperature."""
    breed_days: int = 0
    """Days an error is bred before; 0 takes differences of states 24 h apart."""
    season_days: int = 45
    """The errors come from days of the year so near."""
    seed: int = 0
    """Seed of all draws."""
    processes: int = 1
    """Processes; init times are dealt to them."""
    overwrite: bool = False
    """Replace another forecast at --out, once the new one is whole."""
    dry_run: bool = False
    """Check everything, print what would be computed, and stop."""

    def __post_init__(self) -> None:
        if self.members < 1 or self.processes < 1:
            raise ValueError(f"--members {self.members} and --processes {self.processes} must be at least 1")
        if self.step_h < 1 or self.lead_h < self.step_h or self.lead_h % self.step_h:
            raise ValueError(f"--lead-h {self.lead_h} must be a multiple of --step-h {self.step_h}")
        if not self.amplitude > 0 or self.breed_days < 0 or self.season_days < 1:
            raise ValueError(
                f"--amplitude {self.amplitude:g} and --season-days {self.season_days} must be positive, "
                f"--breed-days {self.breed_days} 0 or more"
            )


def init_times(words: tuple[str, ...], control: Options) -> tuple[np.datetime64, ...]:
    """Read init times: single ones, or START:END:STEPh; sorted, each once.

    Raises:
        ValueError: not a time, an empty range, or a time that the control run does not have.
    """
    found, times = read_init_times(words), control.times
    for moment in found:
        if moment not in times:
            raise ValueError(
                f"the simulation has no time {moment}: it covers {times[0]} to {times[-1]}, every "
                f"{control.step_h} h"
            )
    return tuple(found)


@dataclass(frozen=True)
class Work:
    """What a process needs to know."""

    options: EnsembleOptions
    control: Options
    names: tuple[str, ...]
    factor: int
    """Side of the boxes that are averaged to the grid of the store."""


def plan(options: EnsembleOptions) -> tuple[Work, ForecastPlan]:
    """Settle what will be made; computes and writes nothing.

    Raises:
        ValueError: the options do not fit the control run or the store.
    """
    control = read_options(options.control)
    if options.step_h % control.step_h:
        raise ValueError(f"--step-h {options.step_h} is no multiple of the simulation's {control.step_h} h")
    inits = init_times(options.init, control)
    step = np.timedelta64(control.step_h, "h")
    for init in inits:
        if restarts.newest(options.control, init - step - options.breed_days * DAY) is None:
            raise ValueError(
                f"{options.control}/{restarts.RESTARTS} has no state before {init}: make the simulation with "
                "--restart-days 10, or take a later --init"
            )
        check_season(options.control, init, options.season_days, options.members)
    names, latitude_deg, longitude_deg, factor, data = _grid(options, control)
    settings = (options.control / MADE).read_bytes()
    made = {
        "made_by": "SPEEDY perfect-model ensemble",
        "data": data,
        "control": hashlib.sha256(settings).hexdigest()[:16],
        "seed": options.seed,
        **{f"error_{name}": getattr(options, name) for name in ("amplitude", "breed_days", "season_days")},
    }
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {
        "title": "True ensemble of a SPEEDY perfect-model experiment",
        "source": "SPEEDY (jcm 3.0.0), T31: the model that made the truth, from perturbed states",
        "history": f"{now} python -m aeris.data.speedy {shlex.join(sys.argv[1:])}",
        "store": options.store,
    }
    lead_h = (0, *range(options.step_h, options.lead_h + 1, options.step_h))
    iso = tuple(str(init) for init in inits)
    grid = (tuple(latitude_deg.tolist()), tuple(longitude_deg.tolist()))
    forecast = ForecastPlan(iso, lead_h, options.members, names, *grid, made, about)
    return Work(options, control, names, factor), forecast


def _grid(
    options: EnsembleOptions, control: Options
) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.float64], int, str]:
    """Settle channels, latitudes, longitudes, averaging and fingerprint: those of the store, if any."""
    with xr.open_dataset(options.control / file_name(control.times[0]), engine="h5netcdf") as raw:
        latitude_deg = raw.latitude.values.astype(np.float64)
        longitude_deg = raw.longitude.values.astype(np.float64)
        surface = [channel(short) for short, (name, _) in SURFACE.items() if name in raw]
        levelled = [name for name, _ in LEVELLED.values() if name in raw]
    there = in_order([*surface, *(channel_of(name, p) for name in levelled for p in control.levels_hpa)])
    names = tuple(one.name for one in there)
    if not options.store:
        return names, latitude_deg, longitude_deg, 1, ""
    store = Store(options.store)
    lacking = [name for name in store.names if name not in names]
    if lacking:
        raise ValueError(f"the simulation does not have {' '.join(lacking)} of {options.store}")
    factor = len(latitude_deg) // store.rows
    same = (store.rows * factor, store.cols * factor) == (len(latitude_deg), len(longitude_deg))
    axes = [(latitude_deg, store.latitude_deg), (longitude_deg, store.longitude_deg)]
    if not same or not all(np.allclose(coarsen_axis(ours, factor), x, atol=1e-3) for ours, x in axes):
        raise ValueError(
            f"the grid of {options.store}, {store.rows} x {store.cols}, is no average of boxes of the "
            f"simulation's {len(latitude_deg)} x {len(longitude_deg)}: convert it from {options.control}"
        )
    return store.names, store.latitude_deg, store.longitude_deg, factor, store.fingerprint_id


class Maker:
    """Computes members; every process has one."""

    def __init__(self, work: Work, model: Simulation) -> None:
        self.work, self.model = work, model
        options = work.options
        self.errors = Errors(
            options.control, model, options.amplitude, options.season_days, options.breed_days, options.seed
        )

    def members(self, init: np.datetime64, wanted: list[int]) -> Iterator[tuple[int, Field]]:
        """Compute members from one init time: their number and float32 [J, C, Y, X], lead 0 first."""
        options, control = self.work.options, self.work.control
        step_days = control.step_h / 24
        before = init - np.timedelta64(control.step_h, "h")
        at = before - options.breed_days * DAY
        path = restarts.newest(options.control, at)
        assert path is not None, "plan has looked"
        truth = run_to(self.model, restarts.load(path), at, control.step_h)
        truth, errors = self.errors.draw(init, truth, max(wanted) + 2)
        self.model.restore(truth)
        self._check_truth(self._weather(self.model.advance(step_days, step_days)))
        for member in wanted:
            self.model.restore(add(truth, errors[0], errors[member + 1]))
            start = self._fields(self.model.advance(step_days, step_days))
            later = self._fields(self.model.advance(options.lead_h / 24, options.step_h / 24))
            yield member, np.concatenate([start, later])

    def _weather(self, raw: xr.Dataset) -> xr.Dataset:
        return on_pressure_levels(raw, self.model.statics(), self.work.control.levels_hpa)

    def _fields(self, raw: xr.Dataset) -> Field:
        """Bring states to the channels and grid of the forecast: [n, C, Y, X]."""
        weather = self._weather(raw)
        fields = []
        for one in map(channel, self.work.names):
            x = weather[one.variable]
            fields.append((x if one.level_hpa is None else x.sel(level=one.level_hpa)).values)
        return coarsen(np.stack(fields, axis=1), weather.latitude.values, self.work.factor)

    def _check_truth(self, weather: xr.Dataset) -> None:
        """Refuse to go on where the restarts do not lead to the control run.

        Raises:
            ValueError: they do not.
        """
        moment = weather.time.values[0]
        path = self.work.options.control / file_name(moment)
        with xr.open_dataset(path, engine="h5netcdf") as raw:
            wanted = raw["temperature"].sel(time=moment).values
        found = weather["temperature"].values[0]
        wrong = float(np.sqrt(np.square(found - wanted).mean()))
        if not wrong <= DIFFERENT * float(wanted.std(axis=(1, 2)).mean()):
            raise ValueError(
                f"run again from its restart, the temperature at {moment} is {wrong:.3g} K (rms) from "
                f"that in {path}: restarts and files are of different runs or versions of the model"
            )


_maker: Maker | None = None  # of this process, where there are several


def _start_process(work: Work) -> None:
    global _maker
    _maker = Maker(work, Speedy(work.control.began))


def _all_members(init: np.datetime64, wanted: list[int]) -> list[tuple[int, Field]]:
    assert _maker is not None, "the process was started with one"
    return list(_maker.members(init, wanted))


def make(work: Work, writer: ForecastWriter) -> Iterator[tuple[int, int]]:
    """Compute and write what is missing; yields the init time's and the member's number.

    Raises:
        ValueError: the restarts are too few, or not of this run.
        OSError: the disk is full; what is written stays.
    """
    todo = []
    leads = len(writer.plan.lead_h)
    for number, init in enumerate(writer.plan.inits):
        left = [m for m in range(work.options.members) if writer.leads_done(number, range(m, m + 1)) < leads]
        if left:
            todo.append((number, np.datetime64(init, "s"), left))
    writer.begin()
    files = MemberWriter(writer.path, writer.plan)
    for number, member, x_JCYX in _computed(work, todo):
        for lead, x_CYX in enumerate(x_JCYX):  # what is there already is left alone
            files.write(number, range(member, member + 1), lead, x_CYX[None])
        yield number, member


def _computed(
    work: Work, todo: Sequence[tuple[int, np.datetime64, list[int]]]
) -> Iterator[tuple[int, int, Field]]:
    """Compute members in order, in this process or several: numbers of init and member, [J, C, Y, X]."""
    if work.options.processes == 1:
        maker = Maker(work, Speedy(work.control.began))
        for number, init, left in todo:
            yield from ((number, member, x_JCYX) for member, x_JCYX in maker.members(init, left))
        return
    context = get_context("spawn")  # jax does not survive a fork
    with ProcessPoolExecutor(work.options.processes, context, _start_process, (work,)) as pool:
        futures = [(number, pool.submit(_all_members, init, left)) for number, init, left in todo]
        try:
            for number, future in futures:
                yield from ((number, member, x_JCYX) for member, x_JCYX in future.result())
        except BrokenProcessPool:
            raise ValueError(
                "a process died without a word, killed or out of memory (each takes about 2 GB): the same "
                f"command goes on, with fewer --processes than {work.options.processes} if need be"
            ) from None
        finally:
            for _, future in futures:
                future.cancel()


def summary(work: Work, forecast: ForecastPlan) -> dict[str, Any]:
    """Return what would be made, as plain data."""
    steps = len(forecast.inits) * forecast.members
    return {
        "init_times": list(forecast.inits),
        "members": forecast.members,
        "lead_h": list(forecast.lead_h),
        "channels": len(forecast.names),
        "grid": [len(forecast.latitude_deg), len(forecast.longitude_deg)],
        "days_to_simulate": steps * (work.options.lead_h // 24 + work.options.breed_days + 1),
        "output_bytes": forecast.member_bytes * steps * len(forecast.lead_h),
        "out": str(work.options.out),
    }
