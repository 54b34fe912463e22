"""An ensemble of analyses, or of any initial states: what members may start from (perturbation.py).

Either a forecast in our format with a lead time of 0 h (one member of it per analysis), or one store per
member, `.../analysis_{member}` with members counted from 0.

Shapes: M members, N windows, T tokens per window, C channels, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aeris.data.forecasts import Forecast, open_forecast
from aeris.data.store import Store
from swipe.windows import WindowShard

GRID_TOLERANCE_DEG = 1e-3
Field = NDArray[np.float32]


class Analyses(Protocol):
    """States of several members at some times, on the grid and with the channels of a store."""

    members: int

    def check(self, inits: Sequence[np.datetime64]) -> None:
        """Refuse the first init time that is missing, with a ValueError."""

    def read(self, init: np.datetime64, member: int) -> Field:
        """Read a rank's tokens of one member: float32 [N, T, C], masked points filled."""


def open_analyses(path: str, store: Store, shard: WindowShard) -> Analyses:
    """Open an ensemble of analyses.

    Raises:
        ValueError: there is none at `path`, or it has another grid or lacks channels of the store.
    """
    if not path:
        raise ValueError(
            "--perturb.kind analyses needs --perturb.analyses: a forecast with a lead time of 0 h, or stores "
            "with {member} in their path"
        )
    return StoredAnalyses(path, store, shard) if "{member}" in path else ForecastAnalyses(path, store, shard)


class ForecastAnalyses:
    """Lead time 0 h of a forecast. Every rank reads the whole image of its members, one at a time."""

    def __init__(self, path: str, store: Store, shard: WindowShard) -> None:
        self.forecast: Forecast = open_forecast(path)
        self.path, self.store, self.members = path, store, self.forecast.members
        leads = self.forecast.lead_h.tolist()
        if 0 not in leads:
            raise ValueError(f"{path} has no lead time of 0 h to start from: its first is {leads[0]} h")
        self._lead = leads.index(0)
        self._order = _order(path, self.forecast.names, store)
        _check_grid(path, self.forecast.latitude_deg, self.forecast.longitude_deg, store)
        self._tokens_NT = shard.token_index()

    def check(self, inits: Sequence[np.datetime64]) -> None:
        """Refuse the first init time that is missing."""
        for init in inits:
            self._number(init)

    def _number(self, init: np.datetime64) -> int:
        found = np.flatnonzero(self.forecast.inits == init.astype("datetime64[s]"))
        if not found.size:
            first, last = self.forecast.inits[[0, -1]]
            raise ValueError(
                f"{self.path} has no initial states of {init}: it has {len(self.forecast.inits)} init times "
                f"from {first} to {last}"
            )
        return int(found[0])

    def read(self, init: np.datetime64, member: int) -> Field:
        """Read a rank's tokens of one member: float32 [N, T, C]."""
        # The whole ensemble may not fit in memory.
        x_MCYX = self.forecast.read(self._number(init), self._lead, range(member, member + 1))
        x_CYX = np.where(self.store.mask_CYX, x_MCYX[0][list(self._order)], self.store.fill_C[:, None, None])
        if not np.isfinite(x_CYX.sum()):
            channel, row, col = np.argwhere(~np.isfinite(x_CYX))[0].tolist()
            raise ValueError(
                f"{self.path}: {self.store.names[channel]} of member {member} at {init} is "
                f"{x_CYX[channel, row, col]} at row {row}, col {col}: no state to start from"
            )
        x_SC = x_CYX.reshape(len(x_CYX), -1).T
        return np.ascontiguousarray(x_SC[self._tokens_NT])


class StoredAnalyses:
    """One store per member. Every rank reads its own windows only."""

    def __init__(self, pattern: str, store: Store, shard: WindowShard) -> None:
        self.pattern, self.store, self.shard = pattern, store, shard
        self.members = 0
        while Path(self._path(self.members)).exists():
            self.members += 1
        if not self.members:
            raise ValueError(f"{self._path(0)} does not exist: --perturb.analyses counts {{member}} from 0")
        self._stores: dict[int, Store] = {}
        self._hidden_NTC = ~store.valid_windows(shard)
        self._store(0)

    def _path(self, member: int) -> str:
        return self.pattern.replace("{member}", str(member))

    def _store(self, member: int) -> Store:
        """Open the store of a member, once."""
        if member not in self._stores:
            there = Store(self._path(member))
            _order(str(there.path), there.names, self.store)
            _check_grid(str(there.path), there.latitude_deg, there.longitude_deg, self.store)
            self._stores[member] = there
        return self._stores[member]

    def check(self, inits: Sequence[np.datetime64]) -> None:
        """Refuse the first member and init time that is missing."""
        for member in range(self.members):
            for init in inits:
                self._store(member).index_of(init)

    def read(self, init: np.datetime64, member: int) -> Field:
        """Read a rank's tokens of one member: float32 [N, T, C]."""
        there = self._store(member)
        x_NTC = there.read_windows(there.index_of(init), self.shard)
        x_NTC = x_NTC[..., list(_order(str(there.path), there.names, self.store))]
        return np.where(self._hidden_NTC, self.store.fill_C, x_NTC)


def _order(path: str, names: Sequence[str], store: Store) -> tuple[int, ...]:
    """Return where the store's channels are among `names`."""
    missing = [name for name in store.names if name not in names]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)} of the {len(store.names)} channels of {store.path}: analyses "
            "need them all"
        )
    return tuple(list(names).index(name) for name in store.names)


def _check_grid(
    path: str, latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64], store: Store
) -> None:
    for what, there, here in (
        ("latitudes", latitude_deg, store.latitude_deg),
        ("longitudes", longitude_deg, store.longitude_deg),
    ):
        if there.shape != here.shape or np.abs(there - here).max() > GRID_TOLERANCE_DEG:
            raise ValueError(
                f"{path} has {len(there)} {what} from {there[0]:g} to {there[-1]:g}, but {store.path} has "
                f"{len(here)} from {here[0]:g} to {here[-1]:g}: analyses must be on the store's grid"
            )
