"""What a model is told beside the state: sunshine at the top of the atmosphere, orography, land and sea.

Sunshine is the mean over the hour before a time, as ERA5's accumulated `toa_incident_solar_radiation` over
3600 s. It is computed from time and place; the mean over the hour is exact (the sun's hour angle is
integrated in closed form).

Shapes: Y rows, X cols, N windows, T tokens per window, F forcings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aeris.data.standards import RunStore
from aeris.data.store import Store
from swipe.windows import WindowShard

FORCINGS = ("solar_now", "orography", "land_sea_mask", "solar_next")

# Total solar irradiance at the mean distance of the sun: Kopp and Lean 2011, doi:10.1029/2010GL045777.
SOLAR_CONSTANT_W_M2 = 1360.8
# A quarter of that is the mean over the globe; over a sphere lit from one side the standard deviation is
# sqrt(5/48).
SOLAR_MEAN_W_M2 = SOLAR_CONSTANT_W_M2 / 4
SOLAR_STD_W_M2 = SOLAR_CONSTANT_W_M2 * (5 / 48) ** 0.5
# Mean and standard deviation of each in units of its own. Orography: 10^4 m2 s-2, about 1 km of height, is 1;
# land-sea mask: -1 over sea, 1 over land.
SCALING = {
    "solar": (SOLAR_MEAN_W_M2, SOLAR_STD_W_M2),
    "orography": (0.0, 1.0e4),
    "land_sea_mask": (0.5, 0.5),
}

_HOUR_RAD = np.pi / 12  # the sun's hour angle turns by 15 degrees an hour
_HALF_HOUR = np.timedelta64(30, "m")

Angle = NDArray[np.float64]


def sun_position(time: np.datetime64) -> tuple[float, float, float]:
    """Return declination (rad), equation of time (rad) and (mean distance / distance)^2 of the sun.

    Low-precision solar coordinates of the Astronomical Almanac (US Naval Observatory, "Approximate Solar
    Coordinates"): 1 arc minute between 1800 and 2200.
    """
    days = (time.astype("datetime64[s]") - np.datetime64("2000-01-01T12:00:00", "s")) / np.timedelta64(
        86400, "s"
    )
    anomaly = np.deg2rad(357.529 + 0.98560028 * days)
    mean_longitude = np.deg2rad(280.459 + 0.98564736 * days)
    longitude = mean_longitude + np.deg2rad(1.915 * np.sin(anomaly) + 0.020 * np.sin(2 * anomaly))
    distance_au = 1.00014 - 0.01671 * np.cos(anomaly) - 0.00014 * np.cos(2 * anomaly)
    obliquity = np.deg2rad(23.439 - 0.00000036 * days)
    declination = np.arcsin(np.sin(obliquity) * np.sin(longitude))
    right_ascension = np.arctan2(np.cos(obliquity) * np.sin(longitude), np.cos(longitude))
    equation = np.mod(mean_longitude - right_ascension + np.pi, 2 * np.pi) - np.pi
    return float(declination), float(equation), float(distance_au**-2)


def toa_solar_w_m2(time: np.datetime64, latitude_deg: Angle, longitude_deg: Angle) -> NDArray[np.float64]:
    """Return the mean sunshine at the top of the atmosphere in the hour before `time`: W m-2, [Y, X].

    The sun's declination and distance are those of the middle of the hour. Latitudes [Y] and longitudes [X]
    in degrees.
    """
    return _sunshine(time, np.asarray(latitude_deg)[:, None], np.asarray(longitude_deg)[None, :])


def _sunshine(time: np.datetime64, latitude_deg: Angle, longitude_deg: Angle) -> NDArray[np.float64]:
    """Integrate max(0, cos zenith) = max(0, a + b cos h) over an hour of hour angle h; shapes broadcast."""
    middle = time.astype("datetime64[s]") - _HALF_HOUR
    declination, equation, nearness = sun_position(middle)
    seconds = (middle - middle.astype("datetime64[D]")) / np.timedelta64(1, "s")
    noon = 2 * np.pi * seconds / 86400 - np.pi + equation  # hour angle at Greenwich
    latitude, longitude = np.deg2rad(latitude_deg), np.deg2rad(longitude_deg)
    a = np.sin(latitude) * np.sin(declination)
    b = np.cos(latitude) * np.cos(declination)
    # Sunrise and sunset are at -/+ this hour angle; 0 in polar night, pi in polar day. b is 0 at a pole only.
    sunset = np.arccos(np.clip(-a / np.maximum(b, 1e-12), -1.0, 1.0))

    def since_midnight(hour_angle: Angle) -> Angle:
        """Integrate from the midnight before -pi <= h < 0 or after; whole turns add a whole day."""
        turns = np.floor((hour_angle + np.pi) / (2 * np.pi))
        h = hour_angle - 2 * np.pi * turns
        lit = np.clip(h, -sunset, sunset)
        day = 2 * (a * sunset + b * np.sin(sunset))
        # sin(lit) without a sine per point: inside the day it depends on longitude only, outside on latitude
        # only
        sine = np.where(np.abs(h) < sunset, np.sin(h), np.sign(h) * np.sin(sunset))
        return np.asarray(a * (lit + sunset) + b * (sine + np.sin(sunset)) + turns * day)

    start = noon + longitude - _HOUR_RAD / 2
    mean = (since_midnight(start + _HOUR_RAD) - since_midnight(start)) / _HOUR_RAD
    return np.asarray(SOLAR_CONSTANT_W_M2 * nearness * np.maximum(mean, 0.0))


class Forcing:
    """The forcings of a store, standardised: `FORCINGS` in that order, the order of the published models.

    They are standardised by `SCALING`, or by the numbers of the run that reads the store. Sunshine has there
    the mean and standard deviation over the globe of an ideal sphere.
    """

    def __init__(self, store: Store, interval_h: int) -> None:
        self._latitude_deg, self._longitude_deg = store.latitude_deg, store.longitude_deg
        self._interval = np.timedelta64(interval_h, "h")
        scaling: dict[str, tuple[float, float]] = SCALING
        if isinstance(store, RunStore):
            scaling = store.standards.forcing
        self._solar_mean_w_m2, self._solar_std_w_m2 = scaling["solar"]
        self._orography_YX, self._land_YX = (
            (store.static[name] - np.float32(mean)) / np.float32(std)
            for name, (mean, std) in (
                ("geopotential_at_surface", scaling["orography"]),
                ("land_sea_mask", scaling["land_sea_mask"]),
            )
        )

    def fields(self, time: np.datetime64) -> NDArray[np.float32]:
        """Return the forcings of the step that starts at `time`: float32 [F, Y, X]."""
        now, then = self._solar(time, self._latitude_deg[:, None], self._longitude_deg[None, :])
        return np.stack([now, self._orography_YX, self._land_YX, then])

    def windows(self, time: np.datetime64, shard: WindowShard, roll: int = 0) -> NDArray[np.float32]:
        """Return the forcings of a rank's windows only: float32 [N, T, F], the numbers of `fields`.

        Args:
            roll: as if the globe had been turned by so many columns; see `Store.read_windows`.
        """
        tokens_NT = shard.token_index()
        side, corners = shard.grid.window, shard.grid.window * np.array(shard.windows)
        within = np.arange(side)
        # Whole windows as rows x cols, so that sines are taken per row and column; then this rank's tokens.
        latitude_deg = self._latitude_deg[(corners[:, :1] + within)[:, :, None]]
        longitude_deg = self._longitude_deg[(corners[:, 1:] + within - roll)[:, None, :] % shard.grid.cols]
        row_T, col_T = shard.positions().T
        now, then = (x[:, row_T, col_T] for x in self._solar(time, latitude_deg, longitude_deg))
        static = (np.roll(x, roll, axis=1) if roll else x for x in (self._orography_YX, self._land_YX))
        orography, land = (x.reshape(-1)[tokens_NT] for x in static)
        return np.stack([now, orography, land, then], axis=-1)

    def _solar(
        self, time: np.datetime64, latitude_deg: Angle, longitude_deg: Angle
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return standardised sunshine before `time` and an interval later."""
        now, then = (
            (_sunshine(when, latitude_deg, longitude_deg) - self._solar_mean_w_m2) / self._solar_std_w_m2
            for when in (time, time + self._interval)
        )
        return now.astype(np.float32), then.astype(np.float32)
