"""Which dimension of a foreign dataset is which, and how its coordinates are brought into our order.

Ours: levels rising in hPa, latitude falling, longitude rising from 0 to 360, times rising in UTC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.units import conversion

TIME, LEAD, MEMBER = "time", "lead", "member"
LEVEL, LATITUDE, LONGITUDE = "level", "latitude", "longitude"

DIMENSIONS: dict[str, tuple[str, ...]] = {
    TIME: ("time", "valid_time", "date", "forecast_reference_time", "initial_time", "init_time"),
    LEAD: ("step", "prediction_timedelta", "lead_time", "leadtime", "forecast_period"),
    MEMBER: ("number", "realization", "member", "ensemble", "ens", "sample"),
    LEVEL: (
        "level",
        "isobaricInhPa",
        "isobaricInPa",
        "pressure_level",
        "plev",
        "pressure",
        "lev",
        "levelist",
    ),
    LATITUDE: ("latitude", "lat"),
    LONGITUDE: ("longitude", "lon", "long"),
}
# Lengths of time as CF writes them, s. xarray is told not to decode them: its versions disagree.
UNIT_S = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0, "nanoseconds": 1e-9}


@dataclass(frozen=True)
class Axes:
    """The axes of one source: coordinates in our order, and the order of the source."""

    dims: dict[str, str]
    """Role (`time`, `level`, ...) -> name of the dimension in the source."""
    times: NDArray[np.datetime64]
    levels_hpa: NDArray[np.float64]
    level_order: NDArray[np.int64]
    """Place in the source of every level."""
    latitude_deg: NDArray[np.float64]
    flipped: bool
    longitude_deg: NDArray[np.float64]
    longitude_order: NDArray[np.int64]
    """Place in the source of every longitude."""
    member: int = 0
    """Place of the chosen member in the source."""
    leads_s: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    """Leads of a source with a dimension of its own for them; valid times are initial times plus these."""

    @property
    def is_global(self) -> bool:
        """Whether the grid covers the Earth."""
        lat, lon = self.latitude_deg, self.longitude_deg
        return bool(np.ptp(lat) > 150.0 and np.ptp(lon) > 300.0)

    def mapping(self, raw: Any) -> list[tuple[str, str, str]]:
        """Describe every axis for printing: (what, in the source, in the store)."""
        lat, lon = self.dims[LATITUDE], self.dims[LONGITUDE]
        rolled = bool(np.any(np.diff(self.longitude_order) < 0))
        rows = [
            ("rows", f"{lat} {_ends(raw[lat])}", f"{len(self.latitude_deg)}{', flipped' * self.flipped}"),
            ("cols", f"{lon} {_ends(raw[lon])}", f"{len(self.longitude_deg)}{', rolled to 0..360' * rolled}"),
        ]
        if len(self.leads_s) > 1:
            forecasts = f"leads {' '.join(f'{s / 3600:g}' for s in self.leads_s)} h, one after the other"
            rows.append(("times", f"{self.times[0]} to {self.times[-1]}, {forecasts}", str(len(self.times))))
        elif self.times.size:
            rows.append(("times", f"{self.times[0]} to {self.times[-1]}", str(len(self.times))))
        if self.levels_hpa.size:
            level = self.dims[LEVEL]
            text = " ".join(f"{level:g}" for level in self.levels_hpa)
            rows.append(("levels", f"{level} {_ends(raw[level])}", f"{text} hPa"))
        if MEMBER in self.dims:
            name = self.dims[MEMBER]
            rows.append(
                ("member", f"{name}, {raw.sizes[name]} of them", f"{_labels(raw, name)[self.member]}")
            )
        return rows


def find_axes(raw: Any, member: int | None) -> Axes:
    """Work out the axes of an opened dataset.

    Args:
        member: which ensemble member to take, by its label; None where there is one.

    Raises:
        ValueError: something is not understood; names it and says what would be.
    """
    dims = find_dimensions(raw)
    latitude_deg, flipped = _latitudes(_coordinate(raw, dims[LATITUDE]), dims[LATITUDE])
    longitude_deg, longitude_order = _longitudes(_coordinate(raw, dims[LONGITUDE]))
    levels_hpa, level_order = _levels(raw, dims)
    times, leads_s = _times(raw, dims)
    return Axes(
        dims=dims,
        times=times,
        levels_hpa=levels_hpa,
        level_order=level_order,
        latitude_deg=latitude_deg,
        flipped=flipped,
        longitude_deg=longitude_deg,
        longitude_order=longitude_order,
        member=_member(raw, dims, member),
        leads_s=leads_s,
    )


def plain_axes(
    times: NDArray[np.datetime64],
    latitude_deg: NDArray[np.float64],
    longitude_deg: NDArray[np.float64],
    levels_hpa: Sequence[float] = (),
    member: int = 0,
) -> Axes:
    """Make the axes of a layout without named dimensions, from coordinates in the order of its fields.

    Raises:
        ValueError: latitude neither rises nor falls, or a longitude or time occurs twice.
    """
    check_rising(times)
    latitude, flipped = _latitudes(np.asarray(latitude_deg, dtype=np.float64), LATITUDE)
    longitude, order = _longitudes(np.asarray(longitude_deg, dtype=np.float64))
    levels = np.array(sorted(levels_hpa), dtype=np.float64)
    return Axes({}, times, levels, np.arange(len(levels)), latitude, flipped, longitude, order, member)


def grid_mapping(latitude_deg: NDArray[np.float64], axes: Axes, lon: Any) -> list[tuple[str, str, str]]:
    """Describe rows and cols of a layout without named dimensions, for printing."""
    rolled = ", rolled to 0..360" * bool(np.any(np.diff(axes.longitude_order) < 0))
    rows, cols = (f"{len(x)}: {x[0]:g} to {x[-1]:g}" for x in (latitude_deg, lon))
    return [
        ("rows", rows, f"{len(axes.latitude_deg)}{', flipped' * axes.flipped}"),
        ("cols", cols, f"{len(axes.longitude_deg)}{rolled}"),
    ]


def check_rising(times: NDArray[np.datetime64]) -> None:
    """Refuse times that do not rise.

    Raises:
        ValueError: names the first that does not.
    """
    if np.isnat(times).any():
        raise ValueError(f"time number {int(np.argmax(np.isnat(times)))} is missing")
    wrong = np.flatnonzero(np.diff(times) <= np.timedelta64(0, "s"))
    if wrong.size:
        first = int(wrong[0]) + 1
        what = "occurs twice" if times[first] == times[first - 1] else f"comes after {times[first - 1]}"
        raise ValueError(f"time {times[first]} (index {first}) {what}: times must rise")


def find_gaps(times: NDArray[np.datetime64]) -> list[tuple[np.datetime64, np.datetime64]]:
    """Find where times are missing: (last before, first after) steps longer than the most common one."""
    if len(times) < 3:
        return []
    steps, counts = np.unique(np.diff(times), return_counts=True)
    wide = np.flatnonzero(np.diff(times) > steps[np.argmax(counts)])
    return [(times[n], times[n + 1]) for n in wide]


def find_dimensions(raw: Any) -> dict[str, str]:
    """Match the dimensions of a dataset with roles: role -> name.

    Raises:
        ValueError: two dimensions for one role, or none for latitude or longitude.
    """
    found = {}
    for role, names in DIMENSIONS.items():
        matches = [str(dim) for dim in raw.sizes if str(dim).lower() in {name.lower() for name in names}]
        if len(matches) > 1:
            raise ValueError(
                f"the dimensions {' and '.join(matches)} both look like {role}: rename one of them"
            )
        if matches:
            found[role] = matches[0]
        elif role in (LATITUDE, LONGITUDE):
            have = ", ".join(map(str, raw.sizes))
            raise ValueError(f"no dimension is called {' or '.join(names)}; there are {have}")
    return found


def _coordinate(raw: Any, dim: str) -> NDArray[np.float64]:
    if dim not in raw.coords:
        raise ValueError(f"dimension {dim} has no coordinate values")
    return np.asarray(raw[dim].values, dtype=np.float64)


def _labels(raw: Any, dim: str) -> NDArray[Any]:
    """Return the labels of a dimension: its coordinate values, or 0, 1, 2, ..."""
    return np.asarray(raw[dim].values if dim in raw.coords else np.arange(raw.sizes[dim]))


def _member(raw: Any, dims: dict[str, str], member: int | None) -> int:
    """Return the place of the wanted ensemble member."""
    if MEMBER not in dims:
        if member is not None:
            raise ValueError(f"--member {member} was given, but there is no ensemble dimension")
        return 0
    labels = _labels(raw, dims[MEMBER])
    places = np.flatnonzero(labels == member) if member is not None else np.arange(len(labels))
    if places.size != 1:
        raise ValueError(
            f"choose one ensemble member with --member: {dims[MEMBER]} has {', '.join(map(str, labels))}"
        )
    return int(places[0])


def _times(raw: Any, dims: dict[str, str]) -> tuple[NDArray[np.datetime64], NDArray[np.int64]]:
    """Return the valid times and the leads in s; a file of static fields has no times."""
    name = dims.get(TIME, "time")
    if name not in raw.coords:
        if TIME in dims:
            raise ValueError(f"dimension {name} has no coordinate values")
        return np.zeros(0, dtype="datetime64[s]"), np.zeros(1, dtype=np.int64)
    values = np.atleast_1d(raw[name].values)
    if not np.issubdtype(values.dtype, np.datetime64):
        kind = type(values.ravel()[0]).__name__ if values.size else str(values.dtype)
        raise ValueError(f"the values of {name} are of type {kind}, not dates of the standard calendar")
    starts = values.astype("datetime64[s]")
    leads_s = _leads_s(raw, dims)
    check_rising(starts)
    if len(leads_s) > 1:
        fit = len(starts) > 1 and leads_s[-1] - leads_s[0] < np.diff(starts).astype(np.int64).min()
        if not fit or np.any(np.diff(leads_s) <= 0):
            raise ValueError(
                f"it is a forecast with {len(leads_s)} lead times along {dims[LEAD]}, which do not fit "
                "between its initial times: choose one of them first"
            )
    times = (starts[:, None] + leads_s.astype("timedelta64[s]")).reshape(-1)
    return np.asarray(times), leads_s


def _leads_s(raw: Any, dims: dict[str, str]) -> NDArray[np.int64]:
    """Return the lead times of a forecast in s, 0 of anything else."""
    name = dims.get(LEAD, "step")
    if name not in raw.coords or (LEAD not in dims and raw[name].ndim):
        return np.zeros(1, dtype=np.int64)
    leads = np.atleast_1d(raw[name].values)
    if np.issubdtype(leads.dtype, np.timedelta64):
        return np.asarray(leads.astype("timedelta64[s]").astype(np.int64))
    unit_s = UNIT_S.get(str(raw[name].attrs.get("units", "")))
    if unit_s is not None or not leads.any():
        return np.round(leads.astype(np.float64) * (unit_s or 0.0)).astype(np.int64)
    raise ValueError(f"the lead time {name} is {leads[0]} without a unit of time")


def _latitudes(raw_deg: NDArray[np.float64], name: str) -> tuple[NDArray[np.float64], bool]:
    """Return latitudes in falling order, and whether they rise in the source."""
    flipped = bool(raw_deg[0] < raw_deg[-1])
    latitude_deg = raw_deg[::-1] if flipped else raw_deg
    if np.any(np.diff(latitude_deg) >= 0):
        raise ValueError(f"{name} neither rises nor falls throughout")
    if np.abs(latitude_deg).max() > 90.0 + 1e-4:
        raise ValueError(f"{name} reaches {np.abs(latitude_deg).max():g}: degrees end at 90")
    return latitude_deg, flipped


def _longitudes(raw_deg: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return longitudes 0..360 in rising order, and their places in the source."""
    # -0.1 and 359.9 differ in the last bits without rounding.
    degrees = np.round(np.mod(raw_deg, 360.0), 9).astype(np.float64)
    degrees[degrees >= 360.0] = 0.0
    order = np.argsort(degrees, kind="stable").astype(np.int64)
    degrees = degrees[order]
    same = np.flatnonzero(np.diff(degrees) == 0)
    if same.size:
        raise ValueError(
            f"longitude {degrees[same[0]]:g} occurs twice (0 and 360 are the same): remove one column"
        )
    return degrees, order


def _levels(raw: Any, dims: dict[str, str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the levels in hPa in rising order, and their places in the source."""
    if LEVEL not in dims:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    name = dims[LEVEL]
    units = str(raw[name].attrs.get("units", "Pa" if name in ("isobaricInPa", "plev") else "hPa"))
    try:
        factor, _ = conversion(units, "hPa")
    except ValueError:
        raise ValueError(f"the levels along {name} are in {units!r}, which is no pressure") from None
    levels_hpa = np.round(_coordinate(raw, name) * factor, 6)
    order = np.argsort(levels_hpa, kind="stable").astype(np.int64)
    same = np.flatnonzero(np.diff(levels_hpa[order]) == 0)
    if same.size:
        raise ValueError(f"level {levels_hpa[order][same[0]]:g} hPa occurs twice along {name}")
    return levels_hpa[order].astype(np.float64), order


def _ends(coordinate: Any) -> str:
    values = coordinate.values
    return f"{len(values)}: {values[0]:g} to {values[-1]:g}"
