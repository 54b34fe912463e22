"""Wind speed and wind vectors, where a forecast has both components of the wind.

Speed (`ws10`, `ws850`) is a channel of its own, made of the components of each member; the speed of a mean
wind is not the mean speed, so a climatology of the components gives none. The error of the wind vector
(`wv850`) needs no field: its square is the sum of the squares of the errors of the components.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel, channel

Fields = NDArray[np.float32]

_SPEED = re.compile(r"ws_?(\d+(?:\.\d+)?)")
SURFACE_SPEED = "ws10"
HEADLINE_SPEEDS = (SURFACE_SPEED, "ws850")
"""Scored without being asked for, where the components are there."""


def components(name: str) -> tuple[str, str] | None:
    """Return the names of the components that the speed `name` is made of, or None: it is no wind speed."""
    found = _SPEED.fullmatch(name)
    if not found:
        return None
    where = found[1]
    return channel(f"u{where}").name, channel(f"v{where}").name


def speed_channel(name: str) -> Channel:
    """Return the channel of a wind speed, such as `ws850`.

    Raises:
        ValueError: the name is not that of a wind speed.
    """
    parts = components(name)
    if parts is None:
        raise ValueError(f"{name!r} is no wind speed: these are called ws10, ws850 ...")
    u = channel(parts[0])
    variable = "wind_speed" if u.level_hpa is not None else "10m_wind_speed"
    return Channel(f"ws{parts[0][1:]}", variable, u.level_hpa, u.units)


def find_channel(name: str) -> Channel:
    """Look up a channel of a store, or a wind speed.

    Raises:
        ValueError: no such channel.
    """
    return speed_channel(name) if components(name) else channel(name)


def headline_speeds(names: Sequence[str]) -> list[str]:
    """Return the wind speeds to score without being asked, given the channels there are."""
    return [name for name in HEADLINE_SPEEDS if set(components(name) or ("",)) <= set(names)]


def vectors(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the wind vectors whose two components are there: `wv850` -> their places among `names`."""
    found = {}
    for place, name in enumerate(names):
        other = f"v{name[1:]}"
        if re.fullmatch(r"u\d+(\.\d+)?(hpa)?", name) and other in names:
            found[f"wv{name[1:]}"] = (place, list(names).index(other))
    return found


class Named(Protocol):
    """Anything with channels that have names."""

    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102


class Picked:
    """Takes channels out of the fields of a forecast or a store, and makes wind speeds.

    Args:
        owner: whose fields they are, for an error.
        source: what has the channels.
        wanted: short names, in the order wanted.

    Raises:
        ValueError: a channel is missing.
    """

    def __init__(self, owner: str, source: Named, wanted: Sequence[str]) -> None:
        there = list(source.names)
        self.places: list[tuple[int, ...]] = []
        for name in wanted:
            needed = (name,) if name in there else components(name) or (name,)
            missing = [one for one in needed if one not in there]
            if missing:
                what = f"{missing[0]}, which {name} is made of" if missing[0] != name else name
                raise ValueError(f"the {owner} has no channel {what}; it has {' '.join(there)}")
            self.places.append(tuple(there.index(one) for one in needed))
        self._all = self.places == [(place,) for place in range(len(there))]

    def fields(self, x: Fields) -> Fields:
        """Return the wanted channels of fields [..., C, Y, X]; the same array where they are all there is."""
        if self._all:
            return x
        found = np.empty((*x.shape[:-3], len(self.places), *x.shape[-2:]), dtype=np.float32)
        for number, places in enumerate(self.places):
            if len(places) == 1:
                found[..., number, :, :] = x[..., places[0], :, :]
            else:
                u, v = places
                found[..., number, :, :] = np.hypot(x[..., u, :, :], x[..., v, :, :])
        return found

    def mask(self, mask_CYX: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return where the wanted channels have a value."""
        return np.stack([mask_CYX[list(places)].all(axis=0) for places in self.places])


class PickedStore:
    """A store that has the wanted channels only, wind speeds among them: a climatology is made of it."""

    def __init__(self, owner: str, store: Any, wanted: Sequence[str]) -> None:
        self.names, self.times = tuple(wanted), store.times
        self.path = getattr(store, "path", "")
        self._store, self._picked = store, Picked(owner, store, wanted)

    def read(self, index: int) -> Fields:
        """Read the fields [C, Y, X] of a time."""
        return self._picked.fields(self._store.read(index))
