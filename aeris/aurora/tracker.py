"""Follows a tropical cyclone through a forecast.

The method is that of the official package: from where the last positions lead, look for the nearest minimum
of the smoothed mean sea level pressure in a box free of land, in ever smaller boxes; failing that, of the
geopotential at 700 hPa. Two things differ: longitudes may cross 0 degrees between positions, and a point on
the border of a box belongs to it whatever the rounding.

Shapes: H rows, W columns of a field; Y rows, X columns of a box cut from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from torch import Tensor

from aeris.aurora.batch import Batch

BOXES_DEG = (5.0, 4.0, 3.0, 2.0, 1.5)
"""Half widths of the boxes that are searched."""
REPORT_DEG = 1.5
"""Half width of the box whose lowest pressure and strongest wind are reported."""
HISTORY = 8
"""Positions that the next guess is fitted to."""
CAP = 8
"""Width in points of the neighbourhood that a minimum is the least of."""
LAND = 0.5
EARTH_RADIUS_KM = 6371.0
TOLERANCE_DEG = 1e-6
"""How far beyond its border a box reaches, so that rounding decides nothing."""


class NoEyeError(ValueError):
    """No cyclone was found at the first step."""


@dataclass(frozen=True)
class _Scene:
    """One time of one sample, [H, W] each, on the CPU."""

    msl: Tensor
    z700: Tensor
    wind: Tensor
    lsm: Tensor
    lat: Tensor
    lon: Tensor


class Tracker:
    """The track of one cyclone.

    Attributes:
        tracked_times: times, the first is where the track starts.
        tracked_lats: latitudes, degrees.
        tracked_lons: longitudes within [0, 360), degrees, after the first.
        tracked_msls: lowest mean sea level pressure nearby, Pa; NaN at the start.
        tracked_winds: strongest 10 m wind nearby, m/s; NaN at the start.
        fails: steps at which nothing was found and the position is a guess.
    """

    def __init__(self, init_lat: float, init_lon: float, init_time: datetime) -> None:
        """Start from a known position, degrees."""
        self.tracked_times: list[datetime] = [init_time]
        self.tracked_lats: list[float] = [init_lat]
        self.tracked_lons: list[float] = [init_lon]
        self.tracked_msls: list[float] = [math.nan]
        self.tracked_winds: list[float] = [math.nan]
        self.fails: int = 0

    def results(self) -> Any:
        """Return the track as a pandas DataFrame with the columns time, lat, lon, msl and wind."""
        import pandas

        return pandas.DataFrame(
            {
                "time": self.tracked_times,
                "lat": self.tracked_lats,
                "lon": self.tracked_lons,
                "msl": self.tracked_msls,
                "wind": self.tracked_winds,
            }
        )

    def step(self, batch: Batch) -> None:
        """Find the cyclone in the next prediction.

        Args:
            batch: one sample with msl, 10u, 10v, lsm, and z at 700 hPa.

        Raises:
            ValueError: it has several samples, lacks one of these, or lat and lon are [H, W].
            NoEyeError: nothing was found at the first step.
        """
        fields = _fields(batch)
        lat, lon = extrapolate(self.tracked_lats, self.tracked_lons)
        eye = _by_pressure(fields, lat, lon)
        if eye is None:
            eye = _closest_minimum(fields.z700, fields, lat, lon, BOXES_DEG[0])
            if eye is not None:
                eye = _by_pressure(fields, *eye) or eye
        if eye is None:
            if len(self.tracked_lats) == 1:
                raise NoEyeError(
                    f"no cyclone within {BOXES_DEG[0]:g} degrees of {lat:g} N, {lon:g} E at "
                    f"{batch.metadata.time[0]}: start from its position at that time"
                )
            self.fails += 1
        lat, lon = eye or (lat, lon)
        self.tracked_times.append(batch.metadata.time[0])
        self.tracked_lats.append(lat)
        self.tracked_lons.append(lon)
        rows, cols = _box(fields, lat, lon, REPORT_DEG)
        near = len(rows) > 0 and len(cols) > 0
        self.tracked_msls.append(float(fields.msl[rows][:, cols].min()) if near else math.nan)
        self.tracked_winds.append(float(fields.wind[rows][:, cols].max()) if near else math.nan)


def _fields(batch: Batch) -> _Scene:
    """Take what tracking needs from a batch of one sample."""
    where = batch.metadata
    if len(where.time) != 1:
        raise ValueError(
            f"a tracker follows one sample, the batch has {len(where.time)}: give them one by one"
        )
    if where.lat.dim() != 1:
        raise ValueError("a tracker needs lat (H,) and lon (W,): regrid the batch")
    lacks = [name for name in ("msl", "10u", "10v") if name not in batch.surf_vars]
    lacks += [name for name in ("lsm",) if name not in batch.static_vars]
    if "z" not in batch.atmos_vars or 700 not in where.atmos_levels:
        lacks.append("z at 700 hPa")
    if lacks:
        raise ValueError(
            f"a tracker needs msl, 10u, 10v, lsm and z at 700 hPa; the batch lacks {', '.join(lacks)}"
        )
    msl, u10, v10 = (batch.surf_vars[name][0, -1].detach().cpu() for name in ("msl", "10u", "10v"))
    lsm = batch.static_vars["lsm"].detach().cpu()
    return _Scene(
        msl=msl,
        z700=batch.atmos_vars["z"][0, -1, where.atmos_levels.index(700)].detach().cpu(),
        wind=(u10 * u10 + v10 * v10).sqrt(),
        lsm=lsm if lsm.dim() == 2 else lsm[0, -1],
        lat=where.lat,
        lon=where.lon,
    )


def extrapolate(lats: list[float], lons: list[float]) -> tuple[float, float]:
    """Guess the next position from a line through the last eight; longitude within [0, 360).

    Args:
        lats: latitudes so far, degrees, at least one.
        lons: longitudes so far, degrees.
    """
    near = list(lons[-HISTORY:])
    for i in range(1, len(near)):  # as if the circle had no seam
        near[i] = near[i - 1] + (near[i] - near[i - 1] + 180) % 360 - 180
    return min(max(_next_on_line(lats[-HISTORY:]), -90.0), 90.0), _next_on_line(near) % 360


def _next_on_line(values: list[float]) -> float:
    """Return the value at n of the least-squares line through n values at 0 to n - 1."""
    n = len(values)
    if n == 1:
        return float(values[0])
    middle, mean = (n - 1) / 2, math.fsum(values) / n
    slope = math.fsum((i - middle) * (value - mean) for i, value in enumerate(values))
    return mean + slope / (n * (n * n - 1) / 12) * (n - middle)


def _by_pressure(fields: _Scene, lat: float, lon: float) -> tuple[float, float] | None:
    """Look for the minimum of mean sea level pressure in ever smaller boxes, where these are free of land."""
    for half_deg in BOXES_DEG:
        rows, cols = _box(fields, lat, lon, half_deg)
        box = fields.lsm[rows][:, cols]
        if box.numel() and float(box.max()) < LAND:
            eye = _closest_minimum(fields.msl, fields, lat, lon, half_deg)
            if eye is not None:
                return eye
    return None


def _box(fields: _Scene, lat: float, lon: float, half_deg: float) -> tuple[Tensor, Tensor]:
    """Return the rows and columns within `half_deg` of a position; columns run east, across 0 degrees too."""
    reach = half_deg + TOLERANCE_DEG
    rows = torch.nonzero((fields.lat - lat).abs() <= reach)[:, 0]
    east = (fields.lon - lon + 180) % 360 - 180
    cols = torch.nonzero(east.abs() <= reach)[:, 0]
    return rows, cols[east[cols].argsort(stable=True)]


def _closest_minimum(
    x_HW: Tensor, fields: _Scene, lat: float, lon: float, half_deg: float
) -> tuple[float, float] | None:
    """Return the position of the local minimum nearest to a position, within a box; None without one."""
    rows, cols = _box(fields, lat, lon, half_deg)
    if len(rows) < 3 or len(cols) < 3:  # nothing but border
        return None
    box_YX = smooth(x_HW[rows][:, cols])
    minima_YX = lowest_nearby(box_YX) == box_YX
    # A minimum on the border belongs to something outside.
    minima_YX[[0, -1]] = False
    minima_YX[:, [0, -1]] = False
    found = torch.nonzero(minima_YX)
    if not len(found):
        return None
    lats, lons = fields.lat[rows[found[:, 0]]], fields.lon[cols[found[:, 1]]]
    nearest = int(distance_km(lats, lons, lat, lon).argmin())
    return float(lats[nearest]), float(lons[nearest])


def distance_km(lats: Tensor, lons: Tensor, lat: float, lon: float) -> Tensor:
    """Return the distance of points from a point along the surface of the Earth, by the haversine formula."""
    phi, phi0 = lats.deg2rad(), math.radians(lat)
    turn = (lons - lon).deg2rad()
    haversines = 1 - (phi - phi0).cos() + phi.cos() * math.cos(phi0) * (1 - turn.cos())
    return 2 * EARTH_RADIUS_KM * (haversines / 2).sqrt().asin()


def smooth(x_YX: Tensor) -> Tensor:
    """Average with Gaussian weights of a standard deviation of one point, over 4 points to each side.

    Beyond the border the field is mirrored, the border point twice: `scipy.ndimage.gaussian_filter(x, 1)`.
    """
    weights = [math.exp(-0.5 * k * k) for k in range(5)]
    total = weights[0] + 2 * sum(weights[1:])
    for dim in (0, 1):
        wide = _mirrored(x_YX.double(), dim, 4, 4)
        size = x_YX.shape[dim]
        mean = wide.narrow(dim, 4, size) * (weights[0] / total)
        for k in range(4, 0, -1):
            mean += (wide.narrow(dim, 4 - k, size) + wide.narrow(dim, 4 + k, size)) * (weights[k] / total)
        x_YX = mean.to(x_YX.dtype)
    return x_YX


def lowest_nearby(x_YX: Tensor) -> Tensor:
    """Return the minimum of the 8 by 8 points around each: `scipy.ndimage.minimum_filter(x, (8, 8))`."""
    for dim in (0, 1):
        wide = _mirrored(x_YX, dim, CAP // 2, CAP - CAP // 2 - 1)
        x_YX = wide.unfold(dim, CAP, 1).amin(dim=-1)
    return x_YX


def _mirrored(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Continue a field beyond its border by its mirror image, as often as it takes."""
    size = x.shape[dim]
    place = torch.arange(-before, size + after) % (2 * size)
    return x.index_select(dim, torch.minimum(place, 2 * size - 1 - place))
