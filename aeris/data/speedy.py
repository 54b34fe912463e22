"""Make a simulated atmosphere: `python -m aeris.data.speedy --days 365 --out DIR`.

Runs SPEEDY, a general circulation model (jcm 3.0.0; `pip install aeris-swipe[speedy]`), and writes its
states every 6 h on pressure levels in the WeatherBench 2 layout, one NetCDF file per month. Results on these
data are called "SPEEDY perfect-model experiment", never ERA5 skill. The same command writes the same values.

Shapes: n times, S sigma levels (top first), L pressure levels, Y rows (north first), X cols.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tyro
import xarray as xr
from numpy.typing import NDArray

from aeris.data.variables import LEVELLED, STATIC, SURFACE
from aeris.log import console, progress_bar, run_program

Floats = NDArray[Any]

GRAVITY = 9.81  # m s-2, and dry air below, as the model has them
GAS_CONSTANT = 287.0  # J kg-1 K-1
LAPSE_RATE = 0.0065  # K m-1, below the lowest level of the model [weather centres' usual reduction]
REFERENCE_PA = 1e5  # normalized_surface_pressure is in units of it
CHUNK_DAYS = 10
DAY = np.timedelta64(1, "D")
MADE = "speedy.json"
COMMENT = (
    "Simulation, not a reanalysis: results on it are a perfect-model experiment. Linear in ln p between "
    "sigma levels; below the lowest, 6.5 K/km for temperature and geopotential, others held constant."
)


@dataclass(frozen=True)
class Options:
    """Simulate an atmosphere with SPEEDY and write it in the WeatherBench 2 layout, a NetCDF file per month.

    A year takes 5 to 10 minutes on two cores and 1.2 GB. A stopped run begins anew when the same command is
    given again.
    """

    out: Path
    """Directory of the files."""
    days: int = 365
    """Days to write."""
    spin_up_days: int = 365
    """Days the model runs before; the stratosphere drifts with less than a year."""
    start: str = "2001-01-01"
    """First day, in the calendar of the model."""
    step_h: int = 6
    """Hours between the times written; must divide 24."""
    levels_hpa: tuple[int, ...] = (50, 100, 200, 300, 500, 700, 850, 925)
    """Pressure levels."""

    def __post_init__(self) -> None:
        if self.days < 1 or self.spin_up_days < 1:
            raise ValueError(f"--days {self.days} and --spin-up-days {self.spin_up_days} must be at least 1")
        if self.step_h not in (1, 2, 3, 4, 6, 8, 12, 24):
            raise ValueError(f"--step-h {self.step_h} does not divide 24: choose 1, 2, 3, 4, 6, 8, 12 or 24")
        if (
            not self.levels_hpa
            or min(self.levels_hpa) < 1
            or list(self.levels_hpa) != sorted({*self.levels_hpa})
        ):
            raise ValueError(f"--levels-hpa {self.levels_hpa} must be positive and rising")
        try:
            np.datetime64(self.start, "D")
        except ValueError:
            raise ValueError(f"--start {self.start!r} is no day: write it like 2001-01-01") from None

    @property
    def times(self) -> NDArray[np.datetime64]:
        """Every time that is written."""
        first = np.datetime64(self.start, "D").astype("datetime64[s]")
        count = self.days * 24 // self.step_h
        return np.asarray(first + np.arange(count) * np.timedelta64(self.step_h, "h"))


class Simulation(Protocol):
    """A model as jcm lays it out: dims (time, level, lon, lat), sigma falling, latitude rising."""

    def statics(self) -> dict[str, Floats]:
        """Return `geopotential_at_surface` and `land_sea_mask`, [lon, lat]."""

    def advance(self, days: float, step_days: float) -> xr.Dataset:
        """Run on; return the states at every step, the last at the end."""


class Speedy:
    """The SPEEDY model at T31 (96 x 48 points, 8 sigma levels) with the boundary data that jcm brings.

    Raises:
        ValueError: jcm is not installed.
    """

    def __init__(self, start: np.datetime64) -> None:
        try:
            import jcm
            from dinosaur.primitive_equations import truncated_modal_orography
            from jcm.forcing import ForcingData
            from jcm.model import Model
            from jcm.physics.speedy.speedy_coords import get_speedy_coords
            from jcm.terrain import TerrainData
        except ImportError as error:
            raise ValueError(
                f"SPEEDY needs the package jcm ({error}): pip install aeris-swipe[speedy]"
            ) from None
        boundary = Path(jcm.__file__).parent / "data" / "bc" / "t30" / "clim"
        coords = get_speedy_coords()
        self._terrain = TerrainData.from_file(str(boundary / "terrain.nc"), coords=coords)
        self._forcing = ForcingData.from_file(str(boundary / "forcing.nc"), coords=coords)
        # What the dynamics take for the ground: spectral, so up to 500 m below the sea beside mountains. With
        # the orography on the grid in its place, sea level pressure had twice the spread (869 to 1194 hPa).
        ground_m = coords.horizontal.to_nodal(
            truncated_modal_orography(self._terrain.orog, coords, wavenumbers_to_clip=2)
        )
        self._ground = np.asarray(ground_m, dtype=np.float64) * GRAVITY
        began = str(start.astype("datetime64[s]"))
        self._model = Model(coords=coords, terrain=self._terrain, time_step=30.0, start_time=began)
        self._begun = False

    def statics(self) -> dict[str, Floats]:
        """Return `geopotential_at_surface` (m2 s-2) and `land_sea_mask` (0..1): [lon, lat]."""
        return {
            "geopotential_at_surface": self._ground,
            "land_sea_mask": np.asarray(self._terrain.fmask),
        }

    def advance(self, days: float, step_days: float) -> xr.Dataset:
        """Run on; return the states at every step, the last at the end."""
        go = self._model.resume if self._begun else self._model.run
        self._begun = True
        return go(forcing=self._forcing, save_interval=step_days, total_time=days).to_xarray()


def main() -> None:
    """Run the program."""
    options = tyro.cli(Options, prog="python -m aeris.data.speedy")
    if is_done(options):
        console.print(f"{options.out} is there already and whole; nothing to do")
        return
    began = options.times[0] - options.spin_up_days * DAY
    with progress_bar() as progress:
        task = progress.add_task("spin-up", total=options.days)
        for path, count, days in generate(options, Speedy(began)):
            progress.update(task, description="days", completed=days)
            if path is not None:
                console.print(f"{path}: {count} times")


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
    before, now = json.loads(made.read_text()), _made(options)
    if before != now:
        raise ValueError(
            f"{options.out} was made with {before}, not {now}: repeat that or choose another --out"
        )
    months = np.unique(options.times.astype("datetime64[M]"))
    return all((options.out / file_name(month)).exists() for month in months)


def generate(options: Options, model: Simulation) -> Iterator[tuple[Path | None, int, int]]:
    """Spin up, run and write; yields (file just finished or None, its times, days done).

    Raises:
        ValueError: the disk is too small, or the model left the range of real weather.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    step_days = options.step_h / 24
    spin_up = options.spin_up_days - step_days  # the first state written is that of `start`
    model.advance(spin_up, spin_up)
    (options.out / MADE).write_text(json.dumps(_made(options)))
    statics, pending = model.statics(), []
    for done in range(0, options.days, CHUNK_DAYS):
        days = min(CHUNK_DAYS, options.days - done)
        weather = on_pressure_levels(model.advance(days, step_days), statics, options.levels_hpa)
        if not done:
            _check_room(options, weather)
        _check(weather)
        pending.append(weather)
        together = xr.concat(
            pending, "time", data_vars="minimal", coords="minimal", compat="override", join="exact"
        )
        months = together.time.values.astype("datetime64[M]")
        last = done + days == options.days
        for month in np.unique(months)[: None if last else -1]:
            whole = together.isel(time=np.flatnonzero(months == month))
            yield write(options.out / file_name(month), whole), whole.sizes["time"], done + days
        pending = [together.isel(time=np.flatnonzero(months == months[-1]))]
        yield None, 0, done + days


def file_name(month: np.datetime64) -> str:
    """Name the file of a month."""
    return f"speedy_{month.astype('datetime64[M]')}.nc"


def _made(options: Options) -> dict[str, object]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(options).items() if key != "out"}


def on_pressure_levels(
    raw: xr.Dataset, statics: dict[str, Floats], levels_hpa: tuple[int, ...]
) -> xr.Dataset:
    """Bring states of the model to pressure levels, our order of axes and WeatherBench 2 names, float32.

    Between sigma levels every variable is linear in ln p. Below the lowest one temperature rises by 6.5 K/km
    and geopotential follows hydrostatically (extrapolating their slope gave 129 K); above the highest the air
    is isothermal. Wind and humidity stay constant beyond both ends. Sea level pressure is reduced with the
    same lapse rate from the temperature at the surface.

    Args:
        raw: as `Simulation.advance` returns it.
        statics: as `Simulation.statics` returns it.
    """
    x = raw.sortby("level").sortby("lat", ascending=False).transpose("time", "level", "lat", "lon", ...)
    surface_YX = [np.asarray(statics[name], dtype=np.float64).T for name in statics]
    surface_YX = [field[:: -1 if raw.lat.values[0] < raw.lat.values[-1] else 1] for field in surface_YX]
    static = dict(zip(statics, surface_YX, strict=True))
    column = {
        name: x[key].values.astype(np.float64)
        for name, key in (
            *(("geopotential", "geopotential"), ("temperature", "temperature")),
            *(("u_component_of_wind", "u_wind"), ("v_component_of_wind", "v_wind")),
            ("specific_humidity", "specific_humidity"),
        )
    }
    column["specific_humidity"] = np.maximum(column["specific_humidity"], 0.0)
    log_sigma_S = np.log(x.level.values.astype(np.float64))
    ps_nYX = x["normalized_surface_pressure"].values.astype(np.float64) * REFERENCE_PA
    fields: dict[str, tuple[tuple[str, ...], Floats]] = {}
    levelled = interpolate(column, log_sigma_S, ps_nYX, levels_hpa)
    for name, x_nLYX in levelled.items():
        fields[name] = (("time", "level", "latitude", "longitude"), x_nLYX)
    lowest_t_nYX = column["temperature"][:, -1]
    surface = {
        "2m_temperature": x["surface_flux.t0"].values,
        "10m_u_component_of_wind": x["surface_flux.u0"].values,
        "10m_v_component_of_wind": x["surface_flux.v0"].values,
        "mean_sea_level_pressure": sea_level_pressure(
            ps_nYX, lowest_t_nYX, log_sigma_S[-1], static["geopotential_at_surface"]
        ),
        "surface_pressure": ps_nYX,
    }
    fields.update({name: (("time", "latitude", "longitude"), x_nYX) for name, x_nYX in surface.items()})
    fields.update({name: (("latitude", "longitude"), x_YX) for name, x_YX in static.items()})
    units = dict([*LEVELLED.values(), *SURFACE.values(), *STATIC.values()])
    return xr.Dataset(
        {name: (dims, v.astype(np.float32), {"units": units[name]}) for name, (dims, v) in fields.items()},
        {
            "time": x.time.values.astype("datetime64[ns]"),
            "level": ("level", np.array(levels_hpa, np.int32), {"units": "hPa"}),
            "latitude": ("latitude", x.lat.values, {"units": "degrees_north"}),
            "longitude": ("longitude", x.lon.values, {"units": "degrees_east"}),
        },
        {"Conventions": "CF-1.8", "source": "SPEEDY (jcm 3.0.0), T31", "comment": COMMENT},
    )


def interpolate(
    column: dict[str, Floats], log_sigma_S: Floats, ps_nYX: Floats, levels_hpa: tuple[int, ...]
) -> dict[str, Floats]:
    """Interpolate columns [n, S, Y, X] to pressure levels: float64 [n, L, Y, X] by variable, SI units.

    Args:
        column: needs `temperature`; `geopotential` too where it is to be extrapolated.
        log_sigma_S: logarithm of sigma = p / surface pressure, rising.
    """
    n, rows, cols = ps_nYX.shape
    found = {name: np.empty((n, len(levels_hpa), rows, cols)) for name in column}
    for place, level in enumerate(levels_hpa):
        at_nYX = np.log(level * 100.0 / ps_nYX)
        inside_nYX = np.clip(at_nYX, log_sigma_S[0], log_sigma_S[-1])
        above_nYX = np.clip(np.searchsorted(log_sigma_S, inside_nYX, "right") - 1, 0, len(log_sigma_S) - 2)
        width_nYX = np.diff(log_sigma_S)[above_nYX]
        share_nYX = (inside_nYX - log_sigma_S[above_nYX]) / width_nYX
        for name, x_nSYX in column.items():
            upper = np.take_along_axis(x_nSYX, above_nYX[:, None], 1)[:, 0]
            lower = np.take_along_axis(x_nSYX, above_nYX[:, None] + 1, 1)[:, 0]
            found[name][:, place] = upper + share_nYX * (lower - upper)
        beyond_nYX = at_nYX - inside_nYX  # positive below ground, negative above the top
        t_nYX = found["temperature"][:, place]
        warmer_nYX = t_nYX * np.exp(np.maximum(beyond_nYX, 0) * GAS_CONSTANT * LAPSE_RATE / GRAVITY)
        if "geopotential" in found:
            fall_nYX = (warmer_nYX - t_nYX) / LAPSE_RATE * GRAVITY
            rise_nYX = np.maximum(-beyond_nYX, 0) * GAS_CONSTANT * t_nYX
            found["geopotential"][:, place] += rise_nYX - fall_nYX
        found["temperature"][:, place] = warmer_nYX
    return found


def sea_level_pressure(ps_nYX: Floats, t_nYX: Floats, log_sigma: float, geopotential_YX: Floats) -> Floats:
    """Reduce surface pressure (Pa) to sea level with 6.5 K/km: float64 [n, Y, X], Pa.

    Args:
        t_nYX: temperature (K) at the lowest level of the model.
        log_sigma: ln(p / surface pressure) of that level.
        geopotential_YX: of the surface, m2 s-2.
    """
    power = GAS_CONSTANT * LAPSE_RATE / GRAVITY
    surface_t_nYX = t_nYX * np.exp(-log_sigma * power)
    warmer = 1 + LAPSE_RATE * geopotential_YX / GRAVITY / surface_t_nYX
    return np.asarray(ps_nYX * warmer ** (1 / power))


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


def _check_room(options: Options, weather: xr.Dataset) -> None:
    """Refuse to begin what the disk cannot hold."""
    need = weather.nbytes // weather.sizes["time"] * len(options.times)
    free = shutil.disk_usage(options.out).free
    if need > free:
        raise ValueError(f"{options.out} needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")


if __name__ == "__main__":
    run_program(main)
