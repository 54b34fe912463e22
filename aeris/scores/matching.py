"""Lay a forecast and the truth side by side: which fields are compared with which, and every reason not to.

Legend: I init times, J lead times, C channels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel, channel
from aeris.scores.metrics import first_bad_value

Array = NDArray[np.float64]
Fields = NDArray[np.float32]

_SAME_DEG = 1e-3


class Grid(Protocol):
    """What is needed of anything on a grid."""

    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def latitude_deg(self) -> Array: ...  # noqa: D102
    @property
    def longitude_deg(self) -> Array: ...  # noqa: D102


class Ensemble(Grid, Protocol):
    """What is needed of a forecast (aeris.data.forecasts)."""

    @property
    def inits(self) -> NDArray[np.datetime64]: ...  # noqa: D102
    @property
    def lead_h(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def members(self) -> int: ...  # noqa: D102
    @property
    def attrs(self) -> Mapping[str, Any]: ...  # noqa: D102
    def read(self, init_index: int, lead_index: int) -> Fields: ...  # noqa: D102


class Truth(Grid, Protocol):
    """What is needed of a store (aeris.data.store)."""

    @property
    def channels(self) -> Sequence[Channel]: ...  # noqa: D102
    @property
    def times(self) -> NDArray[np.datetime64]: ...  # noqa: D102
    @property
    def static(self) -> Mapping[str, Fields]: ...  # noqa: D102
    @property
    def mask_CYX(self) -> NDArray[np.bool_]: ...  # noqa: D102
    def index_of(self, time: np.datetime64) -> int: ...  # noqa: D102
    def read(self, index: int) -> Fields: ...  # noqa: D102


@dataclass(frozen=True)
class Match:
    """A forecast beside the truth: what is compared with what, and how to read it."""

    forecast: Ensemble
    truth: Truth
    inits: NDArray[np.datetime64]
    lead_h: tuple[int, ...]
    channels: tuple[Channel, ...]
    forecast_channels: tuple[int, ...]
    truth_channels: tuple[int, ...]
    start_I: NDArray[np.int64]
    """Number of the truth's time at each init, for persistence."""
    valid_IJ: NDArray[np.int64]
    """Number of the truth's time at each valid time."""
    mask_CYX: NDArray[np.bool_]
    """True where a channel has a value to compare with."""

    def inside(self, period: tuple[np.datetime64, np.datetime64]) -> int:
        """Return how many init times have a valid time inside `period`, ends included."""
        valid_IJ = self.truth.times[self.valid_IJ]
        return int(((valid_IJ >= period[0]) & (valid_IJ <= period[1])).any(axis=1).sum())

    def read_truth(self, number: int) -> Fields:
        """Return the fields [C, Y, X] of the truth at one of its times."""
        return self.truth.read(int(number))[list(self.truth_channels)]

    def read_forecast(self, init: int, lead: int) -> Fields:
        """Return the members [M, C, Y, X] at one init and lead time.

        Raises:
            ValueError: a value is NaN or infinite where the truth has one; names the first.
        """
        x_MCYX = self.forecast.read(init, lead)
        if self.forecast_channels != tuple(range(x_MCYX.shape[1])):
            x_MCYX = x_MCYX[:, list(self.forecast_channels)]
        bad = first_bad_value(x_MCYX, self.mask_CYX)
        if bad is not None:
            member, place, row, col = bad
            raise ValueError(
                f"the forecast of init {self.inits[init]}, lead {self.lead_h[lead]} h, member {member} has "
                f"{self.channels[place].name} = {x_MCYX[bad]} at row {row}, col {col}"
            )
        return x_MCYX


def match(forecast: Ensemble, truth: Truth, wanted: Sequence[str] = ()) -> Match:
    """Compare what a forecast and the truth say about themselves.

    Args:
        forecast: an opened forecast.
        truth: an opened store.
        wanted: names of the channels to score; none means all of the forecast.

    Raises:
        ValueError: they cannot be compared; says which channel, unit, grid point or time differs first.
    """
    names = [channel(name).name for name in wanted] or list(forecast.names)
    for owner, known in (("forecast", forecast.names), ("truth", truth.names)):
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"the {owner} has no channel {missing[0]}; it has {' '.join(known)}")
    truth_channels = tuple(list(truth.names).index(name) for name in names)
    channels = tuple(truth.channels[number] for number in truth_channels)
    _same_units(channels, forecast.attrs.get("units"))
    _same_grid("latitudes", forecast.latitude_deg, truth.latitude_deg)
    _same_grid("longitudes", forecast.longitude_deg, truth.longitude_deg)
    lead_h = tuple(int(hours) for hours in forecast.lead_h)
    start = [_time_index(truth, init, 0) for init in forecast.inits]
    valid = [[_time_index(truth, init, hours) for hours in lead_h] for init in forecast.inits]
    return Match(
        forecast=forecast,
        truth=truth,
        inits=forecast.inits,
        lead_h=lead_h,
        channels=channels,
        forecast_channels=tuple(list(forecast.names).index(name) for name in names),
        truth_channels=truth_channels,
        start_I=np.array(start, dtype=np.int64),
        valid_IJ=np.array(valid, dtype=np.int64),
        mask_CYX=truth.mask_CYX[list(truth_channels)],
    )


def _same_units(channels: Sequence[Channel], stated: object) -> None:
    """Compare with the units a forecast states for its channels; where it states none, those of the table."""
    for one in channels:
        units = stated.get(one.name, one.units) if isinstance(stated, Mapping) else channel(one.name).units
        if units != one.units:
            raise ValueError(f"{one.name} is in {units} in the forecast and in {one.units} in the truth")


def _same_grid(what: str, forecast_deg: Array, truth_deg: Array) -> None:
    if len(forecast_deg) != len(truth_deg):
        raise ValueError(f"the forecast has {len(forecast_deg)} {what}, the truth {len(truth_deg)}")
    apart = np.abs(np.asarray(forecast_deg) - truth_deg)
    if apart.max() > _SAME_DEG:
        first = int(np.argmax(apart > _SAME_DEG))
        raise ValueError(
            f"the {what} differ, first at number {first}: {forecast_deg[first]:g} degrees in the forecast, "
            f"{truth_deg[first]:g} in the truth"
        )


def _time_index(truth: Truth, init: np.datetime64, lead_h: int) -> int:
    try:
        return truth.index_of(init + np.timedelta64(lead_h, "h"))
    except ValueError as error:
        raise ValueError(f"init {init}, lead {lead_h} h: no truth to compare with: {error}") from None
