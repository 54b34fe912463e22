"""An atmosphere in place of the SPEEDY model: known pressure levels, chaotic weather."""

from __future__ import annotations

import numpy as np
import xarray as xr

from aeris.data.speedy.levels import GAS_CONSTANT, GRAVITY, LAPSE_RATE

SIGMA = np.array([0.95, 0.835, 0.685, 0.51, 0.34, 0.2, 0.095, 0.025])
LON = np.arange(8) * 45.0
POWER = GAS_CONSTANT * LAPSE_RATE / GRAVITY
SEA_PA, SEA_K = 101_000.0, 290.0
MODES = 40


class Standard:
    """An atmosphere with 6.5 K/km everywhere, over ground of -400 to 4000 m; laid out as jcm does.

    Its weather are coupled maps that double an error in 8 h; they move temperature at 2 m, and with `weather`
    the whole column.
    """

    def __init__(
        self,
        start: str = "2000-12-29",
        wet: float = 1e-3,
        blow_up: bool = False,
        rows: int = 6,
        weather: float = 0.0,
    ) -> None:
        self.now, self.wet, self.blow_up, self.weather = np.datetime64(start, "s"), wet, blow_up, weather
        self.asked: list[tuple[float, float]] = []
        self.lat = np.linspace(-80.0, 80.0, rows)
        self.ground_m = np.linspace(-400.0, 4000.0, LON.size * rows).reshape(LON.size, rows)
        self.modes = np.linspace(-0.9, 0.9, MODES)
        self.patterns = np.random.default_rng(0).standard_normal((MODES, LON.size, rows)) / MODES**0.5

    def statics(self) -> dict[str, np.ndarray]:
        mask = (self.ground_m > 0).astype(np.float32)
        return {"geopotential_at_surface": self.ground_m * GRAVITY, "land_sea_mask": mask}

    def state(self) -> dict[str, np.ndarray]:
        days, seconds = divmod(int(self.now.astype(np.int64)), 86400)
        return {
            "dynamics.temperature_variation": self.modes.copy(),
            "physics.000": np.zeros(3, np.float32),
            "clock.days": np.asarray(days, np.int32),
            "clock.seconds": np.asarray(seconds, np.int32),
            "clock.step": np.asarray(0, np.int32),
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self.modes = state["dynamics.temperature_variation"].copy()
        self.now = np.datetime64(int(state["clock.days"]) * 86400 + int(state["clock.seconds"]), "s")

    def advance(self, days: float, step_days: float) -> xr.Dataset:
        self.asked.append((days, step_days))
        steps = np.arange(1, round(days / step_days) + 1)
        times = self.now + (steps * round(step_days * 86400)).astype("timedelta64[s]")
        weather = []
        for _ in steps:
            for _ in range(round(step_days * 24)):
                self.modes = 1 - 1.6 * (0.9 * self.modes + 0.1 * np.roll(self.modes, 1)) ** 2
            weather.append(np.einsum("m,mxy->xy", self.modes, self.patterns))
        self.now = times[-1]
        ps = SEA_PA * (1 - LAPSE_RATE * self.ground_m / SEA_K) ** (1 / POWER)
        p = SIGMA[:, None, None] * ps
        t = SEA_K * (p / SEA_PA) ** POWER
        hour = ((times - np.datetime64("2001-01-01", "s")) / np.timedelta64(1, "h")).astype(np.float64)
        if self.blow_up:
            t = t * np.nan
        column = {
            "temperature": t,
            "geopotential": (SEA_K - t) / LAPSE_RATE * GRAVITY,
            "u_wind": np.log(p),
            "v_wind": -p / 1e4,
            "specific_humidity": np.full_like(p, self.wet),
        }
        grid = ("time", "level", "lon", "lat")
        data = {k: (grid, np.broadcast_to(x, (len(times), *x.shape)).copy()) for k, x in column.items()}
        data["temperature"][1][:] += self.weather * np.stack(weather)[:, None]
        flat = np.broadcast_to(hour[:, None, None], (len(times), *ps.shape))
        data["normalized_surface_pressure"] = (("time", "lon", "lat"), np.broadcast_to(ps / 1e5, flat.shape))
        for name, offset in (("t0", 280.0), ("u0", 1.0), ("v0", 2.0)):
            data[f"surface_flux.{name}"] = (("time", "lon", "lat"), flat + offset)
        coords = {"time": times.astype("datetime64[ms]"), "level": SIGMA, "lat": self.lat, "lon": LON}
        return xr.Dataset(data, coords)
