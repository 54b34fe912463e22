"""Many files read as one source: cut by time (a file per year), by variable, or both.

Shapes: n times, L levels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aeris.data.axes import plain_axes
from aeris.data.layouts.source import ASSUMED, NO_TIMES, Source, Times, Variable
from aeris.data.variables import STATIC

_STATIC_NAMES = {name for name, _ in STATIC.values()}
SAME_DEG = 1e-4  # coordinates kept in float32 and float64 differ by less


class Joined:
    """Fields of several sources on one grid."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = tuple(parts)

    def read(
        self, variable: Variable, start: int, stop: int, levels_hpa: Sequence[float]
    ) -> NDArray[np.float32]:
        """Read times `start` to `stop` of a variable: [n, L, Y, X], in our order and units."""
        having = [part for part in self._parts if variable.raw in part.variables]
        if not variable.times.size:
            return having[0].read(variable.raw, 0, 1, levels_hpa)
        return read_times(having, variable.raw, variable.times[start:stop], levels_hpa)


def read_times(
    parts: Sequence[Source], name: str, times: Times, levels_hpa: Sequence[float]
) -> NDArray[np.float32]:
    """Read a variable at `times` (rising), each from the source that has it: float32 [n, L, Y, X]."""
    rows, cols = len(parts[0].axes.latitude_deg), len(parts[0].axes.longitude_deg)
    x_nLYX = np.empty((len(times), max(1, len(levels_hpa)), rows, cols), dtype=np.float32)
    for part in parts:
        own = part.variables[name].times
        mine = np.isin(times, own)
        if mine.any():
            local = np.searchsorted(own, times[mine])
            start, stop = int(local[0]), int(local[-1]) + 1
            x_nLYX[mine] = part.read(name, start, stop, levels_hpa)[local - start]
    return x_nLYX


def check_grids(parts: Sequence[Source]) -> None:
    """Refuse sources on different grids.

    Raises:
        ValueError: names two of them.
    """
    first = parts[0]
    for part in parts[1:]:
        for what in ("latitude_deg", "longitude_deg"):
            ours, theirs = getattr(first.axes, what), getattr(part.axes, what)
            if ours.shape != theirs.shape or np.abs(ours - theirs).max() > SAME_DEG:
                raise ValueError(f"{part.path} is on another grid than {first.path} ({what})")


def join(path: str, parts: Sequence[Source], layout: str = "") -> Source:
    """Make one source of several; a single one stays what it is, under the path of the collection.

    Raises:
        ValueError: their grids differ, or a variable is twice at one time.
    """
    check_grids(parts)
    names = dict.fromkeys(name for part in parts for name in part.variables)
    variables = {name: _variable(name, [part for part in parts if name in part.variables]) for name in names}
    first = parts[0]
    every = [one.times for one in variables.values() if one.times.size]
    times = np.unique(np.concatenate(every)) if every else NO_TIMES
    levels_hpa = sorted({level for one in variables.values() for level in one.levels_hpa})
    axes = plain_axes(times, first.axes.latitude_deg, first.axes.longitude_deg, levels_hpa)
    layout = layout or f"{first.layout}, {len(parts)} files"
    return Source(path, layout, axes, variables, _mapping(parts, variables), Joined(parts), first.about)


def _variable(name: str, having: Sequence[Source]) -> Variable:
    ones = [part.variables[name] for part in having]
    levels = sorted(set.intersection(*(set(one.levels_hpa) for one in ones)))
    if any(one.levels_hpa for one in ones) and not levels:
        raise ValueError(f"{having[0].path} and {having[-1].path} have no level of {name} in common")
    times = NO_TIMES if name in _STATIC_NAMES else np.concatenate([one.times for one in ones])
    order = np.argsort(times, kind="stable")
    twice = np.flatnonzero(np.diff(times[order]) == np.timedelta64(0, "s"))
    if twice.size:
        when = times[order][twice[0]]
        two = [part.path for part in having if when in part.variables[name].times][:2]
        raise ValueError(f"{name} at {when} is in two files: {' and '.join(two)}")
    imputed = np.unique(np.concatenate([one.imputed for one in ones]))
    unit = ASSUMED if any(one.unit == ASSUMED for one in ones) else ones[0].unit
    places = tuple(range(max(1, len(levels))))
    return Variable(name, tuple(levels), places, times[order], unit=unit, imputed=imputed)


def _mapping(parts: Sequence[Source], variables: dict[str, Variable]) -> list[tuple[str, str, str]]:
    """Describe the first file of every kind, and the times of all."""
    rows = [("files", f"{len(parts)}: {Path(parts[0].path).name} to {Path(parts[-1].path).name}", "")]
    for part in parts:
        new = [row for row in part.mapping if row[0] not in ("times", "files") and row not in rows]
        rows += new
    every = [one.times for one in variables.values() if one.times.size]
    if every:
        times = np.unique(np.concatenate(every))
        rows.append(("times", f"{times[0]} to {times[-1]}", str(len(times))))
    return rows
