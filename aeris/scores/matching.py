"""Lay a forecast and the truth side by side: which fields are compared with which, and every reason not to.

Legend: I init times, J lead times, C channels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel
from aeris.scores.metrics import first_bad_value
from aeris.scores.winds import Picked, find_channel, headline_speeds, speed_channel

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
    """Lead times compared, in hours."""
    leads: tuple[int, ...]
    """Their numbers in the forecast."""
    channels: tuple[Channel, ...]
    forecast_picked: Picked
    truth_picked: Picked
    start_I: NDArray[np.int64]
    """Number of the truth's time at each init, for persistence; -1 where the truth does not have it."""
    valid_IJ: NDArray[np.int64]
    """Number of the truth's time at each valid time; -1 where the truth does not have it."""
    mask_CYX: NDArray[np.bool_]
    """True where a channel has a value to compare with."""

    @property
    def names(self) -> tuple[str, ...]:
        """Short names of the channels."""
        return tuple(channel.name for channel in self.channels)

    @property
    def valid_times(self) -> NDArray[np.datetime64]:
        """Valid times [I, J]."""
        return np.asarray(self.inits[:, None] + np.array(self.lead_h, dtype="timedelta64[h]"))

    @property
    def truth_times(self) -> NDArray[np.datetime64]:
        """Valid times with a truth, flat."""
        return self.valid_times[self.valid_IJ >= 0]

    def inside(self, period: tuple[np.datetime64, np.datetime64]) -> int:
        """Return how many init times have a valid time inside `period`, ends included."""
        valid_IJ = self.valid_times
        return int(((valid_IJ >= period[0]) & (valid_IJ <= period[1])).any(axis=1).sum())

    def notes(self) -> list[str]:
        """Say what cannot be scored."""
        notes = []
        missing = int((self.valid_IJ < 0).sum())
        if missing:
            first, last = self.truth.times[0], self.truth.times[-1]
            notes.append(
                f"{missing} of {self.valid_IJ.size} valid times have no truth, which covers {first} .. {last}"
                ": scores are of the others"
            )
        without = int((self.start_I < 0).sum())
        if without:
            notes.append(f"no persistence: the truth lacks {without} of {len(self.inits)} init times")
        return notes

    def read_truth(self, number: int) -> Fields:
        """Return the fields [C, Y, X] of the truth at one of its times."""
        return self.truth_picked.fields(self.truth.read(int(number)))

    def read_forecast(self, init: int, lead: int, finite: bool = True) -> Fields:
        """Return the members [M, C, Y, X] at one init and lead time.

        Raises:
            ValueError: a value is NaN or infinite where the truth has one, and `finite`; names the first.
        """
        x_MCYX = self.forecast_picked.fields(self.forecast.read(init, self.leads[lead]))
        bad = first_bad_value(x_MCYX, self.mask_CYX) if finite else None
        if bad is not None:
            member, place, row, col = bad
            raise ValueError(
                f"the forecast of init {self.inits[init]}, lead {self.lead_h[lead]} h, member {member} has "
                f"{self.channels[place].name} = {x_MCYX[bad]} at row {row}, col {col}"
            )
        return x_MCYX


def match(forecast: Ensemble, truth: Truth, wanted: Sequence[str] = (), lead_h: Sequence[int] = ()) -> Match:
    """Compare what a forecast and the truth say about themselves.

    Args:
        forecast: an opened forecast.
        truth: an opened store.
        wanted: names of the channels to score, wind speeds (ws10) among them; none means all of the forecast
            and the wind speeds of WeatherBench 2 that can be made of them.
        lead_h: lead times (h) to score; none means all.

    Raises:
        ValueError: they cannot be compared; says which channel, unit, grid point or time differs first.
    """
    named = [find_channel(name).name for name in wanted]
    names = named or [*forecast.names, *headline_speeds(forecast.names)]
    forecast_picked, truth_picked = (
        Picked(owner, source, names) for owner, source in (("forecast", forecast), ("truth", truth))
    )
    channels = tuple(
        truth.channels[place[0]] if len(place) == 1 else speed_channel(name)
        for name, place in zip(names, truth_picked.places)
    )
    _same_units(channels, forecast.attrs.get("units"))
    _same_grid("latitudes", forecast.latitude_deg, truth.latitude_deg)
    _same_grid("longitudes", forecast.longitude_deg, truth.longitude_deg)
    leads = _leads(forecast, lead_h)
    hours = tuple(int(forecast.lead_h[lead]) for lead in leads)
    valid_IJ = np.array([[_time_index(truth, init, one) for one in hours] for init in forecast.inits])
    if not (valid_IJ >= 0).any():
        raise ValueError(
            f"no valid time of the forecast is in the truth: it is for {forecast.inits[0]} + {hours[0]} h .. "
            f"{forecast.inits[-1]} + {hours[-1]} h, the truth covers {truth.times[0]} .. {truth.times[-1]}"
        )
    return Match(
        forecast=forecast,
        truth=truth,
        inits=forecast.inits,
        lead_h=hours,
        leads=leads,
        channels=channels,
        forecast_picked=forecast_picked,
        truth_picked=truth_picked,
        start_I=np.array([_time_index(truth, init, 0) for init in forecast.inits], dtype=np.int64),
        valid_IJ=valid_IJ,
        mask_CYX=truth_picked.mask(truth.mask_CYX),
    )


def _leads(forecast: Ensemble, wanted_h: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of the lead times wanted, rising."""
    there = [int(hours) for hours in forecast.lead_h]
    missing = [hours for hours in wanted_h if hours not in there]
    if missing:
        raise ValueError(
            f"the forecast has no lead time of {missing[0]} h; it has {', '.join(map(str, there))}"
        )
    return tuple(sorted(there.index(hours) for hours in set(wanted_h))) or tuple(range(len(there)))


def _same_units(channels: Sequence[Channel], stated: object) -> None:
    """Compare with the units a forecast states for its channels; where it states none, those of the table."""
    for one in channels:
        units = (
            stated.get(one.name, one.units) if isinstance(stated, Mapping) else find_channel(one.name).units
        )
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
    """Return the number of the truth's time at a lead time, -1 where it does not have it."""
    try:
        return truth.index_of(init + np.timedelta64(lead_h, "h"))
    except ValueError:
        return -1
