"""Weather to train and validate Aurora on, under Aurora's names, whatever it is kept in.

Reads what `aeris.data` reads: NetCDF and Zarr in the WeatherBench 2 layout or near it (any direction of
latitude, any order of dimensions), and our HDF5 stores, which on small grids are nine times as fast. Latitude
falls, values are in SI units, missing values are NaN.

Shapes: n times, C levels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from aeris.aurora.config import AuroraConfig
from aeris.aurora.insolation import insolation
from aeris.aurora.normalisation import location, scale
from aeris.aurora.training.statics import OTHER_NAMES, Field, read_statics
from aeris.data.header import HEADER
from aeris.data.sources import Sources, open_source
from aeris.data.store import Store
from aeris.data.variables import ALIASES, STATIC

Times = NDArray[np.datetime64]
Paths = str | Path | Sequence[str | Path]

SUN = "insolation"  # an input of Aurora v1.5 that no file holds
WIND_PARTS, DIRECTION = ("10u_wave", "10v_wave"), "dwi"  # Wave takes these, or the direction of `wind`


class Snapshot(NamedTuple):
    """The fields of one or several times."""

    surf: dict[str, Field]
    """[H, W] by name, or [n, H, W]."""
    atmos: dict[str, Field]
    """[C, H, W] by name, or [n, C, H, W]."""


class Origin(Protocol):
    """What weather is kept in: variables under WeatherBench 2 names, or their own where those have none."""

    lat: NDArray[np.float64]
    lon: NDArray[np.float64]
    mapping: list[tuple[str, str, str]]

    def offers(self) -> list[str]:
        """Name all variables."""

    def times(self, variable: str) -> Times:
        """Return the times of a variable, rising."""

    def levels(self, variable: str) -> list[float]:
        """Return the levels (hPa) of a variable, rising; none at the surface."""

    def read(self, wanted: Sequence[tuple[str, Sequence[float]]], times: Times) -> list[Field]:
        """Read variables at rising times: [n, C, H, W] each, C = 1 at the surface."""

    def static(self, variable: str) -> Field | None:
        """Read a field that does not change, [H, W]; None if there is none."""

    def describe(self, variable: str) -> str:
        """Say how a variable is kept."""


class Weather:
    """Weather opened for reading. Can be pickled; each process opens the files for itself.

    Attributes:
        times: every time all variables are there, datetime64[s], rising.
        left_out: how many times lack a variable.
        lat: latitude in degrees, falling, float64.
        lon: longitude in degrees within [0, 360), rising, float64.
        levels: in hPa, rising.
        statics: static fields by name, float32 [H, W].
        mapping: (what, in the source, for Aurora), for printing.
    """

    def __init__(
        self,
        origin: Origin,
        config: AuroraConfig,
        static: str | Path | None = None,
        levels: Sequence[float] = (),
    ) -> None:
        self._origin = origin
        self._surf, self._atmos = self._choose_variables(config)
        self._has_sun = SUN in config.surf_vars
        # Copies: those of an origin may be views that cannot be written, which tensors dislike.
        self.lat, self.lon = np.array(origin.lat), np.array(origin.lon)
        found = self._levels(config, levels)
        self.levels = tuple(int(level) if level == int(level) else level for level in found)
        self.statics = self._statics(config.static_vars, static)
        every = [origin.times(name) for name in (*self._surf.values(), *self._atmos.values())]
        self.times = every[0]
        for times in every[1:]:
            self.times = np.intersect1d(self.times, times, assume_unique=True)
        if not len(self.times):
            raise ValueError("no time has all of " + ", ".join((*self._surf.values(), *self._atmos.values())))
        self.left_out = max(map(len, every)) - len(self.times)
        self.mapping = self._describe(static)

    def _choose_variables(self, config: AuroraConfig) -> tuple[dict[str, str], dict[str, str]]:
        """Settle what is read, at the surface and on levels: Aurora's name -> the name in the origin.

        What a model only predicts is read where it is there. The parts of a wave's wind may be there as its
        direction; the model splits it. Sunlight is computed.
        """
        offered = {name: bool(self._origin.levels(name)) for name in self._origin.offers()}
        asked = [name for name in config.surf_vars if name != SUN]
        if "wind" in asked and offered.get(DIRECTION) is False and not set(WIND_PARTS) <= set(offered):
            asked = list(dict.fromkeys(DIRECTION if name in WIND_PARTS else name for name in asked))
        surf, atmos, missing = {}, {}, []
        for name in asked:
            if offered.get(_known_as(name)) is False:
                surf[name] = _known_as(name)
            elif name not in config.output_only_surf_vars:
                missing.append(f"{name} (nor {DIRECTION}, its direction)" if name in WIND_PARTS else name)
        for name in config.atmos_vars:
            if offered.get(_known_as(name)):
                atmos[name] = _known_as(name)
            elif name not in config.output_only_atmos_vars:
                missing.append(f"{name} on levels")
        if missing:
            raise ValueError(
                f"the weather has no {', no '.join(missing)}; it has {', '.join(offered)}. Add a source that "
                "has, or choose a model without"
            )
        return surf, atmos

    def _levels(self, config: AuroraConfig, asked: Sequence[float]) -> list[float]:
        """Settle the levels: those asked for, else those of the model, else those every variable can have."""
        common = [set(self._origin.levels(name)) for name in self._atmos.values()]
        there = sorted(set.intersection(*common)) if common else []
        wanted = [float(level) for level in (asked or config.level_condition)]
        if wanted:
            missing = [f"{level:g}" for level in wanted if level not in there]
            if missing:
                have = " ".join(f"{level:g}" for level in there)
                raise ValueError(f"the weather has no level {', '.join(missing)} hPa; it has {have}")
            return sorted(wanted)
        usable = [level for level in there if all(_has_statistics(name, level) for name in self._atmos)]
        if self._atmos and not usable:
            raise ValueError(f"none of the levels {there} hPa is one of a model: choose some with statistics")
        return usable

    def _statics(self, names: Sequence[str], path: str | Path | None) -> dict[str, Field]:
        extra = read_statics(path, self.lat, self.lon) if path else {}
        found = {}
        for name in names:
            x = extra.get(name)
            for other in (*OTHER_NAMES.get(name, ()), name):
                x = self._origin.static(other) if x is None else x
            if x is not None:
                found[name] = np.array(x)
        missing = [name for name in names if name not in found]
        if missing:
            where = f"neither {path} nor the weather has" if path else "the weather has not"
            raise ValueError(
                f"{where} the static {', '.join(missing)} (no levels, no change in time): name a file with "
                "--static (the official package's static.pickle, or NetCDF), or choose a model without"
            )
        return found

    def _describe(self, static: str | Path | None) -> list[tuple[str, str, str]]:
        variables = [*self._surf.items(), *self._atmos.items()]
        rows = [
            *self._origin.mapping,
            *(("variable", self._origin.describe(name), key) for key, name in variables),
        ]
        rows += [("variable", "computed from time and place", SUN)] if self._has_sun else []
        levels = [level for name in self._atmos.values() for level in self._origin.levels(name)]
        rows.append(
            ("levels", f"{len({*levels})} in all", " ".join(f"{one:g}" for one in self.levels) + " hPa")
        )
        lost = f", {self.left_out} left out where a variable is missing" if self.left_out else ""
        there = f"{len(self.times)}{lost}"
        rows.append(("times", f"{self.times[0]} to {self.times[-1]}", there))
        rows.append(("static", str(static or "with the weather"), " ".join(self.statics)))
        return rows

    def __len__(self) -> int:
        """Return the number of times."""
        return len(self.times)

    def index(self, time: np.datetime64 | str) -> int | None:
        """Return the number of a time; None if it is not there."""
        moment = np.datetime64(time).astype("datetime64[s]")
        place = int(np.searchsorted(self.times, moment))
        return place if place < len(self.times) and self.times[place] == moment else None

    def read(self, index: int) -> Snapshot:
        """Read one time: [H, W] and [C, H, W]."""
        many = self.read_many([index])
        return Snapshot({k: x[0] for k, x in many.surf.items()}, {k: x[0] for k, x in many.atmos.items()})

    def read_many(self, indices: Sequence[int]) -> Snapshot:
        """Read rising times together, each file once: [n, H, W] and [n, C, H, W]."""
        times = self.times[list(indices)]
        wanted = [(name, ()) for name in self._surf.values()]
        levelled = [(name, self.levels) for name in self._atmos.values()]
        found = self._origin.read([*wanted, *levelled], times)
        surf = {key: x[:, 0] for key, x in zip(self._surf, found[: len(wanted)], strict=True)}
        if self._has_sun:
            lat, lon = torch.from_numpy(self.lat), torch.from_numpy(self.lon)
            moments = times.astype("datetime64[us]").tolist()
            surf[SUN] = insolation(moments, lat, lon).to(torch.float32).numpy()
        return Snapshot(surf, dict(zip(self._atmos, found[len(wanted) :], strict=True)))


def open_weather(
    paths: Paths,
    config: AuroraConfig,
    static: str | Path | None = None,
    levels: Sequence[float] = (),
) -> Weather:
    """Open weather for a model.

    Args:
        paths: NetCDF files, Zarr directories or addresses (gs://...), cut by time or variable; directories
            of NetCDF files; or one HDF5 store of `aeris.data`.
        config: which variables, those it only predicts where they are there; with `level_condition` also
            which levels.
        static: file of static fields that come before those of the weather.
        levels: in hPa. Empty: the model's, or else all that there are statistics for.

    Raises:
        ValueError: a file cannot be understood, or misses a variable, a level or a static field.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise ValueError("no weather is given: name NetCDF files, Zarr directories or a store")
    stores = [path for path in given if (Path(path) / HEADER).exists()]
    if stores and len(given) > 1:
        raise ValueError(f"{stores[0]} is a store, which is read alone, not with {len(given) - 1} others")
    origin: Origin = StoreOrigin(given[0]) if stores else FilesOrigin(given, _own_names(config))
    return Weather(origin, config, static, levels)


def _known_as(name: str) -> str:
    """Translate a name of Aurora into that of WeatherBench 2, where it has one."""
    return ALIASES.get(name, name)


def _own_names(config: AuroraConfig) -> list[str]:
    """List variables that `aeris.data` does not know, to be looked for under Aurora's names."""
    moving = [*config.surf_vars, *config.atmos_vars]
    wind = [DIRECTION] if set(WIND_PARTS) & set(moving) else []
    static = [other for name in config.static_vars for other in (name, *OTHER_NAMES.get(name, ()))]
    known = {*ALIASES, *ALIASES.values(), SUN}
    return [name for name in dict.fromkeys((*moving, *wind, *static)) if name not in known]


def _has_statistics(name: str, level: float) -> bool:
    try:
        return scale(name, level) > 0 and location(name, level) is not None
    except ValueError:
        return False


class FilesOrigin:
    """NetCDF files and Zarr stores, opened when first read in a process."""

    def __init__(self, paths: Sequence[str | Path], own_names: Iterable[str] = ()) -> None:
        self._paths = [one for path in paths for one in _expand(path)]
        self._own_names = tuple(own_names)
        self._opened: Sources | None = None
        self.lat = self.sources.latitude_deg
        self.lon = self.sources.longitude_deg
        first, *others = self.sources.parts
        grid = [row for row in first.mapping if row[0] in ("rows", "cols", "member")]
        self.mapping = [("file", first.path, f"and {len(others)} more" if others else ""), *grid]

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind."""
        return {**self.__dict__, "_opened": None}

    @property
    def sources(self) -> Sources:
        """The opened files."""
        if self._opened is None:
            self._opened = Sources([open_source(path, as_is=self._own_names) for path in self._paths])
        return self._opened

    def offers(self) -> list[str]:
        """Name all variables."""
        return list(dict.fromkeys(name for part in self.sources.parts for name in part.variables))

    def times(self, variable: str) -> Times:
        """Return the times of a variable, rising."""
        times = self.sources.times([variable])
        self.sources.check_times(variable, times)
        return times

    def levels(self, variable: str) -> list[float]:
        """Return the levels (hPa) of a variable, rising; none at the surface."""
        having = self.sources.having(variable)
        return self.sources.levels_hpa(variable) if having else []

    def read(self, wanted: Sequence[tuple[str, Sequence[float]]], times: Times) -> list[Field]:
        """Read variables at rising times: [n, C, H, W] each, C = 1 at the surface."""
        return [self.sources.read(variable, times, levels) for variable, levels in wanted]

    def static(self, variable: str) -> Field | None:
        """Read a field that does not change, [H, W]; None if there is none.

        Raises:
            ValueError: it changes.
        """
        known = {name for name, _ in STATIC.values()}
        having = self.sources.having(variable)
        if not having or (variable not in known and variable not in self._own_names):
            return None
        part = having[0]
        if part.variables[variable].levels_hpa:
            return None
        first = self.sources.read_static(variable)
        count = len(part.variables[variable].times)
        if variable not in known and count > 1:
            last = part.read(variable, count - 1, count)[0, 0]
            if not np.array_equal(first, last, equal_nan=True):
                raise ValueError(f"{variable} of {part.path} changes with time: it cannot be a static field")
        return first

    def describe(self, variable: str) -> str:
        """Say how a variable is kept: its name there, its dims, and its change of units."""
        part = self.sources.having(variable)[0]
        raw = part.variables[variable].raw
        rows = [row for row in part.mapping if row[0] == "variable"]
        return next(f"{kept}: {said}" for _, kept, said in rows if kept.split(" (")[0] == raw)


def _expand(path: str | Path) -> list[str]:
    """List the NetCDF files of a directory that is no Zarr store; anything else is itself."""
    where = Path(path)
    if (
        "://" in str(path)
        or not where.is_dir()
        or any((where / n).exists() for n in (".zgroup", "zarr.json"))
    ):
        return [str(path)]
    files = sorted(str(file) for file in where.glob("*.nc"))
    if not files:
        raise ValueError(f"{path} is neither a store nor a Zarr directory, and holds no NetCDF file")
    return files


class StoreOrigin:
    """An HDF5 store of `aeris.data`."""

    def __init__(self, path: str | Path) -> None:
        self._store = Store(path)
        self.lat, self.lon = self._store.latitude_deg, self._store.longitude_deg
        self._places = {(one.variable, one.level_hpa): n for n, one in enumerate(self._store.channels)}
        grid = f"{len(self.lat)} x {len(self.lon)}"
        self.mapping = [("store", str(path), f"{len(self._store)} times, {grid}")]

    def offers(self) -> list[str]:
        """Name all variables."""
        return list(dict.fromkeys(variable for variable, _ in self._places))

    def times(self, variable: str) -> Times:
        """Return the times of a variable: those of the store."""
        return self._store.times

    def levels(self, variable: str) -> list[float]:
        """Return the levels (hPa) of a variable, rising; none at the surface."""
        return sorted(level for name, level in self._places if name == variable and level is not None)

    def read(self, wanted: Sequence[tuple[str, Sequence[float]]], times: Times) -> list[Field]:
        """Read variables at rising times: [n, C, H, W] each, C = 1 at the surface; masked points are NaN."""
        x_nCYX = np.stack([self._store.read(int(i)) for i in np.searchsorted(self._store.times, times)])
        if self._store.masks:
            x_nCYX[:, ~self._store.mask_CYX] = np.nan
        found = []
        for variable, levels in wanted:
            keys: list[tuple[str, float | None]] = [(variable, float(level)) for level in levels]
            found.append(x_nCYX[:, [self._places[key] for key in keys or [(variable, None)]]])
        return found

    def static(self, variable: str) -> Field | None:
        """Read a field that does not change, [H, W]; None if there is none."""
        return self._store.static.get(variable)

    def describe(self, variable: str) -> str:
        """Say how a variable is kept: its channels."""
        return " ".join(one.name for one in self._store.channels if one.variable == variable)
