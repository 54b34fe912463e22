"""One opened source: what its variables are, and fields read in our order and units.

A layout brings an object with `read` (its own order, its own units) and the axes; all else is here.

Shapes: n times, L levels, Y rows, X cols.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aeris.data.axes import Axes
from aeris.data.plausible import best_level, complaint, is_impossible, likely_unit
from aeris.data.units import conversion
from aeris.data.variables import ALIASES, UNITS

Times = NDArray[np.datetime64]
NO_TIMES = np.zeros(0, dtype="datetime64[s]")
STATED, ASSUMED, TOLD = "stated", "assumed", "told"  # by the file, by us, by the user


@dataclass(frozen=True)
class Variable:
    """How one variable of a source becomes ours: value * factor + offset."""

    raw: str
    """Its name in the source, or the names of its fields there."""
    levels_hpa: tuple[float, ...]
    """Rising; empty at the surface."""
    places: tuple[int, ...]
    """Where the layout keeps each level (or, without levels, the variable)."""
    times: Times
    """Valid times, rising; none if it does not change."""
    factor: float = 1.0
    offset: float = 0.0
    unit: str = STATED
    """Who says in which unit the values are: `stated`, `assumed` or `told`."""
    imputed: Times = field(default_factory=lambda: NO_TIMES)
    """Times left out because the source says that the values were made up."""

    def at(self, levels_hpa: Sequence[float]) -> tuple[int, ...]:
        """Return the places of levels, or of the variable itself if none are given.

        Raises:
            ValueError: it has no such level.
        """
        if not len(levels_hpa):
            return self.places
        place = dict(zip(self.levels_hpa, self.places))
        missing = [f"{level:g}" for level in levels_hpa if level not in place]
        if missing:
            there = " ".join(f"{level:g}" for level in self.levels_hpa) or "none"
            raise ValueError(f"{self.raw} has no level {', '.join(missing)} hPa; its levels: {there}")
        return tuple(place[level] for level in levels_hpa)


class Fields(Protocol):
    """What a layout brings."""

    def read(self, variable: Variable, start: int, stop: int, levels_hpa: Sequence[float]) -> NDArray[Any]:
        """Read times `start` to `stop` of a variable: [n, L, Y, X], rows and cols as in the source.

        n is 1 for what does not change, L is 1 without levels; missing values are NaN.
        """


@dataclass(frozen=True)
class Source:
    """Files of one origin, opened."""

    path: str
    layout: str
    """Name of the recognised layout, such as `makani HDF5`."""
    axes: Axes
    variables: dict[str, Variable]
    """WeatherBench 2 name -> how to read it."""
    mapping: list[tuple[str, str, str]]
    """(what, in the source, in the store), for printing."""
    fields: Fields
    about: dict[str, str] = field(default_factory=dict)
    """What the files say about themselves: title, source, institution, license, comment."""
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def units_assumed(self) -> tuple[str, ...]:
        """Variables whose unit the source does not say."""
        return tuple(name for name, one in self.variables.items() if one.unit == ASSUMED)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of names, units, levels, grid and times."""
        parts = {
            name: [UNITS.get(name), one.levels_hpa, _digest(one.times.astype(np.int64).tobytes())]
            for name, one in sorted(self.variables.items())
        }
        grid = [np.round(x, 4).tolist() for x in (self.axes.latitude_deg, self.axes.longitude_deg)]
        return _digest(json.dumps([parts, grid]).encode())[:16]

    def read(
        self, variable: str, start: int = 0, stop: int = 1, levels_hpa: Sequence[float] = ()
    ) -> NDArray[np.float32]:
        """Read times `start` to `stop` of a variable: float32 [n, L, Y, X]; a dim it does not have is 1.

        Raises:
            ValueError: the file is damaged, or (at the first reading) the values are not in the unit said.
        """
        plan = self.variables[variable]
        try:
            x = self.fields.read(plan, start, stop, levels_hpa)
        except (OSError, RuntimeError, ValueError) as error:  # codecs have RuntimeError
            said = str(error)
            if said.startswith(self.path):
                raise
            raise ValueError(f"{self.path}: {variable} cannot be read: {said}") from None
        x = x[:, :, :: -1 if self.axes.flipped else 1]
        if np.any(np.diff(self.axes.longitude_order) != 1):
            x = np.take(x, self.axes.longitude_order, axis=-1)
        if variable not in self._checked:
            self._check(variable, x[0], levels_hpa)
        if (plan.factor, plan.offset) != (1.0, 0.0):
            x = x.astype(np.float64) * plan.factor + plan.offset
        return np.ascontiguousarray(x, dtype=np.float32)

    def check_assumed_units(self) -> None:
        """Refuse assumed units that the first values contradict.

        Raises:
            ValueError: names the variable, its values and the option that says the unit.
        """
        for name in self.units_assumed:
            level = best_level(name, self.variables[name].levels_hpa)
            self.read(name, levels_hpa=[] if level is None else [level])

    def _check(self, name: str, x_LYX: NDArray[Any], levels_hpa: Sequence[float]) -> None:
        """Compare the values of the first time with what can be on Earth."""
        self._checked.add(name)
        plan = self.variables[name]
        if name not in UNITS or plan.unit == TOLD:
            return
        level = best_level(name, tuple(levels_hpa))
        raw = np.asarray(x_LYX[0 if level is None else list(levels_hpa).index(level)], dtype=np.float64)
        ours = raw * plan.factor + plan.offset
        wrong = complaint(name, level, ours, self.axes.is_global)
        if wrong is None:
            return
        likely = likely_unit(name, level, raw, self.axes.is_global)
        if likely is None and not (plan.unit == ASSUMED and is_impossible(name, level, ours)):
            return
        where = f"{name}{'' if level is None else f' at {level:g} hPa'} ({plan.raw})"
        assumed = f"taken as {UNITS[name]}, for no unit is stated,"
        taken = assumed if plan.unit == ASSUMED else "in the unit stated"
        hint = f"if they are right, say --units {name}={UNITS[name]}"
        if likely is not None:
            hint = f"it looks like {likely}: say --units {name}={likely}"
        raise ValueError(f"{self.path}: {where} {taken} has values {wrong} ({UNITS[name]}); {hint}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def variable_unit(
    name: str, raw: str, given: str | None, told: Mapping[str, str]
) -> tuple[float, float, str, str]:
    """Settle the unit of a variable: factor, offset, who says so, and what to print.

    Args:
        given: the unit the file states; None if it states none.
        told: units the user states, by WeatherBench 2 name.

    Raises:
        ValueError: the unit cannot be turned into ours.
    """
    wanted = UNITS[name]
    unit = told.get(name, given)
    if unit is None:
        return 1.0, 0.0, ASSUMED, f"{name}, no unit given, taken as {wanted}"
    try:
        factor, offset = conversion(unit, wanted)
    except ValueError as error:
        raise ValueError(f"{raw}: {error}") from None
    turned = wanted if (factor, offset) == (1.0, 0.0) else f"{unit} turned into {wanted}"
    by = TOLD if name in told else STATED
    return factor, offset, by, f"{name}, {turned}{' (told with --units)' if by == TOLD else ''}"


def some_times(times: Times) -> str:
    """Write the first of some times and how many more there are."""
    return f"{times[0]}" + (f" and {len(times) - 1} more" if len(times) > 1 else "")


def units_told(units: Mapping[str, str]) -> dict[str, str]:
    """Bring the names of `--units` into WeatherBench 2 form.

    Raises:
        ValueError: a name that no variable has.
    """
    told = {}
    for name, unit in units.items():
        full = ALIASES.get(name, name)
        if full not in UNITS:
            raise ValueError(f"--units names {name!r}, which is no variable: known are {', '.join(UNITS)}")
        told[full] = unit
    return told
