"""Layouts that name every field by itself (`z500`, `q_500`, `geopotential_850`): from names to variables.

Such files rarely say units. They are assumed to be ours, and the values compared with what can be on Earth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from aeris.data.layouts.source import NO_TIMES, Times, Variable, some_times, variable_unit
from aeris.data.variables import STATIC, field_called

Rows = list[tuple[str, str, str]]
_STATIC_NAMES = {name for name, _ in STATIC.values()}


def group_fields(
    names: Sequence[str],
    times: Times,
    told: Mapping[str, str],
    imputed: Mapping[int, Times] | None = None,
) -> tuple[dict[str, Variable], Rows]:
    """Group the fields of a source into variables; those that are not known are listed as left out.

    Args:
        names: of the fields; the place of a field is its number here.
        told: units the user states, by WeatherBench 2 name.
        imputed: number of a field -> times at which its values were made up.

    Raises:
        ValueError: two fields are the same, or none is known.
    """
    places: dict[str, dict[float | None, int]] = {}
    left_out = []
    for place, spelled in enumerate(names):
        field = field_called(spelled)
        if field is None:
            left_out.append(spelled)
            continue
        levels = places.setdefault(field[0], {})
        if field[1] in levels:
            raise ValueError(f"{names[levels[field[1]]]} and {spelled} are the same field")
        levels[field[1]] = place
    if not places:
        raise ValueError(f"none of its fields is known: {', '.join(left_out) or 'it has none'}")
    variables, mapping = {}, []
    for name, levels in places.items():
        rising = sorted(level for level in levels if level is not None)
        here = [levels[level] for level in rising] or [levels[None]]
        bad = np.unique(np.concatenate([NO_TIMES, *((imputed or {}).get(place, NO_TIMES) for place in here)]))
        own = NO_TIMES if name in _STATIC_NAMES else times[~np.isin(times, bad)]
        raw = names[here[0]] if len(here) == 1 else f"{names[here[0]]} to {names[here[-1]]}"
        factor, offset, unit, said = variable_unit(name, raw, None, told)
        variables[name] = Variable(raw, tuple(rising), tuple(here), own, factor, offset, unit, bad)
        mapping.append(("variable", raw, f"{name}, {said.partition(', ')[2]}{_at(rising)}"))
        if bad.size:
            mapping.append(("imputed", f"{name} at {some_times(bad)}", "left out"))
    if left_out:
        mapping.append(("left out", ", ".join(left_out), ""))
    return variables, mapping


def _at(levels_hpa: Sequence[float]) -> str:
    return f", {' '.join(f'{level:g}' for level in levels_hpa)} hPa" if levels_hpa else ""


def levels_of(variables: Mapping[str, Variable]) -> list[float]:
    """Return all levels of some variables, rising."""
    return sorted({level for one in variables.values() for level in one.levels_hpa})


def times_row(times: Times) -> tuple[str, str, str]:
    """Describe times, for printing."""
    return ("times", f"{times[0]} to {times[-1]}", str(len(times)))
