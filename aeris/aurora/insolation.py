"""Incoming sunlight at the top of the atmosphere, an input of Aurora v1.5.

Berger (1978), "Long-term variations of daily insolation", to first order in e, with the orbit of 1995:

    λm = λ0 + 2π (day − 80.5)/365,  λ0 = e (1 + √(1−e²)) sin ω     mean longitude of the Earth
    λ  = λm + 2 e sin(λm − ω)                                      true longitude
    δ  = arcsin(sin ε sin λ),  ρ = (1−e²)/(1 + e cos(λ − ω))       declination, distance
    S  = S₀ ρ⁻² (sin φ sin δ − cos φ cos δ cos h),  h = 2π (day + longitude/360°)

φ latitude, day: days since the year began. S is negative at night. Shapes: N times, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

import torch
from torch import Tensor

from aeris.aurora.times import utc

OBLIQUITY_RAD = math.radians(23.4441)  # ε in 1995
ECCENTRICITY = 0.016715  # e in 1995
PERIHELION_RAD = math.radians(282.7)  # ω, longitude of the perihelion in 1995
EQUINOX_DAY = 80.5
DAYS_PER_YEAR = 365.0


def day_of_year(time: datetime) -> float:
    """Count the days, with their fraction, since the year of `time` began; a naive time is UTC."""
    time = utc(time)
    return (time - datetime(time.year, 1, 1)).total_seconds() / 86_400


def orbit(day: float) -> tuple[float, float]:
    """Find the declination δ of the sun in radians and the distance ρ of the Earth over its mean distance."""
    e, omega = ECCENTRICITY, PERIHELION_RAD
    origin = e * (1 + math.sqrt(1 - e**2)) * math.sin(omega)
    mean_longitude = origin + 2 * math.pi * (day - EQUINOX_DAY) / DAYS_PER_YEAR
    longitude = mean_longitude + 2 * e * math.sin(mean_longitude - omega)
    declination = math.asin(math.sin(OBLIQUITY_RAD) * math.sin(longitude))
    return declination, (1 - e**2) / (1 + e * math.cos(longitude - omega))


def insolation(
    times: Sequence[datetime],
    lat: Tensor,
    lon: Tensor,
    *,
    s0: float = 1.0,
    daily: bool = False,
    clip_zero: bool = False,
    precise: bool = False,
) -> Tensor:
    """Compute the sunlight that falls on a horizontal plane at the top of the atmosphere.

    The official package works in float32, which rounds the hour angle by up to 1.2e-4. That rounding is kept,
    since the published weights are fed with it; the rest is float64, so the two differ by less than 1e-6.

    Args:
        times: N times; naive ones are UTC.
        lat: Degrees, (H,) or (H, W).
        lon: Degrees, (W,) or (H, W).
        s0: Solar constant; its unit is the unit of the result.
        daily: The greatest value of the day (rounded to whole days), equal along a parallel.
        clip_zero: Zero at night instead of negative.
        precise: Do not round the hour angle.

    Returns:
        (N, H, W), float64, where `lat` lives.

    Raises:
        ValueError: If the shapes of `lat` and `lon` make no grid.
    """
    if lat.dim() == lon.dim() == 1:
        lat, lon = lat[:, None], lon[None, :]
    elif lat.dim() != 2 or lat.shape != lon.shape:
        raise ValueError(
            f"lat {tuple(lat.shape)} and lon {tuple(lon.shape)} make no grid: "
            "give (H,) and (W,), or (H, W) twice"
        )
    number = torch.float64 if precise else torch.float32
    lat_rad = torch.deg2rad(lat.double())
    turn = (torch.zeros_like(lon) if daily else lon).to(number) / 360
    fields = []
    for time in times:
        day = torch.tensor(day_of_year(time), dtype=number, device=turn.device)
        if daily:
            day = 0.5 + day.round()
        declination, distance = orbit(float(day))
        angle = (2 * math.pi * (day + turn)).double()
        sine = torch.sin(lat_rad) * math.sin(declination)
        cosine = torch.cos(lat_rad) * math.cos(declination)
        fields.append((sine - cosine * torch.cos(angle)) * (s0 / distance**2))
    height, width = torch.broadcast_shapes(lat.shape, lon.shape)
    field_NHW = torch.stack(fields) if fields else lat_rad.new_zeros(0, height, width)
    return field_NHW.clamp(min=0) if clip_zero else field_NHW
