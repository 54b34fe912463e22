"""The SPEEDY general circulation model behind a small interface: run on, take its state, put one back.

A state is a dictionary of arrays: the spectral coefficients of the dynamics by name, what the physics carries
from step to step by number, and the clock. It is all that a run depends on, so a run that goes on from one is
bit for bit the run that was never stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from aeris.data.speedy.levels import GRAVITY, Floats

State = dict[str, NDArray[Any]]

FIELDS = ("vorticity", "divergence", "temperature_variation", "log_surface_pressure")
DYNAMICS, HUMIDITY = "dynamics.", "dynamics.specific_humidity"
TEMPERATURE = DYNAMICS + "temperature_variation"
CLOCK = ("clock.days", "clock.seconds", "clock.step")
STEP_MINUTES = 30.0


class Simulation(Protocol):
    """A model as jcm lays it out: dims (time, level, lon, lat), sigma falling, latitude rising."""

    def statics(self) -> dict[str, Floats]:
        """Return `geopotential_at_surface` and `land_sea_mask`, [lon, lat]."""

    def advance(self, days: float, step_days: float) -> xr.Dataset:
        """Run on; return the states at every step, the last at the end."""

    def state(self) -> State:
        """Return all that the run goes on from."""

    def restore(self, state: State) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is not a state of this model.
        """


class Speedy:
    """The SPEEDY model at T31 (96 x 48 points, 8 sigma levels) with the boundary data that jcm brings.

    Args:
        start: when the run begins, spin-up included.

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
        self._model = Model(coords=coords, terrain=self._terrain, time_step=STEP_MINUTES, start_time=began)
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

    def state(self) -> State:
        """Return all that the run goes on from."""
        import jax

        model = self._model
        dynamics = model.dycore_state
        state = {DYNAMICS + name: np.asarray(getattr(dynamics, name)) for name in FIELDS}
        state |= {DYNAMICS + name: np.asarray(x) for name, x in dynamics.tracers.items()}
        state["dynamics.sim_time"] = np.asarray(dynamics.sim_time)
        carried = jax.tree_util.tree_leaves(model.physics_carry)
        state |= {f"physics.{number:03d}": np.asarray(x) for number, x in enumerate(carried)}
        clock = (model.run_state.time.delta.days, model.run_state.time.delta.seconds, model.run_state.step)
        return state | {name: np.asarray(x, np.int32) for name, x in zip(CLOCK, clock, strict=True)}

    def restore(self, state: State) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is not a state of this model.
        """
        import jax

        if not self._begun:
            self._model.bootstrap_state()  # the structure that the arrays are put into
            self._begun = True
        check_like(state, self.state())
        arrays = {name: jax.numpy.asarray(x) for name, x in state.items()}
        dynamics = self._model.dycore_state
        dynamics = dynamics.replace(
            **{name: arrays[DYNAMICS + name] for name in FIELDS},
            tracers={name: arrays[DYNAMICS + name] for name in dynamics.tracers},
            sim_time=arrays["dynamics.sim_time"],
        )
        shape = jax.tree_util.tree_structure(self._model.physics_carry)
        carried = [arrays[f"physics.{number:03d}"] for number in range(shape.num_leaves)]
        *since_1970, step = (arrays[name] for name in CLOCK)
        moment = jax.tree_util.tree_structure(self._model.run_state.time)
        time = jax.tree_util.tree_unflatten(moment, since_1970)
        carry = jax.tree_util.tree_unflatten(shape, carried)
        self._model.restore_state(dynamics, carry, time=time, step=step)


def time_of(state: State) -> np.datetime64:
    """Return the time of a state, to the second."""
    days, seconds = (int(state[name]) for name in CLOCK[:2])
    return np.datetime64(days * 86400 + seconds, "s")


def check_like(state: State, like: State) -> None:
    """Refuse a state with other arrays than `like`.

    Raises:
        ValueError: names the first array that is missing, too many or of another shape.
    """
    for name in dict.fromkeys([*like, *state]):
        there, wanted = state.get(name), like.get(name)
        if there is None or wanted is None or there.shape != wanted.shape or there.dtype != wanted.dtype:
            have = "missing" if there is None else f"{there.dtype} {there.shape}"
            want = "none" if wanted is None else f"{wanted.dtype} {wanted.shape}"
            raise ValueError(f"the state is of another model or version: {name} is {have}, expected {want}")
